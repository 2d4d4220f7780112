// SPDX-License-Identifier: Apache-2.0
// Accumulators to float32 in the golden model's order; every operation rounds by itself (half to even). `dequantize` keeps
// the parameters and shares a chunk out to LANES times `dequantize_lane`, which has the arithmetic; `gelu_unit` is there GELUS
// times.
//
//   t = f(multiply) * s_g, of hluq t = f(multiply) * s_u + f(shift) * s_l; group after group t = t_before + t
//   The shift lane of hluq is a second group to a lane.
//   constant weights: t = t + offset_n (hluq, table), then y = t * weight_scale_n, then y = y + bias_n
//   products: y = t, s being that of the head
#ifndef AHCQ_ENGINE_DEQUANTIZE_H
#define AHCQ_ENGINE_DEQUANTIZE_H

#include "ahcq/beats.h"
#include "ahcq/gelu.h"
#include "types.h"

namespace ahcq {
namespace engine {

template <class C>
void dequantize(
    hls::stream<command>& commands,
    hls::stream<beat>& parameters,
    hls::stream<accumulators>& in,
    hls::stream<uint16_t>& in_places,
    hls::stream<lane_work> (&out)[LANES],
    hls::stream<uint16_t>& out_places) {
    const command c = commands.read();
    const bool product = is(c, PRODUCT);
    beat lane[MAX_GROUPS];  // scales of the groups or heads
    for (uint32_t i = 0; i < lane_beats(c); ++i) {
#pragma HLS PIPELINE II = 1
        lane[i] = parameters.read();
    }
    beat weight[CHUNKS], bias[CHUNKS], offset[CHUNKS];
    int64_t shift[CHUNKS][LANES];
#pragma HLS ARRAY_PARTITION variable = shift complete dim = 2
    uint16_t places = 0;  // of the sums that come next, which stay in their stream while parameters are loaded
    const bool two_lanes = C::SHIFTS && c.family == HLUQ;
    uint32_t loads = 0, chunk = 0, group = 0, head = 0;
    bool held = false, shifts = false, first = true, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        // Shift lanes follow after CHUNKS turns, however many chunks there are: as many as a lane needs for its sum. In
        // between it has work of which nothing comes: without it, turns that waited behind a slow memory would follow
        // each other at once.
        const bool idle = two_lanes && !shifts && chunk != 0 && chunk >= chunks_of(c, places);
        if (!held && !shifts && !idle) {
            places = in_places.read();
            held = true;
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
            accumulators now = {};
#pragma HLS ARRAY_PARTITION variable = now.multiply complete
#pragma HLS ARRAY_PARTITION variable = now.shift complete
            if (held) now = in.read();
            const bool gives = two_lanes ? shifts : at(places, LAST_GROUP);
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                lane_work work;
                const int64_t later = shift[chunk][i], sum = now.multiply[i];
                work.sum = held ? sum : later;  // where nothing comes of it, anything
                if (held) shift[chunk][i] = narrow(now.shift[i]);
                work.scale = shifts ? scales.word[3] : scales.word[2];
                work.weight = weight_scale.word[i];
                work.bias = bias_value.word[i];
                work.offset = offset_value.word[i];
                work.chunk = chunk;
                work.flags = ((two_lanes ? !shifts : at(places, FIRST_GROUP)) ? LANE_FIRST : 0) |
                             (gives ? LANE_LAST : 0) | (is(c, OFFSET) ? LANE_OFFSET : 0) |
                             (product ? LANE_PRODUCT : 0) | (is(c, GELU) ? LANE_GELU : 0);
                out[i].write(work);
            }
            if (gives) out_places.write(places);
            held = false;
            ++chunk;
            if (chunk == (two_lanes && !shifts ? uint32_t(CHUNKS) : chunks_of(c, places))) {
                chunk = 0;
                if (gives) more = !at(places, END_OF_COMMAND);
                shifts = two_lanes && !shifts;
            }
        }
    }
}

// Runs for ever: what it does stands in the work.
template <class C>
void dequantize_lane(hls::stream<lane_work>& in, hls::stream<float>& out, hls::stream<float>& out_curved) {
    float partial[CHUNKS];  // sums of the groups, or lanes, so far
    while (true) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = partial inter distance = 8 true
        AHCQ_TURN;
        const lane_work work = in.read();
        float t = float(narrow(work.sum)) * bits_float(work.scale);
        if ((work.flags & LANE_FIRST) == 0) t = partial[work.chunk % CHUNKS] + t;
        partial[work.chunk % CHUNKS] = t;
        if ((work.flags & LANE_OFFSET) != 0) t = t + bits_float(work.offset);
        const float scaled = t * bits_float(work.weight);
        const float whole = scaled + bits_float(work.bias);
        const float value = (work.flags & LANE_PRODUCT) != 0 ? t : whole;
        const bool curved = (work.flags & LANE_GELU) != 0, last = (work.flags & LANE_LAST) != 0;
        if (last && !curved) out.write(value);
        if (last && curved) out_curved.write(value);
    }
}

// GELU of LANES / GELUS lanes, one after the other. Runs for ever.
inline void gelu_unit(hls::stream<float> (&in)[LANES / GELUS], hls::stream<float> (&out)[LANES / GELUS]) {
    uint8_t lane = 0;
    while (true) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        float value = 0;
        for (int i = 0; i < LANES / GELUS; ++i) {
#pragma HLS UNROLL
            if (lane == i) value = in[i].read();
        }
        const float curve = gelu(value);
        for (int i = 0; i < LANES / GELUS; ++i) {
#pragma HLS UNROLL
            if (lane == i) out[i].write(curve);
        }
        lane = (lane + 1) % (LANES / GELUS);
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
