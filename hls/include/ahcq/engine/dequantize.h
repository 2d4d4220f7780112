// SPDX-License-Identifier: Apache-2.0
// Accumulators to float32 in the golden model's order; every operation rounds by itself (half to even). `dequantize` keeps
// the parameters and shares a chunk out to LANES times `dequantize_lane`, which has the arithmetic; `gelu_unit` is there GELUS
// times.
//
//   t = f(multiply) * s_g, of hluq t = f(multiply) * s_u + f(shift) * s_l; group after group t = t_before + t
//   constant weights: t = t + offset_n (hluq, table), then y = t * weight_scale_n + bias_n
//   products: y = t, s being that of the head
//
// A lane has one multiplication and one addition, so an output takes a turn for each group, the shift lane of hluq, an
// offset, and weight scale with bias: stages of a step, each over its chunks.
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
    beat weight[CHUNKS], added[2 * CHUNKS];  // added: offsets, biases
    int64_t shift[CHUNKS][LANES];
#pragma HLS ARRAY_PARTITION variable = shift complete dim = 2
    uint16_t places = 0;  // of the sums that come next, which stay in their stream while parameters are loaded
    const bool two_lanes = C::SHIFTS && c.family == HLUQ;
    const uint8_t after_sums = is(c, OFFSET) ? OF_OFFSET : product ? OF_GROUP : OF_WEIGHT;
    const uint8_t final = !product ? OF_WEIGHT : two_lanes ? OF_SHIFTS : OF_GROUP;  // stage that gives outputs
    const uint8_t of_last = chunks_of(c, LAST_TILE);
    uint32_t loads = 0, group = 0, head = 0;
    uint8_t stage = OF_GROUP, chunk = 0;
    // A stage follows the one before after CHUNKS turns, however many chunks there are: as many as a lane needs for its
    // sum. Those beyond take nothing from the stream, and nothing comes of them: without them, turns that waited behind a
    // slow memory would follow each other at once.
    bool takes = true;
    bool held = false, first = true, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (takes && !held) {
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
            if (place >= CHUNKS) added[place % (2 * CHUNKS)] = value;
            --loads;
        } else {
            const beat scales = lane[product ? head : group];
            const beat weight_scale = weight[chunk], addend = added[(stage == OF_WEIGHT ? CHUNKS : 0) + chunk];
#pragma HLS ARRAY_PARTITION variable = addend.word complete
#pragma HLS ARRAY_PARTITION variable = weight_scale.word complete
            accumulators now = {};
#pragma HLS ARRAY_PARTITION variable = now.multiply complete
#pragma HLS ARRAY_PARTITION variable = now.shift complete
            if (takes) now = in.read();
            const uint32_t scale = stage == OF_OFFSET ? ONE : stage == OF_SHIFTS ? scales.word[3] : scales.word[2];
            const bool gives = stage == final && at(places, LAST_GROUP);
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                lane_work work;
                const int64_t later = shift[chunk][i], sum = now.multiply[i];
                work.sum = takes ? sum : later;  // where nothing comes of it, anything
                if (takes) shift[chunk][i] = narrow(now.shift[i]);
                work.scale = stage == OF_WEIGHT ? weight_scale.word[i] : scale;
                work.addend = addend.word[i];
                work.chunk = chunk;
                work.flags = (stage == OF_GROUP && at(places, FIRST_GROUP) ? LANE_FIRST : 0) |
                             (stage >= OF_OFFSET ? LANE_AGAIN : 0) | (gives ? LANE_LAST : 0) |
                             (is(c, GELU) ? LANE_GELU : 0);
                out[i].write(work);
            }
            if (gives) out_places.write(places);
            const bool last_chunk = at(places, LAST_TILE) && chunk + 1 == of_last;
            const bool ends = chunk == CHUNKS - 1 || (stage == final && last_chunk);
            const uint8_t after = at(places, LAST_GROUP) ? after_sums : OF_GROUP;
            const uint8_t next = stage == OF_OFFSET ? OF_WEIGHT
                                 : stage == OF_GROUP && two_lanes ? OF_SHIFTS
                                 : stage == OF_WEIGHT ? OF_GROUP : after;
            if (ends && gives) more = !at(places, END_OF_COMMAND);
            takes = ends ? next == OF_GROUP : takes && !last_chunk;
            held = false;
            chunk = ends ? 0 : chunk + 1;
            stage = ends ? next : stage;
        }
    }
}

// Runs for ever: what it does stands in the work.
template <class C>
void dequantize_lane(hls::stream<lane_work>& in, hls::stream<float>& out, hls::stream<float>& out_curved) {
    float partial[CHUNKS];  // of each chunk what its stages have made so far
    while (true) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = partial inter distance = 8 true
        AHCQ_TURN;
        const lane_work work = in.read();
        const float before = partial[work.chunk % CHUNKS];
        const bool again = (work.flags & LANE_AGAIN) != 0, starts = (work.flags & LANE_FIRST) != 0;
        const float factor = again ? before : float(narrow(work.sum));
        const float addend = again ? bits_float(work.addend) : starts ? -0.0f : before;  // x + -0 is x
        const float scaled = factor * bits_float(work.scale);  // by itself: one expression might be one operation
        const float t = scaled + addend;
        partial[work.chunk % CHUNKS] = t;
        const bool curved = (work.flags & LANE_GELU) != 0, last = (work.flags & LANE_LAST) != 0;
        if (last && !curved) out.write(t);
        if (last && curved) out_curved.write(t);
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
