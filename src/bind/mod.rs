//! The Python module: the functions of `_core`, and the readers of tensors. Only it uses pyo3.

mod python;
mod read;
