//! sokd: fused feature kernels for student-oriented knowledge distillation.
//!
//! `ops` holds the operators, one folder each. They take [`view::TensorView`]s and know nothing of Python or torch;
//! `python` is the only file that does, and `read` turns Python objects into views. `check` judges arguments, `error` words
//! failures. `tile`, `row`, `elem`, `transpose`, `simd`, `philox` and `parallel` (with `openmp`) are what the CPU kernels share;
//! `cuda` finds, compiles, keeps and launches those of CUDA. `run` is what a call may use, `seed` what it may draw from.

pub mod check;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod elem;
pub mod error;
mod openmp;
pub mod ops;
pub mod parallel;
pub mod philox;
pub mod row;
pub mod run;
pub mod seed;
pub mod simd;
#[cfg(test)]
mod testing;
pub mod tile;
pub mod transpose;
pub mod view;

#[cfg(feature = "python")]
mod python;
#[cfg(feature = "python")]
mod read;
