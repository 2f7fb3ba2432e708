// What a plan does to one sample: its parts read once by the block, the noise, and where a position
// samples.
#pragma once
#include "common.cuh"
#include "philox.cuh"

// The parts of a plan, and what goes with them.
struct Plan {
    Part theta, hole, sigma, perm, keep;
    unsigned long long seed_pointer;
    long long seed;
    double width_by_height;  // (double)W / (double)H
    double height_by_width;
};

// ------------------------------------------------------------------------------- one sample's plan
// Shared by the block. An absent part has its neutral value, so later code reads values alone.
constexpr int MOST_CHANNELS = 256;  // of a block, in any Grid
// Negative sources: an entry of perm outside the map, or a dropped channel (-1 less its source).
constexpr int INVALID = -2147483647 - 1, DROPPED = -1;
struct Affine {
    double m[6];    // of x - cx, of y - cy, constant: for ix, then for iy, in pixels
    double cx, cy;  // the map's centre
};
struct SamplePlan {
    Affine affine;
    double sigma;
    int hole[4];  // y0 x0 y1 x1, clipped to the map
    unsigned key[2];
    // Of each channel of the block: its source channel, or a negative number (above).
    int source[MOST_CHANNELS];
};

SOKD_DEVICE long long clipped(long long value, long long side) {
    return value < 0 ? 0 : value > side ? side : value;
}

// Reads plan v of sample n for the channels of the tile; a barrier is inside. Returns whether
// theta is anything but the identity.
SOKD_DEVICE bool read_plan(
    SamplePlan& shared, const Plan& plan, const Grid& grid, const Tile& tile, long long v) {
    const int i = (int)threadIdx.x;
    bool moves = false;
    if (i < 6) {
        const double neutral = i == 0 || i == 4 ? 1.0 : 0.0;
        const Part& part = plan.theta;
        const long long offset = v * part.plan + tile.n * part.group + i / 3 * part.a +
                                 i % 3 * part.b;
        const double value = part.pointer ? load_real(part.pointer, part.dtype, offset) : neutral;
        // In the order of the CPU's own products, so that the coordinates have its bits.
        const double side = (double)(i < 3 ? grid.width : grid.height),
                     aspect = i == 1 ? plan.width_by_height : plan.height_by_width;
        shared.affine.m[i] = i % 3 == 2         ? value * side * 0.5
                             : i == 1 || i == 3 ? value * aspect
                                                : value;
        moves = !(value == neutral);
    } else if (i < 10) {
        const Part& part = plan.hole;
        const long long offset = v * part.plan + tile.n * part.group + (i - 6) * part.a;
        const long long value = part.pointer ? load_int(part.pointer, part.dtype, offset) : 0;
        shared.hole[i - 6] = (int)clipped(value, i % 2 ? grid.width : grid.height);
    } else if (i == 10) {
        const Part& part = plan.sigma;
        shared.sigma = part.pointer ? load_real(part.pointer, part.dtype,
                                          v * part.plan + tile.n * part.group)
                                    : 0.0;
    } else if (i < 13) {
        const unsigned long long seed = plan.seed_pointer
                                            ? load<unsigned long long>(plan.seed_pointer, 0)
                                            : (unsigned long long)plan.seed;
        shared.key[i - 11] = (unsigned)(seed >> (i == 12 ? 32 : 0));
    } else if (i == 13) {
        shared.affine.cx = (double)(grid.width - 1) * 0.5;
        shared.affine.cy = (double)(grid.height - 1) * 0.5;
    }
    const int c = tile.channel + i;
    if (c < tile.channels) {
        long long source = c;
        if (plan.perm.pointer) {
            source = load_int(plan.perm.pointer, plan.perm.dtype,
                v * plan.perm.plan + tile.n * plan.perm.group + c * plan.perm.a);
            if (source < 0 || source >= grid.channels) source = INVALID;
        }
        const Part& keep = plan.keep;
        if (keep.pointer &&
            !load<unsigned char>(keep.pointer, v * keep.plan + tile.n * keep.group + c * keep.a) &&
            source != INVALID) {
            source = DROPPED - source;
        }
        shared.source[i] = (int)source;
    }
    return __syncthreads_or(moves);
}

SOKD_DEVICE bool hole_at(const SamplePlan& plan, int y, int x) {
    return y >= plan.hole[0] && y < plan.hole[2] && x >= plan.hole[1] && x < plan.hole[3];
}
SOKD_DEVICE bool in_hole(const SamplePlan& plan, unsigned position, unsigned width) {
    return hole_at(plan, (int)(position / width), (int)(position % width));
}

SOKD_DEVICE Normals noise_of(
    const SamplePlan& plan, const Grid& grid, long long n, int c, unsigned position) {
    return normals(
        plan.key[0], plan.key[1], (unsigned long long)(n * grid.channels + c), position >> 2);
}

// ---------------------------------------------------------------------------------------- sampling
// Where one position samples: the cell above and to the left, which of the four corners lie within
// the map, and their weights. In f64 up to the fractions: the coordinate's error would otherwise
// grow with the map.
template <class A>
struct Corners {
    int x, y;
    int inside;  // bit dy * 2 + dx
    A right, lower;

    SOKD_DEVICE A weight(int corner) const {
        return (corner & 1 ? right : 1 - right) * (corner & 2 ? lower : 1 - lower);
    }
    SOKD_DEVICE bool has(int corner) const { return inside >> corner & 1; }
};

// The source's column and row of a position.
struct Point {
    double x, y;
};
SOKD_DEVICE Point point_at(const Affine& affine, int row, int column) {
    const double x = (double)column - affine.cx, y = (double)row - affine.cy;
    const double x_of_row = affine.m[1] * y + affine.m[2] + affine.cx,
                 y_of_row = affine.m[4] * y + affine.m[5] + affine.cy;
    return {affine.m[0] * x + x_of_row, affine.m[3] * x + y_of_row};
}

template <class A>
SOKD_DEVICE Corners<A> corners_at(const Affine& affine, const Grid& grid, int row, int column) {
    const Point point = point_at(affine, row, column);
    const double left = floor(point.x), top = floor(point.y);
    Corners<A> corners;
    corners.right = (A)(point.x - left);
    corners.lower = (A)(point.y - top);
    // Compared as floats: a coordinate far outside, or NaN, does not fit an integer.
    const bool near = left >= -1.0 && left < (double)grid.width && top >= -1.0 &&
                      top < (double)grid.height;
    corners.x = near ? (int)left : 0;
    corners.y = near ? (int)top : 0;
    const bool columns[2] = {near && corners.x >= 0, near && corners.x + 1 < grid.width};
    const bool rows[2] = {near && corners.y >= 0, near && corners.y + 1 < grid.height};
    corners.inside = 0;
    for (int i = 0; i < 4; i++) corners.inside |= (columns[i & 1] && rows[i >> 1]) << i;
    return corners;
}
template <class A>
SOKD_DEVICE Corners<A> corners_of(const SamplePlan& plan, const Grid& grid, unsigned position) {
    const unsigned width = (unsigned)grid.width;
    return corners_at<A>(plan.affine, grid, (int)(position / width), (int)(position % width));
}

// A corner's offset within a plane.
template <class A>
SOKD_DEVICE long long corner_place(const Map& map, const Corners<A>& at, int corner) {
    return (long long)(at.y + (corner >> 1)) * map.y + (long long)(at.x + (corner & 1)) * map.x;
}

// One channel, sampled; a corner outside the map counts as 0 whatever lies there. `weights` are
// those of `at`.
template <class T>
SOKD_DEVICE Acc<T> bilinear(
    const T* plane, const Map& map, const Corners<Acc<T>>& at, const Acc<T> (&weights)[4]) {
    Acc<T> value[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        value[i] = at.has(i) ? to_acc(plane[corner_place(map, at, i)]) : Acc<T>(0);
    return fused(weights[0], value[0],
        fused(weights[1], value[1], fused(weights[2], value[2], weights[3] * value[3])));
}

// Lane j of four has the normals of channel j at four positions; afterwards it has those of four
// channels at position j.
SOKD_DEVICE void transpose(Normals& noise) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            const float other = __shfl_xor_sync(
                0xffffffffu, upper ? noise.of[i] : noise.of[i | step], step);
            if (upper) noise.of[i] = other;
            else noise.of[i | step] = other;
        }
    }
}

template <class A>
SOKD_DEVICE A not_a_number() {
    return (A)__uint_as_float(0x7fc00000u);
}

// The corners of all positions of the block, each made once. A barrier must follow: all_in_place
// has one.
template <class A>
SOKD_DEVICE void fill_table(
    Corners<A> (&table)[THREADS], const SamplePlan& plan, const Grid& grid, const Tile& tile) {
    const unsigned position = tile.position + threadIdx.x;
    if (position < tile.positions) table[threadIdx.x] = corners_of<A>(plan, grid, position);
}

// Which of a thread's run of channels are shown: bit i is channel first + i.
template <int E>
SOKD_DEVICE unsigned shown_of(const SamplePlan& plan, const Tile& tile, int first) {
    unsigned shown = 0;
#pragma unroll
    for (int i = 0; i < E; i++) {
        if (first + i < tile.channels)
            shown |= (unsigned)(plan.source[first + i - tile.channel] >= 0) << i;
    }
    return shown;
}

// Whether all channels of the block are shown in their own places, but for dropped ones: then runs
// of them are vectors. A barrier is inside, so that the whole block goes one way: threads exchange
// their noise on it. It is also the one that fill_table needs.
SOKD_DEVICE bool all_in_place(const SamplePlan& plan, const Tile& tile, long long wide) {
    const int c = tile.channel + (int)threadIdx.x;
    const int source = c < tile.channels ? plan.source[threadIdx.x] : DROPPED;
    return !__syncthreads_or(!wide || source == INVALID || (source >= 0 && source != c));
}

// A run of channels, sampled; `features` is the sample's first one.
template <class T>
SOKD_DEVICE void sample_run(
    Acc<T> (&values)[RUN<T>], const T* features, const Map& map, const Corners<Acc<T>>& at) {
#pragma unroll
    for (int corner = 3; corner >= 0; corner--) {
        Run<T> own{};
        if (at.has(corner)) own.read(features + corner_place(map, at, corner));
        const Acc<T> weight = at.weight(corner);
#pragma unroll
        for (int i = 0; i < RUN<T>; i++)
            values[i] = corner == 3 ? weight * own.at(i) : fused(weight, own.at(i), values[i]);
    }
}
