// SPDX-License-Identifier: Apache-2.0
// Of linear.h before: statements between the loops of a nest, which then does not flatten.
#include <hls_stream.h>

void top(hls::stream<int>& in, int rows, hls::stream<int>& out) {
    int acc = 0;
Rows:
    for (int row = 0; row < rows; ++row) {
    Tiles:
        for (int t = 0; t < 3; ++t) {
            int group = 0;
            int left = 0;
        Folds:
            for (int f = 0; f < 5; ++f) {
#pragma HLS PIPELINE II = 1
                if (left == 0) left = group == 0 ? 2 : 3;
                acc += in.read();
                if (--left == 0) {
                    out.write(acc);
                    ++group;
                }
            }
        }
    }
}
