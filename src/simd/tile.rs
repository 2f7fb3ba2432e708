//! Tiles: `LANES` channels side by side at every position, `[positions][LANES]`, for any strides.
//!
//! All kernels work on tiles, so contiguous, channels_last, sliced and expanded tensors run the
//! same arithmetic; only loading and storing differ. Planes that are rows of consecutive elements
//! are transposed 16 x 16 at a time.

use crate::simd::{self, Element, Real, Simd, WithSimd, LANES};
use crate::tensor::TensorView;
use std::cell::RefCell;
use std::ops::Range;

/// The memory layout of `[B, C, H, W]`, without its dtype.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Strides of B, C, H, W in elements.
    pub n: isize,
    pub c: isize,
    pub h: isize,
    pub w: isize,
    /// Positions in a row, after which the row stride applies (H*W for rows without gaps).
    pub run: usize,
}

impl Layout {
    pub(crate) fn of(view: &TensorView) -> Self {
        let (sizes, strides) = (view.sizes(), view.strides());
        let (height, width) = (sizes[2], sizes[3]);
        let (h, w) = (strides[2], strides[3]);
        let gapless = height <= 1 || h == w * width as isize;
        Self {
            n: strides[0],
            c: strides[1],
            h,
            w,
            run: if gapless { height * width } else { width },
        }
    }

    /// Channels lie side by side, and planes are not rows of consecutive elements as well (as they
    /// are when C is 1).
    pub(crate) fn interleaves(&self) -> bool {
        self.c == 1 && self.w != 1
    }

    #[inline(always)]
    fn position(&self, p: usize) -> isize {
        (p / self.run) as isize * self.h + (p % self.run) as isize * self.w
    }

    /// Positions `from .. from + count` in runs of equal steps: part of the tile, first offset.
    #[inline(always)]
    fn runs(&self, from: usize, count: usize) -> impl Iterator<Item = (Range<usize>, isize)> {
        let (layout, mut done) = (*self, 0);
        std::iter::from_fn(move || {
            let p = from + done;
            let length = (layout.run - p % layout.run.max(1)).min(count - done);
            let part = done..done + length;
            done += length;
            (!part.is_empty()).then(|| (part, layout.position(p)))
        })
    }
}

/// The channels of one tile; lanes past `used` repeat a valid channel and are never stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Channels {
    /// Channel of every lane.
    pub at: [usize; LANES],
    /// How many lanes are in use.
    pub used: usize,
}

impl Channels {
    /// From a list of 1 to [`LANES`] channels.
    pub(crate) fn new(list: impl ExactSizeIterator<Item = usize>) -> Self {
        let used = list.len();
        let mut at = [0; LANES];
        for (slot, channel) in at.iter_mut().zip(list) {
            *slot = channel;
        }
        let first = at[0];
        at[used..].fill(first);
        Self { at, used }
    }

    /// `from ..` up to `LANES` of `total` channels.
    pub(crate) fn starting_at(from: usize, total: usize) -> Self {
        Self::new(from..total.min(from + LANES))
    }

    fn consecutive(&self) -> bool {
        self.used == LANES && (1..LANES).all(|i| self.at[i] == self.at[0] + i)
    }
}

/// A map `[B, C, H, W]` in memory.
#[derive(Clone, Copy)]
pub(crate) struct Map<T> {
    /// The first element.
    pub base: *mut T,
    pub layout: Layout,
}

// SAFETY: chunks read memory that nothing writes, and write disjoint channels.
unsafe impl<T: Send> Send for Map<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Map<T> {}

impl<T> Map<T> {
    pub(crate) fn of(view: &TensorView) -> Self {
        Self { base: view.as_ptr(), layout: Layout::of(view) }
    }

    /// The first element of a plane.
    #[inline(always)]
    pub(crate) fn plane(&self, n: usize, channel: usize) -> *mut T {
        let offset = n as isize * self.layout.n + channel as isize * self.layout.c;
        self.base.wrapping_offset(offset)
    }

    #[inline(always)]
    fn planes(&self, n: usize, channels: &Channels) -> [*mut T; LANES] {
        std::array::from_fn(|l| self.plane(n, channels.at[l]))
    }

    /// Prefetches these positions: sixteen planes at a time are too many for the hardware.
    #[inline(always)]
    pub(crate) fn prefetch(&self, n: usize, channels: &Channels, from: usize, count: usize) {
        let layout = &self.layout;
        for (part, start) in layout.runs(from, count) {
            if layout.w == 1 {
                for c in &channels.at[..channels.used] {
                    let first = self.plane(n, *c).wrapping_offset(start);
                    (0..part.len())
                        .step_by(64 / size_of::<T>())
                        .for_each(|i| prefetch_line(first.wrapping_add(i)));
                }
            } else if layout.c == 1 {
                let lanes = self.plane(n, channels.at[0]).wrapping_offset(start);
                (0..part.len() as isize)
                    .for_each(|i| prefetch_line(lanes.wrapping_offset(i * layout.w)));
            }
        }
    }
}

impl<T: Element> Map<T> {
    /// Loads positions `from .. from + tile.len()` of sample `n`.
    ///
    /// # Safety
    /// The map must be readable memory for sample `n`, these channels and positions.
    pub(crate) unsafe fn load(
        &self, tile: &mut [[T::Acc; LANES]], n: usize, channels: &Channels, from: usize,
    ) {
        for (i, tile) in tile.chunks_mut(PREFETCHED).enumerate() {
            let from = from + i * PREFETCHED;
            self.prefetch(n, channels, from, tile.len());
            simd::run(Load { map: self, tile, n, channels, from });
        }
    }

    /// Stores a tile to positions `from ..` of sample `n`, without the lanes past `used`.
    ///
    /// # Safety
    /// As for [`Map::load`], for writing, and no other thread may touch these elements.
    pub(crate) unsafe fn store(
        &self, tile: &[[T::Acc; LANES]], n: usize, channels: &Channels, from: usize,
    ) {
        simd::run(Store { map: self, tile, n, channels, from });
    }
}

/// Positions prefetched at a time: with 16 lanes of f32 they fill half of a first-level cache.
const PREFETCHED: usize = 256;

/// Prefetches one cache line; any address is allowed.
#[inline(always)]
pub(crate) fn prefetch_line<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads and writes nothing, whatever the address.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

struct Load<'a, T: Element> {
    map: &'a Map<T>,
    tile: &'a mut [[T::Acc; LANES]],
    n: usize,
    channels: &'a Channels,
    from: usize,
}

impl<T: Element> WithSimd for Load<'_, T> {
    type Out = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let layout = &self.map.layout;
        let planes = self.map.planes(self.n, self.channels).map(<*mut T>::cast_const);
        for (part, start) in layout.runs(self.from, self.tile.len()) {
            let part = &mut self.tile[part];
            // SAFETY: the promise of `Map::load`'s caller covers every position of this run.
            unsafe {
                if layout.w == 1 && part.len() > 1 {
                    load_rows(simd, part, &planes, start);
                } else if layout.c == 1 && self.channels.consecutive() {
                    load_lanes(part, planes[0].wrapping_offset(start), layout.w);
                } else {
                    load_any(part, &planes, start, layout.w);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn load_rows<T: Element, S: Simd>(
    simd: S, tile: &mut [[T::Acc; LANES]], planes: &[*const T; LANES], start: isize,
) {
    let whole = tile.len() - tile.len() % LANES;
    let (squares, rest) = tile.split_at_mut(whole);
    for (k, block) in squares.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        // SAFETY: positions at .. at + LANES of these planes are within the run.
        unsafe { T::load_square(simd, planes, start + (k * LANES) as isize, block) };
    }
    // SAFETY: the rest of the run.
    unsafe { load_any(rest, planes, start + whole as isize, 1) }
}

#[inline(always)]
unsafe fn load_lanes<T: Element>(tile: &mut [[T::Acc; LANES]], first: *const T, step: isize) {
    for (i, row) in tile.iter_mut().enumerate() {
        // SAFETY: LANES consecutive channels at every position of the run.
        let lanes = unsafe {
            first.wrapping_offset(i as isize * step).cast::<[T; LANES]>().read_unaligned()
        };
        T::load_row(lanes, row);
    }
}

#[inline(always)]
unsafe fn load_any<T: Element>(
    tile: &mut [[T::Acc; LANES]], planes: &[*const T; LANES], start: isize, step: isize,
) {
    for (i, row) in tile.iter_mut().enumerate() {
        let at = start + i as isize * step;
        for l in 0..LANES {
            // SAFETY: each lane's channel at a position of the run.
            row[l] = unsafe { planes[l].wrapping_offset(at).read() }.load();
        }
    }
}

struct Store<'a, T: Element> {
    map: &'a Map<T>,
    tile: &'a [[T::Acc; LANES]],
    n: usize,
    channels: &'a Channels,
    from: usize,
}

impl<T: Element> WithSimd for Store<'_, T> {
    type Out = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (layout, channels) = (&self.map.layout, self.channels);
        let planes = self.map.planes(self.n, channels);
        for (part, start) in layout.runs(self.from, self.tile.len()) {
            let part = &self.tile[part];
            // SAFETY: the promise of `Map::store`'s caller covers every position of this run.
            unsafe {
                if layout.w == 1 && part.len() > 1 {
                    store_rows(simd, part, &planes, channels.used, start);
                } else if layout.c == 1 && channels.consecutive() {
                    store_lanes(part, planes[0].wrapping_offset(start), layout.w);
                } else {
                    store_any(part, &planes, channels.used, start, layout.w);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn store_rows<T: Element, S: Simd>(
    simd: S, tile: &[[T::Acc; LANES]], planes: &[*mut T; LANES], used: usize, start: isize,
) {
    let whole = tile.len() - tile.len() % LANES;
    let (squares, rest) = tile.split_at(whole);
    for (k, block) in squares.as_chunks::<LANES>().0.iter().enumerate() {
        // SAFETY: positions at .. at + LANES of these planes are within the run.
        unsafe { T::store_square(simd, block, planes, used, start + (k * LANES) as isize) };
    }
    // SAFETY: the rest of the run.
    unsafe { store_any(rest, planes, used, start + whole as isize, 1) }
}

#[inline(always)]
unsafe fn store_lanes<T: Element>(tile: &[[T::Acc; LANES]], first: *mut T, step: isize) {
    for (i, row) in tile.iter().enumerate() {
        let lanes = T::store_row(row);
        // SAFETY: LANES consecutive channels at every position of the run.
        unsafe {
            first.wrapping_offset(i as isize * step).cast::<[T; LANES]>().write_unaligned(lanes)
        };
    }
}

#[inline(always)]
unsafe fn store_any<T: Element>(
    tile: &[[T::Acc; LANES]], planes: &[*mut T; LANES], used: usize, start: isize, step: isize,
) {
    for (i, row) in tile.iter().enumerate() {
        let at = start + i as isize * step;
        for l in 0..used {
            // SAFETY: each used lane's channel at a position of the run.
            unsafe { planes[l].wrapping_offset(at).write(T::store(row[l])) };
        }
    }
}

/// A tile in memory that this thread reuses: too large for the stack, slow as fresh pages.
///
/// Taken from a stack of buffers and returned when dropped, so nested tiles do not overlap.
pub(crate) struct Scratch<A> {
    store: Vec<Line>,
    positions: usize,
    element: std::marker::PhantomData<A>,
}

impl<A: Real> Scratch<A> {
    /// Room for `positions` rows of lanes; their content is arbitrary.
    pub(crate) fn new(positions: usize) -> Self {
        let lines = positions * size_of::<[A; LANES]>() / size_of::<Line>();
        let mut store = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
        if store.len() < lines {
            store.resize(lines, Line([0; 64]));
        }
        Self { store, positions, element: std::marker::PhantomData }
    }

    pub(crate) fn tile(&mut self) -> &mut [[A; LANES]] {
        // SAFETY: `new` made room for these rows, aligned to 64 bytes; any bits are valid floats.
        unsafe { std::slice::from_raw_parts_mut(self.store.as_mut_ptr().cast(), self.positions) }
    }
}

impl<A> Drop for Scratch<A> {
    fn drop(&mut self) {
        SCRATCH.with_borrow_mut(|free| free.push(std::mem::take(&mut self.store)));
    }
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}
