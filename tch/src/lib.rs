//! Reads a tensor's metadata through libtorch, for sokd's `_core`, which links nothing of torch.
//!
//! The module holds one capsule, `reader`: the address of [`read`]. Import it only on a torch
//! release that it is proven on (`sokd.ops.config.PROVEN`); elsewhere the layout of a tensor can
//! differ.

use pyo3::ffi::{PyCapsule_New, PyObject as RawObject};
use pyo3::prelude::*;
use pyo3_tch::{tch::Tensor, torch_sys};
use std::ffi::{c_int, c_void, CStr};

/// The version of [`View`]. `_core` refuses every other.
const VERSION: u32 = 1;
/// What `_core` expects the capsule to be named.
const NAME: &CStr = c"sokd_tch.reader";
const MAX_RANK: usize = 8;

/// What [`read`] fills. Mirrored in sokd's src/bind/read/tch.rs.
#[repr(C)]
pub struct View {
    version: u32,
    /// libtorch's `ScalarType`.
    dtype: c_int,
    /// A CUDA ordinal; -1: the CPU.
    device: c_int,
    rank: u32,
    data: *mut c_void,
    sizes: [i64; MAX_RANK],
    /// In elements.
    strides: [i64; MAX_RANK],
}

/// Fills `view` from a tensor and returns 0. Returns 1 for any other object, and for a tensor that
/// is not strided, neither on the CPU nor on CUDA, or above `MAX_RANK`: then only the version is
/// written.
///
/// # Safety
/// The caller holds the GIL and `object`, and `view` can be written.
unsafe extern "C" fn read(object: *mut RawObject, view: *mut View) -> c_int {
    // SAFETY: the caller's promise; every version of the view begins with this field.
    unsafe { (&raw mut (*view).version).write(VERSION) };
    // SAFETY: as above.
    let tensor = unsafe { Tensor::pyobject_unpack(object.cast()) };
    let Ok(Some(tensor)) = tensor else { return 1 };
    // SAFETY: as above. `_core` reads the other fields only where the version is its own.
    match fields(&tensor).filter(|_| no_exception()) {
        None => 1,
        // SAFETY: as above.
        Some(read) => unsafe {
            view.write(read);
            0
        },
    }
}

/// `None`: unsupported, or libtorch raised an exception, which [`no_exception`] clears.
fn fields(tensor: &Tensor) -> Option<View> {
    let pointer = tensor.as_ptr().cast_mut();
    let (mut sizes, mut strides) = ([0; MAX_RANK], [0; MAX_RANK]);
    // SAFETY: a live tensor; the arrays have room for `rank` numbers. torch-sys stores a C++
    // exception for `no_exception`.
    unsafe {
        let rank = torch_sys::at_dim(pointer);
        if rank > MAX_RANK {
            return None;
        }
        torch_sys::at_shape(pointer, sizes.as_mut_ptr());
        torch_sys::at_stride(pointer, strides.as_mut_ptr());
        let device = torch_sys::at_device(pointer);
        if !no_exception() || device < -1 {
            return None;
        }
        let dtype = torch_sys::at_scalar_type(pointer);
        let data = torch_sys::at_data_ptr(pointer);
        Some(View { version: VERSION, dtype, device, rank: rank as u32, data, sizes, strides })
    }
}

/// Whether libtorch raised nothing since the last call; clears what it raised.
fn no_exception() -> bool {
    // SAFETY: null, or a C string that malloc made for the caller.
    unsafe {
        let error = torch_sys::get_and_reset_last_err();
        libc::free(error.cast());
        error.is_null()
    }
}

#[pymodule]
fn sokd_tch(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // SAFETY: the function and the name live as long as the process; the module owns the capsule.
    let reader = unsafe {
        let capsule = PyCapsule_New(read as *mut c_void, NAME.as_ptr(), None);
        Bound::from_owned_ptr_or_err(module.py(), capsule)?
    };
    module.add("reader", reader)?;
    module.add("BUILT_FOR", env!("SOKD_TCH_TORCH"))?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
