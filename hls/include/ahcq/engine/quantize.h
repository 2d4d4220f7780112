// SPDX-License-Identifier: Apache-2.0
// The quantizer of the next matmul: codes by thresholds on an integer key that is ordered as the floats are.
//
// Every family is a rank among 2^bits - 1 thresholds and a code for each rank; of uniform quantizers the thresholds are
// the least floats that division and rounding take to each code. No divider. A selector names the quantizer of each
// chunk of columns (groups, heads, q | k | v). NaN is the largest or smallest key, by its sign.
#ifndef AHCQ_ENGINE_QUANTIZE_H
#define AHCQ_ENGINE_QUANTIZE_H

#include "ahcq/beats.h"
#include "types.h"

namespace ahcq {
namespace engine {

constexpr int MAX_BITS = 8;
constexpr int THRESHOLDS = 1024;  // of all quantizers of a command, and codes
constexpr int MAX_CHUNKS = 1024;  // of columns

// As integers compare as the floats do; both zeros have the key 0.
inline int32_t float_key(float value) {
#pragma HLS INLINE
    const int32_t bits = int32_t(float_bits(value));
    if (uint32_t(bits) == 0x80000000u) return 0;
    return bits < 0 ? int32_t(uint32_t(bits) ^ 0x7fffffffu) : bits;
}

template <class C>
void quantize(
    hls::stream<command>& commands,
    hls::stream<beat>& parameters,
    hls::stream<float> (&in)[LANES],
    hls::stream<float> (&in_curved)[GELUS][LANES / GELUS],
    hls::stream<uint16_t>& in_places,
    hls::stream<outcome>& out) {
    const command c = commands.read();
    // Level l of the search compares with the thresholds whose rank has bit l as its lowest: a memory of its own.
    int32_t keys[MAX_BITS][LANES][THRESHOLDS / 2];
#pragma HLS ARRAY_PARTITION variable = keys complete dim = 1
#pragma HLS ARRAY_PARTITION variable = keys complete dim = 2
    uint8_t codes[LANES][THRESHOLDS];
#pragma HLS ARRAY_PARTITION variable = codes complete dim = 1
    uint8_t selector[MAX_CHUNKS];
    const uint32_t count = beats_of(thresholds_of(c)) * LANES;
    const uint32_t words = 2 * count + beats_of(selector_words(c)) * LANES;
    beat value;
    for (uint32_t i = 0; i < words; ++i) {
#pragma HLS PIPELINE II = 1
        if (i % LANES == 0) value = parameters.read();
        const uint32_t word = value.word[i % LANES];
        const uint32_t rank = i & ((1u << c.out_bits) - 1);
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            for (int level = 0; level < MAX_BITS; ++level) {
#pragma HLS UNROLL
                const bool lowest = (rank & ((2u << level) - 1)) == (1u << level);
                if (i < count && lowest) keys[level][lane][(i >> (level + 1)) % (THRESHOLDS / 2)] = int32_t(word);
            }
            if (i >= count && i < 2 * count) codes[lane][(i - count) % THRESHOLDS] = uint8_t(word);
        }
        if (i >= 2 * count) selector[(i - 2 * count) % MAX_CHUNKS] = uint8_t(word);
    }
    uint32_t chunk = 0, first_chunk = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const uint16_t places = in_places.read();
        const uint32_t column = first_chunk + chunk;
        const uint32_t quantizer = c.out_format == CODES ? uint32_t(selector[column % MAX_CHUNKS]) : 0;
        outcome result;
#pragma HLS ARRAY_PARTITION variable = result.data.word complete
        result.places = places;
        uint32_t low = 0, high = 0;
        uint32_t shorts[LANES];
#pragma HLS ARRAY_PARTITION variable = shorts complete
        for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
            const float x = is(c, GELU) ? in_curved[lane / (LANES / GELUS)][lane % (LANES / GELUS)].read() : in[lane].read();
            const int32_t key = float_key(x);
            uint32_t rank = 0;
            for (int level = MAX_BITS - 1; level >= 0; --level) {
#pragma HLS UNROLL
                const uint32_t candidate = rank | (1u << level);
                const uint32_t at_key = ((quantizer << c.out_bits) | candidate) >> (level + 1);
                const bool above = key >= keys[level][lane][at_key % (THRESHOLDS / 2)];
                if (level < c.out_bits && above) rank = candidate;
            }
            const uint32_t code = codes[lane][((quantizer << c.out_bits) | rank) % THRESHOLDS];
            const bool inside = column * LANES + lane < c.n;
            if (inside) {
                low |= (code & 15) << (4 * lane);
                high |= (code >> 4) << (4 * lane);
            }
            result.data.word[lane] = inside ? float_bits(x) : 0;
            shorts[lane] = inside && c.out_format == SHORTS ? uint16_t(int16_t(x)) : 0;
        }
        if (c.out_format == CODES) {
            result.data.word[0] = low;
            result.data.word[1] = high;
        }
        if (c.out_format == SHORTS) {
            for (int pair = 0; pair < LANES / 2; ++pair) {
#pragma HLS UNROLL
                result.data.word[pair] = shorts[2 * pair] | shorts[2 * pair + 1] << 16;
            }
        }
        out.write(result);
        chunk = chunk + 1 == chunks_of(c, places) ? 0 : chunk + 1;
        if (chunk == 0 && at(places, LAST_STEP)) first_chunk = at(places, LAST_TILE) ? 0 : first_chunk + CHUNKS;
        if (chunk == 0) more = !at(places, END_OF_COMMAND);
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
