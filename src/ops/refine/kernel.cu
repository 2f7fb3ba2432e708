// refined[n,c,y,x] = keep[g,c] * ( hole_g(y,x) * bilinear(features[n, perm[g,c]], theta_g (x,y))
//                                  + sigma_g * eps(seed, n, c, y, x) )
// In pixels about the map's centre, cx = (W-1)/2, cy = (H-1)/2:
//   ix = t00 (x-cx) + t01 (W/H) (y-cy) + t02 W/2 + cx
//   iy = t10 (H/W) (x-cx) + t11 (y-cy) + t12 H/2 + cy
// Gradients for upstream u, with v = keep * u:
//   d_theta = sum v * hole * (d bilinear / d ix * d ix / d theta + the same for iy)
//   d_sigma = sum v * eps
//   d_straight = sum u
//   d_features = the adjoint of the sampling, through the inverse of perm
// dots[v] = <u, refine(features; plan v)>;  by sample: dots[0, v, n] = that of sample n,
//                                                      dots[1, v, n] = <refined, refined> of it
// See common.cuh for options, orders, wide, Grid.
//
// Launches of the forward, with the structure Refine:
//   bit 1  refine_forward_{dtype}_{order}   grid blocks
//          order and wide by refined (wide: and features)
// Launches of the backward, with the structure RefineBackward:
//   bit 2  refine_backward_{dtype}_{order}  grid blocks; only for d_theta, d_sigma or d_straight
//          order and wide by upstream (wide: and features)
//   bit 8  refine_finish                    grid (max of their G, 8); partials -> d_theta, d_sigma,
//          d_straight; with blocks = 0 it writes zeros; no dtype, no order in its name
//   bit 4  refine_adjoint_{dtype}_{order}   grid blocks; only for d_features; its own Grid and wide
//          order and wide by d_features (wide: and upstream)
// Launches of refine_dots, with the structure RefineDots:
//   bit 16 refine_dots_{dtype}_{order}      grid blocks (none if plans = 0)
//          order and wide by upstream (wide: and features); its Grid has no 8192 for large maps
//   bit 32 refine_squares_{dtype}_{order}   in its place, by sample; launched alike
//   bit 8  refine_dots_finish               grid plans, by sample plans * 2 * batch; with
//          blocks = 0 it writes zeros
// The kernels of bit 2 are in backward.cuh, of bit 4 in adjoint.cuh, of bits 16 and 32 in dots.cuh.
// "Order by upstream": lanes if it is channels_last and not contiguous, else planes.
// Scratch (no initial content, 8-byte aligned): RefineBackward.partials 8 * blocks * 8 bytes;
// RefineDots.partials plans * blocks * 8 bytes, by sample twice that.
// The seed: read from seed_pointer (int64) if that is not 0, else the number in `seed`.
// An entry of perm below 0 or above C-1 gives a NaN output channel: no memory outside a map is
// read. A channel that is not in perm has gradient zero.
#include "common.cuh"
#include "sampling.cuh"  // struct Plan is there

struct Refine {
    Map refined;
    Map features;
    Grid grid;
    Plan plan;
    long long wide;
};

struct RefineBackward {
    Map upstream;
    Map features;
    Map d_features;  // pointer 0: absent
    Grid grid;
    Plan plan;
    Out d_theta, d_sigma, d_straight;
    unsigned long long partials;
    long long blocks;
    long long wide;
};

struct RefineDots {
    Map features;
    Map upstream;
    Grid grid;
    Plan plan;
    long long plans;
    unsigned long long partials;
    unsigned long long dots;  // [V], or [2, V, B]
    long long dots_dtype;     // F32 or F64
    long long dots_plan, dots_square, dots_sample;  // strides
    long long samples;                              // 0: [V]; else B
    long long blocks;
    long long wide;
};

// ----------------------------------------------------------------------------------------- forward
// Bytes an element: features once in, refined once out (2 maps). Planes: a theta that moves nothing
// streams 128-bit vectors; else a lane has a position, whose coordinates serve all channels of the
// block, and gathers corners that neighbours share through the cache, with 32 positions side by
// side in every load and store. Lanes: four positions by one vector of channels a thread, corners
// as 128-bit vectors.

#if SOKD_KERNELS & 1
// values += sigma * eps, a run along positions.
template <class T>
SOKD_DEVICE void add_noise(Run<T>& values, Acc<T> sigma, const SamplePlan& plan, const Grid& grid,
    long long n, int c, unsigned position) {
#pragma unroll
    for (int quad = 0; quad < RUN<T>; quad += 4) {
        const Normals noise = noise_of(plan, grid, n, c, position + quad);
#pragma unroll
        for (int i = 0; i < 4; i++)
            values.set(quad + i, fused(sigma, (Acc<T>)noise.of[i], values.at(quad + i)));
    }
}

// Planes, nothing moved: runs along positions, STEPS channels under way at a time.
template <class T, int STEPS>
SOKD_DEVICE void copy_planes(const Refine& args, const Tile& tile, const SamplePlan& plan) {
    constexpr int E = RUN<T>;
    const int row = (int)args.grid.positions_per_block / E, rows = THREADS / row;
    const unsigned position = tile.position + threadIdx.x % row * E;
    if (position >= tile.positions) return;
    const T* features = sample_of<T>(args.features, tile.n) + position;
    T* refined = sample_of<T>(args.refined, tile.n) + position;
    unsigned holes = 0;
    for (int i = 0; i < E; i++)
        holes |= (unsigned)in_hole(plan, position + i, (unsigned)args.grid.width) << i;
    const Acc<T> sigma = (Acc<T>)plan.sigma;
    for (int first = tile.channel + threadIdx.x / row; first < tile.channels;
        first += STEPS * rows) {
        Run<T> values[STEPS] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int c = first + step * rows,
                      source = c < tile.channels ? plan.source[c - tile.channel] : DROPPED;
            if (source >= 0) values[step].read(features + source * args.features.c);
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int c = first + step * rows,
                      source = c < tile.channels ? plan.source[c - tile.channel] : DROPPED;
            if (c >= tile.channels) continue;
            if (holes || source == INVALID) {
#pragma unroll
                for (int i = 0; i < E; i++) {
                    if (holes >> i & 1 || source == INVALID)
                        values[step].set(i, source == INVALID ? not_a_number<Acc<T>>() : Acc<T>(0));
                }
            }
            if (STEPS == 1 && source >= 0)
                add_noise(values[step], sigma, plan, args.grid, tile.n, c, position);
            values[step].write(refined + c * args.refined.c);
        }
    }
}

// Planes of any strides: a lane has a position and four channels at a time.
template <class T>
SOKD_DEVICE void sample_planes(
    const Refine& args, const Tile& tile, const SamplePlan& plan, bool moves) {
    using A = Acc<T>;
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = tile.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    const bool within = position < tile.positions,
               shown = within && !in_hole(plan, position, width);
    Corners<A> at{};
    A weights[4] = {};
    if (moves) {
        at = corners_of<A>(plan, args.grid, position);
        for (int i = 0; i < 4; i++) weights[i] = at.weight(i);
    }
    const long long from = place(args.features, position, width),
                    to = place(args.refined, position, width);
    const A sigma = (A)plan.sigma;
    for (int first = tile.channel + threadIdx.x / row * 4; first < tile.channels;
        first += THREADS / row * 4) {
        A values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int source = first + i < tile.channels ? plan.source[first + i - tile.channel]
                                                          : DROPPED;
            const T* plane = sample_of<T>(args.features, tile.n) + source * args.features.c;
            values[i] = A(0);
            if (source >= 0 && shown)
                values[i] = moves ? bilinear<T>(plane, args.features, at, weights)
                                  : to_acc(plane[from]);
        }
        if (sigma != 0) {
            Normals noise = noise_of(
                plan, args.grid, tile.n, first + (int)(threadIdx.x & 3), position);
            transpose(noise);
#pragma unroll
            for (int i = 0; i < 4; i++) values[i] = fused(sigma, (A)noise.of[i], values[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!within || first + i >= tile.channels) continue;
            const int source = plan.source[first + i - tile.channel];
            const A value = source >= 0 ? values[i] : source == INVALID ? not_a_number<A>() : A(0);
            from_acc(value, sample_of<T>(args.refined, tile.n)[(first + i) * args.refined.c + to]);
        }
    }
}

// Lanes, no permutation: a position and a run of channels at a time, four times.
template <class T>
SOKD_DEVICE void sample_runs(
    const Refine& args, const Tile& tile, const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    constexpr int E = RUN<T>;
    const Spot spot = spot_of<T>(args.grid, tile);
    const unsigned width = (unsigned)args.grid.width,
                   shown = shown_of<E>(plan, tile, spot.channel);
    const A sigma = (A)plan.sigma;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        const bool within = position < tile.positions && spot.channel < tile.channels;
        A values[E] = {};
        if (within && !in_hole(plan, position, width)) {
            const T* features = sample_of<T>(args.features, tile.n) + spot.channel;
            if (table) {
                sample_run<T>(values, features, args.features, table[position - tile.position]);
            } else {
                Run<T> own;
                own.read(features + place(args.features, position, width));
#pragma unroll
                for (int i = 0; i < E; i++) values[i] = own.at(i);
            }
        }
        if (sigma != 0) {
#pragma unroll
            for (int i = 0; i < E; i += 4) {
                // Its own channel of four, then its own position of four: all threads of the warp
                // take part.
                Normals noise = noise_of(
                    plan, args.grid, tile.n, spot.channel + i + (int)(threadIdx.x & 3), position);
                transpose(noise);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    values[i + j] = fused(sigma, (A)noise.of[j], values[i + j]);
            }
        }
        if (!within) continue;
        Run<T> out{};
#pragma unroll
        for (int i = 0; i < E; i++) out.set(i, shown >> i & 1 ? values[i] : A(0));
        out.write(sample_of<T>(args.refined, tile.n) + place(args.refined, position, width) +
                  spot.channel);
    }
}

// Lanes, any source channels and any strides: four of them at a time.
template <class T>
SOKD_DEVICE void sample_fours(
    const Refine& args, const Tile& tile, const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    const Spot spot = spot_of<T>(args.grid, tile);
    const unsigned width = (unsigned)args.grid.width;
    const A sigma = (A)plan.sigma;
#pragma unroll 1
    for (int i = 0; i < 4 * RUN<T>; i += 4) {
        const int first = spot.channel + i % RUN<T>;
        const unsigned position = spot.position + i / RUN<T> * spot.step;
        const bool within = position < tile.positions,
                   visible = within && !in_hole(plan, position, width);
        A values[4] = {};
        if (visible) {
            const T* features = sample_of<T>(args.features, tile.n);
            const long long from = place(args.features, position, width);
            Corners<A> at{};
            if (table) at = table[position - tile.position];
            const A weights[4] = {at.weight(0), at.weight(1), at.weight(2), at.weight(3)};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int source = first + j < tile.channels
                                       ? plan.source[first + j - tile.channel]
                                       : DROPPED;
                const T* plane = features + source * args.features.c;
                if (source >= 0)
                    values[j] = table ? bilinear<T>(plane, args.features, at, weights)
                                      : to_acc(plane[from]);
            }
        }
        if (sigma != 0) {
            Normals noise = noise_of(
                plan, args.grid, tile.n, first + (int)(threadIdx.x & 3), position);
            transpose(noise);
#pragma unroll
            for (int j = 0; j < 4; j++) values[j] = fused(sigma, (A)noise.of[j], values[j]);
        }
        T* refined = sample_of<T>(args.refined, tile.n) + place(args.refined, position, width);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (!within || first + j >= tile.channels) continue;
            const int source = plan.source[first + j - tile.channel];
            from_acc(source >= 0         ? values[j]
                     : source == INVALID ? not_a_number<A>()
                                         : A(0),
                refined[(first + j) * args.refined.c]);
        }
    }
}

template <class T, int ORDER>
SOKD_DEVICE void refine_forward(const Refine& args) {
    SOKD_SHARED(SamplePlan, plan, );
    const Tile tile = tile_of(args.grid);
    const bool moves = read_plan(plan, args.plan, args.grid, tile, 0);
    if constexpr (ORDER == PLANES) {
        if (args.wide && !moves && plan.sigma == 0)
            copy_planes<T, sizeof(T) == 8 ? 2 : 4>(args, tile, plan);
        else if (args.wide && !moves) copy_planes<T, 1>(args, tile, plan);
        else sample_planes<T>(args, tile, plan, moves);
    } else {
        SOKD_SHARED(Corners<Acc<T>>, table, [THREADS]);
        if (moves) fill_table(table, plan, args.grid, tile);
        if (all_in_place(plan, tile, args.wide))
            sample_runs<T>(args, tile, plan, moves ? table : nullptr);
        else sample_fours<T>(args, tile, plan, moves ? table : nullptr);
    }
}

SOKD_ENTRIES(refine_forward, Refine, refine_forward)
#endif

#include "backward.cuh"
#include "adjoint.cuh"
#include "dots.cuh"

// ----------------------------------------------------------------------------------- second stages
#if SOKD_KERNELS & 8
// Block (g, i): sum i of group g, from its samples' blocks; all of them where there is one group.
SOKD_DEVICE void finish_backward(const RefineBackward& args) {
    SOKD_SHARED(double, room, [WARPS]);
    const int i = (int)blockIdx.y;
    const long long g = blockIdx.x, each = args.grid.tiles * args.grid.chunks;
    const Out& out = i < 6 ? args.d_theta : i == 6 ? args.d_sigma : args.d_straight;
    if (!out.pointer || g >= out.groups) return;
    const bool all = out.groups == 1;
    const double* first = (const double*)args.partials + i * args.blocks + (all ? 0 : g * each);
    const double sum = sum_of(first, args.blocks == 0 ? 0 : all ? args.blocks : each, room);
    if (threadIdx.x != 0) return;
    const double scales[8] = {1.0, args.plan.width_by_height, (double)args.grid.width / 2,
        args.plan.height_by_width, 1.0, (double)args.grid.height / 2, 1.0, 1.0};
    double scale = 1.0;
#pragma unroll
    for (int k = 0; k < 8; k++) scale = k == i ? scales[k] : scale;
    const long long offset = g * out.group + (i < 6 ? i / 3 * out.a + i % 3 * out.b : 0);
    store_real(out.pointer, out.dtype, offset, args.blocks == 0 ? 0.0 : sum * scale);
}

SOKD_DEVICE void finish_dots(const RefineDots& args) {
    SOKD_SHARED(double, room, [WARPS]);
    // By sample: number (v * 2 + square) * B + n, from the blocks of sample n.
    const bool by_sample = args.samples > 0;
    const long long n = by_sample ? blockIdx.x % args.samples : 0,
                    rest = by_sample ? blockIdx.x / args.samples : blockIdx.x,
                    each = args.grid.tiles * args.grid.chunks;
    const double sum = sum_of((const double*)args.partials + rest * args.blocks + n * each,
        by_sample && args.blocks ? each : args.blocks, room);
    const long long offset = by_sample ? rest / 2 * args.dots_plan + rest % 2 * args.dots_square +
                                             n * args.dots_sample
                                       : rest * args.dots_plan;
    if (threadIdx.x == 0) store_real(args.dots, args.dots_dtype, offset, sum);
}

SOKD_ENTRY(refine_finish, RefineBackward, finish_backward)
SOKD_ENTRY(refine_dots_finish, RefineDots, finish_dots)
#endif
