//! The arithmetic on tiles, compiled for every instruction set.

use super::plan::{Corners, Shape, Table};
use crate::random::philox::Planes;
use crate::simd::tile::Scratch;
use crate::simd::{Real, Simd, Vector, WithSimd, LANES};

type Tile<A> = [[A; LANES]];

/// Positions whose noise is drawn at a time.
const NOISE: usize = 64;

/// tile[i] = bilinear(source, corners of i).
pub(super) struct Sample<'a, A> {
    pub tile: &'a mut Tile<A>,
    pub source: &'a Tile<A>,
    pub table: &'a [Corners<A>],
}

impl<A: Real> WithSimd for Sample<'_, A> {
    type Out = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (out, corners) in self.tile.iter_mut().zip(self.table) {
            bilinear(simd, self.source, corners).store(out);
        }
    }
}

#[inline(always)]
fn bilinear<A: Real, S: Simd>(simd: S, source: &Tile<A>, corners: &Corners<A>) -> A::Vector<S> {
    let [a, b, c, d] = corners.at;
    let row = |at: u32| simd.load(&source[at as usize]);
    let [wa, wb, wc, wd] = corners.weight;
    let last = simd.splat(wd).times(row(d));
    simd.splat(wa).fma(row(a), simd.splat(wb).fma(row(b), simd.splat(wc).fma(row(c), last)))
}

/// tile += sigma * eps. `quad` is the block of four positions that the tile begins with.
pub(super) struct AddNoise<'a, A> {
    pub tile: &'a mut Tile<A>,
    pub sigma: A,
    pub quad: u32,
    pub planes: &'a Planes<'a>,
}

impl<A: Real> WithSimd for AddNoise<'_, A> {
    type Out = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let sigma = simd.splat(self.sigma);
        let mut buffer = Scratch::<f32>::new(NOISE);
        for (i, rows) in self.tile.chunks_mut(NOISE).enumerate() {
            let noise = &mut buffer.tile()[..rows.len().next_multiple_of(4)];
            self.planes.normals(simd, self.quad + (i * NOISE / 4) as u32, noise);
            for (row, eps) in rows.iter_mut().zip(noise) {
                sigma.fma(simd.load_f32::<A>(eps), simd.load(row)).store(row);
            }
        }
    }
}

/// For each lane, sum of tile * eps.
pub(super) struct DotNoise<'a, A> {
    pub tile: &'a Tile<A>,
    pub quad: u32,
    pub planes: &'a Planes<'a>,
}

impl<A: Real> WithSimd for DotNoise<'_, A> {
    type Out = [f64; LANES];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> [f64; LANES] {
        let mut sum = simd.splat(A::default());
        let mut buffer = Scratch::<f32>::new(NOISE);
        for (i, rows) in self.tile.chunks(NOISE).enumerate() {
            let noise = &mut buffer.tile()[..rows.len().next_multiple_of(4)];
            self.planes.normals(simd, self.quad + (i * NOISE / 4) as u32, noise);
            for (row, eps) in rows.iter().zip(noise) {
                sum = simd.load(row).fma(simd.load_f32::<A>(eps), sum);
            }
        }
        sum.wide()
    }
}

/// For each lane, sum of tile * source (`table` none) or of tile * bilinear(source).
pub(super) struct Dot<'a, A> {
    pub tile: &'a Tile<A>,
    pub source: &'a Tile<A>,
    pub table: Option<&'a [Corners<A>]>,
}

impl<A: Real> WithSimd for Dot<'_, A> {
    type Out = [f64; LANES];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> [f64; LANES] {
        let mut sum = simd.splat(A::default());
        for (i, row) in self.tile.iter().enumerate() {
            let value = match self.table {
                Some(table) => bilinear(simd, self.source, &table[i]),
                None => simd.load(&self.source[i]),
            };
            sum = simd.load(row).fma(value, sum);
        }
        sum.wide()
    }
}

pub(super) struct Sum<'a, A>(pub &'a Tile<A>);

impl<A: Real> WithSimd for Sum<'_, A> {
    type Out = [f64; LANES];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> [f64; LANES] {
        let mut sum = simd.splat(A::default());
        for row in self.0 {
            sum = sum.plus(simd.load(row));
        }
        sum.wide()
    }
}

pub(super) struct ClearLanes<'a, A> {
    pub tile: &'a mut Tile<A>,
    pub keep: &'a [bool; LANES],
}

impl<A: Real> WithSimd for ClearLanes<'_, A> {
    type Out = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut masks = [A::default(); LANES];
        for l in 0..LANES {
            masks[l] = A::mask(self.keep[l]);
        }
        // Hidden from the compiler, whose masked stores are many times slower on some processors.
        let mask = simd.load(&std::hint::black_box(masks));
        for row in self.tile {
            simd.load(row).and(mask).store(row);
        }
    }
}

/// The corners from position `from` on: from the table, or of a map not resampled.
#[derive(Clone, Copy)]
pub(super) struct Places<'a, A> {
    pub table: Option<&'a Table<A>>,
    pub from: usize,
    pub shape: Shape,
}

impl<A: Real> Places<'_, A> {
    #[inline(always)]
    fn corners(&self, i: usize, x: usize) -> Corners<A> {
        let p = self.from + i;
        if let Some(table) = self.table {
            return table.0[p];
        }
        let (width, positions) = (self.shape.width, self.shape.positions());
        let outside = positions as u32;
        let right = if x + 1 < width { p as u32 + 1 } else { outside };
        let below = if p + width < positions { (p + width) as u32 } else { outside };
        let across = if right != outside && below != outside { below + 1 } else { outside };
        let zero = A::default();
        Corners { at: [p as u32, right, below, across], weight: [A::of(1.0), zero, zero, zero] }
    }
}

/// Sums of v*p*(x-cx), v*p*(y-cy), v*p and the same with q, for (p, q) = d bilinear / d (ix, iy).
pub(super) struct Slopes<'a, A> {
    pub tile: &'a Tile<A>,
    pub source: &'a Tile<A>,
    pub places: Places<'a, A>,
}

impl<A: Real> WithSimd for Slopes<'_, A> {
    type Out = [f64; 6];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> [f64; 6] {
        let (places, shape) = (self.places, self.places.shape);
        let (cx, cy) = ((shape.width as f64 - 1.0) / 2.0, (shape.height as f64 - 1.0) / 2.0);
        let zero = simd.splat(A::default());
        let mut sums = [zero; 6];
        let mut done = 0;
        while done < self.tile.len() {
            let (row, column) =
                ((places.from + done) / shape.width, (places.from + done) % shape.width);
            let length = (shape.width - column).min(self.tile.len() - done);
            // The columns count one by one, the row once for its sum.
            let mut along = [zero; 4];
            let mut x = A::of(column as f64 - cx);
            for i in done..done + length {
                let corners = places.corners(i, column + i - done);
                let [along_x, along_y] =
                    slopes(simd, self.source, simd.load(&self.tile[i]), &corners);
                let columns = simd.splat(x);
                along = [
                    columns.fma(along_x, along[0]),
                    along[1].plus(along_x),
                    columns.fma(along_y, along[2]),
                    along[3].plus(along_y),
                ];
                x += A::of(1.0);
            }
            let y = simd.splat(A::of(row as f64 - cy));
            for (sums, along) in
                sums.as_chunks_mut::<3>().0.iter_mut().zip(along.as_chunks::<2>().0)
            {
                let [by_column, plain] = *along;
                *sums = [sums[0].plus(by_column), y.fma(plain, sums[1]), sums[2].plus(plain)];
            }
            done += length;
        }
        sums.map(|sum| sum.wide().iter().sum())
    }
}

/// v * d bilinear / d ix and v * d bilinear / d iy.
#[inline(always)]
fn slopes<A: Real, S: Simd>(
    simd: S, source: &Tile<A>, v: A::Vector<S>, corners: &Corners<A>,
) -> [A::Vector<S>; 2] {
    let row = |k: usize| simd.load(&source[corners.at[k] as usize]);
    let (a, b, c, d) = (row(0), row(1), row(2), row(3));
    let [_, right, lower, both] = corners.weight;
    let (fx, fy) = (simd.splat(right + both), simd.splat(lower + both));
    let (upper, left) = (b.minus(a), c.minus(a));
    let twist = d.minus(c).minus(upper);
    [v.times(fy.fma(twist, upper)), v.times(fx.fma(twist, left))]
}

/// The adjoint of the sampling: every value is added to its four corners.
pub(super) struct Spread<'a, A> {
    pub tile: &'a Tile<A>,
    pub scatter: &'a mut Tile<A>,
    pub places: Places<'a, A>,
}

impl<A: Real> WithSimd for Spread<'_, A> {
    type Out = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.places.shape.width;
        let mut column = self.places.from % width;
        for (i, v) in self.tile.iter().enumerate() {
            let (corners, v) = (self.places.corners(i, column), simd.load(v));
            for k in 0..4 {
                let row = &mut self.scatter[corners.at[k] as usize];
                simd.splat(corners.weight[k]).fma(v, simd.load(row)).store(row);
            }
            column = if column + 1 == width { 0 } else { column + 1 };
        }
    }
}
