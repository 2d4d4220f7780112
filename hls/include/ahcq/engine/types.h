// SPDX-License-Identifier: Apache-2.0
// What the processes of the engine send to each other; docs/engine.md has the picture, the descriptor and the layouts.
//
// A fold is LANES codes of one row or column along k, eight nibbles in a 32-bit word, code i at bits [4i, 4i + 4). A beat
// is eight words. A tile is PES output columns; a chunk is LANES of them; a step is one row for each cell.
#ifndef AHCQ_ENGINE_TYPES_H
#define AHCQ_ENGINE_TYPES_H

#include <hls_stream.h>
#include <stdint.h>

#include <type_traits>

#ifndef AHCQ_TURN  // a simulation counts the turns of every pipelined loop
#define AHCQ_TURN
#endif
#ifndef AHCQ_PROCESS  // it starts processes and waits for them; hardware has them all
#define AHCQ_LAUNCH(process, ...) process(__VA_ARGS__)
#define AHCQ_PROCESS(process, ...) process(__VA_ARGS__)
#define AHCQ_DEPTH(stream, words)  // what its pragma says
#define AHCQ_DATAFLOW(function, ...) function(__VA_ARGS__)  // processes joined by streams of their own
#endif

namespace ahcq {
namespace engine {

constexpr int LANES = 8;
constexpr int PES = 64;
constexpr int CHUNKS = PES / LANES;
constexpr int MAX_GROUPS = 64;  // of channels, and of heads with parameters of their own
constexpr int MAX_QUANTIZERS = 64;
constexpr int MAX_LOG_LEVELS = 16;  // L of hluq: a shift is below it
constexpr int SUM_BITS = 40;        // of sums over all passes, signed; the compiler checks their range
constexpr int GELUS = 2;            // GELUs of a cell: a chunk takes LANES / GELUS turns

constexpr int log2_ceil(int value) { return value <= 1 ? 0 : 1 + log2_ceil((value + 1) / 2); }

// The same number, which has SUM_BITS bits: what tools do not know.
inline int64_t narrow(int64_t value) {
#pragma HLS INLINE
    return int64_t(uint64_t(value) << (64 - SUM_BITS)) >> (64 - SUM_BITS);
}

// How large an engine is. A cell is PES processing elements with LANES inputs each and takes DIGIT bits of a left operand a
// turn, and PLANE bits of a right code; wider ones come in several passes. Cells work on different rows and the same columns.
// Beside them there may be a unit for softmax, which reads and writes memory by ports of its own.
template <int CELLS_, int DIGIT_, int LEFT_DEPTH_ = 1024, int RIGHT_DEPTH_ = 1024, int PLANE_ = 4, int SOFTMAX_UNITS_ = 0,
          bool SHIFTS_ = PLANE_ == 4>
struct cells {
    static constexpr int CELLS = CELLS_;
    static constexpr int SOFTMAX_UNITS = SOFTMAX_UNITS_;      // 0 or 1
    static constexpr int READERS = 4 + SOFTMAX_UNITS;         // ports that read: `read_port`
    static constexpr int WRITERS = CELLS + SOFTMAX_UNITS;     // ports that write: cells, then softmax
    static constexpr int DIGIT = DIGIT_;              // 4, or 17: then decode tables of 17 bits run in one pass
    static constexpr int LEFT_DEPTH = LEFT_DEPTH_;    // beats of each half of a cell's left buffer
    static constexpr int RIGHT_DEPTH = RIGHT_DEPTH_;  // folds of PES columns of each half of the right buffer
    static constexpr int PLANE = PLANE_;              // 4, or 8: then no right code takes two passes
    static constexpr bool SHIFTS = SHIFTS_;  // there are shift lanes; without them HLUQ is two groups of passes
    static constexpr bool FLOATS = false;
    static constexpr int RECEIVERS = 8, CELL_RECEIVERS = 4;  // of commands: `receiver` and `cell_receiver` of engine.h
    static constexpr int SHIFT_LANES = SHIFTS ? LANES : 1;  // words for them in streams: C++ has no arrays of none
    typedef typename std::conditional<(DIGIT <= 8), uint8_t, uint32_t>::type digit_t;
    typedef typename std::conditional<(PLANE == 4), uint32_t, uint64_t>::type column_t;  // LANES codes along k
    typedef typename std::conditional<(DIGIT <= 8), uint32_t, uint64_t>::type acc_t;
    // Largest sums of a pass, of as many folds as the right buffer holds; 31 bits of shifts are what the compiler allows.
    static constexpr acc_t PRODUCTS = (acc_t(1) << (DIGIT + PLANE + 3 + log2_ceil(RIGHT_DEPTH))) - 1;
    static constexpr int SHIFTED_BITS = MAX_LOG_LEVELS - 1 + 4 + 3 + log2_ceil(RIGHT_DEPTH);
    static constexpr acc_t SHIFTED = (acc_t(1) << (DIGIT <= 8 && SHIFTED_BITS > 31 ? 31 : SHIFTED_BITS)) - 1;
    static constexpr uint32_t COLUMN = (1u << (8 + 3 + log2_ceil(RIGHT_DEPTH))) - 1;  // sum of a column's codes
};

enum family_t { UNIFORM = 0, HLUQ = 1, TABLE = 2 };
enum command_flag { PRODUCT = 1, BARRIER = 2, GELU = 4, OFFSET = 8, TRANSPOSED = 16, SOFTMAX = 32 };
enum out_format { FLOATS = 0, CODES = 1, SHORTS = 2 };  // accumulators of 16 bits, of scale 1

struct beat {
    uint32_t word[LANES];
};

// The engine of float32 that this one is compared with (`float_engine.h`): operands are floats, everything else as it is.
template <int CELLS_, int LEFT_DEPTH_, int RIGHT_DEPTH_>
struct float_cells {
    static constexpr int CELLS = CELLS_;
    static constexpr int SOFTMAX_UNITS = 0, READERS = 4, WRITERS = CELLS;
    static constexpr int DIGIT = 32;
    static constexpr int LEFT_DEPTH = LEFT_DEPTH_, RIGHT_DEPTH = RIGHT_DEPTH_;  // as of `cells`
    static constexpr bool FLOATS = true;
    static constexpr int RECEIVERS = 7, CELL_RECEIVERS = 3;  // of float_engine.h
};

// The 64-byte descriptor, field by field.
struct command {
    uint8_t version, family, flags, out_format;
    uint8_t left_bits, right_bits, digits, log_levels;
    uint8_t out_bits, left_interval, right_interval, quantizers;
    uint16_t groups, heads;
    uint32_t m, k, n, batch;
    uint32_t left, right, parameters, out;  // addresses in beats
    uint16_t folds, block_rows;
    uint16_t blocks, steps, last_steps;  // of a product; steps of a block, of the last one
    uint16_t cell;                       // set by `fetch`: which cell the command goes to
};

// Places in the loops where a turn stands.
enum place {
    BEGINS = 1,         // first fold of a pass
    ENDS = 2,           // last fold of a pass
    FIRST_PASS = 4,     // of a group
    LAST_PASS = 8,
    FIRST_GROUP = 16,   // of a row
    LAST_GROUP = 32,
    FIRST_STEP = 64,    // of a tile
    LAST_STEP = 128,
    FIRST_TILE = 256,   // of a block
    LAST_TILE = 512,
    FIRST_BLOCK = 1024,  // of a product
    LAST_BLOCK = 2048,
    LAST_PRODUCT = 4096,
    COLUMN_SUMS = 8192  // a step before the first one of a tile, of a row of ones
};

inline bool at(uint16_t places, uint16_t wanted) {
#pragma HLS INLINE
    return (places & wanted) == wanted;
}

constexpr uint16_t END_OF_TILE = ENDS | LAST_PASS | LAST_GROUP | LAST_STEP;
constexpr uint16_t END_OF_BLOCK = END_OF_TILE | LAST_TILE;
constexpr uint16_t END_OF_COMMAND = END_OF_BLOCK | LAST_BLOCK | LAST_PRODUCT;

// One step of a tile: the row of a cell.
struct step {
    uint16_t places;
    uint16_t row_address;
};

// One pass over the folds of a group.
struct pass {
    uint16_t places;
    uint16_t row_address, first_fold, folds;
    uint8_t last_lanes;  // codes of the last fold
    uint8_t digit, plane;
};

// What one turn of the cells does.
struct turn {
    uint16_t places;
    uint16_t left_address, right_address;
    uint8_t word;   // of the left beat
    uint8_t lanes;  // how many codes of the fold belong to the row
    uint8_t digit, plane;
};

// A beat of left codes and its place in the buffer; the last one of a block, of a command.
struct left_load {
    beat data;
    uint16_t address;
    uint8_t cell;
    bool last, final;
};

// One fold of left codes: low and, above 4 bits, high nibbles; or of floats.
template <bool FLOATS>
struct fold_of {
    turn now;
    uint32_t low, high;
};
template <>
struct fold_of<true> {
    turn now;
    beat data;
};
typedef fold_of<false> left_fold;

inline void take(fold_of<false>& fold, const beat& from, bool wide) {
#pragma HLS INLINE
    fold.low = from.word[fold.now.word];
    fold.high = wide ? from.word[(fold.now.word + 1) % LANES] : 0;
}

inline void take(fold_of<true>& fold, const beat& from, bool) {
#pragma HLS INLINE
    fold.data = from;
}

// Operands of LANES processing elements: a digit each for the multipliers, a power of two or nothing for the shifters.
template <class C>
struct operands {
    typename C::digit_t digit[LANES];
    uint16_t power[C::SHIFT_LANES];
    bool begins, gives;  // first fold of a pass; last one, and there are outputs
};

// LANES columns of a fold, code i along k at bits [PLANE i, PLANE (i + 1)).
template <class C>
struct right_columns {
    typename C::column_t word[LANES];
};

// LANES codes of their low and, with PLANE = 8, high nibbles.
template <class C>
typename C::column_t joined(uint32_t low, uint32_t high) {
#pragma HLS INLINE
    if (C::PLANE == 4) return low;
    uint64_t codes = 0;
    for (int i = 0; i < LANES; ++i) {
#pragma HLS UNROLL
        codes |= uint64_t((low >> (4 * i) & 15) | (high >> (4 * i) & 15) << 4) << (8 * i);
    }
    return codes;
}

// Of each column of a chunk the sum of its right codes: what a row of ones makes.
struct column_sums {
    int32_t value[LANES];
};

// Sums of one pass of one row over u * code, for LANES columns.
template <class C>
struct sums {
    typename C::acc_t multiply[LANES], shift[C::SHIFT_LANES];
};

// The same over u alone, and which pass that was.
template <class C>
struct row_sums {
    uint16_t places;
    uint8_t digit, plane;
    typename C::acc_t multiply, shift;
};

// Accumulators of LANES outputs of one group, zero points taken off.
struct accumulators {
    int64_t multiply[LANES], shift[LANES];
};

// LANES floats; or their codes, low nibbles in word 0, high ones in word 1; or integers, two to a word.
struct outcome {
    beat data;
    uint16_t places;
};

// An accumulator of one output, two floats (their bits), its chunk, and what is done with them.
struct lane_work {
    int64_t sum;
    uint32_t scale, addend;
    uint8_t chunk, flags;
};
enum lane_flag {
    LANE_FIRST = 1,  // of a row: nothing came before
    LANE_AGAIN = 2,  // what came before times scale plus addend, and no sum
    LANE_LAST = 4,   // of a row: gives an output
    LANE_GELU = 8
};
// What `dequantize` does with the chunks of a step, one after the other.
enum dequantize_stage { OF_GROUP = 0, OF_SHIFTS = 1, OF_OFFSET = 2, OF_WEIGHT = 3 };
constexpr uint32_t ONE = 0x3f800000;  // 1.0f

enum read_port { READ_PROGRAM, READ_LEFT, READ_RIGHT, READ_PARAMETERS, READ_SCORES };

// `beats` beats, the next one `stride` beats further.
struct read_request {
    uint32_t address, beats, stride;
};

// `words` words from word address on: 1 (codes), 4 (integers) or 8 (floats). 0: an answer is wanted as soon as all
// earlier words are in memory.
struct write_request {
    uint32_t address;
    uint32_t words;
    beat data;
};

inline uint32_t beats_of(uint32_t words) { return (words + LANES - 1) / LANES; }
inline uint32_t tiles_of(const command& c) { return (c.n + PES - 1) / PES; }
// Chunks of a tile that hold outputs. With several groups always all: their sums come back after CHUNKS turns.
inline uint32_t chunks_of(const command& c, uint16_t places) {
#pragma HLS INLINE
    return c.groups == 1 && at(places, LAST_TILE) ? ((c.n - 1) % PES) / LANES + 1 : CHUNKS;
}
// Nibbles of a right code in memory.
inline uint32_t planes_of(const command& c) { return c.right_bits > 4 ? 2 : 1; }
// Beats of a row of left codes: 8 folds a beat, 4 where codes have more than 4 bits (low and high nibbles in turn); of floats 1.
template <class C>
uint32_t row_beats(const command& c) {
#pragma HLS INLINE
    return C::FLOATS ? c.folds : c.left_bits > 4 ? (c.folds + 3) / 4 : (c.folds + 7) / 8;
}
// Beats of a tile of the right operand.
template <class C>
uint32_t right_beats(const command& c) {
#pragma HLS INLINE
    return c.folds * (C::FLOATS ? uint32_t(LANES) : planes_of(c)) * CHUNKS;
}
// Whether the groups of a row are two ways to read the same codes: above and below L.
template <class C>
bool splits(const command& c) {
#pragma HLS INLINE
    return !C::SHIFTS && c.family == HLUQ;
}
// Whether the left zero point takes the sums of run-time columns off; in constant weights they are folded.
template <class C>
bool wants_sums(const command& c) {
#pragma HLS INLINE
    return !C::FLOATS && (c.flags & PRODUCT) != 0 && c.family == UNIFORM;
}
constexpr int ROWS = 8;  // of floats, in work in a cell at once: the next sum of a row comes ROWS turns later
// Rows of a step, for each cell.
template <class C>
constexpr int step_rows() { return C::FLOATS ? ROWS : 1; }
// Beats of the parts of the parameters, in this order; then, of constant weights, those of each tile.
constexpr int HEADER_BEATS = 2;
inline uint32_t group_beats(const command& c) { return beats_of(c.groups); }
inline uint32_t table_beats(const command& c) { return c.family == TABLE ? beats_of(1u << c.left_bits) : 0; }
inline uint32_t lane_beats(const command& c) { return (c.flags & PRODUCT) ? c.heads : c.groups; }
inline uint32_t thresholds_of(const command& c) { return c.out_format == CODES ? uint32_t(c.quantizers) << c.out_bits : 0; }
inline uint32_t selector_words(const command& c) { return c.out_format == CODES ? tiles_of(c) * CHUNKS : 0; }
inline uint32_t quantizer_beats(const command& c) {
    return 2 * beats_of(thresholds_of(c)) + beats_of(selector_words(c));
}
inline uint32_t correction_beats(const command& c) { return CHUNKS * (1 + 2 * c.groups); }
constexpr int SCALE_BEATS = 3 * CHUNKS;
inline bool is(const command& c, command_flag flag) { return (c.flags & flag) != 0; }
// Beats of parameters at the start of a command, and with every tile.
template <class C>
uint32_t first_parameters(const command& c) {
#pragma HLS INLINE
    if (C::FLOATS) return HEADER_BEATS;
    return HEADER_BEATS + group_beats(c) + table_beats(c) + lane_beats(c) + quantizer_beats(c);
}
template <class C>
uint32_t tile_parameters(const command& c) {
#pragma HLS INLINE
    return is(c, PRODUCT) ? 0 : C::FLOATS ? CHUNKS : correction_beats(c) + SCALE_BEATS;
}

}  // namespace engine
}  // namespace ahcq

#endif
