//! Everything that knows pyo3: the functions of `_core`, and the readers of tensors.

mod python;
mod read;
