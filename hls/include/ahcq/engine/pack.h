// SPDX-License-Identifier: Apache-2.0
// Four products of nibbles in one multiplication: the C++ twin of hls/rtl/pe/pack4.sv, and what it stands for.
//
//   (w1 << 22 | w0) * (a1 << 11 | a0): fields of 11 bits, w0 a0, w0 a1, w1 a0, w1 a1; eight of them sum to 1800 < 2048.
#ifndef AHCQ_ENGINE_PACK_H
#define AHCQ_ENGINE_PACK_H

#include "types.h"

namespace ahcq {
namespace engine {

constexpr int FIELD = 11;

// Sums over eight inputs of the products of two left (a) and two right (w) nibbles each; words as in a fold.
inline void packed_sums(uint32_t a0, uint32_t a1, uint32_t w0, uint32_t w1, uint32_t (&sum)[4]) {
#pragma HLS INLINE
    uint64_t total = 0;
    for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
        const uint64_t right = uint64_t((w1 >> (4 * i)) & 15) << (2 * FIELD) | ((w0 >> (4 * i)) & 15);
        const uint64_t left = uint64_t((a1 >> (4 * i)) & 15) << FIELD | ((a0 >> (4 * i)) & 15);
        total += right * left;
    }
    for (int field = 0; field < 4; ++field) {
#pragma HLS UNROLL
        sum[field] = uint32_t(total >> (FIELD * field)) & ((1u << FIELD) - 1);
    }
}

// The same by four multiplications, as `multiply` has them.
inline void plain_sums(uint32_t a0, uint32_t a1, uint32_t w0, uint32_t w1, uint32_t (&sum)[4]) {
#pragma HLS INLINE
    const uint32_t left[2] = {a0, a1}, right[2] = {w0, w1};
    for (int field = 0; field < 4; ++field) {
#pragma HLS UNROLL
        sum[field] = 0;
        for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
            sum[field] += ((left[field % 2] >> (4 * i)) & 15) * ((right[field / 2] >> (4 * i)) & 15);
        }
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
