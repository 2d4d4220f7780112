// SPDX-License-Identifier: Apache-2.0
// Commands: descriptors from memory to every process, or to the unit for softmax, in order; with BARRIER only when all
// earlier results are written.
#ifndef AHCQ_ENGINE_FETCH_H
#define AHCQ_ENGINE_FETCH_H

#include "types.h"

namespace ahcq {
namespace engine {

inline command decode_descriptor(const beat& first, const beat& second) {
#pragma HLS INLINE
    command c;
    c.version = uint8_t(first.word[0]), c.family = uint8_t(first.word[0] >> 8);
    c.flags = uint8_t(first.word[0] >> 16), c.out_format = uint8_t(first.word[0] >> 24);
    c.left_bits = uint8_t(first.word[1]), c.right_bits = uint8_t(first.word[1] >> 8);
    c.digits = uint8_t(first.word[1] >> 16), c.log_levels = uint8_t(first.word[1] >> 24);
    c.out_bits = uint8_t(first.word[2]), c.left_interval = uint8_t(first.word[2] >> 8);
    c.right_interval = uint8_t(first.word[2] >> 16), c.quantizers = uint8_t(first.word[2] >> 24);
    c.groups = uint16_t(first.word[3]), c.heads = uint16_t(first.word[3] >> 16);
    c.m = first.word[4], c.k = first.word[5], c.n = first.word[6], c.batch = first.word[7];
    c.left = second.word[0], c.right = second.word[1], c.parameters = second.word[2], c.out = second.word[3];
    c.folds = uint16_t(second.word[4]), c.block_rows = uint16_t(second.word[4] >> 16);
    c.blocks = uint16_t(second.word[5]), c.steps = uint16_t(second.word[5] >> 16);
    c.last_steps = uint16_t(second.word[6]);
    c.cell = 0;
    return c;
}

constexpr uint32_t IN_FLIGHT = 2;  // commands of a kind that are not done: as many as `done` holds, or all would wait

// Which command comes next.
struct program_state {
    uint8_t phase;
    uint32_t index, running, softmaxes;  // commands that are not done: matmuls, softmaxes
    beat first;
    command now;
    bool more;
};
enum fetch_phase { REQUEST, FIRST, SECOND, ISSUE };

// One turn of `fetch`; true: `now` is a matmul and goes to the processes in this turn.
template <class C>
bool next_matmul(
    program_state& state,
    uint32_t program,
    uint32_t count,
    hls::stream<read_request>& requests,
    hls::stream<beat>& descriptors,
    hls::stream<command> (&to_write)[C::WRITERS],
    hls::stream<bool> (&done)[C::WRITERS],
    hls::stream<uint32_t>& finished) {
#pragma HLS INLINE
    const bool issued = state.index == count, waits = issued || is(state.now, BARRIER);
    if (state.phase == REQUEST) {
        read_request request;
        request.address = program + 2 * state.index;
        request.beats = 2;
        request.stride = 1;
        if (!issued) requests.write(request);
        state.phase = issued ? ISSUE : FIRST;
    } else if (state.phase != ISSUE) {
        const beat word = descriptors.read();
        if (state.phase == FIRST) state.first = word;
        if (state.phase == SECOND) state.now = decode_descriptor(state.first, word);
        state.phase = state.phase == FIRST ? SECOND : ISSUE;
    } else if (state.running != 0 && (waits || state.running == IN_FLIGHT)) {
        for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
            done[cell].read();
        }
        --state.running;
    } else if (C::SOFTMAX_UNITS != 0 && state.softmaxes != 0 && (waits || state.softmaxes == IN_FLIGHT)) {
        for (int unit = C::CELLS; unit < C::WRITERS; ++unit) {
#pragma HLS UNROLL
            done[unit].read();
        }
        --state.softmaxes;
    } else if (issued) {
        finished.write(count);
        state.more = false;
    } else if (C::SOFTMAX_UNITS != 0 && is(state.now, SOFTMAX)) {
        for (int unit = C::CELLS; unit < C::WRITERS; ++unit) {
#pragma HLS UNROLL
            to_write[unit].write(state.now);
        }
        ++state.softmaxes;
        ++state.index;
        state.phase = REQUEST;
    } else {
        ++state.running;
        ++state.index;
        state.phase = REQUEST;
        return true;
    }
    return false;
}

// `count` descriptors from beat address `program` on; when all their results are in memory, `count` goes to `finished`. A
// command goes to those that are there once, and to those of each cell, with the cell's number.
template <class C>
void fetch(
    uint32_t program,
    uint32_t count,
    hls::stream<read_request>& requests,
    hls::stream<beat>& descriptors,
    hls::stream<command> (&to)[C::RECEIVERS],
    hls::stream<command> (&to_cells)[C::CELLS][C::CELL_RECEIVERS],
    hls::stream<command> (&to_write)[C::WRITERS],
    hls::stream<bool> (&done)[C::WRITERS],
    hls::stream<uint32_t>& finished) {
    program_state state = program_state();
    state.more = true;
    while (state.more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (!next_matmul<C>(state, program, count, requests, descriptors, to_write, done, finished)) continue;
        for (int one = 0; one < C::RECEIVERS; ++one) {
#pragma HLS UNROLL
            to[one].write(state.now);
        }
        for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
            state.now.cell = cell;
            for (int one = 0; one < C::CELL_RECEIVERS; ++one) {
#pragma HLS UNROLL
                to_cells[cell][one].write(state.now);
            }
            to_write[cell].write(state.now);
        }
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
