// SPDX-License-Identifier: Apache-2.0
// Quantizers: float32 to codes.
//
// Uniform: code = clamp(round(x / scale) + zero_point, 0, 2^BITS - 1), true division in float32, round half to even.
// Thresholds (HLUQ, LNQ, AGQ, power of two): the rank of x is the number of boundaries <= x, so a value on a boundary
// takes the upper level; the code is C::rank_code(rank). NaN takes the top rank. Latency: BITS comparisons; II = 1.
#ifndef AHCQ_QUANTIZE_H
#define AHCQ_QUANTIZE_H

#include "beats.h"

namespace ahcq {

// Round half to even of |value| <= 2^22; integers and comparisons only, so that it is the same in every tool.
inline int round_half_even(float value) {
#pragma HLS INLINE
    const int whole = int(value);  // towards zero
    const float rest = value - float(whole);
    const bool odd = whole & 1;
    if (rest > 0.5f || (rest == 0.5f && odd)) return whole + 1;
    if (rest < -0.5f || (rest == -0.5f && odd)) return whole - 1;
    return whole;
}

// NaN takes code 0.
template <int BITS>
ap_uint<BITS> quantize_uniform(float x, float scale, int zero_point) {
#pragma HLS INLINE
    constexpr int TOP = (1 << BITS) - 1;
    const float ratio = x / scale;
    if (!(ratio > float(-zero_point))) return 0;
    if (ratio >= float(TOP - zero_point)) return TOP;
    return round_half_even(ratio) + zero_point;
}

// boundaries: 2^BITS - 1, ascending. A binary search, one comparison a bit.
template <int BITS>
ap_uint<BITS> threshold_rank(float x, const float (&boundaries)[(1 << BITS) - 1]) {
#pragma HLS INLINE
    ap_uint<BITS> rank = 0;
Search:
    for (int bit = BITS - 1; bit >= 0; --bit) {
#pragma HLS UNROLL
        const ap_uint<BITS> candidate = rank | (ap_uint<BITS>(1) << bit);
        if (!(x < boundaries[int(candidate) - 1])) rank = candidate;
    }
    return rank;
}

// `batch` times `rows` rows of K floats (OUT a beat) to rows of K codes (SIMD a beat). Q::code(x, channel) is the
// quantizer; with Q::HEADS it is Q::code(x, head), the batch being products of one head after the other.
template <class Q>
void quantize_products(
    hls::stream<ap_axiu<32 * Q::IN, 0, 0, 0> >& in,
    int batch,
    int rows,
    hls::stream<ap_axiu<byte_bits(Q::SIMD * Q::BITS), 0, 0, 0> >& out) {
    constexpr int WIDTH = byte_bits(Q::SIMD * Q::BITS);
    int head = 0;
    int row_of_product = 0;
    ap_uint<WIDTH> word = 0;
    ap_uint<32 * Q::IN> floats = 0;
Rows:
    for (int row = 0; row < batch * rows; ++row) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 4096
    Channels:
        for (int k = 0; k < Q::K; ++k) {
#pragma HLS PIPELINE II = 1
            if (k % Q::IN == 0) floats = in.read().data;
            const uint32_t bits = ap_uint<32>(floats.range(31, 0)).to_uint();
            floats >>= 32;
            const int at = k % Q::SIMD;
            if (at == 0) word = 0;
            word.range((at + 1) * Q::BITS - 1, at * Q::BITS) = Q::code(bits_float(bits), head_count<Q>::is_per_head ? head : k);
            if (at == Q::SIMD - 1 || k == Q::K - 1) {
                ap_axiu<WIDTH, 0, 0, 0> beat;
                beat.data = word;
                beat.keep = -1;
                beat.strb = -1;
                beat.last = row == batch * rows - 1 && k == Q::K - 1;
                out.write(beat);
            }
            if (k == Q::K - 1) {
                row_of_product = row_of_product == rows - 1 ? 0 : row_of_product + 1;
                if (row_of_product == 0) head = next_head<Q>(head);
            }
        }
    }
}

// Rows without heads.
template <class Q>
void quantize_rows(
    hls::stream<ap_axiu<32 * Q::IN, 0, 0, 0> >& in,
    int rows,
    hls::stream<ap_axiu<byte_bits(Q::SIMD * Q::BITS), 0, 0, 0> >& out) {
    quantize_products<Q>(in, 1, rows, out);
}

}  // namespace ahcq

#endif
