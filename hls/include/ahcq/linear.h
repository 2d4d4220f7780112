// SPDX-License-Identifier: Apache-2.0
// Codes times a constant weight: PE processing elements, each SIMD operands a cycle, II = 1.
//
// Formula: acc = start + sum_k step(u_k, w_k), w = weight code - zero point, subtracted where the weight is loaded;
// `start` folds the zero points of the left operand. Integers never round; every partial sum fits acc_t (the spec
// proves it). Latency of a row: TILES * FOLDS cycles and the depth of the pipeline.
#ifndef AHCQ_LINEAR_H
#define AHCQ_LINEAR_H

#include "rows.h"

namespace ahcq {

// The accumulators of one group of one tile of outputs.
template <class C>
struct tile_t {
    typename C::acc_t acc[C::PE][C::family::ACCS];
};

// One processing element: its SIMD products are summed as a tree, and one addition goes round with the accumulator.
template <class C, class W>
void process_fold(typename C::acc_t (&acc)[C::family::ACCS], const fold_t<C>& fold, const W (&w)[C::SIMD]) {
#pragma HLS INLINE
    typename C::acc_t sum[C::family::ACCS];
#pragma HLS ARRAY_PARTITION variable = sum complete
Clear:
    for (int a = 0; a < C::family::ACCS; ++a) {
#pragma HLS UNROLL
        sum[a] = 0;
    }
Simd:
    for (int i = 0; i < C::SIMD; ++i) {
#pragma HLS UNROLL
        C::family::template step<C>(sum, fold.u[i], w[i]);
    }
Add:
    for (int a = 0; a < C::family::ACCS; ++a) {
#pragma HLS UNROLL
        acc[a] += sum[a];
    }
}

// weights[tile * FOLDS + fold][pe] holds SIMD codes, code i at bit i * WEIGHT_BITS; padding holds the zero point.
template <class C>
void multiply_accumulate(
    hls::stream<fold_t<C> >& in,
    int rows,
    const typename C::word_t (&weights)[C::TILES * C::FOLDS][C::PE],
    const uint8_t (&zero_points)[C::TILES][C::PE],
    const typename C::start_t (&starts)[C::TILES * C::GROUPS][C::PE],
    hls::stream<tile_t<C> >& out) {
    tile_t<C> tile;
#pragma HLS ARRAY_PARTITION variable = tile.acc complete dim = 0
    int group = 0;
    int left = 0;  // folds that are left of the group
Rows:
    for (int row = 0; row < rows; ++row) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 4096
    Tiles:
        for (int t = 0; t < C::TILES; ++t) {
        Folds:
            for (int f = 0; f < C::FOLDS; ++f) {
#pragma HLS PIPELINE II = 1
                const bool begins = left == 0;
                if (begins) left = C::group_folds(group);
                const fold_t<C> fold = in.read();
#pragma HLS ARRAY_PARTITION variable = fold.u complete
            Elements:
                for (int pe = 0; pe < C::PE; ++pe) {
#pragma HLS UNROLL
                    if (begins) {
                        tile.acc[pe][0] = starts[t * C::GROUPS + group][pe];
                        for (int a = 1; a < C::family::ACCS; ++a) tile.acc[pe][a] = 0;
                    }
                    const typename C::word_t word = weights[t * C::FOLDS + f][pe];
                    ap_int<C::WEIGHT_BITS + 1> w[C::SIMD];
#pragma HLS ARRAY_PARTITION variable = w complete
                    for (int i = 0; i < C::SIMD; ++i) {
#pragma HLS UNROLL
                        const int code = int(word >> (i * C::WEIGHT_BITS)) & ((1 << C::WEIGHT_BITS) - 1);
                        w[i] = code - int(zero_points[t][pe]);
                    }
                    process_fold<C>(tile.acc[pe], fold, w);
                }
                if (--left == 0) {
                    out.write(tile);
                    group = f == C::FOLDS - 1 ? 0 : group + 1;
                }
            }
        }
    }
}

}  // namespace ahcq

#endif
