// SPDX-License-Identifier: Apache-2.0
// The sequencer: every turn of the cells, in the order product, block of rows, tile of columns, step, group, digit of the
// left operands, plane of the right nibbles (the most significant first), fold. Three processes, so that what goes round in
// each is short; counters go down, and of the next turn. Where the sums of a tile's columns are wanted, a step of a row of
// ones comes first.
#ifndef AHCQ_ENGINE_SEQUENCE_H
#define AHCQ_ENGINE_SEQUENCE_H

#include "types.h"

namespace ahcq {
namespace engine {

template <class C>
void walk_steps(hls::stream<command>& commands, hls::stream<step>& out) {
    const command c = commands.read();
    const uint16_t tiles = tiles_of(c), length = step_rows<C>() * row_beats<C>(c);
    uint16_t steps = c.blocks == 1 ? c.last_steps : c.steps;
    uint16_t steps_left = steps, tiles_left = tiles, blocks_left = c.blocks, row_address = 0;
    uint32_t products_left = c.batch;
    const bool with_sums = wants_sums<C>(c);
    bool of_sums = with_sums, more = true;  // whether the step is of a row of ones
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const bool last_step = !of_sums && steps_left == 1, last_tile = tiles_left == 1, last_block = blocks_left == 1;
        const bool last_product = products_left == 1;
        step now;
        now.row_address = row_address;
        now.places = (of_sums ? COLUMN_SUMS : steps_left == steps ? FIRST_STEP : 0) | (last_step ? LAST_STEP : 0) |
                     (tiles_left == tiles ? FIRST_TILE : 0) | (last_tile ? LAST_TILE : 0) |
                     (blocks_left == c.blocks ? FIRST_BLOCK : 0) | (last_block ? LAST_BLOCK : 0) |
                     (last_product ? LAST_PRODUCT : 0);
        out.write(now);
        more = !(last_step && last_tile && last_block && last_product);
        row_address = of_sums || last_step ? 0 : row_address + length;
        if (last_step && last_tile) {  // the last block may be shorter; a product of one block has only that
            steps = (last_block ? c.blocks == 1 : blocks_left == 2) ? c.last_steps : c.steps;
        }
        if (!of_sums) steps_left = last_step ? steps : uint16_t(steps_left - 1);
        if (last_step) tiles_left = last_tile ? tiles : uint16_t(tiles_left - 1);
        if (last_step && last_tile) blocks_left = last_block ? c.blocks : uint16_t(blocks_left - 1);
        if (last_step && last_tile && last_block) --products_left;
        of_sums = with_sums && last_step && (tiles != 1 || last_block);  // one tile stays for all blocks
    }
}

template <class C>
void walk_passes(
    hls::stream<command>& commands, hls::stream<beat>& groups, hls::stream<step>& in, hls::stream<pass>& out) {
    const command c = commands.read();
    uint16_t sizes[MAX_GROUPS];
#pragma HLS ARRAY_PARTITION variable = sizes complete
    for (uint32_t i = 0; i < group_beats(c); ++i) {
#pragma HLS PIPELINE II = 1
        const beat now = groups.read();
#pragma HLS ARRAY_PARTITION variable = now.word complete
        for (int j = 0; j < LANES; ++j) {
#pragma HLS UNROLL
            sizes[(i * LANES + j) % MAX_GROUPS] = uint16_t(now.word[j]);
        }
    }
    const uint8_t planes = C::PLANE == 4 ? planes_of(c) : 1;
    step row;
    uint16_t first_fold = 0;
    // of HLUQ's codes above L, which have eight bits at most, one digit or two do
    const uint8_t top_plane = planes - 1, top_digit = c.digits - 1;
    const uint8_t first_digit = splits<C>(c) ? uint8_t(c.left_bits > C::DIGIT) : top_digit;
    uint8_t group = 0, plane = top_plane, digit = first_digit;
    bool first_pass = true, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (first_pass && group == 0) row = in.read();
        const bool last_plane = plane == 0, last_pass = digit == 0 && last_plane, last_group = group == c.groups - 1;
        const uint16_t size = sizes[group % MAX_GROUPS];
        pass now;
        now.places = row.places | (first_pass ? FIRST_PASS : 0) | (last_pass ? LAST_PASS : 0) |
                     (group == 0 ? FIRST_GROUP : 0) | (last_group ? LAST_GROUP : 0);
        now.row_address = row.row_address;
        now.first_fold = first_fold;
        now.folds = uint16_t((size + LANES - 1) / LANES);
        now.last_lanes = uint8_t((size - 1) % LANES + 1);
        now.digit = digit;
        now.plane = plane;
        out.write(now);
        const uint16_t ends = LAST_PASS | LAST_GROUP | LAST_STEP | LAST_TILE | LAST_BLOCK | LAST_PRODUCT;
        more = !at(now.places, ends);
        plane = last_plane ? top_plane : plane - 1;
        if (last_plane) digit = !last_pass ? digit - 1 : last_group ? first_digit : top_digit;
        first_pass = last_pass;
        if (last_pass) {
            first_fold = last_group || splits<C>(c) ? 0 : uint16_t(first_fold + now.folds);
            group = last_group ? 0 : group + 1;
        }
    }
}

inline void walk_folds(
    hls::stream<command>& commands, hls::stream<pass>& in, hls::stream<turn>& to_left, hls::stream<turn>& to_right) {
    const command c = commands.read();
    const bool wide = c.left_bits > 4;
    pass now;
    uint16_t whole_fold = 0, folds_left = 0;
    bool begins = true, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (begins) {
            now = in.read();
            whole_fold = now.first_fold;
            folds_left = now.folds;
        }
        const bool ends = folds_left == 1;
        turn next;
        next.places = now.places | (begins ? BEGINS : 0) | (ends ? ENDS : 0);
        next.left_address = now.row_address + (wide ? whole_fold / 4 : whole_fold / 8);
        next.right_address = (now.plane == 0 ? 0 : c.folds) + whole_fold;
        next.word = wide ? 2 * (whole_fold % 4) : whole_fold % 8;
        next.lanes = ends ? now.last_lanes : LANES;
        next.digit = now.digit;
        next.plane = now.plane;
        to_left.write(next);
        to_right.write(next);
        more = !at(next.places, END_OF_COMMAND);
        begins = ends;
        ++whole_fold;
        --folds_left;
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
