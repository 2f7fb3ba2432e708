//! Sampling without tiles: where channels lie side by side, each corner is read in place.

use super::plan::{Corners, Hole, SamplePlan, Shape};
use crate::simd::tile::Layout;
use crate::simd::{Element, Real, Simd, Vector, WithSimd, LANES};
use std::ops::Range;

/// Whether memory has the accumulator dtype, and the plan changes no single channel.
pub(super) fn fits<T: Element>(
    group: &SamplePlan, source: &Layout, target: &Layout, shape: Shape,
) -> bool {
    let runs = |l: &Layout| l.interleaves() && l.run == shape.positions();
    let single = group.sigma.is_some() || group.perm.is_some() || group.keep.is_some();
    T::IS_ACC && !single && runs(source) && runs(target)
}

/// Fills some positions of one sample.
pub(super) struct Direct<'a, T: Element> {
    /// First elements of the sample.
    pub source: *const T,
    pub target: *mut T,
    /// Elements from one position to the next.
    pub steps: [isize; 2],
    /// None: copied.
    pub table: Option<&'a [Corners<T::Acc>]>,
    pub hole: Option<Hole>,
    pub positions: Range<usize>,
    pub shape: Shape,
}

impl<T: Element> WithSimd for Direct<'_, T> {
    type Out = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let channels = self.shape.channels;
        let zeros = vec![T::Acc::default(); if self.table.is_some() { channels } else { 0 }];
        for p in self.positions.clone() {
            let target = self.target.wrapping_offset(p as isize * self.steps[1]).cast::<T::Acc>();
            // SAFETY: a position of the target, of which all channels belong to this chunk.
            let target = unsafe { std::slice::from_raw_parts_mut(target, channels) };
            match self.table {
                None => target.copy_from_slice(self.corner(p, &zeros)),
                Some(table) => {
                    let corners = &table[p];
                    let at = corners.at.map(|at| self.corner(at as usize, &zeros));
                    blend(simd, target, at, &corners.weight);
                }
            }
        }
        if let Some(hole) = self.hole {
            self.clear(&hole);
        }
    }
}

impl<T: Element> Direct<'_, T> {
    /// All channels of a position; of one outside the map, zeros.
    #[inline(always)]
    fn corner<'b>(&self, at: usize, zeros: &'b [T::Acc]) -> &'b [T::Acc] {
        if at == self.shape.positions() {
            return zeros;
        }
        let first = self.source.wrapping_offset(at as isize * self.steps[0]).cast();
        // SAFETY: a position of the checked features, channels side by side in this dtype.
        unsafe { std::slice::from_raw_parts(first, self.shape.channels) }
    }

    fn clear(&self, hole: &Hole) {
        for y in hole.y0..hole.y1 {
            let row = y * self.shape.width;
            for p in
                (row + hole.x0).max(self.positions.start)..(row + hole.x1).min(self.positions.end)
            {
                let target = self.target.wrapping_offset(p as isize * self.steps[1]);
                // SAFETY: a position of the target as above; zero bits are 0.0.
                unsafe { target.write_bytes(0, self.shape.channels) };
            }
        }
    }
}

/// The weighted sum of four corners, as for tiles.
#[inline(always)]
fn blend<A: Real, S: Simd>(simd: S, target: &mut [A], corners: [&[A]; 4], weight: &[A; 4]) {
    let (rows, rest) = target.as_chunks_mut::<LANES>();
    let [a, b, c, d] = corners.map(|corner| &corner.as_chunks::<LANES>().0[..rows.len()]);
    let [wa, wb, wc, wd] = weight.map(|weight| simd.splat(weight));
    for (i, row) in rows.iter_mut().enumerate() {
        let last = wd.times(simd.load(&d[i]));
        wa.fma(simd.load(&a[i]), wb.fma(simd.load(&b[i]), wc.fma(simd.load(&c[i]), last)))
            .store(row);
    }
    let done = rows.len() * LANES;
    let [a, b, c, d] = corners.map(|corner| &corner[done..]);
    let [wa, wb, wc, wd] = *weight;
    for (i, value) in rest.iter_mut().enumerate() {
        *value = wa.fma(a[i], wb.fma(b[i], wc.fma(c[i], wd * d[i])));
    }
}
