// SPDX-License-Identifier: Apache-2.0
// A softmax command: scores of 16 bits from memory through `softmax` to codes in memory, as the rows of a left operand.
//
// Of the descriptor it takes m, n, batch, heads, quantizers, out_bits, and the addresses: `left` of the scores, as Q.K^T
// writes accumulators of 16 bits (rows of whole pairs of beats), `parameters` and `out` (docs/engine.md). Cells may work
// on other commands meanwhile.
//
// Relative positions are two terms, added to each score: its key lies in a picture `k` wide (0: no terms). At `right`, before
// each row of scores is read: `blocks` beats of terms of the picture's rows, then `folds` beats of those of its columns, again
// and again until a whole number of beats is full. `digits` is how many fraction bits the scores get.
#ifndef AHCQ_ENGINE_SOFTMAX_UNIT_H
#define AHCQ_ENGINE_SOFTMAX_UNIT_H

#include "softmax.h"

namespace ahcq {
namespace engine {

constexpr int BEAT_SCORES = 2 * LANES;
constexpr int ROW_TERMS = 64 / LANES, COLUMN_TERMS = 64;  // beats

// A command's addresses, in beats; its terms.
struct softmax_job {
    softmax_command command;
    uint32_t scores, parameters, out, terms;
    uint16_t width;
    uint8_t fraction, row_beats, column_beats;
};

inline uint32_t factor_beats(const softmax_command& c) { return beats_of(c.heads); }
// Bounds, then codes of the ranks.
inline uint32_t rank_beats(const softmax_command& c) { return 2 * beats_of(uint32_t(c.quantizers) << c.out_bits); }

inline void share_softmax(
    hls::stream<command>& commands,
    hls::stream<softmax_job>& to_request,
    hls::stream<softmax_job>& to_unpack,
    hls::stream<softmax_command>& to_softmax,
    hls::stream<softmax_job>& to_pack) {
    const command c = commands.read();
    softmax_job job;
    job.command.m = c.m, job.command.n = c.n, job.command.batch = c.batch;
    job.command.heads = c.heads, job.command.quantizers = c.quantizers, job.command.out_bits = c.out_bits;
    job.scores = c.left, job.parameters = c.parameters, job.out = c.out, job.terms = c.right;
    job.width = uint16_t(c.k), job.fraction = c.digits;
    job.row_beats = uint8_t(c.blocks), job.column_beats = uint8_t(c.folds);
    to_request.write(job);
    to_unpack.write(job);
    to_softmax.write(job.command);
    to_pack.write(job);
}

// The parameters, then of each row its terms and the beats that hold scores.
inline void request_scores(hls::stream<softmax_job>& jobs, hls::stream<read_request>& requests) {
    const softmax_job job = jobs.read();
    const softmax_command c = job.command;
    const uint32_t rows = c.batch * c.m, row_stride = (c.n + 2 * BEAT_SCORES - 1) / (2 * BEAT_SCORES) * 2;
    const uint32_t term_beats = uint32_t(job.row_beats) + job.column_beats;
    const uint32_t score_beats = (c.n + BEAT_SCORES - 1) / BEAT_SCORES;
    uint32_t address = job.scores, term_address = job.terms, row = 0;
    bool first = true, terms = false;
    while (first || row < rows) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        read_request request;
        request.address = first ? job.parameters : terms ? term_address : address;
        request.beats = first ? factor_beats(c) + rank_beats(c) : terms ? term_beats : score_beats;
        request.stride = 1;
        requests.write(request);
        if (terms) term_address += term_beats;
        if (!first && !terms) {
            address += row_stride;
            ++row;
        }
        terms = term_beats != 0 && !terms;
        first = false;
    }
}

// Parameters to those who keep them; of each beat of scores two turns, LANES a turn with their sign and their terms.
inline void unpack_scores(
    hls::stream<softmax_job>& jobs,
    hls::stream<beat>& in,
    hls::stream<beat>& factors,
    hls::stream<beat>& quantizers,
    hls::stream<beat>& scores) {
    const softmax_job job = jobs.read();
    const softmax_command c = job.command;
    const uint8_t term_beats = job.row_beats + job.column_beats;
    uint32_t factors_left = factor_beats(c), ranks_left = rank_beats(c);
    beat row_terms[ROW_TERMS], next_terms[ROW_TERMS], column_terms[COLUMN_TERMS];  // two are read of the first at once
    uint8_t terms_left = term_beats, term = 0;
    // Of the turn's first score: its key's row and column in the picture, the beat of its column's term.
    uint16_t key_row = 0, key_column = 0;
    uint8_t column_beat = 0;
    row_place now = {0, 0, 0, 0};
    beat data = beat();
#pragma HLS ARRAY_PARTITION variable = data.word complete
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const bool of_factors = factors_left != 0, of_ranks = !of_factors && ranks_left != 0;
        const bool of_terms = !of_factors && !of_ranks && terms_left != 0;
        const bool of_scores = !of_factors && !of_ranks && !of_terms, upper = now.beat % 2 != 0;
        if (!of_scores || !upper) data = in.read();
        if (of_factors) factors.write(data);
        if (of_ranks) quantizers.write(data);
        if (of_terms && term < job.row_beats) {
            row_terms[term % ROW_TERMS] = data;
            next_terms[term % ROW_TERMS] = data;
        }
        if (of_terms && term >= job.row_beats) column_terms[(term - job.row_beats) % COLUMN_TERMS] = data;
        const uint16_t next_row = key_row + 1;
        if (of_scores) {
            const beat of_row = row_terms[key_row / LANES % ROW_TERMS], of_next = next_terms[next_row / LANES % ROW_TERMS];
#pragma HLS ARRAY_PARTITION variable = of_row.word complete
#pragma HLS ARRAY_PARTITION variable = of_next.word complete
            const beat of_column = column_terms[column_beat % COLUMN_TERMS];
#pragma HLS ARRAY_PARTITION variable = of_column.word complete
            const uint32_t here = of_row.word[key_row % LANES], below = of_next.word[next_row % LANES];
            beat row;
#pragma HLS ARRAY_PARTITION variable = row.word complete
            for (int lane = 0; lane < LANES; ++lane) {
#pragma HLS UNROLL
                const uint32_t pair = data.word[upper ? LANES / 2 + lane / 2 : lane / 2];
                const uint32_t score = uint32_t(int32_t(int16_t(pair >> (16 * (lane % 2))))) << (job.fraction % 16);
                const uint32_t terms = (key_column + lane < job.width ? here : below) + of_column.word[lane];
                row.word[lane] = job.width != 0 ? score + terms : score;
            }
            scores.write(row);
        }
        const bool ends = of_scores && ends_row(c, now), wraps = key_column + LANES >= job.width;
        factors_left = of_factors ? factors_left - 1 : factors_left;
        ranks_left = of_ranks ? ranks_left - 1 : ranks_left;
        terms_left = ends ? term_beats : of_terms ? uint8_t(terms_left - 1) : terms_left;
        term = ends ? 0 : of_terms ? uint8_t(term + 1) : term;
        const uint16_t next_column = wraps ? key_column + LANES - job.width : key_column + LANES;
        key_row = ends ? 0 : of_scores && wraps ? next_row : key_row;
        key_column = ends ? 0 : of_scores ? next_column : key_column;
        column_beat = ends || column_beat + 1 == job.column_beats ? 0 : of_scores ? uint8_t(column_beat + 1) : column_beat;
        if (of_scores) more = advance(c, now);
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
    hls::stream<softmax_job> to_request("to_request"), to_unpack("to_unpack"), to_pack("to_pack");
    hls::stream<softmax_command> to_softmax("to_softmax");
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
