// Threads of a CUDA block as fibers on one core of the host, so that kernels can be tested where there is no GPU.
//
// A fiber runs until it waits for others; blocks run one after the other. What hardware does on its own time (copies of
// the copy engine) is done as late as possible: only when no fiber can go on. A kernel that forgets to wait then reads
// old data, and a kernel that waits for what never comes is reported as a deadlock.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace emulate {

struct Index3 {
    unsigned x = 1, y = 1, z = 1;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 192 << 10;  // bytes of one fiber
constexpr size_t kShared = 232448;    // bytes of dynamic shared memory that a block of sm_90 may have
constexpr uint8_t kPoison = 0xCB;     // what memory holds that nobody wrote

// What the lanes of a warp show each other; one for each set of lanes that take part.
struct Rendezvous {
    uint32_t arrived = 0;
    uint64_t generation = 0;
    uint64_t shown[kWarp] = {}, seen[kWarp] = {};
};

struct Barrier {
    unsigned arrived = 0;
    uint64_t generation = 0;
};

struct Fiber {
    ucontext_t context{};
    std::unique_ptr<uint8_t[]> stack;
    unsigned thread = 0;
    bool done = false;
    std::function<bool()> ready;              // what it waits for; empty: it can run
    std::deque<std::function<void()>> later;  // asynchronous products of this thread, not yet carried out
    std::vector<size_t> groups;               // how many of them each committed group holds
    size_t open = 0;                          // and how many belong to none yet
};

struct Block {
    Index3 grid, index;
    unsigned threads = 0, alive = 0;
    std::vector<Fiber> fibers;
    std::vector<std::map<uint32_t, Rendezvous>> warps;
    std::map<int, Barrier> barriers;
    std::deque<std::function<void()>> engine;  // copies that were started and have not arrived
    ucontext_t scheduler{};
    Fiber* current = nullptr;
    const std::function<void()>* body = nullptr;
};

inline Block& block() {
    static Block one;
    return one;
}

// Whether copies arrive at once; tests of kernels with a copy engine run both ways.
inline bool& eager() {
    static bool at_once = false;
    return at_once;
}

inline uint8_t* dynamic_shared() {
    alignas(1024) static uint8_t memory[kShared + 1024];
    return memory;
}

[[noreturn]] inline void fail(const char* what) {
    std::printf("emulator: block (%u, %u, %u), thread %u: %s\n", block().index.x, block().index.y, block().index.z,
                block().current ? block().current->thread : 0, what);
    std::fflush(stdout);
    std::_Exit(1);
}

inline Fiber& self() { return *block().current; }

// Gives the other fibers their turn until `ready` holds.
inline void wait(std::function<bool()> ready) {
    if (ready()) return;
    Fiber& fiber = self();
    fiber.ready = std::move(ready);
    swapcontext(&fiber.context, &block().scheduler);
}

inline void leave_barriers();

inline void fiber_main() {
    (*block().body)();
    Fiber& fiber = self();
    if (!fiber.later.empty()) fail("ends without waiting for its asynchronous products");
    fiber.done = true;
    --block().alive;
    leave_barriers();
    swapcontext(&fiber.context, &block().scheduler);
}

// bar.sync: waits until `count` threads have come; 0 stands for all that are still there.
inline void barrier(int id, unsigned count) {
    Barrier& b = block().barriers[id];
    const uint64_t generation = b.generation;
    ++b.arrived;
    if (b.arrived >= (count ? count : block().alive)) {
        b.arrived = 0;
        ++b.generation;
        return;
    }
    wait([&b, generation] { return b.generation != generation; });
}

// bar.arrive: counts without waiting.
inline void barrier_arrive(int id, unsigned count) {
    Barrier& b = block().barriers[id];
    if (++b.arrived >= count) {
        b.arrived = 0;
        ++b.generation;
    }
}

// A thread that ends is not waited for by barrier 0.
inline void leave_barriers() {
    Barrier& b = block().barriers[0];
    if (b.arrived > 0 && b.arrived >= block().alive) {
        b.arrived = 0;
        ++b.generation;
    }
}

// Every lane of `mask` shows a word and sees the words of all.
inline const uint64_t* show(uint32_t mask, uint64_t word) {
    const unsigned thread = self().thread, lane = thread % kWarp;
    if (!(mask >> lane & 1)) fail("is not in the mask of its own warp operation");
    const unsigned size = block().threads - thread / kWarp * kWarp;
    if (size < kWarp) mask &= (1u << size) - 1;
    Rendezvous& r = block().warps[thread / kWarp][mask];
    r.shown[lane] = word;
    r.arrived |= 1u << lane;
    const uint64_t generation = r.generation;
    if (r.arrived == mask) {
        std::memcpy(r.seen, r.shown, sizeof r.seen);
        r.arrived = 0;
        ++r.generation;
    } else {
        wait([&r, generation] { return r.generation != generation; });
    }
    return r.seen;
}

// Every lane of a full warp sees what all lanes hold, for operations on more than a word.
template <class T, class Use>
void with_all_lanes(const T& mine, Use use) {
    const T* all[kWarp];
    const uint64_t* words = show(0xFFFFFFFFu, reinterpret_cast<uint64_t>(&mine));
    for (int i = 0; i < kWarp; ++i) all[i] = reinterpret_cast<const T*>(words[i]);
    use(all);
    show(0xFFFFFFFFu, 0);  // nobody goes on while others still read
}

// ---- products that are carried out later (wgmma): one queue a thread ----

inline void start_later(std::function<void()> work) {
    self().later.push_back(std::move(work));
    ++self().open;
}

inline void commit_group() {
    self().groups.push_back(self().open);
    self().open = 0;
}

// Carries out all but the newest `pending` groups.
inline void wait_groups(size_t pending) {
    Fiber& fiber = self();
    while (fiber.groups.size() > pending) {
        for (size_t i = 0; i < fiber.groups.front(); ++i) {
            fiber.later.front()();
            fiber.later.pop_front();
        }
        fiber.groups.erase(fiber.groups.begin());
    }
}

// ---- what the copy engine does ----

inline void start_copy(std::function<void()> copy) {
    if (eager()) {
        copy();
    } else {
        block().engine.push_back(std::move(copy));
    }
}

// ---- the scheduler ----

inline void run_block() {
    Block& b = block();
    for (Fiber& fiber : b.fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    while (b.alive > 0) {
        bool moved = false;
        for (Fiber& fiber : b.fibers) {
            if (fiber.done || (fiber.ready && !fiber.ready())) continue;
            fiber.ready = nullptr;
            moved = true;
            b.current = &fiber;
            swapcontext(&b.scheduler, &fiber.context);
        }
        if (moved) continue;
        if (b.engine.empty()) fail("deadlock: every thread waits");
        const auto copy = std::move(b.engine.front());
        b.engine.pop_front();
        copy();
    }
    if (!b.engine.empty()) fail("the block ends while copies are under way");
}

// Runs a kernel: `body` once for every thread of every block.
inline void run(Index3 grid, unsigned threads, size_t shared, const std::function<void()>& body) {
    Block& b = block();
    if (threads == 0 || threads > 1024) fail("a block has 1 to 1024 threads");
    if (shared > kShared) fail("more shared memory than a block can have");
    b.grid = grid;
    b.threads = threads;
    b.body = &body;
    while (b.fibers.size() < threads) {
        b.fibers.emplace_back();
        b.fibers.back().stack = std::make_unique<uint8_t[]>(kStack);
    }
    b.fibers.resize(threads);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                b.index = {x, y, z};
                b.alive = threads;
                b.barriers.clear();
                b.warps.assign((threads + kWarp - 1) / kWarp, {});
                for (unsigned t = 0; t < threads; ++t) {
                    Fiber& fiber = b.fibers[t];
                    fiber.thread = t;
                    fiber.done = false;
                    fiber.ready = nullptr;
                    fiber.groups.clear();
                    fiber.open = 0;
                }
                std::memset(dynamic_shared(), kPoison, kShared + 1024);
                run_block();
            }
}

}  // namespace emulate
