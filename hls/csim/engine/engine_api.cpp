// SPDX-License-Identifier: Apache-2.0
// The engine beside a simulated memory, as a C function for Python. AHCQ_CONFIG names the config struct,
// AHCQ_RUN the function.
#include <hls_stream.h>
#include <stdio.h>
#include <string.h>

// Runs all processes to the end while the streams are there; within a function of AHCQ_DATAFLOW it only keeps these.
#define AHCQ_WAIT(streams) finish(streams)

namespace {
template <class S>
void finish(S& streams);
}

#include "ahcq/engine/engine.h"
#include "ahcq/engine/float_engine.h"

using namespace ahcq::engine;
typedef AHCQ_CONFIG config;

namespace {

// DDR: so many bytes a cycle, in granules of 64; an unused cycle is lost. Only clocked runs wait for it.
struct ddr {
    static constexpr uint64_t GRANULE = 64, AHEAD = 256;
    double bytes_per_cycle = 40, used = 0;
    uint64_t bytes = 0;  // moved, whole granules
    void take(uint64_t amount) {
        ahcq_sim::scheduler& sim = ahcq_sim::scheduler::get();
        bytes += amount;
        if (!sim.clocked) return;
        while (used + amount > sim.cycles * bytes_per_cycle + AHEAD) {
            ++sim.progress;
            sim.hand_over();
        }
        const double least = sim.cycles * bytes_per_cycle - AHEAD;
        used = (used < least ? least : used) + amount;
    }
} memory_port;

struct simulated {
    uint32_t* words;
    uint64_t count;
    bool outside = false;  // an address beyond the memory
} memory;

void read_memory(hls::stream<read_request>& requests, hls::stream<beat>& out) {
    uint64_t granule = ~uint64_t(0);
    while (true) {
        const read_request request = requests.read();
        for (uint64_t i = 0; i < request.beats; ++i) {
            const uint64_t word = (uint64_t(request.address) + i * request.stride) * LANES;
            if (word * 4 / ddr::GRANULE != granule) memory_port.take(ddr::GRANULE);
            granule = word * 4 / ddr::GRANULE;
            beat now = beat();
            if (word + LANES <= memory.count) {
                memcpy(now.word, memory.words + word, sizeof now.word);
            } else {
                memory.outside = true;
            }
            out.write(now);
            AHCQ_TURN;
        }
    }
}

void write_memory(hls::stream<write_request>& requests, hls::stream<bool>& written) {
    uint64_t granule = ~uint64_t(0);
    while (true) {
        const write_request request = requests.read();
        if (request.words == 0) {
            written.write(true);
            continue;
        }
        const uint64_t word = request.address;
        if (word * 4 / ddr::GRANULE != granule) memory_port.take(ddr::GRANULE);
        granule = word * 4 / ddr::GRANULE;
        if (word + request.words <= memory.count) {
            memcpy(memory.words + word, request.data.word, 4 * request.words);
        } else {
            memory.outside = true;
        }
        AHCQ_TURN;
    }
}

struct outputs {
    bool complete = false;
    uint64_t cycles = 0;
    std::vector<accumulators> taps[config::CELLS];
    std::vector<std::pair<const char*, uint64_t> > turns;
    bool tapped = false;
} last;

template <class S>
void finish(S& streams) {
    ahcq_sim::scheduler& sim = ahcq_sim::scheduler::get();
    if constexpr (std::is_array<S>::value) {  // `corrected`, or `sums` of floats
        for (int cell = 0; cell < config::CELLS; ++cell) {
            last.taps[cell].clear();
            if constexpr (!config::FLOATS) {
                if (last.tapped) streams[cell].tap = &last.taps[cell];
            }
        }
        sim.run();
        last.cycles = sim.cycles;
        last.turns.clear();
        for (auto& fiber : sim.fibers) {
            last.turns.emplace_back(fiber->name, fiber->turns);
            if (!strncmp(fiber->name, "fetch", 5)) last.complete = fiber->finished;
        }
    } else {
        sim.hand_over();
    }
}

}  // namespace

extern "C" {

// Returns 0; 1: nobody could go on before the program had ended; 2: an address beyond the memory.
int ahcq_engine_run(
    uint32_t* words, uint64_t count, uint32_t program, uint32_t commands, int clocked, double bytes_per_cycle,
    int tapped, int depth) {
    ahcq_sim::scheduler& sim = ahcq_sim::scheduler::get();
    sim.clocked = clocked;
    sim.depth = depth;
    memory = simulated{words, count};
    memory_port = ddr();
    memory_port.bytes_per_cycle = bytes_per_cycle;
    last.tapped = tapped;
    {
        hls::stream<read_request> requests[config::READERS];
        hls::stream<beat> beats[config::READERS];
        hls::stream<write_request> results_out[config::WRITERS];
        hls::stream<bool> written[config::WRITERS];
        hls::stream<uint32_t> finished;
        for (int port = 0; port < config::READERS; ++port) AHCQ_PROCESS(read_memory, requests[port], beats[port]);
        for (int port = 0; port < config::WRITERS; ++port) AHCQ_PROCESS(write_memory, results_out[port], written[port]);
        AHCQ_RUN<config>(program, commands, requests, beats, results_out, written, finished);
        sim.clear();
    }
    return memory.outside ? 2 : last.complete ? 0 : 1;
}

uint64_t ahcq_engine_cycles() { return last.cycles; }
uint64_t ahcq_engine_bytes() { return memory_port.bytes; }
uint64_t ahcq_engine_processes() { return last.turns.size(); }
const char* ahcq_engine_process(uint64_t index) { return last.turns[index].first; }
uint64_t ahcq_engine_turns(uint64_t index) { return last.turns[index].second; }
uint64_t ahcq_engine_tapped(int cell) { return last.taps[cell].size(); }
const void* ahcq_engine_taps(int cell) { return last.taps[cell].data(); }
uint64_t ahcq_engine_constant(int index) {
    const uint64_t values[] = {config::CELLS, config::DIGIT, config::LEFT_DEPTH, config::RIGHT_DEPTH, sizeof(accumulators)};
    return values[index];
}
}
