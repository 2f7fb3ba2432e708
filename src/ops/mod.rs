//! The operators; each folder holds the formula (mod.rs), the CPU kernel (cpu.rs), the CUDA kernel and its launch (kernel.cu, cuda.rs) and the
//! naive truth (naive.rs, tests only).

pub mod areas;
pub mod draw;
pub mod masked_mse;
pub mod refine;
