//! <upstream, refine(features; plan)> for many plans at once: the gradient of a discrete choice.
//!
//! A task is one sample. Its tiles of features and upstream are loaded once and every plan is applied to them in the cache; the noise is
//! the same for all plans, so it is drawn once.

use super::forward::{clear_hole, planes, Source, CHUNK};
use super::lanes::{Dot, DotNoise};
use super::plan::{Group, Plan, Table, Tables};
use crate::parallel;
use crate::random::philox::Planes;
use crate::simd::tile::{self, Channels, Scratch};
use crate::simd::{self, Element, Real, LANES};
use crate::tensor::TensorView;

/// One number for each plan.
pub(super) fn dots<T: Element>(
    features: &TensorView,
    upstream: &TensorView,
    plans: &[Plan],
    threads: usize,
) -> Vec<f64> {
    let Some(first) = plans.first().filter(|_| features.numel() > 0) else {
        return vec![0.0; plans.len()];
    };
    let shared = |plan: &Plan| plan.shares_theta().then(|| plan.tables::<T::Acc>(threads));
    let call = Call {
        features: Source::<T>::new(features),
        upstream: Source::<T>::new(upstream),
        plans,
        tables: plans.iter().map(shared).collect(),
    };
    let blocks = first.shape.channels.div_ceil(LANES);
    // A table that belongs to one sample is made once for all its channels; otherwise channels are tasks of their own.
    let (tasks, each) = if call.tables.iter().all(Option::is_some) {
        (first.shape.batch * blocks, 1)
    } else {
        (first.shape.batch, blocks)
    };
    let parts = parallel::map(threads, tasks, |i| {
        let (n, block) = (i * each / blocks, i * each % blocks);
        Task { call: &call, n, blocks: block..block + each }.run()
    });
    (0..plans.len()).map(|v| parts.iter().map(|part| part[v]).sum()).collect()
}

struct Call<'a, T: Element> {
    features: Source<T>,
    upstream: Source<T>,
    plans: &'a [Plan],
    tables: Vec<Option<Tables<T::Acc>>>,
}

struct Task<'a, T: Element> {
    call: &'a Call<'a, T>,
    n: usize,
    blocks: std::ops::Range<usize>,
}

impl<T: Element> Task<'_, T> {
    fn run(&self) -> Vec<f64> {
        let call = self.call;
        let own: Vec<Option<Table<T::Acc>>> = (call.plans.iter().zip(&call.tables))
            .map(|(plan, shared)| if shared.is_some() { None } else { plan.table(self.n) })
            .collect();
        let mut sums = vec![0.0; call.plans.len()];
        for block in self.blocks.clone() {
            let channels = Channels::block(block * LANES, call.plans[0].shape.channels);
            self.add_block(&mut sums, &own, &channels);
        }
        sums
    }
}

impl<T: Element> Task<'_, T> {
    fn add_block(&self, sums: &mut [f64], own: &[Option<Table<T::Acc>>], channels: &Channels) {
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

    fn load(&self, tile: &mut [[T::Acc; LANES]], side: &Source<T>, channels: &Channels) {
        // SAFETY: a checked map, channels below C, all positions of the plane.
        unsafe { tile::load(tile, side.base, &side.layout, self.n, channels, 0) };
    }
}

/// For each lane, sum over positions of upstream * hole * bilinear.
fn through_sampling<A: Real>(
    upstream: &[[A; LANES]],
    source: &[[A; LANES]],
    table: Option<&Table<A>>,
    group: &Group,
    width: usize,
) -> [f64; LANES] {
    let mut totals = [0.0; LANES];
    let mut buffer = [[A::default(); LANES]; CHUNK];
    for (i, part) in upstream.chunks(CHUNK).enumerate() {
        let from = i * CHUNK;
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
    for (i, tile) in upstream.chunks(CHUNK).enumerate() {
        let lanes = simd::run(DotNoise { tile, quad: (i * CHUNK / 4) as u32, planes });
        for l in 0..LANES {
            totals[l] += lanes[l];
        }
    }
    totals
}
