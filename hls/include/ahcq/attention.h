// SPDX-License-Identifier: Apache-2.0
// Products of two run-time operands: Q.K^T (right codes (N, K)) and A.V (right codes (K, N)).
//
// P = sum a*b, A = sum a of the left row, B = sum b of the right row or column; both zero points are taken off at the
// end: acc = ((P - zero_b * A) - zero_a * B) + K * zero_a * zero_b. The right operand comes first and stays on chip.
// With C::HEADS both zero points are those of the product's head.
#ifndef AHCQ_ATTENTION_H
#define AHCQ_ATTENTION_H

#include "linear.h"

namespace ahcq {

// On-chip copy of the right codes: [tile * FOLDS + fold][pe][i], and the sum of each output's codes.
template <class C>
struct right_t {
    ap_uint<C::RIGHT_BITS> b[C::TILES * C::FOLDS][C::PE][C::SIMD];
    typename C::acc_t sum[C::TILES][C::PE];
};

// Rows of K codes, one for each output (Q.K^T); K codes in FOLDS beats.
template <class C>
void load_right_rows(hls::stream<right_axis<C> >& in, right_t<C>& right) {
    typename C::acc_t sum = 0;
LoadOutputs:
    for (int n = 0; n < C::TILES * C::PE; ++n) {
    LoadFolds:
        for (int f = 0; f < C::FOLDS; ++f) {
#pragma HLS PIPELINE II = 1
            ap_uint<C::RIGHT_BITS> codes[C::SIMD];
#pragma HLS ARRAY_PARTITION variable = codes complete
            ap_uint<byte_bits(C::SIMD * C::RIGHT_BITS)> word = 0;
            if (n < C::N) word = in.read().data;
            unpack_codes<C::RIGHT_BITS, C::SIMD>(word, codes);
            typename C::acc_t fold_sum = 0;
            for (int i = 0; i < C::SIMD; ++i) {
#pragma HLS UNROLL
                const ap_uint<C::RIGHT_BITS> code = f * C::SIMD + i < C::K ? codes[i] : ap_uint<C::RIGHT_BITS>(0);
                right.b[n / C::PE * C::FOLDS + f][n % C::PE][i] = code;
                fold_sum += code;
            }
            sum = f == 0 ? fold_sum : typename C::acc_t(sum + fold_sum);
            if (f == C::FOLDS - 1) right.sum[n / C::PE][n % C::PE] = sum;
        }
    }
}

// Rows of N codes, one for each k (A.V); N codes in ceil(N / SIMD) beats.
template <class C>
void load_right_columns(hls::stream<right_axis<C> >& in, right_t<C>& right) {
LoadK:
    for (int k = 0; k < C::FOLDS * C::SIMD; ++k) {
    LoadBeats:
        for (int beat = 0; beat < ceil_div(C::TILES * C::PE, C::SIMD); ++beat) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = right.sum inter distance = ceil_div(C::TILES * C::PE, C::SIMD) true
            ap_uint<C::RIGHT_BITS> codes[C::SIMD];
#pragma HLS ARRAY_PARTITION variable = codes complete
            ap_uint<byte_bits(C::SIMD * C::RIGHT_BITS)> word = 0;
            if (k < C::K && beat * C::SIMD < C::N) word = in.read().data;
            unpack_codes<C::RIGHT_BITS, C::SIMD>(word, codes);
            for (int i = 0; i < C::SIMD; ++i) {
#pragma HLS UNROLL
                const int n = beat * C::SIMD + i;
                if (n >= C::TILES * C::PE) continue;
                const ap_uint<C::RIGHT_BITS> code = n < C::N ? codes[i] : ap_uint<C::RIGHT_BITS>(0);
                typename C::acc_t& sum = right.sum[n / C::PE][n % C::PE];
                right.b[n / C::PE * C::FOLDS + k / C::SIMD][n % C::PE][k % C::SIMD] = code;
                sum = k == 0 ? typename C::acc_t(code) : typename C::acc_t(sum + code);
            }
        }
    }
}

// Zero points of a head, and K times their product.
template <class C, class = void>
struct zeros {
    static constexpr int left(int) { return C::LEFT_ZERO; }
    static constexpr int right(int) { return C::RIGHT_ZERO; }
    static constexpr int64_t product(int) { return C::ZERO_PRODUCT; }
};

template <class C>
struct zeros<C, decltype(void(C::HEADS))> {
    static int left(int head) { return C::left_zero(head); }
    static int right(int head) { return C::right_zero(head); }
    static int64_t product(int head) { return C::zero_product(head); }
};

template <class C>
void multiply_rows(
    hls::stream<fold_t<C> >& in, int rows, int head, const right_t<C>& right, hls::stream<tile_t<C> >& out) {
    typedef typename C::acc_t acc_t;
    acc_t product[C::PE][1];
#pragma HLS ARRAY_PARTITION variable = product complete dim = 0
    acc_t row_sum = 0;
Rows:
    for (int row = 0; row < rows; ++row) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 4096
    Tiles:
        for (int t = 0; t < C::TILES; ++t) {
        Folds:
            for (int f = 0; f < C::FOLDS; ++f) {
#pragma HLS PIPELINE II = 1
                const fold_t<C> fold = in.read();
#pragma HLS ARRAY_PARTITION variable = fold.u complete
                acc_t fold_sum = 0;
                for (int i = 0; i < C::SIMD; ++i) {
#pragma HLS UNROLL
                    fold_sum += fold.u[i];
                }
                row_sum = f == 0 ? fold_sum : acc_t(row_sum + fold_sum);
                const bool ends = f == C::FOLDS - 1;
                tile_t<C> tile;
#pragma HLS ARRAY_PARTITION variable = tile.acc complete dim = 0
            Elements:
                for (int pe = 0; pe < C::PE; ++pe) {
#pragma HLS UNROLL
                    if (f == 0) product[pe][0] = 0;
                    process_fold<C>(product[pe], fold, right.b[t * C::FOLDS + f][pe]);
                    if (!ends) continue;
                    const acc_t by_right = row_sum * zeros<C>::right(head);
                    const acc_t by_left = right.sum[t][pe] * zeros<C>::left(head);
                    const acc_t both = zeros<C>::product(head);
                    tile.acc[pe][0] = acc_t(acc_t(product[pe][0] - by_right) - by_left) + both;
                }
                if (ends) out.write(tile);
            }
        }
    }
}

// `batch` products of `rows` left rows each; before each product its right operand.
template <class C>
void multiply_pairs(
    hls::stream<fold_t<C> >& in,
    hls::stream<right_axis<C> >& in_right,
    int batch,
    int rows,
    hls::stream<tile_t<C> >& out) {
    right_t<C> right;
#pragma HLS ARRAY_PARTITION variable = right.b complete dim = 2
#pragma HLS ARRAY_PARTITION variable = right.b complete dim = 3
#pragma HLS ARRAY_PARTITION variable = right.sum complete dim = 2
    int head = 0;
Batch:
    for (int item = 0; item < batch; ++item) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 64
        if (C::RIGHT_IS_KN) {
            load_right_columns<C>(in_right, right);
        } else {
            load_right_rows<C>(in_right, right);
        }
        multiply_rows<C>(in, rows, head, right, out);
        head = next_head<C>(head);
    }
}

}  // namespace ahcq

#endif
