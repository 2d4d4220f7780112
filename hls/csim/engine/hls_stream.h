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
    ucontext_t* home;  // where it hands over to
    std::function<void()> body;
    void* stack;
    bool finished = false;
    const char* name = "";
    uint64_t turns = 0;  // of pipelined loops
};

constexpr size_t STACK = size_t(8) << 20;  // large arrays are local; pages that nobody touches cost nothing

struct scheduler {
    std::vector<std::unique_ptr<fiber> > fibers, frames;
    ucontext_t home;
    fiber* running = nullptr;
    uint64_t progress = 0, cycles = 0;
    size_t depth = 64;  // of every stream without AHCQ_DEPTH
    bool clocked = false;

    static scheduler& get() {
        static thread_local scheduler* instance = nullptr;
        if (!instance) instance = new scheduler;
        return *instance;
    }
    void spawn(const char* name, std::function<void()> body) { fibers.push_back(make(name, std::move(body))); }
    // A function that starts processes and then hands over: it stays, with its streams, until `clear`.
    void nest(const char* name, std::function<void()> body) {
        frames.push_back(make(name, std::move(body)));
        fiber *outer = running, *inner = frames.back().get();
        if (outer) inner->home = &outer->context;
        running = inner;
        swapcontext(inner->home, &inner->context);
        running = outer;
        inner->home = &home;
    }
    std::unique_ptr<fiber> make(const char* name, std::function<void()> body) {
        std::unique_ptr<fiber> made(new fiber);
        made->body = std::move(body);
        made->name = name;
        made->home = &home;
        made->stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        getcontext(&made->context);
        made->context.uc_stack.ss_sp = made->stack;
        made->context.uc_stack.ss_size = STACK;
        made->context.uc_link = &home;
        makecontext(&made->context, &scheduler::enter, 0);
        return made;
    }
    static void enter() {
        scheduler& self = get();
        self.running->body();
        self.running->finished = true;
    }
    void hand_over() { swapcontext(&running->context, running->home); }
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
                resume(*each);
            }
            ++cycles;
        }
    }
    void resume(fiber& next) {
        running = &next;
        swapcontext(&home, &next.context);
        running = nullptr;
    }
    void clear() {
        for (auto each = frames.rbegin(); each != frames.rend(); ++each) resume(**each);
        for (auto* made : {&fibers, &frames}) {
            for (auto& each : *made) munmap(each->stack, STACK);
            made->clear();
        }
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

template <class... A, class... B>
void nest(const char* name, void (*function)(A...), B&... arguments) {
    std::tuple<A...> held(arguments...);
    scheduler::get().nest(name, [function, held]() mutable { std::apply(function, held); });
}

}  // namespace ahcq_sim

#define AHCQ_DEPTH(stream, words) (stream).resize(words);
#define AHCQ_DATAFLOW(function, ...) ahcq_sim::nest(#function, function, __VA_ARGS__)
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
    void resize(size_t depth) { ring_.resize(depth); }  // before it is used
    bool empty() const { return count_ == 0; }
    std::vector<T>* tap = nullptr;  // takes a copy of what is written

   private:
    std::vector<T> ring_;
    size_t first_ = 0, count_ = 0;
};

}  // namespace hls

#endif
