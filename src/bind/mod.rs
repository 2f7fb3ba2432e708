//! The Python module: the functions of `_core`, and the readers of tensors. No other code uses
//! pyo3.

mod python;
mod read;
