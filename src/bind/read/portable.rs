//! The reader for every other torch: the tensor's own Python attributes.

use super::{build, from_name, require_strided, unknown_dtype};
use crate::tensor::{Device, TensorView};
use pyo3::intern;
use pyo3::prelude::*;

/// `None` when the object is no torch tensor.
pub fn read(
    op: &'static str,
    argument: &str,
    object: &Bound<'_, PyAny>,
) -> PyResult<Option<TensorView>> {
    let py = object.py();
    if !object.hasattr(intern!(py, "data_ptr"))? {
        return Ok(None);
    }
    require_strided(op, argument, object)?;
    let dtype = object.getattr(intern!(py, "dtype"))?.str()?;
    let Some(dtype) = from_name(dtype.to_string_lossy().trim_start_matches("torch.")) else {
        return Err(unknown_dtype(op, argument, dtype));
    };
    let device = device(&object.getattr(intern!(py, "device"))?)?;
    let sizes: Vec<usize> = object.getattr(intern!(py, "shape"))?.extract()?;
    let strides: Vec<isize> = object.call_method0(intern!(py, "stride"))?.extract()?;
    let address = match device {
        Device::Other(_) => 0,
        _ => object.call_method0(intern!(py, "data_ptr"))?.extract()?,
    };
    build(op, argument, address, dtype, device, &sizes, &strides).map(Some)
}

fn device(device: &Bound<'_, PyAny>) -> PyResult<Device> {
    let py = device.py();
    let kind = device.getattr(intern!(py, "type"))?.str()?;
    Ok(match &*kind.to_string_lossy() {
        "cpu" => Device::Cpu,
        "cuda" => Device::Cuda(device.getattr(intern!(py, "index"))?.extract()?),
        _ => Device::Other(device.str()?.to_string()),
    })
}
