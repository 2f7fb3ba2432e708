// A policy's random draws.
// word = philox4x32_10(counter = (block, 0xFFFFFFFF, counter), key = seed)
// noise_seed = words 0 and 1 of block 0
// uniforms[i] = ((word i % 4 of block 1 + i / 4) >> 9) + 1/2) * 2^-23
//
// Launch: bit 1 draw, structure Draw; grid ceil((1 + ceil(count / 4)) / 256): a block of words for
// each thread. No dtype, no order in its name.
#include "common.cuh"
#include "philox.cuh"

struct Draw {
    unsigned long long uniforms;    // [count] f32, contiguous
    unsigned long long noise_seed;  // [1] i64
    unsigned long long seed;        // [1] i64
    unsigned long long counter;     // [1] i64
    long long count;
};

SOKD_DEVICE void draw_words(const Draw& args) {
    const unsigned block = blockIdx.x * THREADS + threadIdx.x;
    const long long first = ((long long)block - 1) * 4;
    if (first >= args.count) return;
    const auto seed = load<unsigned long long>(args.seed, 0),
               counter = load<unsigned long long>(args.counter, 0);
    const Words words = philox((unsigned)seed, (unsigned)(seed >> 32), block, 0xffffffffu,
        (unsigned)counter, (unsigned)(counter >> 32));
    if (block == 0)
        *(unsigned long long*)args.noise_seed = words.w[0] | (unsigned long long)words.w[1] << 32;
    for (int i = 0; i < 4; i++) {
        if (first < 0 || first + i >= args.count) continue;
        ((float*)args.uniforms)[first + i] = ((float)(words.w[i] >> 9) + 0.5f) *
                                             (1.0f / 8388608.0f);
    }
}

SOKD_ENTRY(draw, Draw, draw_words)
