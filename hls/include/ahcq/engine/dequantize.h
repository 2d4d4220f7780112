// SPDX-License-Identifier: Apache-2.0
// Accumulators to float32 in the golden model's order; every operation rounds by itself (half to even).
//
//   t = f(multiply) * s_g, of hluq t = f(multiply) * s_u + f(shift) * s_l; group after group t = t_before + t
//   constant weights: t = t + offset_n (hluq, table), then y = t * weight_scale_n, then y = y + bias_n
//   products: y = t, s being that of the head
#ifndef AHCQ_ENGINE_DEQUANTIZE_H
#define AHCQ_ENGINE_DEQUANTIZE_H

#include "ahcq/beats.h"
#include "types.h"

namespace ahcq {
namespace engine {

template <class C>
void dequantize(
    hls::stream<command>& commands,
    hls::stream<beat>& parameters,
    hls::stream<accumulators>& in,
    hls::stream<results>& out) {
    const command c = commands.read();
    const bool product = is(c, PRODUCT);
    beat lane[MAX_GROUPS];  // scales of the groups or heads
    for (uint32_t i = 0; i < lane_beats(c); ++i) {
#pragma HLS PIPELINE II = 1
        lane[i] = parameters.read();
    }
    beat weight[CHUNKS], bias[CHUNKS], offset[CHUNKS];
    float partial[CHUNKS][LANES];
#pragma HLS ARRAY_PARTITION variable = partial complete dim = 2
    accumulators now;
#pragma HLS ARRAY_PARTITION variable = now.multiply complete
#pragma HLS ARRAY_PARTITION variable = now.shift complete
    uint32_t loads = 0, chunk = 0, group = 0, head = 0;
    bool held = false, first = true, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = partial inter distance = 8 true
        AHCQ_TURN;
        if (!held) {
            now = in.read();
            held = true;
            const uint16_t places = now.places;
            if (chunk == 0) {
                group = at(places, FIRST_GROUP) ? 0 : group + 1;
                if (at(places, FIRST_GROUP | FIRST_STEP)) {
                    if (!product) loads = SCALE_BEATS;
                    if (at(places, FIRST_TILE | FIRST_BLOCK)) {
                        head = first || head + 1 == c.heads ? 0 : head + 1;
                        first = false;
                    }
                }
            }
        }
        if (loads != 0) {
            const beat value = parameters.read();
            const uint32_t place = SCALE_BEATS - loads;
            if (place < CHUNKS) weight[place % CHUNKS] = value;
            if (place >= CHUNKS && place < 2 * CHUNKS) bias[place % CHUNKS] = value;
            if (place >= 2 * CHUNKS) offset[place % CHUNKS] = value;
            --loads;
        } else {
            const beat scales = lane[product ? head : group];
            const beat weight_scale = weight[chunk], bias_value = bias[chunk], offset_value = offset[chunk];
#pragma HLS ARRAY_PARTITION variable = offset_value.word complete
#pragma HLS ARRAY_PARTITION variable = weight_scale.word complete
#pragma HLS ARRAY_PARTITION variable = bias_value.word complete
            results result;
#pragma HLS ARRAY_PARTITION variable = result.value complete
            result.places = now.places;
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                float t = float(now.multiply[i]) * bits_float(scales.word[2]);
                const float shifted = float(now.shift[i]) * bits_float(scales.word[3]);
                if (c.family == HLUQ) t = t + shifted;
                if (!at(now.places, FIRST_GROUP)) t = partial[chunk][i] + t;
                partial[chunk][i] = t;
                if (is(c, OFFSET)) t = t + bits_float(offset_value.word[i]);
                const float scaled = t * bits_float(weight_scale.word[i]);
                const float whole = scaled + bits_float(bias_value.word[i]);
                result.value[i] = product ? t : whole;
            }
            if (at(now.places, LAST_GROUP)) out.write(result);
            held = false;
            chunk = chunk + 1 == chunks_of(c, now.places) ? 0 : chunk + 1;
            if (chunk == 0) more = !at(now.places, END_OF_COMMAND);
        }
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
