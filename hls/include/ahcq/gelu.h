// SPDX-License-Identifier: Apache-2.0
// GELU with the error function, float32.
//
// Formula: x * Phi(x) = max(x, 0) - h(|x|), h(t) = t * Phi(-t) even, from a parabola on each interval of 1/32 below 6,
// 0 from 6 on (h(6) < 1e-8). Within 5e-7 of the exact value for |x| < 6, beyond it within 1e-8. Two multiplications, three
// additions; II = 1.
#ifndef AHCQ_GELU_H
#define AHCQ_GELU_H

#include "beats.h"
#include "function_tables.h"

namespace ahcq {

inline float gelu(float x) {
#pragma HLS INLINE
    const float size = x < 0.0f ? -x : x;
    const float positive = x < 0.0f ? 0.0f : x;
    if (!(size < float(GELU_INTERVALS) / 32.0f)) return positive;  // NaN too
    const uint8_t interval = uint8_t(size * 32.0f);  // there are fewer than 256
    const float at = size - float(interval) / 32.0f;
    const float slope = gelu_curve[interval][2] * at + gelu_curve[interval][1];
    return positive - (slope * at + gelu_curve[interval][0]);
}

// `count` floats, OUT a beat.
template <int OUT>
void gelu_stream(
    hls::stream<ap_axiu<32 * OUT, 0, 0, 0> >& in, int count, hls::stream<ap_axiu<32 * OUT, 0, 0, 0> >& out) {
Beats:
    for (int beat = 0; beat < ceil_div(count, OUT); ++beat) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 4096
#pragma HLS PIPELINE II = 1
        const ap_uint<32 * OUT> word = in.read().data;
        float values[OUT];
#pragma HLS ARRAY_PARTITION variable = values complete
        for (int i = 0; i < OUT; ++i) {
#pragma HLS UNROLL
            values[i] = gelu(bits_float(ap_uint<32>(word.range(32 * i + 31, 32 * i)).to_uint()));
        }
        out.write(float_beat<OUT>(values, (beat + 1) * OUT >= count));
    }
}

}  // namespace ahcq

#endif
