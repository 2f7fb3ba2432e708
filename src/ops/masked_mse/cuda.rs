//! The launches of kernel.cu.

use super::{Args, CHECK};
use crate::cuda::args::{address, code, elements, mirror, Grid, Map, Order};
use crate::cuda::launch::{on_device, Kernel, Source};
use crate::tensor::{DType, Result, Run, TensorView};

const SOURCE: &Source = &Source { name: "masked_mse", text: include_str!("kernel.cu"), parts: &[] };
static LOSS: Kernel = Kernel::new(SOURCE, 1, "masked_mse", (true, true));
static AREA: Kernel = Kernel::new(SOURCE, 2, "masked_mse_area", (false, false));
static NORM: Kernel = Kernel::new(SOURCE, 2, "masked_mse_norm", (false, false));
static SCALE: Kernel = Kernel::new(SOURCE, 4, "masked_mse_scale", (true, false));
static FINISH: Kernel = Kernel::new(SOURCE, 2, "masked_mse_finish", (false, false));
/// All of them, for `sokd.warmup()`.
pub(crate) static KERNELS: [&Kernel; 5] = [&LOSS, &AREA, &NORM, &FINISH, &SCALE];

mirror! {
    /// The argument of the forward's four kernels.
    MaskedMse {
        student: Map,
        teacher: Map,
        d_student: Map,
        weight: Map,
        grid: Grid,
        weight_dtype: i64,
        area: i64,
        scale: f64,
        divisor: f64,
        factor: f64,
        partials: u64,
        areas: u64,
        norm: u64,
        loss: u64,
        loss_dtype: i64,
        blocks: i64,
        area_blocks: i64,
        wide: i64,
    }
}

mirror! {
    /// The argument of the backward's kernel.
    Scale { gradient: u64, count: i64, upstream: u64, upstream_dtype: i64, blocks: i64, wide: i64 }
}

/// Loss and gradient.
///
/// # Safety
/// The arguments are checked, and all of them lie on the CUDA device `ordinal`.
pub(crate) unsafe fn forward(
    args: &Args, loss: &TensorView, d_student: Option<&TensorView>, ordinal: usize, run: &Run,
) -> Result<()> {
    let order = Order::of(d_student.unwrap_or(args.student));
    let mut call = describe(args, loss, d_student, order)?;
    let words = [call.blocks, call.area_blocks, 3];
    call.partials = run.scratch(CHECK.0, 8 * words.iter().sum::<i64>() as usize)?;
    call.areas = call.partials + 8 * call.blocks as u64;
    call.norm = call.areas + 8 * call.area_blocks as u64;
    let variant = (args.student.dtype, order);
    on_device(CHECK.0, ordinal, run, |queue| {
        // SAFETY: `MaskedMse` is what these kernels take; the memory is the caller's promise.
        unsafe {
            if call.area != 0 {
                queue.launch(&AREA, variant, [call.area_blocks, 1], &call)?;
                queue.launch(&NORM, variant, [1, 1], &call)?;
            }
            queue.launch(&LOSS, variant, [call.blocks, 1], &call)?;
            queue.launch(&FINISH, variant, [1, 1], &call)
        }
    })
}

/// gradient *= upstream.
///
/// # Safety
/// The arguments are checked, and both lie on the CUDA device `ordinal`.
pub(crate) unsafe fn scale(
    gradient: &TensorView, upstream: &TensorView, ordinal: usize, run: &Run,
) -> Result<()> {
    let count = gradient.numel();
    let call = Scale {
        gradient: address(gradient),
        count: count as i64,
        upstream: address(upstream),
        upstream_dtype: code(upstream.dtype),
        blocks: count.div_ceil(1024 * elements(gradient.dtype)).min(2048) as i64,
        wide: i64::from((gradient.ptr() as usize).is_multiple_of(16)),
    };
    on_device(CHECK.0, ordinal, run, |queue| {
        // SAFETY: `Scale` is what this kernel takes; the memory is the caller's promise.
        unsafe { queue.launch(&SCALE, (gradient.dtype, Order::Planes), [call.blocks, 1], &call) }
    })
}

fn describe(
    args: &Args, loss: &TensorView, d_student: Option<&TensorView>, order: Order,
) -> Result<MaskedMse> {
    let student = args.student;
    let wide = match d_student {
        Some(d_student) => order.is_wide(&[student, args.teacher, d_student]),
        None => order.is_wide(&[student, args.teacher]),
    };
    let grid = Grid::new(CHECK, student, order, true)?;
    let area = args.normalise == "area" && args.weight.is_some();
    let positions = grid.batch * grid.height * grid.width;
    let divisor = student.numel() as f64;
    Ok(MaskedMse {
        student: Map::of(student),
        teacher: Map::of(args.teacher),
        d_student: Map::of_some(d_student),
        weight: args.weight.map_or_else(Map::default, Map::of_positions),
        weight_dtype: code(args.weight.map_or(DType::F32, |weight| weight.dtype)),
        area: i64::from(area),
        scale: args.scale,
        divisor,
        factor: 2.0 * args.scale / divisor,
        loss: address(loss),
        loss_dtype: code(loss.dtype),
        blocks: grid.blocks(),
        area_blocks: if area { ((positions + 4095) / 4096).clamp(1, 128) } else { 0 },
        wide: i64::from(wide),
        grid,
        ..MaskedMse::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::args::tests::assert_mirrors;

    #[test]
    fn the_structure_is_that_of_the_kernel() {
        assert_mirrors(
            SOURCE.text,
            &[(MaskedMse::NAME, MaskedMse::FIELDS), (Scale::NAME, Scale::FIELDS)],
        );
    }
}
