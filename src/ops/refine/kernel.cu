// refined[n,c,y,x] = keep[g,c] * ( hole_g(y,x) * bilinear(features[n, perm[g,c]], theta_g (x,y)) + sigma_g * eps(seed, n, c, y, x) )
// In pixels about the map's centre, cx = (W-1)/2, cy = (H-1)/2:
//   ix = t00 (x-cx) + t01 (W/H) (y-cy) + t02 W/2 + cx        iy = t10 (H/W) (x-cx) + t11 (y-cy) + t12 H/2 + cy
// Gradients for upstream u, with v = keep * u: d_theta = sum v * hole * (d bilinear / d ix * d ix / d theta + the same for iy);
//   d_sigma = sum v * eps;   d_straight = sum u;   d_features = the adjoint of the sampling, brought back through perm
// dots[v] = <u, refine(features; plan v)>. See common.cuh for options, orders, wide, Grid.
//
// Launches:
//   refine           bit 1  refine_forward_{dtype}_{order}    structure Refine; grid blocks. Order and wide by refined (wide: and features).
//   refine_backward  bit 2  refine_backward_{dtype}_{order}   structure RefineBackward; grid blocks; only if d_theta, d_sigma or d_straight is
//                                                             wanted. Order and wide by upstream (wide: and features).
//                    bit 8  refine_finish                     same structure; grid (max of the wanted G, 8); partials -> d_theta, d_sigma,
//                                                             d_straight. With blocks = 0 it writes zeros. No dtype, no order in its name.
//                    bit 4  refine_adjoint_{dtype}_{order}    same structure, with its own Grid and wide; grid blocks; only if d_features is
//                                                             wanted. Order and wide by d_features (wide: and upstream).
//   refine_dots      bit 16 refine_dots_{dtype}_{order}       structure RefineDots; grid blocks (none if plans = 0). Order and wide by upstream
//                                                             (wide: and features). The Grid never has the 8192 of large maps.
//                    bit 8  refine_dots_finish                same structure; grid plans. With blocks = 0 it writes zeros.
// "Order by upstream": lanes if it is channels_last and not contiguous, else planes, whatever its strides.
// Scratch (no initial content, 8-byte aligned): RefineBackward.partials 8 * blocks * 8 bytes; RefineDots.partials plans * blocks * 8 bytes.
// The seed: read from seed_pointer (int64) if that is not 0, else the number in `seed`.
// A perm that names a channel below 0 or above C-1 makes NaN of its output channel: no memory outside a map is ever read. A channel that
// no entry of perm names has gradient zero.
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
    Map d_features;  // pointer 0: not wanted
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
    unsigned long long dots;  // [V]
    long long dots_dtype;     // F32 or F64
    long long dots_stride;
    long long blocks;
    long long wide;
};

// ------------------------------------------------------------------------------------------------------------------- forward
// Bytes an element: features once in, refined once out (2 maps). Planes: a theta that moves nothing streams 128-bit vectors; else a lane has
// a position, whose coordinates serve all channels of the block, and gathers corners that neighbours share through the cache, with
// 32 positions side by side in every load and store. Lanes: four positions by one vector of channels a thread, corners as 128-bit vectors.

#if SOKD_KERNELS & 1
// values += sigma * eps, a run along positions.
template <class T>
SOKD_DEVICE void add_noise(Run<T>& values, Acc<T> sigma, const SamplePlan& plan, const Grid& grid, long long n, int c, unsigned position) {
#pragma unroll
    for (int quad = 0; quad < RUN<T>; quad += 4) {
        const Normals noise = noise_of(plan, grid, n, c, position + quad);
#pragma unroll
        for (int i = 0; i < 4; i++) values.set(quad + i, fused(sigma, (Acc<T>)noise.of[i], values.at(quad + i)));
    }
}

// Planes, nothing moved: runs along positions, STEPS channels under way at a time.
template <class T, int STEPS>
SOKD_DEVICE void copy_planes(const Refine& args, const Piece& piece, const SamplePlan& plan) {
    constexpr int E = RUN<T>;
    const int row = (int)args.grid.positions_per_block / E, rows = THREADS / row;
    const unsigned position = piece.position + threadIdx.x % row * E;
    if (position >= piece.positions) return;
    const T* features = sample_of<T>(args.features, piece.n) + position;
    T* refined = sample_of<T>(args.refined, piece.n) + position;
    unsigned holes = 0;
    for (int i = 0; i < E; i++) holes |= (unsigned)in_hole(plan, position + i, (unsigned)args.grid.width) << i;
    const Acc<T> sigma = (Acc<T>)plan.sigma;
    for (int first = piece.channel + threadIdx.x / row; first < piece.channels; first += STEPS * rows) {
        Run<T> values[STEPS] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int c = first + step * rows, source = c < piece.channels ? plan.source[c - piece.channel] : DROPPED;
            if (source >= 0) values[step].read(features + source * args.features.c);
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int c = first + step * rows, source = c < piece.channels ? plan.source[c - piece.channel] : DROPPED;
            if (c >= piece.channels) continue;
            if (holes || source == INVALID) {
#pragma unroll
                for (int i = 0; i < E; i++) {
                    if (holes >> i & 1 || source == INVALID) values[step].set(i, source == INVALID ? not_a_number<Acc<T>>() : Acc<T>(0));
                }
            }
            if (STEPS == 1 && source >= 0) add_noise(values[step], sigma, plan, args.grid, piece.n, c, position);
            values[step].write(refined + c * args.refined.c);
        }
    }
}

// Planes of any strides: a lane has a position, and four channels at a time.
template <class T>
SOKD_DEVICE void sample_planes(const Refine& args, const Piece& piece, const SamplePlan& plan, bool moves) {
    using A = Acc<T>;
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = piece.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    const bool within = position < piece.positions, shown = within && !in_hole(plan, position, width);
    Corners<A> at{};
    A weights[4] = {};
    if (moves) {
        at = corners_of<A>(plan, args.grid, position);
        for (int i = 0; i < 4; i++) weights[i] = at.weight(i);
    }
    const long long from = place(args.features, position, width), to = place(args.refined, position, width);
    const A sigma = (A)plan.sigma;
    for (int first = piece.channel + threadIdx.x / row * 4; first < piece.channels; first += THREADS / row * 4) {
        A values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int source = first + i < piece.channels ? plan.source[first + i - piece.channel] : DROPPED;
            const T* plane = sample_of<T>(args.features, piece.n) + source * args.features.c;
            values[i] = A(0);
            if (source >= 0 && shown) values[i] = moves ? bilinear<T>(plane, args.features, at, weights) : to_acc(plane[from]);
        }
        if (sigma != 0) {
            Normals noise = noise_of(plan, args.grid, piece.n, first + (int)(threadIdx.x & 3), position);
            transpose(noise);
#pragma unroll
            for (int i = 0; i < 4; i++) values[i] = fused(sigma, (A)noise.of[i], values[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!within || first + i >= piece.channels) continue;
            const int source = plan.source[first + i - piece.channel];
            const A value = source >= 0 ? values[i] : source == INVALID ? not_a_number<A>() : A(0);
            from_acc(value, sample_of<T>(args.refined, piece.n)[(first + i) * args.refined.c + to]);
        }
    }
}

// Lanes, every channel in its own place: a position and a run of channels at a time, four times.
template <class T>
SOKD_DEVICE void sample_runs(const Refine& args, const Piece& piece, const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    constexpr int E = RUN<T>;
    const Spot spot = spot_of<T>(args.grid, piece);
    const unsigned width = (unsigned)args.grid.width, shown = shown_of<E>(plan, piece, spot.channel);
    const A sigma = (A)plan.sigma;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        const bool within = position < piece.positions && spot.channel < piece.channels;
        A values[E] = {};
        if (within && !in_hole(plan, position, width)) {
            const T* features = sample_of<T>(args.features, piece.n) + spot.channel;
            if (table) {
                sample_run<T>(values, features, args.features, table[position - piece.position]);
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
                // Its own channel of four, then its own position of four: all threads of the warp take part.
                Normals noise = noise_of(plan, args.grid, piece.n, spot.channel + i + (int)(threadIdx.x & 3), position);
                transpose(noise);
#pragma unroll
                for (int j = 0; j < 4; j++) values[i + j] = fused(sigma, (A)noise.of[j], values[i + j]);
            }
        }
        if (!within) continue;
        Run<T> out{};
#pragma unroll
        for (int i = 0; i < E; i++) out.set(i, shown >> i & 1 ? values[i] : A(0));
        out.write(sample_of<T>(args.refined, piece.n) + place(args.refined, position, width) + spot.channel);
    }
}

// Lanes, channels from wherever they are, and any strides: four of them at a time.
template <class T>
SOKD_DEVICE void sample_fours(const Refine& args, const Piece& piece, const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    const Spot spot = spot_of<T>(args.grid, piece);
    const unsigned width = (unsigned)args.grid.width;
    const A sigma = (A)plan.sigma;
#pragma unroll 1
    for (int i = 0; i < 4 * RUN<T>; i += 4) {
        const int first = spot.channel + i % RUN<T>;
        const unsigned position = spot.position + i / RUN<T> * spot.step;
        const bool within = position < piece.positions, visible = within && !in_hole(plan, position, width);
        A values[4] = {};
        if (visible) {
            const T* features = sample_of<T>(args.features, piece.n);
            const long long from = place(args.features, position, width);
            Corners<A> at{};
            if (table) at = table[position - piece.position];
            const A weights[4] = {at.weight(0), at.weight(1), at.weight(2), at.weight(3)};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int source = first + j < piece.channels ? plan.source[first + j - piece.channel] : DROPPED;
                const T* plane = features + source * args.features.c;
                if (source >= 0) values[j] = table ? bilinear<T>(plane, args.features, at, weights) : to_acc(plane[from]);
            }
        }
        if (sigma != 0) {
            Normals noise = noise_of(plan, args.grid, piece.n, first + (int)(threadIdx.x & 3), position);
            transpose(noise);
#pragma unroll
            for (int j = 0; j < 4; j++) values[j] = fused(sigma, (A)noise.of[j], values[j]);
        }
        T* refined = sample_of<T>(args.refined, piece.n) + place(args.refined, position, width);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (!within || first + j >= piece.channels) continue;
            const int source = plan.source[first + j - piece.channel];
            from_acc(source >= 0 ? values[j] : source == INVALID ? not_a_number<A>() : A(0), refined[(first + j) * args.refined.c]);
        }
    }
}

template <class T, int ORDER>
SOKD_DEVICE void refine_forward(const Refine& args) {
    SOKD_SHARED(SamplePlan, plan, );
    const Piece piece = piece_of(args.grid);
    const bool moves = read_plan(plan, args.plan, args.grid, piece, 0);
    if constexpr (ORDER == PLANES) {
        if (args.wide && !moves && plan.sigma == 0) copy_planes<T, sizeof(T) == 8 ? 2 : 4>(args, piece, plan);
        else if (args.wide && !moves) copy_planes<T, 1>(args, piece, plan);
        else sample_planes<T>(args, piece, plan, moves);
    } else {
        SOKD_SHARED(Corners<Acc<T>>, table, [THREADS]);
        if (moves) fill_table(table, plan, args.grid, piece);
        if (all_in_place(plan, piece, args.wide)) sample_runs<T>(args, piece, plan, moves ? table : nullptr);
        else sample_fours<T>(args, piece, plan, moves ? table : nullptr);
    }
}

SOKD_ENTRIES(refine_forward, Refine, refine_forward)
#endif

// ------------------------------------------------------------------------------------------------------------------ backward
// Bytes an element: upstream once and features once in (2 maps); without d_theta the features stay untouched (1 map).
// One reading gives all sums: d_theta through the corners' slopes, d_sigma through the noise drawn again, d_straight.
// Partial sums: f32 (f64) within a warp, f64 from there; [8][blocks] = d_theta 0 .. 5 but for their scales, d_sigma, d_straight.

#if SOKD_KERNELS & 2
// d bilinear / d ix and / d iy of one channel times v, added.
template <class A>
struct Slopes {
    A x, y;
    SOKD_DEVICE void add(A v, const Corners<A>& at, A a, A b, A c, A d) {
        x = fused(v, fused(1 - at.lower, b - a, at.lower * (d - c)), x);
        y = fused(v, fused(1 - at.right, c - a, at.right * (d - b)), y);
    }
};

// What a thread has summed.
template <class A>
struct Sums {
    A theta[6] = {}, sigma = 0, straight = 0;
    SOKD_DEVICE void add(const Slopes<A>& slopes, const Grid& grid, unsigned position) {
        const unsigned width = (unsigned)grid.width;
        const A x = (A)(position % width) - (A)(grid.width - 1) / 2, y = (A)(position / width) - (A)(grid.height - 1) / 2;
        const A factors[3] = {x, y, A(1)};
#pragma unroll
        for (int i = 0; i < 3; i++) {
            theta[i] = fused(slopes.x, factors[i], theta[i]);
            theta[3 + i] = fused(slopes.y, factors[i], theta[3 + i]);
        }
    }
};

// One channel, wherever it is.
template <class T>
SOKD_DEVICE void add_one(Slopes<Acc<T>>& slopes, Acc<T> u, const T* plane, const Map& map, const Corners<Acc<T>>& at) {
    Acc<T> value[4];
#pragma unroll
    for (int k = 0; k < 4; k++) value[k] = at.has(k) ? to_acc(plane[corner_place(map, at, k)]) : Acc<T>(0);
    slopes.add(u, at, value[0], value[1], value[2], value[3]);
}

template <class T>
SOKD_DEVICE void sum_planes(Sums<Acc<T>>& sums, const RefineBackward& args, const Piece& piece, const SamplePlan& plan) {
    using A = Acc<T>;
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = piece.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    const bool within = position < piece.positions, sloped = within && args.d_theta.pointer && !in_hole(plan, position, width);
    const Corners<A> at = corners_of<A>(plan, args.grid, position);
    const T* upstream = sample_of<T>(args.upstream, piece.n) + place(args.upstream, position, width);
    Slopes<A> slopes{};
    for (int first = piece.channel + threadIdx.x / row * 4; first < piece.channels; first += THREADS / row * 4) {
        A u[4];
#pragma unroll
        for (int i = 0; i < 4; i++) u[i] = within && first + i < piece.channels ? to_acc(upstream[(first + i) * args.upstream.c]) : A(0);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sums.straight += u[i];
            const int source = first + i < piece.channels ? plan.source[first + i - piece.channel] : DROPPED;
            if (source < 0) u[i] = source == INVALID ? not_a_number<A>() : A(0);
            if (source == INVALID) slopes.x = not_a_number<A>();
            if (source < 0 || !sloped) continue;
            add_one<T>(slopes, u[i], sample_of<T>(args.features, piece.n) + source * args.features.c, args.features, at);
        }
        if (args.d_sigma.pointer) {
            Normals noise = noise_of(plan, args.grid, piece.n, first + (int)(threadIdx.x & 3), position);
            transpose(noise);
#pragma unroll
            for (int i = 0; i < 4; i++) sums.sigma = fused(u[i], (A)noise.of[i], sums.sigma);
        }
    }
    sums.add(slopes, args.grid, position);
}

// A run of channels in their own places. One pack after the other: all corners' runs of doubles do not fit into the registers.
template <class T>
SOKD_DEVICE void add_run(Slopes<Acc<T>>& slopes, const Run<T>& u, const T* features, const Map& map, const Corners<Acc<T>>& at) {
    const T* corner = features + corner_place(map, at, 0);
#pragma unroll
    for (int p = 0; p < Run<T>::PACKS; p++, corner += WIDTH<T>) {
        Pack value[4] = {};
        if (at.has(0)) value[0] = load_pack(corner);
        if (at.has(1)) value[1] = load_pack(corner + map.x);
        if (at.has(2)) value[2] = load_pack(corner + map.y);
        if (at.has(3)) value[3] = load_pack(corner + map.y + map.x);
#pragma unroll
        for (int i = 0; i < WIDTH<T>; i++) {
            slopes.add(u.at(p * WIDTH<T> + i), at, element<T>(value[0], i), element<T>(value[1], i), element<T>(value[2], i), element<T>(value[3], i));
        }
    }
}

// Lanes, every channel in its own place.
template <class T>
SOKD_DEVICE void sum_runs(Sums<Acc<T>>& sums, const RefineBackward& args, const Piece& piece, const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    constexpr int E = RUN<T>;
    const Spot spot = spot_of<T>(args.grid, piece);
    const unsigned width = (unsigned)args.grid.width, shown = shown_of<E>(plan, piece, spot.channel);
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        const bool within = position < piece.positions && spot.channel < piece.channels;
        Run<T> u{};
        if (within) u.read(sample_of<T>(args.upstream, piece.n) + place(args.upstream, position, width) + spot.channel);
#pragma unroll
        for (int i = 0; i < E; i++) sums.straight += u.at(i);
        if (shown + 1 != 1u << E) {
#pragma unroll
            for (int i = 0; i < E; i++) {
                if (!(shown >> i & 1)) u.set(i, A(0));
            }
        }
        if (args.d_sigma.pointer) {
#pragma unroll
            for (int i = 0; i < E; i += 4) {
                Normals noise = noise_of(plan, args.grid, piece.n, spot.channel + i + (int)(threadIdx.x & 3), position);
                transpose(noise);
#pragma unroll
                for (int j = 0; j < 4; j++) sums.sigma = fused(u.at(i + j), (A)noise.of[j], sums.sigma);
            }
        }
        if (within && args.d_theta.pointer && !in_hole(plan, position, width)) {
            Slopes<A> slopes{};
            add_run<T>(slopes, u, sample_of<T>(args.features, piece.n) + spot.channel, args.features, table[position - piece.position]);
            sums.add(slopes, args.grid, position);
        }
    }
}

// Lanes, channels from wherever they are, and any strides: four of them at a time.
template <class T>
SOKD_DEVICE void sum_fours(Sums<Acc<T>>& sums, const RefineBackward& args, const Piece& piece, const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    const Spot spot = spot_of<T>(args.grid, piece);
    const unsigned width = (unsigned)args.grid.width;
#pragma unroll 1
    for (int i = 0; i < 4 * RUN<T>; i += 4) {
        const int first = spot.channel + i % RUN<T>;
        const unsigned position = spot.position + i / RUN<T> * spot.step;
        const bool within = position < piece.positions, sloped = within && args.d_theta.pointer && !in_hole(plan, position, width);
        const T* upstream = sample_of<T>(args.upstream, piece.n) + place(args.upstream, position, width);
        A u[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u[j] = within && first + j < piece.channels ? to_acc(upstream[(first + j) * args.upstream.c]) : A(0);
            sums.straight += u[j];
            const int source = first + j < piece.channels ? plan.source[first + j - piece.channel] : DROPPED;
            if (source < 0) u[j] = source == INVALID ? not_a_number<A>() : A(0);
        }
        if (sloped) {
            const Corners<A> at = table[position - piece.position];
            Slopes<A> slopes{};
#pragma unroll 1
            for (int c = first; c < first + 4 && c < piece.channels; c++) {
                const int source = plan.source[c - piece.channel];
                if (source == INVALID) slopes.x = not_a_number<A>();
                if (source < 0) continue;
                const T* plane = sample_of<T>(args.features, piece.n) + source * args.features.c;
                add_one<T>(slopes, to_acc(upstream[c * args.upstream.c]), plane, args.features, at);
            }
            sums.add(slopes, args.grid, position);
        }
        if (args.d_sigma.pointer) {
            Normals noise = noise_of(plan, args.grid, piece.n, first + (int)(threadIdx.x & 3), position);
            transpose(noise);
#pragma unroll
            for (int j = 0; j < 4; j++) sums.sigma = fused(u[j], (A)noise.of[j], sums.sigma);
        }
    }
}

// The block's sums, from its threads'.
template <class A>
SOKD_DEVICE void write_sums(const Sums<A>& sums, const RefineBackward& args, double (&room)[WARPS][8]) {
    A all[8] = {sums.theta[0], sums.theta[1], sums.theta[2], sums.theta[3], sums.theta[4], sums.theta[5], sums.sigma, sums.straight};
    const double sum = warp_sums(all);
    if (threadIdx.x % 4 == 0) room[threadIdx.x / 32][threadIdx.x % 32 / 4] = sum;
    __syncthreads();
    if (threadIdx.x >= 8) return;
    double total = 0;
    for (int warp = 0; warp < WARPS; warp++) total += room[warp][threadIdx.x];
    ((double*)args.partials)[threadIdx.x * args.blocks + blockIdx.x] = total;
}

template <class T, int ORDER>
SOKD_DEVICE void refine_backward(const RefineBackward& args) {
    using A = Acc<T>;
    SOKD_SHARED(SamplePlan, plan, );
    SOKD_SHARED(double, room, [WARPS][8]);
    const Piece piece = piece_of(args.grid);
    read_plan(plan, args.plan, args.grid, piece, 0);
    Sums<A> sums;
    if constexpr (ORDER == PLANES) {
        sum_planes<T>(sums, args, piece, plan);
    } else {
        SOKD_SHARED(Corners<A>, table, [THREADS]);
        fill_table(table, plan, args.grid, piece);
        if (all_in_place(plan, piece, args.wide)) sum_runs<T>(sums, args, piece, plan, table);
        else sum_fours<T>(sums, args, piece, plan, table);
    }
    write_sums(sums, args, room);
}

SOKD_ENTRIES(refine_backward, RefineBackward, refine_backward)
#endif

// ------------------------------------------------------------------------------------------------------------------- adjoint
// d_features, gathered: a source cell sums, in a fixed order, over the positions whose samples touch it. These lie in the box around the
// parallelogram that theta's inverse makes of the square of side 2 about the cell; each is tried with the forward's own arithmetic.
// Bytes an element: d_features once out, upstream in through the cache about as often as the box has cells (2 maps from memory; 9 .. 16 tries
// in f64 for each run or group of channels). A theta without an inverse makes every position a candidate: right, and slow.

#if SOKD_KERNELS & 4
// Where a source cell is.
struct Cell {
    int y, x;
};
SOKD_DEVICE Cell cell_of(const Grid& grid, unsigned position) { return {(int)(position / (unsigned)grid.width), (int)(position % (unsigned)grid.width)}; }

// Columns x0 .. x1 and rows y0 .. y1 (up to) of the candidates.
struct Box {
    int x0, x1, y0, y1;
};
SOKD_DEVICE Box box_of(const Affine& affine, const Grid& grid, const Cell& cell) {
    const int width = (int)grid.width, height = (int)grid.height;
    const double a = affine.m[0], b = affine.m[1], c = affine.m[3], d = affine.m[4], det = a * d - b * c;
    const double right = (double)cell.x - affine.cx - affine.m[2], down = (double)cell.y - affine.cy - affine.m[5];
    const double x = (d * right - b * down) / det + affine.cx, y = (a * down - c * right) / det + affine.cy;
    // A margin for the inverse's rounding; where that could be more, all is tried.
    const double reach_x = (fabs(d) + fabs(b)) / fabs(det) + 1e-3, reach_y = (fabs(a) + fabs(c)) / fabs(det) + 1e-3;
    const bool sound = fabs(det) > 1e-6 * (fabs(a * d) + fabs(b * c)) && fabs(x) + fabs(y) + reach_x + reach_y < 1e9;
    if (!sound) return {0, width, 0, height};
    const double x0 = ceil(x - reach_x), x1 = floor(x + reach_x), y0 = ceil(y - reach_y), y1 = floor(y + reach_y);
    return {x0 < 0 ? 0 : (int)x0, x1 >= width ? width : (int)x1 + 1, y0 < 0 ? 0 : (int)y0, y1 >= height ? height : (int)y1 + 1};
}

// The weight with which a position's sample counts the cell; `touches` is false if it does not.
template <class A>
SOKD_DEVICE A weight_of(const SamplePlan& plan, const Grid& grid, int y, int x, const Cell& cell, bool& touches) {
    // Read anew for every candidate: kept in registers, eight doubles would push out the sums.
    const volatile Affine& kept = plan.affine;
    const Affine affine{{kept.m[0], kept.m[1], kept.m[2], kept.m[3], kept.m[4], kept.m[5]}, kept.cx, kept.cy};
    const Corners<A> at = corners_at<A>(affine, grid, y, x);
    const int dx = cell.x - at.x, dy = cell.y - at.y;
    touches = at.inside != 0 && (dx == 0 || dx == 1) && (dy == 0 || dy == 1) && !hole_at(plan, y, x);
    return at.weight(dy * 2 + dx);
}

SOKD_DEVICE int origin(int source) { return source >= 0 ? source : DROPPED - source; }

template <class T>
SOKD_DEVICE void gather_planes(const RefineBackward& args, const Piece& piece, const SamplePlan& plan) {
    using A = Acc<T>;
    constexpr int GROUP = 8;
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = piece.position + threadIdx.x % row;
    if (position >= piece.positions) return;
    const Cell cell = cell_of(args.grid, position);
    const Box box = box_of(plan.affine, args.grid, cell);
    const long long to = cell.y * args.d_features.y + cell.x * args.d_features.x;
    for (int first = piece.channel + threadIdx.x / row * GROUP; first < piece.channels; first += THREADS / row * GROUP) {
        A sums[GROUP] = {};
#pragma unroll 1
        for (int y = box.y0; y < box.y1; y++) {
#pragma unroll 1
            for (int x = box.x0; x < box.x1; x++) {
                bool touches;
                const A weight = weight_of<A>(plan, args.grid, y, x, cell, touches);
                if (!touches) continue;
                const T* upstream = sample_of<T>(args.upstream, piece.n) + y * args.upstream.y + x * args.upstream.x;
#pragma unroll
                for (int i = 0; i < GROUP; i++) {
                    const bool live = first + i < piece.channels && plan.source[first + i - piece.channel] >= 0;
                    if (live) sums[i] = fused(weight, to_acc(upstream[(first + i) * args.upstream.c]), sums[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const int source = first + i < piece.channels ? plan.source[first + i - piece.channel] : INVALID;
            if (source != INVALID) from_acc(sums[i], sample_of<T>(args.d_features, piece.n)[origin(source) * args.d_features.c + to]);
        }
    }
}

// A run of channels at a cell, read as vectors.
template <class T>
SOKD_DEVICE void gather_run(const RefineBackward& args, const Piece& piece, const SamplePlan& plan, int c, const Cell& cell, const Box& box) {
    using A = Acc<T>;
    A sums[RUN<T>] = {};
#pragma unroll 1
    for (int y = box.y0; y < box.y1; y++) {
#pragma unroll 1
        for (int x = box.x0; x < box.x1; x++) {
            bool touches;
            const A weight = weight_of<A>(plan, args.grid, y, x, cell, touches);
            if (!touches) continue;
            Run<T> u;
            u.read(sample_of<T>(args.upstream, piece.n) + y * args.upstream.y + x * args.upstream.x + c);
#pragma unroll
            for (int i = 0; i < RUN<T>; i++) sums[i] = fused(weight, u.at(i), sums[i]);
        }
    }
    T* d_features = sample_of<T>(args.d_features, piece.n) + cell.y * args.d_features.y + cell.x * args.d_features.x;
    const int* sources = plan.source + (c - piece.channel);
    bool own = true;
    Run<T> out{};
#pragma unroll
    for (int i = 0; i < RUN<T>; i++) {
        own = own && origin(sources[i]) == c + i;
        out.set(i, sources[i] >= 0 ? sums[i] : A(0));
    }
    if (own) return out.write(d_features + c);
#pragma unroll
    for (int i = 0; i < RUN<T>; i++) {
        if (sources[i] != INVALID) from_acc(out.at(i), d_features[origin(sources[i]) * args.d_features.c]);
    }
}

// One channel at a cell.
template <class T>
SOKD_DEVICE void gather_one(const RefineBackward& args, const Piece& piece, const SamplePlan& plan, int c, const Cell& cell, const Box& box) {
    using A = Acc<T>;
    const int source = plan.source[c - piece.channel];
    const T* upstream = sample_of<T>(args.upstream, piece.n) + c * args.upstream.c;
    if (source == INVALID) return;
    A sum = 0;
#pragma unroll 1
    for (int y = box.y0; y < box.y1 && source >= 0; y++) {
#pragma unroll 1
        for (int x = box.x0; x < box.x1; x++) {
            bool touches;
            const A weight = weight_of<A>(plan, args.grid, y, x, cell, touches);
            if (touches) sum = fused(weight, to_acc(upstream[y * args.upstream.y + x * args.upstream.x]), sum);
        }
    }
    const long long to = cell.y * args.d_features.y + cell.x * args.d_features.x;
    from_acc(sum, sample_of<T>(args.d_features, piece.n)[origin(source) * args.d_features.c + to]);
}

template <class T>
SOKD_DEVICE void gather_lanes(const RefineBackward& args, const Piece& piece, const SamplePlan& plan) {
    const Spot spot = spot_of<T>(args.grid, piece);
    if (spot.channel >= piece.channels) return;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        if (position >= piece.positions) continue;
        const Cell cell = cell_of(args.grid, position);
        const Box box = box_of(plan.affine, args.grid, cell);
        if (args.wide) {
            gather_run<T>(args, piece, plan, spot.channel, cell, box);
            continue;
        }
#pragma unroll 1
        for (int i = 0; i < RUN<T> && spot.channel + i < piece.channels; i++) gather_one<T>(args, piece, plan, spot.channel + i, cell, box);
    }
}

// Writes zeros for those of the block's channels that no entry of perm names, which it does not have if it is a permutation.
template <class T>
SOKD_DEVICE void clear_unnamed(const RefineBackward& args, const Piece& piece, int* named) {
    const Part& perm = args.plan.perm;
    named[threadIdx.x] = piece.channel + (int)threadIdx.x >= piece.channels;
    __syncthreads();
    for (int c = (int)threadIdx.x; c < (int)args.grid.channels; c += THREADS) {
        const long long source = load_int(perm.pointer, perm.dtype, piece.n * perm.group + c * perm.a);
        if (source >= piece.channel && source < piece.channels) named[source - piece.channel] = 1;
    }
    __syncthreads();
    if (!__syncthreads_or(!named[threadIdx.x])) return;
    for (int i = 0; piece.channel + i < piece.channels; i++) {
        if (named[i]) continue;
        T* target = sample_of<T>(args.d_features, piece.n) + (piece.channel + i) * args.d_features.c;
        for (unsigned position = piece.position + threadIdx.x; position < piece.positions; position += THREADS) {
            from_acc(Acc<T>(0), target[place(args.d_features, position, (unsigned)args.grid.width)]);
        }
    }
}

template <class T, int ORDER>
SOKD_DEVICE void refine_adjoint(const RefineBackward& args) {
    SOKD_SHARED(SamplePlan, plan, );
    SOKD_SHARED(int, named, [MOST_CHANNELS]);
    const Piece piece = piece_of(args.grid);
    if (args.plan.perm.pointer) clear_unnamed<T>(args, piece, named);
    read_plan(plan, args.plan, args.grid, piece, 0);
    if constexpr (ORDER == PLANES) gather_planes<T>(args, piece, plan);
    else gather_lanes<T>(args, piece, plan);
}

SOKD_ENTRIES(refine_adjoint, RefineBackward, refine_adjoint)
#endif

// ---------------------------------------------------------------------------------------------------------------------- dots
// Bytes an element: upstream and features once from memory (2 maps), whatever the number of plans: a block applies one plan after the other
// to the same piece, which stays in the cache (a plan that permutes reads other planes, from the second-level cache). Bound by the
// corner loads and the arithmetic from a handful of plans on. upstream * eps, the same for all plans, is kept in shared memory.

#if SOKD_KERNELS & 16
constexpr int BATCH = 32;          // plans whose sums are written together
constexpr int CHANNELS_EACH = 16;  // of a thread, at most

// This thread's part of plan v: sum of upstream * keep * (hole * bilinear + sigma * eps).
template <class T>
SOKD_DEVICE Acc<T> dot_planes(const RefineDots& args, const Piece& piece, const SamplePlan& plan, bool moves, const Acc<T> (*noise)[THREADS]) {
    using A = Acc<T>;
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = piece.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    if (position >= piece.positions) return 0;
    const bool shown = !in_hole(plan, position, width);
    Corners<A> at{};
    A weights[4] = {};
    if (moves) {
        at = corners_of<A>(plan, args.grid, position);
        for (int i = 0; i < 4; i++) weights[i] = at.weight(i);
    }
    const T* upstream = sample_of<T>(args.upstream, piece.n) + place(args.upstream, position, width);
    const long long from = place(args.features, position, width);
    const A sigma = (A)plan.sigma;
    A sum = 0;
    int k = 0;
    for (int first = piece.channel + threadIdx.x / row * 4; first < piece.channels; first += THREADS / row * 4, k += 4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int source = first + i < piece.channels ? plan.source[first + i - piece.channel] : DROPPED;
            if (source == INVALID) sum = not_a_number<A>();
            if (source < 0) continue;
            const T* plane = sample_of<T>(args.features, piece.n) + source * args.features.c;
            if (shown) {
                const A value = moves ? bilinear<T>(plane, args.features, at, weights) : to_acc(plane[from]);
                sum = fused(to_acc(upstream[(first + i) * args.upstream.c]), value, sum);
            }
            if (sigma != 0) sum = fused(sigma, noise[k + i][threadIdx.x], sum);
        }
    }
    return sum;
}

// upstream * eps of each channel of this thread.
template <class T>
SOKD_DEVICE void noise_planes(Acc<T> (*noise)[THREADS], const RefineDots& args, const Piece& piece, const SamplePlan& plan) {
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = piece.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    const bool within = position < piece.positions;
    const T* upstream = sample_of<T>(args.upstream, piece.n) + place(args.upstream, position, width);
    int k = 0;
    for (int first = piece.channel + threadIdx.x / row * 4; first < piece.channels; first += THREADS / row * 4, k += 4) {
        Normals drawn = noise_of(plan, args.grid, piece.n, first + (int)(threadIdx.x & 3), position);
        transpose(drawn);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool live = within && first + i < piece.channels;
            noise[k + i][threadIdx.x] = live ? to_acc(upstream[(first + i) * args.upstream.c]) * (Acc<T>)drawn.of[i] : Acc<T>(0);
        }
    }
}

// Lanes, every channel in its own place.
template <class T>
SOKD_DEVICE Acc<T> dot_runs(const RefineDots& args, const Piece& piece, const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    constexpr int E = RUN<T>;
    const Spot spot = spot_of<T>(args.grid, piece);
    const unsigned width = (unsigned)args.grid.width, shown = shown_of<E>(plan, piece, spot.channel);
    A sum = 0;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        if (spot.channel >= piece.channels || position >= piece.positions || in_hole(plan, position, width)) continue;
        const T* features = sample_of<T>(args.features, piece.n) + spot.channel;
        A values[E] = {};
        Run<T> own;
        if (table) {
            sample_run<T>(values, features, args.features, table[position - piece.position]);
        } else {
            own.read(features + place(args.features, position, width));
#pragma unroll
            for (int i = 0; i < E; i++) values[i] = own.at(i);
        }
        own.read(sample_of<T>(args.upstream, piece.n) + place(args.upstream, position, width) + spot.channel);
#pragma unroll
        for (int i = 0; i < E; i++) {
            if (shown >> i & 1) sum = fused(own.at(i), values[i], sum);
        }
    }
    return sum;
}

// Lanes, channels from wherever they are, and any strides.
template <class T>
SOKD_DEVICE Acc<T> dot_each(const RefineDots& args, const Piece& piece, const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    const Spot spot = spot_of<T>(args.grid, piece);
    const unsigned width = (unsigned)args.grid.width;
    A sum = 0;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        if (position >= piece.positions) continue;
        const bool visible = !in_hole(plan, position, width);
        const T* upstream = sample_of<T>(args.upstream, piece.n) + place(args.upstream, position, width);
        const long long from = place(args.features, position, width);
        Corners<A> at{};
        if (table) at = table[position - piece.position];
        const A weights[4] = {at.weight(0), at.weight(1), at.weight(2), at.weight(3)};
#pragma unroll 1
        for (int c = spot.channel; c < spot.channel + RUN<T> && c < piece.channels; c++) {
            const int source = plan.source[c - piece.channel];
            if (source == INVALID) sum = not_a_number<A>();
            if (source < 0 || !visible) continue;
            const T* plane = sample_of<T>(args.features, piece.n) + source * args.features.c;
            const A value = table ? bilinear<T>(plane, args.features, at, weights) : to_acc(plane[from]);
            sum = fused(to_acc(upstream[c * args.upstream.c]), value, sum);
        }
    }
    return sum;
}

// sigma times upstream * eps of the channels that are shown.
template <class T>
SOKD_DEVICE Acc<T> dot_noise(const RefineDots& args, const Piece& piece, const SamplePlan& plan, const Acc<T> (*noise)[THREADS]) {
    const unsigned shown = shown_of<RUN<T>>(plan, piece, spot_of<T>(args.grid, piece).channel);
    Acc<T> sum = 0;
#pragma unroll
    for (int i = 0; i < RUN<T>; i++) {
        if (shown >> i & 1) sum += noise[i][threadIdx.x];
    }
    return (Acc<T>)plan.sigma * sum;
}

// upstream * eps of each channel of this thread, summed over its positions.
template <class T>
SOKD_DEVICE void noise_lanes(Acc<T> (*noise)[THREADS], const RefineDots& args, const Piece& piece, const SamplePlan& plan) {
    const Spot spot = spot_of<T>(args.grid, piece);
#pragma unroll 1
    for (int i = 0; i < RUN<T>; i += 4) {
        Acc<T> sums[4] = {};
#pragma unroll 1
        for (int step = 0; step < 4; step++) {
            const unsigned position = spot.position + step * spot.step;
            const T* upstream = sample_of<T>(args.upstream, piece.n) + place(args.upstream, position, (unsigned)args.grid.width);
            Normals drawn = noise_of(plan, args.grid, piece.n, spot.channel + i + (int)(threadIdx.x & 3), position);
            transpose(drawn);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int c = spot.channel + i + j;
                if (position < piece.positions && c < piece.channels) sums[j] = fused(to_acc(upstream[c * args.upstream.c]), (Acc<T>)drawn.of[j], sums[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) noise[i + j][threadIdx.x] = sums[j];
    }
}

template <class T, int ORDER>
SOKD_DEVICE void refine_dots(const RefineDots& args) {
    using A = Acc<T>;
    // Two of them: while slower threads are at plan v, faster ones read plan v + 1; the barrier within keeps them from v + 2.
    SOKD_SHARED(SamplePlan, read, [2]);
    SOKD_SHARED(A, noise, [ORDER == PLANES ? CHANNELS_EACH : RUN<T>][THREADS]);
    SOKD_SHARED(double, sums, [BATCH][WARPS]);
    const Piece piece = piece_of(args.grid);
    for (long long v = 0; v < args.plans; v++) {
        const SamplePlan& plan = read[v & 1];
        const bool moves = read_plan(read[v & 1], args.plan, args.grid, piece, v);
        A sum;
        if constexpr (ORDER == PLANES) {
            if (v == 0 && args.plan.sigma.pointer) noise_planes<T>(noise, args, piece, plan);
            sum = dot_planes<T>(args, piece, plan, moves, noise);
        } else {
            SOKD_SHARED(Corners<A>, table, [THREADS]);
            if (v == 0 && args.plan.sigma.pointer) noise_lanes<T>(noise, args, piece, plan);
            if (moves) fill_table(table, plan, args.grid, piece);
            const Corners<A>* corners = moves ? table : nullptr;
            const bool in_place = all_in_place(plan, piece, args.wide);
            sum = in_place ? dot_runs<T>(args, piece, plan, corners) : dot_each<T>(args, piece, plan, corners);
            if (plan.sigma != 0) sum += dot_noise<T>(args, piece, plan, noise);
        }
        const double of_warp = warp_sum(sum);
        const int slot = (int)(v % BATCH);
        if (threadIdx.x % 32 == 0) sums[slot][threadIdx.x / 32] = of_warp;
        if (slot + 1 < BATCH && v + 1 < args.plans) continue;
        __syncthreads();
        if ((int)threadIdx.x > slot) continue;
        double total = 0;
        for (int warp = 0; warp < WARPS; warp++) total += sums[threadIdx.x][warp];
        ((double*)args.partials)[(v - slot + threadIdx.x) * args.blocks + blockIdx.x] = total;
    }
}

SOKD_ENTRIES(refine_dots, RefineDots, refine_dots)
#endif

// ------------------------------------------------------------------------------------------------------------- second stages
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
    const double scales[8] = {1.0, args.plan.width_by_height, (double)args.grid.width / 2, args.plan.height_by_width, 1.0, (double)args.grid.height / 2, 1.0, 1.0};
    double scale = 1.0;
#pragma unroll
    for (int k = 0; k < 8; k++) scale = k == i ? scales[k] : scale;
    const long long offset = g * out.group + (i < 6 ? i / 3 * out.a + i % 3 * out.b : 0);
    store_real(out.pointer, out.dtype, offset, args.blocks == 0 ? 0.0 : sum * scale);
}

SOKD_DEVICE void finish_dots(const RefineDots& args) {
    SOKD_SHARED(double, room, [WARPS]);
    const double sum = sum_of((const double*)args.partials + blockIdx.x * args.blocks, args.blocks, room);
    if (threadIdx.x == 0) store_real(args.dots, args.dots_dtype, blockIdx.x * args.dots_stride, sum);
}

SOKD_ENTRY(refine_finish, RefineBackward, finish_backward)
SOKD_ENTRY(refine_dots_finish, RefineDots, finish_dots)
#endif
