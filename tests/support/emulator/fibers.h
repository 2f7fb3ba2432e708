// A part of emulator.h: the fibers that run a block's threads, and their orders.
#pragma once
#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// All static: two libraries in one process (with and without a seeded fault) share no state.
namespace emulator {

enum State { READY, BARRIER, EXCHANGE, DONE };
constexpr int WARP = 32;
constexpr size_t STACK = 1 << 17;

struct Fiber {
    dim3 thread;
    State state = READY;
    unsigned index = 0;
    uint64_t value = 0;  // its operand of a shuffle
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    void* fake_stack = nullptr;
};

struct Launch {
    void (*kernel)(const void*) = nullptr;
    const void* args = nullptr;
    dim3 grid, block, at;  // `at`: the running block
    std::vector<Fiber> fibers;
    std::vector<std::vector<uint64_t>> exchanged;  // one list a warp
    int any = 0, any_before = 0;                   // of __syncthreads_or
    std::map<const void*, std::vector<unsigned char>*> shared;
    Fiber* current = nullptr;
    Fiber scheduler;
    uint64_t random = 1;
};

static Launch launch;
static std::string error;
static sigjmp_buf escape;
static std::vector<char*> stacks;

[[noreturn]] static void fail(const std::string& text) {
    error = text;
    siglongjmp(escape, 1);
}
static std::string name_of(const Fiber& fiber) {
    const dim3 at = launch.at;
    return "thread " + std::to_string(fiber.index) + " of block (" + std::to_string(at.x) + ", " +
           std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

// -------------------------------------------------------------------------------------- switching
#if defined(__x86_64__)
extern "C" void sokd_emulator_switch(void** from, void* to);
asm(R"(
.text
.type sokd_emulator_switch, @function
sokd_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#endif

static void switch_to(Fiber& from, Fiber& to, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
    const bool starts = &to != &launch.scheduler;
    static const void* home = nullptr;
    static size_t home_size = 0;
    const void* bottom = starts ? stacks[to.index] : home;
    const size_t room = starts ? STACK : home_size;
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, bottom, room);
#endif
    (void)ends;
#if defined(__x86_64__)
    sokd_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void* old = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(from.fake_stack, &old, &size);
    if (&from != &launch.scheduler && home == nullptr) home = old, home_size = size;
#endif
}

static void wait(State state) {
    Fiber& self = *launch.current;
    self.state = state;
    switch_to(self, launch.scheduler);
}

static void body() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    launch.kernel(launch.args);
    Fiber& self = *launch.current;
    self.state = DONE;
    switch_to(self, launch.scheduler, true);
    abort();
}

static void start(Fiber& fiber, char* stack) {
#if defined(__SANITIZE_ADDRESS__)
    // The last fiber on this stack never returned from its frames.
    __asan_unpoison_memory_region(stack, STACK);
#endif
#if defined(__x86_64__)
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + STACK) & ~uintptr_t(15);
    void** at = reinterpret_cast<void**>(top) - 1;
    *at-- = nullptr;                       // where body would return to
    *at = reinterpret_cast<void*>(&body);  // where the first switch returns to
    at -= 6;                               // six saved registers
    std::memset(at, 0, 6 * sizeof(void*));
    fiber.stack_pointer = at;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
#endif
}

// -------------------------------------------------------------------------------------- one block
static uint64_t next_random() {
    uint64_t& x = launch.random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

static void shuffle(std::vector<unsigned>& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
}

// 0 ascending, 1 descending, 2 at random, 3 at random with each warp run as far as possible.
static std::vector<unsigned> order_of(unsigned count, int schedule) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule == 1) std::vector<unsigned>(order.rbegin(), order.rend()).swap(order);
    if (schedule >= 2) shuffle(order);
    return order;
}

// Resumes a warp whose lanes have all reached a shuffle.
static bool release_warp(size_t first) {
    auto& fibers = launch.fibers;
    const size_t last = std::min(fibers.size(), first + WARP);
    for (size_t i = first; i < last; i++) {
        if (fibers[i].state != EXCHANGE) return false;
    }
    auto& values = launch.exchanged[first / WARP];
    for (size_t i = first; i < last; i++) {
        values[i - first] = fibers[i].value, fibers[i].state = READY;
    }
    return true;
}

// Resumes all such warps, or the block if all its threads have reached the barrier.
static bool release() {
    auto& fibers = launch.fibers;
    bool released = false;
    for (size_t first = 0; first < fibers.size(); first += WARP) {
        released |= release_warp(first);
    }
    if (released) return true;
    for (const Fiber& fiber : fibers) {
        if (fiber.state != BARRIER) return false;
    }
    launch.any_before = launch.any, launch.any = 0;
    for (Fiber& fiber : fibers) fiber.state = READY;
    return true;
}

static void explain_stop() {
    const char* names[] = {"runs", "waits at a barrier", "waits in a shuffle", "has ended"};
    const Fiber* waits = nullptr;
    for (const Fiber& fiber : launch.fibers) {
        if (fiber.state != DONE && waits == nullptr) waits = &fiber;
    }
    for (const Fiber& fiber : launch.fibers) {
        if (fiber.state == waits->state) continue;
        fail(name_of(*waits) + " " + names[waits->state] + ", " + name_of(fiber) + " " +
             names[fiber.state]);
    }
    fail(name_of(*waits) + " " + names[waits->state] + " that is not complete");
}

static unsigned resume(unsigned i) {
    Fiber& fiber = launch.fibers[i];
    if (fiber.state != READY) return 0;
    launch.current = &fiber;
    switch_to(launch.scheduler, fiber);
    return 1;
}

// Every thread once, in this order; or warp after warp, each until it waits for its block.
static unsigned run_round(const std::vector<unsigned>& order, int schedule) {
    unsigned ran = 0;
    for (unsigned i : order) {
        ran += resume(i);
        const unsigned first = i / WARP * WARP;
        const unsigned last = std::min((unsigned)launch.fibers.size(), first + WARP);
        while (schedule == 3) {
            for (unsigned lane = first; lane < last; lane++) ran += resume(lane);
            if (!release_warp(first)) break;
        }
    }
    return ran;
}

static void run_block(int schedule) {
    auto& fibers = launch.fibers;
    for (auto& entry : launch.shared) delete entry.second;
    launch.shared.clear();
    launch.any = launch.any_before = 0;
    for (unsigned i = 0; i < fibers.size(); i++) {
        fibers[i].state = READY;
        start(fibers[i], stacks[i]);
    }
    auto order = order_of((unsigned)fibers.size(), schedule);
    for (;;) {
        const unsigned ran = run_round(order, schedule);
        const auto done = [](const Fiber& fiber) { return fiber.state == DONE; };
        if (std::all_of(fibers.begin(), fibers.end(), done)) return;
        if (!release() && ran == 0) explain_stop();
        if (schedule >= 2) shuffle(order);
    }
}
}  // namespace emulator
