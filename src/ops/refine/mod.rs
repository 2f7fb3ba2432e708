//! The refinement of teacher features: one affine resampling, one hole, noise, a channel
//! permutation and dropped channels.
//!
//! refined[n,c,y,x] = keep[g,c] * ( hole_g(y,x) * bilinear(features[n, perm[g,c]], theta_g (x,y))
//!                                  + sigma_g * eps(seed, n, c, y, x) )
//!
//! with g = n, or 0 where a part has one group. In pixels about the map's centre,
//! cx = (W-1)/2, cy = (H-1)/2:
//!
//! ix = t00 (x-cx) + t01 (W/H) (y-cy) + t02 W/2 + cx
//!
//! iy = t10 (H/W) (x-cx) + t11 (y-cy) + t12 H/2 + cy
//!
//! Gradients for upstream u, with v = keep * u:
//! d_theta = sum v * hole * (d bilinear / d ix * d ix / d theta + the same for iy);
//! d_sigma = sum v * eps;
//! d_straight = sum u;
//! d_features = the adjoint of the sampling, through the inverse of perm.
//!
//! For a stack of plans: dots\[v\] = <u, refined under plan v>; by sample, that of each sample, and
//! <refined, refined>.

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
use crate::simd::by_dtype;
use crate::tensor::{Check, DType, Device, Result, Run, TensorView};
use plan::SamplePlans;

const REFINE: Check = Check("refine");
const DOTS: Check = Check("refine_dots");

/// The caller's plan; each part has its own number of groups G, 1 or B. In a stack
/// of plans every part has a leading V.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// `[G, 2, 3]`, normalised coordinates.
    pub theta: Option<TensorView>,
    /// `[G, 4]` y0 x0 y1 x1, half open.
    pub hole: Option<TensorView>,
    /// `[G]`.
    pub sigma: Option<TensorView>,
    /// `[G, C]`.
    pub perm: Option<TensorView>,
    /// `[G, C]` bool.
    pub keep: Option<TensorView>,
    /// Of the noise; a stack has one for all plans.
    pub seed: Seed,
}

impl Plan {
    fn parts(&self) -> [(&'static str, Option<&TensorView>); 5] {
        [
            ("theta", self.theta.as_ref()),
            ("hole", self.hole.as_ref()),
            ("sigma", self.sigma.as_ref()),
            ("perm", self.perm.as_ref()),
            ("keep", self.keep.as_ref()),
        ]
    }

    fn check(&self, check: Check, features: &TensorView) -> Result<()> {
        type DTypeRule = fn(Check, &str, &TensorView) -> Result<()>;
        let [batch, channels, _, _] = check.map("features", features)?;
        let rules: [(DTypeRule, &str, &[usize]); 5] = [
            (Check::float, "[G, 2, 3]", &[2, 3]),
            (Check::int, "[G, 4]", &[4]),
            (Check::float, "[G]", &[]),
            (Check::int, "[G, C]", &[channels]),
            (|check, name, view| check.of_dtype(name, view, DType::Bool), "[G, C]", &[channels]),
        ];
        for ((name, part), (dtype, layout, rest)) in self.parts().into_iter().zip(rules) {
            let Some(view) = part else { continue };
            dtype(check, name, view)?;
            check.groups(name, view, batch, layout, rest)?;
            check.same_device(name, view, "features", features)?;
        }
        self.seed.check(check, "seed")
    }

    /// Plan `v` of a stack.
    fn select(&self, v: usize) -> Self {
        let at = |part: &Option<TensorView>| part.as_ref().map(|view| view.select(v));
        Self {
            theta: at(&self.theta),
            hole: at(&self.hole),
            sigma: at(&self.sigma),
            perm: at(&self.perm),
            keep: at(&self.keep),
            seed: self.seed.clone(),
        }
    }
}

/// The inputs of a call.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
    /// `[B, C, H, W]`, a float dtype, any strides.
    pub features: &'a TensorView,
    /// One plan, or a stack of them for [`Args::dots`].
    pub plan: &'a Plan,
}

/// The gradients to compute.
#[derive(Clone, Copy, Default)]
pub(crate) struct Gradients<'a> {
    /// Like features (contiguous or channels_last).
    pub d_features: Option<&'a TensorView>,
    pub d_theta: Option<&'a TensorView>,
    pub d_sigma: Option<&'a TensorView>,
    /// `[G]`.
    pub d_straight: Option<&'a TensorView>,
}

impl Args<'_> {
    /// Checks metadata, on any device.
    pub(crate) fn check(&self) -> Result<()> {
        self.plan.check(REFINE, self.features)
    }

    /// Checks the metadata of an input of which only the gradient is computed.
    pub(crate) fn check_straight(&self, straight: &TensorView) -> Result<()> {
        self.check_groups("straight", straight, "[G]", &[])
    }

    fn check_groups(
        &self, name: &str, view: &TensorView, layout: &str, rest: &[usize],
    ) -> Result<()> {
        REFINE.float(name, view)?;
        REFINE.groups(name, view, self.features.sizes()[0], layout, rest)?;
        REFINE.same_device(name, view, "features", self.features)
    }

    /// refined, of the shape and dtype of features (contiguous or channels_last).
    pub(crate) fn forward(&self, refined: &TensorView, run: &Run) -> Result<()> {
        let features = self.features;
        self.check()?;
        self.check_seed(REFINE)?;
        REFINE.output("refined", refined, features)?;
        match features.device {
            #[cfg(feature = "cuda")]
            // SAFETY: checked above, the devices too.
            Device::Cuda(ordinal) => unsafe { cuda::forward(self, refined, ordinal, run) },
            _ => {
                let plans = SamplePlans::read(REFINE, self.plan, features)?;
                // SAFETY: checked above: T is the maps' dtype, the shapes agree, everything is in
                // host memory.
                by_dtype!(features.dtype, T => unsafe {
                    forward::forward::<T>(refined, features, &plans, run.threads)
                });
                Ok(())
            }
        }
    }

    /// The gradients, from one reading of upstream, which is like refined.
    pub(crate) fn backward(
        &self, gradients: &Gradients, upstream: &TensorView, run: &Run,
    ) -> Result<()> {
        let features = self.features;
        self.check()?;
        self.check_seed(REFINE)?;
        like_features(REFINE, upstream, features)?;
        if let Some(d_features) = gradients.d_features {
            REFINE.output("d_features", d_features, features)?;
        }
        for (name, view, rest) in [
            ("d_theta", gradients.d_theta, &[2, 3][..]),
            ("d_sigma", gradients.d_sigma, &[]),
            ("d_straight", gradients.d_straight, &[]),
        ] {
            view.map_or(Ok(()), |view| self.check_groups(name, view, "of its input", rest))?;
        }
        match features.device {
            #[cfg(feature = "cuda")]
            // SAFETY: checked above, the devices too.
            Device::Cuda(ordinal) => unsafe {
                cuda::backward(self, gradients, upstream, ordinal, run)
            },
            _ => {
                let plans = SamplePlans::read(REFINE, self.plan, features)?;
                // SAFETY: as for `forward`.
                by_dtype!(features.dtype, T => unsafe {
                    backward::backward::<T>(gradients, upstream, features, &plans, run.threads)
                });
                Ok(())
            }
        }
    }

    /// Checks the metadata of [`Args::dots`] on any device; returns V.
    pub(crate) fn check_dots(&self, upstream: &TensorView) -> Result<usize> {
        DOTS.map("features", self.features)?;
        like_features(DOTS, upstream, self.features)?;
        let mut count = None;
        for (name, part) in self.plan.parts() {
            let Some(part) = part else { continue };
            DOTS.rank(name, part, "[V, G, ..]", &[2, 3, 4])?;
            let v = part.sizes()[0];
            let first = *count.get_or_insert(v);
            if first != v {
                let rule = format!("have as many plans as the parts before it, {first}");
                return Err(DOTS.value(name, rule, v));
            }
        }
        let Some(count) = count else {
            return Err(DOTS.value("plans", "have at least one part", "none"));
        };
        if count > 0 {
            self.plan.select(0).check(DOTS, self.features)?;
        }
        Ok(count)
    }

    /// dots[v] = <upstream, refine(features; plan v)> for a stack of plans, all of them in one pass
    /// over memory. Dots of the shape `[2, V, B]` are those of each sample, then the squares
    /// <refine, refine>.
    pub(crate) fn dots(&self, dots: &TensorView, upstream: &TensorView, run: &Run) -> Result<()> {
        let features = self.features;
        let count = self.check_dots(upstream)?;
        self.check_seed(DOTS)?;
        if dots.sizes().len() == 1 {
            DOTS.sizes("dots", dots, "[V]", &[count])?;
        } else {
            DOTS.sizes("dots", dots, "[2, V, B]", &[2, count, features.sizes()[0]])?;
        }
        DOTS.float("dots", dots)?;
        DOTS.same_device("dots", dots, "features", features)?;
        match features.device {
            #[cfg(feature = "cuda")]
            // SAFETY: checked above, the devices too.
            Device::Cuda(ordinal) => unsafe { cuda::dots(self, dots, upstream, ordinal, run) },
            _ => {
                DOTS.on_cpu("features", features)?;
                let plans = (0..count)
                    .map(|v| SamplePlans::read(DOTS, &self.plan.select(v), features))
                    .collect::<Result<Vec<_>>>()?;
                // SAFETY: as for `forward`.
                by_dtype!(features.dtype, T => unsafe {
                    dots::dots::<T>(dots, features, upstream, &plans, run.threads)
                });
                Ok(())
            }
        }
    }

    fn check_seed(&self, check: Check) -> Result<()> {
        self.plan.seed.check_beside(check, "seed", "features", self.features)
    }
}

fn like_features(check: Check, upstream: &TensorView, features: &TensorView) -> Result<()> {
    check.sizes("upstream", upstream, "of features", features.sizes())?;
    check.same_dtype("upstream", upstream, "features", features)?;
    check.same_device("upstream", upstream, "features", features)
}
