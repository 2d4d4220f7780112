// SPDX-License-Identifier: Apache-2.0
// Of arrays.h before: a whole matrix goes into a stream of depth 4, and only then its reader is called.
#include <hls_stream.h>

void quantize_rows(hls::stream<int>& in, int rows, hls::stream<int>& out) {
    for (int i = 0; i < 16 * rows; ++i) {
#pragma HLS PIPELINE II = 1
        out.write(in.read() >> 4);
    }
}

void top(hls::stream<int>& values, int rows, hls::stream<int>& out) {
    hls::stream<int> floats("floats");
#pragma HLS STREAM variable = floats depth = 4
    for (int i = 0; i < 16 * rows; ++i) {
#pragma HLS PIPELINE II = 1
        floats.write(values.read());
    }
    quantize_rows(floats, rows, out);
}
