//! The reader for the torch that this build is proven on: straight from the C++ tensor, by tch.

use super::{build, require_strided, unknown_dtype};
use crate::tensor::{DType, Device, TensorView};
use pyo3::prelude::*;
use pyo3_tch::tch::{Device as TchDevice, Kind};
use pyo3_tch::PyTensor;

/// `None` when the object is no torch tensor.
pub fn read(
    op: &'static str,
    argument: &str,
    object: &Bound<'_, PyAny>,
) -> PyResult<Option<TensorView>> {
    let Ok(tensor) = object.extract::<PyTensor>() else { return Ok(None) };
    require_strided(op, argument, object)?;
    let Some(dtype) = tensor.f_kind().ok().and_then(from_kind) else {
        return Err(unknown_dtype(op, argument, object.getattr("dtype")?));
    };
    let device = match tensor.device() {
        TchDevice::Cpu => Device::Cpu,
        TchDevice::Cuda(ordinal) => Device::Cuda(ordinal),
        // tch calls every other device mps.
        _ => Device::Other(object.getattr("device")?.str()?.to_string()),
    };
    let address = if matches!(device, Device::Other(_)) { 0 } else { tensor.data_ptr() as usize };
    let sizes: Vec<usize> = tensor.size().into_iter().map(|s| s as usize).collect();
    let strides: Vec<isize> = tensor.stride().into_iter().map(|s| s as isize).collect();
    build(op, argument, address, dtype, device, &sizes, &strides).map(Some)
}

fn from_kind(kind: Kind) -> Option<DType> {
    Some(match kind {
        Kind::Double => DType::F64,
        Kind::Float => DType::F32,
        Kind::Half => DType::F16,
        Kind::BFloat16 => DType::BF16,
        Kind::Int64 => DType::I64,
        Kind::Int => DType::I32,
        Kind::Int16 => DType::I16,
        Kind::Int8 => DType::I8,
        Kind::Uint8 => DType::U8,
        Kind::Bool => DType::Bool,
        _ => return None,
    })
}
