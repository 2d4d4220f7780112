// SPDX-License-Identifier: Apache-2.0
// The whole engine: processes that run at the same time, joined by streams. docs/engine.md has the picture.
#ifndef AHCQ_ENGINE_ENGINE_H
#define AHCQ_ENGINE_ENGINE_H

#include "buffers.h"
#include "cell.h"
#include "correct.h"
#include "dequantize.h"
#include "fetch.h"
#include "quantize.h"
#include "read.h"
#include "sequence.h"
#include "softmax_unit.h"
#include "write.h"

namespace ahcq {
namespace engine {

// Who gets commands from `fetch`: once, and in each cell (and `write`).
enum receiver { TO_READERS, TO_PARAMETERS, TO_STEPS, TO_PASSES, TO_FOLDS, TO_PLACE, TO_LEFT, TO_RIGHT };
enum cell_receiver { TO_DECODE, TO_CORRECT, TO_DEQUANTIZE, TO_QUANTIZE };

// `count` descriptors from beat address `program` on; `finished` gets `count` when all results are in memory. Read and
// write ports are streams to the AXI shell, which says in `written` that all words of a cell, or of softmax, are in memory.
template <class C>
void run(
    uint32_t program,
    uint32_t count,
    hls::stream<read_request> (&requests)[C::READERS],
    hls::stream<beat> (&beats)[C::READERS],
    hls::stream<write_request> (&results_out)[C::WRITERS],
    hls::stream<bool> (&written)[C::WRITERS],
    hls::stream<uint32_t>& finished) {
#pragma HLS DATAFLOW
    hls::stream<command> to[C::RECEIVERS], to_cells[C::CELLS][C::CELL_RECEIVERS], to_write[C::WRITERS];
    hls::stream<bool> done[C::WRITERS];
    hls::stream<beat> corrections[C::CELLS], scales[C::CELLS];
    // A register where a word comes every second turn at most: no LUTs.
    hls::stream<beat> groups("groups");
#pragma HLS STREAM variable = groups depth = 1
    hls::stream<beat> tables[C::CELLS], quantizers[C::CELLS], headers[C::CELLS];
#pragma HLS STREAM variable = tables depth = 1
#pragma HLS STREAM variable = quantizers depth = 1
#pragma HLS STREAM variable = headers depth = 1
    hls::stream<step> steps("steps");
    hls::stream<pass> passes_to_make("passes_to_make");
    hls::stream<left_load> left_loads("left_loads");
    // The way of a turn over the left buffer has more stages: without room here it would stop for the right one.
    hls::stream<turn> left_turns("left_turns"), right_turns("right_turns");
#pragma HLS STREAM variable = right_turns depth = 16
    hls::stream<left_fold> left_folds[C::CELLS];
    hls::stream<right_columns<C> > right_folds[C::CELLS][CHUNKS];
    hls::stream<operands<C> > decoded[C::CELLS][CHUNKS];
    hls::stream<sums<C> > passes[C::CELLS][CHUNKS];
    hls::stream<row_sums<C> > rows[C::CELLS];  // of a pass as short as a turn there are as many as `multiply` has stages
#pragma HLS STREAM variable = rows depth = 16
    // Sums of two groups, while `dequantize` has stages without any. Places may come some stages before their sums, and are
    // read a stage before them.
    hls::stream<accumulators> corrected[C::CELLS];
#pragma HLS STREAM variable = corrected depth = 16
    hls::stream<uint16_t> corrected_places[C::CELLS];
#pragma HLS STREAM variable = corrected_places depth = 32
    hls::stream<lane_work> works[C::CELLS][LANES];
    hls::stream<float> floats[C::CELLS][LANES];
    hls::stream<float> to_gelu[C::CELLS][GELUS][LANES / GELUS], from_gelu[C::CELLS][GELUS][LANES / GELUS];
#pragma HLS STREAM variable = from_gelu depth = 1
    hls::stream<uint16_t> places[C::CELLS];  // deeper than a lane has stages
#pragma HLS STREAM variable = places depth = 64
    hls::stream<outcome> outcomes[C::CELLS];
    AHCQ_LAUNCH(
        fetch<C>, program, count, requests[READ_PROGRAM], beats[READ_PROGRAM], to, to_cells, to_write, done, finished);
    AHCQ_PROCESS(request<C>, to[TO_READERS], requests[READ_LEFT], requests[READ_RIGHT], requests[READ_PARAMETERS]);
    AHCQ_PROCESS(
        distribute<C>, to[TO_PARAMETERS], beats[READ_PARAMETERS], groups, tables, corrections, scales, quantizers, headers);
    AHCQ_PROCESS(walk_steps<C>, to[TO_STEPS], steps);
    AHCQ_PROCESS(walk_passes<C>, to[TO_PASSES], groups, steps, passes_to_make);
    AHCQ_PROCESS(walk_folds, to[TO_FOLDS], passes_to_make, left_turns, right_turns);
    AHCQ_PROCESS(place_left<C>, to[TO_PLACE], beats[READ_LEFT], left_loads);
    AHCQ_PROCESS(buffer_left<C>, to[TO_LEFT], left_loads, left_turns, left_folds);
    AHCQ_PROCESS(buffer_right<C>, to[TO_RIGHT], beats[READ_RIGHT], right_turns, right_folds);
    for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
        AHCQ_PROCESS(decode<C>, to_cells[cell][TO_DECODE], tables[cell], left_folds[cell], decoded[cell], rows[cell]);
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma HLS UNROLL
            AHCQ_PROCESS(multiply<C>, decoded[cell][chunk], right_folds[cell][chunk], passes[cell][chunk]);
        }
        AHCQ_PROCESS(
            correct<C>, to_cells[cell][TO_CORRECT], corrections[cell], passes[cell], rows[cell], corrected[cell],
            corrected_places[cell]);
        AHCQ_PROCESS(
            dequantize<C>, to_cells[cell][TO_DEQUANTIZE], scales[cell], corrected[cell], corrected_places[cell], works[cell],
            places[cell]);
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            AHCQ_PROCESS(
                dequantize_lane<C>, works[cell][lane], floats[cell][lane],
                to_gelu[cell][lane / (LANES / GELUS)][lane % (LANES / GELUS)]);
        }
        for (int unit = 0; unit < GELUS; ++unit) {
#pragma HLS UNROLL
            AHCQ_PROCESS(gelu_unit, to_gelu[cell][unit], from_gelu[cell][unit]);
        }
        AHCQ_PROCESS(
            quantize<C>, to_cells[cell][TO_QUANTIZE], quantizers[cell], floats[cell], from_gelu[cell], places[cell],
            outcomes[cell]);
        AHCQ_PROCESS(write<C>, to_write[cell], headers[cell], outcomes[cell], results_out[cell], written[cell], done[cell]);
    }
    for (int unit = 0; unit < C::SOFTMAX_UNITS; ++unit) {
#pragma HLS UNROLL
        AHCQ_DATAFLOW(
            softmax_unit, to_write[C::CELLS + unit], requests[READ_SCORES + unit], beats[READ_SCORES + unit],
            results_out[C::CELLS + unit], written[C::CELLS + unit], done[C::CELLS + unit]);
    }
#ifdef AHCQ_WAIT
    AHCQ_WAIT(corrected);
#endif
}

}  // namespace engine
}  // namespace ahcq

#endif
