//! The noise of [`LANES`] planes in AVX2's registers, from the counters to the normals.

use super::philox::{Planes, COS, LN, LN_TWO, LOW, MULTIPLIERS, ROOT_HALF, SIN, TURN};
use crate::simd::{Avx2, LANES};
use std::arch::x86_64::*;

/// Lanes of one register.
const HALF: usize = LANES / 2;

/// The words alone.
#[cfg(test)]
#[target_feature(enable = "avx2")]
pub(crate) fn words_avx2(_: Avx2, planes: &Planes, quad: u32) -> [[u32; LANES]; 4] {
    let mut words = [[0; LANES]; 4];
    for from in [0, HALF] {
        for (word, lanes) in words.iter_mut().zip(registers(planes, quad, from)) {
            // SAFETY: eight words from 0 or 8, below LANES.
            unsafe { _mm256_storeu_si256(word[from..].as_mut_ptr().cast(), lanes) };
        }
    }
    words
}

/// `normal_pair` with the same operations in the same order.
///
/// All words first, then the normals: one long chain of operations for both would overlap less.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn normals_avx2(_: Avx2, planes: &Planes, quad: u32, out: &mut [[[f32; LANES]; 4]]) {
    for (i, four) in out.iter_mut().enumerate() {
        for from in [0, HALF] {
            let words = registers(planes, quad.wrapping_add(i as u32), from);
            for (row, word) in four.iter_mut().zip(words) {
                // SAFETY: eight words from 0 or 8, below LANES.
                unsafe { _mm256_storeu_si256(row[from..].as_mut_ptr().cast(), word) };
            }
        }
    }
    for [first, second] in out.as_flattened_mut().as_chunks_mut::<2>().0 {
        for from in [0, HALF] {
            // SAFETY: eight numbers of each row, from 0 or 8.
            unsafe {
                let words = |row: &[f32; LANES]| _mm256_loadu_si256(row[from..].as_ptr().cast());
                let (a, b) = pair(words(first), words(second));
                _mm256_storeu_ps(first[from..].as_mut_ptr(), a);
                _mm256_storeu_ps(second[from..].as_mut_ptr(), b);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn pair(radius: __m256i, angle: __m256i) -> (__m256, __m256) {
    let unit = _mm256_set1_ps(1.0 / 4_294_967_296.0);
    let uniform = _mm256_fmadd_ps(float(radius), unit, _mm256_set1_ps(0.5 / 4_294_967_296.0));
    let r = _mm256_sqrt_ps(_mm256_mul_ps(_mm256_set1_ps(-2.0), ln(uniform)));
    let (sin, cos) = sin_cos_turn(angle);
    (_mm256_mul_ps(r, cos), _mm256_mul_ps(r, sin))
}

/// From unsigned integers: both halves are exact, and their sum is rounded once.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn float(word: __m256i) -> __m256 {
    let high = _mm256_cvtepi32_ps(_mm256_srli_epi32::<16>(word));
    let low = _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32(0xffff)));
    _mm256_fmadd_ps(high, _mm256_set1_ps(65_536.0), low)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn ln(x: __m256) -> __m256 {
    let root_half = _mm256_set1_epi32(ROOT_HALF);
    let shifted = _mm256_sub_epi32(_mm256_castps_si256(x), root_half);
    let exponent = _mm256_cvtepi32_ps(_mm256_srai_epi32::<23>(shifted));
    let fraction = _mm256_and_si256(shifted, _mm256_set1_epi32(0x007f_ffff));
    let f = _mm256_castsi256_ps(_mm256_add_epi32(fraction, root_half));
    let f = _mm256_sub_ps(f, _mm256_set1_ps(1.0));
    let square = _mm256_mul_ps(f, f);
    let mut p = _mm256_set1_ps(LN[0]);
    for c in &LN[1..] {
        p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(*c));
    }
    let p = _mm256_mul_ps(_mm256_mul_ps(p, f), square);
    let tail = _mm256_fmadd_ps(exponent, _mm256_set1_ps(LN_TWO[1]), p);
    let sum = _mm256_add_ps(_mm256_fmadd_ps(_mm256_set1_ps(-0.5), square, tail), f);
    _mm256_fmadd_ps(exponent, _mm256_set1_ps(LN_TWO[0]), sum)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn sin_cos_turn(turn: __m256i) -> (__m256, __m256) {
    // The quadrant is in the upper two bits, what remains of the turn in the others, signed.
    let turned = _mm256_add_epi32(turn, _mm256_set1_epi32(1 << 29));
    let rest = _mm256_srai_epi32::<2>(_mm256_slli_epi32::<2>(turn));
    let x = _mm256_mul_ps(_mm256_cvtepi32_ps(rest), _mm256_set1_ps(TURN));
    let z = _mm256_mul_ps(x, x);
    let s = _mm256_fmadd_ps(_mm256_set1_ps(SIN[0]), z, _mm256_set1_ps(SIN[1]));
    let s = _mm256_fmadd_ps(s, z, _mm256_set1_ps(SIN[2]));
    let sin = _mm256_fmadd_ps(_mm256_mul_ps(s, z), x, x);
    let c = _mm256_fmadd_ps(_mm256_set1_ps(COS[0]), z, _mm256_set1_ps(COS[1]));
    let c = _mm256_fmadd_ps(c, z, _mm256_set1_ps(COS[2]));
    let rough = _mm256_fmadd_ps(_mm256_set1_ps(-0.5), z, _mm256_set1_ps(1.0));
    let cos = _mm256_fmadd_ps(_mm256_mul_ps(c, z), z, rough);
    // A blend goes by the sign: the lower bit of the quadrant moves there.
    let swap = _mm256_castsi256_ps(_mm256_slli_epi32::<1>(turned));
    let next = _mm256_add_epi32(turned, _mm256_set1_epi32(1 << 30));
    (flip(_mm256_blendv_ps(sin, cos, swap), turned), flip(_mm256_blendv_ps(cos, sin, swap), next))
}

/// The value, negative where the uppermost bit is set.
#[inline]
#[target_feature(enable = "avx2")]
fn flip(value: __m256, bits: __m256i) -> __m256 {
    let sign = _mm256_and_si256(bits, _mm256_set1_epi32(i32::MIN));
    _mm256_xor_ps(value, _mm256_castsi256_ps(sign))
}

/// The four words of eight planes, `from` 0 or 8, for one block of four positions.
///
/// Four counters in each register, their words in the low halves of 64-bit lanes; high halves are
/// left dirty. The rounds of one chain depend on each other: the chains of even and odd planes run
/// in parallel.
#[inline]
#[target_feature(enable = "avx2")]
fn registers(planes: &Planes, quad: u32, from: usize) -> [__m256i; 4] {
    let position = u64::from(quad) * MULTIPLIERS[0];
    let mut even = start(planes, from / 2, position >> 32, position & LOW);
    let mut odd = start(planes, HALF + from / 2, position >> 32, position & LOW);
    for key in &planes.keys.0[2..] {
        even = round(even, key);
        odd = round(odd, key);
    }
    let merge = |i: usize| _mm256_blend_epi32::<0xaa>(even[i], _mm256_slli_epi64::<32>(odd[i]));
    [merge(0), merge(1), merge(2), merge(3)]
}

/// The counters of four planes before the third round.
#[inline]
#[target_feature(enable = "avx2")]
fn start(planes: &Planes, from: usize, high: u64, low: u64) -> [__m256i; 4] {
    // SAFETY: four of LANES entries from a multiple of four.
    let at = |lanes: &[u64; LANES]| unsafe { _mm256_loadu_si256(lanes[from..].as_ptr().cast()) };
    let third = _mm256_xor_si256(at(&planes.third), _mm256_set1_epi64x(high as i64));
    let odd = _mm256_mul_epu32(third, _mm256_set1_epi64x(MULTIPLIERS[1] as i64));
    let [first, second, fourth] = &planes.second_round;
    let c0 = _mm256_xor_si256(_mm256_srli_epi64::<32>(odd), at(first));
    [c0, odd, _mm256_xor_si256(at(second), _mm256_set1_epi64x(low as i64)), at(fourth)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn round([c0, c1, c2, c3]: [__m256i; 4], key: &[u64; 2]) -> [__m256i; 4] {
    let even = _mm256_mul_epu32(c0, _mm256_set1_epi64x(MULTIPLIERS[0] as i64));
    let odd = _mm256_mul_epu32(c2, _mm256_set1_epi64x(MULTIPLIERS[1] as i64));
    let key = [_mm256_set1_epi64x(key[0] as i64), _mm256_set1_epi64x(key[1] as i64)];
    let c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64::<32>(odd), c1), key[0]);
    let c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64::<32>(even), c3), key[1]);
    [c0, odd, c2, even]
}
