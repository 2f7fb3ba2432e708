//! The operators; each folder holds the formula (mod.rs), the CPU kernel (cpu.rs), the CUDA kernel and its launch (kernel.cu, cuda.rs) and the
//! naive truth (naive.rs, tests only).

pub(crate) mod areas;
pub(crate) mod draw;
pub(crate) mod masked_mse;
pub(crate) mod refine;
