//! Philox with its vector forms, and its seeds. Mirrored in cuda/philox.cuh.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod philox;
mod seed;

pub(crate) use seed::Seed;
