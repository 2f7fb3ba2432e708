//! The noise of [`LANES`] planes in AVX-512's registers: compilers do not emit the multiplier.

use super::philox::{Planes, COS, LN, LN_TWO, LOW, MULTIPLIERS, ROOT_HALF, SIN, TURN};
use crate::simd::{Avx512, LANES};
use std::arch::x86_64::*;

/// The words alone.
#[cfg(test)]
#[target_feature(enable = "avx512f")]
pub(crate) fn words_avx512(_: Avx512, planes: &Planes, quad: u32) -> [[u32; LANES]; 4] {
    let [words] = registers::<1>(planes, quad);
    // SAFETY: both are 64 bytes without padding.
    words.map(|word| unsafe { std::mem::transmute::<__m512i, [u32; LANES]>(word) })
}

/// `normal_pair` with the same operations in the same order.
///
/// All words first, then the normals: one long chain of operations for both would overlap less.
#[target_feature(enable = "avx512f")]
pub(crate) fn normals_avx512(_: Avx512, planes: &Planes, quad: u32, out: &mut [[[f32; LANES]; 4]]) {
    let mut quad = quad;
    let (pairs, rest) = out.as_chunks_mut::<2>();
    for pair in pairs {
        store(registers::<2>(planes, quad), pair);
        quad = quad.wrapping_add(2);
    }
    if let [last] = rest {
        store(registers::<1>(planes, quad), std::array::from_mut(last));
    }
    for [first, second] in out.as_flattened_mut().as_chunks_mut::<2>().0 {
        // SAFETY: both rows are 64 bytes.
        unsafe {
            let words = |row: &[f32; LANES]| _mm512_loadu_si512(row.as_ptr().cast());
            let (a, b) = pair_avx512(words(first), words(second));
            _mm512_storeu_ps(first.as_mut_ptr(), a);
            _mm512_storeu_ps(second.as_mut_ptr(), b);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const N: usize>(words: [[__m512i; 4]; N], out: &mut [[[f32; LANES]; 4]; N]) {
    for i in 0..N {
        for w in 0..4 {
            // SAFETY: a row is 64 bytes.
            unsafe { _mm512_storeu_si512(out[i][w].as_mut_ptr().cast(), words[i][w]) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pair_avx512(radius: __m512i, angle: __m512i) -> (__m512, __m512) {
    let unit = _mm512_set1_ps(1.0 / 4_294_967_296.0);
    let uniform =
        _mm512_fmadd_ps(_mm512_cvtepu32_ps(radius), unit, _mm512_set1_ps(0.5 / 4_294_967_296.0));
    let r = _mm512_sqrt_ps(_mm512_mul_ps(_mm512_set1_ps(-2.0), ln_avx512(uniform)));
    let (sin, cos) = sin_cos_turn_avx512(angle);
    (_mm512_mul_ps(r, cos), _mm512_mul_ps(r, sin))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn ln_avx512(x: __m512) -> __m512 {
    let root_half = _mm512_set1_epi32(ROOT_HALF);
    let shifted = _mm512_sub_epi32(_mm512_castps_si512(x), root_half);
    let exponent = _mm512_cvtepi32_ps(_mm512_srai_epi32::<23>(shifted));
    let fraction = _mm512_and_si512(shifted, _mm512_set1_epi32(0x007f_ffff));
    let f = _mm512_castsi512_ps(_mm512_add_epi32(fraction, root_half));
    let f = _mm512_sub_ps(f, _mm512_set1_ps(1.0));
    let square = _mm512_mul_ps(f, f);
    let mut p = _mm512_set1_ps(LN[0]);
    for c in &LN[1..] {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*c));
    }
    let p = _mm512_mul_ps(_mm512_mul_ps(p, f), square);
    let tail = _mm512_fmadd_ps(exponent, _mm512_set1_ps(LN_TWO[1]), p);
    let sum = _mm512_add_ps(_mm512_fmadd_ps(_mm512_set1_ps(-0.5), square, tail), f);
    _mm512_fmadd_ps(exponent, _mm512_set1_ps(LN_TWO[0]), sum)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sin_cos_turn_avx512(turn: __m512i) -> (__m512, __m512) {
    // The quadrant is in the upper two bits, what remains of the turn in the others, signed.
    let turned = _mm512_add_epi32(turn, _mm512_set1_epi32(1 << 29));
    let rest = _mm512_srai_epi32::<2>(_mm512_slli_epi32::<2>(turn));
    let x = _mm512_mul_ps(_mm512_cvtepi32_ps(rest), _mm512_set1_ps(TURN));
    let z = _mm512_mul_ps(x, x);
    let s = _mm512_fmadd_ps(_mm512_set1_ps(SIN[0]), z, _mm512_set1_ps(SIN[1]));
    let s = _mm512_fmadd_ps(s, z, _mm512_set1_ps(SIN[2]));
    let sin = _mm512_fmadd_ps(_mm512_mul_ps(s, z), x, x);
    let c = _mm512_fmadd_ps(_mm512_set1_ps(COS[0]), z, _mm512_set1_ps(COS[1]));
    let c = _mm512_fmadd_ps(c, z, _mm512_set1_ps(COS[2]));
    let rough = _mm512_fmadd_ps(_mm512_set1_ps(-0.5), z, _mm512_set1_ps(1.0));
    let cos = _mm512_fmadd_ps(_mm512_mul_ps(c, z), z, rough);
    let swap = _mm512_test_epi32_mask(turned, _mm512_set1_epi32(1 << 30));
    let next = _mm512_add_epi32(turned, _mm512_set1_epi32(1 << 30));
    (
        flip_avx512(_mm512_mask_blend_ps(swap, sin, cos), turned),
        flip_avx512(_mm512_mask_blend_ps(swap, cos, sin), next),
    )
}

/// The value, negative where the uppermost bit is set.
#[inline]
#[target_feature(enable = "avx512f")]
fn flip_avx512(value: __m512, bits: __m512i) -> __m512 {
    let sign = _mm512_set1_epi32(i32::MIN);
    _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0x78>(_mm512_castps_si512(value), bits, sign))
}

/// The words of `N` blocks of four positions.
///
/// Eight counters in each register, their words in the low halves of 64-bit lanes; high halves are
/// left dirty. The rounds of one chain depend on each other: the chains of several blocks run in
/// parallel.
#[inline]
#[target_feature(enable = "avx512f")]
fn registers<const N: usize>(planes: &Planes, quad: u32) -> [[__m512i; 4]; N] {
    let mut chains = [[[_mm512_setzero_si512(); 4]; 2]; N];
    for i in 0..N {
        let position = u64::from(quad.wrapping_add(i as u32)) * MULTIPLIERS[0];
        for half in 0..2 {
            chains[i][half] = start_avx512(planes, 8 * half, position >> 32, position & LOW);
        }
    }
    for key in &planes.keys.0[2..] {
        for i in 0..N {
            chains[i][0] = round_avx512(chains[i][0], key);
            chains[i][1] = round_avx512(chains[i][1], key);
        }
    }
    let mut words = [[_mm512_setzero_si512(); 4]; N];
    for i in 0..N {
        for w in 0..4 {
            words[i][w] =
                _mm512_mask_shuffle_epi32::<0xa0>(chains[i][0][w], 0xaaaa, chains[i][1][w]);
        }
    }
    words
}

/// The counters of eight planes before the third round.
#[inline]
#[target_feature(enable = "avx512f")]
fn start_avx512(planes: &Planes, from: usize, high: u64, low: u64) -> [__m512i; 4] {
    // SAFETY: eight of LANES entries from 0 or 8.
    let at = |lanes: &[u64; LANES]| unsafe { _mm512_loadu_si512(lanes[from..].as_ptr().cast()) };
    let third = _mm512_xor_si512(at(&planes.third), _mm512_set1_epi64(high as i64));
    let odd = _mm512_mul_epu32(third, _mm512_set1_epi64(MULTIPLIERS[1] as i64));
    let [first, second, fourth] = &planes.second_round;
    let c0 = _mm512_xor_si512(_mm512_srli_epi64::<32>(odd), at(first));
    [c0, odd, _mm512_xor_si512(at(second), _mm512_set1_epi64(low as i64)), at(fourth)]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn round_avx512([c0, c1, c2, c3]: [__m512i; 4], key: &[u64; 2]) -> [__m512i; 4] {
    let even = _mm512_mul_epu32(c0, _mm512_set1_epi64(MULTIPLIERS[0] as i64));
    let odd = _mm512_mul_epu32(c2, _mm512_set1_epi64(MULTIPLIERS[1] as i64));
    let key = [_mm512_set1_epi64(key[0] as i64), _mm512_set1_epi64(key[1] as i64)];
    let c0 = _mm512_ternarylogic_epi64::<0x96>(_mm512_srli_epi64::<32>(odd), c1, key[0]);
    let c2 = _mm512_ternarylogic_epi64::<0x96>(_mm512_srli_epi64::<32>(even), c3, key[1]);
    [c0, odd, c2, even]
}
