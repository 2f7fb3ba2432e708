//! The forward pass on the CPU.
//!
//! A chunk is up to 16 channels of one sample. Its source planes are loaded into the cache; tiles
//! of 64 positions are sampled from them, get their hole and their noise, and are stored: every
//! input is read once, every output is written once.

use super::direct::{self, Direct};
use super::lanes::{AddNoise, ClearLanes, Sample};
use super::plan::{Corners, Hole, SamplePlan, SamplePlans, Tables};
use crate::parallel;
use crate::random::philox::{Keys, Planes};
use crate::simd::tile::{Channels, Layout, Map, Scratch};
use crate::simd::{self, Element, Real, LANES};
use crate::tensor::TensorView;

/// Positions of a tile: with 16 lanes of f32 they leave room for the source in a first-level cache.
pub(super) const TILE: usize = 64;

/// refined = the formula of the module.
///
/// # Safety
/// The maps have the dtype `T` and the shape of the plan, and are in host memory; no other thread
/// uses refined.
pub(super) unsafe fn forward<T: Element>(
    refined: &TensorView, features: &TensorView, plan: &SamplePlans, threads: usize,
) {
    let per_sample = plan.shape.channels.div_ceil(LANES);
    if refined.numel() == 0 {
        return;
    }
    let tables = plan.tables::<T::Acc>(threads);
    let source = Map::<T>::of(features);
    let target = Map::<T>::of(refined);
    parallel::for_each(threads, plan.shape.batch * per_sample, |i| {
        let (n, index) = (i / per_sample, i % per_sample);
        Chunk { source, target, plan, tables: &tables, n, index }.run();
    });
}

struct Chunk<'a, T: Element> {
    source: Map<T>,
    target: Map<T>,
    plan: &'a SamplePlans,
    tables: &'a Tables<T::Acc>,
    n: usize,
    index: usize,
}

/// The channels of a chunk: those to compute and those to clear.
///
/// Planes can be picked one by one, so tiles have no dropped channels; with channels side by side
/// (`stride_c` 1) a tile has all channels, and dropped lanes are cleared before the store.
pub(super) struct Cover {
    pub live: Option<Channels>,
    pub dropped: Option<Channels>,
}

impl Cover {
    pub(crate) fn new(keep: Option<&[bool]>, index: usize, total: usize, whole: bool) -> Self {
        let Some(keep) = keep.filter(|_| !whole) else {
            return Self { live: Some(Channels::starting_at(index * LANES, total)), dropped: None };
        };
        Self { live: Self::pick(keep, true, index), dropped: Self::pick(keep, false, index) }
    }

    /// The `index`-th 16 of the channels whose `keep` is `kept`.
    fn pick(keep: &[bool], kept: bool, index: usize) -> Option<Channels> {
        let mut list = [0; LANES];
        let (mut count, mut before) = (0, index * LANES);
        for (c, _) in keep.iter().enumerate().filter(|(_, &k)| k == kept) {
            if before > 0 {
                before -= 1;
            } else if count < LANES {
                list[count] = c;
                count += 1;
            } else {
                break;
            }
        }
        (count > 0).then(|| Channels::new(list[..count].iter().copied()))
    }
}

pub(super) fn sources(channels: &Channels, group: &SamplePlan) -> Channels {
    group.perm.map_or(*channels, |perm| Channels {
        at: channels.at.map(|c| perm[c]),
        used: channels.used,
    })
}

pub(super) fn planes<'a>(
    keys: &'a Keys, channels: &Channels, n: usize, total: usize,
) -> Planes<'a> {
    Planes::new(keys, &channels.at.map(|c| n as u64 * total as u64 + c as u64))
}

impl<T: Element> Chunk<'_, T> {
    fn run(&self) {
        let group = self.plan.at(self.n);
        if direct::fits::<T>(&group, &self.source.layout, &self.target.layout, self.plan.shape) {
            return self.direct(&group);
        }
        let whole = self.target.layout.interleaves();
        let cover = Cover::new(group.keep, self.index, self.plan.shape.channels, whole);
        if let Some(dropped) = cover.dropped {
            self.clear(&dropped);
        }
        let Some(live) = cover.live else { return };
        match self.tables.at(self.n) {
            None if group.sigma.is_none() && self.copies_planes() => self.copy(&live, &group),
            None => self.tiles(&live, &group, Fill::Load(sources(&live, &group))),
            Some(table) => self.sampled(&live, &group, &table.0),
        }
    }
}

/// Where a tile comes from.
enum Fill<'a, A> {
    /// The features themselves, these channels.
    Load(Channels),
    /// Sampled from a tile of whole planes.
    Sample(&'a [[A; LANES]], &'a [Corners<A>]),
}

impl<T: Element> Chunk<'_, T> {
    /// Both sides have whole planes of consecutive elements.
    fn copies_planes(&self) -> bool {
        self.gapless(&self.source.layout) && self.gapless(&self.target.layout)
    }

    /// Each plane is one run of consecutive elements.
    fn gapless(&self, layout: &Layout) -> bool {
        layout.w == 1 && layout.run == self.plan.shape.positions()
    }

    /// All channels of this chunk's share of the positions.
    fn direct(&self, group: &SamplePlan) {
        let shape = self.plan.shape;
        let (per_sample, positions) = (shape.channels.div_ceil(LANES), shape.positions());
        simd::run(Direct {
            source: self.source.plane(self.n, 0),
            target: self.target.plane(self.n, 0),
            steps: [self.source.layout.w, self.target.layout.w],
            table: self.tables.at(self.n).map(|table| &table.0[..]),
            hole: group.hole,
            positions: self.index * positions / per_sample
                ..(self.index + 1) * positions / per_sample,
            shape,
        });
    }

    fn clear(&self, channels: &Channels) {
        if self.gapless(&self.target.layout) {
            for c in &channels.at[..channels.used] {
                // SAFETY: a whole plane of the target, of this chunk; zero bits are 0.0.
                unsafe {
                    self.target.plane(self.n, *c).write_bytes(0, self.plan.shape.positions())
                };
            }
            return;
        }
        let zeros = [[T::Acc::default(); LANES]; TILE];
        let positions = self.plan.shape.positions();
        for from in (0..positions).step_by(TILE) {
            let tile = &zeros[..TILE.min(positions - from)];
            // SAFETY: these channels of this sample belong to this chunk.
            unsafe { self.target.store(tile, self.n, channels, from) };
        }
    }

    /// A permutation and a hole alone: planes are copied bit for bit.
    fn copy(&self, live: &Channels, group: &SamplePlan) {
        let (from, positions) = (sources(live, group), self.plan.shape.positions());
        for l in 0..live.used {
            let target = self.target.plane(self.n, live.at[l]);
            // SAFETY: both planes are gapless (`copies_planes`); the target's is this chunk's.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    self.source.plane(self.n, from.at[l]).cast_const(),
                    target,
                    positions,
                );
                if let Some(hole) = group.hole {
                    for y in hole.y0..hole.y1 {
                        let row = target.add(y * self.plan.shape.width);
                        (hole.x0..hole.x1)
                            .for_each(|x| row.add(x).write(T::store(T::Acc::default())));
                    }
                }
            }
        }
    }

    fn sampled(&self, live: &Channels, group: &SamplePlan, table: &[Corners<T::Acc>]) {
        let positions = self.plan.shape.positions();
        let mut scratch = Scratch::<T::Acc>::new(positions + 1);
        let source = scratch.tile();
        // SAFETY: the checked features, channels below C, positions below H*W.
        unsafe {
            let channels = sources(live, group);
            self.source.load(&mut source[..positions], self.n, &channels, 0);
        }
        // Corners outside the map point here: they contribute 0 whatever the features hold.
        source[positions] = [T::Acc::default(); LANES];
        self.tiles(live, group, Fill::Sample(source, table));
    }

    /// Fills each tile, adds the hole, the noise and the dropped lanes, and stores it.
    fn tiles(&self, live: &Channels, group: &SamplePlan, fill: Fill<T::Acc>) {
        let shape = self.plan.shape;
        let noise = (group.sigma)
            .map(|sigma| (sigma, planes(&self.plan.keys, live, self.n, shape.channels)));
        let mut buffer = Scratch::<T::Acc>::new(TILE);
        for from in (0..shape.positions()).step_by(TILE) {
            let tile = &mut buffer.tile()[..TILE.min(shape.positions() - from)];
            self.target.prefetch(self.n, live, from, tile.len());
            match &fill {
                // SAFETY: the checked features, channels below C, positions below H*W.
                Fill::Load(channels) => unsafe {
                    self.source.load(tile, self.n, channels, from);
                },
                Fill::Sample(source, table) => {
                    simd::run(Sample { tile, source, table: &table[from..] })
                }
            }
            if let Some(hole) = group.hole {
                clear_hole(tile, from, shape.width, &hole);
            }
            if let Some((sigma, planes)) = &noise {
                simd::run(AddNoise {
                    tile,
                    sigma: T::Acc::of(*sigma),
                    quad: (from / 4) as u32,
                    planes,
                });
            }
            if let Some(keep) = group.keep {
                clear_lanes(tile, &live.at.map(|c| keep[c]));
            }
            // SAFETY: these channels of this sample belong to this chunk.
            unsafe { self.target.store(tile, self.n, live, from) };
        }
    }
}

/// Clears the part of the tile that each row of the hole covers.
pub(super) fn clear_hole<A: Real>(tile: &mut [[A; LANES]], from: usize, width: usize, hole: &Hole) {
    let end = from + tile.len();
    for y in hole.y0..hole.y1 {
        let (start, stop) = ((y * width + hole.x0).max(from), (y * width + hole.x1).min(end));
        if start < stop {
            tile[start - from..stop - from].fill([A::default(); LANES]);
        }
    }
}

pub(super) fn clear_lanes<A: Real>(tile: &mut [[A; LANES]], keep: &[bool; LANES]) {
    if keep.contains(&false) {
        simd::run(ClearLanes { tile, keep });
    }
}
