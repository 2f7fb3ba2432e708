//! Transposes of 16 x 16 squares: rows of consecutive elements become lanes side by side, and back.

use super::{Level, Simd, LANES};

/// A square of lanes.
pub(crate) type Square<A> = [[A; LANES]; LANES];

/// Transposes a square of any type.
#[inline(always)]
pub(crate) fn transpose_any<A: Copy, S: Simd>(_: S, from: &Square<A>, to: &mut Square<A>) {
    for i in 0..LANES {
        for j in 0..LANES {
            to[i][j] = from[j][i];
        }
    }
}

/// Transposes a square of f32, in registers where the level has them.
#[inline(always)]
pub(crate) fn transpose_f32<S: Simd>(simd: S, from: &Square<f32>, to: &mut Square<f32>) {
    match simd.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the features.
        Level::Avx512(simd) => unsafe { x86::transpose_avx512(simd, from, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2(simd) => unsafe { x86::transpose_avx2(simd, from, to) },
        Level::Scalar => transpose_any(simd, from, to),
    }
}

/// Loads 16 elements of each plane, from `at` on, as the columns of a square.
///
/// # Safety
/// They must be readable.
#[inline(always)]
pub(crate) unsafe fn load_f32<S: Simd>(
    simd: S, planes: &[*const f32; LANES], at: isize, to: &mut Square<f32>,
) {
    match simd.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the features; the caller's promise.
        Level::Avx512(simd) => unsafe { x86::load_avx512(simd, planes, at, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2(simd) => unsafe { x86::load_avx2(simd, planes, at, to) },
        Level::Scalar => {
            // SAFETY: the caller's promise.
            let row = |plane: *const f32| unsafe {
                plane.wrapping_offset(at).cast::<[f32; LANES]>().read_unaligned()
            };
            transpose_any(simd, &planes.map(row), to);
        }
    }
}

/// Stores the columns of a square as 16 elements of each of the first `used` planes, from `at` on.
///
/// # Safety
/// They must be writable.
#[inline(always)]
pub(crate) unsafe fn store_f32<S: Simd>(
    simd: S, from: &Square<f32>, planes: &[*mut f32; LANES], used: usize, at: isize,
) {
    match simd.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the features; the caller's promise.
        Level::Avx512(simd) => unsafe { x86::store_avx512(simd, from, planes, used, at) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2(simd) => unsafe { x86::store_avx2(simd, from, planes, used, at) },
        Level::Scalar => {
            let mut square = [[0.0; LANES]; LANES];
            transpose_any(simd, from, &mut square);
            for (row, plane) in square.iter().zip(&planes[..used]) {
                // SAFETY: the caller's promise.
                unsafe { plane.wrapping_offset(at).cast::<[f32; LANES]>().write_unaligned(*row) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::{Avx2, Avx512};
    use super::{Square, LANES};
    use std::arch::x86_64::*;

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn transpose_avx512(_: Avx512, from: &Square<f32>, to: &mut Square<f32>) {
        // SAFETY: four floats of a row of 16, from 0, 4, 8 or 12.
        fill_avx512(to, |row, at| unsafe { _mm_loadu_ps(from[row].as_ptr().add(at)) });
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn load_avx512(
        _: Avx512, planes: &[*const f32; LANES], at: isize, to: &mut Square<f32>,
    ) {
        // SAFETY: four of the sixteen floats of each plane that the caller promises.
        fill_avx512(to, |row, from| unsafe {
            _mm_loadu_ps(planes[row].wrapping_offset(at + from as isize))
        });
    }

    /// Row and first column of four floats in.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fill_avx512(to: &mut Square<f32>, part: impl Fn(usize, usize) -> __m128) {
        for quarter in [0, 4, 8, 12] {
            for (row, column) in to[quarter..].iter_mut().zip(columns(|row| part(row, quarter))) {
                // SAFETY: each row is 16 floats.
                unsafe { _mm512_storeu_ps(row.as_mut_ptr(), column) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn store_avx512(
        _: Avx512, from: &Square<f32>, planes: &[*mut f32; LANES], used: usize, at: isize,
    ) {
        for quarter in 0..4 {
            // SAFETY: four floats of each row from 4*quarter, below LANES.
            let part = |row: usize| unsafe { _mm_loadu_ps(from[row].as_ptr().add(4 * quarter)) };
            for (i, column) in columns(part).into_iter().enumerate() {
                if 4 * quarter + i < used {
                    // SAFETY: sixteen floats of this plane, which the caller promises.
                    unsafe {
                        _mm512_storeu_ps(planes[4 * quarter + i].wrapping_offset(at), column)
                    };
                }
            }
        }
    }

    /// Four columns of four floats of every row; all shuffles stay within 128 bits.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn columns(part: impl Fn(usize) -> __m128) -> [__m512; 4] {
        // Rows i, 4 + i, 8 + i, 12 + i side by side.
        let four = |i: usize| {
            let low = _mm512_insertf32x4::<1>(_mm512_castps128_ps512(part(i)), part(i + 4));
            _mm512_insertf32x4::<3>(_mm512_insertf32x4::<2>(low, part(i + 8)), part(i + 12))
        };
        let r = [four(0), four(1), four(2), four(3)];
        let (a, b) = (_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
        let (c, d) = (_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
        [
            _mm512_shuffle_ps::<0x44>(a, c),
            _mm512_shuffle_ps::<0xee>(a, c),
            _mm512_shuffle_ps::<0x44>(b, d),
            _mm512_shuffle_ps::<0xee>(b, d),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(crate) fn transpose_avx2(_: Avx2, from: &Square<f32>, to: &mut Square<f32>) {
        // SAFETY: four floats of a row of 16, from 0, 4, 8 or 12.
        let part = |row: usize, at: usize| unsafe { _mm_loadu_ps(from[row][at..].as_ptr()) };
        // SAFETY: eight floats of a row of 16, from 0 or 8.
        columns_avx2(part, |row, half, lanes| unsafe {
            _mm256_storeu_ps(to[row][half..].as_mut_ptr(), lanes)
        });
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(crate) unsafe fn load_avx2(
        _: Avx2, planes: &[*const f32; LANES], at: isize, to: &mut Square<f32>,
    ) {
        // SAFETY: four of the sixteen floats of each plane that the caller promises.
        let part = |row: usize, from: usize| unsafe {
            _mm_loadu_ps(planes[row].wrapping_offset(at + from as isize))
        };
        // SAFETY: eight floats of a row of 16, from 0 or 8.
        columns_avx2(part, |row, half, lanes| unsafe {
            _mm256_storeu_ps(to[row][half..].as_mut_ptr(), lanes)
        });
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(crate) unsafe fn store_avx2(
        _: Avx2, from: &Square<f32>, planes: &[*mut f32; LANES], used: usize, at: isize,
    ) {
        // SAFETY: four floats of a row of 16, from 0, 4, 8 or 12.
        let part = |row: usize, from_column: usize| unsafe {
            _mm_loadu_ps(from[row][from_column..].as_ptr())
        };
        columns_avx2(part, |plane, half, lanes| {
            if plane < used {
                // SAFETY: eight of the sixteen floats of this plane, which the caller promises.
                unsafe {
                    _mm256_storeu_ps(planes[plane].wrapping_offset(at + half as isize), lanes)
                };
            }
        });
    }

    /// Row and first column of four floats in; row, first column (0 or 8) and eight floats out.
    ///
    /// Eight rows at a time: more planes of 16 KiB would evict one another from an eight-way cache.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn columns_avx2(
        part: impl Fn(usize, usize) -> __m128, mut store: impl FnMut(usize, usize, __m256),
    ) {
        for half in [0, 8] {
            for quarter in [0, 4, 8, 12] {
                // Rows i and 4 + i side by side: all shuffles stay within 128 bits.
                let two = |i: usize| {
                    let low = _mm256_castps128_ps256(part(half + i, quarter));
                    _mm256_insertf128_ps::<1>(low, part(half + i + 4, quarter))
                };
                let r = [two(0), two(1), two(2), two(3)];
                let (a, b) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
                let (c, d) = (_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
                store(quarter, half, _mm256_shuffle_ps::<0x44>(a, c));
                store(quarter + 1, half, _mm256_shuffle_ps::<0xee>(a, c));
                store(quarter + 2, half, _mm256_shuffle_ps::<0x44>(b, d));
                store(quarter + 3, half, _mm256_shuffle_ps::<0xee>(b, d));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::level::{run_at, Scalar};
    use crate::simd::WithSimd;

    struct Transposed<'a>(&'a Square<f32>);
    impl WithSimd for Transposed<'_> {
        type Out = Square<f32>;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Self::Out {
            let mut to = *self.0;
            transpose_f32(simd, self.0, &mut to);
            to
        }
    }

    #[test]
    fn transposes_agree_at_every_level() {
        let tile: Square<f32> =
            std::array::from_fn(|i| std::array::from_fn(|j| (i * LANES + j) as f32));
        let mut expected = tile;
        transpose_any(Scalar, &tile, &mut expected);
        assert_eq!(expected[3][5], tile[5][3]);
        for level in Level::available() {
            let transposed = run_at(level, Transposed(&tile));
            assert_eq!(transposed, expected, "{level:?}");
        }
    }
}
