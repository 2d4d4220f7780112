// SPDX-License-Identifier: Apache-2.0
// Of linear.h before: eight additions into the accumulator, one after the other, in the loop at II = 1.
#include <ap_int.h>
#include <hls_stream.h>

struct fold_t {
    ap_uint<8> u[8];
};

void step(ap_int<24> (&acc)[1], ap_uint<8> u, int w) {
#pragma HLS INLINE
    acc[0] += int(u) * w;
}

void process_fold(ap_int<24> (&acc)[1], const fold_t& fold) {
#pragma HLS INLINE
Simd:
    for (int i = 0; i < 8; ++i) {
#pragma HLS UNROLL
        step(acc, fold.u[i], 3 * i - 4);
    }
}

void top(hls::stream<fold_t>& in, int folds, hls::stream<ap_int<24> >& out) {
    ap_int<24> acc[1];
#pragma HLS ARRAY_PARTITION variable = acc complete
    acc[0] = 0;
    for (int f = 0; f < folds; ++f) {
#pragma HLS PIPELINE II = 1
        const fold_t fold = in.read();
#pragma HLS ARRAY_PARTITION variable = fold.u complete
        process_fold(acc, fold);
        out.write(acc[0]);
    }
}
