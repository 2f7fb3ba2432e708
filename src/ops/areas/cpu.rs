//! The CPU kernel: the maxima of all tiles, from them each image's best peaks, then its boxes.

use super::boxes::BoxWriter;
use super::heat::{Heat, Image};
use super::peaks::Peak;
use super::{Args, Outputs};
use crate::parallel;
use crate::simd::{self, Element, Simd, WithSimd};
use std::ops::Range;

const CHUNK: usize = 1 << 16;

/// Writes coverage, boxes and scores.
///
/// # Safety
/// The maps have the dtype `T`, the shapes agree, the outputs are contiguous and of their dtypes,
/// and all are in host memory.
pub(crate) unsafe fn forward<T: Element>(args: &Args, outputs: &Outputs, threads: usize) {
    let teacher = args.teacher.map(|teacher| teacher[0]);
    // SAFETY: the caller's promise.
    let heat = unsafe { Heat::<T>::new(args.heat, teacher, args.kernel as usize) };
    let writer = BoxWriter::<T>::new(args, outputs);
    let (batch, tiles, k) = (args.heat.sizes()[0], heat.tiles(), args.k as usize);
    let bounds = |n, tiles| simd::run(Bounds { image: &heat.image(n), tiles });
    let finish = |n, bounds: &[T::Acc]| {
        let peaks = simd::run(Best { image: &heat.image(n), bounds, k });
        // SAFETY: the caller's promise; no other thread writes this image's outputs.
        unsafe { writer.write(n, &peaks) }
    };
    let chunks = heat.cells().div_ceil(CHUNK).min(tiles);
    if chunks == 1 {
        // An image that fits into the cache is one chunk.
        return parallel::for_each(threads, batch, |n| finish(n, &bounds(n, 0..tiles)));
    }
    let chunk = |i: usize| {
        bounds(i / chunks, tiles * (i % chunks) / chunks..tiles * (i % chunks + 1) / chunks)
    };
    let all = parallel::map(threads, batch * chunks, chunk);
    parallel::for_each(threads, batch, |n| finish(n, &all[n * chunks..(n + 1) * chunks].concat()));
}

/// The maxima of some tiles.
struct Bounds<'a, T> {
    image: &'a Image<'a, T>,
    tiles: Range<usize>,
}

impl<T: Element> WithSimd for Bounds<'_, T> {
    type Out = Vec<T::Acc>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<T::Acc> {
        let mut bounds = Vec::with_capacity(self.tiles.len());
        for tile in self.tiles {
            bounds.push(self.image.bound(simd, tile));
        }
        bounds
    }
}

/// The k best peaks, from the maxima of all tiles.
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
