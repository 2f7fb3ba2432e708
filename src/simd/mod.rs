//! Vector code on stable Rust: loops over `[T; LANES]` that the compiler vectorises, compiled once
//! for every instruction set and picked at run time.
//!
//! Every level runs the same operations in the same order (fused multiply-adds are written out), so
//! the bits do not depend on the CPU.

mod element;
mod level;
pub(crate) mod tile;
mod transpose;
mod vector;

pub(crate) use element::{by_dtype, Bf16, Element, Real, F16};
#[cfg(test)]
pub(crate) use level::run_at;
pub(crate) use level::{level, run, Level, Simd, WithSimd};
#[cfg(target_arch = "x86_64")]
pub(crate) use level::{Avx2, Avx512};
pub(crate) use vector::Vector;

/// Elements side by side in the kernels (mostly channels): one AVX-512 register of f32.
pub(crate) const LANES: usize = 16;
