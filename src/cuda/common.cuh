// What all kernels share: the argument structures, dtypes, vector memory access, sums.
//
// How a kernel.cu is compiled (by NVRTC at run time, and by a C++ compiler for the emulator in
// tests/support/emulator):
//   headers   common.cuh, philox.cuh and sampling.cuh, under these names; nothing else is included
//   options   --std=c++17 --fmad=false --gpu-architecture=sm_XX -default-device
//             (fused multiply-adds are written out, so the bits do not depend on the compiler)
//   choice    -DSOKD_DTYPES=.. (1 f32, 2 f16, 4 bf16, 8 f64), -DSOKD_ORDERS=.. (1 planes, 2 lanes),
//             -DSOKD_KERNELS=.. (see each kernel.cu): one bit each gives the shortest compilation;
//             all bits are the default
//   entries   {kernel}_{f32|f16|bf16|f64}_{planes|lanes}, extern "C", one structure by value,
//             no static launch attributes
// Launch: 256 threads a block, one dimension; no dynamic shared memory; blocks in x unless stated
// otherwise; a grid of 0 blocks is not launched.
// Every field of every structure is 8 bytes wide: pointers as unsigned long long, numbers as
// long long or double. Strides count elements.
//
// Orders of work, by the output's memory (by the first input's where there is no output map):
//   planes    threads follow the positions of a plane: the output is contiguous [B, C, H, W]
//   lanes     threads follow the channels of a position: the output is channels_last (and not
//             contiguous, too)
// Both take inputs of any strides. `wide` = 1 allows 128-bit access on every map of the call; it is
// set only if
//   planes    every map is contiguous, and P = H*W is a multiple of E = max(4, 16 / size)
//             (f32 4, f16 and bf16 8, f64 4)
//   lanes     every map is channels_last, and C is a multiple of E
//   and every map's pointer is a multiple of 16.
// Geometry, the same for all kernels that take a Grid (size = bytes of an element):
//   planes    positions_per_block = clamp(next_power_of_two(P), 32, 256)
//             lane_bits = log2(positions_per_block)
//             channels_per_block = 4096 / positions_per_block, or 8192 / positions_per_block if
//             B*C*P >= 2^23 (never so for refine_dots)
//   lanes     channels_per_block = min(C, 128)
//             lanes = max(4, next_power_of_two(ceil(channels_per_block / E)))
//             lane_bits = log2(lanes)
//             positions_per_block = 1024 / lanes
//   tiles = ceil(P / positions_per_block)
//   chunks = ceil(C / channels_per_block)
//   blocks = B * chunks * tiles
// Block i works on tile i % tiles, chunk i / tiles % chunks, sample i / tiles / chunks. blocks, C
// and P are below 2^31.
#pragma once

// A map [B, C, H, W]: its address (0: absent) and its strides.
struct Map {
    unsigned long long pointer;
    long long n, c, y, x;
};

// A part of a plan, of any dtype that the checks accept. `group` is 0 if the part has one
// group for all samples.
//   theta: a = stride of the rows, b = of the columns;  hole: a = of the four numbers
//   perm, keep: a = of the channels;  sigma: no further stride
struct Part {
    unsigned long long pointer;  // 0: absent
    long long dtype;             // a DType below
    long long plan;              // stride of the leading V (refine_dots alone; else 0)
    long long group;
    long long a, b;
};

// A gradient [G, ..].
struct Out {
    unsigned long long pointer;  // 0: absent
    long long dtype;             // of the float dtypes
    long long groups;            // G: 1, or the batch
    long long group, a, b;       // strides as in Part
};

// Sizes of a map, and its tiles and chunks (see above).
struct Grid {
    long long batch, channels, height, width;
    long long positions_per_block, channels_per_block, lane_bits, tiles, chunks;
};

enum DType {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
    F64 = 3,
    I64 = 4,
    I32 = 5,
    I16 = 6,
    I8 = 7,
    U8 = 8,
    BOOL = 9
};

// ------------------------------------------------------------------------------------- compilation
#ifndef SOKD_DTYPES
#define SOKD_DTYPES 15
#endif
#ifndef SOKD_ORDERS
#define SOKD_ORDERS 3
#endif
#ifndef SOKD_KERNELS
#define SOKD_KERNELS 63
#endif

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PLANES = 0, LANES = 1;

#ifndef SOKD_EMULATOR
#define SOKD_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define SOKD_REGISTER(name, Args)
#endif
#define SOKD_DEVICE __device__ __forceinline__

// Four blocks of 256 threads on a multiprocessor: 64 registers each, which is half of the occupancy
// of the largest ones. For doubles, which serve to check gradients, two blocks: 128 registers.
#define SOKD_ENTRY_OF(name, Args, BLOCKS, ...)              \
    extern "C" __global__ void                              \
    __launch_bounds__(THREADS, BLOCKS)                      \
    name(const __grid_constant__ Args args) {               \
        __VA_ARGS__(args);                                  \
    }                                                       \
    SOKD_REGISTER(name, Args)
#define SOKD_ENTRY(name, Args, ...) SOKD_ENTRY_OF(name, Args, 4, __VA_ARGS__)

#if SOKD_ORDERS & 1
#define SOKD_IN_PLANES(name, Args, function, T) \
    SOKD_ENTRY_OF(name##_planes, Args, sizeof(T) == 8 ? 2 : 4, function<T, PLANES>)
#else
#define SOKD_IN_PLANES(...)
#endif
#if SOKD_ORDERS & 2
#define SOKD_IN_LANES(name, Args, function, T) \
    SOKD_ENTRY_OF(name##_lanes, Args, sizeof(T) == 8 ? 2 : 4, function<T, LANES>)
#else
#define SOKD_IN_LANES(...)
#endif
#define SOKD_IN_ORDERS(name, Args, function, T) \
    SOKD_IN_PLANES(name, Args, function, T)     \
    SOKD_IN_LANES(name, Args, function, T)
#if SOKD_DTYPES & 1
#define SOKD_IF_F32(...) __VA_ARGS__
#else
#define SOKD_IF_F32(...)
#endif
#if SOKD_DTYPES & 2
#define SOKD_IF_F16(...) __VA_ARGS__
#else
#define SOKD_IF_F16(...)
#endif
#if SOKD_DTYPES & 4
#define SOKD_IF_BF16(...) __VA_ARGS__
#else
#define SOKD_IF_BF16(...)
#endif
#if SOKD_DTYPES & 8
#define SOKD_IF_F64(...) __VA_ARGS__
#else
#define SOKD_IF_F64(...)
#endif
// One entry for each selected dtype and order.
#define SOKD_ENTRIES(name, Args, function)                        \
    SOKD_IF_F32(SOKD_IN_ORDERS(name##_f32, Args, function, float))   \
    SOKD_IF_F16(SOKD_IN_ORDERS(name##_f16, Args, function, Half))    \
    SOKD_IF_BF16(SOKD_IN_ORDERS(name##_bf16, Args, function, BFloat)) \
    SOKD_IF_F64(SOKD_IN_ORDERS(name##_f64, Args, function, double))

// ------------------------------------------------------------------------------------------ dtypes
struct Half {
    unsigned short bits;
};
struct BFloat {
    unsigned short bits;
};

// The accumulator dtype.
template <class T>
struct Real {
    using type = float;
};
template <>
struct Real<double> {
    using type = double;
};
template <class T>
using Acc = typename Real<T>::type;

SOKD_DEVICE float to_acc(float value) { return value; }
SOKD_DEVICE double to_acc(double value) { return value; }
SOKD_DEVICE float to_acc(BFloat value) { return __uint_as_float((unsigned)value.bits << 16); }
SOKD_DEVICE float to_acc(Half value) {
#ifdef SOKD_EMULATOR
    return emulator::half_to_float(value.bits);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#endif
}

SOKD_DEVICE void from_acc(float value, float& out) { out = value; }
SOKD_DEVICE void from_acc(double value, double& out) { out = value; }
// By integers: the instruction exists from sm_80 on.
SOKD_DEVICE void from_acc(float value, BFloat& out) {
    const unsigned bits = __float_as_uint(value);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = (unsigned short)(value != value ? (bits >> 16) | 0x40u : rounded);
}
SOKD_DEVICE void from_acc(float value, Half& out) {
#ifdef SOKD_EMULATOR
    out.bits = emulator::float_to_half(value);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#endif
}

SOKD_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
SOKD_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
SOKD_DEVICE float root(float value) { return sqrtf(value); }
SOKD_DEVICE double root(double value) { return sqrt(value); }

// A number of any dtype at an offset in elements.
template <class T>
SOKD_DEVICE T load(unsigned long long pointer, long long offset) {
    return ((const T*)pointer)[offset];
}
SOKD_DEVICE double load_real(unsigned long long pointer, long long dtype, long long offset) {
    if (dtype == F32) return load<float>(pointer, offset);
    if (dtype == F64) return load<double>(pointer, offset);
    if (dtype == F16) return to_acc(load<Half>(pointer, offset));
    return to_acc(load<BFloat>(pointer, offset));
}
SOKD_DEVICE long long load_int(unsigned long long pointer, long long dtype, long long offset) {
    if (dtype == I64) return load<long long>(pointer, offset);
    if (dtype == I32) return load<int>(pointer, offset);
    if (dtype == I16) return load<short>(pointer, offset);
    if (dtype == I8) return load<signed char>(pointer, offset);
    return load<unsigned char>(pointer, offset);
}
SOKD_DEVICE void store_real(
    unsigned long long pointer, long long dtype, long long offset, double value) {
    if (dtype == F32) ((float*)pointer)[offset] = (float)value;
    else if (dtype == F64) ((double*)pointer)[offset] = value;
    else if (dtype == F16) from_acc((float)value, ((Half*)pointer)[offset]);
    else from_acc((float)value, ((BFloat*)pointer)[offset]);
}

// ---------------------------------------------------------------------------------- 128-bit access
struct Pack {
    unsigned w[4];
};
template <class T>
constexpr int WIDTH = 16 / sizeof(T);

// Inputs are never written by the kernel that reads them, so the read-only path holds; the compiler
// may move these loads freely.
SOKD_DEVICE Pack load_pack(const void* from) {
    Pack pack;
#ifdef SOKD_EMULATOR
    emulator::check_aligned(from);
    pack = *(const Pack*)from;
#else
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(pack.w[0]), "=r"(pack.w[1]), "=r"(pack.w[2]), "=r"(pack.w[3])
        : "l"(from));
#endif
    return pack;
}
// From memory that the same kernel writes.
SOKD_DEVICE Pack load_own_pack(const void* from) {
    Pack pack;
#ifdef SOKD_EMULATOR
    emulator::check_aligned(from);
    pack = *(const Pack*)from;
#else
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.w[0]), "=r"(pack.w[1]), "=r"(pack.w[2]), "=r"(pack.w[3])
                 : "l"(from));
#endif
    return pack;
}
SOKD_DEVICE void store_pack(void* to, const Pack& pack) {
#ifdef SOKD_EMULATOR
    emulator::check_aligned(to);
    *(Pack*)to = pack;
#else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pack.w[0]),
        "r"(pack.w[1]), "r"(pack.w[2]), "r"(pack.w[3])
        : "memory");
#endif
}

// Element i of a pack; i is known at compile time wherever it matters.
template <class T>
SOKD_DEVICE Acc<T> element(const Pack& pack, int i) {
    if constexpr (sizeof(T) == 4) {
        return __uint_as_float(pack.w[i]);
    } else if constexpr (sizeof(T) == 8) {
        return __hiloint2double((int)pack.w[2 * i + 1], (int)pack.w[2 * i]);
    } else {
        return to_acc(T{(unsigned short)(pack.w[i / 2] >> (i % 2 * 16))});
    }
}
template <class T>
SOKD_DEVICE void set_element(Pack& pack, int i, Acc<T> value) {
    if constexpr (sizeof(T) == 4) {
        pack.w[i] = __float_as_uint(value);
    } else if constexpr (sizeof(T) == 8) {
        pack.w[2 * i] = (unsigned)__double2loint(value);
        pack.w[2 * i + 1] = (unsigned)__double2hiint(value);
    } else {
        T narrow;
        from_acc(value, narrow);
        const unsigned keep = i % 2 ? 0x0000ffffu : 0xffff0000u;
        pack.w[i / 2] = (pack.w[i / 2] & keep) | ((unsigned)narrow.bits << (i % 2 * 16));
    }
}

// What a thread holds at a time: E consecutive elements (at least four, as noise is drawn in
// fours).
template <class T>
constexpr int RUN = WIDTH<T> < 4 ? 4 : WIDTH<T>;
template <class T>
struct Run {
    static constexpr int V = WIDTH<T>, PACKS = RUN<T> / V;
    Pack packs[PACKS];
    SOKD_DEVICE Acc<T> at(int i) const { return element<T>(packs[i / V], i % V); }
    SOKD_DEVICE void set(int i, Acc<T> value) { set_element<T>(packs[i / V], i % V, value); }
    SOKD_DEVICE void read(const T* from) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) packs[p] = load_pack(from + p * V);
    }
    SOKD_DEVICE void read_own(const T* from) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) packs[p] = load_own_pack(from + p * V);
    }
    SOKD_DEVICE void write(T* to) const {
#pragma unroll
        for (int p = 0; p < PACKS; p++) store_pack(to + p * V, packs[p]);
    }
};

// -------------------------------------------------------------------------------- tiles of a block
// The tile of a map that a block works on: positions, and the channels of a chunk.
struct Tile {
    long long n;
    int channel, channels;        // from, up to
    unsigned position, positions;  // from, up to
};
SOKD_DEVICE Tile tile_of(const Grid& grid) {
    const unsigned tiles = (unsigned)grid.tiles, chunks = (unsigned)grid.chunks;
    const unsigned index = blockIdx.x % tiles, rest = blockIdx.x / tiles, chunk = rest % chunks;
    Tile tile;
    tile.n = rest / chunks;
    tile.channel = (int)(chunk * grid.channels_per_block);
    tile.channels = (int)(grid.channels - tile.channel < grid.channels_per_block
                               ? grid.channels
                               : tile.channel + grid.channels_per_block);
    const long long first = index * grid.positions_per_block, all = grid.height * grid.width;
    tile.position = (unsigned)first;
    tile.positions =
        (unsigned)(all - first < grid.positions_per_block ? all : first + grid.positions_per_block);
    return tile;
}

// Lanes: four adjacent threads hold the four positions of a quad; runs of channels come next, then
// further quads. A thread advances by `step` positions, four times in all.
struct Spot {
    int channel;        // of its run's first element; past the tile's end for idle threads
    unsigned position;  // the first of its four
    unsigned step;
};
template <class T>
SOKD_DEVICE Spot spot_of(const Grid& grid, const Tile& tile) {
    const unsigned lane = (threadIdx.x >> 2) & ((1u << grid.lane_bits) - 1),
                   slot = threadIdx.x >> (2 + grid.lane_bits);
    return {tile.channel + (int)lane * RUN<T>, tile.position + slot * 4 + (threadIdx.x & 3),
        (unsigned)grid.positions_per_block / 4};
}

template <class T>
SOKD_DEVICE T* sample_of(const Map& map, long long n) {
    return (T*)map.pointer + n * map.n;
}
// Where a position lies within a plane.
SOKD_DEVICE long long place(const Map& map, unsigned position, unsigned width) {
    return (long long)(position / width) * map.y + (long long)(position % width) * map.x;
}

// -------------------------------------------------------------------------------------------- sums
// Always the same tree, so the same bits on every run.
template <class A>
SOKD_DEVICE A warp_sum(A value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// The block's sum, in thread 0, of the first lane of every warp. `room` is shared; a
// barrier must lie between two uses.
SOKD_DEVICE double block_total(double of_warp, double (&room)[WARPS]) {
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = of_warp;
    __syncthreads();
    double sum = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < WARPS; i++) sum += room[i];
    }
    return sum;
}

// The block's sum of count numbers, in thread 0.
SOKD_DEVICE double sum_of(const double* values, long long count, double (&room)[WARPS]) {
    double sum = 0;
    for (long long i = threadIdx.x; i < count; i += THREADS) sum += values[i];
    return block_total(warp_sum(sum), room);
}

// Eight sums of a warp by nine exchanges: each half of the lanes keeps half of the numbers.
// Every lane gets that of number (lane / 4).
template <class A>
SOKD_DEVICE A warp_sums(A (&values)[8]) {
#pragma unroll
    for (int count = 4, step = 16; count > 0; count /= 2, step /= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < count; i++) {
            const A other = __shfl_xor_sync(
                0xffffffffu, upper ? values[i] : values[i + count], step);
            values[i] = (upper ? values[i + count] : values[i]) + other;
        }
    }
    A sum = values[0];
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum;
}
