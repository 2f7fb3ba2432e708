//! Reads a tensor by DLPack's `__dlpack_c_exchange_api__`, one C function in torch 2.10 and later.
//!
//! The table and the tensor it describes are a versioned standard, independent of torch's releases.

use super::build;
use crate::tensor::{DType, Device, TensorView};
use pyo3::ffi::{PyObject as RawObject, PyTypeObject};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyType};
use std::ffi::{c_int, c_void};
use std::slice::from_raw_parts;

/// DLPack's `DLTensor`.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: (c_int, i32),
    rank: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    sizes: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLPackDLTensorFromPyObjectNoSync`: borrows; 0, or -1 with a Python exception set.
type Read = unsafe extern "C" fn(*mut RawObject, *mut DlTensor) -> c_int;

/// DLPack's `DLPackExchangeAPI`.
#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    previous: *const c_void,
    owning: [*const c_void; 3],
    read: Read,
}

struct Torch {
    read: Read,
    /// `Tensor` and `Parameter`. A subclass may report other metadata than its C++ tensor has.
    types: [Py<PyType>; 2],
}

static TORCH: PyOnceLock<Option<Torch>> = PyOnceLock::new();

/// Whether the running torch has the function.
pub(crate) fn is_available(py: Python<'_>) -> PyResult<bool> {
    Ok(TORCH.get_or_try_init(py, || find(py))?.is_some())
}

fn find(py: Python<'_>) -> PyResult<Option<Torch>> {
    let torch = py.import("torch")?;
    let tensor = torch.getattr("Tensor")?;
    let parameter = torch.getattr("nn")?.getattr("Parameter")?;
    let capsule = tensor.getattr_opt("__dlpack_c_exchange_api__")?;
    let capsule = capsule.and_then(|object| object.cast_into::<PyCapsule>().ok());
    let Some(address) = capsule.and_then(|c| c.pointer_checked(Some(c"dlpack_exchange_api")).ok())
    else {
        return Ok(None);
    };
    // SAFETY: by its name, the capsule points at such a table, which lives as long as the process.
    // Every version begins with the version; the rest is read where the major version is 1.
    let read = unsafe {
        let api = address.cast::<ExchangeApi>().as_ptr();
        if (*api).major != 1 {
            return Ok(None);
        }
        (*api).read
    };
    let types = [tensor.cast_into()?.unbind(), parameter.cast_into()?.unbind()];
    Ok(Some(Torch { read, types }))
}

/// `None` leaves the object to the portable reader, which reads it or raises the error: not exactly
/// a tensor, not strided, on a device without kernels, or of a dtype that sokd does not read.
pub(crate) fn read(object: &Bound<'_, PyAny>) -> Option<TensorView> {
    let py = object.py();
    let torch = TORCH.get(py)?.as_ref()?;
    let kind: *mut PyTypeObject = object.get_type_ptr();
    if !torch.types.iter().any(|known| known.as_ptr().cast() == kind) {
        return None;
    }
    let null = std::ptr::null_mut();
    let mut found = DlTensor {
        data: null,
        device: (0, 0),
        rank: 0,
        code: 0,
        bits: 0,
        lanes: 0,
        sizes: null.cast(),
        strides: null.cast(),
        byte_offset: 0,
    };
    // SAFETY: the GIL and a tensor of the type that the function belongs to.
    if unsafe { (torch.read)(object.as_ptr(), &mut found) } != 0 {
        drop(PyErr::take(py));
        return None;
    }
    let device = match found.device {
        (1, _) => Device::Cpu,
        (2, ordinal) => Device::Cuda(usize::try_from(ordinal).ok()?),
        _ => return None,
    };
    let dtype = from_code(found.code, found.bits, found.lanes)?;
    let rank = usize::try_from(found.rank).ok()?;
    // SAFETY: the tensor owns `rank` numbers in each.
    let (sizes, strides) = unsafe { (numbers(found.sizes, rank)?, numbers(found.strides, rank)?) };
    let sizes: Vec<_> = sizes.iter().map(|&size| size as usize).collect();
    let strides: Vec<_> = strides.iter().map(|&stride| stride as isize).collect();
    let address = found.data as usize + found.byte_offset as usize;
    build("read", "object", address, dtype, device, &sizes, &strides).ok()
}

/// `None` for a null pointer, unless there are no numbers.
///
/// # Safety
/// `pointer` is null or valid for `rank` numbers.
unsafe fn numbers<'a>(pointer: *const i64, rank: usize) -> Option<&'a [i64]> {
    match (rank, pointer.is_null()) {
        (0, _) => Some(&[]),
        (_, true) => None,
        // SAFETY: the caller's promise.
        (_, false) => Some(unsafe { from_raw_parts(pointer, rank) }),
    }
}

fn from_code(code: u8, bits: u8, lanes: u16) -> Option<DType> {
    Some(match (code, bits, lanes) {
        (0, 8, 1) => DType::I8,
        (0, 16, 1) => DType::I16,
        (0, 32, 1) => DType::I32,
        (0, 64, 1) => DType::I64,
        (1, 8, 1) => DType::U8,
        (2, 16, 1) => DType::F16,
        (2, 32, 1) => DType::F32,
        (2, 64, 1) => DType::F64,
        (4, 16, 1) => DType::BF16,
        (6, 8, 1) => DType::Bool,
        _ => return None,
    })
}
