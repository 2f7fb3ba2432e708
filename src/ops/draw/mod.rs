//! A policy's random draws: uniforms in (0, 1) and a seed for the noise, from a seed and a counter.
//!
//! word = philox4x32_10(counter = (block, 0xFFFFFFFF, counter), key = seed);   noise_seed = words 0 and 1 of block 0
//!
//! uniforms[i] = ((word i % 4 of block 1 + i / 4) >> 9) + 1/2) * 2^-23

#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::random::{philox, Seed};
#[cfg(feature = "cuda")]
use crate::tensor::Device;
use crate::tensor::{Check, DType, Result, Run, TensorView};

const CHECK: Check = Check("draw");

/// What a policy draws in one step ([`philox::draw`]): uniforms f32 `[n]`, noise_seed int64 `[1]`.
///
/// `from`: the seed and the counter, numbers or int64 `[1]`.
pub(crate) fn draw(
    uniforms: &TensorView,
    noise_seed: &TensorView,
    from: [&Seed; 2],
    run: &Run,
) -> Result<()> {
    CHECK.of_dtype("uniforms", uniforms, DType::F32)?;
    CHECK.rank("uniforms", uniforms, "[n]", &[1])?;
    CHECK.of_dtype("noise_seed", noise_seed, DType::I64)?;
    CHECK.sizes("noise_seed", noise_seed, "[1]", &[1])?;
    CHECK.same_device("noise_seed", noise_seed, "uniforms", uniforms)?;
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(ordinal), [Seed::Tensor(seed), Seed::Tensor(counter)]) =
        (&uniforms.device, from)
    {
        for (name, word) in [("seed", from[0]), ("counter", from[1])] {
            word.check_beside(CHECK, name, "uniforms", uniforms)?;
        }
        CHECK.contiguous("uniforms", uniforms)?;
        // SAFETY: checked above, the devices too.
        return unsafe { cuda::draw(uniforms, noise_seed, [seed, counter], *ordinal, run) };
    }
    let _ = run;
    CHECK.on_cpu("uniforms", uniforms)?;
    let (seed, counter) = (from[0].value(CHECK, "seed")?, from[1].value(CHECK, "counter")?);
    let mut values = vec![0f32; uniforms.numel()];
    let first = philox::draw(seed, counter, &mut values);
    for (i, value) in values.iter().enumerate() {
        // SAFETY: [n] in host memory, and `i` is below n.
        unsafe { uniforms.write_f64(&[i], f64::from(*value)) };
    }
    // SAFETY: int64 [1] in host memory. An i64 may not pass through f64.
    unsafe { noise_seed.as_ptr::<i64>().write(first) };
    Ok(())
}
