//! A policy's random draws: uniforms in (0, 1) and a seed for the noise, from a seed and a counter.
//!
//! word = philox4x32_10(counter = (block, 0xFFFFFFFF, counter), key = seed)
//!
//! noise_seed = words 0 and 1 of block 0
//!
//! uniforms[i] = ((word i % 4 of block 1 + i / 4) >> 9) + 1/2) * 2^-23

#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::random::{philox, Seed};
use crate::tensor::{Check, DType, Device, Result, Run, TensorView};

const CHECK: Check = Check("draw");

/// The inputs of a call: numbers or int64 `[1]`.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
    pub seed: &'a Seed,
    pub counter: &'a Seed,
}

impl Args<'_> {
    /// Checks metadata, on any device.
    pub(crate) fn check(&self) -> Result<()> {
        self.seed.check(CHECK, "seed")?;
        self.counter.check(CHECK, "counter")
    }

    /// The draws of one step: uniforms f32 `[n]`, noise_seed int64 `[1]`.
    pub(crate) fn forward(
        &self, uniforms: &TensorView, noise_seed: &TensorView, run: &Run,
    ) -> Result<()> {
        self.check()?;
        CHECK.of_dtype("uniforms", uniforms, DType::F32)?;
        CHECK.rank("uniforms", uniforms, "[n]", &[1])?;
        CHECK.of_dtype("noise_seed", noise_seed, DType::I64)?;
        CHECK.sizes("noise_seed", noise_seed, "[1]", &[1])?;
        CHECK.same_device("noise_seed", noise_seed, "uniforms", uniforms)?;
        match (&uniforms.device, self.seed, self.counter) {
            #[cfg(feature = "cuda")]
            (Device::Cuda(ordinal), Seed::Tensor(seed), Seed::Tensor(counter)) => {
                CHECK.same_device("seed", seed, "uniforms", uniforms)?;
                CHECK.same_device("counter", counter, "uniforms", uniforms)?;
                CHECK.contiguous("uniforms", uniforms)?;
                // SAFETY: checked above, the devices too.
                unsafe { cuda::forward([seed, counter], uniforms, noise_seed, *ordinal, run) }
            }
            _ => self.on_cpu(uniforms, noise_seed),
        }
    }

    fn on_cpu(&self, uniforms: &TensorView, noise_seed: &TensorView) -> Result<()> {
        CHECK.on_cpu("uniforms", uniforms)?;
        let seed = self.seed.value(CHECK, "seed")?;
        let counter = self.counter.value(CHECK, "counter")?;
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
}

#[cfg(test)]
mod naive {
    use super::*;
    use crate::random::philox::block;
    use crate::tensor::testing::{any_lay, Lay, Owned};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(crate::tensor::testing::cases(300))]

        #[test]
        fn draws_are_the_words_of_the_module(
            count in 0..70usize, lay in any_lay(), seed in any::<i64>(), counter in any::<i64>(),
            held in any::<bool>(),
        ) {
            let shared = matches!(lay, Lay::Expanded | Lay::ExpandedInside);
            let lay = if shared { Lay::Sliced } else { lay };
            let uniforms = Owned::empty(&[count], DType::F32, lay);
            let noise_seed = Owned::empty(&[1], DType::I64, Lay::Contiguous);
            let words = [seed, counter].map(|value| {
                let owned = Owned::empty(&[1], DType::I64, Lay::Contiguous);
                // SAFETY: one number in host memory.
                unsafe { owned.view.as_ptr::<i64>().write(value) };
                owned
            });
            let [of_seed, of_counter] = words.each_ref().map(|word| {
                // SAFETY: as above.
                let value = unsafe { word.view.read_i64(&[0]) } as u64;
                if held { Seed::Tensor(word.view.clone()) } else { value.into() }
            });
            let args = Args { seed: &of_seed, counter: &of_counter };
            args.forward(&uniforms.view, &noise_seed.view, &1.into()).unwrap();
            let counter = counter as u64;
            let words = |i: usize| {
                block(seed as u64, [i as u32, u32::MAX, counter as u32, (counter >> 32) as u32])
            };
            for (i, value) in uniforms.values().into_iter().enumerate() {
                let word = words(1 + i / 4)[i % 4] >> 9;
                prop_assert_eq!(value, (f64::from(word) + 0.5) / 8_388_608.0);
            }
            // SAFETY: int64 [1] in host memory.
            let found = unsafe { noise_seed.view.as_ptr::<i64>().read() } as u64;
            prop_assert_eq!([found as u32, (found >> 32) as u32], [words(0)[0], words(0)[1]]);
            prop_assert!(uniforms.is_intact_around() && noise_seed.is_intact_around());
        }
    }
}
