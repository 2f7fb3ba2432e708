//! The refinement of teacher features: one affine resampling, one hole, noise, a channel permutation and dropped channels.
//!
//! refined[n,c,y,x] = keep[g,c] * ( hole_g(y,x) * bilinear(features[n, perm[g,c]], theta_g (x,y)) + sigma_g * eps(seed, n, c, y, x) )
//!
//! with g = n, or 0 where a part has one group. In pixels about the map's centre, cx = (W-1)/2, cy = (H-1)/2:
//!
//! ix = t00 (x-cx) + t01 (W/H) (y-cy) + t02 W/2 + cx        iy = t10 (H/W) (x-cx) + t11 (y-cy) + t12 H/2 + cy
//!
//! Gradients for upstream u, with v = keep * u:
//! d_theta = sum v * hole * (d bilinear / d ix * d ix / d theta + the same for iy);   d_sigma = sum v * eps;
//! d_straight = sum u;   d_features = the adjoint of the sampling, brought back through perm.

mod backward;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod direct;
mod dots;
mod forward;
mod lanes;
#[cfg(test)]
mod naive;
mod plan;

use crate::random::Seed;
use crate::simd::{Bf16, F16};
#[cfg(feature = "cuda")]
use crate::tensor::Device;
use crate::tensor::{Check, DType, Result, Run, TensorView};
pub(crate) use plan::Plan;

const REFINE: Check = Check("refine");
const DOTS: Check = Check("refine_dots");

/// The parts of a plan as they come from the caller; each has its own number of groups, 1 or B.
#[derive(Clone, Copy, Default)]
pub(crate) struct Parts<'a> {
    /// `[G, 2, 3]`, normalised coordinates.
    pub theta: Option<&'a TensorView>,
    /// `[G, 4]` y0 x0 y1 x1, half open.
    pub hole: Option<&'a TensorView>,
    /// `[G]`.
    pub sigma: Option<&'a TensorView>,
    /// `[G, C]`.
    pub perm: Option<&'a TensorView>,
    /// `[G, C]` bool.
    pub keep: Option<&'a TensorView>,
}

impl Parts<'_> {
    /// Judges shapes, dtypes and devices.
    pub(crate) fn check(&self, check: Check, features: &TensorView) -> Result<()> {
        let [batch, channels, _, _] = check.map("features", features)?;
        let on_device = |argument, view| check.same_device(argument, view, "features", features);
        if let Some(theta) = self.theta {
            check.float("theta", theta)?;
            check.groups("theta", theta, batch, "[G, 2, 3]", &[2, 3])?;
            on_device("theta", theta)?;
        }
        if let Some(hole) = self.hole {
            check.int("hole", hole)?;
            check.groups("hole", hole, batch, "[G, 4]", &[4])?;
            on_device("hole", hole)?;
        }
        if let Some(sigma) = self.sigma {
            check.float("sigma", sigma)?;
            check.groups("sigma", sigma, batch, "[G]", &[])?;
            on_device("sigma", sigma)?;
        }
        if let Some(perm) = self.perm {
            check.int("perm", perm)?;
            check.groups("perm", perm, batch, "[G, C]", &[channels])?;
            on_device("perm", perm)?;
        }
        if let Some(keep) = self.keep {
            check.of_dtype("keep", keep, DType::Bool)?;
            check.groups("keep", keep, batch, "[G, C]", &[channels])?;
            on_device("keep", keep)?;
        }
        Ok(())
    }

    /// Plan `v` of stacked parts `[V, G, ..]`.
    fn select<'b>(&self, v: usize, slots: &'b mut [Option<TensorView>; 5]) -> Parts<'b> {
        let all = [self.theta, self.hole, self.sigma, self.perm, self.keep];
        for (slot, part) in slots.iter_mut().zip(all) {
            *slot = part.map(|view| view.select(v));
        }
        let [theta, hole, sigma, perm, keep] = slots.each_ref().map(Option::as_ref);
        Parts { theta, hole, sigma, perm, keep }
    }
}

/// One generic call for the dtype of a feature map.
macro_rules! by_dtype {
    ($view:expr, $function:ident($($argument:expr),*)) => {
        match $view.dtype {
            DType::F64 => $function::<f64>($($argument),*),
            DType::F16 => $function::<F16>($($argument),*),
            DType::BF16 => $function::<Bf16>($($argument),*),
            _ => $function::<f32>($($argument),*),
        }
    };
}

/// refined, of the shape and dtype of features (contiguous or channels_last).
pub(crate) fn forward<'r>(
    refined: &TensorView,
    features: &TensorView,
    parts: Parts,
    seed: impl Into<Seed>,
    run: impl Into<Run<'r>>,
) -> Result<()> {
    let (seed, run) = (seed.into(), run.into());
    parts.check(REFINE, features)?;
    seed.check_beside(REFINE, "seed", "features", features)?;
    REFINE.output("refined", refined, features)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(ordinal) = features.device {
        // SAFETY: checked above, the devices too.
        return unsafe { cuda::forward(refined, features, &parts, &seed, ordinal, &run) };
    }
    REFINE.on_cpu("features", features)?;
    let (plan, threads) =
        (Plan::read(REFINE, &parts, features, seed.value(REFINE, "seed")?)?, run.threads);
    use forward::forward;
    by_dtype!(features, forward(refined, features, &plan, threads));
    Ok(())
}

/// The gradients that are wanted.
#[derive(Clone, Copy, Default)]
pub(crate) struct Wanted<'a> {
    /// Like features (contiguous or channels_last).
    pub features: Option<&'a TensorView>,
    /// Like theta.
    pub theta: Option<&'a TensorView>,
    /// Like sigma.
    pub sigma: Option<&'a TensorView>,
    /// `[G]`.
    pub straight: Option<&'a TensorView>,
}

/// Every gradient that is wanted, from one reading of upstream.
pub(crate) fn backward<'r>(
    wanted: Wanted,
    upstream: &TensorView,
    features: &TensorView,
    parts: Parts,
    seed: impl Into<Seed>,
    run: impl Into<Run<'r>>,
) -> Result<()> {
    let (seed, run) = (seed.into(), run.into());
    parts.check(REFINE, features)?;
    seed.check_beside(REFINE, "seed", "features", features)?;
    REFINE.sizes("upstream", upstream, "of features", features.sizes())?;
    REFINE.same_dtype("upstream", upstream, "features", features)?;
    REFINE.same_device("upstream", upstream, "features", features)?;
    if let Some(d_features) = wanted.features {
        REFINE.output("d_features", d_features, features)?;
    }
    let batch = features.sizes()[0];
    for (name, view, rest) in [
        ("d_theta", wanted.theta, &[2, 3][..]),
        ("d_sigma", wanted.sigma, &[]),
        ("d_straight", wanted.straight, &[]),
    ] {
        if let Some(view) = view {
            REFINE.float(name, view)?;
            REFINE.groups(name, view, batch, "of its input", rest)?;
            REFINE.same_device(name, view, "features", features)?;
        }
    }
    #[cfg(feature = "cuda")]
    if let Device::Cuda(ordinal) = features.device {
        // SAFETY: checked above, the devices too.
        return unsafe {
            cuda::backward(&wanted, upstream, features, &parts, &seed, ordinal, &run)
        };
    }
    REFINE.on_cpu("features", features)?;
    let (plan, threads) =
        (Plan::read(REFINE, &parts, features, seed.value(REFINE, "seed")?)?, run.threads);
    use backward::backward;
    by_dtype!(features, backward(&wanted, upstream, features, &plan, threads));
    Ok(())
}

/// dots[v] = <upstream, refine(features; plan v)>, all of them in one pass over memory. `stacked` parts have a leading V.
pub(crate) fn dots<'r>(
    dots: &TensorView,
    features: &TensorView,
    upstream: &TensorView,
    stacked: Parts,
    seed: impl Into<Seed>,
    run: impl Into<Run<'r>>,
) -> Result<()> {
    let (seed, run) = (seed.into(), run.into());
    let count = check_dots(features, Some(upstream), &stacked)?;
    seed.check_beside(DOTS, "seed", "features", features)?;
    DOTS.sizes("dots", dots, "[V]", &[count])?;
    DOTS.float("dots", dots)?;
    DOTS.same_device("dots", dots, "features", features)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(ordinal) = features.device {
        // SAFETY: checked above, the devices too.
        return unsafe { cuda::dots(dots, features, upstream, &stacked, &seed, ordinal, &run) };
    }
    DOTS.on_cpu("features", features)?;
    let (seed, threads) = (seed.value(DOTS, "seed")?, run.threads);
    let mut plans = Vec::with_capacity(count);
    for v in 0..count {
        let mut slots = [const { None }; 5];
        plans.push(Plan::read(DOTS, &stacked.select(v, &mut slots), features, seed)?);
    }
    use dots::dots as all_dots;
    let values: Vec<f64> = by_dtype!(features, all_dots(features, upstream, &plans, threads));
    for (v, value) in values.into_iter().enumerate() {
        // SAFETY: `dots` was checked to have V elements, in host memory as features are.
        unsafe { dots.write_f64(&[v], value) };
    }
    Ok(())
}

/// Judges the arguments of [`dots`]; returns V.
pub(crate) fn check_dots(
    features: &TensorView,
    upstream: Option<&TensorView>,
    stacked: &Parts,
) -> Result<usize> {
    DOTS.map("features", features)?;
    if let Some(upstream) = upstream {
        DOTS.sizes("upstream", upstream, "of features", features.sizes())?;
        DOTS.same_dtype("upstream", upstream, "features", features)?;
        DOTS.same_device("upstream", upstream, "features", features)?;
    }
    let named = [
        ("theta", stacked.theta),
        ("hole", stacked.hole),
        ("sigma", stacked.sigma),
        ("perm", stacked.perm),
        ("keep", stacked.keep),
    ];
    let mut count = None;
    for (name, part) in named {
        let Some(part) = part else { continue };
        DOTS.rank(name, part, "[V, G, ..]", &[2, 3, 4])?;
        let v = part.sizes()[0];
        if *count.get_or_insert(v) != v {
            let rule = format!("have as many plans as the parts before it, {}", count.unwrap_or(v));
            return Err(DOTS.value(name, rule, v));
        }
    }
    let Some(count) = count else {
        return Err(DOTS.value("plans", "have at least one part", "none"));
    };
    if count > 0 {
        let mut slots = [const { None }; 5];
        stacked.select(0, &mut slots).check(DOTS, features)?;
    }
    Ok(count)
}

/// Judges the arguments of [`forward`], on any device.
pub(crate) fn check(
    features: &TensorView,
    parts: &Parts,
    straight: Option<&TensorView>,
) -> Result<()> {
    parts.check(REFINE, features)?;
    if let Some(straight) = straight {
        REFINE.float("straight", straight)?;
        REFINE.groups("straight", straight, features.sizes()[0], "[G]", &[])?;
        REFINE.same_device("straight", straight, "features", features)?;
    }
    Ok(())
}

/// The columns that a plan needs of every sample, for the kernels.
pub(crate) fn shape_of(features: &TensorView) -> Shape {
    let s = features.sizes();
    Shape { batch: s[0], channels: s[1], height: s[2], width: s[3] }
}

/// B, C, H, W.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub batch: usize,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

impl Shape {
    /// H * W.
    pub(crate) fn positions(&self) -> usize {
        self.height * self.width
    }
}
