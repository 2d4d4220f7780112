// SPDX-License-Identifier: Apache-2.0
// pack4.sv beside its C++ twin and plain products: every pair of nibbles in each place, every four nibbles together, random folds.
#include <cstdio>
#include <deque>
#include <random>

#include "Vpack4.h"
#include "ahcq/engine/pack.h"

static const int LATENCY = 10;
struct folds {
    uint32_t a0, a1, w0, w1;
};
static Vpack4 design;
static std::deque<folds> running;
static long compared = 0, wrong = 0;

static void clock(const folds& in) {
    design.a0 = in.a0, design.a1 = in.a1, design.w0 = in.w0, design.w1 = in.w1;
    running.push_back(in);
    design.clk = 0, design.eval();
    design.clk = 1, design.eval();
    if (running.size() < LATENCY) return;
    const folds now = running.front();
    running.pop_front();
    uint32_t packed[4], plain[4];
    ahcq::engine::packed_sums(now.a0, now.a1, now.w0, now.w1, packed);
    ahcq::engine::plain_sums(now.a0, now.a1, now.w0, now.w1, plain);
    for (int field = 0; field < 4; ++field) {
        const uint32_t got = uint32_t(design.sum >> (11 * field)) & 2047;
        ++compared;
        if (got != plain[field] || packed[field] != plain[field]) ++wrong;
    }
}

int main() {
    std::mt19937 random(1);
    for (uint32_t four = 0; four < 65536; ++four) {  // all fours of nibbles, in all eight places at once
        const uint32_t every = 0x11111111u;
        clock({(four & 15) * every, (four >> 4 & 15) * every, (four >> 8 & 15) * every, (four >> 12) * every});
    }
    for (int place = 0; place < 8; ++place) {  // every pair alone in its place, the others at their most
        for (uint32_t pair = 0; pair < 256; ++pair) {
            const uint32_t others = ~(15u << (4 * place));
            const uint32_t a = (pair & 15) << (4 * place), w = (pair >> 4) << (4 * place);
            clock({a | others, a, w | others, w});
        }
    }
    for (int i = 0; i < 200000; ++i) clock({uint32_t(random()), uint32_t(random()), uint32_t(random()), uint32_t(random())});
    std::printf("%ld %ld\n", compared, wrong);
    return 0;
}
