//! Reads a Python object into a `TensorView`.
//!
//! `tch` and `dlpack` read a torch tensor in one C call. `portable` reads by Python attributes:
//! what those two leave, and every tensor where neither is selected. `numpy` reads arrays.

mod dlpack;
mod numpy;
mod portable;
mod tch;

use crate::tensor::{DType, Device, Error, TensorView};
use pyo3::prelude::*;
use std::sync::atomic::{AtomicU8, Ordering};

const PORTABLE: u8 = 0;
const DLPACK: u8 = 1;
const TCH: u8 = 2;
const NAMES: [&str; 3] = ["portable", "dlpack", "tch"];

static SELECTED: AtomicU8 = AtomicU8::new(PORTABLE);

/// Selects the reader of torch tensors by its name.
pub(crate) fn select(py: Python<'_>, name: &str) -> PyResult<()> {
    let is_available = [true, dlpack::is_available(py)?, tch::is_available()];
    let available = || NAMES.into_iter().zip(is_available).filter(|(_, has)| *has);
    if !available().any(|(known, _)| known == name) {
        let known: Vec<_> = available().map(|(known, _)| known).collect();
        let rule = format!("be one of {}", known.join(", "));
        let name = format_args!("'{name}'");
        return Err(raise(Error::of_value("select_reader", "name", rule, name)));
    }
    let index = NAMES.iter().position(|known| *known == name).unwrap_or_default();
    SELECTED.store(index as u8, Ordering::Relaxed);
    Ok(())
}

/// The name of the selected reader.
pub(crate) fn selected() -> &'static str {
    NAMES[usize::from(SELECTED.load(Ordering::Relaxed))]
}

/// Takes the capsule `sokd_tch.reader`, and selects it.
pub(crate) fn use_tch(reader: &Bound<'_, PyAny>) -> PyResult<()> {
    tch::open(reader)?;
    SELECTED.store(TCH, Ordering::Relaxed);
    Ok(())
}

/// Reads a tensor's metadata. The view is valid for as long as the caller holds the object.
pub(crate) fn view(
    op: &'static str, argument: &str, object: &Bound<'_, PyAny>,
) -> PyResult<TensorView> {
    let read = match SELECTED.load(Ordering::Relaxed) {
        TCH => tch::read(object),
        DLPACK => dlpack::read(object),
        _ => None,
    };
    if let Some(view) = read {
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

/// Builds the view of an object's memory, which must exist and be aligned.
fn build(
    op: &'static str, argument: &str, address: usize, dtype: DType, device: Device,
    sizes: &[usize], strides: &[isize],
) -> PyResult<TensorView> {
    let refuse = |rule: &str, got: String| Err(raise(Error::of_value(op, argument, rule, got)));
    if !matches!(device, Device::Other(_)) && !sizes.contains(&0) {
        if address == 0 {
            return refuse("have memory", "a tensor of no storage".to_owned());
        }
        if !address.is_multiple_of(dtype.size()) {
            let got = format!("an address {} bytes off", address % dtype.size());
            return refuse("be aligned to its elements", got);
        }
    }
    // SAFETY: by torch or NumPy, these sizes and strides lie within memory that the object keeps
    // alive, and the caller of `view` holds the object.
    let view = unsafe { TensorView::new(address as *mut u8, dtype, device, sizes, strides) };
    let Some(view) = view else {
        let rule = format!("have at most {} dimensions", crate::tensor::MAX_RANK);
        return refuse(&rule, sizes.len().to_string());
    };
    Ok(view)
}
