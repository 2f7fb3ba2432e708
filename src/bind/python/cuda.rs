//! `_core`'s functions for CUDA; without the feature `cuda` they raise NotImplementedError.

use super::{read_all, released, Object, Resources};
use crate::bind::read::raise;
use crate::ops::{self, masked_mse};
use crate::tensor::Error;
use pyo3::prelude::*;
use pyo3::types::PyDict;

#[cfg(feature = "cuda")]
use crate::{
    cuda::{self, args::Order, cache},
    tensor::{CudaFailure, Run},
};

#[cfg(feature = "cuda")]
fn failed(op: &'static str) -> impl Fn(CudaFailure) -> PyErr {
    move |failure| raise(Error::Cuda { op, failure })
}

#[cfg(not(feature = "cuda"))]
fn absent<T>(op: &'static str) -> PyResult<T> {
    Err(raise(Error::Unsupported {
        op,
        what: "no CUDA kernels in this build".into(),
        supported: "cpu".into(),
    }))
}

/// Opens the driver and the first NVRTC of these names or paths; raises what is missing.
#[pyfunction]
#[allow(unused_variables)]
pub(crate) fn cuda_open(nvrtc: Vec<String>) -> PyResult<()> {
    #[cfg(feature = "cuda")]
    return cuda::open(&nvrtc, empty_cache).map(|_| ()).map_err(failed("cuda_open"));
    #[cfg(not(feature = "cuda"))]
    absent("cuda_open")
}

/// `torch.cuda.empty_cache`. Its errors are ignored: the retried allocation reports the failure.
#[cfg(feature = "cuda")]
fn empty_cache() {
    let _ = Python::attach(|py| py.import("torch.cuda")?.call_method0("empty_cache").map(|_| ()));
}

/// The reason that no kernel can run on this device; None where kernels run.
#[pyfunction]
#[allow(unused_variables)]
pub(crate) fn cuda_why_not(py: Python<'_>, device: usize) -> PyResult<Option<String>> {
    #[cfg(feature = "cuda")]
    return py.detach(|| cuda::why_not("cuda_why_not", device)).map_err(raise);
    #[cfg(not(feature = "cuda"))]
    absent("cuda_why_not")
}

/// Versions, the cache folder, and the numbers of units compiled and loaded from the cache.
#[pyfunction]
pub(crate) fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    #[cfg(feature = "cuda")]
    {
        let (found, info) = (cuda::info("cuda_info").map_err(raise)?, PyDict::new(py));
        let version = |(major, minor): (i32, i32)| format!("{major}.{minor}");
        info.set_item("driver", version(found.driver))?;
        info.set_item("nvrtc", version(found.nvrtc))?;
        info.set_item("cache", cache::folder())?;
        info.set_item("compiled", found.compiled)?;
        info.set_item("cached", found.cached)?;
        Ok(info)
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = py;
        absent("cuda_info")
    }
}

/// Compiles and loads every kernel on a device, for dtypes and layouts that `sokd.warmup` checked.
#[pyfunction]
#[pyo3(signature = (device, dtypes, layouts, threads, stream=0))]
#[allow(unused_variables)]
pub(crate) fn cuda_warmup(
    py: Python<'_>, device: usize, dtypes: Vec<String>, layouts: Vec<String>, threads: usize,
    stream: usize,
) -> PyResult<()> {
    #[cfg(feature = "cuda")]
    {
        let dtypes: Vec<_> =
            dtypes.iter().filter_map(|name| crate::bind::read::from_name(name)).collect();
        let order =
            |name: &String| if name == "channels_last" { Order::Lanes } else { Order::Planes };
        let orders: Vec<_> = layouts.iter().map(order).collect();
        let run = Run { threads, stream, allocate: None };
        py.detach(|| cuda::warmup("warmup", device, &ops::KERNELS, &dtypes, &orders, run))
            .map_err(raise)
    }
    #[cfg(not(feature = "cuda"))]
    absent("warmup")
}

/// gradient *= upstream, in place, on a CUDA device.
#[pyfunction]
pub(crate) fn masked_mse_scale(
    py: Python, gradient: Object, upstream: Object, resources: Resources,
) -> PyResult<()> {
    let named = [("gradient", gradient), ("upstream", upstream)];
    let [gradient, upstream] = read_all("masked_mse", named)?;
    released(py, resources, |run| masked_mse::scale(&gradient, &upstream, &run))
}
