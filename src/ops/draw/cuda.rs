//! The launch of kernel.cu.

use super::CHECK;
use crate::cuda::args::{address, mirror, Order};
use crate::cuda::launch::{on_device, Kernel, Source};
use crate::tensor::{DType, Result, Run, TensorView};

const SOURCE: &Source = &Source { name: "draw", text: include_str!("kernel.cu"), parts: &[] };
static DRAW: Kernel = Kernel::new(SOURCE, 1, "draw", (false, false));
/// All of them, for `sokd.warmup()`.
pub(crate) static KERNELS: [&Kernel; 1] = [&DRAW];

mirror! {
    /// The argument of the kernel.
    Draw { uniforms: u64, noise_seed: u64, seed: u64, counter: u64, count: i64 }
}

/// Uniforms f32 `[n]` and the noise's seed, int64 `[1]`, from a seed and a counter, int64 `[1]`.
///
/// # Safety
/// The arguments are checked, and all of them lie on the CUDA device `ordinal`.
pub(crate) unsafe fn forward(
    [seed, counter]: [&TensorView; 2], uniforms: &TensorView, noise_seed: &TensorView,
    ordinal: usize, run: &Run,
) -> Result<()> {
    let count = uniforms.numel() as i64;
    let call = Draw {
        uniforms: address(uniforms),
        noise_seed: address(noise_seed),
        seed: address(seed),
        counter: address(counter),
        count,
    };
    let blocks = (count as usize).div_ceil(4) + 1;
    on_device(CHECK.0, ordinal, run, |queue| {
        // SAFETY: `Draw` is what this kernel takes; the memory is the caller's promise.
        unsafe {
            queue.launch(
                &DRAW,
                (DType::F32, Order::Planes),
                [blocks.div_ceil(256) as i64, 1],
                &call,
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::args::tests::assert_mirrors;

    #[test]
    fn the_structure_is_that_of_the_kernel() {
        assert_mirrors(SOURCE.text, &[(Draw::NAME, Draw::FIELDS)]);
    }
}
