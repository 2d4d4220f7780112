// SPDX-License-Identifier: Apache-2.0
// Softmax and its quantizer on integers: from scores to codes of probabilities, LANES a turn, without a division.
//
// docs/softmax.md defines every number. A row goes through three stages, each a turn a beat, three rows at a time: `find_top`
// while it arrives; pass 1, `take_differences`, `power_lane` and `sum_powers`; pass 2, `rank_codes`. The FIFOs between them hold
// a row, so that a row is at most ROW_BEATS long. `softmax_unit.h` joins them to memory.
#ifndef AHCQ_ENGINE_SOFTMAX_H
#define AHCQ_ENGINE_SOFTMAX_H

#include <ap_int.h>

#include "softmax_tables.h"
#include "types.h"

namespace ahcq {
namespace engine {

constexpr int ROW_BEATS = 512;
constexpr int SOFTMAX_BITS = 8;          // of codes, at most
constexpr int SOFTMAX_BOUNDS = 256;      // of all heads
constexpr int32_t MASKED = -2147483647 - 1;
constexpr uint32_t EXPONENT_LIMIT = (1u << 23) - 1;
constexpr int EXPONENT_BITS = 23, POWER_BITS = 17, ONE_BITS = 30, SIGNIFICAND_BITS = 20;
constexpr int SOFTMAX_SUM_BITS = 47;     // of rows up to 2^16

typedef ap_uint<55> power_work;  // difference, masked (1 bit), mantissa (24), shift less 1 (6)
typedef ap_uint<EXPONENT_BITS + ONE_BITS + 1> power_of;
typedef ap_uint<LANES * EXPONENT_BITS> exponents;
typedef ap_uint<SOFTMAX_SUM_BITS> power_sum;

// `batch` products of `m` rows of `n` scores each, product i of head i mod heads. Quantizers: one, or one a head.
struct softmax_command {
    uint32_t m, n, batch;
    uint16_t heads, quantizers;
    uint8_t out_bits;
};

// Where a turn stands: beat of a row, row of a product, product and its head.
struct row_place {
    uint32_t beat, row, product;
    uint16_t head;
};

inline bool ends_row(const softmax_command& c, const row_place& now) {
#pragma HLS INLINE
    return (now.beat + 1) * LANES >= c.n;
}

// The place of the next turn; false behind the last one.
inline bool advance(const softmax_command& c, row_place& now) {
#pragma HLS INLINE
    const bool row_ends = ends_row(c, now), product_ends = row_ends && now.row + 1 == c.m;
    const bool more = !(product_ends && now.product + 1 == c.batch);
    now.beat = row_ends ? 0 : now.beat + 1;
    now.row = product_ends ? 0 : row_ends ? now.row + 1 : now.row;
    if (product_ends) {
        now.head = now.head + 1 == c.heads ? 0 : now.head + 1;
        now.product = now.product + 1;
    }
    return more;
}

inline void announce(
    hls::stream<softmax_command>& commands,
    hls::stream<softmax_command>& to_top,
    hls::stream<softmax_command>& to_differences,
    hls::stream<softmax_command>& to_sum,
    hls::stream<softmax_command>& to_rank) {
    const softmax_command c = commands.read();
    to_top.write(c);
    to_differences.write(c);
    to_sum.write(c);
    to_rank.write(c);
}

// Rows as they come; places behind the end of a row are masked.
inline void find_top(
    hls::stream<softmax_command>& commands,
    hls::stream<beat>& scores,
    hls::stream<beat>& rows,
    hls::stream<int32_t>& tops) {
    const softmax_command c = commands.read();
    row_place now = {0, 0, 0, 0};
    int32_t top = MASKED;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        beat row = scores.read();
#pragma HLS ARRAY_PARTITION variable = row.word complete
        int32_t largest[2 * LANES];
#pragma HLS ARRAY_PARTITION variable = largest complete
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            if (now.beat * LANES + lane >= c.n) row.word[lane] = uint32_t(MASKED);
            largest[LANES + lane] = int32_t(row.word[lane]);
        }
        for (int pair = LANES - 1; pair > 0; --pair) {
#pragma HLS UNROLL
            const int32_t left = largest[2 * pair], right = largest[2 * pair + 1];
            largest[pair] = left > right ? left : right;
        }
        if (now.beat == 0 || largest[1] > top) top = largest[1];
        rows.write(row);
        if (ends_row(c, now)) tops.write(top);
        more = advance(c, now);
    }
}

// Pass 1, of each score: how far below the top, or that it is masked, and the factor of its head.
inline void take_differences(
    hls::stream<softmax_command>& commands,
    hls::stream<beat>& factors,
    hls::stream<beat>& rows,
    hls::stream<int32_t>& tops,
    hls::stream<power_work> (&out)[LANES]) {
    const softmax_command c = commands.read();
    ap_uint<30> factor[MAX_GROUPS];  // mantissa in the low 24 bits, shift less 1 above
    const uint32_t words = beats_of(c.heads) * LANES;
    beat value;
    for (uint32_t i = 0; i < words; ++i) {
#pragma HLS PIPELINE II = 1
        if (i % LANES == 0) value = factors.read();
        factor[i % MAX_GROUPS] = value.word[i % LANES];
    }
    row_place now = {0, 0, 0, 0};
    int32_t top = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (now.beat == 0) top = tops.read();
        const beat row = rows.read();
#pragma HLS ARRAY_PARTITION variable = row.word complete
        const power_work scale = factor[now.head % MAX_GROUPS];
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            const uint32_t apart = uint32_t(top) - row.word[lane];
            const uint32_t difference = apart > 0xffffffu ? 0xffffffu : apart;
            const uint32_t masked = int32_t(row.word[lane]) == MASKED ? 1u << 24 : 0;
            out[lane].write((scale << 25) | power_work(masked | difference));
        }
        more = advance(c, now);
    }
}

// Pass 1, of one score: its exponent (low bits) and the power of two that it stands for. LANES of them; runs for ever.
inline void power_lane(hls::stream<power_work>& in, hls::stream<power_of>& out) {
    while (true) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const power_work now = in.read();
        const ap_uint<24> difference = now.range(23, 0), mantissa = now.range(48, 25);
        const int shift = now.range(54, 49).to_int();
        const ap_uint<48> halves = ap_uint<48>(difference * mantissa) >> shift;
        const ap_uint<48> scaled = (halves + 1) >> 1;
        const bool nothing = now.range(24, 24) != 0 || scaled > EXPONENT_LIMIT;
        const ap_uint<EXPONENT_BITS> exponent = nothing ? EXPONENT_LIMIT : scaled.to_uint();
        const uint32_t index = (exponent.to_uint() + 32) >> 6, octave = index >> 10;
        const ap_uint<ONE_BITS + 1> one = POWERS[index % 1024] << (ONE_BITS - POWER_BITS);
        const power_of power = octave > ONE_BITS ? ap_uint<ONE_BITS + 1>(0) : one >> int(octave % 32);
        out.write((power << EXPONENT_BITS) | power_of(exponent));
    }
}

// Pass 1, of each row: the sum of its powers.
inline void sum_powers(
    hls::stream<softmax_command>& commands,
    hls::stream<power_of> (&in)[LANES],
    hls::stream<exponents>& out,
    hls::stream<power_sum>& sums) {
    const softmax_command c = commands.read();
    row_place now = {0, 0, 0, 0};
    power_sum sum = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        exponents packed = 0;
        power_sum powers = 0;
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            const power_of one = in[lane].read();
            packed.range(EXPONENT_BITS * lane + EXPONENT_BITS - 1, EXPONENT_BITS * lane) = ap_uint<EXPONENT_BITS>(one);
            powers += power_sum(one >> EXPONENT_BITS);
        }
        sum = (now.beat == 0 ? power_sum(0) : sum) + powers;
        out.write(packed);
        if (ends_row(c, now)) sums.write(sum);
        more = advance(c, now);
    }
}

// log2 of each sum, 2^30 being 1, in 2^-16 octaves; of a sum 0 it is 0. Runs for ever.
inline void take_log(hls::stream<power_sum>& sums, hls::stream<uint32_t>& logs) {
    while (true) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const uint64_t sum = sums.read().to_uint64();
        uint32_t octave = 0, significand = 0;
        for (int bit = ONE_BITS; bit < SOFTMAX_SUM_BITS; ++bit) {
#pragma HLS UNROLL
            if ((sum >> bit) & 1) {
                octave = bit - ONE_BITS;
                significand = uint32_t(sum >> (bit - SIGNIFICAND_BITS)) & ((1u << SIGNIFICAND_BITS) - 1);
            }
        }
        const uint32_t low = significand >> 12;
        const uint32_t from = LOGS[low], rise = LOGS[low + 1] - from;
        logs.write((octave << 16) + from + ((rise * (significand & 4095) + 2048) >> 12));
    }
}

// Pass 2: how many bounds of the head lie above -log2 of the probability, and the code of that rank. Low nibbles of the
// codes in word 0, high ones in word 1.
inline void rank_codes(
    hls::stream<softmax_command>& commands,
    hls::stream<beat>& quantizers,
    hls::stream<exponents>& in,
    hls::stream<uint32_t>& logs,
    hls::stream<beat>& out) {
    const softmax_command c = commands.read();
    // Level l of the search compares with the bounds whose rank has bit l as its lowest: a memory of its own.
    ap_uint<24> bounds[SOFTMAX_BITS][LANES][SOFTMAX_BOUNDS / 2];
#pragma HLS ARRAY_PARTITION variable = bounds complete dim = 1
#pragma HLS ARRAY_PARTITION variable = bounds complete dim = 2
    uint8_t codes[LANES][SOFTMAX_BOUNDS];
#pragma HLS ARRAY_PARTITION variable = codes complete dim = 1
    const uint32_t count = beats_of(uint32_t(c.quantizers) << c.out_bits) * LANES;
    beat value;
    for (uint32_t i = 0; i < 2 * count; ++i) {
#pragma HLS PIPELINE II = 1
        if (i % LANES == 0) value = quantizers.read();
        const uint32_t word = value.word[i % LANES];
        const uint32_t rank = i & ((1u << c.out_bits) - 1);
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            for (int level = 0; level < SOFTMAX_BITS; ++level) {
#pragma HLS UNROLL
                const bool lowest = (rank & ((2u << level) - 1)) == (1u << level);
                if (i < count && lowest) bounds[level][lane][(i >> (level + 1)) % (SOFTMAX_BOUNDS / 2)] = word;
            }
            if (i >= count) codes[lane][(i - count) % SOFTMAX_BOUNDS] = uint8_t(word);
        }
    }
    row_place now = {0, 0, 0, 0};
    uint32_t log = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (now.beat == 0) log = logs.read();
        const exponents packed = in.read();
        const uint32_t quantizer = c.quantizers == 1 ? 0 : now.head;
        uint32_t low = 0, high = 0;
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            const ap_uint<EXPONENT_BITS> exponent = packed.range(EXPONENT_BITS * lane + EXPONENT_BITS - 1, EXPONENT_BITS * lane);
            const uint32_t key = exponent.to_uint() + log;
            uint32_t rank = 0;
            for (int level = SOFTMAX_BITS - 1; level >= 0; --level) {
#pragma HLS UNROLL
                const uint32_t candidate = rank | (1u << level);
                const uint32_t at_bound = ((quantizer << c.out_bits) | candidate) >> (level + 1);
                const bool below = key < bounds[level][lane][at_bound % (SOFTMAX_BOUNDS / 2)].to_uint();
                if (level < c.out_bits && below) rank = candidate;
            }
            const uint32_t code = codes[lane][((quantizer << c.out_bits) | rank) % SOFTMAX_BOUNDS];
            if (now.beat * LANES + lane < c.n) {
                low |= (code & 15) << (4 * lane);
                high |= (code >> 4) << (4 * lane);
            }
        }
        beat result;
#pragma HLS ARRAY_PARTITION variable = result.word complete
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            result.word[lane] = lane == 0 ? low : lane == 1 ? high : 0;
        }
        out.write(result);
        more = advance(c, now);
    }
}

// Command after command: scores and codes in beats, rows begin with a beat of their own. `factors` gets a word a head,
// mantissa and shift less 1; `quantizers` the bounds (2^bits words a quantizer, the first of them unused), then the codes of the ranks.
inline void softmax(
    hls::stream<softmax_command>& commands,
    hls::stream<beat>& factors,
    hls::stream<beat>& quantizers,
    hls::stream<beat>& scores,
    hls::stream<beat>& codes) {
#pragma HLS DATAFLOW
    hls::stream<softmax_command> to_top("to_top"), to_differences("to_differences"), to_sum("to_sum");
    hls::stream<softmax_command> to_rank("to_rank");
    // A row waits for its top, then for the log of its sum: as many beats as a row has, and as the processes have stages.
    hls::stream<beat> rows("rows");
#pragma HLS STREAM variable = rows depth = 576
    AHCQ_DEPTH(rows, 576)
    hls::stream<exponents> powers("powers");
#pragma HLS STREAM variable = powers depth = 576
    AHCQ_DEPTH(powers, 576)
    hls::stream<int32_t> tops("tops");
    hls::stream<power_work> works[LANES];
    hls::stream<power_of> lanes[LANES];
    hls::stream<power_sum> sums("sums");
    hls::stream<uint32_t> logs("logs");
#pragma HLS STREAM variable = tops depth = 64
#pragma HLS STREAM variable = sums depth = 64
#pragma HLS STREAM variable = logs depth = 64
    AHCQ_PROCESS(announce, commands, to_top, to_differences, to_sum, to_rank);
    AHCQ_PROCESS(find_top, to_top, scores, rows, tops);
    AHCQ_PROCESS(take_differences, to_differences, factors, rows, tops, works);
    for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
        AHCQ_PROCESS(power_lane, works[lane], lanes[lane]);
    }
    AHCQ_PROCESS(sum_powers, to_sum, lanes, powers, sums);
    AHCQ_PROCESS(take_log, sums, logs);
    AHCQ_PROCESS(rank_codes, to_rank, quantizers, powers, logs, codes);
#ifdef AHCQ_WAIT
    AHCQ_WAIT(codes);
#endif
}

}  // namespace engine
}  // namespace ahcq

#endif
