//! A plan read from its tensors, one for each sample.

use super::Plan;
use crate::random::philox::Keys;
use crate::simd::{self, Real, Simd, WithSimd};
use crate::tensor::{Check, Result, TensorView};
use std::marker::PhantomData;

const IDENTITY: [f64; 6] = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];

/// B, C, H, W.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub batch: usize,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

impl Shape {
    fn of(features: &TensorView) -> Self {
        let s = features.sizes();
        Self { batch: s[0], channels: s[1], height: s[2], width: s[3] }
    }

    pub(super) fn positions(&self) -> usize {
        self.height * self.width
    }
}

/// Each sample's plan, in which no-ops (an identity theta, an empty hole, sigma 0) are `None`.
pub(super) struct SamplePlans {
    theta: Vec<Option<[f64; 6]>>,
    hole: Vec<Option<Hole>>,
    sigma: Vec<Option<f64>>,
    perm: Vec<Option<Vec<usize>>>,
    keep: Vec<Option<Vec<bool>>>,
    /// Expanded from the seed.
    pub keys: Keys,
    /// Of the features.
    pub shape: Shape,
}

/// Rows y0 .. y1 and columns x0 .. x1, clipped to the map, not empty.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hole {
    pub y0: usize,
    pub x0: usize,
    pub y1: usize,
    pub x1: usize,
}

/// The parts of one sample.
#[derive(Clone, Copy)]
pub(super) struct SamplePlan<'a> {
    pub theta: Option<&'a [f64; 6]>,
    pub hole: Option<Hole>,
    pub sigma: Option<f64>,
    pub perm: Option<&'a [usize]>,
    pub keep: Option<&'a [bool]>,
}

impl SamplePlans {
    /// Reads a plan of checked metadata; values are checked here.
    pub(super) fn read(check: Check, plan: &Plan, features: &TensorView) -> Result<Self> {
        check.on_cpu("features", features)?;
        let seed = plan.seed.value(check, "seed")?;
        for (_, part) in plan.parts() {
            part.map_or(Ok(()), |view| check.on_cpu("a plan's part", view))?;
        }
        let shape = Shape::of(features);
        Ok(Self {
            theta: groups(&plan.theta, |view, g| read_theta(check, view, g))?,
            hole: groups(&plan.hole, |view, g| Ok(read_hole(view, g, shape)))?,
            sigma: groups(&plan.sigma, |view, g| read_sigma(check, view, g))?,
            perm: groups(&plan.perm, |view, g| read_perm(check, view, g))?,
            keep: groups(&plan.keep, |view, g| Ok(read_keep(view, g)))?,
            keys: Keys::new(seed),
            shape,
        })
    }

    /// The plan of sample `n`.
    pub(super) fn at(&self, n: usize) -> SamplePlan<'_> {
        SamplePlan {
            theta: of_sample(&self.theta, n).and_then(Option::as_ref),
            hole: of_sample(&self.hole, n).copied().flatten(),
            sigma: of_sample(&self.sigma, n).copied().flatten(),
            perm: of_sample(&self.perm, n).and_then(Option::as_deref),
            keep: of_sample(&self.keep, n).and_then(Option::as_deref),
        }
    }

    /// One sampling table for each theta.
    pub(super) fn tables<A: Real>(&self, threads: usize) -> Tables<A> {
        let table = |g: usize| self.theta[g].as_ref().map(|theta| Table::new(theta, self.shape));
        Tables(crate::parallel::map(threads, self.theta.len(), table))
    }

    /// Whether all samples share one theta, so that one table is enough.
    pub(super) fn shares_theta(&self) -> bool {
        self.theta.len() <= 1
    }

    /// The table of sample `n` alone.
    pub(super) fn table<A: Real>(&self, n: usize) -> Option<Table<A>> {
        self.at(n).theta.map(|theta| Table::new(theta, self.shape))
    }
}

/// The part for sample `n`: its own group, or the only one.
fn of_sample<T>(groups: &[T], n: usize) -> Option<&T> {
    groups.get(if groups.len() == 1 { 0 } else { n })
}

fn groups<T>(
    part: &Option<TensorView>, read: impl Fn(&TensorView, usize) -> Result<T>,
) -> Result<Vec<T>> {
    part.as_ref().map_or_else(
        || Ok(Vec::new()),
        |view| (0..view.sizes()[0]).map(|g| read(view, g)).collect(),
    )
}

fn read_theta(check: Check, view: &TensorView, g: usize) -> Result<Option<[f64; 6]>> {
    let mut theta = [0.0; 6];
    for (i, value) in theta.iter_mut().enumerate() {
        // SAFETY: the shape is [G, 2, 3], in host memory.
        *value = unsafe { view.read_f64(&[g, i / 3, i % 3]) };
        if !value.is_finite() {
            return Err(check.value(
                "theta",
                "be finite",
                format!("{value} at [{g}, {}, {}]", i / 3, i % 3),
            ));
        }
    }
    Ok((theta != IDENTITY).then_some(theta))
}

fn read_hole(view: &TensorView, g: usize, shape: Shape) -> Option<Hole> {
    // SAFETY: the shape is [G, 4], in host memory.
    let clip =
        |i: usize, side: usize| unsafe { view.read_i64(&[g, i]) }.clamp(0, side as i64) as usize;
    let (y0, x0) = (clip(0, shape.height), clip(1, shape.width));
    let (y1, x1) = (clip(2, shape.height), clip(3, shape.width));
    (y0 < y1 && x0 < x1).then_some(Hole { y0, x0, y1, x1 })
}

fn read_sigma(check: Check, view: &TensorView, g: usize) -> Result<Option<f64>> {
    // SAFETY: the shape is [G], in host memory.
    let sigma = unsafe { view.read_f64(&[g]) };
    if !sigma.is_finite() {
        return Err(check.value("sigma", "be finite", format!("{sigma} at [{g}]")));
    }
    Ok((sigma != 0.0).then_some(sigma))
}

fn read_perm(check: Check, view: &TensorView, g: usize) -> Result<Option<Vec<usize>>> {
    let channels = view.sizes()[1];
    let mut seen = vec![false; channels];
    let mut perm = Vec::with_capacity(channels);
    for c in 0..channels {
        // SAFETY: the shape is [G, C], in host memory.
        let source = unsafe { view.read_i64(&[g, c]) };
        let fresh = usize::try_from(source)
            .ok()
            .and_then(|s| seen.get_mut(s))
            .is_some_and(|s| !std::mem::replace(s, true));
        if !fresh {
            let rule = format!("be a permutation of 0 to {}", channels - 1);
            return Err(check.value("perm", rule, format!("{source} at [{g}, {c}]")));
        }
        perm.push(source as usize);
    }
    let moves = perm.iter().enumerate().any(|(c, &source)| c != source);
    Ok(moves.then_some(perm))
}

fn read_keep(view: &TensorView, g: usize) -> Option<Vec<bool>> {
    // SAFETY: the shape is [G, C], in host memory.
    let keep: Vec<bool> =
        (0..view.sizes()[1]).map(|c| unsafe { view.read_i64(&[g, c]) } != 0).collect();
    keep.contains(&false).then_some(keep)
}

/// Where a position samples: four corners (`positions` for one outside the map), weights.
#[derive(Clone, Copy)]
pub(super) struct Corners<A> {
    pub at: [u32; 4],
    pub weight: [A; 4],
}

/// The corners of all positions under one theta, row by row.
pub(super) struct Table<A>(pub Vec<Corners<A>>);

/// One table for each theta that is not the identity.
pub(super) struct Tables<A>(Vec<Option<Table<A>>>);

impl<A: Real> Tables<A> {
    /// The table for sample `n`; `None` for the identity.
    pub(super) fn at(&self, n: usize) -> Option<&Table<A>> {
        of_sample(&self.0, n).and_then(Option::as_ref)
    }
}

impl<A: Real> Table<A> {
    fn new(theta: &[f64; 6], shape: Shape) -> Self {
        simd::run(MakeTable { theta, shape, of: PhantomData })
    }
}

/// Makes a table. Compiled for every level: `floor` is a function call on the lowest.
struct MakeTable<'a, A> {
    theta: &'a [f64; 6],
    shape: Shape,
    of: PhantomData<A>,
}

impl<A: Real> WithSimd for MakeTable<'_, A> {
    type Out = Table<A>;

    /// In float64 throughout: the coordinate's error would otherwise grow with the map.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Table<A> {
        let (theta, shape) = (self.theta, self.shape);
        let (height, width) = (shape.height as f64, shape.width as f64);
        let (cx, cy) = ((width - 1.0) / 2.0, (height - 1.0) / 2.0);
        let mut corners = Vec::with_capacity(shape.positions());
        for row in 0..shape.height {
            let y = row as f64 - cy;
            let from_y = [
                theta[1] * (width / height) * y + theta[2] * width / 2.0 + cx,
                theta[4] * y + theta[5] * height / 2.0 + cy,
            ];
            for column in 0..shape.width {
                let x = column as f64 - cx;
                corners.push(Corners::new(
                    theta[0] * x + from_y[0],
                    theta[3] * (height / width) * x + from_y[1],
                    shape,
                ));
            }
        }
        Table(corners)
    }
}

impl<A: Real> Corners<A> {
    #[inline(always)]
    fn new(ix: f64, iy: f64, shape: Shape) -> Self {
        let (left, top) = (ix.floor(), iy.floor());
        let (fx, fy) = (ix - left, iy - top);
        // Compared as floats: a coordinate far outside would not fit an integer.
        let inside = |v: f64, side: usize| v >= 0.0 && v < side as f64;
        let place = |x: f64, y: f64| {
            if inside(x, shape.width) && inside(y, shape.height) {
                (y as usize * shape.width + x as usize) as u32
            } else {
                shape.positions() as u32
            }
        };
        let at = [
            place(left, top),
            place(left + 1.0, top),
            place(left, top + 1.0),
            place(left + 1.0, top + 1.0),
        ];
        let weight =
            [(1.0 - fx) * (1.0 - fy), fx * (1.0 - fy), (1.0 - fx) * fy, fx * fy].map(A::of);
        Self { at, weight }
    }
}
