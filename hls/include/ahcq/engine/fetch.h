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

// `count` descriptors from beat address `program` on; when all their results are in memory, `count` goes to `finished`.
template <class C>
void fetch(
    uint32_t program,
    uint32_t count,
    hls::stream<read_request>& requests,
    hls::stream<beat>& descriptors,
    hls::stream<command>& to_readers,
    hls::stream<command>& to_parameters,
    hls::stream<command>& to_steps,
    hls::stream<command>& to_passes,
    hls::stream<command>& to_folds,
    hls::stream<command>& to_place,
    hls::stream<command>& to_left,
    hls::stream<command>& to_right,
    hls::stream<command> (&to_decode)[C::CELLS],
    hls::stream<command> (&to_correct)[C::CELLS],
    hls::stream<command> (&to_dequantize)[C::CELLS],
    hls::stream<command> (&to_quantize)[C::CELLS],
    hls::stream<command> (&to_write)[C::WRITERS],
    hls::stream<bool> (&done)[C::WRITERS],
    hls::stream<uint32_t>& finished) {
    enum { REQUEST, FIRST, SECOND, ISSUE };
    uint8_t phase = REQUEST;
    uint32_t index = 0, running = 0, softmaxes = 0;  // commands that are not done: matmuls, softmaxes
    beat first = beat();
    command c = command();
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const bool issued = index == count, waits = issued || is(c, BARRIER);
        if (phase == REQUEST) {
            read_request request;
            request.address = program + 2 * index;
            request.beats = 2;
            request.stride = 1;
            if (!issued) requests.write(request);
            phase = issued ? ISSUE : FIRST;
        } else if (phase != ISSUE) {
            const beat now = descriptors.read();
            if (phase == FIRST) first = now;
            if (phase == SECOND) c = decode_descriptor(first, now);
            phase = phase == FIRST ? SECOND : ISSUE;
        } else if (running != 0 && (waits || running == IN_FLIGHT)) {
            for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
                done[cell].read();
            }
            --running;
        } else if (C::SOFTMAX_UNITS != 0 && softmaxes != 0 && (waits || softmaxes == IN_FLIGHT)) {
            for (int unit = C::CELLS; unit < C::WRITERS; ++unit) {
#pragma HLS UNROLL
                done[unit].read();
            }
            --softmaxes;
        } else if (issued) {
            finished.write(count);
            more = false;
        } else if (C::SOFTMAX_UNITS != 0 && is(c, SOFTMAX)) {
            for (int unit = C::CELLS; unit < C::WRITERS; ++unit) {
#pragma HLS UNROLL
                to_write[unit].write(c);
            }
            ++softmaxes;
            ++index;
            phase = REQUEST;
        } else {
            to_readers.write(c);
            to_parameters.write(c);
            to_steps.write(c);
            to_passes.write(c);
            to_folds.write(c);
            to_place.write(c);
            to_left.write(c);
            to_right.write(c);
            for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
                c.cell = cell;
                to_decode[cell].write(c);
                to_correct[cell].write(c);
                to_dequantize[cell].write(c);
                to_quantize[cell].write(c);
                to_write[cell].write(c);
            }
            ++running;
            ++index;
            phase = REQUEST;
        }
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
