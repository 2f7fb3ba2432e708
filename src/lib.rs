//! sokd: fused feature kernels for student-oriented knowledge distillation.
//!
//! `ops`: the operators, a folder each; they take views of `tensor` and nothing of Python or torch.
//! `tensor`: views of tensors, the resources of a call, checks and errors.
//! `simd`, `parallel`, `random`: what the CPU kernels share.
//! `cuda`: the driver, the compiler, the cache and the launch of the kernels that operators
//! register. `bind`: the Python module, the only code that uses pyo3.

// Without both features, some code has no caller.
#![cfg_attr(
    not(all(feature = "python", feature = "cuda")),
    allow(dead_code, unused_imports, unused_variables)
)]

#[cfg(feature = "python")]
mod bind;
#[cfg(feature = "cuda")]
mod cuda;
mod ops;
mod parallel;
mod random;
mod simd;
mod tensor;
