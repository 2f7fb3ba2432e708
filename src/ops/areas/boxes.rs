//! From peaks to boxes, and from boxes to coverage.

use super::peaks::Peak;
use super::{Args, Outputs};
use crate::simd::{Element, Real};
use crate::tensor::TensorView;

/// A `[B, 2, H, W]` map.
#[derive(Clone, Copy)]
struct Pair<T> {
    base: *const T,
    strides: [isize; 4],
}

impl<T: Element> Pair<T> {
    fn new(view: &TensorView) -> Self {
        let s = view.strides();
        Self { base: view.as_ptr(), strides: [s[0], s[1], s[2], s[3]] }
    }

    /// Both values at one cell.
    unsafe fn at(&self, n: usize, y: usize, x: usize) -> [T::Acc; 2] {
        let [sn, sc, sy, sx] = self.strides;
        let first = self.base.wrapping_offset(n as isize * sn + y as isize * sy + x as isize * sx);
        // SAFETY: the caller keeps n, y and x within the sizes; there are two channels.
        unsafe { [first.read().load(), first.wrapping_offset(sc).read().load()] }
    }
}

/// The maps that boxes come from, and where all results go.
pub(super) struct BoxWriter<T: Element> {
    /// size and offset
    student: [Pair<T>; 2],
    teacher: Option<[Pair<T>; 2]>,
    coverage: *mut f32,
    boxes: *mut [i64; 4],
    scores: *mut T::Acc,
    k: usize,
    height: usize,
    width: usize,
}

// SAFETY: the maps are only read; one thread writes the outputs of an image.
unsafe impl<T: Element> Sync for BoxWriter<T> {}

impl<T: Element> BoxWriter<T> {
    pub(crate) fn new(args: &Args, outputs: &Outputs) -> Self {
        Self {
            student: [Pair::new(args.size), Pair::new(args.offset)],
            teacher: args.teacher.map(|[_, size, offset]| [Pair::new(size), Pair::new(offset)]),
            coverage: outputs.coverage.as_ptr(),
            boxes: outputs.boxes.as_ptr(),
            scores: outputs.scores.as_ptr(),
            k: args.k as usize,
            height: args.heat.sizes()[2],
            width: args.heat.sizes()[3],
        }
    }

    /// Writes the results of image `n` from its peaks, best first.
    ///
    /// # Safety
    /// The call was checked for the dtype `T`, `n` is in the batch, and no other thread writes it.
    pub(crate) unsafe fn write(&self, n: usize, peaks: &[Peak<T::Acc>]) {
        let cells = self.height * self.width;
        // SAFETY: [B, H, W] f32, contiguous.
        let coverage =
            unsafe { std::slice::from_raw_parts_mut(self.coverage.wrapping_add(n * cells), cells) };
        coverage.fill(0.0);
        for slot in 0..self.k {
            let (corners, score) = match peaks.get(slot) {
                // SAFETY: a peak lies within the map.
                Some(peak) => (unsafe { self.corners(n, peak.flat % cells) }, peak.score),
                None => ([0, 0, -1, -1], T::Acc::default()),
            };
            self.cover(coverage, corners);
            // SAFETY: slot < k; [B, k, 4] i64 and [B, k], contiguous.
            unsafe {
                self.boxes.wrapping_add(n * self.k + slot).write(corners);
                self.scores.wrapping_add(n * self.k + slot).write(score);
            }
        }
    }

    /// y0 x0 y1 x1 of the box at a cell.
    unsafe fn corners(&self, n: usize, cell: usize) -> [i64; 4] {
        let (y, x) = (cell / self.width, cell % self.width);
        let half = T::Acc::of(0.5);
        // SAFETY: the caller keeps n and the cell within the sizes.
        let [mut size, mut offset] = self.student.map(|map| unsafe { map.at(n, y, x) });
        if let Some(teacher) = self.teacher {
            // SAFETY: as above.
            let [size_t, offset_t] = teacher.map(|map| unsafe { map.at(n, y, x) });
            size = [half * (size[0] + size_t[0]), half * (size[1] + size_t[1])];
            offset = [half * (offset[0] + offset_t[0]), half * (offset[1] + offset_t[1])];
        }
        let centre = [T::Acc::of(x as f64) + offset[0], T::Acc::of(y as f64) + offset[1]];
        let reach = [half * size[0], half * size[1]];
        let last = [self.width as f64 - 1.0, self.height as f64 - 1.0];
        // A NaN passes the clamp and becomes 0 as an integer.
        let cell = |value: T::Acc, d: usize| value.to_f64().clamp(0.0, last[d]) as i64;
        let low = |d| cell(centre[d] - reach[d], d);
        let high = |d| cell(centre[d] + reach[d], d);
        [low(1), low(0), high(1), high(0)]
    }

    /// Adds one to every cell of a box; a box that ends before it begins is empty.
    fn cover(&self, coverage: &mut [f32], [y0, x0, y1, x1]: [i64; 4]) {
        for y in y0..=y1 {
            let row = y as usize * self.width;
            for x in x0..=x1 {
                coverage[row + x as usize] += 1.0;
            }
        }
    }
}
