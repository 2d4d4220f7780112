// SPDX-License-Identifier: Apache-2.0
// Whole matmuls: stages that run at the same time, joined by streams. The generated tops only call these.
#ifndef AHCQ_LAYER_H
#define AHCQ_LAYER_H

#include "attention.h"
#include "dequantize.h"

namespace ahcq {

// `rows` rows of K codes in, `rows` rows of N floats out.
template <class C>
void linear_layer(
    hls::stream<code_axis<C> >& left,
    int rows,
    const typename C::word_t (&weights)[C::TILES * C::FOLDS][C::PE],
    const uint8_t (&zero_points)[C::TILES][C::PE],
    const typename C::start_t (&starts)[C::TILES * C::GROUPS][C::PE],
    const float scale_memory[C::SCALE_WORDS],
    hls::stream<float_axis<C> >& out) {
#pragma HLS DATAFLOW
    hls::stream<fold_t<C> > folds("folds");
    hls::stream<tile_t<C> > tiles("tiles");
#pragma HLS STREAM variable = folds depth = 4
#pragma HLS STREAM variable = tiles depth = 2
    scales_t<C> scales;
#pragma HLS ARRAY_PARTITION variable = scales.left complete
#pragma HLS ARRAY_PARTITION variable = scales.weight cyclic factor = C::OUT
#pragma HLS ARRAY_PARTITION variable = scales.bias cyclic factor = C::OUT
#pragma HLS ARRAY_PARTITION variable = scales.offset cyclic factor = C::OUT
    load_scales<C>(scale_memory, scales);
    send_rows<C>(left, 1, rows, folds);
    multiply_accumulate<C>(folds, rows, weights, zero_points, starts, tiles);
    dequantize_tiles<C>(tiles, 1, rows, scales, out);
}

// `batch` times: the right operand in, then `rows` rows of K codes in and `rows` rows of N floats out.
template <class C>
void product_layer(
    hls::stream<code_axis<C> >& left,
    hls::stream<right_axis<C> >& right,
    int batch,
    int rows,
    const float scale_memory[C::SCALE_WORDS],
    hls::stream<float_axis<C> >& out) {
#pragma HLS DATAFLOW
    hls::stream<fold_t<C> > folds("folds");
    hls::stream<tile_t<C> > tiles("tiles");
#pragma HLS STREAM variable = folds depth = 4
#pragma HLS STREAM variable = tiles depth = 2
    scales_t<C> scales;
#pragma HLS ARRAY_PARTITION variable = scales.left complete
#pragma HLS ARRAY_PARTITION variable = scales.weight cyclic factor = C::OUT
#pragma HLS ARRAY_PARTITION variable = scales.bias cyclic factor = C::OUT
#pragma HLS ARRAY_PARTITION variable = scales.offset cyclic factor = C::OUT
    load_scales<C>(scale_memory, scales);
    send_rows<C>(left, batch, rows, folds);
    multiply_pairs<C>(folds, right, batch, rows, tiles);
    dequantize_tiles<C>(tiles, batch, rows, scales, out);
}

}  // namespace ahcq

#endif
