//! Random numbers: Philox with its vector forms, and the seeds that it takes. Mirrored in
//! cuda/philox.cuh.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod philox;
mod seed;

pub(crate) use seed::Seed;
