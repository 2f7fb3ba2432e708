//! What operators take: views of tensors, the resources of a call, checks and errors.

mod check;
mod dtype;
mod error;
mod run;
#[cfg(test)]
pub(crate) mod testing;
mod view;

pub(crate) use check::Check;
pub(crate) use dtype::DType;
pub(crate) use error::{Class, CudaFailure, Error, Result};
pub(crate) use run::Run;
pub(crate) use view::{Device, TensorView, MAX_RANK};
