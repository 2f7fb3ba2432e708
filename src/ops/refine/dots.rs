//! <upstream, refine(features; plan)> for many plans at once: the gradient of a discrete choice.
//!
//! A chunk is up to 16 channels of one sample, or all of them. Features and upstream are loaded
//! once and every plan is applied to them in the cache; the noise is the same for all plans and
//! drawn once.

use super::forward::{clear_hole, planes, TILE};
use super::lanes::{Dot, DotNoise};
use super::plan::{SamplePlan, SamplePlans, Table, Tables};
use crate::parallel;
use crate::random::philox::Planes;
use crate::simd::tile::{Channels, Map, Scratch};
use crate::simd::{self, Element, Real, LANES};
use crate::tensor::TensorView;

/// One number for each plan.
pub(super) fn dots<T: Element>(
    features: &TensorView, upstream: &TensorView, plans: &[SamplePlans], threads: usize,
) -> Vec<f64> {
    let Some(first) = plans.first().filter(|_| features.numel() > 0) else {
        return vec![0.0; plans.len()];
    };
    let shared = |plan: &SamplePlans| plan.shares_theta().then(|| plan.tables::<T::Acc>(threads));
    let call = Call {
        features: Map::<T>::of(features),
        upstream: Map::<T>::of(upstream),
        plans,
        tables: plans.iter().map(shared).collect(),
    };
    let per_sample = first.shape.channels.div_ceil(LANES);
    // The table of one sample alone is made once for all its channels; with shared tables, 16
    // channels are a chunk.
    let (chunks, each) = if call.tables.iter().all(Option::is_some) {
        (first.shape.batch * per_sample, 1)
    } else {
        (first.shape.batch, per_sample)
    };
    let parts = parallel::map(threads, chunks, |i| {
        let (n, index) = (i * each / per_sample, i * each % per_sample);
        Chunk { call: &call, n, indices: index..index + each }.run()
    });
    (0..plans.len()).map(|v| parts.iter().map(|part| part[v]).sum()).collect()
}

struct Call<'a, T: Element> {
    features: Map<T>,
    upstream: Map<T>,
    plans: &'a [SamplePlans],
    tables: Vec<Option<Tables<T::Acc>>>,
}

struct Chunk<'a, T: Element> {
    call: &'a Call<'a, T>,
    n: usize,
    /// Of 16 channels each.
    indices: std::ops::Range<usize>,
}

impl<T: Element> Chunk<'_, T> {
    fn run(&self) -> Vec<f64> {
        let call = self.call;
        let own: Vec<Option<Table<T::Acc>>> = (call.plans.iter().zip(&call.tables))
            .map(|(plan, shared)| if shared.is_some() { None } else { plan.table(self.n) })
            .collect();
        let mut sums = vec![0.0; call.plans.len()];
        for index in self.indices.clone() {
            let channels = Channels::starting_at(index * LANES, call.plans[0].shape.channels);
            self.add_channels(&mut sums, &own, &channels);
        }
        sums
    }
}

impl<T: Element> Chunk<'_, T> {
    fn add_channels(&self, sums: &mut [f64], own: &[Option<Table<T::Acc>>], channels: &Channels) {
        let call = self.call;
        let positions = call.plans[0].shape.positions();
        let mut scratch = Scratch::<T::Acc>::new(3 * positions + 2);
        let (upstream, scratch) = scratch.tile().split_at_mut(positions);
        let (plain, moved) = scratch.split_at_mut(positions + 1);
        self.load(upstream, &call.upstream, channels);
        self.load(&mut plain[..positions], &call.features, channels);
        plain[positions] = [T::Acc::default(); LANES];
        moved[positions] = [T::Acc::default(); LANES];
        let mut noise = None;
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
            let mut lanes = through_sampling(upstream, source, table, &group, plan.shape.width);
            if let Some(sigma) = group.sigma {
                let planes = &planes(&plan.keys, channels, self.n, plan.shape.channels);
                let drawn = match noise {
                    Some(drawn) => drawn,
                    None => dot_noise(upstream, planes),
                };
                noise = Some(drawn);
                for l in 0..LANES {
                    lanes[l] += sigma * drawn[l];
                }
            }
            let kept = |l: usize| group.keep.is_none_or(|keep| keep[channels.at[l]]);
            sums[v] += (0..channels.used).filter(|&l| kept(l)).map(|l| lanes[l]).sum::<f64>();
        }
    }

    fn load(&self, tile: &mut [[T::Acc; LANES]], side: &Map<T>, channels: &Channels) {
        // SAFETY: a checked map, channels below C, all positions of the plane.
        unsafe { side.load(tile, self.n, channels, 0) };
    }
}

/// For each lane, sum over positions of upstream * hole * bilinear.
fn through_sampling<A: Real>(
    upstream: &[[A; LANES]], source: &[[A; LANES]], table: Option<&Table<A>>, group: &SamplePlan,
    width: usize,
) -> [f64; LANES] {
    let mut totals = [0.0; LANES];
    let mut buffer = [[A::default(); LANES]; TILE];
    for (i, part) in upstream.chunks(TILE).enumerate() {
        let from = i * TILE;
        let mut part = part;
        if let Some(hole) = group.hole {
            let holed = &mut buffer[..part.len()];
            holed.copy_from_slice(part);
            clear_hole(holed, from, width, &hole);
            part = holed;
        }
        let table = table.map(|table| &table.0[from..]);
        let lanes = simd::run(Dot {
            tile: part,
            source: &source[if table.is_some() { 0 } else { from }..],
            table,
        });
        for l in 0..LANES {
            totals[l] += lanes[l];
        }
    }
    totals
}

fn dot_noise<A: Real>(upstream: &[[A; LANES]], planes: &Planes) -> [f64; LANES] {
    let mut totals = [0.0; LANES];
    for (i, tile) in upstream.chunks(TILE).enumerate() {
        let lanes = simd::run(DotNoise { tile, quad: (i * TILE / 4) as u32, planes });
        for l in 0..LANES {
            totals[l] += lanes[l];
        }
    }
    totals
}
