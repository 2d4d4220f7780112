// SPDX-License-Identifier: Apache-2.0
// A softmax command: scores of 16 bits from memory through `softmax` to codes in memory, as the rows of a left operand.
//
// Of the descriptor it takes m, n, batch, heads, quantizers, out_bits, and the addresses: `left` of the scores, as Q.K^T
// writes accumulators of 16 bits (rows of whole pairs of beats), `parameters` and `out` (docs/engine.md). Cells may work
// on other commands meanwhile.
#ifndef AHCQ_ENGINE_SOFTMAX_UNIT_H
#define AHCQ_ENGINE_SOFTMAX_UNIT_H

#include "softmax.h"

namespace ahcq {
namespace engine {

constexpr int BEAT_SCORES = 2 * LANES;

// A command's addresses, in beats.
struct softmax_job {
    softmax_command command;
    uint32_t scores, parameters, out;
};

inline uint32_t factor_beats(const softmax_command& c) { return beats_of(c.heads); }
// Bounds, then codes of the ranks.
inline uint32_t rank_beats(const softmax_command& c) { return 2 * beats_of(uint32_t(c.quantizers) << c.out_bits); }

inline void share_softmax(
    hls::stream<command>& commands,
    hls::stream<softmax_job>& to_request,
    hls::stream<softmax_command>& to_unpack,
    hls::stream<softmax_command>& to_softmax,
    hls::stream<softmax_job>& to_pack) {
    const command c = commands.read();
    softmax_job job;
    job.command.m = c.m, job.command.n = c.n, job.command.batch = c.batch;
    job.command.heads = c.heads, job.command.quantizers = c.quantizers, job.command.out_bits = c.out_bits;
    job.scores = c.left, job.parameters = c.parameters, job.out = c.out;
    to_request.write(job);
    to_unpack.write(job.command);
    to_softmax.write(job.command);
    to_pack.write(job);
}

// The parameters, then the beats of each row that hold scores.
inline void request_scores(hls::stream<softmax_job>& jobs, hls::stream<read_request>& requests) {
    const softmax_job job = jobs.read();
    const softmax_command c = job.command;
    const uint32_t rows = c.batch * c.m, row_stride = (c.n + 2 * BEAT_SCORES - 1) / (2 * BEAT_SCORES) * 2;
    uint32_t address = job.scores, row = 0;
    bool first = true;
    while (first || row < rows) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        read_request request;
        request.address = first ? job.parameters : address;
        request.beats = first ? factor_beats(c) + rank_beats(c) : (c.n + BEAT_SCORES - 1) / BEAT_SCORES;
        request.stride = 1;
        requests.write(request);
        if (!first) {
            address += row_stride;
            ++row;
        }
        first = false;
    }
}

// Parameters to those who keep them; of each beat of scores two turns, LANES a turn with their sign.
inline void unpack_scores(
    hls::stream<softmax_command>& commands,
    hls::stream<beat>& in,
    hls::stream<beat>& factors,
    hls::stream<beat>& quantizers,
    hls::stream<beat>& scores) {
    const softmax_command c = commands.read();
    uint32_t factors_left = factor_beats(c), ranks_left = rank_beats(c);
    row_place now = {0, 0, 0, 0};
    beat data = beat();
#pragma HLS ARRAY_PARTITION variable = data.word complete
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const bool are_scores = factors_left == 0 && ranks_left == 0, upper = now.beat % 2 != 0;
        if (!are_scores || !upper) data = in.read();
        if (factors_left != 0) {
            factors.write(data);
            --factors_left;
        } else if (ranks_left != 0) {
            quantizers.write(data);
            --ranks_left;
        } else {
            beat row;
#pragma HLS ARRAY_PARTITION variable = row.word complete
            for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
                const uint32_t pair = data.word[upper ? LANES / 2 + lane / 2 : lane / 2];
                row.word[lane] = uint32_t(int32_t(int16_t(pair >> (16 * (lane % 2)))));
            }
            scores.write(row);
            more = advance(c, now);
        }
    }
}

// Folds of codes to whole beats, rows begin with one of their own; above 4 bits low and high word of a fold in turn.
inline void pack_codes(
    hls::stream<softmax_job>& jobs,
    hls::stream<beat>& in,
    hls::stream<write_request>& out,
    hls::stream<bool>& written,
    hls::stream<bool>& done) {
    const softmax_job job = jobs.read();
    const softmax_command c = job.command;
    const bool two = c.out_bits > 4;
    row_place now = {0, 0, 0, 0};
    write_request request;
    request.address = LANES * job.out;
    request.words = LANES;
    request.data = beat();
#pragma HLS ARRAY_PARTITION variable = request.data.word complete
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const beat codes = in.read();
        const uint32_t place = two ? 2 * now.beat % LANES : now.beat % LANES;
        for (int word = 0; word < LANES; ++word) {
#pragma HLS UNROLL
            const uint32_t before = place == 0 ? 0 : request.data.word[word];
            const bool high = two && uint32_t(word) == place + 1;
            request.data.word[word] = uint32_t(word) == place ? codes.word[0] : high ? codes.word[1] : before;
        }
        if (ends_row(c, now) || place == (two ? LANES - 2 : LANES - 1)) {
            out.write(request);
            request.address += LANES;
        }
        more = advance(c, now);
    }
    write_request wait = write_request();
    out.write(wait);
    done.write(written.read());
}

inline void softmax_unit(
    hls::stream<command>& commands,
    hls::stream<read_request>& requests,
    hls::stream<beat>& beats,
    hls::stream<write_request>& results,
    hls::stream<bool>& written,
    hls::stream<bool>& done) {
#pragma HLS DATAFLOW
    hls::stream<softmax_job> to_request("to_request"), to_pack("to_pack");
    hls::stream<softmax_command> to_unpack("to_unpack"), to_softmax("to_softmax");
    hls::stream<beat> factors("factors"), quantizers("quantizers"), scores("scores"), codes("codes");
    AHCQ_PROCESS(share_softmax, commands, to_request, to_unpack, to_softmax, to_pack);
    AHCQ_PROCESS(request_scores, to_request, requests);
    AHCQ_PROCESS(unpack_scores, to_unpack, beats, factors, quantizers, scores);
    AHCQ_DATAFLOW(softmax, to_softmax, factors, quantizers, scores, codes);
    AHCQ_PROCESS(pack_codes, to_pack, codes, results, written, done);
#ifdef AHCQ_WAIT
    AHCQ_WAIT(codes);
#endif
}

}  // namespace engine
}  // namespace ahcq

#endif
