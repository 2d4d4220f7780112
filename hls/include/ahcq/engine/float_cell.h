// SPDX-License-Identifier: Apache-2.0
// A cell of the engine of float32: PES elements that multiply and add floats, LANES of them a process, and what is behind.
//
//   y = sum over folds of a tree of eight products; y + bias_n for constant weights; GELU where wanted; float32
#ifndef AHCQ_ENGINE_FLOAT_CELL_H
#define AHCQ_ENGINE_FLOAT_CELL_H

#include "ahcq/beats.h"
#include "baseline.h"
#include "types.h"

namespace ahcq {
namespace engine {

// Eight floats of a row for the elements, and which row in work.
struct float_operands {
    beat left;
    uint8_t row;
    bool begins, gives;
};

// LANES columns of a fold, a beat for each of its k.
struct right_floats {
    beat of_k[LANES];
};

// Folds of a row to the elements; where a row ends, and which chunks of it are outputs.
template <class C>
void spread_floats(
    hls::stream<command>& commands,
    hls::stream<fold_of<true> >& in,
    hls::stream<float_operands> (&out)[CHUNKS],
    hls::stream<uint16_t>& out_places) {
    const command c = commands.read();
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const fold_of<true> fold = in.read();
        const uint16_t places = fold.now.places;
        float_operands result;
        result.left = fold.data;
        result.row = fold.now.word;
        result.begins = at(places, BEGINS);
        for (int j = 0; j < CHUNKS; ++j) {
#pragma HLS UNROLL
            result.gives = at(places, ENDS) && uint32_t(j) < chunks_of(c, places);
            out[j].write(result);
        }
        if (at(places, ENDS)) out_places.write(places);
        more = !at(places, END_OF_COMMAND);
    }
}

// LANES elements of a cell, as `pe_float`. Runs for ever.
template <class C>
void multiply_floats(hls::stream<float_operands>& left, hls::stream<right_floats>& right, hls::stream<beat>& out) {
    float acc[LANES][ROWS];
#pragma HLS ARRAY_PARTITION variable = acc complete dim = 1
    while (true) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = acc inter distance = 8 true
        AHCQ_TURN;
        const float_operands u = left.read();
#pragma HLS ARRAY_PARTITION variable = u.left.word complete
        const right_floats w = right.read();
#pragma HLS ARRAY_PARTITION variable = w.of_k complete
        beat result;
#pragma HLS ARRAY_PARTITION variable = result.word complete
        for (int pe = 0; pe < LANES; ++pe) {
#pragma HLS UNROLL
            float product[LANES];
#pragma HLS ARRAY_PARTITION variable = product complete
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                product[i] = bits_float(u.left.word[i]) * bits_float(w.of_k[i].word[pe]);
            }
            float sum = tree(product);
            if (!u.begins) sum = acc[pe][u.row % ROWS] + sum;
            acc[pe][u.row % ROWS] = sum;
            result.word[pe] = float_bits(sum);
        }
        if (u.gives) out.write(result);
    }
}

// Sums of a row, a chunk a turn, and their biases, to LANES streams or to the units for GELU.
template <class C>
void finish_floats(
    hls::stream<command>& commands,
    hls::stream<beat>& parameters,
    hls::stream<beat> (&in)[CHUNKS],
    hls::stream<uint16_t>& in_places,
    hls::stream<float> (&out)[LANES],
    hls::stream<float> (&out_curved)[GELUS][LANES / GELUS],
    hls::stream<uint16_t>& out_places) {
    const command c = commands.read();
    const bool product = is(c, PRODUCT), curved = is(c, GELU);
    beat bias[CHUNKS];
    uint16_t places = 0;
    uint32_t chunk = 0, loads = 0;
    bool held = false, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (!held) {
            places = in_places.read();
            held = true;
            if (at(places, FIRST_STEP) && !product) loads = CHUNKS;
        }
        if (loads != 0) {
            bias[(CHUNKS - loads) % CHUNKS] = parameters.read();
            --loads;
        } else {
            beat sum = beat();
#pragma HLS ARRAY_PARTITION variable = sum.word complete
            for (int j = 0; j < CHUNKS; ++j) {
#pragma HLS UNROLL
                if (chunk == uint32_t(j)) sum = in[j].read();
            }
            const beat added = bias[chunk % CHUNKS];
#pragma HLS ARRAY_PARTITION variable = added.word complete
            for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
                const float alone = bits_float(sum.word[lane]), whole = alone + bits_float(added.word[lane]);
                const float value = product ? alone : whole;
                if (curved) out_curved[lane / (LANES / GELUS)][lane % (LANES / GELUS)].write(value);
                if (!curved) out[lane].write(value);
            }
            out_places.write(places);
            if (++chunk == chunks_of(c, places)) {
                chunk = 0;
                held = false;
                more = !at(places, END_OF_COMMAND);
            }
        }
    }
}

// What comes of the lanes and of GELU, to `write`; columns beyond n are 0.
template <class C>
void gather_floats(
    hls::stream<command>& commands,
    hls::stream<float> (&in)[LANES],
    hls::stream<float> (&in_curved)[GELUS][LANES / GELUS],
    hls::stream<uint16_t>& in_places,
    hls::stream<outcome>& out) {
    const command c = commands.read();
    uint32_t chunk = 0, first_chunk = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const uint16_t places = in_places.read();
        outcome result;
#pragma HLS ARRAY_PARTITION variable = result.data.word complete
        result.places = places;
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            const float x = is(c, GELU) ? in_curved[lane / (LANES / GELUS)][lane % (LANES / GELUS)].read() : in[lane].read();
            const bool inside = (first_chunk + chunk) * LANES + lane < c.n;
            result.data.word[lane] = inside ? float_bits(x) : 0;
        }
        out.write(result);
        chunk = chunk + 1 == chunks_of(c, places) ? 0 : chunk + 1;
        if (chunk == 0 && at(places, LAST_STEP)) first_chunk = at(places, LAST_TILE) ? 0 : first_chunk + CHUNKS;
        if (chunk == 0) more = !at(places, END_OF_COMMAND);
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
