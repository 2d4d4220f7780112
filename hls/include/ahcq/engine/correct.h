// SPDX-License-Identifier: Apache-2.0
// Passes to accumulators: acc = sum over passes of P << (4 plane + DIGIT digit), minus z_b * A, plus a start.
//
// A is the sum of the left operands of the row, z_b the zero point of the column. The start holds what the left zero
// point takes off, -z_a * B + k * z_a * z_b: of constant weights it is a parameter, of run-time operands B is the sum that
// the right buffer made. LANES columns a turn; integers wrap nowhere, the compiler has checked their range.
#ifndef AHCQ_ENGINE_CORRECT_H
#define AHCQ_ENGINE_CORRECT_H

#include "types.h"

namespace ahcq {
namespace engine {

template <class C>
void correct(
    hls::stream<command>& commands,
    hls::stream<beat>& parameters,
    hls::stream<sums<C> >& in,
    hls::stream<column_sums>& columns,
    hls::stream<accumulators>& out) {
    const command c = commands.read();
    const bool product = is(c, PRODUCT);
    beat lane[MAX_GROUPS];  // of heads: left and right zero point
    for (uint32_t i = 0; i < lane_beats(c); ++i) {
#pragma HLS PIPELINE II = 1
        lane[i] = parameters.read();
    }
    // of a tile: right zero points, low and high words of each group's starts
    beat zeros[CHUNKS], low[CHUNKS * MAX_GROUPS], high[CHUNKS * MAX_GROUPS];
    int64_t multiply[CHUNKS][LANES], shift[CHUNKS][LANES];
#pragma HLS ARRAY_PARTITION variable = multiply complete dim = 2
#pragma HLS ARRAY_PARTITION variable = shift complete dim = 2
    sums<C> now;
#pragma HLS ARRAY_PARTITION variable = now.multiply complete
#pragma HLS ARRAY_PARTITION variable = now.shift complete
    column_sums column;
#pragma HLS ARRAY_PARTITION variable = column.value complete
    beat head_lane = beat();
    uint32_t loads = 0, loaded = 0, chunk = 0, group = 0, head = 0;
    int64_t row_multiply = 0, row_shift = 0;
    bool held = false, first = true, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (!held) {
            now = in.read();
            held = true;
            const uint16_t places = now.now.places;
            const bool first_pass = at(places, FIRST_PASS);
            if (first_pass) group = at(places, FIRST_GROUP) ? 0 : group + 1;
            if (at(places, FIRST_PASS | FIRST_GROUP | FIRST_STEP)) {
                if (product) {
                    column = columns.read();
                    if (at(places, FIRST_TILE | FIRST_BLOCK)) {
                        head = first || head + 1 == c.heads ? 0 : head + 1;
                        first = false;
                        head_lane = lane[head];
                    }
                } else {
                    loads = correction_beats(c);
                    loaded = 0;
                }
            }
            const int digit_shift = C::DIGIT * now.now.digit;
            row_multiply = (first_pass ? 0 : row_multiply) +
                           (now.now.plane == 0 ? int64_t(now.row_multiply) << digit_shift : 0);
            row_shift = first_pass ? int64_t(now.row_shift) : row_shift;
        }
        if (loads != 0) {
            const beat value = parameters.read();
            const uint32_t part = loaded / CHUNKS;
            const uint32_t place = (part - 1) / 2 * CHUNKS + loaded % CHUNKS;
            if (part == 0) zeros[loaded % CHUNKS] = value;
            if (part != 0 && part % 2 == 1) low[place % (CHUNKS * MAX_GROUPS)] = value;
            if (part != 0 && part % 2 == 0) high[place % (CHUNKS * MAX_GROUPS)] = value;
            ++loaded;
            --loads;
        } else {
            const uint16_t places = now.now.places;
            const bool first_pass = at(places, FIRST_PASS);
            const int pass_shift = 4 * now.now.plane + C::DIGIT * now.now.digit;
            const beat zero = zeros[chunk], start_low = low[group * CHUNKS + chunk];
#pragma HLS ARRAY_PARTITION variable = zero.word complete
#pragma HLS ARRAY_PARTITION variable = start_low.word complete
            const beat start_high = high[group * CHUNKS + chunk];
#pragma HLS ARRAY_PARTITION variable = start_high.word complete
            accumulators result;
#pragma HLS ARRAY_PARTITION variable = result.multiply complete
#pragma HLS ARRAY_PARTITION variable = result.shift complete
            result.places = places;
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                int64_t sum = 0, shift_sum = 0;
                int32_t column_sum = 0;
                for (int j = 0; j < CHUNKS; ++j) {  // registers behind a multiplexer
#pragma HLS UNROLL
                    if (chunk == uint32_t(j)) {
                        sum = now.multiply[j * LANES + i];
                        shift_sum = now.shift[j * LANES + i];
                        column_sum = column.value[j * LANES + i];
                    }
                }
                const int64_t total = (first_pass ? 0 : multiply[chunk][i]) + (sum << pass_shift);
                // the shift lane takes no digits of the left operand: only its first pass counts
                const int64_t shift_total = (first_pass ? 0 : shift[chunk][i]) +
                                            (now.now.digit == 0 ? shift_sum << (4 * now.now.plane) : 0);
                multiply[chunk][i] = total;
                shift[chunk][i] = shift_total;
                const int64_t left_zero = int32_t(head_lane.word[0]);
                const int64_t right_zero = product ? int32_t(head_lane.word[1]) : int32_t(zero.word[i]);
                const int64_t constant = int64_t(uint64_t(start_high.word[i]) << 32 | start_low.word[i]);
                const int64_t by_left = left_zero * (int64_t(c.k) * right_zero - column_sum);
                result.multiply[i] = total - right_zero * row_multiply + (product ? by_left : constant);
                result.shift[i] = shift_total - right_zero * row_shift;
            }
            if (at(places, LAST_PASS)) out.write(result);
            if (++chunk == chunks_of(c, places)) {
                chunk = 0;
                held = false;
                more = !at(places, END_OF_COMMAND);
            }
        }
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
