//! The k best peaks of an image, in little more than one pass over its heat.
//!
//! Every tile of cells has its maximum. The k best peaks lie in tiles whose maximum is not below
//! the k-th best peak, so with a good guess of that score few tiles are read again; after a bad
//! guess, a lower one is tried.

use super::heat::{Image, Tile};
use super::larger;
use crate::simd::{Element, Real, Simd, LANES};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A local maximum; the better of two is the lesser one.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Peak<A> {
    /// Its heat; above 0.
    pub score: A,
    /// (a * H + y) * W + x
    pub flat: usize,
}

impl<A: Real> Eq for Peak<A> {}

impl<A: Real> Ord for Peak<A> {
    #[inline(always)]
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = other.score.partial_cmp(&self.score).unwrap_or(Ordering::Equal);
        by_score.then(self.flat.cmp(&other.flat))
    }
}

impl<A: Real> PartialOrd for Peak<A> {
    #[inline(always)]
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T: Element> Image<'_, T> {
    /// The k best peaks, best first, by the maxima of all tiles.
    #[inline(always)]
    pub(crate) fn best<S: Simd>(&self, simd: S, bounds: &[T::Acc], k: usize) -> Vec<Peak<T::Acc>> {
        let nothing = T::Acc::default();
        let (mut cutoff, mut rank) = (larger(guess(bounds, k), nothing), 4 * k);
        loop {
            let best = self.above(simd, cutoff, bounds, k);
            if best.len() == k || cutoff == nothing {
                return best.into_sorted_vec();
            }
            cutoff = larger(ranked(bounds, rank), nothing);
            rank *= 2;
        }
    }

    /// The k best peaks among the cells that are not below a cutoff.
    #[inline(always)]
    fn above<S: Simd>(
        &self, simd: S, cutoff: T::Acc, bounds: &[T::Acc], k: usize,
    ) -> BinaryHeap<Peak<T::Acc>> {
        let mut best = BinaryHeap::with_capacity(k + 1);
        for (i, bound) in bounds.iter().enumerate() {
            if *bound >= cutoff && *bound > T::Acc::default() {
                self.gather(simd, &self.tile(i), *bound, cutoff, k, &mut best);
            }
        }
        best
    }

    #[inline(always)]
    fn gather<S: Simd>(
        &self, simd: S, tile: &Tile, bound: T::Acc, cutoff: T::Acc, k: usize,
        best: &mut BinaryHeap<Peak<T::Acc>>,
    ) {
        let hopeless = |peak: Peak<T::Acc>, best: &BinaryHeap<Peak<T::Acc>>| {
            best.len() == k && best.peek().is_some_and(|worst| peak >= *worst)
        };
        if hopeless(Peak { score: bound, flat: tile.flat }, best) {
            return;
        }
        for i in (0..tile.length).step_by(LANES) {
            let scores = self.scores(simd, tile, i);
            let least = best.peek().filter(|_| best.len() == k).map_or(cutoff, |worst| worst.score);
            if !scores.iter().fold(false, |any, score| any | (*score >= least)) {
                continue;
            }
            for (l, score) in scores.into_iter().enumerate() {
                let peak = Peak { score, flat: self.flat(tile, i + l) };
                let high = score >= least && score > T::Acc::default();
                if high && !hopeless(peak, best) && self.is_peak(peak.flat, score) {
                    best.push(peak);
                    if best.len() > k {
                        best.pop();
                    }
                }
            }
        }
    }
}

fn lowest<A: Real>() -> A {
    A::of(f64::NEG_INFINITY)
}

/// A score that most likely k peaks reach, and few other cells: of 2k or more groups of tiles, the
/// 3/2 k-th best maximum.
#[inline(always)]
fn guess<A: Real>(bounds: &[A], k: usize) -> A {
    let groups = (2 * k).next_multiple_of(LANES);
    if bounds.len() < 2 * groups {
        return ranked(bounds, 2 * k);
    }
    let mut most = vec![lowest(); groups];
    for row in bounds.chunks(groups) {
        for (m, bound) in most.iter_mut().zip(row) {
            *m = larger(*bound, *m);
        }
    }
    ranked(&most, k + k / 2)
}

/// The maximum of this rank, the lowest number of all where there are fewer.
fn ranked<A: Real>(bounds: &[A], rank: usize) -> A {
    if rank >= bounds.len() {
        return lowest();
    }
    let descending = |a: &A, b: &A| b.partial_cmp(a).unwrap_or(Ordering::Equal);
    *bounds.to_vec().select_nth_unstable_by(rank, descending).1
}
