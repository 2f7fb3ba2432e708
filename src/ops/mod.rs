//! The operators, a folder each: the formula and the arguments (mod.rs), the CPU kernel (cpu.rs),
//! the CUDA kernel and its launch (kernel.cu, cuda.rs), and the formula as plain loops, which the
//! tests compare with (naive.rs).

pub(crate) mod areas;
pub(crate) mod draw;
pub(crate) mod masked_mse;
pub(crate) mod refine;

/// The CUDA kernels of all operators.
#[cfg(feature = "cuda")]
pub(crate) static KERNELS: [&[&crate::cuda::launch::Kernel]; 4] = [
    &refine::cuda::KERNELS,
    &areas::cuda::KERNELS,
    &masked_mse::cuda::KERNELS,
    &draw::cuda::KERNELS,
];
