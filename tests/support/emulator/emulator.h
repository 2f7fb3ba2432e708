// Runs a kernel.cu on the CPU: the same source, compiled as C++ with this file included first.
//
// Each CUDA thread is a fiber, which waits at barriers and warp shuffles. Blocks run one after the
// other. Within a block, threads run until they wait, in the order of the schedule: a missing
// barrier that one order hides shows under another. Shared memory is new for every block, with all
// bits set (NaN). Errors: a barrier or shuffle that some threads never reach, an access to unmapped
// memory, a 128-bit access that is not aligned.
#pragma once
#include "fibers.h"
#include <cmath>
#include <csignal>
#include <mutex>

#define SOKD_EMULATOR 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulator {
// --------------------------------------------------------------------------- called by kernels
template <class T>
static T& shared(const void* key) {
    auto& memory = launch.shared[key];
    if (memory == nullptr) memory = new std::vector<unsigned char>(sizeof(T) + 16, 0xff);
    auto at = (reinterpret_cast<uintptr_t>(memory->data()) + 15) & ~uintptr_t(15);
    return *reinterpret_cast<T*>(at);
}

static void check_aligned(const void* pointer) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 == 0) return;
    fail(name_of(*launch.current) + ": a 128-bit access is not aligned");
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
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
    const float magnitude = exponent ? std::ldexp((float)(mantissa | 1024), (int)exponent - 25)
                                     : std::ldexp((float)mantissa, -24);
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
    if (places == 0 || exponent == -24) return (uint16_t)(sign | places);
    // The fields form one number, so a carry into the next exponent needs no special case.
    return (uint16_t)(sign | (places + ((uint32_t)(exponent + 24) << 10)));
}

// ----------------------------------------------------------------------------------- launching
struct Kernel {
    size_t bytes;
    void (*run)(const void*);
    void (*set_blocks)(void*, unsigned);
};
static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

// The number of blocks also stands in the argument structure of some kernels.
template <class Args>
auto set_blocks(Args& args, unsigned blocks, int) -> decltype(void(args.blocks)) {
    args.blocks = blocks;
}
template <class Args>
void set_blocks(Args&, unsigned, long) {}

template <class Args, void (*entry)(Args)>
struct Registered {
    explicit Registered(const char* name) {
        kernels()[name] = {
            sizeof(Args), [](const void* args) { entry(*(const Args*)args); },
            [](void* args, unsigned blocks) { set_blocks(*(Args*)args, blocks, 0); }};
    }
};

static void on_signal(int, siginfo_t* info, void*) {
    char text[32];
    std::snprintf(text, sizeof(text), "%p", info->si_addr);
    error = name_of(*launch.current) + ": an access to memory that is not mapped, at " + text;
    siglongjmp(escape, 1);
}

// Turns invalid accesses into errors while a launch runs.
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

// Defined where traffic.cpp is linked to the kernels.
extern "C" __attribute__((weak)) void sokd_traffic_block();

static void run_grid(int schedule) {
    const dim3 grid = launch.grid;
    const auto blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (unsigned i : order_of((unsigned)blocks, schedule)) {
        launch.at = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        if (sokd_traffic_block != nullptr) sokd_traffic_block();
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
    while (stacks.size() < threads) {
        stacks.push_back(static_cast<char*>(std::aligned_alloc(64, STACK)));
    }
}

static int run(const Kernel& kernel, dim3 grid, dim3 block, const void* args, int schedule,
               uint64_t seed) {
#if !defined(__SANITIZE_ADDRESS__)
    Signals signals;
#endif
    launch.kernel = kernel.run, launch.args = args;
    launch.grid = grid, launch.block = block;
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

// The interface of the library. Returns 0 if the kernel ran; else see sokd_emulator_error().
// `blocks` replaces the number of blocks, unless it is 0.
extern "C" int sokd_emulator_launch(const char* name, const unsigned grid[3],
                                    const unsigned block[3], const void* args, unsigned blocks,
                                    int schedule, uint64_t seed) {
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> hold(one_at_a_time);
    const emulator::Kernel kernel = emulator::kernels().at(name);
    const auto* first = static_cast<const uint64_t*>(args);
    // As on a device, a copy: the caller may change its structure meanwhile.
    std::vector<uint64_t> copy(first, first + kernel.bytes / 8);
    if (blocks != 0) kernel.set_blocks(copy.data(), blocks);
    const dim3 all = {blocks != 0 ? blocks : grid[0], grid[1], grid[2]};
    const dim3 threads = {block[0], block[1], block[2]};
    return emulator::run(kernel, all, threads, copy.data(), schedule, seed);
}
extern "C" const char* sokd_emulator_error() { return emulator::error.c_str(); }
// The size of a kernel's argument structure; 0: there is no such kernel.
extern "C" uint64_t sokd_emulator_bytes(const char* name) {
    const auto found = emulator::kernels().find(name);
    return found == emulator::kernels().end() ? 0 : found->second.bytes;
}
extern "C" uint64_t sokd_emulator_count() { return emulator::kernels().size(); }
extern "C" const char* sokd_emulator_name(uint64_t i) {
    return std::next(emulator::kernels().begin(), (long)i)->first.c_str();
}

#define SOKD_REGISTER(name, Args) \
    static const emulator::Registered<Args, name> registered_##name(#name);
#define SOKD_SHARED(type, name, ...)        \
    typedef type name##_type __VA_ARGS__;   \
    static const char name##_key = 0;       \
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
