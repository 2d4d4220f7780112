// SPDX-License-Identifier: Apache-2.0
// A processing element of LANES inputs, alone: of codes of some bits, and of float32. For counts beside each other.
#ifndef AHCQ_ENGINE_BASELINE_H
#define AHCQ_ENGINE_BASELINE_H

#include "types.h"

namespace ahcq {
namespace engine {

template <class T>
struct pe_inputs {
    T left[LANES], right[LANES];
    uint8_t row;
    bool begins, gives;
};

// Sums of u * w, exact. Runs for ever.
template <int BITS>
void pe_integer(hls::stream<pe_inputs<uint8_t> >& in, hls::stream<uint32_t>& out) {
    uint32_t acc = 0;
    while (true) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const pe_inputs<uint8_t> now = in.read();
#pragma HLS ARRAY_PARTITION variable = now.left complete
#pragma HLS ARRAY_PARTITION variable = now.right complete
        uint32_t sum = 0;
        for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
            sum += uint32_t(now.left[i] % (1 << BITS)) * (now.right[i] % (1 << BITS));
        }
        acc = (now.begins ? 0 : acc) + sum;
        if (now.gives) out.write(acc);
    }
}

// ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)); every operation rounds.
inline float tree(const float (&product)[LANES]) {
#pragma HLS INLINE
    const float low = (product[0] + product[1]) + (product[2] + product[3]);
    const float high = (product[4] + product[5]) + (product[6] + product[7]);
    return low + high;
}

// A tree of eight products, added to the sum of its row. It has ROWS rows in work, since an addition takes several
// stages: one comes again after ROWS turns. Runs for ever.
inline void pe_float(hls::stream<pe_inputs<float> >& in, hls::stream<float>& out) {
    float acc[ROWS];
    while (true) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = acc inter distance = 8 true
        AHCQ_TURN;
        const pe_inputs<float> now = in.read();
#pragma HLS ARRAY_PARTITION variable = now.left complete
#pragma HLS ARRAY_PARTITION variable = now.right complete
        float product[LANES];
#pragma HLS ARRAY_PARTITION variable = product complete
        for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
            product[i] = now.left[i] * now.right[i];
        }
        float sum = tree(product);
        if (!now.begins) sum = acc[now.row % ROWS] + sum;
        acc[now.row % ROWS] = sum;
        if (now.gives) out.write(sum);
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
