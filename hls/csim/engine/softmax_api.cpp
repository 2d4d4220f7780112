// SPDX-License-Identifier: Apache-2.0
// The softmax of the engine as a C function for Python: launch after launch, words in, words out.
#include <hls_stream.h>
#include <string.h>

// Runs all processes to the end while the streams are there.
#define AHCQ_WAIT(codes) finish(codes)

namespace {
template <class S>
void finish(S& codes);
}

#include "ahcq/engine/softmax.h"

using namespace ahcq::engine;

namespace {

struct words {
    const uint32_t* at;
    uint64_t beats;
};

void send(words given, hls::stream<beat>& out) {
    for (uint64_t i = 0; i < given.beats; ++i) {
        beat now;
        memcpy(now.word, given.at + i * LANES, sizeof now.word);
        out.write(now);
    }
}

void announce_all(const softmax_command* launches, uint64_t count, hls::stream<softmax_command>& out) {
    for (uint64_t i = 0; i < count; ++i) out.write(launches[i]);
}

void drain(hls::stream<beat>& codes) {
    while (true) codes.read();
}

template <class S>
void finish(S& codes) {
    AHCQ_LAUNCH(drain, codes);
    ahcq_sim::scheduler::get().run();
}

}  // namespace

extern "C" {

// Returns the number of beats of codes, which should be that of the scores.
uint64_t ahcq_softmax_run(
    const softmax_command* launches, uint64_t count, const uint32_t* factors, uint64_t factor_beats,
    const uint32_t* quantizers, uint64_t quantizer_beats, const uint32_t* scores, uint64_t score_beats,
    uint32_t* codes) {
    ahcq_sim::scheduler& sim = ahcq_sim::scheduler::get();
    sim.clocked = false;
    sim.depth = 64;
    std::vector<beat> made;
    {
        hls::stream<softmax_command> commands;
        hls::stream<beat> to_factors, to_quantizers, to_scores, from_codes;
        from_codes.tap = &made;
        words given[3] = {{factors, factor_beats}, {quantizers, quantizer_beats}, {scores, score_beats}};
        AHCQ_LAUNCH(announce_all, launches, count, commands);
        AHCQ_LAUNCH(send, given[0], to_factors);
        AHCQ_LAUNCH(send, given[1], to_quantizers);
        AHCQ_LAUNCH(send, given[2], to_scores);
        softmax(commands, to_factors, to_quantizers, to_scores, from_codes);
        sim.clear();
    }
    if (made.size() <= score_beats) memcpy(codes, made.data(), made.size() * sizeof(beat));
    return made.size();
}
}
