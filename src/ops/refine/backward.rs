//! The backward pass on the CPU: upstream is read once, and once more for the straight-through sum.

use super::forward::{clear_hole, clear_lanes, planes, sources, Cover, TILE};
use super::lanes::{DotNoise, Places, Slopes, Spread, Sum};
use super::plan::{SamplePlans, Shape, Tables};
use super::Gradients;
use crate::parallel;
use crate::simd::tile::{Channels, Map, Scratch};
use crate::simd::{self, Element, LANES};
use crate::tensor::TensorView;

/// Sums over a chunk in f64, d_theta (6) and d_sigma, added in the chunks' order: the same bits.
type Sums = [f64; 7];

/// Writes the gradients.
///
/// # Safety
/// The maps have the dtype `T` and the shape of the plan, the other gradients `[G, ..]` with G 1 or
/// B, and all are in host memory; no other thread uses the gradients.
pub(super) unsafe fn backward<T: Element>(
    gradients: &Gradients, upstream: &TensorView, features: &TensorView, plan: &SamplePlans,
    threads: usize,
) {
    if let Some(straight) = gradients.d_straight {
        let sums = sums_of_upstream::<T>(upstream, plan, threads);
        write_groups(straight, 1, plan, |n, _| sums[n]);
    }
    if gradients.d_features.is_none() && gradients.d_theta.is_none() && gradients.d_sigma.is_none()
    {
        return;
    }
    let per_sample = plan.shape.channels.div_ceil(LANES);
    let tables = plan.tables::<T::Acc>(threads);
    let call = Call {
        upstream: Map::<T>::of(upstream),
        features: Map::<T>::of(features),
        d_features: gradients.d_features.map(Map::<T>::of),
        theta: gradients.d_theta.is_some(),
        sigma: gradients.d_sigma.is_some(),
        plan,
        tables: &tables,
    };
    let chunks = if plan.shape.positions() == 0 { 0 } else { plan.shape.batch * per_sample };
    let sums: Vec<Sums> = parallel::map(threads, chunks, |i| {
        Chunk { call: &call, n: i / per_sample, index: i % per_sample }.run()
    });
    let of_sample = |n: usize, i: usize| {
        let range = (n * per_sample).min(chunks)..((n + 1) * per_sample).min(chunks);
        sums[range].iter().map(|s| s[i]).sum::<f64>()
    };
    if let Some(theta) = gradients.d_theta {
        write_groups(theta, 6, plan, of_sample);
    }
    if let Some(sigma) = gradients.d_sigma {
        write_groups(sigma, 1, plan, |n, _| of_sample(n, 6));
    }
}

/// Writes `[G, ..]` with `count` entries a group: each sample's, or their sum in order.
fn write_groups(
    view: &TensorView, count: usize, plan: &SamplePlans, entry: impl Fn(usize, usize) -> f64,
) {
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
fn sums_of_upstream<T: Element>(
    upstream: &TensorView, plan: &SamplePlans, threads: usize,
) -> Vec<f64> {
    let per_sample = plan.shape.channels.div_ceil(LANES);
    let source = Map::<T>::of(upstream);
    let chunks = if plan.shape.positions() == 0 { 0 } else { plan.shape.batch * per_sample };
    let sums = parallel::map(threads, chunks, |i| {
        sum_of_chunk(source, plan, i / per_sample, i % per_sample)
    });
    let range = |n: usize| (n * per_sample).min(chunks)..((n + 1) * per_sample).min(chunks);
    (0..plan.shape.batch).map(|n| sums[range(n)].iter().sum()).collect()
}

fn sum_of_chunk<T: Element>(source: Map<T>, plan: &SamplePlans, n: usize, index: usize) -> f64 {
    let channels = Channels::starting_at(index * LANES, plan.shape.channels);
    let positions = plan.shape.positions();
    let mut buffer = Scratch::<T::Acc>::new(TILE);
    let mut total = 0.0;
    for from in (0..positions).step_by(TILE) {
        let tile = &mut buffer.tile()[..TILE.min(positions - from)];
        // SAFETY: the checked upstream, channels below C, positions below H*W.
        unsafe { source.load(tile, n, &channels, from) };
        total += simd::run(Sum(tile))[..channels.used].iter().sum::<f64>();
    }
    total
}

struct Call<'a, T: Element> {
    upstream: Map<T>,
    features: Map<T>,
    d_features: Option<Map<T>>,
    theta: bool,
    sigma: bool,
    plan: &'a SamplePlans,
    tables: &'a Tables<T::Acc>,
}

struct Chunk<'a, T: Element> {
    call: &'a Call<'a, T>,
    n: usize,
    index: usize,
}

impl<T: Element> Chunk<'_, T> {
    fn run(&self) -> Sums {
        let call = self.call;
        let group = call.plan.at(self.n);
        let whole = call.upstream.layout.interleaves();
        let cover = Cover::new(group.keep, self.index, call.plan.shape.channels, whole);
        if let (Some(dropped), Some(d_features)) = (cover.dropped, call.d_features) {
            self.clear(&sources(&dropped, &group), d_features);
        }
        cover.live.map_or([0.0; 7], |live| self.accumulate(&live))
    }
}

impl<T: Element> Chunk<'_, T> {
    fn clear(&self, channels: &Channels, target: Map<T>) {
        let positions = self.call.plan.shape.positions();
        let zeros = [[T::Acc::default(); LANES]; TILE];
        for from in (0..positions).step_by(TILE) {
            let tile = &zeros[..TILE.min(positions - from)];
            // SAFETY: perm is a permutation: no other chunk has these channels' source planes.
            unsafe { target.store(tile, self.n, channels, from) };
        }
    }

    /// Allocates scratch memory for the source planes and for their gradient where they are needed.
    fn accumulate(&self, live: &Channels) -> Sums {
        let call = self.call;
        let positions = call.plan.shape.positions();
        let source_rows = if call.theta { positions + 1 } else { 0 };
        let scatter_rows = if call.d_features.is_some() { positions + 1 } else { 0 };
        let mut scratch = Scratch::<T::Acc>::new(source_rows + scatter_rows);
        let (source, scatter) = scratch.tile().split_at_mut(source_rows);
        let from = sources(live, &call.plan.at(self.n));
        if call.theta {
            // SAFETY: the checked features, channels below C, positions below H*W.
            unsafe { call.features.load(&mut source[..positions], self.n, &from, 0) };
            source[positions] = [T::Acc::default(); LANES];
        }
        scatter.fill([T::Acc::default(); LANES]);
        let sums = self.walk(live, source, scatter);
        if let Some(target) = call.d_features {
            // SAFETY: as in `clear`.
            unsafe { target.store(&scatter[..positions], self.n, &from, 0) };
        }
        sums
    }

    /// Tile by tile of upstream: the noise first (holes have noise, too), then the sampling.
    fn walk(
        &self, live: &Channels, source: &[[T::Acc; LANES]], scatter: &mut [[T::Acc; LANES]],
    ) -> Sums {
        let call = self.call;
        let (plan, group) = (call.plan, call.plan.at(self.n));
        let shape = plan.shape;
        let mut kept: [bool; LANES] = std::array::from_fn(|l| l < live.used);
        if let Some(keep) = group.keep {
            kept = std::array::from_fn(|l| kept[l] && keep[live.at[l]]);
        }
        let mut sums = [0.0; 7];
        let noise = call.sigma.then(|| planes(&plan.keys, live, self.n, shape.channels));
        let mut buffer = Scratch::<T::Acc>::new(TILE);
        for from in (0..shape.positions()).step_by(TILE) {
            let tile = &mut buffer.tile()[..TILE.min(shape.positions() - from)];
            // SAFETY: the checked upstream, channels below C, positions below H*W.
            unsafe { call.upstream.load(tile, self.n, live, from) };
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
            if call.theta {
                add_theta(&mut sums, simd::run(Slopes { tile, source, places }), shape);
            }
            if !scatter.is_empty() {
                simd::run(Spread { tile, scatter, places });
            }
        }
        sums
    }
}

/// Adds d_theta of a tile: the slopes, times d (ix, iy) / d theta.
fn add_theta(sums: &mut Sums, slopes: [f64; 6], shape: Shape) {
    let (height, width) = (shape.height as f64, shape.width as f64);
    let scale = [1.0, width / height, width / 2.0, height / width, 1.0, height / 2.0];
    for i in 0..6 {
        sums[i] += scale[i] * slopes[i];
    }
}
