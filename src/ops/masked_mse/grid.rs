//! How the work is cut: units of one sample's channels and positions, and chunks of small units. Shapes and the order of memory decide.

use crate::simd::LANES;
use std::ops::Range;

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 15;

/// How memory runs.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Order {
    /// `[B, C, H, W]` without gaps.
    Planes,
    /// `[B, H, W, C]` without gaps.
    Lanes,
    /// Any strides.
    Any,
}

/// One sample's channels and positions that are done in one go.
pub(crate) struct Piece {
    pub n: usize,
    pub channels: Range<usize>,
    pub positions: Range<usize>,
}

/// The cut into units of about [`CHUNK`] elements, and small units into chunks; it depends on the shapes and the order alone.
pub(crate) struct Grid {
    sizes: [usize; 3],
    /// Channels and positions of a unit.
    steps: [usize; 2],
    units_per_chunk: usize,
}

impl Grid {
    /// For `[B, C, H * W]`.
    pub(crate) fn new(order: Order, sizes: [usize; 3]) -> Self {
        let [_, channels, positions] = sizes;
        let share = |one: usize, all: usize| (CHUNK / one).clamp(1, all);
        let steps = match order {
            Order::Planes => [share(positions.min(CHUNK), channels), positions.min(CHUNK)],
            Order::Lanes => [channels.min(CHUNK), share(channels.min(CHUNK), positions)],
            Order::Any => [LANES.min(channels), share(LANES, positions)],
        };
        Self { sizes, steps, units_per_chunk: share(steps[0] * steps[1], usize::MAX) }
    }

    fn cuts(&self) -> [usize; 2] {
        [self.sizes[1].div_ceil(self.steps[0]), self.sizes[2].div_ceil(self.steps[1])]
    }

    fn all_units(&self) -> usize {
        self.sizes[0] * self.cuts()[0] * self.cuts()[1]
    }

    /// What the threads take.
    pub(crate) fn chunks(&self) -> usize {
        self.all_units().div_ceil(self.units_per_chunk)
    }

    /// The units of a chunk.
    pub(crate) fn units(&self, chunk: usize) -> Range<usize> {
        let first = chunk * self.units_per_chunk;
        first..self.all_units().min(first + self.units_per_chunk)
    }

    /// Where a unit lies.
    pub(crate) fn at(&self, unit: usize) -> Piece {
        let [by_channels, by_positions] = self.cuts();
        let (n, rest) = (unit / (by_channels * by_positions), unit % (by_channels * by_positions));
        let (c, p) = (rest / by_positions * self.steps[0], rest % by_positions * self.steps[1]);
        let channels = c..self.sizes[1].min(c + self.steps[0]);
        Piece { n, channels, positions: p..self.sizes[2].min(p + self.steps[1]) }
    }
}
