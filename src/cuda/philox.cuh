// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and normals
// from it: the bits of src/random/philox.rs.
//
// Counter words: (position / 4, 0, plane low, plane high) with plane = n*C + c, position = y*W + x;
// the key is the seed. The four words make the normals of the positions 4*q .. 4*q+3. Every
// operation rounds as on the CPU (multiply-adds are written out), so the normals have the same
// bits, too.
#pragma once
#include "common.cuh"

struct Words {
    unsigned w[4];
};
struct Normals {
    float of[4];
};

SOKD_DEVICE Words philox(
    unsigned key0, unsigned key1, unsigned c0, unsigned c1, unsigned c2, unsigned c3) {
#ifndef SOKD_EMULATOR
    // The keys of a round are two additions. The compiler would hoist all twenty out of a loop into
    // registers, and the part of the first rounds that depends on the plane, too.
    asm volatile("" : "+r"(key0), "+r"(key1), "+r"(c2));
#endif
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long even = 0xD2511F53ull * c0, odd = 0xCD9E8D57ull * c2;
        c0 = (unsigned)(odd >> 32) ^ c1 ^ key0;
        c2 = (unsigned)(even >> 32) ^ c3 ^ key1;
        c1 = (unsigned)odd;
        c3 = (unsigned)even;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Natural logarithm on [2^-33, 1].
SOKD_DEVICE float natural_log(float x) {
    const int shifted = (int)(__float_as_uint(x) - 0x3f3504f3u);
    const float exponent = (float)(shifted >> 23);
    const float f = __uint_as_float((unsigned)(shifted & 0x007fffff) + 0x3f3504f3u) - 1.0f;
    float p = 7.0376836e-2f;
    p = fmaf(p, f, -1.151461e-1f);
    p = fmaf(p, f, 1.16769987e-1f);
    p = fmaf(p, f, -1.2420141e-1f);
    p = fmaf(p, f, 1.4249323e-1f);
    p = fmaf(p, f, -1.6668058e-1f);
    p = fmaf(p, f, 2.0000715e-1f);
    p = fmaf(p, f, -2.4999994e-1f);
    p = fmaf(p, f, 3.333333e-1f);
    const float square = f * f, tail = fmaf(exponent, -2.1219444e-4f, p * f * square);
    return fmaf(exponent, 355.0f / 512.0f, fmaf(-0.5f, square, tail) + f);
}

// The square root of 0 or of 1e-7 .. 46, correctly rounded: the compiler's code for
// sqrtf, without its call for numbers out of that range.
SOKD_DEVICE float radius_of(float square) {
#ifdef SOKD_EMULATOR
    return sqrtf(square);
#else
    float inverse;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(inverse) : "f"(square));
    const float guess = square * inverse, half = 0.5f * inverse;
    return square == 0.0f ? 0.0f : fmaf(fmaf(-guess, guess, square), half, guess);
#endif
}

struct Turn {
    float sine, cosine;
};
// Of a signed turn in units of 2^-32: the quadrant is exact, the rest a short polynomial.
SOKD_DEVICE Turn turn_of(unsigned turn) {
    const int quadrant = (int)(turn + (1u << 29)) >> 30;
    const int rest = (int)(turn - ((unsigned)quadrant << 30));
    const float x = (float)rest * (6.2831855f / 4294967296.0f), z = x * x;
    const float s = fmaf(fmaf(-1.9515296e-4f, z, 8.332161e-3f), z, -1.6666655e-1f);
    const float c = fmaf(fmaf(2.4433157e-5f, z, -1.3887316e-3f), z, 4.1666646e-2f);
    const float sine = fmaf(s * z, x, x), cosine = fmaf(c * z, z, fmaf(-0.5f, z, 1.0f));
    const unsigned swap = (unsigned)quadrant & 1u, flip_s = ((unsigned)quadrant & 2u) << 30,
                   flip_c = ((unsigned)(quadrant + 1) & 2u) << 30;
    return {__uint_as_float(__float_as_uint(swap ? cosine : sine) ^ flip_s),
        __uint_as_float(__float_as_uint(swap ? sine : cosine) ^ flip_c)};
}

// The four positions of block `quad` of a plane.
SOKD_DEVICE Normals normals(unsigned key0, unsigned key1, unsigned long long plane, unsigned quad) {
    const Words words = philox(key0, key1, quad, 0u, (unsigned)plane, (unsigned)(plane >> 32));
    Normals out;
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
        const float uniform = fmaf(
            (float)words.w[pair], 1.0f / 4294967296.0f, 0.5f / 4294967296.0f);
        const float radius = radius_of(-2.0f * natural_log(uniform));
        const Turn turn = turn_of(words.w[pair + 1]);
        out.of[pair] = radius * turn.cosine;
        out.of[pair + 1] = radius * turn.sine;
    }
    return out;
}
