// SPDX-License-Identifier: Apache-2.0
// The engine of float32 that those of codes are compared with: the same commands, buffers, shape of cells and ports, and
// elements that multiply and add floats. A beat is eight floats: of a left row eight of its k; of the right operand eight
// columns of one k, tile by tile of PES columns, [tile][k][chunk], whoever has written it. A cell has ROWS rows in work.
#ifndef AHCQ_ENGINE_FLOAT_ENGINE_H
#define AHCQ_ENGINE_FLOAT_ENGINE_H

#include "buffers.h"
#include "dequantize.h"
#include "fetch.h"
#include "float_cell.h"
#include "read.h"
#include "sequence.h"
#include "types.h"
#include "write.h"

namespace ahcq {
namespace engine {

// Strides to `write`, biases of each tile to `finish_floats`.
template <class C>
void distribute_floats(
    hls::stream<command>& commands,
    hls::stream<beat>& in,
    hls::stream<beat> (&to_finish)[C::CELLS],
    hls::stream<beat> (&to_write)[C::CELLS]) {
    const command c = commands.read();
    const bool product = is(c, PRODUCT);
    const uint16_t tiles = tiles_of(c);
    uint16_t tiles_left = tiles, blocks_left = c.blocks;
    uint8_t left = HEADER_BEATS;  // beats of the part
    bool header = true, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const beat now = in.read();
        for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
            if (header) to_write[cell].write(now);
            if (!header) to_finish[cell].write(now);
        }
        const bool ends = left == 1, last_tile = tiles_left == 1, last_block = blocks_left == 1;
        more = !(ends && (header ? product : last_tile && last_block));
        left = ends ? CHUNKS : left - 1;
        if (ends && !header) {
            tiles_left = last_tile ? tiles : uint16_t(tiles_left - 1);
            if (last_tile) --blocks_left;
        }
        if (ends) header = false;
    }
}

// From steps to turns: fold by fold, of each the ROWS rows of the step. `word` is the row in work.
template <class C>
void walk_rows(
    hls::stream<command>& commands, hls::stream<step>& in, hls::stream<turn>& to_left, hls::stream<turn>& to_right) {
    const command c = commands.read();
    const uint16_t length = row_beats<C>(c);
    step now = step();
    uint16_t fold = 0, address = 0;
    uint8_t row = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const bool begins = fold == 0, ends = fold == c.folds - 1, first = row == 0, last = row == ROWS - 1;
        if (begins && first) now = in.read();
        const uint16_t hidden = (first ? 0 : FIRST_STEP) | (last ? 0 : LAST_STEP);
        turn next = turn();
        next.places = (now.places & ~hidden) | (begins ? BEGINS : 0) | (ends ? ENDS : 0) | FIRST_PASS | LAST_PASS |
                      FIRST_GROUP | LAST_GROUP;
        address = first ? uint16_t(now.row_address + fold) : uint16_t(address + length);
        next.left_address = address;
        next.right_address = fold;
        next.word = row;
        to_left.write(next);
        to_right.write(next);
        more = !at(next.places, END_OF_COMMAND);
        if (last) fold = ends ? 0 : uint16_t(fold + 1);
        row = last ? 0 : row + 1;
    }
}

// Tiles of PES columns for all cells, double: a bank for each of the fold's k and each chunk.
template <class C>
void buffer_right_floats(
    hls::stream<command>& commands,
    hls::stream<beat>& in,
    hls::stream<turn>& turns,
    hls::stream<right_floats> (&out)[C::CELLS][CHUNKS]) {
    const command c = commands.read();
    beat memory[LANES][CHUNKS][2 * C::RIGHT_DEPTH];
#pragma HLS ARRAY_PARTITION variable = memory complete dim = 1
#pragma HLS ARRAY_PARTITION variable = memory complete dim = 2
    const uint16_t tiles = tiles_of(c), blocks = tiles == 1 ? uint16_t(1) : c.blocks;
    uint16_t tiles_left = tiles, blocks_left = blocks;  // to load
    uint32_t products_left = c.batch;
    uint16_t fold = 0, folds_left = c.folds;
    uint8_t bank = 0, pause = 0;
    bool upper = false;  // the half that is filled
    bool loading = true, loaded = false, final = false, computing = false, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (loading && (pause == 0 || !computing)) {
            const beat now = in.read();
            for (int k = 0; k < LANES; ++k) {
#pragma HLS UNROLL
                for (int j = 0; j < CHUNKS; ++j) {
#pragma HLS UNROLL
                    if (bank == k * CHUNKS + j) memory[k][j][(upper ? C::RIGHT_DEPTH : 0) + fold] = now;
                }
            }
            pause = c.right_interval - 1;
            const bool complete = bank == LANES * CHUNKS - 1, ends = complete && folds_left == 1;
            bank = complete ? 0 : bank + 1;
            if (complete) fold = ends ? 0 : uint16_t(fold + 1);
            if (complete) folds_left = ends ? c.folds : uint16_t(folds_left - 1);
            const bool last_tile = tiles_left == 1, last_block = blocks_left == 1;
            final = last_tile && last_block && products_left == 1;
            if (ends) tiles_left = last_tile ? tiles : uint16_t(tiles_left - 1);
            if (ends && last_tile) blocks_left = last_block ? blocks : uint16_t(blocks_left - 1);
            if (ends && last_tile && last_block) --products_left;
            loading = !ends;
            loaded = ends;
        } else if (pause != 0) {
            --pause;
        }
        if (computing) {
            const turn now = turns.read();
            for (int j = 0; j < CHUNKS; ++j) {
#pragma HLS UNROLL
                right_floats part;
#pragma HLS ARRAY_PARTITION variable = part.of_k complete
                for (int k = 0; k < LANES; ++k) {
#pragma HLS UNROLL
                    part.of_k[k] = memory[k][j][(upper ? 0 : C::RIGHT_DEPTH) + now.right_address];
                }
                for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
                    out[cell][j].write(part);
                }
            }
            if (at(now.places, END_OF_TILE) && (tiles != 1 || at(now.places, LAST_BLOCK))) computing = false;
            if (at(now.places, END_OF_COMMAND)) more = false;
        }
        if (!computing && loaded) {
            computing = true;
            loaded = false;
            loading = !final;
            upper = !upper;
        }
    }
}

// Who gets commands from `fetch`: once, and in each cell (and `write`).
enum floats_receiver {
    FLOATS_TO_READERS,
    FLOATS_TO_PARAMETERS,
    FLOATS_TO_STEPS,
    FLOATS_TO_ROWS,
    FLOATS_TO_PLACE,
    FLOATS_TO_LEFT,
    FLOATS_TO_RIGHT
};
enum floats_cell_receiver { FLOATS_TO_SPREAD, FLOATS_TO_FINISH, FLOATS_TO_GATHER };

// As `run` of engine.h.
template <class C>
void run_floats(
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
    hls::stream<beat> biases[C::CELLS], headers[C::CELLS];
    hls::stream<step> steps("steps");
    hls::stream<left_load> left_loads("left_loads");
    hls::stream<turn> left_turns("left_turns"), right_turns("right_turns");
#pragma HLS STREAM variable = right_turns depth = 16
    hls::stream<fold_of<true> > left_folds[C::CELLS];
    hls::stream<right_floats> right_folds[C::CELLS][CHUNKS];
    hls::stream<float_operands> spread[C::CELLS][CHUNKS];
    hls::stream<beat> sums[C::CELLS][CHUNKS];  // those of a step come one a turn
#pragma HLS STREAM variable = sums depth = 16
    hls::stream<uint16_t> row_places[C::CELLS];  // as many as `multiply_floats` has stages
#pragma HLS STREAM variable = row_places depth = 64
    hls::stream<float> floats[C::CELLS][LANES];
    hls::stream<float> to_gelu[C::CELLS][GELUS][LANES / GELUS], from_gelu[C::CELLS][GELUS][LANES / GELUS];
    hls::stream<uint16_t> places[C::CELLS];
#pragma HLS STREAM variable = places depth = 64
    hls::stream<outcome> outcomes[C::CELLS];
    AHCQ_LAUNCH(
        fetch<C>, program, count, requests[READ_PROGRAM], beats[READ_PROGRAM], to, to_cells, to_write, done, finished);
    AHCQ_PROCESS(request<C>, to[FLOATS_TO_READERS], requests[READ_LEFT], requests[READ_RIGHT], requests[READ_PARAMETERS]);
    AHCQ_PROCESS(distribute_floats<C>, to[FLOATS_TO_PARAMETERS], beats[READ_PARAMETERS], biases, headers);
    AHCQ_PROCESS(walk_steps<C>, to[FLOATS_TO_STEPS], steps);
    AHCQ_PROCESS(walk_rows<C>, to[FLOATS_TO_ROWS], steps, left_turns, right_turns);
    AHCQ_PROCESS(place_left<C>, to[FLOATS_TO_PLACE], beats[READ_LEFT], left_loads);
    AHCQ_PROCESS(buffer_left<C>, to[FLOATS_TO_LEFT], left_loads, left_turns, left_folds);
    AHCQ_PROCESS(buffer_right_floats<C>, to[FLOATS_TO_RIGHT], beats[READ_RIGHT], right_turns, right_folds);
    for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
        AHCQ_PROCESS(spread_floats<C>, to_cells[cell][FLOATS_TO_SPREAD], left_folds[cell], spread[cell], row_places[cell]);
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma HLS UNROLL
            AHCQ_PROCESS(multiply_floats<C>, spread[cell][chunk], right_folds[cell][chunk], sums[cell][chunk]);
        }
        AHCQ_PROCESS(
            finish_floats<C>, to_cells[cell][FLOATS_TO_FINISH], biases[cell], sums[cell], row_places[cell], floats[cell],
            to_gelu[cell], places[cell]);
        for (int unit = 0; unit < GELUS; ++unit) {
#pragma HLS UNROLL
            AHCQ_PROCESS(gelu_unit, to_gelu[cell][unit], from_gelu[cell][unit]);
        }
        AHCQ_PROCESS(
            gather_floats<C>, to_cells[cell][FLOATS_TO_GATHER], floats[cell], from_gelu[cell], places[cell], outcomes[cell]);
        AHCQ_PROCESS(write<C>, to_write[cell], headers[cell], outcomes[cell], results_out[cell], written[cell], done[cell]);
    }
#ifdef AHCQ_WAIT
    AHCQ_WAIT(sums);
#endif
}

}  // namespace engine
}  // namespace ahcq

#endif
