//! Squares of 16 x 16 lanes turned about their diagonal: rows of consecutive elements become lanes side by side, and back.

use crate::simd::LANES;

/// A square of lanes.
pub type Square<A> = [[A; LANES]; LANES];

/// Turns a square about its diagonal, whatever the type.
#[inline(always)]
pub fn transpose_any<A: Copy>(from: &Square<A>, to: &mut Square<A>) {
    for i in 0..LANES {
        for j in 0..LANES {
            to[i][j] = from[j][i];
        }
    }
}

/// Turns a square of f32 in registers, where the instruction set allows.
#[inline(always)]
pub fn transpose_f32(from: &Square<f32>, to: &mut Square<f32>) {
    #[cfg(target_arch = "x86_64")]
    match crate::simd::level() {
        // SAFETY: the CPU has the features of its level.
        crate::simd::Level::Avx512 => return unsafe { x86::transpose_avx512(from, to) },
        // SAFETY: as above.
        crate::simd::Level::Avx2 => return unsafe { x86::transpose_avx2(from, to) },
        crate::simd::Level::Scalar => {}
    }
    transpose_any(from, to);
}

/// Turns 16 elements of each plane, from `at` on, into a square.
///
/// # Safety
/// They must be readable.
#[inline(always)]
pub unsafe fn load_f32(planes: &[*const f32; LANES], at: isize, to: &mut Square<f32>) {
    #[cfg(target_arch = "x86_64")]
    if crate::simd::level() == crate::simd::Level::Avx512 {
        // SAFETY: the CPU has the features of its level; the caller's promise.
        return unsafe { x86::load_avx512(planes, at, to) };
    }
    let mut square = [[0.0; LANES]; LANES];
    for (row, plane) in square.iter_mut().zip(planes) {
        // SAFETY: the caller's promise.
        *row = unsafe { plane.wrapping_offset(at).cast::<[f32; LANES]>().read_unaligned() };
    }
    transpose_f32(&square, to);
}

/// Turns a square into 16 elements of each of the first `used` planes, from `at` on.
///
/// # Safety
/// They must be writable.
#[inline(always)]
pub unsafe fn store_f32(from: &Square<f32>, planes: &[*mut f32; LANES], used: usize, at: isize) {
    #[cfg(target_arch = "x86_64")]
    if crate::simd::level() == crate::simd::Level::Avx512 {
        // SAFETY: the CPU has the features of its level; the caller's promise.
        return unsafe { x86::store_avx512(from, planes, used, at) };
    }
    let mut square = [[0.0; LANES]; LANES];
    transpose_f32(from, &mut square);
    for (row, plane) in square.iter().zip(&planes[..used]) {
        // SAFETY: the caller's promise.
        unsafe { plane.wrapping_offset(at).cast::<[f32; LANES]>().write_unaligned(*row) };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Square, LANES};
    use std::arch::x86_64::*;

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn transpose_avx512(from: &Square<f32>, to: &mut Square<f32>) {
        for quarter in 0..4 {
            // SAFETY: four floats of each row from 4*quarter, below LANES.
            let part = |row: usize| unsafe { _mm_loadu_ps(from[row].as_ptr().add(4 * quarter)) };
            for (row, column) in to[4 * quarter..].iter_mut().zip(columns(part)) {
                // SAFETY: each row is 16 floats.
                unsafe { _mm512_storeu_ps(row.as_mut_ptr(), column) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn load_avx512(planes: &[*const f32; LANES], at: isize, to: &mut Square<f32>) {
        for quarter in 0..4 {
            let from = at + 4 * quarter as isize;
            // SAFETY: four of the sixteen floats of each plane that the caller vouches for.
            let part = |row: usize| unsafe { _mm_loadu_ps(planes[row].wrapping_offset(from)) };
            for (row, column) in to[4 * quarter..].iter_mut().zip(columns(part)) {
                // SAFETY: each row is 16 floats.
                unsafe { _mm512_storeu_ps(row.as_mut_ptr(), column) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn store_avx512(from: &Square<f32>, planes: &[*mut f32; LANES], used: usize, at: isize) {
        for quarter in 0..4 {
            // SAFETY: four floats of each row from 4*quarter, below LANES.
            let part = |row: usize| unsafe { _mm_loadu_ps(from[row].as_ptr().add(4 * quarter)) };
            for (i, column) in columns(part).into_iter().enumerate() {
                if 4 * quarter + i < used {
                    // SAFETY: sixteen floats of this plane, for which the caller vouches.
                    unsafe { _mm512_storeu_ps(planes[4 * quarter + i].wrapping_offset(at), column) };
                }
            }
        }
    }

    /// Four columns, of four floats of every row: loads bring rows side by side, and all shuffles stay within 128 bits.
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

    /// Four 8 x 8 quarters, the off-diagonal ones swapped.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn transpose_avx2(from: &Square<f32>, to: &mut Square<f32>) {
        for (row, column) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
            for (i, part) in quarter(from, row, column).into_iter().enumerate() {
                // SAFETY: 8 floats from column 0 or 8 of a row of 16.
                unsafe { _mm256_storeu_ps(to[column + i].as_mut_ptr().add(row), part) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn quarter(tile: &Square<f32>, row: usize, column: usize) -> [__m256; 8] {
        // SAFETY: row + 7 and column + 7 are below 16.
        let r: [__m256; 8] =
            std::array::from_fn(|i| unsafe { _mm256_loadu_ps(tile[row + i].as_ptr().add(column)) });
        let mut pairs = r;
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut fours = r;
        for half in 0..2 {
            let p = &pairs[4 * half..4 * half + 4];
            fours[4 * half] = _mm256_shuffle_ps::<0x44>(p[0], p[2]);
            fours[4 * half + 1] = _mm256_shuffle_ps::<0xee>(p[0], p[2]);
            fours[4 * half + 2] = _mm256_shuffle_ps::<0x44>(p[1], p[3]);
            fours[4 * half + 3] = _mm256_shuffle_ps::<0xee>(p[1], p[3]);
        }
        std::array::from_fn(|i| {
            if i < 4 {
                _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4])
            } else {
                _mm256_permute2f128_ps::<0x31>(fours[i - 4], fours[i])
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    #[test]
    fn transposes_agree_at_every_level() {
        let tile: Square<f32> = std::array::from_fn(|i| std::array::from_fn(|j| (i * LANES + j) as f32));
        let mut expected = tile;
        transpose_any(&tile, &mut expected);
        assert_eq!(expected[3][5], tile[5][3]);
        for level in Level::available() {
            let mut turned = tile;
            match level {
                // SAFETY: the CPU has it.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { x86::transpose_avx512(&tile, &mut turned) },
                // SAFETY: the CPU has it.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { x86::transpose_avx2(&tile, &mut turned) },
                _ => transpose_any(&tile, &mut turned),
            }
            assert_eq!(turned, expected, "{level:?}");
        }
    }
}
