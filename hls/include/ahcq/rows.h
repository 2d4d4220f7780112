// SPDX-License-Identifier: Apache-2.0
// Rows of left codes: read once, decoded, and sent to the processing elements once for every tile of outputs.
//
// A fold is the SIMD operands that all processing elements take in one cycle. Operands beyond the row are 0. Grouped
// channels leave in the order of C::slot (position in the fold order -> channel, -1 for padding), in which every group
// begins with a fold of its own.
#ifndef AHCQ_ROWS_H
#define AHCQ_ROWS_H

#include "beats.h"
#include "operands.h"

namespace ahcq {

template <class C>
struct fold_t {
    typename C::operand_t u[C::SIMD];
};

template <class C>
fold_t<C> read_fold(hls::stream<code_axis<C> >& in, int fold) {
#pragma HLS INLINE
    ap_uint<C::BITS> codes[C::SIMD];
#pragma HLS ARRAY_PARTITION variable = codes complete
    unpack_codes<C::BITS, C::SIMD>(in.read().data, codes);
    fold_t<C> result;
#pragma HLS ARRAY_PARTITION variable = result.u complete
Decode:
    for (int i = 0; i < C::SIMD; ++i) {
#pragma HLS UNROLL
        const bool inside = fold * C::SIMD + i < C::K;
        result.u[i] = inside ? C::family::template decode<C>(codes[i]) : typename C::operand_t(0);
    }
    return result;
}

// Channels in the order in which they come: the first tile's folds pass through while they are stored. II = 1.
template <class C>
void send_row(hls::stream<code_axis<C> >& in, hls::stream<fold_t<C> >& out) {
    fold_t<C> row[C::FOLDS];
#pragma HLS AGGREGATE variable = row
SendTiles:
    for (int tile = 0; tile < C::TILES; ++tile) {
    SendFolds:
        for (int fold = 0; fold < C::FOLDS; ++fold) {
#pragma HLS PIPELINE II = 1
            const fold_t<C> now = tile == 0 ? read_fold<C>(in, fold) : row[fold];
            if (tile == 0) row[fold] = now;
            out.write(now);
        }
    }
}

// Channels in the order of their groups: the row is complete before its first fold leaves. II = 1.
template <class C>
void send_reordered_row(hls::stream<code_axis<C> >& in, hls::stream<fold_t<C> >& out) {
    typename C::operand_t row[ceil_div(C::K, C::SIMD) * C::SIMD];
#pragma HLS ARRAY_PARTITION variable = row complete
ReadRow:
    for (int beat = 0; beat < ceil_div(C::K, C::SIMD); ++beat) {
#pragma HLS PIPELINE II = 1
        const fold_t<C> now = read_fold<C>(in, beat);
#pragma HLS ARRAY_PARTITION variable = now.u complete
        for (int i = 0; i < C::SIMD; ++i) {
#pragma HLS UNROLL
            row[beat * C::SIMD + i] = now.u[i];
        }
    }
SendTiles:
    for (int tile = 0; tile < C::TILES; ++tile) {
    SendFolds:
        for (int fold = 0; fold < C::FOLDS; ++fold) {
#pragma HLS PIPELINE II = 1
            fold_t<C> now;
#pragma HLS ARRAY_PARTITION variable = now.u complete
            for (int i = 0; i < C::SIMD; ++i) {
#pragma HLS UNROLL
                const int channel = C::slot(fold * C::SIMD + i);
                now.u[i] = channel < 0 ? typename C::operand_t(0) : row[channel];
            }
            out.write(now);
        }
    }
}

template <class C, class Family>
struct row_sender {
    static void send(hls::stream<code_axis<C> >& in, hls::stream<fold_t<C> >& out) {
#pragma HLS INLINE
        send_row<C>(in, out);
    }
};

template <class C>
struct row_sender<C, grouped_family> {
    static void send(hls::stream<code_axis<C> >& in, hls::stream<fold_t<C> >& out) {
#pragma HLS INLINE
        send_reordered_row<C>(in, out);
    }
};

// `batch` products of `rows` rows each.
template <class C>
void send_rows(hls::stream<code_axis<C> >& in, int batch, int rows, hls::stream<fold_t<C> >& out) {
SendRows:
    for (int row = 0; row < batch * rows; ++row) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 4096
        row_sender<C, typename C::family>::send(in, out);
    }
}

}  // namespace ahcq

#endif
