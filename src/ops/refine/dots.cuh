// refine_dots, inner products with many plans at once: a part of kernel.cu, where the structures
// are.
//
// Bytes an element: upstream and features once from memory (2 maps), whatever the number of plans:
// a block applies one plan after the other to the same tile, which stays in the cache (a plan that
// permutes reads other planes, from the second-level cache). Bound by the corner loads and the
// arithmetic from a handful of plans on. upstream * eps, the same for all plans, is kept in shared
// memory.

#if SOKD_KERNELS & 48
constexpr int BATCH = 32;  // plans whose sums are written together
#endif

#if SOKD_KERNELS & 16
constexpr int CHANNELS_EACH = 16;  // of a thread, at most

// This thread's part of plan v: sum of upstream * keep * (hole * bilinear + sigma * eps).
template <class T>
SOKD_DEVICE Acc<T> dot_planes(const RefineDots& args, const Tile& tile, const SamplePlan& plan,
    bool moves, const Acc<T> (*noise)[THREADS]) {
    using A = Acc<T>;
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = tile.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    if (position >= tile.positions) return 0;
    const bool shown = !in_hole(plan, position, width);
    Corners<A> at{};
    A weights[4] = {};
    if (moves) {
        at = corners_of<A>(plan, args.grid, position);
        for (int i = 0; i < 4; i++) weights[i] = at.weight(i);
    }
    const T* upstream = sample_of<T>(args.upstream, tile.n) +
                        place(args.upstream, position, width);
    const long long from = place(args.features, position, width);
    const A sigma = (A)plan.sigma;
    A sum = 0;
    int k = 0;
    for (int first = tile.channel + threadIdx.x / row * 4; first < tile.channels;
        first += THREADS / row * 4, k += 4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int source = first + i < tile.channels ? plan.source[first + i - tile.channel]
                                                          : DROPPED;
            if (source == INVALID) sum = not_a_number<A>();
            if (source < 0) continue;
            const T* plane = sample_of<T>(args.features, tile.n) + source * args.features.c;
            if (shown) {
                const A value = moves ? bilinear<T>(plane, args.features, at, weights)
                                      : to_acc(plane[from]);
                sum = fused(to_acc(upstream[(first + i) * args.upstream.c]), value, sum);
            }
            if (sigma != 0) sum = fused(sigma, noise[k + i][threadIdx.x], sum);
        }
    }
    return sum;
}

// upstream * eps of each channel of this thread.
template <class T>
SOKD_DEVICE void noise_planes(
    Acc<T> (*noise)[THREADS], const RefineDots& args, const Tile& tile, const SamplePlan& plan) {
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = tile.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    const bool within = position < tile.positions;
    const T* upstream = sample_of<T>(args.upstream, tile.n) +
                        place(args.upstream, position, width);
    int k = 0;
    for (int first = tile.channel + threadIdx.x / row * 4; first < tile.channels;
        first += THREADS / row * 4, k += 4) {
        Normals drawn = noise_of(
            plan, args.grid, tile.n, first + (int)(threadIdx.x & 3), position);
        transpose(drawn);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool live = within && first + i < tile.channels;
            noise[k + i][threadIdx.x] = live ? to_acc(upstream[(first + i) * args.upstream.c]) *
                                                   (Acc<T>)drawn.of[i]
                                             : Acc<T>(0);
        }
    }
}

// Lanes, no permutation.
template <class T>
SOKD_DEVICE Acc<T> dot_runs(const RefineDots& args, const Tile& tile, const SamplePlan& plan,
    const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    constexpr int E = RUN<T>;
    const Spot spot = spot_of<T>(args.grid, tile);
    const unsigned width = (unsigned)args.grid.width,
                   shown = shown_of<E>(plan, tile, spot.channel);
    A sum = 0;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        if (spot.channel >= tile.channels || position >= tile.positions ||
            in_hole(plan, position, width))
            continue;
        const T* features = sample_of<T>(args.features, tile.n) + spot.channel;
        A values[E] = {};
        Run<T> own;
        if (table) {
            sample_run<T>(values, features, args.features, table[position - tile.position]);
        } else {
            own.read(features + place(args.features, position, width));
#pragma unroll
            for (int i = 0; i < E; i++) values[i] = own.at(i);
        }
        own.read(sample_of<T>(args.upstream, tile.n) + place(args.upstream, position, width) +
                 spot.channel);
#pragma unroll
        for (int i = 0; i < E; i++) {
            if (shown >> i & 1) sum = fused(own.at(i), values[i], sum);
        }
    }
    return sum;
}

// Lanes, any permutation and any strides.
template <class T>
SOKD_DEVICE Acc<T> dot_each(const RefineDots& args, const Tile& tile, const SamplePlan& plan,
    const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    const Spot spot = spot_of<T>(args.grid, tile);
    const unsigned width = (unsigned)args.grid.width;
    A sum = 0;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        if (position >= tile.positions) continue;
        const bool visible = !in_hole(plan, position, width);
        const T* upstream = sample_of<T>(args.upstream, tile.n) +
                            place(args.upstream, position, width);
        const long long from = place(args.features, position, width);
        Corners<A> at{};
        if (table) at = table[position - tile.position];
        const A weights[4] = {at.weight(0), at.weight(1), at.weight(2), at.weight(3)};
#pragma unroll 1
        for (int c = spot.channel; c < spot.channel + RUN<T> && c < tile.channels; c++) {
            const int source = plan.source[c - tile.channel];
            if (source == INVALID) sum = not_a_number<A>();
            if (source < 0 || !visible) continue;
            const T* plane = sample_of<T>(args.features, tile.n) + source * args.features.c;
            const A value = table ? bilinear<T>(plane, args.features, at, weights)
                                  : to_acc(plane[from]);
            sum = fused(to_acc(upstream[c * args.upstream.c]), value, sum);
        }
    }
    return sum;
}

// sigma times upstream * eps of the channels that are shown.
template <class T>
SOKD_DEVICE Acc<T> dot_noise(const RefineDots& args, const Tile& tile, const SamplePlan& plan,
    const Acc<T> (*noise)[THREADS]) {
    const unsigned shown = shown_of<RUN<T>>(plan, tile, spot_of<T>(args.grid, tile).channel);
    Acc<T> sum = 0;
#pragma unroll
    for (int i = 0; i < RUN<T>; i++) {
        if (shown >> i & 1) sum += noise[i][threadIdx.x];
    }
    return (Acc<T>)plan.sigma * sum;
}

// upstream * eps of each channel of this thread, summed over its positions.
template <class T>
SOKD_DEVICE void noise_lanes(
    Acc<T> (*noise)[THREADS], const RefineDots& args, const Tile& tile, const SamplePlan& plan) {
    const Spot spot = spot_of<T>(args.grid, tile);
#pragma unroll 1
    for (int i = 0; i < RUN<T>; i += 4) {
        Acc<T> sums[4] = {};
#pragma unroll 1
        for (int step = 0; step < 4; step++) {
            const unsigned position = spot.position + step * spot.step;
            const T* upstream = sample_of<T>(args.upstream, tile.n) +
                                place(args.upstream, position, (unsigned)args.grid.width);
            Normals drawn = noise_of(
                plan, args.grid, tile.n, spot.channel + i + (int)(threadIdx.x & 3), position);
            transpose(drawn);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int c = spot.channel + i + j;
                if (position < tile.positions && c < tile.channels)
                    sums[j] = fused(
                        to_acc(upstream[c * args.upstream.c]), (Acc<T>)drawn.of[j], sums[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) noise[i + j][threadIdx.x] = sums[j];
    }
}

template <class T, int ORDER>
SOKD_DEVICE void refine_dots(const RefineDots& args) {
    using A = Acc<T>;
    // Two of them: while slower threads are at plan v, faster ones read plan v + 1; the barrier
    // within keeps them from v + 2.
    SOKD_SHARED(SamplePlan, read, [2]);
    SOKD_SHARED(A, noise, [ORDER == PLANES ? CHANNELS_EACH : RUN<T>][THREADS]);
    SOKD_SHARED(double, sums, [BATCH][WARPS]);
    const Tile tile = tile_of(args.grid);
    for (long long v = 0; v < args.plans; v++) {
        const SamplePlan& plan = read[v & 1];
        const bool moves = read_plan(read[v & 1], args.plan, args.grid, tile, v);
        A sum;
        if constexpr (ORDER == PLANES) {
            if (v == 0 && args.plan.sigma.pointer) noise_planes<T>(noise, args, tile, plan);
            sum = dot_planes<T>(args, tile, plan, moves, noise);
        } else {
            SOKD_SHARED(Corners<A>, table, [THREADS]);
            if (v == 0 && args.plan.sigma.pointer) noise_lanes<T>(noise, args, tile, plan);
            if (moves) fill_table(table, plan, args.grid, tile);
            const Corners<A>* corners = moves ? table : nullptr;
            const bool in_place = all_in_place(plan, tile, args.wide);
            sum = in_place ? dot_runs<T>(args, tile, plan, corners)
                           : dot_each<T>(args, tile, plan, corners);
            if (plan.sigma != 0) sum += dot_noise<T>(args, tile, plan, noise);
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

// By sample, with the squares. They need the refined values, noise included, so the noise is drawn
// again for each plan that has some: few do.
#if SOKD_KERNELS & 32
// sums += <upstream, values>, <values, values> of the four channels from `first`, at one position.
template <class T>
SOKD_DEVICE void add_squares(Acc<T> (&sums)[2], Acc<T> (&values)[4], const RefineDots& args,
    const Tile& tile, const SamplePlan& plan, int first, unsigned position) {
    using A = Acc<T>;
    if (plan.sigma != 0) {  // all threads of the warp take part
        Normals noise = noise_of(plan, args.grid, tile.n, first + (int)(threadIdx.x & 3), position);
        transpose(noise);
#pragma unroll
        for (int i = 0; i < 4; i++) values[i] = fused((A)plan.sigma, (A)noise.of[i], values[i]);
    }
    if (position >= tile.positions) return;
    const T* upstream = sample_of<T>(args.upstream, tile.n) +
                        place(args.upstream, position, (unsigned)args.grid.width);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int source = first + i < tile.channels ? plan.source[first + i - tile.channel]
                                                     : DROPPED;
        if (source == INVALID) sums[0] = sums[1] = not_a_number<A>();
        if (source < 0) continue;
        sums[0] = fused(to_acc(upstream[(first + i) * args.upstream.c]), values[i], sums[0]);
        sums[1] = fused(values[i], values[i], sums[1]);
    }
}

// The four channels from `first` at one position, without noise; 0 if dropped or in the hole.
template <class T>
SOKD_DEVICE void sample_four(Acc<T> (&values)[4], const RefineDots& args, const Tile& tile,
    const SamplePlan& plan, int first, unsigned position, bool moves, const Corners<Acc<T>>& at) {
    const unsigned width = (unsigned)args.grid.width;
    const bool visible = position < tile.positions && !in_hole(plan, position, width);
    const Acc<T> weights[4] = {at.weight(0), at.weight(1), at.weight(2), at.weight(3)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int source = first + i < tile.channels ? plan.source[first + i - tile.channel]
                                                     : DROPPED;
        values[i] = Acc<T>(0);
        if (source < 0 || !visible) continue;
        const T* plane = sample_of<T>(args.features, tile.n) + source * args.features.c;
        values[i] = moves ? bilinear<T>(plane, args.features, at, weights)
                          : to_acc(plane[place(args.features, position, width)]);
    }
}

// This thread's sums for plan v.
template <class T, int ORDER>
SOKD_DEVICE void square_tile(Acc<T> (&sums)[2], const RefineDots& args, const Tile& tile,
    const SamplePlan& plan, bool moves) {
    using A = Acc<T>;
    A values[4];
    if constexpr (ORDER == PLANES) {
        const int row = (int)args.grid.positions_per_block;
        const unsigned position = tile.position + threadIdx.x % row;
        Corners<A> at{};
        if (moves && position < tile.positions) at = corners_of<A>(plan, args.grid, position);
#pragma unroll 1
        for (int first = tile.channel + threadIdx.x / row * 4; first < tile.channels;
            first += THREADS / row * 4) {
            sample_four<T>(values, args, tile, plan, first, position, moves, at);
            add_squares<T>(sums, values, args, tile, plan, first, position);
        }
    } else {
        SOKD_SHARED(Corners<A>, table, [THREADS]);
        if (moves) fill_table(table, plan, args.grid, tile);
        __syncthreads();
        const Spot spot = spot_of<T>(args.grid, tile);
#pragma unroll 1
        for (int i = 0; i < 4 * RUN<T>; i += 4) {
            const int first = spot.channel + i % RUN<T>;
            const unsigned position = spot.position + i / RUN<T> * spot.step;
            Corners<A> at{};
            if (moves && position < tile.positions) at = table[position - tile.position];
            sample_four<T>(values, args, tile, plan, first, position, moves, at);
            add_squares<T>(sums, values, args, tile, plan, first, position);
        }
    }
}

template <class T, int ORDER>
SOKD_DEVICE void refine_squares(const RefineDots& args) {
    using A = Acc<T>;
    SOKD_SHARED(SamplePlan, read, [2]);  // as in refine_dots
    SOKD_SHARED(double, sums, [2 * BATCH][WARPS]);
    const Tile tile = tile_of(args.grid);
    for (long long v = 0; v < args.plans; v++) {
        const SamplePlan& plan = read[v & 1];
        const bool moves = read_plan(read[v & 1], args.plan, args.grid, tile, v);
        A found[2] = {};
        square_tile<T, ORDER>(found, args, tile, plan, moves);
        const int slot = (int)(v % BATCH);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const double of_warp = warp_sum(found[i]);
            if (threadIdx.x % 32 == 0) sums[2 * slot + i][threadIdx.x / 32] = of_warp;
        }
        if (slot + 1 < BATCH && v + 1 < args.plans) continue;
        __syncthreads();
        if ((int)threadIdx.x >= 2 * (slot + 1)) continue;
        double total = 0;
        for (int warp = 0; warp < WARPS; warp++) total += sums[threadIdx.x][warp];
        const long long row = 2 * (v - slot) + threadIdx.x;
        ((double*)args.partials)[row * args.blocks + blockIdx.x] = total;
    }
}

SOKD_ENTRIES(refine_squares, RefineDots, refine_squares)
#endif
