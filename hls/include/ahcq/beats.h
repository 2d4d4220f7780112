// SPDX-License-Identifier: Apache-2.0
// Words of the AXI4-Streams and what they carry.
//
// A beat of codes holds SIMD codes of BITS bits, code i at bits [i * BITS, (i + 1) * BITS), zeros above. A row of K
// codes takes ceil(K / SIMD) beats; what the last beat holds beyond the row is ignored. A beat of floats holds OUT
// IEEE-754 numbers, number i at bits [32 * i, 32 * i + 32); a row that does not fill its last beat ends in zeros.
#ifndef AHCQ_BEATS_H
#define AHCQ_BEATS_H

#include <ap_int.h>
#if __has_include(<ap_axi_sdata.h>)
#include <ap_axi_sdata.h>
#else
#include "ap_axi_sdata.h"  // our stand-in, where hls4ml puts it
#endif
#include <hls_stream.h>
#include <stdint.h>

namespace ahcq {

// Of a config or a quantizer that has parameters for each head of attention: how many heads. Of all others 1.
template <class T, class = void>
struct head_count {
    static constexpr int value = 1;
    static constexpr bool is_per_head = false;
};

template <class T>
struct head_count<T, decltype(void(T::HEADS))> {
    static constexpr int value = T::HEADS;
    static constexpr bool is_per_head = true;
};

// The head of the next product: products follow each other head by head.
template <class T>
int next_head(int head) {
#pragma HLS INLINE
    return head == head_count<T>::value - 1 ? 0 : head + 1;
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
// A stream's width is a whole number of bytes.
constexpr int byte_bits(int bits) { return ceil_div(bits, 8) * 8; }

template <class C>
using code_axis = ap_axiu<byte_bits(C::SIMD * C::BITS), 0, 0, 0>;
template <class C>
using right_axis = ap_axiu<byte_bits(C::SIMD * C::RIGHT_BITS), 0, 0, 0>;
template <class C>
using float_axis = ap_axiu<32 * C::OUT, 0, 0, 0>;

template <int BITS, int SIMD, int WIDTH>
void unpack_codes(const ap_uint<WIDTH>& word, ap_uint<BITS> (&codes)[SIMD]) {
#pragma HLS INLINE
Unpack:
    for (int i = 0; i < SIMD; ++i) {
#pragma HLS UNROLL
        codes[i] = word.range((i + 1) * BITS - 1, i * BITS);
    }
}

inline uint32_t float_bits(float value) {
#pragma HLS INLINE
    union {
        float number;
        uint32_t bits;
    } both;
    both.number = value;
    return both.bits;
}

inline float bits_float(uint32_t bits) {
#pragma HLS INLINE
    union {
        float number;
        uint32_t bits;
    } both;
    both.bits = bits;
    return both.number;
}

template <int OUT>
ap_axiu<32 * OUT, 0, 0, 0> float_beat(const float (&values)[OUT], bool last) {
#pragma HLS INLINE
    ap_axiu<32 * OUT, 0, 0, 0> beat;
Pack:
    for (int i = 0; i < OUT; ++i) {
#pragma HLS UNROLL
        beat.data.range(32 * i + 31, 32 * i) = float_bits(values[i]);
    }
    beat.keep = -1;
    beat.strb = -1;
    beat.last = last;
    return beat;
}

}  // namespace ahcq

#endif
