// SPDX-License-Identifier: Apache-2.0
// A cell: codes to operands, and PES processing elements with LANES inputs each. Sums are trees; one addition a turn
// goes into an accumulator.
//
//   uniform  digit of code                          table  digit of table[code]
//   hluq     digit of (code - L) above L, and in the shift lane 2^(L - 1 - code) below L, 2^(L - 1) above
#ifndef AHCQ_ENGINE_CELL_H
#define AHCQ_ENGINE_CELL_H

#include "types.h"

namespace ahcq {
namespace engine {

template <class C>
void decode(
    hls::stream<command>& commands,
    hls::stream<beat>& table_beats_in,
    hls::stream<left_fold>& in,
    hls::stream<operands<C> >& out) {
    const command c = commands.read();
    uint32_t table[LANES][256];
#pragma HLS ARRAY_PARTITION variable = table complete dim = 1
    const uint32_t entries = table_beats(c) * LANES;
    beat now;
    for (uint32_t entry = 0; entry < entries; ++entry) {
#pragma HLS PIPELINE II = 1
        if (entry % LANES == 0) now = table_beats_in.read();
        for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
            table[i][entry] = now.word[entry % LANES];
        }
    }
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const left_fold fold = in.read();
        operands<C> result;
#pragma HLS ARRAY_PARTITION variable = result.digit complete
#pragma HLS ARRAY_PARTITION variable = result.shift complete
        result.now = fold.now;
        result.shifts = c.family == HLUQ;
        for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
            const uint32_t code = ((fold.low >> (4 * i)) & 15) | (((fold.high >> (4 * i)) & 15) << 4);
            const bool inside = i < fold.now.lanes;
            uint32_t value = code;
            uint8_t shift = 0;
            if (c.family == TABLE) value = table[i][code];
            if (c.family == HLUQ) {
                value = code > c.log_levels ? code - c.log_levels : 0;
                shift = code == c.log_levels ? 0 : code > c.log_levels ? c.log_levels : c.log_levels - code;
            }
            const uint32_t digit = (value >> (C::DIGIT * fold.now.digit)) & ((1u << C::DIGIT) - 1);
            result.digit[i] = inside ? digit : 0;
            result.shift[i] = inside && fold.now.digit == 0 ? shift : 0;
        }
        out.write(result);
        more = !at(fold.now.places, END_OF_COMMAND);
    }
}

// Runs for ever: what it does stands in the turns.
template <class C>
void multiply(hls::stream<operands<C> >& left, hls::stream<right_fold>& right, hls::stream<sums<C> >& out) {
    sums<C> acc;
#pragma HLS ARRAY_PARTITION variable = acc.multiply complete
#pragma HLS ARRAY_PARTITION variable = acc.shift complete
    while (true) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const operands<C> u = left.read();
#pragma HLS ARRAY_PARTITION variable = u.shift complete
#pragma HLS ARRAY_PARTITION variable = u.digit complete
        const right_fold w = right.read();
#pragma HLS ARRAY_PARTITION variable = w.column complete
        const bool begins = at(u.now.places, BEGINS);
        acc.now = u.now;
        uint32_t row = 0, row_shift = 0;
        uint32_t powers[LANES];
#pragma HLS ARRAY_PARTITION variable = powers complete
        uint32_t digits[LANES];  // no wider than a digit, which the type of the stream may be
#pragma HLS ARRAY_PARTITION variable = digits complete
        for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
            powers[i] = u.shift[i] == 0 ? 0 : 1u << (uint8_t(u.shift[i] - 1) % MAX_LOG_LEVELS);
            digits[i] = u.digit[i] & ((1u << C::DIGIT) - 1);
            row += digits[i];
            row_shift += powers[i];
        }
        typedef typename C::acc_t acc_t;
        acc.row_multiply = (begins ? acc_t(0) : acc.row_multiply) + acc_t(row);
        acc.row_shift = (begins ? acc_t(0) : acc.row_shift) + acc_t(row_shift);
        for (int pe = 0; pe < PES; ++pe) {
#pragma HLS UNROLL
            uint32_t sum = 0;
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                sum += digits[i] * ((w.column[pe] >> (4 * i)) & 15);
            }
            acc.multiply[pe] = (begins ? acc_t(0) : acc.multiply[pe]) + acc_t(sum);
        }
        for (int pe = 0; pe < PES; ++pe) {
#pragma HLS UNROLL
            uint32_t sum = 0;
            if (u.shifts) {
                for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                    const uint32_t code = u.shift[i] == 0 ? 0 : (w.column[pe] >> (4 * i)) & 15;
                    sum += code << (uint8_t(u.shift[i] - 1) % MAX_LOG_LEVELS);
                }
            }
            acc.shift[pe] = (begins ? acc_t(0) : acc.shift[pe]) + acc_t(sum);
        }
        if (at(u.now.places, ENDS)) out.write(acc);
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
