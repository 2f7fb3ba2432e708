// heat = sqrt(heat * heat_t), size and offset = (student + teacher) / 2, where a teacher is given
// peak: heat[b,a,y,x] > 0 and >= every cell of the kernel x kernel window around it (outside the
//   map: ignored), none of them NaN
// box = trunc(clamp(cell + offset -+ size / 2, 0, side - 1)), inclusive;
//   coverage[b,y,x] = boxes over the cell
// The k best peaks of a sample, by (heat descending, flat index (a*H + y)*W + x ascending).
// See common.cuh for options and orders.
//
// Launches, both with the structure Areas, in this order (none if B = 0; k >= 1 rules out the other
// empty maps):
//   bit 1 areas_scan_{dtype}_{order}   grid B * chunks, chunks = ceil(A*H*W / 2048):
//                                      the `kept` best peaks of 2048 cells -> candidates
//   bit 2 areas_pick_{dtype}           grid B: the k best of them, boxes, coverage
// areas_pick has no order in its name; compile it with SOKD_KERNELS=2.
// The order is lanes if heat is channels_last and not contiguous, else planes. `wide` depends on
// heat and heat_teacher alone: both pointers multiples of 16, both contiguous and A*H*W a multiple
// of 16 / size (planes), or both channels_last and A a multiple of it (lanes). A*H*W is below 2^31.
// Scratch (no initial content, 8-byte aligned), kept = min(k, 2048): candidate_scores
// B * chunks * kept * (8 if f64, else 4) bytes; candidate_cells B * chunks * kept * 8 bytes.
#include "common.cuh"

struct Areas {
    Map heat;      // [B, A, H, W]
    Map size;      // [B, 2, H, W]
    Map offset;    // [B, 2, H, W]
    Map heat_teacher; // pointer 0: no teacher
    Map size_teacher;
    Map offset_teacher;
    long long batch, maps, height, width;
    long long k, kernel;
    long long chunks, kept;
    long long wide;
    unsigned long long candidate_scores, candidate_cells;
    unsigned long long coverage;  // [B, H, W] f32, contiguous
    unsigned long long boxes;     // [B, k, 4] i64, contiguous
    unsigned long long scores;    // [B, k] f32 (f64 for f64), contiguous
};

// Bytes an element: the heads once from memory (1 map, 2 with a teacher; size and offset at the
// boxes alone); neighbours come through the cache. Scan: a thread reads 8 cells; those without a
// greater neighbour in the same vector go on a list, whose windows are read; the least of the
// warps' best peaks excludes most of the others (if k <= 8), and one warp sorts the rest. Pick: one
// block a sample; candidates are few. Choices are by score and index, so the order of threads has
// no effect.

// A peak; `flat` < 0: none, which is worse than any.
template <class A>
struct Peak {
    A score;
    int flat;
    SOKD_DEVICE bool beats(const Peak& other) const {
        return flat >= 0 && (other.flat < 0 || score > other.score ||
                                (score == other.score && flat < other.flat));
    }
};

template <class A>
SOKD_DEVICE Peak<A> best_of_warp(Peak<A> peak) {
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2) {
        const Peak<A> other{__shfl_xor_sync(0xffffffffu, peak.score, step),
            __shfl_xor_sync(0xffffffffu, peak.flat, step)};
        if (other.beats(peak)) peak = other;
    }
    return peak;
}

#if SOKD_KERNELS & 1
constexpr int CHUNK = 2048, CELLS = CHUNK / THREADS;

// Where a cell is.
struct Cell {
    int map, y, x;
};
template <int ORDER>
SOKD_DEVICE Cell cell_of(const Areas& args, unsigned index) {
    const unsigned maps = (unsigned)args.maps, height = (unsigned)args.height,
                   width = (unsigned)args.width;
    if (ORDER == LANES)
        return {(int)(index % maps), (int)(index / maps / width), (int)(index / maps % width)};
    return {(int)(index / width / height), (int)(index / width % height), (int)(index % width)};
}

template <class T>
SOKD_DEVICE Acc<T> score_at(const Areas& args, long long n, const Cell& at) {
    const Acc<T> own = to_acc(
        sample_of<T>(args.heat, n)[at.map * args.heat.c + at.y * args.heat.y + at.x * args.heat.x]);
    if (!args.heat_teacher.pointer) return own;
    const Map& map = args.heat_teacher;
    return root(own * to_acc(sample_of<T>(map, n)[at.map * map.c + at.y * map.y + at.x * map.x]));
}

template <class T>
SOKD_DEVICE bool is_peak(const Areas& args, long long n, const Cell& at, Acc<T> score) {
    const long long reach = args.kernel / 2;
    const int top = at.y > reach ? (int)(at.y - reach) : 0,
              left = at.x > reach ? (int)(at.x - reach) : 0;
    const long long below = at.y + reach + 1, beyond = at.x + reach + 1;
    const int bottom = (int)(below < args.height ? below : args.height),
              right = (int)(beyond < args.width ? beyond : args.width);
    bool peak = score > Acc<T>(0);
#pragma unroll 1
    for (int y = top; y < bottom && peak; y++) {
#pragma unroll 1
        for (int x = left; x < right && peak; x++)
            peak = score_at<T>(args, n, {at.map, y, x}) <= score;
    }
    return peak;
}

// Puts on the list what may be a peak: above 0, and no neighbour in the same vector is greater.
// `flat` is the number in the order of work.
template <class T, int ORDER>
SOKD_DEVICE void list_cells(Peak<Acc<T>> (&list)[CHUNK], int& listed, const Areas& args,
    long long n, unsigned chunk, unsigned all) {
    constexpr int V = WIDTH<T>;
    const bool mutual = args.heat_teacher.pointer, along = ORDER == PLANES && args.kernel > 1;
    if (!args.wide) {
#pragma unroll 1
        for (unsigned index = chunk + threadIdx.x; index < all && index < chunk + CHUNK;
            index += THREADS) {
            const Acc<T> score = score_at<T>(args, n, cell_of<ORDER>(args, index));
            if (score > Acc<T>(0)) list[atomicAdd(&listed, 1)] = {score, (int)index};
        }
        return;
    }
    Pack own[CELLS / V], other[CELLS / V];
#pragma unroll
    for (int p = 0; p < CELLS / V; p++) {
        const unsigned first = chunk + (p * THREADS + threadIdx.x) * V;
        if (first < all) own[p] = load_pack(sample_of<T>(args.heat, n) + first);
        if (first < all && mutual) other[p] = load_pack(sample_of<T>(args.heat_teacher, n) + first);
    }
#pragma unroll
    for (int p = 0; p < CELLS / V; p++) {
        const unsigned first = chunk + (p * THREADS + threadIdx.x) * V;
        if (first >= all) continue;
        Acc<T> scores[V];
#pragma unroll
        for (int i = 0; i < V; i++)
            scores[i] = mutual ? root(element<T>(own[p], i) * element<T>(other[p], i))
                               : element<T>(own[p], i);
        unsigned x = along ? first % (unsigned)args.width : 0;
#pragma unroll
        for (int i = 0; i < V; i++) {
            bool may = scores[i] > Acc<T>(0);
            if (along && i > 0 && x > 0) may = may && scores[i > 0 ? i - 1 : 0] <= scores[i];
            x = x + 1 < args.width ? x + 1 : 0;
            if (along && i + 1 < V && x > 0)
                may = may && scores[i + 1 < V ? i + 1 : i] <= scores[i];
            if (may) list[atomicAdd(&listed, 1)] = {scores[i], (int)(first + i)};
        }
    }
}

template <class T, int ORDER>
SOKD_DEVICE void scan(const Areas& args) {
    using A = Acc<T>;
    SOKD_SHARED(Peak<A>, bests, [WARPS]);
    SOKD_SHARED(Peak<A>, list, [CHUNK]);
    SOKD_SHARED(int, listed, [2]);
    const unsigned chunks = (unsigned)args.chunks,
                   all = (unsigned)(args.maps * args.height * args.width);
    const long long n = blockIdx.x / chunks;
    const unsigned chunk = blockIdx.x % chunks * CHUNK;
    if (threadIdx.x < 2) listed[threadIdx.x] = 0;
    __syncthreads();
    list_cells<T, ORDER>(list, listed[0], args, n, chunk, all);
    __syncthreads();
    Peak<A> best{A(0), -1};
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < listed[0]; i += THREADS) {
        Peak<A> own = list[i];
        const Cell at = cell_of<ORDER>(args, (unsigned)own.flat);
        own.flat = is_peak<T>(args, n, at, own.score)
                       ? (int)((at.map * args.height + at.y) * args.width + at.x)
                       : -1;
        list[i].flat = own.flat;
        if (own.beats(best)) best = own;
    }
    best = best_of_warp(best);
    if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
    __syncthreads();
    // Eight peaks of eight warps: with k <= 8, a peak worse than all of them is not one of the k
    // best.
    Peak<A> bound = bests[0];
    for (int warp = 1; warp < WARPS; warp++) {
        if (bound.beats(bests[warp])) bound = bests[warp];
    }
    if (args.k > WARPS) bound.flat = -1;
    Peak<A> own[CELLS];
#pragma unroll
    for (int i = 0; i < CELLS; i++) {
        const int at = i * THREADS + (int)threadIdx.x;
        own[i].flat = -1;
        if (at < listed[0]) own[i] = list[at];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CELLS; i++) {
        if (own[i].flat >= 0 && !bound.beats(own[i])) list[atomicAdd(&listed[1], 1)] = own[i];
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    Peak<A> last{A(0), -1};
    for (int k = 0; k < args.kept; k++) {
        Peak<A> next{A(0), -1};
        for (int i = (int)threadIdx.x; i < listed[1]; i += 32) {
            if ((k == 0 || last.beats(list[i])) && list[i].beats(next)) next = list[i];
        }
        if (k == 0 || last.flat >= 0) last = best_of_warp(next);
        if (threadIdx.x != 0) continue;
        ((A*)args.candidate_scores)[blockIdx.x * args.kept + k] = last.score;
        ((long long*)args.candidate_cells)[blockIdx.x * args.kept + k] = last.flat;
    }
}

SOKD_ENTRIES(areas_scan, Areas, scan)
#endif

#if SOKD_KERNELS & 2
// Width and height, or x and y, at a cell.
template <class A>
struct Pair {
    A of[2];
};
template <class T>
SOKD_DEVICE Pair<Acc<T>> pair_at(
    const Map& student, const Map& teacher, long long n, int y, int x) {
    Pair<Acc<T>> pair;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        pair.of[i] = to_acc(
            sample_of<T>(student, n)[i * student.c + y * student.y + x * student.x]);
        if (teacher.pointer)
            pair.of[i] = Acc<T>(0.5) *
                         (pair.of[i] + to_acc(sample_of<T>(teacher,
                                           n)[i * teacher.c + y * teacher.y + x * teacher.x]));
    }
    return pair;
}

// Into 0 .. last, towards zero; a NaN becomes 0.
SOKD_DEVICE long long corner_of(double value, long long last) {
    return !(value >= 0.0) ? 0 : value > (double)last ? last : (long long)value;
}

// y0 x0 y1 x1 of the box at a peak.
template <class T>
SOKD_DEVICE void write_box(
    const Areas& args, long long n, const Peak<Acc<T>>& peak, long long* box) {
    using A = Acc<T>;
    if (peak.flat < 0) {
        box[0] = box[1] = 0;
        box[2] = box[3] = -1;
        return;
    }
    const unsigned width = (unsigned)args.width,
                   cell = (unsigned)peak.flat % (unsigned)(args.height * args.width);
    const int y = (int)(cell / width), x = (int)(cell % width);
    const Pair<A> size = pair_at<T>(args.size, args.size_teacher, n, y, x),
                  offset = pair_at<T>(args.offset, args.offset_teacher, n, y, x);
    const A centre_x = A(x) + offset.of[0], centre_y = A(y) + offset.of[1],
            reach_x = A(0.5) * size.of[0], reach_y = A(0.5) * size.of[1];
    box[0] = corner_of(centre_y - reach_y, args.height - 1);
    box[1] = corner_of(centre_x - reach_x, args.width - 1);
    box[2] = corner_of(centre_y + reach_y, args.height - 1);
    box[3] = corner_of(centre_x + reach_x, args.width - 1);
}

// How many of the sample's boxes are over each cell.
SOKD_DEVICE void cover(const Areas& args, long long n) {
    constexpr int BATCH = 64;
    SOKD_SHARED(int, boxes, [BATCH][4]);
    const long long cells = args.height * args.width;
    float* coverage = (float*)args.coverage + n * cells;
    for (long long first = 0; first < args.k; first += BATCH) {
        const int count = (int)(args.k - first < BATCH ? args.k - first : BATCH);
        __syncthreads();
        const int i = (int)threadIdx.x;
        if (i < count * 4)
            boxes[i / 4][i % 4] = (int)((const long long*)args.boxes)[(n * args.k + first) * 4 + i];
        __syncthreads();
        for (long long cell = threadIdx.x; cell < cells; cell += THREADS) {
            const int y = (int)((unsigned)cell / (unsigned)args.width),
                      x = (int)((unsigned)cell % (unsigned)args.width);
            float over = first == 0 ? 0.0f : coverage[cell];
            for (int b = 0; b < count; b++)
                over += y >= boxes[b][0] && x >= boxes[b][1] && y <= boxes[b][2] && x <= boxes[b][3]
                            ? 1.0f
                            : 0.0f;
            coverage[cell] = over;
        }
    }
}

template <class T>
SOKD_DEVICE void pick(const Areas& args) {
    using A = Acc<T>;
    SOKD_SHARED(Peak<A>, bests, [2][WARPS]);
    const long long n = blockIdx.x, count = args.chunks * args.kept;
    const A* scores = (const A*)args.candidate_scores + n * count;
    const long long* cells = (const long long*)args.candidate_cells + n * count;
    Peak<A> last{A(0), -1};
    for (long long k = 0; k < args.k; k++) {
        Peak<A> next{A(0), -1};
        for (long long i = threadIdx.x; i < count && (k == 0 || last.flat >= 0); i += THREADS) {
            const Peak<A> own{scores[i], (int)cells[i]};
            if ((k == 0 || last.beats(own)) && own.beats(next)) next = own;
        }
        next = best_of_warp(next);
        // Two rows in turn, so that one barrier a round is enough.
        if (threadIdx.x % 32 == 0) bests[k & 1][threadIdx.x / 32] = next;
        __syncthreads();
        last = bests[k & 1][0];
        for (int warp = 1; warp < WARPS; warp++) {
            if (bests[k & 1][warp].beats(last)) last = bests[k & 1][warp];
        }
        if (threadIdx.x != 0) continue;
        ((A*)args.scores)[n * args.k + k] = last.flat < 0 ? A(0) : last.score;
        write_box<T>(args, n, last, (long long*)args.boxes + (n * args.k + k) * 4);
    }
    cover(args, n);
}

SOKD_IF_F32(SOKD_ENTRY(areas_pick_f32, Areas, pick<float>))
SOKD_IF_F16(SOKD_ENTRY(areas_pick_f16, Areas, pick<Half>))
SOKD_IF_BF16(SOKD_ENTRY(areas_pick_bf16, Areas, pick<BFloat>))
SOKD_IF_F64(SOKD_ENTRY(areas_pick_f64, Areas, pick<double>))
#endif
