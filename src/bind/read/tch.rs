//! Reads a tensor through libtorch, by one C function of sokd_tch.
//!
//! sokd_tch (in `tch/`) links libtorch, and passes the function's address in a capsule.

use super::{build, raise};
use crate::tensor::{DType, Device, Error, TensorView, MAX_RANK};
use pyo3::ffi::PyObject as RawObject;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use std::ffi::{c_int, c_void, CStr};
use std::sync::OnceLock;

/// The version of [`View`] that this build reads.
const VERSION: u32 = 1;
const NAME: &CStr = c"sokd_tch.reader";

/// What the C function fills. Mirrored in tch/src/lib.rs; every version begins with `version`.
#[repr(C)]
struct View {
    version: u32,
    /// libtorch's `ScalarType`.
    dtype: c_int,
    /// A CUDA ordinal; -1: the CPU.
    device: c_int,
    rank: u32,
    data: *mut c_void,
    sizes: [i64; MAX_RANK],
    strides: [i64; MAX_RANK],
}

/// Returns 0 where it read a tensor; otherwise only `version` is written.
type Read = unsafe extern "C" fn(*mut RawObject, *mut View) -> c_int;

static READ: OnceLock<Read> = OnceLock::new();

/// Whether the function of sokd_tch is known.
pub(crate) fn is_available() -> bool {
    READ.get().is_some()
}

/// Takes the function from the capsule `sokd_tch.reader`.
pub(crate) fn open(reader: &Bound<'_, PyAny>) -> PyResult<()> {
    let refuse = |rule: String, got: String| {
        Err(raise(Error::of_value("use_tch_reader", "reader", rule, got)))
    };
    let capsule = reader.cast::<PyCapsule>().ok();
    let Some(address) = capsule.and_then(|capsule| capsule.pointer_checked(Some(NAME)).ok()) else {
        return refuse("be the capsule sokd_tch.reader".into(), reader.repr()?.to_string());
    };
    // SAFETY: by its name, the capsule holds the address of such a function.
    let read = unsafe { std::mem::transmute::<*mut c_void, Read>(address.as_ptr()) };
    let mut view = View::empty();
    // SAFETY: the GIL is held. None is not a tensor, so only the first field is written, which
    // every version of the view has.
    unsafe { read(reader.py().None().as_ptr(), &mut view) };
    if view.version != VERSION {
        let got = format!("version {}; install the sokd-tch of this sokd", view.version);
        return refuse(format!("fill version {VERSION} of the view"), got);
    }
    let _ = READ.set(read);
    Ok(())
}

/// `None` leaves the object to the portable reader, which reads it or raises the error: not a
/// tensor, not strided, on a device without kernels, or of a dtype that sokd does not read.
pub(crate) fn read(object: &Bound<'_, PyAny>) -> Option<TensorView> {
    let (read, mut view) = (READ.get()?, View::empty());
    // SAFETY: the GIL and the object are held; the version of the view was checked.
    if unsafe { read(object.as_ptr(), &mut view) } != 0 {
        return None;
    }
    let device = usize::try_from(view.device).map_or(Device::Cpu, Device::Cuda);
    let rank = view.rank as usize;
    let sizes = view.sizes.map(|size| size as usize);
    let strides = view.strides.map(|stride| stride as isize);
    let address = view.data as usize;
    build(
        "read",
        "object",
        address,
        from_code(view.dtype)?,
        device,
        &sizes[..rank],
        &strides[..rank],
    )
    .ok()
}

impl View {
    fn empty() -> Self {
        let numbers = [0; MAX_RANK];
        let data = std::ptr::null_mut();
        Self { version: 0, dtype: -1, device: -1, rank: 0, data, sizes: numbers, strides: numbers }
    }
}

fn from_code(code: c_int) -> Option<DType> {
    Some(match code {
        0 => DType::U8,
        1 => DType::I8,
        2 => DType::I16,
        3 => DType::I32,
        4 => DType::I64,
        5 => DType::F16,
        6 => DType::F32,
        7 => DType::F64,
        11 => DType::Bool,
        15 => DType::BF16,
        _ => return None,
    })
}
