//! The CPU kernel: the maxima of all blocks, from them each image's best peaks, then its boxes.

use super::boxes::Outputs;
use super::heat::{Heat, Image};
use super::peaks::Peak;
use super::Args;
use crate::parallel;
use crate::simd::{self, Element, Simd, WithSimd};
use std::ops::Range;

/// Cells that one thread reads at a time.
const CHUNK: usize = 1 << 16;

/// Writes coverage, boxes and scores.
///
/// # Safety
/// The maps have the dtype `T`, the shapes agree, the outputs are contiguous and of their dtypes, and all are in host memory.
pub(crate) unsafe fn forward<T: Element>(args: &Args, threads: usize) {
    let heat =
        Heat::<T>::new(args.heat, args.teacher.map(|teacher| teacher[0]), args.kernel as usize);
    let outputs = Outputs::<T>::new(args);
    let (batch, blocks, k) = (args.heat.sizes()[0], heat.blocks(), args.k as usize);
    let bounds = |n, blocks| simd::run(Bounds { image: &heat.image(n), blocks });
    let finish = |n, bounds: &[T::Acc]| {
        let peaks = simd::run(Best { image: &heat.image(n), bounds, k });
        // SAFETY: the caller's promise; this image's outputs are this thread's alone.
        unsafe { outputs.write(n, &peaks) }
    };
    let parts = heat.cells().div_ceil(CHUNK).min(blocks);
    if parts == 1 {
        // One go for an image that fits into the cache.
        return parallel::for_each(threads, batch, |n| finish(n, &bounds(n, 0..blocks)));
    }
    let part = |i: usize| {
        bounds(i / parts, blocks * (i % parts) / parts..blocks * (i % parts + 1) / parts)
    };
    let all = parallel::map(threads, batch * parts, part);
    parallel::for_each(threads, batch, |n| finish(n, &all[n * parts..(n + 1) * parts].concat()));
}

/// The maxima of some blocks.
struct Bounds<'a, T> {
    image: &'a Image<'a, T>,
    blocks: Range<usize>,
}

impl<T: Element> WithSimd for Bounds<'_, T> {
    type Out = Vec<T::Acc>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<T::Acc> {
        let mut bounds = Vec::with_capacity(self.blocks.len());
        for block in self.blocks {
            bounds.push(self.image.bound(simd, block));
        }
        bounds
    }
}

/// The k best peaks, from the maxima of all blocks.
struct Best<'a, T: Element> {
    image: &'a Image<'a, T>,
    bounds: &'a [T::Acc],
    k: usize,
}

impl<T: Element> WithSimd for Best<'_, T> {
    type Out = Vec<Peak<T::Acc>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<Peak<T::Acc>> {
        self.image.best(simd, self.bounds, self.k)
    }
}
