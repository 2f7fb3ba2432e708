//! A Python object -> `TensorView`. Three readers behind one function; the rest of the crate never
//! sees a Python object.

mod numpy;
mod portable;
mod tch;

use crate::tensor::Error;
use crate::tensor::{DType, Device, TensorView};
use pyo3::prelude::*;
pub(crate) use tch::{has_tch, select, selected, use_tch};

/// Reads a tensor's metadata. The view is valid for as long as the caller holds the object.
pub(crate) fn view(
    op: &'static str,
    argument: &str,
    object: &Bound<'_, PyAny>,
) -> PyResult<TensorView> {
    if let Some(view) = tch::read(object) {
        return Ok(view);
    }
    if let Some(view) = portable::read(op, argument, object)? {
        return Ok(view);
    }
    if let Some(view) = numpy::read(op, argument, object)? {
        return Ok(view);
    }
    let found = object.get_type().name()?;
    Err(raise(Error::of_type(op, argument, "be a torch.Tensor or a numpy.ndarray", found)))
}

/// The Python exception for a failed check.
pub(crate) fn raise(error: Error) -> PyErr {
    use crate::tensor::Class;
    use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};
    let text = error.to_string();
    match error.class() {
        Class::Type => PyTypeError::new_err(text),
        Class::Value => PyValueError::new_err(text),
        Class::NotImplemented => PyNotImplementedError::new_err(text),
        Class::Runtime => PyRuntimeError::new_err(text),
    }
}

fn unknown_dtype(op: &'static str, argument: &str, found: impl std::fmt::Display) -> PyErr {
    raise(Error::of_type(op, argument, "be of a floating-point, integer or bool dtype", found))
}

/// The dtype that PyTorch and NumPy call by this name.
pub(crate) fn from_name(name: &str) -> Option<DType> {
    Some(match name {
        "float64" => DType::F64,
        "float32" => DType::F32,
        "float16" => DType::F16,
        "bfloat16" => DType::BF16,
        "int64" => DType::I64,
        "int32" => DType::I32,
        "int16" => DType::I16,
        "int8" => DType::I8,
        "uint8" => DType::U8,
        "bool" => DType::Bool,
        _ => return None,
    })
}

/// Builds the view; `None` from [`TensorView::new`] means a rank above its limit.
fn build(
    op: &'static str,
    argument: &str,
    pointer: usize,
    dtype: DType,
    device: Device,
    sizes: &[usize],
    strides: &[isize],
) -> PyResult<TensorView> {
    // SAFETY: torch or NumPy vouches that these sizes and strides lie within memory that the object
    // keeps alive; the caller of `view` holds the object.
    let view = unsafe { TensorView::new(pointer as *mut u8, dtype, device, sizes, strides) };
    view.ok_or_else(|| {
        let rule = format!("have at most {} dimensions", crate::tensor::MAX_RANK);
        raise(Error::of_value(op, argument, rule, sizes.len()))
    })
}
