//! The launches of kernel.cu.

use super::{Args, Gradients, DOTS, REFINE};
use crate::cuda::args::{address, code, mirror, Grid, Map, Order, Out, Part};
use crate::cuda::launch::{on_device, Kernel, Source};
use crate::random::Seed;
use crate::tensor::{Result, Run, TensorView};

const SOURCE: &Source = &Source {
    name: "refine",
    text: include_str!("kernel.cu"),
    parts: &[
        ("backward.cuh", include_str!("backward.cuh")),
        ("adjoint.cuh", include_str!("adjoint.cuh")),
        ("dots.cuh", include_str!("dots.cuh")),
    ],
};
static FORWARD: Kernel = Kernel::new(SOURCE, 1, "refine_forward", (true, true));
static BACKWARD: Kernel = Kernel::new(SOURCE, 2, "refine_backward", (true, true));
static ADJOINT: Kernel = Kernel::new(SOURCE, 4, "refine_adjoint", (true, true));
static FINISH: Kernel = Kernel::new(SOURCE, 8, "refine_finish", (false, false));
static ALL_DOTS: Kernel = Kernel::new(SOURCE, 16, "refine_dots", (true, true));
static SQUARES: Kernel = Kernel::new(SOURCE, 32, "refine_squares", (true, true));
static DOTS_FINISH: Kernel = Kernel::new(SOURCE, 8, "refine_dots_finish", (false, false));
/// All of them, for `sokd.warmup()`.
pub(crate) static KERNELS: [&Kernel; 7] =
    [&FORWARD, &BACKWARD, &ADJOINT, &FINISH, &ALL_DOTS, &SQUARES, &DOTS_FINISH];

/// Numbers that a block writes for the second stage: six of d_theta, d_sigma, d_straight.
const SUMS: i64 = 8;

mirror! {
    /// The parts of a plan, and what goes with them.
    Plan {
        theta: Part,
        hole: Part,
        sigma: Part,
        perm: Part,
        keep: Part,
        seed_pointer: u64,
        seed: i64,
        width_by_height: f64,
        height_by_width: f64,
    }
}

mirror! {
    /// The argument of the forward kernel.
    Refine { refined: Map, features: Map, grid: Grid, plan: Plan, wide: i64 }
}

mirror! {
    /// The argument of the three backward kernels.
    RefineBackward {
        upstream: Map,
        features: Map,
        d_features: Map,
        grid: Grid,
        plan: Plan,
        d_theta: Out,
        d_sigma: Out,
        d_straight: Out,
        partials: u64,
        blocks: i64,
        wide: i64,
    }
}

mirror! {
    /// The argument of the three kernels of the dots.
    RefineDots {
        features: Map,
        upstream: Map,
        grid: Grid,
        plan: Plan,
        plans: i64,
        partials: u64,
        dots: u64,
        dots_dtype: i64,
        dots_plan: i64,
        dots_square: i64,
        dots_sample: i64,
        samples: i64,
        blocks: i64,
        wide: i64,
    }
}

impl Plan {
    /// A plan, or stacked plans, for these features.
    fn of(args: &Args, stacked: bool) -> Self {
        let (plan, features) = (args.plan, args.features);
        let (height, width) = (features.sizes()[2] as f64, features.sizes()[3] as f64);
        let (seed_pointer, seed) = match &plan.seed {
            Seed::Value(value) => (0, *value as i64),
            Seed::Tensor(view) => (address(view), 0),
        };
        Self {
            theta: Part::of(plan.theta.as_ref(), stacked),
            hole: Part::of(plan.hole.as_ref(), stacked),
            sigma: Part::of(plan.sigma.as_ref(), stacked),
            perm: Part::of(plan.perm.as_ref(), stacked),
            keep: Part::of(plan.keep.as_ref(), stacked),
            seed_pointer,
            seed,
            width_by_height: width / height,
            height_by_width: height / width,
        }
    }
}

/// refined, from features and a plan.
///
/// # Safety
/// The arguments are checked, and all of them lie on the CUDA device `ordinal`; so in the other
/// functions.
pub(crate) unsafe fn forward(
    args: &Args, refined: &TensorView, ordinal: usize, run: &Run,
) -> Result<()> {
    let features = args.features;
    let order = Order::of(refined);
    let wide = order.is_wide(&[refined, features]);
    let grid = Grid::new(REFINE, refined, order, true)?;
    let call = Refine {
        refined: Map::of(refined),
        features: Map::of(features),
        grid,
        plan: Plan::of(args, false),
        wide: i64::from(wide),
    };
    on_device(REFINE.0, ordinal, run, |queue| {
        // SAFETY: `Refine` is what this kernel takes, filled as kernel.cu defines it; the memory is
        // the caller's promise.
        unsafe { queue.launch(&FORWARD, (features.dtype, order), [grid.blocks(), 1], &call) }
    })
}

/// The gradients: the features' by one kernel, the plan's by two.
///
/// # Safety
/// As for [`forward`].
pub(crate) unsafe fn backward(
    args: &Args, gradients: &Gradients, upstream: &TensorView, ordinal: usize, run: &Run,
) -> Result<()> {
    let features = args.features;
    let order = Order::of(upstream);
    let wide = order.is_wide(&[upstream, features]);
    let call = RefineBackward {
        upstream: Map::of(upstream),
        features: Map::of(features),
        d_features: Map::of_some(gradients.d_features),
        plan: Plan::of(args, false),
        d_theta: Out::of(gradients.d_theta),
        d_sigma: Out::of(gradients.d_sigma),
        d_straight: Out::of(gradients.d_straight),
        ..RefineBackward::default()
    };
    let sums = call.with(Grid::new(REFINE, upstream, order, true)?, wide);
    let groups =
        [sums.d_theta, sums.d_sigma, sums.d_straight].map(|out| out.groups).into_iter().max();
    let groups = groups.unwrap_or(0);
    let bytes = if groups > 0 { 8 * SUMS * sums.blocks } else { 0 };
    let sums = RefineBackward { partials: run.scratch(REFINE.0, bytes as usize)?, ..sums };
    let adjoint = gradients.d_features.map(|d_features| {
        let order = Order::of(d_features);
        let wide = order.is_wide(&[d_features, upstream]);
        Grid::new(REFINE, d_features, order, true).map(|grid| (order, call.with(grid, wide)))
    });
    let adjoint = adjoint.transpose()?;
    on_device(REFINE.0, ordinal, run, |queue| {
        // SAFETY: `RefineBackward` is what these kernels take, filled as kernel.cu defines it; the
        // memory is the caller's promise.
        unsafe {
            if groups > 0 {
                queue.launch(&BACKWARD, (features.dtype, order), [sums.blocks, 1], &sums)?;
                queue.launch(&FINISH, (features.dtype, order), [groups, SUMS], &sums)?;
            }
            let Some((order, adjoint)) = adjoint else { return Ok(()) };
            queue.launch(&ADJOINT, (features.dtype, order), [adjoint.blocks, 1], &adjoint)
        }
    })
}

impl RefineBackward {
    fn with(self, grid: Grid, wide: bool) -> Self {
        Self { grid, blocks: grid.blocks(), wide: i64::from(wide), ..self }
    }
}

/// The inner products with stacked plans.
///
/// # Safety
/// As for [`forward`].
pub(crate) unsafe fn dots(
    args: &Args, dots: &TensorView, upstream: &TensorView, ordinal: usize, run: &Run,
) -> Result<()> {
    let features = args.features;
    let order = Order::of(upstream);
    let wide = order.is_wide(&[upstream, features]);
    let grid = Grid::new(DOTS, upstream, order, false)?;
    let by_sample = dots.rank() > 1;
    let strides = |i: usize| dots.strides()[i] as i64;
    let (plan, square, sample) =
        if by_sample { (strides(1), strides(0), strides(2)) } else { (strides(0), 0, 0) };
    let (plans, blocks) = (dots.sizes()[usize::from(by_sample)] as i64, grid.blocks());
    let (samples, numbers) = if by_sample { (grid.batch, 2) } else { (0, 1) };
    let call = RefineDots {
        features: Map::of(features),
        upstream: Map::of(upstream),
        grid,
        plan: Plan::of(args, true),
        plans,
        partials: run.scratch(DOTS.0, (8 * numbers * plans * blocks) as usize)?,
        dots: address(dots),
        dots_dtype: code(dots.dtype),
        dots_plan: plan,
        dots_square: square,
        dots_sample: sample,
        samples,
        blocks,
        wide: i64::from(wide),
    };
    on_device(DOTS.0, ordinal, run, |queue| {
        let variant = (features.dtype, order);
        // SAFETY: `RefineDots` is what these kernels take, filled as kernel.cu defines it; the
        // memory is the caller's promise.
        unsafe {
            if plans > 0 {
                let kernel = if by_sample { &SQUARES } else { &ALL_DOTS };
                queue.launch(kernel, variant, [blocks, 1], &call)?;
            }
            queue.launch(&DOTS_FINISH, variant, [dots.numel() as i64, 1], &call)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::args::tests::assert_mirrors;

    #[test]
    fn the_structures_are_those_of_the_kernels() {
        let all = [
            (Plan::NAME, Plan::FIELDS),
            (Refine::NAME, Refine::FIELDS),
            (RefineBackward::NAME, RefineBackward::FIELDS),
            (RefineDots::NAME, RefineDots::FIELDS),
        ];
        assert_mirrors(SOURCE.text, &all);
    }
}
