// SPDX-License-Identifier: Apache-2.0
// Double buffers: while the cells read one half, the other fills, one beat every `interval` turns, or every turn when
// the cells wait for it.
#ifndef AHCQ_ENGINE_BUFFERS_H
#define AHCQ_ENGINE_BUFFERS_H

#include "types.h"

namespace ahcq {
namespace engine {

// Where each beat of the left rows belongs: the rows of a block to one cell after the other.
template <class C>
void place_left(hls::stream<command>& commands, hls::stream<beat>& in, hls::stream<left_load>& out) {
    const command c = commands.read();
    const uint16_t length = row_beats<C>(c);
    const uint16_t last_rows = c.m - uint32_t(c.blocks - 1) * c.block_rows;
    uint16_t beats_left = length, rows_left = c.blocks == 1 ? last_rows : c.block_rows, blocks_left = c.blocks;
    uint16_t base = 0, address = 0;
    uint32_t products_left = c.batch;
    uint8_t cell = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const bool ends_row = beats_left == 1, ends_rows = rows_left == 1, last_block = blocks_left == 1;
        const bool last_cell = cell == C::CELLS - 1, ends_block = ends_row && ends_rows;
        left_load load;
        load.data = in.read();
        load.address = address;
        load.cell = cell;
        load.last = ends_block;
        load.final = ends_block && last_block && products_left == 1;
        out.write(load);
        more = !load.final;
        beats_left = ends_row ? length : uint16_t(beats_left - 1);
        address = !ends_row ? uint16_t(address + 1) : ends_rows ? 0 : last_cell ? uint16_t(base + length) : base;
        if (ends_row) {
            base = ends_rows ? 0 : last_cell ? uint16_t(base + length) : base;
            cell = ends_rows || last_cell ? 0 : cell + 1;
            rows_left = !ends_rows                                         ? uint16_t(rows_left - 1)
                        : (last_block ? c.blocks == 1 : blocks_left == 2) ? last_rows
                                                                           : c.block_rows;
        }
        if (ends_block) blocks_left = last_block ? c.blocks : uint16_t(blocks_left - 1);
        if (ends_block && last_block) --products_left;
    }
}

// Rows of a block, a bank for each cell.
template <class C>
void buffer_left(
    hls::stream<command>& commands,
    hls::stream<left_load>& in,
    hls::stream<turn>& turns,
    hls::stream<fold_of<C::FLOATS> > (&out)[C::CELLS]) {
    const command c = commands.read();
    beat memory[C::CELLS][2 * C::LEFT_DEPTH];
#pragma HLS ARRAY_PARTITION variable = memory complete dim = 1
    const bool wide = c.left_bits > 4;
    uint8_t pause = 0;
    bool upper = false;  // the half that is filled
    bool loading = true, loaded = false, final = false, computing = false, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (loading && (pause == 0 || !computing)) {
            const left_load load = in.read();
            for (int i = 0; i < C::CELLS; ++i) {
#pragma HLS UNROLL
                if (load.cell == i) memory[i][(upper ? C::LEFT_DEPTH : 0) + load.address] = load.data;
            }
            pause = c.left_interval - 1;
            loaded = load.last;
            loading = !load.last;
            final = load.final;
        } else if (pause != 0) {
            --pause;
        }
        if (computing) {
            fold_of<C::FLOATS> fold;
            fold.now = turns.read();
            for (int i = 0; i < C::CELLS; ++i) {
#pragma HLS UNROLL
                const beat now = memory[i][(upper ? 0 : C::LEFT_DEPTH) + fold.now.left_address];
                take(fold, now, wide);
                out[i].write(fold);
            }
            if (at(fold.now.places, END_OF_BLOCK)) computing = false;
            if (at(fold.now.places, END_OF_COMMAND)) more = false;
        }
        if (!computing && loaded) {
            computing = true;
            loaded = false;
            loading = !final;
            upper = !upper;
        }
    }
}

// Tiles of PES columns for all cells. A beat is eight columns of a fold, or, TRANSPOSED, one k of 64 columns; then a fold is
// complete after eight beats. With PLANE = 8 the high nibbles have a memory of their own, and both are read at once.
template <class C>
void buffer_right(
    hls::stream<command>& commands,
    hls::stream<beat>& in,
    hls::stream<turn>& turns,
    hls::stream<right_columns<C> > (&out)[C::CELLS][CHUNKS]) {
    const command c = commands.read();
    // A bank for each chunk: a beat of eight columns goes straight to its place.
    beat memory[CHUNKS][2 * C::RIGHT_DEPTH], high[CHUNKS][C::PLANE == 4 ? 1 : 2 * C::RIGHT_DEPTH];
#pragma HLS ARRAY_PARTITION variable = memory complete dim = 1
#pragma HLS ARRAY_PARTITION variable = high complete dim = 1
    uint32_t turned[PES];  // codes of each column that came one by one: after eight of them it holds no older one
#pragma HLS ARRAY_PARTITION variable = turned complete
    const bool transposed = is(c, TRANSPOSED);
    const uint32_t tiles = tiles_of(c), folds = c.folds * planes_of(c);
    uint32_t product = 0, row = 0, tile = 0;  // of the tile that is loaded
    uint32_t fold = 0, chunk = 0, half = 0, pause = 0;
    bool loading = false, loaded = false, computing = false, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (!loading && !loaded && product < c.batch) {  // the next tile
            loading = true;
            fold = 0;
            if (++tile == tiles) {
                tile = 0;
                row += c.block_rows;
                if (row >= c.m || tiles == 1) {
                    row = 0;
                    ++product;
                }
            }
        }
        if (loading && (pause == 0 || !computing)) {
            const beat now = in.read();
#pragma HLS ARRAY_PARTITION variable = now.word complete
            for (int j = 0; j < CHUNKS; ++j) {
#pragma HLS UNROLL
                beat part;
#pragma HLS ARRAY_PARTITION variable = part.word complete
                for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                    const int column = j * LANES + i;
                    const uint32_t nibble = (now.word[j] >> (4 * i)) & 15;
                    turned[column] = turned[column] >> 4 | nibble << 28;
                    part.word[i] = transposed ? turned[column] : now.word[i];
                }
                const bool complete = chunk == (transposed ? CHUNKS - 1 : uint32_t(j));
                const bool below = C::PLANE == 4 || fold < c.folds;
                if (complete && below) memory[j][half * C::RIGHT_DEPTH + fold] = part;
                if (C::PLANE == 8 && complete && !below) high[j][half * C::RIGHT_DEPTH + fold - c.folds] = part;
            }
            pause = c.right_interval - 1;
            if (++chunk == CHUNKS) {
                chunk = 0;
                if (++fold == folds) {
                    loading = false;
                    loaded = true;
                }
            }
        } else if (pause != 0) {
            --pause;
        }
        if (computing) {
            const turn now = turns.read();
            const bool wide = C::PLANE == 8 && c.right_bits > 4;
            for (int j = 0; j < CHUNKS; ++j) {
#pragma HLS UNROLL
                const beat columns = memory[j][(1 - half) * C::RIGHT_DEPTH + now.right_address];
#pragma HLS ARRAY_PARTITION variable = columns.word complete
                const beat above = C::PLANE == 4 ? columns : high[j][(1 - half) * C::RIGHT_DEPTH + now.right_address];
#pragma HLS ARRAY_PARTITION variable = above.word complete
                right_columns<C> part;
#pragma HLS ARRAY_PARTITION variable = part.word complete
                for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                    part.word[i] = joined<C>(columns.word[i], wide ? above.word[i] : 0);
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
            half = 1 - half;
        }
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
