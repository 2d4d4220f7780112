// SPDX-License-Identifier: Apache-2.0
// A cell: codes to operands, and PES processing elements with LANES inputs each, LANES of them a process. Sums are trees;
// one addition a turn goes into an accumulator.
//
//   uniform  digit of code                          table  digit of table[code]
//   sums of columns  1, in place of codes
//   hluq     digit of (code - L) above L, and in the shift lane 2^(L - 1 - code) below L, 2^(L - 1) above; without shift lanes
//            digits of these in a second group
#ifndef AHCQ_ENGINE_CELL_H
#define AHCQ_ENGINE_CELL_H

#include "types.h"

namespace ahcq {
namespace engine {

constexpr int FIELD = 22;  // bits of a sum of LANES shifted codes

template <class C>
void decode(
    hls::stream<command>& commands,
    hls::stream<beat>& table_beats_in,
    hls::stream<left_fold>& in,
    hls::stream<operands<C> > (&out)[CHUNKS],
    hls::stream<row_sums<C> >& out_rows) {
    typedef typename C::acc_t acc_t;
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
    acc_t row_multiply = 0, row_shift = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const left_fold fold = in.read();
        operands<C> result;
#pragma HLS ARRAY_PARTITION variable = result.digit complete
#pragma HLS ARRAY_PARTITION variable = result.power complete
        const uint16_t places = fold.now.places;
        result.begins = at(places, BEGINS);
        acc_t digits = 0, powers = 0;
        for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
            const uint32_t code = ((fold.low >> (4 * i)) & 15) | (((fold.high >> (4 * i)) & 15) << 4);
            const bool inside = i < fold.now.lanes;
            uint32_t value = code;
            uint8_t shift = 0;
            bool shifted = false;
            if (c.family == TABLE) value = table[i][code];
            if (at(places, COLUMN_SUMS)) value = 1;
            if (c.family == HLUQ) {
                value = code > c.log_levels ? code - c.log_levels : 0;
                shift = code > c.log_levels ? c.log_levels - 1 : c.log_levels - 1 - code;
                shifted = inside && code != c.log_levels && (!C::SHIFTS || fold.now.digit == 0);
            }
            if (splits<C>(c) && !at(places, FIRST_GROUP)) value = shifted ? 1u << (shift % MAX_LOG_LEVELS) : 0;
            const uint32_t digit = inside ? (value >> (C::DIGIT * fold.now.digit)) & ((1u << C::DIGIT) - 1) : 0;
            result.digit[i] = digit;
            const uint16_t power = C::SHIFTS && shifted ? 1u << (shift % MAX_LOG_LEVELS) : 0;
            result.power[i % C::SHIFT_LANES] = power;
            digits += digit;
            powers += power;
        }
        row_multiply = ((result.begins ? acc_t(0) : row_multiply) + digits) & C::PRODUCTS;
        row_shift = ((result.begins ? acc_t(0) : row_shift) + powers) & C::SHIFTED;
        for (int j = 0; j < CHUNKS; ++j) {
#pragma HLS UNROLL
            result.gives = at(places, ENDS) && uint32_t(j) < chunks_of(c, places);
            out[j].write(result);
        }
        row_sums<C> row;
        row.places = places;
        row.digit = fold.now.digit;
        row.plane = fold.now.plane;
        row.multiply = row_multiply;
        row.shift = row_shift;
        if (at(places, ENDS)) out_rows.write(row);
        more = !at(fold.now.places, END_OF_COMMAND);
    }
}

// LANES of a cell's processing elements. Runs for ever: what it does stands in the operands.
//
// The shift lanes of two of them are one multiplication by the power, (w1 << 22 | w0) * 2^s: 26 by 16 bits, a DSP. Eight
// such products are below 2^22 in the lower part, 8 * 15 * 2^15, so nothing carries into the upper one.
template <class C>
void multiply(hls::stream<operands<C> >& left, hls::stream<right_columns<C> >& right, hls::stream<sums<C> >& out) {
    typedef typename C::acc_t acc_t;
    sums<C> acc;
#pragma HLS ARRAY_PARTITION variable = acc.multiply complete
#pragma HLS ARRAY_PARTITION variable = acc.shift complete
    while (true) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const operands<C> u = left.read();
#pragma HLS ARRAY_PARTITION variable = u.power complete
#pragma HLS ARRAY_PARTITION variable = u.digit complete
        const right_columns<C> w = right.read();  // a column a word
#pragma HLS ARRAY_PARTITION variable = w.word complete
        for (int pe = 0; pe < LANES; ++pe) {
#pragma HLS UNROLL
            acc_t sum = 0;
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                const uint32_t code = (w.word[pe] >> (C::PLANE * i)) & ((1u << C::PLANE) - 1);
                // no wider than a digit, which the type of the stream may be
                sum += acc_t(u.digit[i] & ((1u << C::DIGIT) - 1)) * code;
            }
            acc.multiply[pe] = ((u.begins ? acc_t(0) : acc.multiply[pe]) + sum) & C::PRODUCTS;
        }
        for (int pe = 0; pe < LANES; pe += 2) {
#pragma HLS UNROLL
            uint64_t both = 0;
            for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
                const uint64_t low = (w.word[pe] >> (4 * i)) & 15, high = (w.word[pe + 1] >> (4 * i)) & 15;
                if (C::SHIFTS) both += (high << FIELD | low) * u.power[i % C::SHIFT_LANES];
            }
            const acc_t low = both % (uint64_t(1) << FIELD), high = both >> FIELD;
            const int one = pe % C::SHIFT_LANES, two = (pe + 1) % C::SHIFT_LANES;
            acc.shift[one] = ((u.begins ? acc_t(0) : acc.shift[one]) + low) & C::SHIFTED;
            acc.shift[two] = ((u.begins ? acc_t(0) : acc.shift[two]) + high) & C::SHIFTED;
        }
        if (u.gives) out.write(acc);
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
