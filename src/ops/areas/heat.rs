//! The heat of an image in the order of memory: rows of equal steps, split into tiles.

use super::larger;
use crate::simd::tile::prefetch_line;
use crate::simd::{Element, Real, Simd, Vector, LANES};
use crate::tensor::TensorView;
use std::cmp::Reverse;

/// Distance of the prefetch, in cells.
const AHEAD: isize = 512;

/// Maximum number of cells in a tile. One maximum is kept for each tile.
const TILE: usize = 128;

/// One of the dimensions A, H, W: its length and its steps.
#[derive(Clone, Copy, Debug)]
struct Dim {
    size: usize,
    /// In the heat, in the teacher's heat.
    steps: [isize; 2],
    /// In the flat index.
    flat: usize,
}

impl Dim {
    fn is_followed_by(&self, inner: &Self) -> bool {
        let gapless = |t: usize| self.steps[t] == inner.steps[t] * inner.size as isize;
        gapless(0) && gapless(1) && self.flat == inner.flat * inner.size
    }
}

/// The heat maps, and their cells in the order of memory: rows of `dims[2]`, split into tiles.
pub(crate) struct Heat<T> {
    bases: [*const T; 2],
    mutual: bool,
    samples: [isize; 2],
    /// A, H, W.
    axes: [Dim; 3],
    /// The same, outermost in memory first, merged where they follow without a gap.
    dims: [Dim; 3],
    reach: usize,
}

// SAFETY: the heat is only read.
unsafe impl<T: Element> Sync for Heat<T> {}

impl<T: Element> Heat<T> {
    /// # Safety
    /// The maps have the dtype `T` and one shape, and are in host memory that lives as long.
    pub(crate) unsafe fn new(
        heat: &TensorView, teacher: Option<&TensorView>, kernel: usize,
    ) -> Self {
        let other = teacher.unwrap_or(heat);
        let (sizes, strides) = (heat.sizes(), [heat.strides(), other.strides()]);
        let flats = [sizes[2] * sizes[3], sizes[3], 1];
        let axes = [1, 2, 3].map(|d| Dim {
            size: sizes[d],
            steps: strides.map(|s| s[d]),
            flat: flats[d - 1],
        });
        Self {
            bases: [heat.as_ptr(), other.as_ptr()],
            mutual: teacher.is_some(),
            samples: strides.map(|s| s[0]),
            axes,
            dims: in_memory_order(axes),
            reach: kernel / 2,
        }
    }

    pub(crate) fn cells(&self) -> usize {
        self.axes.iter().map(|axis| axis.size).product()
    }

    pub(crate) fn tiles(&self) -> usize {
        self.dims[0].size * self.dims[1].size * self.dims[2].size.div_ceil(TILE)
    }

    #[inline(always)]
    pub(crate) fn image(&self, n: usize) -> Image<'_, T> {
        let bases = [0, 1].map(|i| self.bases[i].wrapping_offset(n as isize * self.samples[i]));
        Image { heat: self, bases }
    }
}

/// Outermost in memory first; neighbours in memory and in the flat index become one.
fn in_memory_order(mut axes: [Dim; 3]) -> [Dim; 3] {
    axes.sort_by_key(|dim| {
        Reverse(if dim.size > 1 { dim.steps[0].unsigned_abs() } else { usize::MAX })
    });
    let mut dims: Vec<Dim> = Vec::with_capacity(3);
    for inner in axes {
        match dims.last_mut() {
            Some(outer) if outer.size == 1 || outer.is_followed_by(&inner) => {
                *outer = Dim { size: outer.size * inner.size, ..inner };
            }
            _ => dims.push(inner),
        }
    }
    let single = Dim { size: 1, steps: [0, 0], flat: 0 };
    std::array::from_fn(|i| (i + dims.len()).checked_sub(3).map_or(single, |j| dims[j]))
}

/// A run of cells at one step of memory.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    offsets: [isize; 2],
    pub length: usize,
    /// The flat index of the first, which is the lowest.
    pub flat: usize,
}

pub(crate) struct Image<'a, T> {
    heat: &'a Heat<T>,
    bases: [*const T; 2],
}

impl<T: Element> Image<'_, T> {
    #[inline(always)]
    pub(crate) fn tile(&self, index: usize) -> Tile {
        let [outer, inner, run] = self.heat.dims;
        let per_row = run.size.div_ceil(TILE);
        let (row, first) = (index / per_row, index % per_row * TILE);
        let at = [row / inner.size, row % inner.size, first];
        let step = |t: usize| {
            at[0] as isize * outer.steps[t]
                + at[1] as isize * inner.steps[t]
                + at[2] as isize * run.steps[t]
        };
        let flat = at[0] * outer.flat + at[1] * inner.flat + at[2] * run.flat;
        Tile { offsets: [step(0), step(1)], length: TILE.min(run.size - first), flat }
    }

    /// The maximum over a tile without NaN; of products, before the root, which keeps the order.
    #[inline(always)]
    pub(crate) fn bound<S: Simd>(&self, simd: S, index: usize) -> T::Acc {
        let tile = self.tile(index);
        let lowest = T::Acc::of(f64::NEG_INFINITY);
        let cells = |t: usize, i: usize| {
            let at = self.at(&tile, t, i);
            prefetch_line(at.wrapping_offset(AHEAD));
            // SAFETY: called below only where LANES consecutive cells of the tile begin at i.
            unsafe { consecutive::<T, S>(simd, at) }
        };
        let most = match (self.dense() && tile.length >= LANES, self.heat.mutual) {
            (true, true) => {
                most::<T::Acc, S>(simd, tile.length, |i| cells(0, i).times(cells(1, i)))
            }
            (true, false) => most::<T::Acc, S>(simd, tile.length, |i| cells(0, i)),
            (false, _) => most::<T::Acc, S>(simd, tile.length, |i| self.row(simd, &tile, i)),
        };
        let mut lanes = [lowest; LANES];
        most.store(&mut lanes);
        for half in [8, 4, 2, 1] {
            for l in 0..half {
                lanes[l] = larger(lanes[l + half], lanes[l]);
            }
        }
        // The root of a negative product is NaN: such a tile has no peak.
        larger(self.score(lanes[0]), lowest)
    }

    /// The scores of LANES cells of a tile; NaN past its end.
    #[inline(always)]
    pub(crate) fn scores<S: Simd>(&self, simd: S, tile: &Tile, from: usize) -> [T::Acc; LANES] {
        let mut lanes = [T::Acc::default(); LANES];
        self.row(simd, tile, from).store(&mut lanes);
        lanes.map(|value| self.score(value))
    }

    /// The flat index of a tile's cell.
    #[inline(always)]
    pub(crate) fn flat(&self, tile: &Tile, i: usize) -> usize {
        tile.flat + i * self.heat.dims[2].flat
    }

    /// Whether no neighbour of this cell is greater than its score, or NaN.
    #[inline(always)]
    pub(crate) fn is_peak(&self, flat: usize, score: T::Acc) -> bool {
        let [maps, rows, columns] = self.heat.axes;
        let (map, cell) = (flat / maps.flat, flat % maps.flat);
        let (y, x) = (cell / columns.size, cell % columns.size);
        let reach = self.heat.reach;
        let around = |at: usize, size: usize| {
            at.saturating_sub(reach)..size.min(at.saturating_add(reach + 1))
        };
        around(y, rows.size).all(|y| {
            around(x, columns.size).all(|x| {
                let at = |t: usize| {
                    let offset = map as isize * maps.steps[t]
                        + y as isize * rows.steps[t]
                        + x as isize * columns.steps[t];
                    self.bases[t].wrapping_offset(offset)
                };
                // SAFETY: map, y and x are within the sizes.
                let value = unsafe { self.value(at(0), at(1)) };
                self.score(value) <= score
            })
        })
    }

    /// LANES cells of a tile, before the root; NaN past its end.
    #[inline(always)]
    fn row<S: Simd>(&self, simd: S, tile: &Tile, from: usize) -> <T::Acc as Real>::Vector<S> {
        let at = |t: usize, i: usize| self.at(tile, t, from + i);
        if self.dense() && from + LANES <= tile.length {
            // SAFETY: LANES consecutive cells of the tile, in both maps.
            let [own, other] = [0, 1].map(|t| unsafe { consecutive::<T, S>(simd, at(t, 0)) });
            return if self.heat.mutual { own.times(other) } else { own };
        }
        simd.load(&std::array::from_fn(|i| match from + i < tile.length {
            // SAFETY: a cell of the tile.
            true => unsafe { self.value(at(0, i), at(1, i)) },
            false => T::Acc::of(f64::NAN),
        }))
    }

    /// Whether the cells of a tile follow one another in both maps.
    #[inline(always)]
    fn dense(&self) -> bool {
        self.heat.dims[2].steps == [1, 1]
    }

    /// The address of a cell of a tile in map `t`.
    #[inline(always)]
    fn at(&self, tile: &Tile, t: usize, i: usize) -> *const T {
        self.bases[t].wrapping_offset(tile.offsets[t] + i as isize * self.heat.dims[2].steps[t])
    }

    /// One cell, before the root.
    #[inline(always)]
    unsafe fn value(&self, own: *const T, other: *const T) -> T::Acc {
        // SAFETY: the caller has a cell there.
        let own = unsafe { own.read() }.load();
        if !self.heat.mutual {
            return own;
        }
        // SAFETY: as above.
        own * unsafe { other.read() }.load()
    }

    #[inline(always)]
    fn score(&self, value: T::Acc) -> T::Acc {
        if self.heat.mutual {
            value.root()
        } else {
            value
        }
    }
}

/// The greatest of all rows of `length` cells, lane by lane.
#[inline(always)]
fn most<A: Real, S: Simd>(
    simd: S, length: usize, row: impl Fn(usize) -> A::Vector<S>,
) -> A::Vector<S> {
    let mut most = simd.splat(A::of(f64::NEG_INFINITY));
    // The last row ends with the tile; cells that are read twice do not change a maximum.
    let last = length.saturating_sub(LANES);
    for i in (0..length).step_by(LANES) {
        most = row(i.min(last)).larger(most);
    }
    most
}

/// [`LANES`] cells from `at` on.
#[inline(always)]
unsafe fn consecutive<T: Element, S: Simd>(simd: S, at: *const T) -> <T::Acc as Real>::Vector<S> {
    let mut lanes = [T::Acc::default(); LANES];
    // SAFETY: the caller's promise.
    T::load_row(unsafe { at.cast::<[T; LANES]>().read_unaligned() }, &mut lanes);
    simd.load(&lanes)
}
