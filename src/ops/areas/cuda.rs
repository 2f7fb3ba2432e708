//! The launches of kernel.cu.

use super::{Args, Outputs, CHECK};
use crate::cuda::args::{address, mirror, Map, Order};
use crate::cuda::launch::{on_device, Kernel, Source};
use crate::tensor::{Error, Result, Run};

const SOURCE: &Source = &Source { name: "areas", text: include_str!("kernel.cu"), parts: &[] };
static SCAN: Kernel = Kernel::new(SOURCE, 1, "areas_scan", (true, true));
static PICK: Kernel = Kernel::new(SOURCE, 2, "areas_pick", (true, false));
/// All of them, for `sokd.warmup()`.
pub(crate) static KERNELS: [&Kernel; 2] = [&SCAN, &PICK];

/// Cells of a block of the scan.
const CHUNK: usize = 2048;

mirror! {
    /// The argument of both kernels.
    Areas {
        heat: Map,
        size: Map,
        offset: Map,
        heat_teacher: Map,
        size_teacher: Map,
        offset_teacher: Map,
        batch: i64,
        maps: i64,
        height: i64,
        width: i64,
        k: i64,
        kernel: i64,
        chunks: i64,
        kept: i64,
        wide: i64,
        candidate_scores: u64,
        candidate_cells: u64,
        coverage: u64,
        boxes: u64,
        scores: u64,
    }
}

/// Coverage, boxes and scores.
///
/// # Safety
/// The arguments are checked, and all of them lie on the CUDA device `ordinal`.
pub(crate) unsafe fn forward(
    args: &Args, outputs: &Outputs, ordinal: usize, run: &Run,
) -> Result<()> {
    let order = Order::of(args.heat);
    let mut call = describe(args, outputs, order)?;
    let candidates = (call.batch * call.chunks * call.kept) as u64;
    let score = outputs.scores.dtype.size() as u64;
    // The cells first: they are the wider ones, so both stay aligned.
    call.candidate_cells = run.scratch(CHECK.0, (candidates * (8 + score)) as usize)?;
    call.candidate_scores = call.candidate_cells + candidates * 8;
    let variant = (args.heat.dtype, order);
    on_device(CHECK.0, ordinal, run, |queue| {
        // SAFETY: `Areas` is what these kernels take; the memory is the caller's promise.
        unsafe {
            queue.launch(&SCAN, variant, [call.batch * call.chunks, 1], &call)?;
            queue.launch(&PICK, variant, [call.batch, 1], &call)
        }
    })
}

fn describe(args: &Args, outputs: &Outputs, order: Order) -> Result<Areas> {
    let [batch, maps, height, width] = [0, 1, 2, 3].map(|i| args.heat.sizes()[i]);
    let cells = maps * height * width;
    if cells > i32::MAX as usize {
        let what = format!("maps of shape {} on {}", args.heat.shape_text(), args.heat.device);
        let supported = "fewer than 2147483648 cells a sample".to_owned();
        return Err(Error::Unsupported { op: CHECK.0, what, supported });
    }
    let heats = [args.heat, args.teacher.map_or(args.heat, |teacher| teacher[0])];
    // What the heat's vectors must not run over.
    let inner = if order == Order::Lanes { maps } else { cells };
    let wide = inner.is_multiple_of(16 / args.heat.dtype.size()) && order.is_dense(&heats);
    let [heat_teacher, size_teacher, offset_teacher] =
        args.teacher.map_or([Map::default(); 3], |teacher| teacher.map(Map::of));
    Ok(Areas {
        heat: Map::of(args.heat),
        size: Map::of(args.size),
        offset: Map::of(args.offset),
        heat_teacher,
        size_teacher,
        offset_teacher,
        batch: batch as i64,
        maps: maps as i64,
        height: height as i64,
        width: width as i64,
        k: args.k,
        kernel: args.kernel,
        chunks: cells.div_ceil(CHUNK) as i64,
        kept: args.k.min(CHUNK as i64),
        wide: i64::from(wide),
        coverage: address(outputs.coverage),
        boxes: address(outputs.boxes),
        scores: address(outputs.scores),
        ..Areas::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::args::tests::assert_mirrors;

    #[test]
    fn the_structure_is_that_of_the_kernel() {
        assert_mirrors(SOURCE.text, &[(Areas::NAME, Areas::FIELDS)]);
    }
}
