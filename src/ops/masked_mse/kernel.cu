// loss = scale / N * sum over b, c, y, x of weight[b,y,x] * (student - teacher)[b,c,y,x]^2
// d_student = 2 * scale / N * weight * (student - teacher)
// N is B*C*H*W (elements) or C * sum of weight (area); N = 0: loss 0 and gradient 0.
// See common.cuh for options, orders, wide, Grid.
//
// gradient *= upstream, in the backward
//
// Launches of the forward, all with the structure MaskedMse, in this order:
//   bit 2 masked_mse_area             only if area = 1: grid area_blocks =
//                                     clamp(ceil(B*H*W / 4096), 1, 128); sums of weights -> areas
//   bit 2 masked_mse_norm             only if area = 1: grid 1; areas -> norm
//   bit 1 masked_mse_{dtype}_{order}  grid blocks (none if the maps are empty)
//   bit 2 masked_mse_finish           grid 1; partials -> loss. With blocks = 0 it writes 0.
// Launch of the backward, with the structure Scale:
//   bit 4 masked_mse_scale_{dtype}    grid blocks = min(ceil(count / (1024 E)), 2048)
// The kernels of bit 2 have neither dtype nor order in their names; compile them with
// SOKD_KERNELS=2.
// Scratch (device memory, no initial content): partials blocks * 8 bytes; areas area_blocks * 8
// bytes; norm 24 bytes; each 8-byte aligned.
// `wide` depends on student, teacher and d_student if present; the order is that of d_student, or
// of student without a gradient.
#include "common.cuh"

struct MaskedMse {
    Map student;
    Map teacher;
    Map d_student;      // pointer 0: absent
    Map weight;         // [B, H, W]: c is not used; pointer 0: one everywhere (then area = 0)
    Grid grid;
    long long weight_dtype;
    long long area;     // 0: N = divisor; 1: N = C * sum of weight
    double scale;
    double divisor;     // B*C*H*W
    double factor;      // 2 * scale / divisor; not used if area = 1
    unsigned long long partials, areas, norm;
    unsigned long long loss;
    long long loss_dtype;  // F32, or F64 for f64 maps
    long long blocks, area_blocks;
    long long wide;
};

struct Scale {
    unsigned long long gradient;  // without gaps, in any order: read and written
    long long count;              // its elements
    unsigned long long upstream;  // one number
    long long upstream_dtype;     // F32 or F64
    long long blocks;
    long long wide;  // the gradient's pointer is a multiple of 16
};

// Bytes an element: student and teacher once in, the gradient once out (3 maps); the weight once
// for each chunk of channels (1/16 of a map or less in f32). A thread keeps the weights of its
// positions in registers and runs over channels (planes), or takes one weight for all channels of
// its vectors (lanes). Scaling: the gradient once in, once out, and nothing at all where upstream
// is one. A thread's sum is in the accumulator's dtype over 16 or 32 elements, then a tree of the
// warp; from there in f64.

#if SOKD_KERNELS & 1
template <class A>
SOKD_DEVICE A weight_at(const MaskedMse& args, long long n, unsigned position) {
    if (args.weight.pointer == 0) return A(1);
    const long long offset = n * args.weight.n +
                             place(args.weight, position, (unsigned)args.grid.width);
    return A(load_real(args.weight.pointer, args.weight_dtype, offset));
}

// What one element adds to the sum, and its gradient.
template <class A>
struct Term {
    A square, gradient;
};
template <class A>
SOKD_DEVICE Term<A> compare(A student, A teacher, A weight, A factor, bool empty) {
    const A difference = student - teacher, weighted = weight * difference;
    return {empty ? A(0) : weighted * difference, empty ? A(0) : factor * weighted};
}

// Threads along positions, a run each; STEPS channels are under way at a time.
template <class T>
SOKD_DEVICE Acc<T> planes_wide(
    const MaskedMse& args, const Tile& tile, Acc<T> factor, bool empty) {
    constexpr int E = RUN<T>, STEPS = sizeof(T) == 8 ? 1 : 2;
    const int row = (int)args.grid.positions_per_block / E, rows = THREADS / row;
    const unsigned position = tile.position + threadIdx.x % row * E;
    if (position >= tile.positions) return 0;
    const T *student = sample_of<T>(args.student, tile.n) + position,
            *teacher = sample_of<T>(args.teacher, tile.n) + position;
    T* d_student = args.d_student.pointer ? sample_of<T>(args.d_student, tile.n) + position
                                          : nullptr;
    const long long plane = args.grid.height * args.grid.width;
    Acc<T> weights[E], sum = 0;
#pragma unroll
    for (int i = 0; i < E; i++) weights[i] = weight_at<Acc<T>>(args, tile.n, position + i);
    for (int c = tile.channel + threadIdx.x / row; c < tile.channels; c += STEPS * rows) {
        Run<T> s[STEPS], t[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (c + i * rows >= tile.channels) continue;
            s[i].read(student + (c + i * rows) * plane);
            t[i].read(teacher + (c + i * rows) * plane);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (c + i * rows >= tile.channels) continue;
#pragma unroll
            for (int j = 0; j < E; j++) {
                const auto term = compare(s[i].at(j), t[i].at(j), weights[j], factor, empty);
                sum += term.square;
                s[i].set(j, term.gradient);
            }
            if (d_student) s[i].write(d_student + (c + i * rows) * plane);
        }
    }
    return sum;
}

// Threads along positions, one each, any strides.
template <class T>
SOKD_DEVICE Acc<T> planes_narrow(
    const MaskedMse& args, const Tile& tile, Acc<T> factor, bool empty) {
    const int row = (int)args.grid.positions_per_block, rows = THREADS / row;
    const unsigned position = tile.position + threadIdx.x % row, width = (unsigned)args.grid.width;
    if (position >= tile.positions) return 0;
    const T* student = sample_of<T>(args.student, tile.n) + place(args.student, position, width);
    const T* teacher = sample_of<T>(args.teacher, tile.n) + place(args.teacher, position, width);
    T* d_student = args.d_student.pointer ? sample_of<T>(args.d_student, tile.n) +
                                                place(args.d_student, position, width)
                                          : nullptr;
    const Acc<T> weight = weight_at<Acc<T>>(args, tile.n, position);
    Acc<T> sum = 0;
#pragma unroll 4
    for (int c = tile.channel + threadIdx.x / row; c < tile.channels; c += rows) {
        const auto term = compare(to_acc(student[c * args.student.c]),
            to_acc(teacher[c * args.teacher.c]), weight, factor, empty);
        sum += term.square;
        if (d_student) from_acc(term.gradient, d_student[c * args.d_student.c]);
    }
    return sum;
}

// Threads along channels, a run each, at four positions.
template <class T>
SOKD_DEVICE Acc<T> lanes(const MaskedMse& args, const Tile& tile, Acc<T> factor, bool empty) {
    constexpr int E = RUN<T>;
    const Spot spot = spot_of<T>(args.grid, tile);
    const unsigned width = (unsigned)args.grid.width;
    if (spot.channel >= tile.channels) return 0;
    Acc<T> sum = 0;
#pragma unroll 2
    for (int i = 0; i < 4; i++) {
        const unsigned position = spot.position + i * spot.step;
        if (position >= tile.positions) continue;
        const T* student = sample_of<T>(args.student, tile.n) +
                           place(args.student, position, width) + spot.channel * args.student.c;
        const T* teacher = sample_of<T>(args.teacher, tile.n) +
                           place(args.teacher, position, width) + spot.channel * args.teacher.c;
        T* d_student = sample_of<T>(args.d_student, tile.n) +
                       place(args.d_student, position, width) + spot.channel * args.d_student.c;
        const Acc<T> weight = weight_at<Acc<T>>(args, tile.n, position);
        if (args.wide) {
            Run<T> s, t;
            s.read(student);
            t.read(teacher);
#pragma unroll
            for (int j = 0; j < E; j++) {
                const auto term = compare(s.at(j), t.at(j), weight, factor, empty);
                sum += term.square;
                s.set(j, term.gradient);
            }
            if (args.d_student.pointer) s.write(d_student);
        } else {
#pragma unroll 4
            for (int j = 0; j < E && spot.channel + j < tile.channels; j++) {
                const auto term = compare(to_acc(student[j * args.student.c]),
                    to_acc(teacher[j * args.teacher.c]), weight, factor, empty);
                sum += term.square;
                if (args.d_student.pointer)
                    from_acc(term.gradient, d_student[j * args.d_student.c]);
            }
        }
    }
    return sum;
}

template <class T, int ORDER>
SOKD_DEVICE void loss_and_gradient(const MaskedMse& args) {
    SOKD_SHARED(double, room, [WARPS]);
    const Tile tile = tile_of(args.grid);
    const double* norm = (const double*)args.norm;
    const bool empty = args.area && norm[0] == 0.0;
    const Acc<T> factor = Acc<T>(args.area ? norm[1] : args.factor);
    Acc<T> sum;
    if constexpr (ORDER == PLANES) {
        sum = args.wide ? planes_wide<T>(args, tile, factor, empty)
                        : planes_narrow<T>(args, tile, factor, empty);
    } else {
        sum = lanes<T>(args, tile, factor, empty);
    }
    const double total = block_total(warp_sum(sum), room);
    if (threadIdx.x == 0) ((double*)args.partials)[blockIdx.x] = total;
}

SOKD_ENTRIES(masked_mse, MaskedMse, loss_and_gradient)
#endif

#if SOKD_KERNELS & 2
// A block's share of the sum of all weights.
SOKD_DEVICE void sum_weights(const MaskedMse& args) {
    SOKD_SHARED(double, room, [WARPS]);
    const unsigned width = (unsigned)args.grid.width;
    const long long positions = args.grid.height * args.grid.width,
                    all = args.grid.batch * positions;
    double sum = 0;
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
         i < all; i += args.area_blocks * THREADS) {
        const long long n = i / positions,
                        offset = n * args.weight.n +
                                 place(args.weight, (unsigned)(i - n * positions), width);
        sum += load_real(args.weight.pointer, args.weight_dtype, offset);
    }
    sum = block_total(warp_sum(sum), room);
    if (threadIdx.x == 0) ((double*)args.areas)[blockIdx.x] = sum;
}

// The divisor, and the factor of the gradient.
SOKD_DEVICE void make_norm(const MaskedMse& args) {
    SOKD_SHARED(double, room, [WARPS]);
    const double sum = sum_of((const double*)args.areas, args.area_blocks, room);
    if (threadIdx.x != 0) return;
    double* norm = (double*)args.norm;
    norm[0] = sum * (double)args.grid.channels;
    norm[1] = 2.0 * args.scale / norm[0];
}

SOKD_DEVICE void finish_loss(const MaskedMse& args) {
    SOKD_SHARED(double, room, [WARPS]);
    const double sum = sum_of((const double*)args.partials, args.blocks, room);
    if (threadIdx.x != 0) return;
    const double divisor = args.area ? *(const double*)args.norm : args.divisor;
    store_real(args.loss, args.loss_dtype, 0,
        divisor == 0.0 || args.blocks == 0 ? 0.0 : sum * (args.scale / divisor));
}

SOKD_ENTRY(masked_mse_area, MaskedMse, sum_weights)
SOKD_ENTRY(masked_mse_norm, MaskedMse, make_norm)
SOKD_ENTRY(masked_mse_finish, MaskedMse, finish_loss)
#endif

#if SOKD_KERNELS & 4
// Every block reads upstream itself: the host does not synchronise, and a factor of one moves no
// map.
template <class T>
SOKD_DEVICE void scale_gradient(const Scale& args) {
    constexpr int E = RUN<T>, STEPS = 4;
    const Acc<T> factor = Acc<T>(load_real(args.upstream, args.upstream_dtype, 0));
    if (factor == Acc<T>(1)) return;
    T* gradient = (T*)args.gradient;
    const long long first = blockIdx.x * (long long)THREADS + threadIdx.x,
                    step = args.blocks * THREADS;
    const long long runs = args.wide ? args.count / E : 0;
    for (long long i = first; i < runs; i += STEPS * step) {
        Run<T> run[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            if (i + k * step < runs) run[k].read_own(gradient + (i + k * step) * E);
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            if (i + k * step >= runs) continue;
#pragma unroll
            for (int j = 0; j < E; j++) run[k].set(j, run[k].at(j) * factor);
            run[k].write(gradient + (i + k * step) * E);
        }
    }
    for (long long i = runs * E + first; i < args.count; i += step)
        from_acc(to_acc(gradient[i]) * factor, gradient[i]);
}

SOKD_IF_F32(SOKD_ENTRY(masked_mse_scale_f32, Scale, scale_gradient<float>))
SOKD_IF_F16(SOKD_ENTRY(masked_mse_scale_f16, Scale, scale_gradient<Half>))
SOKD_IF_BF16(SOKD_ENTRY(masked_mse_scale_bf16, Scale, scale_gradient<BFloat>))
SOKD_IF_F64(SOKD_ENTRY(masked_mse_scale_f64, Scale, scale_gradient<double>))
#endif
