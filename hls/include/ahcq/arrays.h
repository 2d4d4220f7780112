// SPDX-License-Identifier: Apache-2.0
// A layer with arrays of floats for ports, as hls4ml joins layers: quantizers, streams of codes, the matmul.
//
// L is the generated array_layer: its config, quantizers, ROWS, scales and run.
#ifndef AHCQ_ARRAYS_H
#define AHCQ_ARRAYS_H

#include "layer.h"
#include "quantize.h"

namespace ahcq {

// ROWS rows of Q::K values as a stream of floats.
template <class Q, int ROWS, class T>
void read_array(const T* values, hls::stream<ap_axiu<32 * Q::IN, 0, 0, 0> >& floats) {
    for (int row = 0; row < ROWS; ++row) {
        for (int at = 0; at < Q::K; at += Q::IN) {
#pragma HLS PIPELINE II = 1
            float beat[Q::IN];
#pragma HLS ARRAY_PARTITION variable = beat complete
            for (int i = 0; i < Q::IN; ++i) beat[i] = at + i < Q::K ? float(values[row * Q::K + at + i]) : 0.0f;
            floats.write(float_beat<Q::IN>(beat, row == ROWS - 1 && at + Q::IN >= Q::K));
        }
    }
}

// ROWS rows of Q::K values, quantized, to the stream of a layer. Both stages run at the same time.
template <class Q, int ROWS, class T>
void quantize_array(const T* values, hls::stream<ap_axiu<byte_bits(Q::SIMD * Q::BITS), 0, 0, 0> >& out) {
#pragma HLS DATAFLOW
    hls::stream<ap_axiu<32 * Q::IN, 0, 0, 0> > floats("floats");
#pragma HLS STREAM variable = floats depth = 4
    read_array<Q, ROWS>(values, floats);
    quantize_rows<Q>(floats, ROWS, out);
}

template <class C, int ROWS, class T>
void write_array(hls::stream<float_axis<C> >& in, T* values) {
    for (int row = 0; row < ROWS; ++row) {
        for (int at = 0; at < C::N; at += C::OUT) {
#pragma HLS PIPELINE II = 1
            const ap_uint<32 * C::OUT> word = in.read().data;
            for (int i = 0; i < C::OUT && at + i < C::N; ++i) {
                values[row * C::N + at + i] = T(bits_float(ap_uint<32>(word.range(32 * i + 31, 32 * i)).to_uint()));
            }
        }
    }
}

// A constant weight: ROWS rows of K values to ROWS rows of N.
template <class L, class T, class R>
void linear_arrays(T left[L::ROWS * L::config::K], R out[L::ROWS * L::config::N]) {
#pragma HLS DATAFLOW
    hls::stream<code_axis<typename L::config> > codes("codes");
    hls::stream<float_axis<typename L::config> > floats("floats");
    quantize_array<typename L::left_quantizer, L::ROWS>(left, codes);
    L::run(codes, floats);
    write_array<typename L::config, L::ROWS>(floats, out);
}

// Two run-time operands: the right one as Q.K^T (N, K) and A.V (K, N) have it.
template <class L, class T, class S, class R>
void product_arrays(
    T left[L::ROWS * L::config::K], S right[L::config::N * L::config::K], R out[L::ROWS * L::config::N]) {
#pragma HLS DATAFLOW
    hls::stream<code_axis<typename L::config> > codes("codes");
    hls::stream<right_axis<typename L::config> > right_codes("right_codes");
    hls::stream<float_axis<typename L::config> > floats("floats");
    quantize_array<typename L::left_quantizer, L::ROWS>(left, codes);
    quantize_array<typename L::right_quantizer, L::RIGHT_ROWS>(right, right_codes);
    L::run(codes, right_codes, floats);
    write_array<typename L::config, L::ROWS>(floats, out);
}

}  // namespace ahcq

#endif
