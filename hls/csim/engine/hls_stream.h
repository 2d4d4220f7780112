// SPDX-License-Identifier: Apache-2.0
// Simulation of processes that run at the same time: each is a fiber, streams are FIFOs of limited depth, and whoever
// cannot go on hands over. One thread, always the same order; where nobody can go on, that is seen (a deadlock).
//
// Clocked, a fiber also hands over after each turn of a pipelined loop: a round of all fibers is a clock cycle, of
// pipelines without latency. Takes the place of the header of this name in Vitis HLS.
#ifndef AHCQ_SIM_HLS_STREAM_H
#define AHCQ_SIM_HLS_STREAM_H

#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <tuple>
#include <vector>

namespace ahcq_sim {

struct fiber {
    ucontext_t context;
    std::function<void()> body;
    void* stack;
    bool finished = false;
    const char* name = "";
    uint64_t turns = 0;  // of pipelined loops
};

constexpr size_t STACK = size_t(8) << 20;  // large arrays are local; pages that nobody touches cost nothing

struct scheduler {
    std::vector<std::unique_ptr<fiber> > fibers;
    ucontext_t home;
    fiber* running = nullptr;
    uint64_t progress = 0, cycles = 0;
    size_t depth = 64;  // of every stream that has no depth of its own
    bool clocked = false;

    static scheduler& get() {
        static thread_local scheduler* instance = nullptr;
        if (!instance) instance = new scheduler;
        return *instance;
    }
    void spawn(const char* name, std::function<void()> body) {
        fibers.emplace_back(new fiber);
        fiber* made = fibers.back().get();
        made->body = std::move(body);
        made->name = name;
        made->stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        getcontext(&made->context);
        made->context.uc_stack.ss_sp = made->stack;
        made->context.uc_stack.ss_size = STACK;
        made->context.uc_link = &home;
        makecontext(&made->context, &scheduler::enter, 0);
    }
    static void enter() {
        scheduler& self = get();
        self.running->body();
        self.running->finished = true;
    }
    void hand_over() { swapcontext(&running->context, &home); }
    void turn() {
        ++running->turns;
        ++progress;
        if (clocked) hand_over();
    }
    // Until nobody can go on. Returns the number of rounds.
    void run() {
        for (uint64_t before = progress + 1; before != progress;) {
            before = progress;
            for (auto& each : fibers) {
                if (each->finished) continue;
                running = each.get();
                swapcontext(&home, &running->context);
            }
            ++cycles;
        }
    }
    void clear() {
        for (auto& each : fibers) munmap(each->stack, STACK);
        fibers.clear();
        progress = cycles = 0;
    }
};

// A process with its arguments: for ever, or once.
template <class... A, class... B>
void start(const char* name, bool again, void (*process)(A...), B&... arguments) {
    std::tuple<A...> held(arguments...);
    scheduler::get().spawn(name, [process, held, again]() mutable {
        do std::apply(process, held);
        while (again);
    });
}

}  // namespace ahcq_sim

#define AHCQ_LAUNCH(process, ...) ahcq_sim::start(#process, false, process, __VA_ARGS__)
#define AHCQ_PROCESS(process, ...) ahcq_sim::start(#process, true, process, __VA_ARGS__)
#define AHCQ_TURN ahcq_sim::scheduler::get().turn()

namespace hls {

template <class T>
class stream {
   public:
    explicit stream(const char* = "") : ring_(ahcq_sim::scheduler::get().depth) {}
    T read() {
        ahcq_sim::scheduler& sim = ahcq_sim::scheduler::get();
        while (count_ == 0) sim.hand_over();
        const T value = ring_[first_];
        first_ = first_ + 1 == ring_.size() ? 0 : first_ + 1;
        --count_;
        ++sim.progress;
        return value;
    }
    void write(const T& value) {
        ahcq_sim::scheduler& sim = ahcq_sim::scheduler::get();
        while (count_ == ring_.size()) sim.hand_over();
        size_t place = first_ + count_;
        ring_[place >= ring_.size() ? place - ring_.size() : place] = value;
        ++count_;
        ++sim.progress;
        if (tap) tap->push_back(value);
    }
    bool empty() const { return count_ == 0; }
    std::vector<T>* tap = nullptr;  // takes a copy of what is written

   private:
    std::vector<T> ring_;
    size_t first_ = 0, count_ = 0;
};

}  // namespace hls

#endif
