//! Reads a NumPy array, for offline analysis: CPU only, no gradients.

use super::{build, raise, unknown_dtype};
use crate::tensor::{DType, Device, Error, TensorView};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;

/// `None` when the object is no NumPy array.
pub(crate) fn read(
    op: &'static str, argument: &str, object: &Bound<'_, PyAny>,
) -> PyResult<Option<TensorView>> {
    let Ok(array) = object.cast::<PyUntypedArray>() else { return Ok(None) };
    let descr = array.dtype();
    let native = descr.is_native_byteorder() != Some(false);
    let Some(dtype) = from_kind(descr.kind(), descr.itemsize()).filter(|_| native) else {
        return Err(unknown_dtype(op, argument, descr));
    };
    let size = dtype.size() as isize;
    if array.strides().iter().any(|s| s % size != 0) {
        let rule = "have strides of whole elements";
        return Err(raise(Error::of_value(
            op,
            argument,
            rule,
            format!("{:?} bytes", array.strides()),
        )));
    }
    let strides: Vec<isize> = array.strides().iter().map(|s| s / size).collect();
    // SAFETY: a live array's header.
    let address = unsafe { (*array.as_array_ptr()).fields.data } as usize;
    build(op, argument, address, dtype, Device::Cpu, array.shape(), &strides).map(Some)
}

fn from_kind(kind: u8, size: usize) -> Option<DType> {
    Some(match (kind, size) {
        (b'f', 8) => DType::F64,
        (b'f', 4) => DType::F32,
        (b'f', 2) => DType::F16,
        (b'i', 8) => DType::I64,
        (b'i', 4) => DType::I32,
        (b'i', 2) => DType::I16,
        (b'i', 1) => DType::I8,
        (b'u', 1) => DType::U8,
        (b'b', 1) => DType::Bool,
        _ => return None,
    })
}
