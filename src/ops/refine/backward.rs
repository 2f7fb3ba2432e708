//! The backward pass on the CPU: theta, sigma and features from one reading of upstream; the straight-through sum from another.

use super::forward::{clear_hole, clear_lanes, planes, sources, Cover, Source, CHUNK};
use super::lanes::{DotNoise, Places, Slopes, Spread, Sum};
use super::plan::{Plan, Tables};
use super::{Shape, Wanted};
use crate::parallel;
use crate::simd::tile::{self, Channels, Scratch};
use crate::simd::{self, Element, LANES};
use crate::tensor::TensorView;

/// Sums over one task: d_theta (6) and d_sigma. In f64, and added task by task in their order: the same bits on every run.
type Sums = [f64; 7];

/// Writes every gradient that is wanted.
pub(super) fn backward<T: Element>(
    wanted: &Wanted,
    upstream: &TensorView,
    features: &TensorView,
    plan: &Plan,
    threads: usize,
) {
    if let Some(straight) = wanted.straight {
        let sums = sums_of_upstream::<T>(upstream, plan, threads);
        write_groups(straight, 1, plan, |n, _| sums[n]);
    }
    if wanted.features.is_none() && wanted.theta.is_none() && wanted.sigma.is_none() {
        return;
    }
    let blocks = plan.shape.channels.div_ceil(LANES);
    let tables = plan.tables::<T::Acc>(threads);
    let call = Call {
        upstream: Source::<T>::new(upstream),
        features: Source::<T>::new(features),
        d_features: wanted.features.map(Source::<T>::new),
        wants_theta: wanted.theta.is_some(),
        wants_sigma: wanted.sigma.is_some(),
        plan,
        tables: &tables,
    };
    let tasks = if plan.shape.positions() == 0 { 0 } else { plan.shape.batch * blocks };
    let sums: Vec<Sums> = parallel::map(threads, tasks, |i| {
        Task { call: &call, n: i / blocks, block: i % blocks }.run()
    });
    let of_sample = |n: usize, i: usize| {
        let range = (n * blocks).min(tasks)..((n + 1) * blocks).min(tasks);
        sums[range].iter().map(|s| s[i]).sum::<f64>()
    };
    if let Some(theta) = wanted.theta {
        write_groups(theta, 6, plan, of_sample);
    }
    if let Some(sigma) = wanted.sigma {
        write_groups(sigma, 1, plan, |n, _| of_sample(n, 6));
    }
}

/// Writes `[G, ..]` with `count` entries a group: the entry of each sample, or their sum in order when there is one group.
fn write_groups(view: &TensorView, count: usize, plan: &Plan, entry: impl Fn(usize, usize) -> f64) {
    let groups = view.sizes()[0];
    for g in 0..groups {
        for i in 0..count {
            let shared = groups == 1;
            let value =
                if shared { (0..plan.shape.batch).map(|n| entry(n, i)).sum() } else { entry(g, i) };
            let index = if view.rank() == 1 { vec![g] } else { vec![g, i / 3, i % 3] };
            // SAFETY: the shape was checked to be [G] or [G, 2, 3], in host memory.
            unsafe { view.write_f64(&index, value) };
        }
    }
}

/// The sum of upstream over each sample.
fn sums_of_upstream<T: Element>(upstream: &TensorView, plan: &Plan, threads: usize) -> Vec<f64> {
    let blocks = plan.shape.channels.div_ceil(LANES);
    let source = Source::<T>::new(upstream);
    let tasks = if plan.shape.positions() == 0 { 0 } else { plan.shape.batch * blocks };
    let sums =
        parallel::map(threads, tasks, |i| sum_of_block(source, plan, i / blocks, i % blocks));
    let range = |n: usize| (n * blocks).min(tasks)..((n + 1) * blocks).min(tasks);
    (0..plan.shape.batch).map(|n| sums[range(n)].iter().sum()).collect()
}

fn sum_of_block<T: Element>(source: Source<T>, plan: &Plan, n: usize, block: usize) -> f64 {
    let channels = Channels::block(block * LANES, plan.shape.channels);
    let positions = plan.shape.positions();
    let mut buffer = Scratch::<T::Acc>::new(CHUNK);
    let mut total = 0.0;
    for from in (0..positions).step_by(CHUNK) {
        let tile = &mut buffer.tile()[..CHUNK.min(positions - from)];
        // SAFETY: the checked upstream, channels below C, positions below H*W.
        unsafe { tile::load(tile, source.base, &source.layout, n, &channels, from) };
        total += simd::run(Sum(tile))[..channels.used].iter().sum::<f64>();
    }
    total
}

struct Call<'a, T: Element> {
    upstream: Source<T>,
    features: Source<T>,
    d_features: Option<Source<T>>,
    wants_theta: bool,
    wants_sigma: bool,
    plan: &'a Plan,
    tables: &'a Tables<T::Acc>,
}

struct Task<'a, T: Element> {
    call: &'a Call<'a, T>,
    n: usize,
    block: usize,
}

impl<T: Element> Task<'_, T> {
    fn run(&self) -> Sums {
        let call = self.call;
        let group = call.plan.at(self.n);
        let whole = call.upstream.layout.interleaves();
        let cover = Cover::new(group.keep, self.block, call.plan.shape.channels, whole);
        if let (Some(dropped), Some(d_features)) = (cover.dropped, call.d_features) {
            self.clear(&sources(&dropped, &group), d_features);
        }
        cover.live.map_or([0.0; 7], |live| self.accumulate(&live))
    }
}

impl<T: Element> Task<'_, T> {
    fn clear(&self, channels: &Channels, target: Source<T>) {
        let positions = self.call.plan.shape.positions();
        let zeros = [[T::Acc::default(); LANES]; CHUNK];
        for from in (0..positions).step_by(CHUNK) {
            let tile = &zeros[..CHUNK.min(positions - from)];
            // SAFETY: the source planes of this task's channels are its own, perm being a permutation.
            unsafe { tile::store(tile, target.base, &target.layout, self.n, channels, from) };
        }
    }

    /// Scratch tiles for the source planes and for their gradient, each only where it is needed.
    fn accumulate(&self, live: &Channels) -> Sums {
        let call = self.call;
        let positions = call.plan.shape.positions();
        let source_rows = if call.wants_theta { positions + 1 } else { 0 };
        let scatter_rows = if call.d_features.is_some() { positions + 1 } else { 0 };
        let mut scratch = Scratch::<T::Acc>::new(source_rows + scatter_rows);
        let (source, scatter) = scratch.tile().split_at_mut(source_rows);
        let from = sources(live, &call.plan.at(self.n));
        if call.wants_theta {
            let layout = &call.features.layout;
            // SAFETY: the checked features, channels below C, positions below H*W.
            unsafe {
                tile::load(&mut source[..positions], call.features.base, layout, self.n, &from, 0)
            };
            source[positions] = [T::Acc::default(); LANES];
        }
        scatter.fill([T::Acc::default(); LANES]);
        let sums = self.walk(live, source, scatter);
        if let Some(target) = call.d_features {
            // SAFETY: as in `clear`.
            unsafe {
                tile::store(&scatter[..positions], target.base, &target.layout, self.n, &from, 0)
            };
        }
        sums
    }

    /// Chunk after chunk of upstream: noise first (holes have noise, too), then what goes through the sampling.
    fn walk(
        &self,
        live: &Channels,
        source: &[[T::Acc; LANES]],
        scatter: &mut [[T::Acc; LANES]],
    ) -> Sums {
        let call = self.call;
        let (plan, group) = (call.plan, call.plan.at(self.n));
        let shape = plan.shape;
        let mut kept: [bool; LANES] = std::array::from_fn(|l| l < live.used);
        if let Some(keep) = group.keep {
            kept = std::array::from_fn(|l| kept[l] && keep[live.at[l]]);
        }
        let mut sums = [0.0; 7];
        let noise = call.wants_sigma.then(|| planes(&plan.keys, live, self.n, shape.channels));
        let mut buffer = Scratch::<T::Acc>::new(CHUNK);
        for from in (0..shape.positions()).step_by(CHUNK) {
            let tile = &mut buffer.tile()[..CHUNK.min(shape.positions() - from)];
            // SAFETY: the checked upstream, channels below C, positions below H*W.
            unsafe {
                tile::load(tile, call.upstream.base, &call.upstream.layout, self.n, live, from)
            };
            clear_lanes(tile, &kept);
            if let Some(planes) = &noise {
                sums[6] += simd::run(DotNoise { tile, quad: (from / 4) as u32, planes })
                    .iter()
                    .sum::<f64>();
            }
            if let Some(hole) = group.hole {
                clear_hole(tile, from, shape.width, &hole);
            }
            let places = Places { table: call.tables.at(self.n), from, shape };
            if call.wants_theta {
                add_theta(&mut sums, simd::run(Slopes { tile, source, places }), shape);
            }
            if !scatter.is_empty() {
                simd::run(Spread { tile, scatter, places });
            }
        }
        sums
    }
}

/// Adds d_theta of a chunk: the slopes, times d (ix, iy) / d theta.
fn add_theta(sums: &mut Sums, slopes: [f64; 6], shape: Shape) {
    let (height, width) = (shape.height as f64, shape.width as f64);
    let scale = [1.0, width / height, width / 2.0, height / width, 1.0, height / 2.0];
    for i in 0..6 {
        sums[i] += scale[i] * slopes[i];
    }
}
