//! Everything that knows pyo3: the functions of `_core`, and the readers of tensors.

#[allow(unreachable_pub)]
mod python;
#[allow(unreachable_pub)]
mod read;
