//! Elements in memory and their accumulator dtype: loads and stores of one, a row, a square.

use super::transpose::{self, Square};
use super::{Simd, Vector, LANES};

/// An accumulator dtype: f32, or f64 for f64 tensors.
pub(crate) trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::AddAssign
    + 'static
{
    /// [`LANES`] of them in the registers of a level.
    type Vector<S: Simd>: Vector<Self, S>;
    fn of(value: f64) -> Self;
    /// Widens (or keeps) an f32.
    fn of_f32(value: f32) -> Self;
    fn to_f64(self) -> f64;
    /// self * b + c, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    fn root(self) -> Self;
    fn mask(set: bool) -> Self;
    /// Bitwise and.
    fn and(self, other: Self) -> Self;
    /// Transposes 16 rows.
    fn transpose<S: Simd>(simd: S, from: &[[Self; LANES]; LANES], to: &mut [[Self; LANES]; LANES]);
}

macro_rules! real {
    ($t:ty, $vector:ident, $transpose:path) => {
        impl Real for $t {
            type Vector<S: Simd> = S::$vector;
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn of_f32(value: f32) -> Self {
                value as Self
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn fma(self, b: Self, c: Self) -> Self {
                self.mul_add(b, c)
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn mask(set: bool) -> Self {
                Self::from_bits(if set { !0 } else { 0 })
            }
            #[inline(always)]
            fn and(self, other: Self) -> Self {
                Self::from_bits(self.to_bits() & other.to_bits())
            }
            #[inline(always)]
            fn transpose<S: Simd>(
                simd: S, from: &[[Self; LANES]; LANES], to: &mut [[Self; LANES]; LANES],
            ) {
                $transpose(simd, from, to)
            }
        }
    };
}
real!(f32, F32, transpose::transpose_f32);
real!(f64, F64, transpose::transpose_any);

/// An element in memory.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Its accumulator dtype.
    type Acc: Real;
    /// Whether it is its own accumulator dtype.
    const IS_ACC: bool = false;
    fn load(self) -> Self::Acc;
    /// To memory, rounded to nearest, ties to even.
    fn store(value: Self::Acc) -> Self;
    /// A row from memory.
    #[inline(always)]
    fn load_row(from: [Self; LANES], to: &mut [Self::Acc; LANES]) {
        for l in 0..LANES {
            to[l] = from[l].load();
        }
    }
    /// A square, lanes side by side, from 16 elements of each plane, from `at` on.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn load_square<S: Simd>(
        simd: S, planes: &[*const Self; LANES], at: isize, to: &mut Square<Self::Acc>,
    ) {
        let mut square = [[Self::Acc::default(); LANES]; LANES];
        for (row, plane) in square.iter_mut().zip(planes) {
            // SAFETY: the caller's promise.
            let lanes =
                unsafe { plane.wrapping_offset(at).cast::<[Self; LANES]>().read_unaligned() };
            Self::load_row(lanes, row);
        }
        Self::Acc::transpose(simd, &square, to);
    }
    /// A square to 16 elements of each of the first `used` planes, from `at` on.
    ///
    /// # Safety
    /// They must be writable.
    #[inline(always)]
    unsafe fn store_square<S: Simd>(
        simd: S, from: &Square<Self::Acc>, planes: &[*mut Self; LANES], used: usize, at: isize,
    ) {
        let mut square = [[Self::Acc::default(); LANES]; LANES];
        Self::Acc::transpose(simd, from, &mut square);
        for (row, plane) in square.iter().zip(&planes[..used]) {
            let lanes = Self::store_row(row);
            // SAFETY: the caller's promise.
            unsafe { plane.wrapping_offset(at).cast::<[Self; LANES]>().write_unaligned(lanes) };
        }
    }
    /// A row to memory.
    #[inline(always)]
    fn store_row(from: &[Self::Acc; LANES]) -> [Self; LANES] {
        let mut to = [Self::store(from[0]); LANES];
        for l in 0..LANES {
            to[l] = Self::store(from[l]);
        }
        to
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load_square<S: Simd>(
        simd: S, planes: &[*const f32; LANES], at: isize, to: &mut Square<f32>,
    ) {
        // SAFETY: the caller's promise.
        unsafe { transpose::load_f32(simd, planes, at, to) }
    }
    #[inline(always)]
    unsafe fn store_square<S: Simd>(
        simd: S, from: &Square<f32>, planes: &[*mut f32; LANES], used: usize, at: isize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { transpose::store_f32(simd, from, planes, used, at) }
    }
    type Acc = f32;
    const IS_ACC: bool = true;
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        value
    }
}

impl Element for f64 {
    type Acc = f64;
    const IS_ACC: bool = true;
    #[inline(always)]
    fn load(self) -> f64 {
        self
    }
    #[inline(always)]
    fn store(value: f64) -> Self {
        value
    }
}

/// bfloat16, converted by integer arithmetic so that loops over it vectorise.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

impl Element for Bf16 {
    type Acc = f32;
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        Self(if value.is_nan() { quiet_nan } else { rounded } as u16)
    }
}

/// IEEE half, converted by integer arithmetic so that loops over it vectorise.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct F16(u16);

impl Element for F16 {
    type Acc = f32;
    #[inline(always)]
    fn load(self) -> f32 {
        // The exponent's bias differs by 112: times 2^112, for subnormals too.
        let magnitude = u32::from(self.0 & 0x7fff) << 13;
        let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
        let infinite = scaled >= 65536.0;
        let bits = scaled.to_bits() | if infinite { 0xff << 23 } else { 0 };
        f32::from_bits(bits | (u32::from(self.0 & 0x8000) << 16))
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        let sign = (bits >> 16) & 0x8000;
        let magnitude = bits & 0x7fff_ffff;
        // Subnormal halves: adding 0.5 lets the f32 adder round at the right place.
        let tiny = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
        let finite = if magnitude < (113 << 23) { tiny } else { normal };
        let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
        let half = if magnitude >= (143 << 23) { special } else { finite };
        Self((half | sign) as u16)
    }
}

/// Evaluates `$body` with `$t` as the element type of a floating-point dtype.
macro_rules! by_dtype {
    ($dtype:expr, $t:ident => $body:expr) => {
        by_dtype!(@arms $dtype, $t, $body, F64 f64, F16 $crate::simd::F16, BF16 $crate::simd::Bf16)
    };
    (@arms $dtype:expr, $t:ident, $body:expr, $($name:ident $type:ty),*) => {
        match $dtype {
            $($crate::tensor::DType::$name => {
                type $t = $type;
                $body
            })*
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}
pub(crate) use by_dtype;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_and_bfloat_round_trips_like_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (half::f16::from_bits(bits), half::bf16::from_bits(bits));
            if half.is_nan() {
                assert!(
                    F16(bits).load().is_nan()
                        && half::f16::from_bits(F16::store(F16(bits).load()).0).is_nan()
                );
            } else {
                assert_eq!(F16(bits).load().to_bits(), half.to_f32().to_bits(), "{bits:#x}");
                assert_eq!(F16::store(half.to_f32()).0, bits, "{bits:#x}");
            }
            if brain.is_nan() {
                assert!(half::bf16::from_bits(Bf16::store(Bf16(bits).load()).0).is_nan());
            } else {
                assert_eq!(Bf16(bits).load().to_bits(), brain.to_f32().to_bits());
                assert_eq!(Bf16::store(brain.to_f32()).0, bits);
            }
        }
    }

    #[test]
    fn rounding_agrees_with_the_half_crate_between_the_grid_points() {
        let mut bits = 1u32;
        for _ in 0..2_000_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            if !value.is_nan() {
                assert_eq!(F16::store(value).0, half::f16::from_f32(value).to_bits(), "{value:e}");
                assert_eq!(
                    Bf16::store(value).0,
                    half::bf16::from_f32(value).to_bits(),
                    "{value:e}"
                );
            }
        }
    }
}
