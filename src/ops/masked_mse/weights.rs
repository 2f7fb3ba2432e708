//! The kernel's weights `[B, H, W]`: contiguous, in the accumulator dtype, summed and checked.

use super::CHECK;
use crate::parallel;
use crate::simd::{self, by_dtype, Element, Real, Simd, WithSimd, LANES};
use crate::tensor::{DType, Result, TensorView};
use std::slice;

const CHUNK: usize = 1 << 16;

/// The weights `[B * H * W]`: a view where possible, else a copy.
pub(crate) enum Weights<'a, A> {
    Ones,
    /// The caller's memory.
    Borrowed(&'a [A]),
    /// Converted or gathered.
    Copied(Vec<A>),
}

impl<'a, A: Real> Weights<'a, A> {
    /// Reads the weights and their sum; refuses a negative one.
    ///
    /// # Safety
    /// A weight is `[B, H, W]` or `[B, 1, H, W]`, of a float dtype, in host memory.
    pub(crate) unsafe fn read(
        weight: Option<&'a TensorView>, threads: usize,
    ) -> Result<(Self, f64)> {
        let Some(view) = weight else { return Ok((Self::Ones, 0.0)) };
        let dtype = if size_of::<A>() == 8 { DType::F64 } else { DType::F32 };
        let weights = if view.dtype == dtype && view.is_contiguous() && view.numel() > 0 {
            // SAFETY: contiguous, of the dtype A, not empty.
            Self::Borrowed(unsafe { slice::from_raw_parts(view.as_ptr::<A>(), view.numel()) })
        } else {
            // SAFETY: the caller's promise; T is the view's dtype.
            Self::Copied(by_dtype!(view.dtype, T => unsafe { copied::<T, A>(view) }))
        };
        let sum = total(weights.slice().unwrap_or(&[]), view.dtype, threads)?;
        Ok((weights, sum))
    }

    /// None: 1 everywhere.
    pub(crate) fn slice(&self) -> Option<&[A]> {
        match self {
            Self::Ones => None,
            Self::Borrowed(all) => Some(all),
            Self::Copied(all) => Some(all),
        }
    }
}

unsafe fn copied<W: Element, A: Real>(view: &TensorView) -> Vec<A> {
    let (sizes, strides, rank) = (view.sizes(), view.strides(), view.rank());
    let mut all = Vec::with_capacity(view.numel());
    for b in 0..sizes[0] {
        for y in 0..sizes[rank - 2] {
            let row = b as isize * strides[0] + y as isize * strides[rank - 2];
            let row = view.as_ptr::<W>().wrapping_offset(row);
            all.extend((0..sizes[rank - 1]).map(|x| {
                // SAFETY: b, y, x are within the sizes.
                let value = unsafe { row.wrapping_offset(x as isize * strides[rank - 1]).read() };
                A::of(value.load().to_f64())
            }));
        }
    }
    all
}

/// The sum, in an order that depends on the number alone; refuses the first weight below zero.
fn total<A: Real>(all: &[A], dtype: DType, threads: usize) -> Result<f64> {
    let chunk = |i: usize| simd::run(Total(&all[i * CHUNK..all.len().min((i + 1) * CHUNK)]));
    let sums = parallel::map(threads, all.len().div_ceil(CHUNK), chunk);
    if sums.iter().all(|(_, fine)| *fine) {
        return Ok(sums.iter().map(|(sum, _)| sum).sum());
    }
    let first = all.iter().find(|w| **w < A::default()).map_or(0.0, |w| w.to_f64());
    let text = if dtype == DType::F64 { first.to_string() } else { (first as f32).to_string() };
    Err(CHECK.value("weight", "be at least 0", text))
}

/// The sum of some weights, and whether none is negative (a NaN is not).
struct Total<'a, A>(&'a [A]);

impl<A: Real> WithSimd for Total<'_, A> {
    type Out = (f64, bool);
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Out {
        let (mut sums, mut least) = ([0.0; LANES], [A::default(); LANES]);
        let mut rows = self.0.chunks_exact(LANES);
        let mut add = |l: usize, w: A| {
            sums[l] += w.to_f64();
            least[l] = if w < least[l] { w } else { least[l] };
        };
        for row in &mut rows {
            (0..LANES).for_each(|l| add(l, row[l]));
        }
        rows.remainder().iter().enumerate().for_each(|(l, w)| add(l, *w));
        (sums.iter().sum(), least.iter().all(|w| *w >= A::default()))
    }
}
