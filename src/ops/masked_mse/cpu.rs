//! The CPU kernel: pieces of a sample in the order of memory; student, teacher and weight are read once, the gradient is written once.

use super::grid::{Grid, Order, Piece};
use super::weights::Weights;
use super::Args;
use crate::error::Result;
use crate::parallel;
use crate::simd::{self, Elem, Job, Real, LANES};
use crate::tile::{self, Channels, Layout};
use crate::view::TensorView;
use std::slice;

/// Elements that are summed in f32 before the sums go to f64.
const BLOCK: usize = 2048;
/// Positions of a tile, on the path for any strides.
const TILE: usize = BLOCK / LANES;

/// Returns the loss and writes the gradient.
///
/// # Safety
/// The maps have the dtype `T`, the shapes agree, and all are in host memory.
pub unsafe fn forward<T: Elem>(args: &Args, threads: usize) -> Result<f64> {
    // SAFETY: the caller's promise.
    let (weights, total) = unsafe { Weights::<T::Acc>::read(args.weight, threads) }?;
    let numel = args.student.numel();
    let area = args.weight.is_some() && args.normalise == "area";
    let divisor = if area { total * args.student.sizes()[1] as f64 } else { numel as f64 };
    if numel == 0 || divisor == 0.0 {
        if let Some(d_student) = args.d_student {
            // SAFETY: the gradient is dense, so numel elements lie here; zero bits are 0.0 in every float dtype.
            unsafe { d_student.ptr().write_bytes(0, numel * d_student.dtype.size()) };
        }
        return Ok(0.0);
    }
    let maps = Maps::<T>::new(args, weights.slice(), T::Acc::of(2.0 * args.scale / divisor));
    let grid = Grid::new(maps.order, maps.sizes);
    let partial =
        |chunk| grid.units(chunk).map(|i| simd::run(Unit { maps: &maps, at: grid.at(i) })).sum::<f64>();
    let sum: f64 = parallel::map(threads, grid.chunks(), partial).iter().sum();
    Ok(sum * (args.scale / divisor))
}

struct Maps<'a, T: Elem> {
    student: *const T,
    teacher: *const T,
    d_student: Option<*mut T>,
    layouts: [Layout; 3],
    order: Order,
    /// B, C, H * W.
    sizes: [usize; 3],
    /// `[B * H * W]`
    weights: Option<&'a [T::Acc]>,
    /// 2 * scale / N
    factor: T::Acc,
}

// SAFETY: the inputs are only read; every element of the gradient belongs to one unit, and every unit to one thread.
unsafe impl<T: Elem> Sync for Maps<'_, T> {}

impl<'a, T: Elem> Maps<'a, T> {
    fn new(args: &Args, weights: Option<&'a [T::Acc]>, factor: T::Acc) -> Self {
        let views = [args.student, args.teacher, args.d_student.unwrap_or(args.student)];
        let order = if views.iter().all(|view| view.is_contiguous()) {
            Order::Planes
        } else if views.iter().all(|view| view.is_channels_last()) {
            Order::Lanes
        } else {
            Order::Any
        };
        let s = args.student.sizes();
        Self {
            student: args.student.as_ptr(),
            teacher: args.teacher.as_ptr(),
            d_student: args.d_student.map(TensorView::as_ptr),
            layouts: views.map(Layout::of),
            order,
            sizes: [s[0], s[1], s[2] * s[3]],
            weights,
            factor,
        }
    }
}

/// The work on one piece; returns its sum of weighted squares.
struct Unit<'a, T: Elem> {
    maps: &'a Maps<'a, T>,
    at: Piece,
}

impl<T: Elem> Job for Unit<'_, T> {
    type Out = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        // SAFETY: the piece lies within the sizes, and `forward`'s caller promised that memory.
        unsafe {
            match self.maps.order {
                Order::Planes => self.planes(),
                Order::Lanes => self.lanes(),
                Order::Any => self.tiles(),
            }
        }
    }
}

impl<T: Elem> Unit<'_, T> {
    /// The rows of the channels follow one another: the weights of one plane, repeated, run along.
    #[inline(always)]
    unsafe fn planes(&self) -> f64 {
        let (maps, at) = (self.maps, &self.at);
        let [_, channels, positions] = maps.sizes;
        let first = (at.n * channels + at.channels.start) * positions + at.positions.start;
        let (rows, width) = (at.channels.len(), at.positions.len());
        let (mut weights, mut buffer) = ([T::Acc::of(1.0); BLOCK], [T::Acc::default(); BLOCK]);
        let period = if width < BLOCK { rows.min(BLOCK / width) * width } else { width };
        let mut sum = 0.0;
        for from in (0..period).step_by(BLOCK) {
            let weights = &mut weights[..BLOCK.min(period - from)];
            if let Some(own) = self.weights() {
                weights.chunks_mut(width).for_each(|row| row.copy_from_slice(&own[from..from + row.len()]));
            }
            for at in (from..rows * width).step_by(period) {
                let weights = &weights[..weights.len().min(rows * width - at)];
                // SAFETY: within the piece.
                sum += unsafe { maps.block(first + at, weights, &mut buffer) };
            }
        }
        sum
    }

    /// The channels of one position follow one another and share a weight.
    #[inline(always)]
    unsafe fn lanes(&self) -> f64 {
        let (maps, at) = (self.maps, &self.at);
        let [_, channels, positions] = maps.sizes;
        let own = self.weights();
        let (mut weights, mut buffer) = ([T::Acc::of(1.0); BLOCK], [T::Acc::default(); BLOCK]);
        let mut sum = 0.0;
        for part in at.channels.clone().step_by(BLOCK) {
            let width = BLOCK.min(at.channels.end - part);
            let times = (BLOCK / width).min(if width == channels { BLOCK } else { 1 });
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
                // SAFETY: whole positions of the piece, or a part of one.
                sum += unsafe { maps.block(first, weights, &mut buffer) };
            }
        }
        sum
    }

    /// Any strides, by tiles of LANES channels.
    #[inline(always)]
    unsafe fn tiles(&self) -> f64 {
        let (maps, at) = (self.maps, &self.at);
        let channels = Channels::new(at.channels.clone());
        let mut student = [[T::Acc::default(); LANES]; TILE];
        let mut teacher = [[T::Acc::default(); LANES]; TILE];
        let mut gradient = [[T::Acc::default(); LANES]; TILE];
        let mut weights = [[T::Acc::of(1.0); LANES]; TILE];
        let mut buffer = [T::Acc::default(); BLOCK];
        let mut sum = 0.0;
        for from in (0..at.positions.len()).step_by(TILE) {
            let used = TILE.min(at.positions.len() - from);
            let position = at.positions.start + from;
            // SAFETY: channels and positions of the piece.
            unsafe {
                tile::load(&mut student[..used], maps.student, &maps.layouts[0], at.n, &channels, position);
                tile::load(&mut teacher[..used], maps.teacher, &maps.layouts[1], at.n, &channels, position);
            }
            clear_from(channels.used, &mut student);
            clear_from(channels.used, &mut teacher);
            if let Some(own) = self.weights() {
                spread(&own[from..], &mut weights);
            }
            let (s, t, g) = (student.as_flattened(), teacher.as_flattened(), gradient.as_flattened_mut());
            let (difference, weights) = (|i: usize| s[i] - t[i], weights[..used].as_flattened());
            sum += squares(difference, weights, maps.factor, &mut buffer, |i, value| g[i] = value);
            if let Some(d_student) = maps.d_student {
                let layout = &maps.layouts[2];
                // SAFETY: as for loading; this piece is this thread's alone.
                unsafe { tile::store(&gradient[..used], d_student, layout, at.n, &channels, position) };
            }
        }
        sum
    }

    /// The weights of this piece's positions.
    #[inline(always)]
    fn weights(&self) -> Option<&[T::Acc]> {
        let plane = self.at.n * self.maps.sizes[2];
        self.maps.weights.map(|all| &all[plane + self.at.positions.start..plane + self.at.positions.end])
    }
}

/// A lane past the last channel repeats another: zeros in its place add nothing, whatever was there.
#[inline(always)]
fn clear_from<A: Real>(lane: usize, tile: &mut [[A; LANES]; TILE]) {
    if lane < LANES {
        tile.iter_mut().for_each(|row| row[lane..].fill(A::default()));
    }
}

/// Each weight in all lanes. Not inlined: for AVX-512 the compiler would turn it into scatters, which are slower by far.
#[inline(never)]
fn spread<A: Real>(weights: &[A], tile: &mut [[A; LANES]; TILE]) {
    tile.iter_mut().zip(weights).for_each(|(row, weight)| *row = [*weight; LANES]);
}

impl<T: Elem> Maps<'_, T> {
    /// Consecutive elements, one for each weight.
    ///
    /// # Safety
    /// From the element `from` on, they must lie within the maps, which all run in the same order, and belong to this thread.
    #[inline(always)]
    unsafe fn block(&self, from: usize, weights: &[T::Acc], buffer: &mut [T::Acc; BLOCK]) -> f64 {
        // SAFETY: the caller's promise, twice.
        let student = unsafe { slice::from_raw_parts(self.student.wrapping_add(from), weights.len()) };
        // SAFETY: as above.
        let teacher = unsafe { slice::from_raw_parts(self.teacher.wrapping_add(from), weights.len()) };
        let difference = |i: usize| student[i].load() - teacher[i].load();
        match self.d_student {
            None => squares(difference, weights, self.factor, buffer, |_, _| {}),
            Some(d_student) => squares(difference, weights, self.factor, buffer, |i, gradient| {
                // SAFETY: i is below the number of weights.
                unsafe { d_student.wrapping_add(from + i).write(T::store(gradient)) }
            }),
        }
    }
}

/// The sum of the weighted squares of at most [`BLOCK`] differences; every gradient goes to `keep`.
///
/// Two plain loops: the compiler turns each into vector code for every dtype, which it does not for one loop with running sums.
#[inline(always)]
fn squares<A: Real>(
    difference: impl Fn(usize) -> A,
    weights: &[A],
    factor: A,
    buffer: &mut [A; BLOCK],
    mut keep: impl FnMut(usize, A),
) -> f64 {
    for (i, (square, weight)) in buffer.iter_mut().zip(weights).enumerate() {
        let difference = difference(i);
        let weighted = *weight * difference;
        *square = weighted * difference;
        keep(i, factor * weighted);
    }
    total(&buffer[..weights.len()])
}

/// The sum: LANES running sums, then those in f64, pairwise.
#[inline(always)]
fn total<A: Real>(values: &[A]) -> f64 {
    let mut sums = [A::default(); LANES];
    let rows = values.chunks_exact(LANES);
    let rest = rows.remainder();
    for row in rows {
        for l in 0..LANES {
            sums[l] += row[l];
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += *value;
    }
    let mut wide = sums.map(Real::to_f64);
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            wide[l] += wide[l + half];
        }
    }
    wide[0]
}
