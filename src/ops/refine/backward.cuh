// The gradients of theta, sigma and straight: a part of kernel.cu, where the structures are.
//
// Bytes an element: upstream once and features once in (2 maps); without d_theta the features stay
// untouched (1 map). One reading gives all sums: d_theta through the corners' slopes, d_sigma
// through the noise drawn again, d_straight. Partial sums: f32 (f64) within a warp, f64 from there;
// [8][blocks] = d_theta 0 .. 5 but for their scales, d_sigma, d_straight.

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
        const A x = (A)(position % width) - (A)(grid.width - 1) / 2,
                y = (A)(position / width) - (A)(grid.height - 1) / 2;
        const A factors[3] = {x, y, A(1)};
#pragma unroll
        for (int i = 0; i < 3; i++) {
            theta[i] = fused(slopes.x, factors[i], theta[i]);
            theta[3 + i] = fused(slopes.y, factors[i], theta[3 + i]);
        }
    }
};

// One channel, at any place.
template <class T>
SOKD_DEVICE void add_one(
    Slopes<Acc<T>>& slopes, Acc<T> u, const T* plane, const Map& map, const Corners<Acc<T>>& at) {
    Acc<T> value[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
        value[k] = at.has(k) ? to_acc(plane[corner_place(map, at, k)]) : Acc<T>(0);
    slopes.add(u, at, value[0], value[1], value[2], value[3]);
}

template <class T>
SOKD_DEVICE void sum_planes(
    Sums<Acc<T>>& sums, const RefineBackward& args, const Tile& tile, const SamplePlan& plan) {
    using A = Acc<T>;
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = tile.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    const bool within = position < tile.positions,
               sloped = within && args.d_theta.pointer && !in_hole(plan, position, width);
    const Corners<A> at = corners_of<A>(plan, args.grid, position);
    const T* upstream = sample_of<T>(args.upstream, tile.n) +
                        place(args.upstream, position, width);
    Slopes<A> slopes{};
    for (int first = tile.channel + threadIdx.x / row * 4; first < tile.channels;
        first += THREADS / row * 4) {
        A u[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            u[i] = within && first + i < tile.channels
                       ? to_acc(upstream[(first + i) * args.upstream.c])
                       : A(0);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sums.straight += u[i];
            const int source = first + i < tile.channels ? plan.source[first + i - tile.channel]
                                                          : DROPPED;
            if (source < 0) u[i] = source == INVALID ? not_a_number<A>() : A(0);
            if (source == INVALID) slopes.x = not_a_number<A>();
            if (source < 0 || !sloped) continue;
            add_one<T>(slopes, u[i],
                sample_of<T>(args.features, tile.n) + source * args.features.c, args.features, at);
        }
        if (args.d_sigma.pointer) {
            Normals noise = noise_of(
                plan, args.grid, tile.n, first + (int)(threadIdx.x & 3), position);
            transpose(noise);
#pragma unroll
            for (int i = 0; i < 4; i++) sums.sigma = fused(u[i], (A)noise.of[i], sums.sigma);
        }
    }
    sums.add(slopes, args.grid, position);
}

// A run of channels in their own places. One pack after the other: all corners' runs of doubles do
// not fit into the registers.
template <class T>
SOKD_DEVICE void add_run(Slopes<Acc<T>>& slopes, const Run<T>& u, const T* features, const Map& map,
    const Corners<Acc<T>>& at) {
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
            slopes.add(u.at(p * WIDTH<T> + i), at, element<T>(value[0], i), element<T>(value[1], i),
                element<T>(value[2], i), element<T>(value[3], i));
        }
    }
}

// Lanes, no permutation.
template <class T>
SOKD_DEVICE void sum_runs(Sums<Acc<T>>& sums, const RefineBackward& args, const Tile& tile,
    const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    constexpr int E = RUN<T>;
    const Spot spot = spot_of<T>(args.grid, tile);
    const unsigned width = (unsigned)args.grid.width,
                   shown = shown_of<E>(plan, tile, spot.channel);
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        const bool within = position < tile.positions && spot.channel < tile.channels;
        Run<T> u{};
        if (within)
            u.read(sample_of<T>(args.upstream, tile.n) + place(args.upstream, position, width) +
                   spot.channel);
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
                Normals noise = noise_of(
                    plan, args.grid, tile.n, spot.channel + i + (int)(threadIdx.x & 3), position);
                transpose(noise);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sums.sigma = fused(u.at(i + j), (A)noise.of[j], sums.sigma);
            }
        }
        if (within && args.d_theta.pointer && !in_hole(plan, position, width)) {
            Slopes<A> slopes{};
            add_run<T>(slopes, u, sample_of<T>(args.features, tile.n) + spot.channel,
                args.features, table[position - tile.position]);
            sums.add(slopes, args.grid, position);
        }
    }
}

// Lanes, any source channels and any strides: four of them at a time.
template <class T>
SOKD_DEVICE void sum_fours(Sums<Acc<T>>& sums, const RefineBackward& args, const Tile& tile,
    const SamplePlan& plan, const Corners<Acc<T>>* table) {
    using A = Acc<T>;
    const Spot spot = spot_of<T>(args.grid, tile);
    const unsigned width = (unsigned)args.grid.width;
#pragma unroll 1
    for (int i = 0; i < 4 * RUN<T>; i += 4) {
        const int first = spot.channel + i % RUN<T>;
        const unsigned position = spot.position + i / RUN<T> * spot.step;
        const bool within = position < tile.positions,
                   sloped = within && args.d_theta.pointer && !in_hole(plan, position, width);
        const T* upstream = sample_of<T>(args.upstream, tile.n) +
                            place(args.upstream, position, width);
        A u[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u[j] = within && first + j < tile.channels
                       ? to_acc(upstream[(first + j) * args.upstream.c])
                       : A(0);
            sums.straight += u[j];
            const int source = first + j < tile.channels ? plan.source[first + j - tile.channel]
                                                          : DROPPED;
            if (source < 0) u[j] = source == INVALID ? not_a_number<A>() : A(0);
        }
        if (sloped) {
            const Corners<A> at = table[position - tile.position];
            Slopes<A> slopes{};
#pragma unroll 1
            for (int c = first; c < first + 4 && c < tile.channels; c++) {
                const int source = plan.source[c - tile.channel];
                if (source == INVALID) slopes.x = not_a_number<A>();
                if (source < 0) continue;
                const T* plane = sample_of<T>(args.features, tile.n) + source * args.features.c;
                add_one<T>(slopes, to_acc(upstream[c * args.upstream.c]), plane, args.features, at);
            }
            sums.add(slopes, args.grid, position);
        }
        if (args.d_sigma.pointer) {
            Normals noise = noise_of(
                plan, args.grid, tile.n, first + (int)(threadIdx.x & 3), position);
            transpose(noise);
#pragma unroll
            for (int j = 0; j < 4; j++) sums.sigma = fused(u[j], (A)noise.of[j], sums.sigma);
        }
    }
}

// The block's sums, from its threads'.
template <class A>
SOKD_DEVICE void write_sums(
    const Sums<A>& sums, const RefineBackward& args, double (&room)[WARPS][8]) {
    A all[8] = {sums.theta[0], sums.theta[1], sums.theta[2], sums.theta[3], sums.theta[4],
        sums.theta[5], sums.sigma, sums.straight};
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
    const Tile tile = tile_of(args.grid);
    read_plan(plan, args.plan, args.grid, tile, 0);
    Sums<A> sums;
    if constexpr (ORDER == PLANES) {
        sum_planes<T>(sums, args, tile, plan);
    } else {
        SOKD_SHARED(Corners<A>, table, [THREADS]);
        fill_table(table, plan, args.grid, tile);
        if (all_in_place(plan, tile, args.wide)) sum_runs<T>(sums, args, tile, plan, table);
        else sum_fours<T>(sums, args, tile, plan, table);
    }
    write_sums(sums, args, room);
}

SOKD_ENTRIES(refine_backward, RefineBackward, refine_backward)
#endif
