//! The CPU kernel: every map is read once, the gradient written once, in the order of memory.

use super::grid::{Grid, Order, Region};
use super::weights::Weights;
use super::Args;
use crate::parallel;
use crate::simd::tile::{Channels, Map};
use crate::simd::{self, Element, Real, Simd, Vector, WithSimd, LANES};
use crate::tensor::{Result, TensorView};

/// Elements of a tile, which are summed in f32 before the sums go to f64.
const TILE: usize = 2048;
/// Positions of a tile, on the path for any strides.
const POSITIONS: usize = TILE / LANES;

/// Returns the loss and writes the gradient.
///
/// # Safety
/// The maps have the dtype `T`, the shapes agree, and all are in host memory.
pub(crate) unsafe fn forward<T: Element>(
    args: &Args, d_student: Option<&TensorView>, threads: usize,
) -> Result<f64> {
    // SAFETY: the caller's promise.
    let (weights, total) = unsafe { Weights::<T::Acc>::read(args.weight, threads) }?;
    let numel = args.student.numel();
    let area = args.weight.is_some() && args.normalise == "area";
    let divisor = if area { total * args.student.sizes()[1] as f64 } else { numel as f64 };
    if numel == 0 || divisor == 0.0 {
        if let Some(d_student) = d_student {
            // SAFETY: the gradient is dense, so numel elements lie here; zero bits are 0.0.
            unsafe { d_student.ptr().write_bytes(0, numel * d_student.dtype.size()) };
        }
        return Ok(0.0);
    }
    let maps =
        Maps::<T>::new(args, d_student, weights.slice(), T::Acc::of(2.0 * args.scale / divisor));
    let grid = Grid::new(maps.order, maps.sizes);
    let partial = |chunk| {
        grid.regions(chunk)
            .map(|i| simd::run(SumRegion { maps: &maps, at: grid.at(i) }))
            .sum::<f64>()
    };
    let sum: f64 = parallel::map(threads, grid.chunks(), partial).iter().sum();
    Ok(sum * (args.scale / divisor))
}

struct Maps<'a, T: Element> {
    student: Map<T>,
    teacher: Map<T>,
    d_student: Option<Map<T>>,
    order: Order,
    /// B, C, H * W.
    sizes: [usize; 3],
    /// `[B * H * W]`
    weights: Option<&'a [T::Acc]>,
    /// 2 * scale / N
    factor: T::Acc,
}

impl<'a, T: Element> Maps<'a, T> {
    fn new(
        args: &Args, d_student: Option<&TensorView>, weights: Option<&'a [T::Acc]>, factor: T::Acc,
    ) -> Self {
        let views = [args.student, args.teacher, d_student.unwrap_or(args.student)];
        let order = if views.iter().all(|view| view.is_contiguous()) {
            Order::Planes
        } else if views.iter().all(|view| view.is_channels_last()) {
            Order::Lanes
        } else {
            Order::Any
        };
        let s = args.student.sizes();
        Self {
            student: Map::of(args.student),
            teacher: Map::of(args.teacher),
            d_student: d_student.map(Map::of),
            order,
            sizes: [s[0], s[1], s[2] * s[3]],
            weights,
            factor,
        }
    }
}

/// The sum of weighted squares over one region, and its gradient.
struct SumRegion<'a, T: Element> {
    maps: &'a Maps<'a, T>,
    at: Region,
}

impl<T: Element> WithSimd for SumRegion<'_, T> {
    type Out = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        // SAFETY: the region lies within the sizes, and `forward`'s caller promised that memory.
        unsafe {
            match self.maps.order {
                Order::Planes => self.planes(simd),
                Order::Lanes => self.lanes(simd),
                Order::Any => self.tiles(simd),
            }
        }
    }
}

impl<T: Element> SumRegion<'_, T> {
    /// Planes follow one another: the weights of one plane repeat.
    #[inline(always)]
    unsafe fn planes<S: Simd>(&self, simd: S) -> f64 {
        let (maps, at) = (self.maps, &self.at);
        let [_, channels, positions] = maps.sizes;
        let first = (at.n * channels + at.channels.start) * positions + at.positions.start;
        let (rows, width) = (at.channels.len(), at.positions.len());
        let mut weights = [T::Acc::of(1.0); TILE];
        let period = if width < TILE { rows.min(TILE / width) * width } else { width };
        let mut sum = 0.0;
        for from in (0..period).step_by(TILE) {
            let weights = &mut weights[..TILE.min(period - from)];
            if let Some(own) = self.weights() {
                weights
                    .chunks_mut(width)
                    .for_each(|row| row.copy_from_slice(&own[from..from + row.len()]));
            }
            for at in (from..rows * width).step_by(period) {
                let weights = &weights[..weights.len().min(rows * width - at)];
                // SAFETY: within the region.
                sum += unsafe { maps.tile(simd, first + at, weights) };
            }
        }
        sum
    }

    /// The channels of one position follow one another and share a weight.
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, simd: S) -> f64 {
        let (maps, at) = (self.maps, &self.at);
        let [_, channels, positions] = maps.sizes;
        let own = self.weights();
        let mut weights = [T::Acc::of(1.0); TILE];
        let mut sum = 0.0;
        for part in at.channels.clone().step_by(TILE) {
            let width = TILE.min(at.channels.end - part);
            let times = (TILE / width).min(if width == channels { TILE } else { 1 });
            for from in (0..at.positions.len()).step_by(times) {
                let times = times.min(at.positions.len() - from);
                let weights = &mut weights[..times * width];
                if let Some(own) = own {
                    weights
                        .chunks_exact_mut(width)
                        .zip(&own[from..])
                        .for_each(|(row, weight)| row.fill(*weight));
                }
                let first = (at.n * positions + at.positions.start + from) * channels + part;
                // SAFETY: whole positions of the region, or a part of one.
                sum += unsafe { maps.tile(simd, first, weights) };
            }
        }
        sum
    }

    /// Any strides, by tiles of LANES channels.
    #[inline(always)]
    unsafe fn tiles<S: Simd>(&self, simd: S) -> f64 {
        let (maps, at) = (self.maps, &self.at);
        let channels = Channels::new(at.channels.clone());
        let mut student = [[T::Acc::default(); LANES]; POSITIONS];
        let mut teacher = [[T::Acc::default(); LANES]; POSITIONS];
        let mut gradient = [[T::Acc::default(); LANES]; POSITIONS];
        let mut weights = [[T::Acc::of(1.0); LANES]; POSITIONS];
        let factor = simd.splat(maps.factor);
        let mut sum = 0.0;
        for from in (0..at.positions.len()).step_by(POSITIONS) {
            let used = POSITIONS.min(at.positions.len() - from);
            let position = at.positions.start + from;
            // SAFETY: channels and positions of the region.
            unsafe {
                maps.student.load(&mut student[..used], at.n, &channels, position);
                maps.teacher.load(&mut teacher[..used], at.n, &channels, position);
            }
            clear_from(channels.used, &mut student);
            clear_from(channels.used, &mut teacher);
            if let Some(own) = self.weights() {
                spread(&own[from..], &mut weights);
            }
            let mut sums = simd.splat(T::Acc::default());
            for i in 0..used {
                let weighted = add_squares(simd, &student[i], &teacher[i], &weights[i], &mut sums);
                factor.times(weighted).store(&mut gradient[i]);
            }
            sum += total::<T::Acc, S>(sums);
            if let Some(d_student) = maps.d_student {
                // SAFETY: as for loading; no other thread has this region.
                unsafe { d_student.store(&gradient[..used], at.n, &channels, position) };
            }
        }
        sum
    }

    /// The weights of this region's positions.
    #[inline(always)]
    fn weights(&self) -> Option<&[T::Acc]> {
        let plane = self.at.n * self.maps.sizes[2];
        self.maps
            .weights
            .map(|all| &all[plane + self.at.positions.start..plane + self.at.positions.end])
    }
}

/// Lanes past the last channel repeat another one; zeros in their place add nothing to the sums.
#[inline(always)]
fn clear_from<A: Real>(lane: usize, tile: &mut [[A; LANES]; POSITIONS]) {
    if lane < LANES {
        tile.iter_mut().for_each(|row| row[lane..].fill(A::default()));
    }
}

/// Each weight in all lanes. Not inlined: AVX-512 code would be scatters, far slower.
#[inline(never)]
fn spread<A: Real>(weights: &[A], tile: &mut [[A; LANES]; POSITIONS]) {
    tile.iter_mut().zip(weights).for_each(|(row, weight)| *row = [*weight; LANES]);
}

impl<T: Element> Maps<'_, T> {
    /// Consecutive elements, one for each weight.
    ///
    /// # Safety
    /// From the element `from` on, they must lie within the maps, which all run in the same order,
    /// and belong to this thread.
    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, simd: S, from: usize, weights: &[T::Acc]) -> f64 {
        let (mut sums, factor) = (simd.splat(T::Acc::default()), simd.splat(self.factor));
        let (rows, rest) = weights.as_chunks::<LANES>();
        for (i, weights) in rows.iter().enumerate() {
            // SAFETY: a whole row of the caller's elements.
            unsafe { self.row(simd, from + i * LANES, weights, factor, &mut sums) };
        }
        if !rest.is_empty() {
            // SAFETY: the caller's last elements.
            unsafe { self.tail(simd, from + rows.len() * LANES, rest, factor, &mut sums) };
        }
        total::<T::Acc, S>(sums)
    }

    /// [`LANES`] elements from `at` on.
    #[inline(always)]
    unsafe fn row<S: Simd>(
        &self, simd: S, at: usize, weights: &[T::Acc; LANES], factor: <T::Acc as Real>::Vector<S>,
        sums: &mut <T::Acc as Real>::Vector<S>,
    ) {
        let [mut student, mut teacher, mut gradient] = [[T::Acc::default(); LANES]; 3];
        // SAFETY: the caller has these elements.
        unsafe {
            T::load_row(
                self.student.base.wrapping_add(at).cast::<[T; LANES]>().read_unaligned(),
                &mut student,
            );
            T::load_row(
                self.teacher.base.wrapping_add(at).cast::<[T; LANES]>().read_unaligned(),
                &mut teacher,
            );
        }
        let weighted = add_squares(simd, &student, &teacher, weights, sums);
        if let Some(d_student) = self.d_student {
            factor.times(weighted).store(&mut gradient);
            let place = d_student.base.wrapping_add(at).cast::<[T; LANES]>();
            // SAFETY: as above; they belong to this thread.
            unsafe { place.write_unaligned(T::store_row(&gradient)) };
        }
    }

    /// The same for fewer: the lanes past them are zeros.
    #[inline(always)]
    unsafe fn tail<S: Simd>(
        &self, simd: S, at: usize, weights: &[T::Acc], factor: <T::Acc as Real>::Vector<S>,
        sums: &mut <T::Acc as Real>::Vector<S>,
    ) {
        let [mut student, mut teacher, mut all, mut gradient] = [[T::Acc::default(); LANES]; 4];
        all[..weights.len()].copy_from_slice(weights);
        for l in 0..weights.len() {
            // SAFETY: the caller has these elements.
            unsafe {
                student[l] = self.student.base.wrapping_add(at + l).read().load();
                teacher[l] = self.teacher.base.wrapping_add(at + l).read().load();
            }
        }
        factor.times(add_squares(simd, &student, &teacher, &all, sums)).store(&mut gradient);
        let Some(d_student) = self.d_student else { return };
        for (l, gradient) in gradient[..weights.len()].iter().enumerate() {
            // SAFETY: as above; they belong to this thread.
            unsafe { d_student.base.wrapping_add(at + l).write(T::store(*gradient)) };
        }
    }
}

/// Adds the weighted squares of a row to the running sums; returns the weighted differences.
#[inline(always)]
fn add_squares<A: Real, S: Simd>(
    simd: S, student: &[A; LANES], teacher: &[A; LANES], weights: &[A; LANES],
    sums: &mut A::Vector<S>,
) -> A::Vector<S> {
    let difference = simd.load(student).minus(simd.load(teacher));
    let weighted = simd.load(weights).times(difference);
    *sums = sums.plus(weighted.times(difference));
    weighted
}

/// The sum of the lanes in f64, pairwise.
#[inline(always)]
fn total<A: Real, S: Simd>(sums: A::Vector<S>) -> f64 {
    let mut wide = sums.wide();
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            wide[l] += wide[l + half];
        }
    }
    wide[0]
}
