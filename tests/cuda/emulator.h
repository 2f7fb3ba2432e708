// Runs a kernel.cu on the CPU: the same source, compiled as C++ with this file included first (-include).
//
// Every CUDA thread is a fiber; a barrier and a warp's exchange are where a fiber waits. Blocks run one after the other. Threads run until
// they wait, in an order that the schedule says, so that what only one order hides (a missing barrier) shows under another.
// Shared memory is fresh and full of NaN (all bits set) for every block. Told as errors: a barrier or an exchange that some threads never
// reach, an access outside mapped memory, a 128-bit access that is not aligned, an argument structure of another size.
#pragma once
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>
#include <cmath>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define SOKD_EMULATOR 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Everything is static: two libraries in one process (a kernel and its mutant) must not share a word.
namespace emulator {

enum State { READY, BARRIER, EXCHANGE, DONE };
constexpr int WARP = 32;
constexpr size_t STACK = 1 << 17;

struct Fiber {
    dim3 thread;
    State state = READY;
    unsigned index = 0;
    uint64_t value = 0;  // what it brings to an exchange
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
    return "thread " + std::to_string(fiber.index) + " of block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
           std::to_string(at.z) + ")";
}

// ------------------------------------------------------------------------------------------------------------------- switching
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
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, bottom, starts ? STACK : home_size);
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
    __asan_unpoison_memory_region(stack, STACK);  // the last fiber here never returned from its frames
#endif
#if defined(__x86_64__)
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + STACK) & ~uintptr_t(15);
    void** at = reinterpret_cast<void**>(top) - 1;
    *at-- = nullptr;                          // where body would return to
    *at = reinterpret_cast<void*>(&body);     // where the first switch returns to
    at -= 6;                                  // six saved registers
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

// ------------------------------------------------------------------------------------------------------------------ one block
static uint64_t next_random() {
    uint64_t& x = launch.random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

static void shuffle(std::vector<unsigned>& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
}

// 0 ascending, 1 descending, 2 at random, 3 a warp as far as it goes before the next, at random.
static std::vector<unsigned> order_of(unsigned count, int schedule) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule == 1) std::vector<unsigned>(order.rbegin(), order.rend()).swap(order);
    if (schedule >= 2) shuffle(order);
    return order;
}

// Lets a warp go on whose lanes have all come to an exchange.
static bool release_warp(size_t first) {
    auto& fibers = launch.fibers;
    const size_t last = std::min(fibers.size(), first + WARP);
    for (size_t i = first; i < last; i++) {
        if (fibers[i].state != EXCHANGE) return false;
    }
    auto& values = launch.exchanged[first / WARP];
    for (size_t i = first; i < last; i++) values[i - first] = fibers[i].value, fibers[i].state = READY;
    return true;
}

// Lets all such warps go on, or the block, if all its threads have come to the barrier.
static bool release() {
    auto& fibers = launch.fibers;
    bool released = false;
    for (size_t first = 0; first < fibers.size(); first += WARP) released |= release_warp(first);
    if (released) return true;
    for (const Fiber& fiber : fibers) {
        if (fiber.state != BARRIER) return false;
    }
    launch.any_before = launch.any, launch.any = 0;
    for (Fiber& fiber : fibers) fiber.state = READY;
    return true;
}

static void explain_stop() {
    const char* names[] = {"runs", "waits at a barrier", "waits in an exchange of its warp", "has ended"};
    const Fiber* waits = nullptr;
    for (const Fiber& fiber : launch.fibers) {
        if (fiber.state != DONE && waits == nullptr) waits = &fiber;
    }
    for (const Fiber& fiber : launch.fibers) {
        if (fiber.state != waits->state) fail(name_of(*waits) + " " + names[waits->state] + ", " + name_of(fiber) + " " + names[fiber.state]);
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

// Every thread once, in this order; or warp after warp, each until it waits for the block.
static unsigned run_round(const std::vector<unsigned>& order, int schedule) {
    unsigned ran = 0;
    for (unsigned i : order) {
        ran += resume(i);
        const unsigned first = i / WARP * WARP, last = std::min((unsigned)launch.fibers.size(), first + WARP);
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
        if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == DONE; })) return;
        if (!release() && ran == 0) explain_stop();
        if (schedule >= 2) shuffle(order);
    }
}

// ------------------------------------------------------------------------------------------------------------ what kernels call
template <class T>
static T& shared(const void* key) {
    auto& memory = launch.shared[key];
    if (memory == nullptr) memory = new std::vector<unsigned char>(sizeof(T) + 16, (unsigned char)0xff);
    auto at = (reinterpret_cast<uintptr_t>(memory->data()) + 15) & ~uintptr_t(15);
    return *reinterpret_cast<T*>(at);
}

static void check_aligned(const void* pointer) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) fail(name_of(*launch.current) + ": a 128-bit access is not aligned");
}

template <class T>
static T exchange(T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "one 64-bit word");
    Fiber& self = *launch.current;
    std::memcpy(&self.value, &value, sizeof(T));
    wait(EXCHANGE);
    std::memcpy(&value, &launch.exchanged[self.index / WARP][from % WARP], sizeof(T));
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
static float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
    const float magnitude = exponent ? std::ldexp((float)(mantissa | 1024), (int)exponent - 25) : std::ldexp((float)mantissa, -24);
    return sign ? -magnitude : magnitude;
}
static uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    if (value != value) return (uint16_t)(sign | 0x7e00);
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return (uint16_t)(sign | 0x7c00);
    int exponent;
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent - 11, -24);  // of the last place
    const auto places = (uint32_t)std::nearbyint(std::ldexp(magnitude, -exponent));
    // A carry into the next exponent, and subnormals, come out right: the fields are one number.
    return (uint16_t)(sign | (places == 0 ? 0 : exponent == -24 ? places : places + ((uint32_t)(exponent + 24) << 10)));
}

// -------------------------------------------------------------------------------------------------------------------- launching
struct Kernel {
    size_t bytes;
    void (*run)(const void*);
};
static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}
struct Registered {
    Registered(const char* name, size_t bytes, void (*run)(const void*)) { kernels()[name] = {bytes, run}; }
};

static void on_signal(int, siginfo_t* info, void*) {
    char text[32];
    std::snprintf(text, sizeof(text), "%p", info->si_addr);
    error = name_of(*launch.current) + ": an access to memory that is not there, at " + text;
    siglongjmp(escape, 1);
}

// Invalid accesses become errors while a launch runs.
struct Signals {
    struct sigaction before[2];
    stack_t stack_before;
    std::vector<char> stack = std::vector<char>(1 << 16);
    Signals() {
        stack_t own{};
        own.ss_sp = stack.data(), own.ss_size = stack.size();
        sigaltstack(&own, &stack_before);
        struct sigaction action {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &before[0]);
        sigaction(SIGBUS, &action, &before[1]);
    }
    ~Signals() {
        sigaction(SIGSEGV, &before[0], nullptr);
        sigaction(SIGBUS, &before[1], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

static void run_grid(int schedule) {
    const dim3 grid = launch.grid;
    const auto blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (unsigned i : order_of((unsigned)blocks, schedule)) {
        launch.at = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        run_block(schedule);
    }
}

static void make_fibers(dim3 block) {
    const unsigned threads = block.x * block.y * block.z;
    launch.fibers.assign(threads, Fiber());
    launch.exchanged.assign((threads + WARP - 1) / WARP, std::vector<uint64_t>(WARP, 0));
    for (unsigned i = 0; i < threads; i++) {
        launch.fibers[i].index = i;
        launch.fibers[i].thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    }
    while (stacks.size() < threads) stacks.push_back(static_cast<char*>(std::aligned_alloc(64, STACK)));
}

static int run(const Kernel& kernel, dim3 grid, dim3 block, const void* args, int schedule, uint64_t seed) {
#if !defined(__SANITIZE_ADDRESS__)
    Signals signals;
#endif
    launch.kernel = kernel.run, launch.args = args, launch.grid = grid, launch.block = block;
    launch.random = seed * 2 + 1;
    make_fibers(block);
    if (sigsetjmp(escape, 1) != 0) {
#if defined(__SANITIZE_ADDRESS__)
        for (char* stack : stacks) __asan_unpoison_memory_region(stack, STACK);
#endif
        return 1;
    }
    run_grid(schedule);
    return 0;
}

}  // namespace emulator

// The functions that a driver of this library calls. 0: it ran. 1: an error, see sokd_emulator_error(). `bytes` 0: not checked.
extern "C" int sokd_emulator_launch(const char* name, const unsigned grid[3], const unsigned block[3], const void* args, uint64_t bytes,
                                    int schedule, uint64_t seed) {
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> hold(one_at_a_time);
    const auto found = emulator::kernels().find(name);
    if (found == emulator::kernels().end()) return emulator::error = std::string("no kernel ") + name, 1;
    const emulator::Kernel kernel = found->second;
    if (bytes != 0 && bytes != kernel.bytes) {
        emulator::error = std::string(name) + " takes " + std::to_string(kernel.bytes) + " bytes, got " + std::to_string(bytes);
        return 1;
    }
    // A copy: the kernel's argument is constant memory, whatever the caller does meanwhile.
    const std::vector<uint64_t> copy((const uint64_t*)args, (const uint64_t*)args + kernel.bytes / 8);
    return emulator::run(kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, copy.data(), schedule, seed);
}
extern "C" const char* sokd_emulator_error() { return emulator::error.c_str(); }
// The bytes of a kernel's argument; 0: there is no such kernel.
extern "C" uint64_t sokd_emulator_bytes(const char* name) {
    const auto found = emulator::kernels().find(name);
    return found == emulator::kernels().end() ? 0 : found->second.bytes;
}
// The number of kernels, and the name of each.
extern "C" uint64_t sokd_emulator_count() { return emulator::kernels().size(); }
extern "C" const char* sokd_emulator_name(uint64_t i) { return std::next(emulator::kernels().begin(), (long)i)->first.c_str(); }

#define SOKD_REGISTER(name, Args) \
    static const emulator::Registered registered_##name(#name, sizeof(Args), [](const void* args) { name(*(const Args*)args); });
#define SOKD_SHARED(type, name, ...)         \
    typedef type name##_type __VA_ARGS__;    \
    static const char name##_key = 0;        \
    name##_type& name = emulator::shared<name##_type>(&name##_key)

#define threadIdx (emulator::launch.current->thread)
#define blockIdx (emulator::launch.at)
#define blockDim (emulator::launch.block)
#define gridDim (emulator::launch.grid)

static void __syncthreads() { emulator::wait(emulator::BARRIER); }
static int __syncthreads_or(int predicate) {
    emulator::launch.any |= predicate != 0;
    emulator::wait(emulator::BARRIER);
    return emulator::launch.any_before;
}
template <class T>
static T __shfl_xor_sync(unsigned, T value, int lanes) {
    return emulator::exchange(value, emulator::launch.current->index ^ (unsigned)lanes);
}
template <class T>
static T __shfl_sync(unsigned, T value, int lane) {
    return emulator::exchange(value, (unsigned)lane);
}
static int atomicAdd(int* at, int value) {
    const int before = *at;
    *at += value;
    return before;
}
inline float __uint_as_float(unsigned bits) { return emulator::float_of(bits); }
inline unsigned __float_as_uint(float value) { return emulator::bits_of(value); }
inline double __hiloint2double(int high, int low) {
    const uint64_t bits = (uint64_t)(uint32_t)high << 32 | (uint32_t)low;
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
}
inline int __double2loint(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    return (int)(uint32_t)bits;
}
inline int __double2hiint(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    return (int)(uint32_t)(bits >> 32);
}
