// The gradient of the features: a part of kernel.cu, where the structures are.
//
// d_features, gathered: a source cell sums, in a fixed order, over the positions whose samples
// touch it. These lie in the box around the parallelogram that theta's inverse makes of the square
// of side 2 about the cell; each is tried with the forward's own arithmetic.
// Bytes an element: d_features once out, upstream in through the cache about as often as the box
// has cells (2 maps from memory; 9 .. 16 tries in f64 for each run or group of channels). A theta
// without an inverse makes every position a candidate: correct, and slow.

#if SOKD_KERNELS & 4
// Where a source cell is.
struct Cell {
    int y, x;
};
SOKD_DEVICE Cell cell_of(const Grid& grid, unsigned position) {
    return {(int)(position / (unsigned)grid.width), (int)(position % (unsigned)grid.width)};
}

// Columns x0 .. x1 and rows y0 .. y1 (up to) of the candidates.
struct Box {
    int x0, x1, y0, y1;
};
SOKD_DEVICE Box box_of(const Affine& affine, const Grid& grid, const Cell& cell) {
    const int width = (int)grid.width, height = (int)grid.height;
    const double a = affine.m[0], b = affine.m[1], c = affine.m[3], d = affine.m[4],
                 det = a * d - b * c;
    const double right = (double)cell.x - affine.cx - affine.m[2],
                 down = (double)cell.y - affine.cy - affine.m[5];
    const double x = (d * right - b * down) / det + affine.cx,
                 y = (a * down - c * right) / det + affine.cy;
    // A margin for the inverse's rounding; where that could be more, all is tried.
    const double reach_x = (fabs(d) + fabs(b)) / fabs(det) + 1e-3,
                 reach_y = (fabs(a) + fabs(c)) / fabs(det) + 1e-3;
    const bool sound = fabs(det) > 1e-6 * (fabs(a * d) + fabs(b * c)) &&
                       fabs(x) + fabs(y) + reach_x + reach_y < 1e9;
    if (!sound) return {0, width, 0, height};
    const double x0 = ceil(x - reach_x), x1 = floor(x + reach_x), y0 = ceil(y - reach_y),
                 y1 = floor(y + reach_y);
    return {x0 < 0 ? 0 : (int)x0, x1 >= width ? width : (int)x1 + 1, y0 < 0 ? 0 : (int)y0,
        y1 >= height ? height : (int)y1 + 1};
}

// The weight with which a position's sample counts the cell; `touches` is false if it does not.
template <class A>
SOKD_DEVICE A weight_of(
    const SamplePlan& plan, const Grid& grid, int y, int x, const Cell& cell, bool& touches) {
    // Read anew for every candidate: kept in registers, eight doubles would push out the sums.
    const volatile Affine& kept = plan.affine;
    const Affine affine{
        {kept.m[0], kept.m[1], kept.m[2], kept.m[3], kept.m[4], kept.m[5]}, kept.cx, kept.cy};
    const Corners<A> at = corners_at<A>(affine, grid, y, x);
    const int dx = cell.x - at.x, dy = cell.y - at.y;
    touches = at.inside != 0 && (dx == 0 || dx == 1) && (dy == 0 || dy == 1) &&
              !hole_at(plan, y, x);
    return at.weight(dy * 2 + dx);
}

SOKD_DEVICE int origin(int source) { return source >= 0 ? source : DROPPED - source; }

template <class T>
SOKD_DEVICE void gather_planes(
    const RefineBackward& args, const Tile& tile, const SamplePlan& plan) {
    using A = Acc<T>;
    constexpr int GROUP = 8;
    const int row = (int)args.grid.positions_per_block;
    const unsigned position = tile.position + threadIdx.x % row;
    if (position >= tile.positions) return;
    const Cell cell = cell_of(args.grid, position);
    const Box box = box_of(plan.affine, args.grid, cell);
    const long long to = cell.y * args.d_features.y + cell.x * args.d_features.x;
    for (int first = tile.channel + threadIdx.x / row * GROUP; first < tile.channels;
        first += THREADS / row * GROUP) {
        A sums[GROUP] = {};
#pragma unroll 1
        for (int y = box.y0; y < box.y1; y++) {
#pragma unroll 1
            for (int x = box.x0; x < box.x1; x++) {
                bool touches;
                const A weight = weight_of<A>(plan, args.grid, y, x, cell, touches);
                if (!touches) continue;
                const T* upstream = sample_of<T>(args.upstream, tile.n) + y * args.upstream.y +
                                    x * args.upstream.x;
#pragma unroll
                for (int i = 0; i < GROUP; i++) {
                    const bool live = first + i < tile.channels &&
                                      plan.source[first + i - tile.channel] >= 0;
                    if (live)
                        sums[i] = fused(
                            weight, to_acc(upstream[(first + i) * args.upstream.c]), sums[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const int source = first + i < tile.channels ? plan.source[first + i - tile.channel]
                                                          : INVALID;
            if (source != INVALID) from_acc(sums[i],
                sample_of<T>(args.d_features, tile.n)[origin(source) * args.d_features.c + to]);
        }
    }
}

// A run of channels at a cell, read as vectors.
template <class T>
SOKD_DEVICE void gather_run(const RefineBackward& args, const Tile& tile, const SamplePlan& plan,
    int c, const Cell& cell, const Box& box) {
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
            u.read(sample_of<T>(args.upstream, tile.n) + y * args.upstream.y +
                   x * args.upstream.x + c);
#pragma unroll
            for (int i = 0; i < RUN<T>; i++) sums[i] = fused(weight, u.at(i), sums[i]);
        }
    }
    T* d_features = sample_of<T>(args.d_features, tile.n) + cell.y * args.d_features.y +
                    cell.x * args.d_features.x;
    const int* sources = plan.source + (c - tile.channel);
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
        if (sources[i] != INVALID)
            from_acc(out.at(i), d_features[origin(sources[i]) * args.d_features.c]);
    }
}

// One channel at a cell.
template <class T>
SOKD_DEVICE void gather_one(const RefineBackward& args, const Tile& tile, const SamplePlan& plan,
    int c, const Cell& cell, const Box& box) {
    using A = Acc<T>;
    const int source = plan.source[c - tile.channel];
    const T* upstream = sample_of<T>(args.upstream, tile.n) + c * args.upstream.c;
    if (source == INVALID) return;
    A sum = 0;
#pragma unroll 1
    for (int y = box.y0; y < box.y1 && source >= 0; y++) {
#pragma unroll 1
        for (int x = box.x0; x < box.x1; x++) {
            bool touches;
            const A weight = weight_of<A>(plan, args.grid, y, x, cell, touches);
            if (touches)
                sum = fused(
                    weight, to_acc(upstream[y * args.upstream.y + x * args.upstream.x]), sum);
        }
    }
    const long long to = cell.y * args.d_features.y + cell.x * args.d_features.x;
    from_acc(sum, sample_of<T>(args.d_features, tile.n)[origin(source) * args.d_features.c + to]);
}

template <class T>
SOKD_DEVICE void gather_lanes(
    const RefineBackward& args, const Tile& tile, const SamplePlan& plan) {
    const Spot spot = spot_of<T>(args.grid, tile);
    if (spot.channel >= tile.channels) return;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        const unsigned position = spot.position + step * spot.step;
        if (position >= tile.positions) continue;
        const Cell cell = cell_of(args.grid, position);
        const Box box = box_of(plan.affine, args.grid, cell);
        if (args.wide) {
            gather_run<T>(args, tile, plan, spot.channel, cell, box);
            continue;
        }
#pragma unroll 1
        for (int i = 0; i < RUN<T> && spot.channel + i < tile.channels; i++)
            gather_one<T>(args, tile, plan, spot.channel + i, cell, box);
    }
}

// Writes zeros for those of the block's channels that no entry of perm names, which it does not
// have if it is a permutation.
template <class T>
SOKD_DEVICE void clear_unnamed(const RefineBackward& args, const Tile& tile, int* named) {
    const Part& perm = args.plan.perm;
    named[threadIdx.x] = tile.channel + (int)threadIdx.x >= tile.channels;
    __syncthreads();
    for (int c = (int)threadIdx.x; c < (int)args.grid.channels; c += THREADS) {
        const long long source = load_int(
            perm.pointer, perm.dtype, tile.n * perm.group + c * perm.a);
        if (source >= tile.channel && source < tile.channels) named[source - tile.channel] = 1;
    }
    __syncthreads();
    if (!__syncthreads_or(!named[threadIdx.x])) return;
    for (int i = 0; tile.channel + i < tile.channels; i++) {
        if (named[i]) continue;
        T* target = sample_of<T>(args.d_features, tile.n) +
                    (tile.channel + i) * args.d_features.c;
        for (unsigned position = tile.position + threadIdx.x; position < tile.positions;
            position += THREADS) {
            from_acc(
                Acc<T>(0), target[place(args.d_features, position, (unsigned)args.grid.width)]);
        }
    }
}

template <class T, int ORDER>
SOKD_DEVICE void refine_adjoint(const RefineBackward& args) {
    SOKD_SHARED(SamplePlan, plan, );
    SOKD_SHARED(int, named, [MOST_CHANNELS]);
    const Tile tile = tile_of(args.grid);
    if (args.plan.perm.pointer) clear_unnamed<T>(args, tile, named);
    read_plan(plan, args.plan, args.grid, tile, 0);
    if constexpr (ORDER == PLANES) gather_planes<T>(args, tile, plan);
    else gather_lanes<T>(args, tile, plan);
}

SOKD_ENTRIES(refine_adjoint, RefineBackward, refine_adjoint)
#endif
