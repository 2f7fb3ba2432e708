//! A vector of [`LANES`] numbers and what is done with vectors, in the registers of a level.
//!
//! For plain arrays the compiler sometimes emits scalar code, or gathers and scatters over several
//! rows. All implementations round in the same way.

use super::{Real, Simd, LANES};

/// [`LANES`] numbers side by side. Constructors take the token of the level `S`: proof of it.
pub(crate) trait Vector<A: Real, S>: Copy {
    fn load(simd: S, from: &[A; LANES]) -> Self;
    /// From memory, widened if need be.
    fn load_f32(simd: S, from: &[f32; LANES]) -> Self;
    fn splat(simd: S, value: A) -> Self;
    fn store(self, to: &mut [A; LANES]);
    /// self * b + c, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    /// self where it is greater than other, else other (which may be NaN).
    fn larger(self, other: Self) -> Self;
    /// Bitwise and.
    fn and(self, other: Self) -> Self;

    /// All lanes in f64.
    #[inline(always)]
    fn wide(self) -> [f64; LANES] {
        let mut lanes = [A::default(); LANES];
        self.store(&mut lanes);
        lanes.map(A::to_f64)
    }
}

/// An array, for the compiler to vectorise.
#[derive(Clone, Copy)]
pub(crate) struct Plain<A>([A; LANES]);

impl<A: Real> Plain<A> {
    #[inline(always)]
    fn each(value: impl Fn(usize) -> A) -> Self {
        let mut lanes = [A::default(); LANES];
        for l in 0..LANES {
            lanes[l] = value(l);
        }
        Self(lanes)
    }
}

impl<A: Real, S: Simd> Vector<A, S> for Plain<A> {
    #[inline(always)]
    fn load(_: S, from: &[A; LANES]) -> Self {
        Self(*from)
    }
    #[inline(always)]
    fn load_f32(_: S, from: &[f32; LANES]) -> Self {
        Self::each(|l| A::of_f32(from[l]))
    }
    #[inline(always)]
    fn store(self, to: &mut [A; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn splat(_: S, value: A) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Self::each(|l| self.0[l].fma(b.0[l], c.0[l]))
    }
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        Self::each(|l| self.0[l] * other.0[l])
    }
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        Self::each(|l| self.0[l] + other.0[l])
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        Self::each(|l| self.0[l] - other.0[l])
    }
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        Self::each(|l| if self.0[l] > other.0[l] { self.0[l] } else { other.0[l] })
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self::each(|l| self.0[l].and(other.0[l]))
    }
}

/// The registers of AVX2 and AVX-512; a level's token alone makes a vector.
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::{Vector, LANES};
    use crate::simd::{Avx2, Avx512};
    use std::arch::x86_64::*;

    macro_rules! vector {
        (
            $name:ident, $level:ident, $a:ty, $register:ty, $parts:expr, $load:ident, $widen:expr,
            $store:ident, $splat:ident, $fma:ident, $($method:ident $of_two:ident),*
        ) => {
            /// A vector in registers.
            #[derive(Clone, Copy)]
            pub(crate) struct $name([$register; $parts]);

            impl $name {
                #[inline(always)]
                fn each(part: impl Fn(usize) -> $register) -> Self {
                    let mut parts = [part(0); $parts];
                    let mut i = 1;
                    while i < $parts {
                        parts[i] = part(i);
                        i += 1;
                    }
                    Self(parts)
                }
            }

            impl Vector<$a, $level> for $name {
                #[inline(always)]
                fn load(_: $level, from: &[$a; LANES]) -> Self {
                    // SAFETY: within the row; the token proves that the CPU has these instructions,
                    // a vector in all that follows.
                    Self::each(|i| unsafe { $load(from.as_ptr().add(i * LANES / $parts)) })
                }
                #[inline(always)]
                fn load_f32(_: $level, from: &[f32; LANES]) -> Self {
                    // SAFETY: within the row.
                    Self::each(|i| unsafe { $widen(from.as_ptr().add(i * LANES / $parts)) })
                }
                #[inline(always)]
                fn store(self, to: &mut [$a; LANES]) {
                    for i in 0..$parts {
                        // SAFETY: within the row.
                        unsafe { $store(to.as_mut_ptr().add(i * LANES / $parts), self.0[i]) }
                    }
                }
                #[inline(always)]
                fn splat(_: $level, value: $a) -> Self {
                    // SAFETY: see `load`.
                    Self([unsafe { $splat(value) }; $parts])
                }
                #[inline(always)]
                fn fma(self, b: Self, c: Self) -> Self {
                    // SAFETY: see `load`.
                    Self::each(|i| unsafe { $fma(self.0[i], b.0[i], c.0[i]) })
                }
                $(#[inline(always)]
                fn $method(self, other: Self) -> Self {
                    // SAFETY: see `load`.
                    Self::each(|i| unsafe { $of_two(self.0[i], other.0[i]) })
                })*
            }
        };
    }
    vector! {
        Avx512F32, Avx512, f32, __m512, 1, _mm512_loadu_ps, _mm512_loadu_ps, _mm512_storeu_ps,
        _mm512_set1_ps, _mm512_fmadd_ps, times _mm512_mul_ps, plus _mm512_add_ps,
        minus _mm512_sub_ps, larger _mm512_max_ps, and _mm512_and_ps
    }
    vector! {
        Avx512F64, Avx512, f64, __m512d, 2, _mm512_loadu_pd,
        |from| _mm512_cvtps_pd(_mm256_loadu_ps(from)), _mm512_storeu_pd, _mm512_set1_pd,
        _mm512_fmadd_pd, times _mm512_mul_pd, plus _mm512_add_pd, minus _mm512_sub_pd,
        larger _mm512_max_pd, and _mm512_and_pd
    }
    vector! {
        Avx2F32, Avx2, f32, __m256, 2, _mm256_loadu_ps, _mm256_loadu_ps, _mm256_storeu_ps,
        _mm256_set1_ps, _mm256_fmadd_ps, times _mm256_mul_ps, plus _mm256_add_ps,
        minus _mm256_sub_ps, larger _mm256_max_ps, and _mm256_and_ps
    }
    vector! {
        Avx2F64, Avx2, f64, __m256d, 4, _mm256_loadu_pd,
        |from| _mm256_cvtps_pd(_mm_loadu_ps(from)), _mm256_storeu_pd, _mm256_set1_pd,
        _mm256_fmadd_pd, times _mm256_mul_pd, plus _mm256_add_pd, minus _mm256_sub_pd,
        larger _mm256_max_pd, and _mm256_and_pd
    }
}
