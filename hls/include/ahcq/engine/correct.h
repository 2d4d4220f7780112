// SPDX-License-Identifier: Apache-2.0
// Passes to accumulators: acc = sum over passes of P << (4 plane + DIGIT digit), minus z_b * A, plus a start. The most
// significant pass comes first, so what is there moves up by a constant and P is added (Horner).
//
// A is the sum of the left operands of the row, z_b the zero point of the column. The start holds what the left zero
// point takes off, -z_a * B + k * z_a * z_b: of constant weights it is a parameter, of run-time operands B is what a row
// of ones made before. LANES columns a turn; integers wrap nowhere, the compiler has checked their range.
#ifndef AHCQ_ENGINE_CORRECT_H
#define AHCQ_ENGINE_CORRECT_H

#include "types.h"

namespace ahcq {
namespace engine {

template <class C>
void correct(
    hls::stream<command>& commands,
    hls::stream<beat>& parameters,
    hls::stream<sums<C> > (&in)[CHUNKS],
    hls::stream<row_sums<C> >& rows,
    hls::stream<accumulators>& out,
    hls::stream<uint16_t>& out_places) {
    const command c = commands.read();
    const bool product = is(c, PRODUCT);
    const uint8_t planes = C::PLANE == 4 ? planes_of(c) : 1;
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
    column_sums of_columns[CHUNKS];  // of a tile
    row_sums<C> now;
    uint8_t left_zero = 0, head_zero = 0;  // of a head
    int64_t both = 0;                      // k * left_zero * head_zero
    uint32_t loads = 0, loaded = 0, chunk = 0, group = 0, head = 0;
    uint32_t row_multiply = 0, row_shift = 0;  // the compiler has checked that 32 bits hold them
    bool held = false, first = true, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (!held) {
            now = rows.read();
            held = true;
            const uint16_t places = now.places;
            const bool first_pass = at(places, FIRST_PASS);
            if (first_pass) group = at(places, FIRST_GROUP) ? 0 : group + 1;
            if (at(places, FIRST_PASS | FIRST_GROUP | FIRST_STEP)) {
                if (product && at(places, FIRST_TILE | FIRST_BLOCK)) {
                    head = first || head + 1 == c.heads ? 0 : head + 1;
                    first = false;
                    const beat zero = lane[head];
                    left_zero = uint8_t(zero.word[0]);
                    head_zero = uint8_t(zero.word[1]);
                    both = int64_t(c.k & 0xfffff) * uint32_t(left_zero * head_zero);
                }
                if (!product) {
                    loads = correction_beats(c);
                    loaded = 0;
                }
            }
            // a row's sum is that of its digits, which planes repeat; that of its powers comes with the last digit
            const uint64_t above = first_pass ? 0 : uint64_t(row_multiply) << C::DIGIT;
            if (now.plane == planes - 1) row_multiply = uint32_t(above + now.multiply);
            if (C::SHIFTS) row_shift = uint32_t(now.shift);
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
            const uint16_t places = now.places;
            const bool first_pass = at(places, FIRST_PASS);
            const bool lower = now.plane == 0;  // of the planes
            sums<C> sum;
#pragma HLS ARRAY_PARTITION variable = sum.multiply complete
#pragma HLS ARRAY_PARTITION variable = sum.shift complete
            for (int j = 0; j < CHUNKS; ++j) {
#pragma HLS UNROLL
                if (chunk == uint32_t(j)) sum = in[j].read();
            }
            const beat zero = zeros[chunk], start_low = low[group * CHUNKS + chunk];
#pragma HLS ARRAY_PARTITION variable = zero.word complete
#pragma HLS ARRAY_PARTITION variable = start_low.word complete
            const beat start_high = high[group * CHUNKS + chunk];
#pragma HLS ARRAY_PARTITION variable = start_high.word complete
            column_sums column = of_columns[chunk];
#pragma HLS ARRAY_PARTITION variable = column.value complete
            accumulators result;
#pragma HLS ARRAY_PARTITION variable = result.multiply complete
#pragma HLS ARRAY_PARTITION variable = result.shift complete
            const bool of_sums = at(places, COLUMN_SUMS);
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                const int64_t above = multiply[chunk][i], shift_above = shift[chunk][i];
                // from the digit above to the upper plane of this one, from that to the lower one, or from digit to digit
                const int64_t moved = first_pass ? 0
                                      : !lower   ? int64_t(uint64_t(above) << (C::DIGIT - 4))
                                      : planes == 2 ? int64_t(uint64_t(above) << 4)
                                                    : int64_t(uint64_t(above) << C::DIGIT);
                // the shift lane takes no digits of the left operand: all sums before its last one's are 0
                const int64_t shift_moved =
                    !C::SHIFTS || first_pass ? 0 : lower ? int64_t(uint64_t(shift_above) << 4) : shift_above;
                const int64_t total = narrow(moved + int64_t(sum.multiply[i]));
                const int64_t shift_total = narrow(shift_moved + int64_t(C::SHIFTS ? sum.shift[i % C::SHIFT_LANES] : 0));
                multiply[chunk][i] = total;
                shift[chunk][i] = shift_total;
                if (of_sums) column.value[i] = int32_t(total & C::COLUMN);
                const int64_t right_zero = product ? head_zero : uint8_t(zero.word[i]);
                const int64_t constant = int64_t(uint64_t(start_high.word[i]) << 32 | start_low.word[i]);
                const int64_t start = product ? both - int64_t(left_zero) * (column.value[i] & C::COLUMN) : constant;
                result.multiply[i] = narrow(total - right_zero * int64_t(row_multiply) + start);
                result.shift[i] = narrow(shift_total - right_zero * int64_t(row_shift));
            }
            of_columns[chunk] = column;
            if (at(places, LAST_PASS) && !of_sums) {
                out.write(result);
                out_places.write(places);
            }
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
