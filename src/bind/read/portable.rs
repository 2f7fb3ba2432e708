//! Reads a tensor of any torch release by its Python attributes.

use super::{build, from_name, raise, unknown_dtype};
use crate::tensor::{DType, Device, Error, TensorView};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyTuple};

/// Objects of torch that are recognised by identity.
struct Torch {
    strided: Py<PyAny>,
    dtypes: Vec<(Py<PyAny>, DType)>,
}

const NAMES: [&str; 10] = [
    "float32", "float16", "bfloat16", "float64", "int64", "bool", "int32", "int16", "int8", "uint8",
];

impl Torch {
    fn get(py: Python<'_>) -> PyResult<&Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let dtypes = NAMES.iter().filter_map(|name| Some((*name, from_name(name)?)));
            let dtypes = dtypes.map(|(name, dtype)| Ok((torch.getattr(name)?.unbind(), dtype)));
            Ok(Self {
                strided: torch.getattr("strided")?.unbind(),
                dtypes: dtypes.collect::<PyResult<_>>()?,
            })
        })
    }
}

/// `None` when the object is no torch tensor.
pub(crate) fn read(
    op: &'static str, argument: &str, object: &Bound<'_, PyAny>,
) -> PyResult<Option<TensorView>> {
    let py = object.py();
    let Some(data_ptr) = object.getattr_opt(intern!(py, "data_ptr"))? else { return Ok(None) };
    let torch = Torch::get(py)?;
    let not_strided = |found: &str| Error::of_type(op, argument, "be a strided tensor", found);
    let layout = object.getattr(intern!(py, "layout"))?;
    if !layout.is(&torch.strided) {
        return Err(raise(not_strided(&layout.str()?.to_string_lossy())));
    }
    let dtype = object.getattr(intern!(py, "dtype"))?;
    let Some((_, dtype)) = torch.dtypes.iter().find(|(known, _)| dtype.is(known)) else {
        return Err(unknown_dtype(op, argument, dtype));
    };
    let device = device(&object.getattr(intern!(py, "device"))?)?;
    let (sizes, strides) = match sizes_and_strides(object) {
        Ok(read) => read,
        Err(_) if object.getattr(intern!(py, "is_nested"))?.is_truthy()? => {
            return Err(raise(not_strided("a nested tensor")));
        }
        Err(error) => return Err(error),
    };
    let address = match device {
        Device::Other(_) => 0,
        _ => data_ptr.call0()?.extract()?,
    };
    build(op, argument, address, *dtype, device, &sizes, &strides).map(Some)
}

fn sizes_and_strides(tensor: &Bound<'_, PyAny>) -> PyResult<(Vec<usize>, Vec<isize>)> {
    let py = tensor.py();
    let sizes = tensor.getattr(intern!(py, "shape"))?.cast_into::<PyTuple>()?;
    let strides = tensor.call_method0(intern!(py, "stride"))?.cast_into::<PyTuple>()?;
    let sizes = sizes.iter().map(|size| size.extract());
    let strides = strides.iter().map(|stride| stride.extract());
    Ok((sizes.collect::<PyResult<_>>()?, strides.collect::<PyResult<_>>()?))
}

fn device(device: &Bound<'_, PyAny>) -> PyResult<Device> {
    let py = device.py();
    let kind = device.getattr(intern!(py, "type"))?.cast_into::<PyString>()?;
    Ok(match &*kind.to_string_lossy() {
        "cpu" => Device::Cpu,
        "cuda" => Device::Cuda(device.getattr(intern!(py, "index"))?.extract()?),
        _ => Device::Other(device.str()?.to_string()),
    })
}
