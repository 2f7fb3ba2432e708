//! A Python object -> `TensorView`. Three readers behind one function; the rest of the crate never sees a Python object.

mod numpy;
mod portable;
#[cfg(feature = "tch")]
mod tch;

use crate::tensor::Error;
use crate::tensor::{DType, TensorView};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::GILOnceCell;
use std::sync::atomic::{AtomicBool, Ordering};

/// The torch that the reader `tch` is built for; its dependency torch-sys pins it.
#[cfg(feature = "tch")]
pub const TCH_BUILT_FOR: Option<&str> = Some("2.13");
/// Built without the reader `tch`.
#[cfg(not(feature = "tch"))]
pub const TCH_BUILT_FOR: Option<&str> = None;

static USE_TCH: AtomicBool = AtomicBool::new(false);

/// Chooses the reader for torch tensors; false if this build does not have it.
pub fn select(name: &str) -> bool {
    let known = name == "portable" || (name == "tch" && TCH_BUILT_FOR.is_some());
    if known {
        USE_TCH.store(name == "tch", Ordering::Relaxed);
    }
    known
}

/// The reader in use for torch tensors.
pub fn selected() -> &'static str {
    if USE_TCH.load(Ordering::Relaxed) {
        "tch"
    } else {
        "portable"
    }
}

/// Reads a tensor's metadata. The view is good for as long as the caller holds the object.
pub fn view(op: &'static str, argument: &str, object: &Bound<'_, PyAny>) -> PyResult<TensorView> {
    #[cfg(feature = "tch")]
    if USE_TCH.load(Ordering::Relaxed) {
        if let Some(view) = tch::read(op, argument, object)? {
            return Ok(view);
        }
    } else if let Some(view) = portable::read(op, argument, object)? {
        return Ok(view);
    }
    #[cfg(not(feature = "tch"))]
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
pub fn raise(error: Error) -> PyErr {
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

/// Refuses torch tensors that have no strides to read: sparse, mkldnn, nested.
fn require_strided(op: &'static str, argument: &str, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
    static STRIDED: GILOnceCell<PyObject> = GILOnceCell::new();
    let py = tensor.py();
    let strided = STRIDED.get_or_try_init(py, || {
        PyResult::Ok(py.import("torch")?.getattr(intern!(py, "strided"))?.unbind())
    })?;
    let layout = tensor.getattr(intern!(py, "layout"))?;
    let found = if !layout.is(strided) {
        layout.str()?.to_string()
    } else if tensor.getattr(intern!(py, "is_nested"))?.is_truthy()? {
        "a nested tensor".to_owned()
    } else {
        return Ok(());
    };
    Err(raise(Error::of_type(op, argument, "be a strided tensor", found)))
}

fn unknown_dtype(op: &'static str, argument: &str, found: impl std::fmt::Display) -> PyErr {
    raise(Error::of_type(op, argument, "be of a floating-point, integer or bool dtype", found))
}

pub fn from_name(name: &str) -> Option<DType> {
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
    device: crate::tensor::Device,
    sizes: &[usize],
    strides: &[isize],
) -> PyResult<TensorView> {
    // SAFETY: torch or NumPy vouches that these sizes and strides lie within memory that the object keeps alive; the caller of `view`
    // holds the object.
    let view = unsafe { TensorView::new(pointer as *mut u8, dtype, device, sizes, strides) };
    view.ok_or_else(|| {
        let rule = format!("have at most {} dimensions", crate::tensor::MAX_RANK);
        raise(Error::of_value(op, argument, rule, sizes.len()))
    })
}
