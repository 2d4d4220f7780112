// SPDX-License-Identifier: Apache-2.0
// The sequencer: every turn of the cells, in the order product, block of rows, tile of columns, step, group, plane of
// the right nibbles, digit of the left operands, fold.
#ifndef AHCQ_ENGINE_SEQUENCE_H
#define AHCQ_ENGINE_SEQUENCE_H

#include "types.h"

namespace ahcq {
namespace engine {

template <class C>
void sequence(
    hls::stream<command>& commands,
    hls::stream<beat>& groups,
    hls::stream<turn>& to_left,
    hls::stream<turn>& to_right) {
    const command c = commands.read();
    uint16_t sizes[MAX_GROUPS];
#pragma HLS ARRAY_PARTITION variable = sizes complete
    for (uint32_t i = 0; i < group_beats(c); ++i) {
#pragma HLS PIPELINE II = 1
        const beat now = groups.read();
        for (int j = 0; j < LANES; ++j) {
#pragma HLS UNROLL
            sizes[(i * LANES + j) % MAX_GROUPS] = uint16_t(now.word[j]);
        }
    }
    const uint32_t tiles = tiles_of(c), planes = planes_of(c), length = row_beats(c);
    const bool wide = c.left_bits > 4;
    uint32_t product = 0, row = 0, tile = 0, step = 0;
    uint16_t group = 0, fold = 0, first_fold = 0, row_address = 0, left_in_group = sizes[0];
    uint8_t plane = 0, digit = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const uint16_t whole_fold = first_fold + fold;
        const bool ends = left_in_group <= LANES;
        const bool last_digit = digit == c.digits - 1, last_plane = plane == planes - 1;
        const bool last_group = group == c.groups - 1;
        const bool last_step = step + C::CELLS >= c.block_rows || row + step + C::CELLS >= c.m;
        const bool last_tile = tile == tiles - 1, last_block = row + c.block_rows >= c.m;
        turn now;
        now.places = (fold == 0 ? BEGINS : 0) | (ends ? ENDS : 0) | (digit == 0 && plane == 0 ? FIRST_PASS : 0) |
                     (last_digit && last_plane ? LAST_PASS : 0) | (group == 0 ? FIRST_GROUP : 0) |
                     (last_group ? LAST_GROUP : 0) | (step == 0 ? FIRST_STEP : 0) | (last_step ? LAST_STEP : 0) |
                     (tile == 0 ? FIRST_TILE : 0) | (last_tile ? LAST_TILE : 0) | (row == 0 ? FIRST_BLOCK : 0) |
                     (last_block ? LAST_BLOCK : 0) | (product == c.batch - 1 ? LAST_PRODUCT : 0);
        now.left_address = row_address + (wide ? whole_fold / 4 : whole_fold / 8);
        now.right_address = (plane == 0 ? 0 : c.folds) + whole_fold;
        now.word = wide ? 2 * (whole_fold % 4) : whole_fold % 8;
        now.lanes = ends ? left_in_group : LANES;
        now.digit = digit;
        now.plane = plane;
        to_left.write(now);
        to_right.write(now);
        more = !at(now.places, END_OF_COMMAND);
        ++fold;
        left_in_group -= LANES;
        if (!ends) continue;
        fold = 0;
        digit = last_digit ? 0 : digit + 1;
        if (last_digit) plane = last_plane ? 0 : plane + 1;
        if (last_digit && last_plane) {
            first_fold = last_group ? 0 : whole_fold + 1;
            group = last_group ? 0 : group + 1;
            if (last_group) {
                step = last_step ? 0 : step + C::CELLS;
                row_address = last_step ? 0 : row_address + length;
                if (last_step) {
                    tile = last_tile ? 0 : tile + 1;
                    if (last_tile) {
                        row = last_block ? 0 : row + c.block_rows;
                        if (last_block) ++product;
                    }
                }
            }
        }
        left_in_group = sizes[group % MAX_GROUPS];
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
