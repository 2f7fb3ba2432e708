//! `refine_dots`: <upstream, refine(features; plan)> for many plans at once, the gradient of a
//! discrete choice. It has no backward.
//!
//! A chunk is up to 16 channels of one sample, or all of them. Features and upstream are loaded
//! once and every plan is applied to them in the cache; the noise is the same for all plans and
//! drawn once. Sums over the map use its linearity in the noise; squares need the refined values.

use super::forward::{clear_hole, planes, TILE};
use super::lanes::{AddNoise, Dot, DotNoise, Sample};
use super::plan::{Hole, SamplePlans, Table, Tables};
use crate::parallel;
use crate::random::philox::Planes;
use crate::simd::tile::{Channels, Map, Scratch};
use crate::simd::{self, Element, Real, LANES};
use crate::tensor::TensorView;

/// Writes `[V]` products, or `[2, V, B]` products and squares.
///
/// # Safety
/// The maps have the dtype `T` and the shape of the plans, of which there are V, and all are in
/// host memory; no other thread uses the dots.
pub(super) unsafe fn dots<T: Element>(
    dots: &TensorView, features: &TensorView, upstream: &TensorView, plans: &[SamplePlans],
    threads: usize,
) {
    let by_sample = dots.sizes().len() > 1;
    let (parts, each) = if plans.is_empty() || features.numel() == 0 {
        (Vec::new(), 1)
    } else {
        parts::<T>(features, upstream, plans, by_sample, threads)
    };
    for v in 0..plans.len() {
        let sum = |parts: &[Vec<[f64; 2]>], i: usize| parts.iter().map(|part| part[v][i]).sum();
        if !by_sample {
            // SAFETY: `dots` was checked to have V elements, in host memory as features are.
            unsafe { dots.write_f64(&[v], sum(&parts, 0)) };
            continue;
        }
        for n in 0..features.sizes()[0] {
            let of_sample = parts.get(n * each..(n + 1) * each).unwrap_or_default();
            for i in 0..2 {
                // SAFETY: as above, with 2 * V * B elements.
                unsafe { dots.write_f64(&[i, v, n], sum(of_sample, i)) };
            }
        }
    }
}

/// The products and squares of every chunk, and how many chunks a sample has.
fn parts<T: Element>(
    features: &TensorView, upstream: &TensorView, plans: &[SamplePlans], squares: bool,
    threads: usize,
) -> (Vec<Vec<[f64; 2]>>, usize) {
    let shared = |plan: &SamplePlans| plan.shares_theta().then(|| plan.tables::<T::Acc>(threads));
    let call = Call {
        features: Map::<T>::of(features),
        upstream: Map::<T>::of(upstream),
        plans,
        tables: plans.iter().map(shared).collect(),
        squares,
    };
    let shape = plans[0].shape;
    let per_sample = shape.channels.div_ceil(LANES);
    // The table of one sample alone is made once for all its channels; with shared tables, 16
    // channels are a chunk.
    let each = if call.tables.iter().all(Option::is_some) { 1 } else { per_sample };
    let parts = parallel::map(threads, shape.batch * per_sample / each, |i| {
        let (n, index) = (i * each / per_sample, i * each % per_sample);
        Chunk { call: &call, n, indices: index..index + each }.run()
    });
    (parts, per_sample / each)
}

struct Call<'a, T: Element> {
    features: Map<T>,
    upstream: Map<T>,
    plans: &'a [SamplePlans],
    tables: Vec<Option<Tables<T::Acc>>>,
    /// Whether the squares are computed too.
    squares: bool,
}

struct Chunk<'a, T: Element> {
    call: &'a Call<'a, T>,
    n: usize,
    /// Of 16 channels each.
    indices: std::ops::Range<usize>,
}

impl<T: Element> Chunk<'_, T> {
    fn run(&self) -> Vec<[f64; 2]> {
        let call = self.call;
        let own: Vec<Option<Table<T::Acc>>> = (call.plans.iter().zip(&call.tables))
            .map(|(plan, shared)| if shared.is_some() { None } else { plan.table(self.n) })
            .collect();
        let mut sums = vec![[0.0; 2]; call.plans.len()];
        for index in self.indices.clone() {
            let channels = Channels::starting_at(index * LANES, call.plans[0].shape.channels);
            self.add_channels(&mut sums, &own, &channels);
        }
        sums
    }
}

impl<T: Element> Chunk<'_, T> {
    fn add_channels(
        &self, sums: &mut [[f64; 2]], own: &[Option<Table<T::Acc>>], channels: &Channels,
    ) {
        let call = self.call;
        let positions = call.plans[0].shape.positions();
        let mut scratch = Scratch::<T::Acc>::new(3 * positions + 2);
        let (upstream, scratch) = scratch.tile().split_at_mut(positions);
        let (plain, moved) = scratch.split_at_mut(positions + 1);
        let mut drawn = Drawn::default();
        self.load(upstream, &call.upstream, channels);
        self.load(&mut plain[..positions], &call.features, channels);
        plain[positions] = [T::Acc::default(); LANES];
        moved[positions] = [T::Acc::default(); LANES];
        for (v, plan) in call.plans.iter().enumerate() {
            let group = plan.at(self.n);
            let source = match group.perm {
                None => &*plain,
                Some(perm) => {
                    let from = Channels { at: channels.at.map(|c| perm[c]), used: channels.used };
                    self.load(&mut moved[..positions], &call.features, &from);
                    &*moved
                }
            };
            let table = call.tables[v].as_ref().map_or(own[v].as_ref(), |tables| tables.at(self.n));
            let noise = group.sigma.map(|sigma| {
                let planes = planes(&plan.keys, channels, self.n, plan.shape.channels);
                (sigma, planes)
            });
            let sampled = Sampled { source, table, hole: group.hole, width: plan.shape.width };
            let lanes = if call.squares {
                sampled
                    .values(upstream, noise.map(|(sigma, p)| (sigma, drawn.values(positions, &p))))
            } else {
                [
                    sampled.product(
                        upstream,
                        noise.map(|(sigma, p)| (sigma, drawn.dot(upstream, &p))),
                    ),
                    [0.0; LANES],
                ]
            };
            let kept = |l: usize| group.keep.is_none_or(|keep| keep[channels.at[l]]);
            for (sum, lanes) in sums[v].iter_mut().zip(&lanes) {
                *sum += (0..channels.used).filter(|&l| kept(l)).map(|l| lanes[l]).sum::<f64>();
            }
        }
    }

    fn load(&self, tile: &mut [[T::Acc; LANES]], side: &Map<T>, channels: &Channels) {
        // SAFETY: a checked map, channels below C, all positions of the plane.
        unsafe { side.load(tile, self.n, channels, 0) };
    }
}

/// The noise of a chunk's channels, drawn for the first plan that has any.
struct Drawn<A> {
    /// For each lane, sum over positions of upstream * eps.
    dot: Option<[f64; LANES]>,
    eps: Option<Vec<[A; LANES]>>,
}

impl<A> Default for Drawn<A> {
    fn default() -> Self {
        Self { dot: None, eps: None }
    }
}

impl<A: Real> Drawn<A> {
    fn dot(&mut self, upstream: &[[A; LANES]], planes: &Planes) -> &[f64; LANES] {
        self.dot.get_or_insert_with(|| {
            let mut totals = [0.0; LANES];
            for (i, tile) in upstream.chunks(TILE).enumerate() {
                let lanes = simd::run(DotNoise { tile, quad: (i * TILE / 4) as u32, planes });
                add(&mut totals, &lanes);
            }
            totals
        })
    }

    fn values(&mut self, positions: usize, planes: &Planes) -> &[[A; LANES]] {
        self.eps.get_or_insert_with(|| {
            let mut eps = vec![[A::default(); LANES]; positions];
            simd::run(AddNoise { tile: &mut eps, sigma: A::of(1.0), quad: 0, planes });
            eps
        })
    }
}

/// The features of 16 channels under one plan's sampling and hole.
struct Sampled<'a, A> {
    source: &'a [[A; LANES]],
    table: Option<&'a Table<A>>,
    hole: Option<Hole>,
    width: usize,
}

impl<A: Real> Sampled<'_, A> {
    /// For each lane, sum over positions of upstream * (hole * bilinear + sigma * eps).
    fn product(
        &self, upstream: &[[A; LANES]], noise: Option<(f64, &[f64; LANES])>,
    ) -> [f64; LANES] {
        let mut totals = [0.0; LANES];
        let mut buffer = [[A::default(); LANES]; TILE];
        for (i, part) in upstream.chunks(TILE).enumerate() {
            let from = i * TILE;
            let mut part = part;
            if let Some(hole) = self.hole {
                let holed = &mut buffer[..part.len()];
                holed.copy_from_slice(part);
                clear_hole(holed, from, self.width, &hole);
                part = holed;
            }
            let table = self.table.map(|table| &table.0[from..]);
            let source = &self.source[if table.is_some() { 0 } else { from }..];
            add(&mut totals, &simd::run(Dot { tile: part, source, table }));
        }
        if let Some((sigma, dot)) = noise {
            add(&mut totals, &dot.map(|sum| sigma * sum));
        }
        totals
    }

    /// For each lane, that sum and the one of (hole * bilinear + sigma * eps)^2.
    fn values(
        &self, upstream: &[[A; LANES]], noise: Option<(f64, &[[A; LANES]])>,
    ) -> [[f64; LANES]; 2] {
        let mut totals = [[0.0; LANES]; 2];
        let mut buffer = [[A::default(); LANES]; TILE];
        for (i, part) in upstream.chunks(TILE).enumerate() {
            let from = i * TILE;
            let tile = &mut buffer[..part.len()];
            match self.table {
                Some(table) => {
                    let table = &table.0[from..];
                    simd::run(Sample { tile: &mut *tile, source: self.source, table });
                }
                None => tile.copy_from_slice(&self.source[from..from + part.len()]),
            }
            if let Some(hole) = self.hole {
                clear_hole(tile, from, self.width, &hole);
            }
            if let Some((sigma, eps)) = noise {
                add_scaled(tile, A::of(sigma), &eps[from..]);
            }
            for (total, other) in totals.iter_mut().zip([part, &*tile]) {
                add(total, &simd::run(Dot { tile: other, source: tile, table: None }));
            }
        }
        totals
    }
}

fn add(totals: &mut [f64; LANES], lanes: &[f64; LANES]) {
    totals.iter_mut().zip(lanes).for_each(|(total, lane)| *total += lane);
}

fn add_scaled<A: Real>(tile: &mut [[A; LANES]], sigma: A, eps: &[[A; LANES]]) {
    for (row, eps) in tile.iter_mut().zip(eps) {
        row.iter_mut().zip(eps).for_each(|(value, &eps)| *value += sigma * eps);
    }
}
