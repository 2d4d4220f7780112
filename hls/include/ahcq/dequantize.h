// SPDX-License-Identifier: Apache-2.0
// Accumulators to float32, in one stated order of operations; every operation rounds by itself (half to even).
//
//   grouped, uniform  t = f(acc_0) * scale_0; then t = t + f(acc_g) * scale_g for each further group
//   table             t = f(acc) * unit, then t = t + offset_n
//   hluq              t = f(multiply) * scale_uniform + f(shift) * shift_scale, then t = t + offset_n
//   linear            y = t * weight_scale_n, then y = y + bias_n
//   products          y = f(acc) * (left scale * right scale), those of the product's head
//
// OUT values a beat, one beat a cycle and group. Compile without contraction to fused multiply-adds.
#ifndef AHCQ_DEQUANTIZE_H
#define AHCQ_DEQUANTIZE_H

#include "linear.h"

namespace ahcq {

// The float32 nearest to an integer, half to even.
template <int BITS>
float to_float(const ap_int<BITS>& value) {
#pragma HLS INLINE
    return BITS <= 32 ? float(int32_t(value.to_int())) : float(int64_t(value.to_int64()));
}

template <class C, class Family>
struct dequantizer {  // uniform and grouped
    static float group(float sum, const typename C::acc_t (&acc)[1], int g, const float* scales) {
#pragma HLS INLINE
        const float product = to_float(acc[0]) * scales[g];
        return g == 0 ? product : sum + product;
    }
    static float offset(float sum, float) {
#pragma HLS INLINE
        return sum;
    }
};

template <class C>
struct dequantizer<C, table_family> {
    static float group(float, const typename C::acc_t (&acc)[1], int, const float* scales) {
#pragma HLS INLINE
        return to_float(acc[0]) * scales[0];
    }
    static float offset(float sum, float value) {
#pragma HLS INLINE
        return sum + value;
    }
};

template <class C>
struct dequantizer<C, hluq_family> {
    static float group(float, const typename C::acc_t (&acc)[2], int, const float* scales) {
#pragma HLS INLINE
        const float uniform = to_float(acc[0]) * scales[0];
        const float shifted = to_float(acc[1]) * scales[1];
        return uniform + shifted;
    }
    static float offset(float sum, float value) {
#pragma HLS INLINE
        return sum + value;
    }
};

// What the host writes through AXI4-Lite: left scales (C::LEFT_SCALES), then N weight scales, N biases and, for hluq
// and table, N offsets; for products the one scale, or one for each head.
template <class C>
struct scales_t {
    float left[C::LEFT_SCALES];
    float weight[C::TILES * C::PE];
    float bias[C::TILES * C::PE];
    float offset[C::TILES * C::PE];
};

template <class C>
void load_scales(const float memory[C::SCALE_WORDS], scales_t<C>& scales) {
LoadLeft:
    for (int i = 0; i < C::LEFT_SCALES; ++i) {
#pragma HLS PIPELINE II = 1
        scales.left[i] = memory[i];
    }
    if (C::SCALE_WORDS == C::LEFT_SCALES) return;  // a product
LoadChannels:
    for (int n = 0; n < C::N; ++n) {
#pragma HLS PIPELINE II = 3
        scales.weight[n] = memory[C::LEFT_SCALES + n];
        scales.bias[n] = memory[C::LEFT_SCALES + C::N + n];
        scales.offset[n] = C::HAS_OFFSET ? memory[C::LEFT_SCALES + (C::HAS_OFFSET ? 2 : 0) * C::N + n] : 0.0f;
    }
}

template <class C>
float finish(float sum, int n, const scales_t<C>& scales) {
#pragma HLS INLINE
    if (C::SCALE_WORDS == C::LEFT_SCALES) return sum;
    const float whole = dequantizer<C, typename C::family>::offset(sum, scales.offset[n]);
    const float scaled = whole * scales.weight[n];
    return scaled + scales.bias[n];
}

// `batch` products of `rows` rows each.
template <class C>
void dequantize_tiles(
    hls::stream<tile_t<C> >& in, int batch, int rows, const scales_t<C>& scales, hls::stream<float_axis<C> >& out) {
    float sums[C::PE];
#pragma HLS ARRAY_PARTITION variable = sums cyclic factor = C::OUT
    tile_t<C> tile;
#pragma HLS ARRAY_PARTITION variable = tile.acc complete dim = 0
    int head = 0;
    int row_of_product = 0;
Rows:
    for (int row = 0; row < batch * rows; ++row) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 4096
    Tiles:
        for (int t = 0; t < C::TILES; ++t) {
        Groups:
            for (int g = 0; g < C::GROUPS; ++g) {
            Beats:
                for (int beat = 0; beat < C::PE / C::OUT; ++beat) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = sums inter distance = C::PE / C::OUT true
                    if (beat == 0) tile = in.read();
                    float values[C::OUT];
#pragma HLS ARRAY_PARTITION variable = values complete
                Outputs:
                    for (int i = 0; i < C::OUT; ++i) {
#pragma HLS UNROLL
                        const int pe = beat * C::OUT + i;
                        const int n = t * C::PE + pe;
                        sums[pe] = dequantizer<C, typename C::family>::group(
                            sums[pe], tile.acc[pe], g, scales.left + head);
                        values[i] = n < C::N ? finish<C>(sums[pe], n, scales) : 0.0f;
                    }
                    const int first = t * C::PE + beat * C::OUT;
                    const bool last = row == batch * rows - 1 && first + C::OUT >= C::N;
                    if (g == C::GROUPS - 1 && first < C::N) out.write(float_beat<C::OUT>(values, last));
                    if (t == C::TILES - 1 && g == C::GROUPS - 1 && beat == C::PE / C::OUT - 1) {
                        row_of_product = row_of_product == rows - 1 ? 0 : row_of_product + 1;
                        if (row_of_product == 0) head = next_head<C>(head);
                    }
                }
            }
        }
    }
}

}  // namespace ahcq

#endif
