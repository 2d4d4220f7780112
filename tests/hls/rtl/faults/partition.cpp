// SPDX-License-Identifier: Apache-2.0
// Of dequantize.h before: several accumulators of a tile are read at a time, from an array that is not partitioned.
#include <hls_stream.h>

struct tile_t {
    int acc[128];
};

void top(hls::stream<tile_t>& in, int tiles, hls::stream<int>& out) {
    tile_t tile;
    for (int t = 0; t < tiles; ++t) {
        for (int beat = 0; beat < 32; ++beat) {
#pragma HLS PIPELINE II = 1
            if (beat == 0) tile = in.read();
            int sum = 0;
            for (int i = 0; i < 4; ++i) {
#pragma HLS UNROLL
                const int pe = beat * 4 + i;
                sum ^= tile.acc[pe];
            }
            out.write(sum);
        }
    }
}
