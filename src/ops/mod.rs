//! The operators; each folder holds the formula (mod.rs), the CPU kernel (cpu.rs) and the naive truth (naive.rs, tests only).

pub mod areas;
pub mod masked_mse;
pub mod refine;
