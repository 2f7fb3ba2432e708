//! The split of the maps into regions, and of small regions into chunks, by shapes and order.

use crate::simd::LANES;
use std::ops::Range;

const CHUNK: usize = 1 << 15;

/// The order of elements in memory.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Order {
    /// `[B, C, H, W]` without gaps.
    Planes,
    /// `[B, H, W, C]` without gaps.
    Lanes,
    Any,
}

pub(crate) struct Region {
    pub n: usize,
    pub channels: Range<usize>,
    pub positions: Range<usize>,
}

/// Regions of about [`CHUNK`] elements, and chunks of small ones, by shapes and order alone.
pub(crate) struct Grid {
    sizes: [usize; 3],
    /// Channels and positions of a region.
    steps: [usize; 2],
    regions_per_chunk: usize,
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
        Self { sizes, steps, regions_per_chunk: share(steps[0] * steps[1], usize::MAX) }
    }

    fn cuts(&self) -> [usize; 2] {
        [self.sizes[1].div_ceil(self.steps[0]), self.sizes[2].div_ceil(self.steps[1])]
    }

    fn all_regions(&self) -> usize {
        self.sizes[0] * self.cuts()[0] * self.cuts()[1]
    }

    pub(crate) fn chunks(&self) -> usize {
        self.all_regions().div_ceil(self.regions_per_chunk)
    }

    pub(crate) fn regions(&self, chunk: usize) -> Range<usize> {
        let first = chunk * self.regions_per_chunk;
        first..self.all_regions().min(first + self.regions_per_chunk)
    }

    pub(crate) fn at(&self, region: usize) -> Region {
        let [by_channels, by_positions] = self.cuts();
        let (n, rest) =
            (region / (by_channels * by_positions), region % (by_channels * by_positions));
        let (c, p) = (rest / by_positions * self.steps[0], rest % by_positions * self.steps[1]);
        let channels = c..self.sizes[1].min(c + self.steps[0]);
        Region { n, channels, positions: p..self.sizes[2].min(p + self.steps[1]) }
    }
}
