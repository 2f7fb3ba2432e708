//! sokd: fused feature kernels for student-oriented knowledge distillation.
//!
//! `ops`: the operators, a folder each; they take `tensor`s and know nothing of Python or torch.
//! `tensor`: views of tensors, the resources of a call, checks and errors.
//! `simd`, `parallel`, `random`: what the CPU kernels share.
//! `cuda`: finds, compiles, caches and launches the CUDA kernels that operators register.
//! `bind`: the Python module, the only code that knows pyo3.

// Python and CUDA are what calls the operators and fails: without one of them, some code has no caller.
#![cfg_attr(not(all(feature = "python", feature = "cuda")), allow(dead_code, unused_imports))]

#[cfg(feature = "python")]
mod bind;
#[cfg(feature = "cuda")]
mod cuda;
mod ops;
mod parallel;
mod random;
mod simd;
mod tensor;
