//! The functions of `_core`: read the arguments, release the GIL, call the operator, raise errors.
//!
//! Every output is allocated by the caller. The resources of a call are torch's thread count, and
//! for CUDA torch's stream and allocator of the device.

use crate::bind::read::{self, raise};
use crate::ops::{self, areas, masked_mse, refine};
use crate::random::Seed;
use crate::tensor::{Error, Result as Checked, Run, TensorView};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::{Mutex, OnceLock, PoisonError};

mod cuda;

type Object<'a, 'py> = &'a Bound<'py, PyAny>;
type Maybe<'py> = Option<Bound<'py, PyAny>>;
/// threads, stream, allocate.
type Resources<'py> = (usize, usize, Maybe<'py>);
/// theta, hole, sigma, perm, keep, seed tensor, seed.
type RawPlan<'py> = (Maybe<'py>, Maybe<'py>, Maybe<'py>, Maybe<'py>, Maybe<'py>, Maybe<'py>, i64);

fn optional(op: &'static str, argument: &str, object: &Maybe) -> PyResult<Option<TensorView>> {
    object.as_ref().map(|object| read::view(op, argument, object)).transpose()
}

fn read_all<const N: usize>(
    op: &'static str, named: [(&str, Object); N],
) -> PyResult<[TensorView; N]> {
    let mut views = [const { None }; N];
    for (view, (name, object)) in views.iter_mut().zip(named) {
        *view = Some(read::view(op, name, object)?);
    }
    Ok(views.map(|view| view.expect("the loop fills every entry")))
}

/// Runs an operator without the GIL. The Python caller keeps the arguments alive. Scratch memory
/// lives until the return; torch's allocator then reuses it for later work of the same stream only.
fn released<F>(py: Python<'_>, (threads, stream, allocate): Resources, work: F) -> PyResult<()>
where
    F: FnOnce(Run) -> Checked<()> + Send,
{
    let Some(allocate) = allocate.map(Bound::unbind) else {
        return py.detach(|| work(Run { threads, stream, allocate: None })).map_err(raise);
    };
    let (kept, failed) = (Mutex::new(Vec::new()), OnceLock::new());
    let scratch = |bytes: usize| {
        Python::attach(|py| {
            let memory = allocate.bind(py).call1((bytes,))?;
            let address = memory.call_method0("data_ptr")?.extract::<u64>()?;
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(memory.unbind());
            Ok(address)
        })
        .map_err(|error: PyErr| {
            // The allocator's own exception is raised, in place of this error.
            let _ = failed.set(error);
            Error::of_value("scratch", "allocate", "give memory", "an exception")
        })
    };
    let done = py.detach(|| work(Run { threads, stream, allocate: Some(&scratch) }));
    failed.into_inner().map_or(done.map_err(raise), Err)
}

fn read_plan(op: &'static str, plan: &RawPlan) -> PyResult<refine::Plan> {
    let (theta, hole, sigma, perm, keep, seed_tensor, seed) = plan;
    Ok(refine::Plan {
        theta: optional(op, "theta", theta)?,
        hole: optional(op, "hole", hole)?,
        sigma: optional(op, "sigma", sigma)?,
        perm: optional(op, "perm", perm)?,
        keep: optional(op, "keep", keep)?,
        seed: optional(op, "seed", seed_tensor)?.map_or(Seed::Value(*seed as u64), Seed::Tensor),
    })
}

#[pyfunction]
fn refine_forward(
    py: Python<'_>, refined: Object, features: Object, plan: RawPlan, resources: Resources,
) -> PyResult<()> {
    let op = "refine";
    let features = read::view(op, "features", features)?;
    let plan = read_plan(op, &plan)?;
    let refined = read::view(op, "refined", refined)?;
    released(py, resources, |run| {
        refine::Args { features: &features, plan: &plan }.forward(&refined, &run)
    })
}

/// `wanted`: d_features, d_theta, d_sigma, d_straight.
#[pyfunction]
fn refine_backward(
    py: Python<'_>, wanted: (Maybe, Maybe, Maybe, Maybe), upstream: Object, features: Object,
    plan: RawPlan, resources: Resources,
) -> PyResult<()> {
    let op = "refine";
    let features = read::view(op, "features", features)?;
    let plan = read_plan(op, &plan)?;
    let upstream = read::view(op, "upstream", upstream)?;
    let d_features = optional(op, "d_features", &wanted.0)?;
    let d_theta = optional(op, "d_theta", &wanted.1)?;
    let d_sigma = optional(op, "d_sigma", &wanted.2)?;
    let d_straight = optional(op, "d_straight", &wanted.3)?;
    let gradients = refine::Gradients {
        d_features: d_features.as_ref(),
        d_theta: d_theta.as_ref(),
        d_sigma: d_sigma.as_ref(),
        d_straight: d_straight.as_ref(),
    };
    released(py, resources, |run| {
        refine::Args { features: &features, plan: &plan }.backward(&gradients, &upstream, &run)
    })
}

#[pyfunction]
fn refine_dots(
    py: Python<'_>, dots: Object, features: Object, upstream: Object, plans: RawPlan,
    resources: Resources,
) -> PyResult<()> {
    let op = "refine_dots";
    let features = read::view(op, "features", features)?;
    let plans = read_plan(op, &plans)?;
    let [dots, upstream] = read_all(op, [("dots", dots), ("upstream", upstream)])?;
    released(py, resources, |run| {
        refine::Args { features: &features, plan: &plans }.dots(&dots, &upstream, &run)
    })
}

#[pyfunction]
#[pyo3(signature = (features, plan, straight))]
fn check_refine(features: Object, plan: RawPlan, straight: Maybe) -> PyResult<()> {
    let op = "refine";
    let features = read::view(op, "features", features)?;
    let plan = read_plan(op, &plan)?;
    let straight = optional(op, "straight", &straight)?;
    let args = refine::Args { features: &features, plan: &plan };
    args.check().map_err(raise)?;
    straight.map_or(Ok(()), |straight| args.check_straight(&straight)).map_err(raise)
}

#[pyfunction]
fn check_refine_dots(features: Object, upstream: Object, plans: RawPlan) -> PyResult<()> {
    let op = "refine_dots";
    let features = read::view(op, "features", features)?;
    let plans = read_plan(op, &plans)?;
    let upstream = read::view(op, "upstream", upstream)?;
    let args = refine::Args { features: &features, plan: &plans };
    args.check_dots(&upstream).map(|_| ()).map_err(raise)
}

type Triple<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);

fn read_teacher(op: &'static str, teacher: Option<Triple>) -> PyResult<Option<[TensorView; 3]>> {
    let Some((heat, size, offset)) = teacher else { return Ok(None) };
    let named = [("teacher heat", &heat), ("teacher size", &size), ("teacher offset", &offset)];
    read_all(op, named).map(Some)
}

#[pyfunction]
#[pyo3(name = "areas")]
#[allow(clippy::too_many_arguments)]
fn areas_forward(
    py: Python<'_>, coverage: Object, boxes: Object, scores: Object, heat: Object, size: Object,
    offset: Object, teacher: Option<Triple>, k: i64, kernel: i64, resources: Resources,
) -> PyResult<()> {
    let op = "areas";
    let named = [("coverage", coverage), ("boxes", boxes), ("scores", scores)];
    let [coverage, boxes, scores] = read_all(op, named)?;
    let [heat, size, offset] = read_all(op, [("heat", heat), ("size", size), ("offset", offset)])?;
    let teacher = read_teacher(op, teacher)?;
    released(py, resources, |run| {
        areas::Args {
            heat: &heat,
            size: &size,
            offset: &offset,
            teacher: teacher.as_ref().map(|t| t.each_ref()),
            k,
            kernel,
        }
        .forward(&areas::Outputs { coverage: &coverage, boxes: &boxes, scores: &scores }, &run)
    })
}

#[pyfunction]
#[pyo3(signature = (heat, size, offset, teacher, k, kernel))]
fn check_areas(
    heat: Object, size: Object, offset: Object, teacher: Option<Triple>, k: i64, kernel: i64,
) -> PyResult<()> {
    let op = "areas";
    let [heat, size, offset] = read_all(op, [("heat", heat), ("size", size), ("offset", offset)])?;
    let teacher = read_teacher(op, teacher)?;
    let teacher = teacher.as_ref().map(|t| t.each_ref());
    areas::Args { heat: &heat, size: &size, offset: &offset, teacher, k, kernel }
        .check()
        .map_err(raise)
}

#[pyfunction]
#[pyo3(name = "masked_mse")]
#[pyo3(signature = (loss, d_student, student, teacher, weight, normalise, scale, resources))]
#[allow(clippy::too_many_arguments)]
fn masked_mse_forward(
    py: Python<'_>, loss: Object, d_student: Maybe, student: Object, teacher: Object,
    weight: Maybe, normalise: &str, scale: f64, resources: Resources,
) -> PyResult<()> {
    let op = "masked_mse";
    let [loss, student, teacher] =
        read_all(op, [("loss", loss), ("student", student), ("teacher", teacher)])?;
    let (d_student, weight) =
        (optional(op, "d_student", &d_student)?, optional(op, "weight", &weight)?);
    released(py, resources, |run| {
        masked_mse::Args {
            student: &student,
            teacher: &teacher,
            weight: weight.as_ref(),
            normalise,
            scale,
        }
        .forward(&loss, d_student.as_ref(), &run)
    })
}

#[pyfunction]
#[pyo3(signature = (student, teacher, weight, normalise))]
fn check_masked_mse(
    student: Object, teacher: Object, weight: Maybe, normalise: &str,
) -> PyResult<()> {
    let op = "masked_mse";
    let [student, teacher] = read_all(op, [("student", student), ("teacher", teacher)])?;
    let weight = optional(op, "weight", &weight)?;
    let weight = weight.as_ref();
    masked_mse::Args { student: &student, teacher: &teacher, weight, normalise, scale: 1.0 }
        .check()
        .map_err(raise)
}

/// Uniforms f32 [n] and a noise seed int64 [1] from a policy's seed and counter.
#[pyfunction]
fn draw(
    py: Python, uniforms: Object, noise_seed: Object, seed: Object, counter: Object,
    resources: Resources,
) -> PyResult<()> {
    let op = "draw";
    let [uniforms, noise_seed, seed, counter] = read_all(
        op,
        [("uniforms", uniforms), ("noise_seed", noise_seed), ("seed", seed), ("counter", counter)],
    )?;
    let [seed, counter] = [seed, counter].map(Seed::Tensor);
    let args = ops::draw::Args { seed: &seed, counter: &counter };
    released(py, resources, |run| args.forward(&uniforms, &noise_seed, &run))
}

/// Selects the reader: "portable"; "dlpack" from torch 2.10 on; "tch" after `use_tch_reader`.
#[pyfunction]
fn select_reader(py: Python<'_>, name: &str) -> PyResult<()> {
    read::select(py, name)
}

/// Takes the reader of libtorch's tensors from `sokd_tch.reader`, and selects it.
#[pyfunction]
fn use_tch_reader(reader: Object) -> PyResult<()> {
    read::use_tch(reader)
}

/// The version, the selected reader, the SIMD level, and whether CUDA kernels are included.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("reader", read::selected())?;
    info.set_item("simd", crate::simd::level().name())?;
    info.set_item("cuda", cfg!(feature = "cuda"))?;
    Ok(info)
}

/// The extension module.
#[pymodule(gil_used = true)] // free-threaded CPython has never run it
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    crate::parallel::remember_process();
    macro_rules! add {
        ($($function:path),*) => {
            $(module.add_function(wrap_pyfunction!($function, module)?)?;)*
        };
    }
    add!(refine_forward, refine_backward, refine_dots, areas_forward, masked_mse_forward, draw);
    add!(check_refine, check_refine_dots, check_areas, check_masked_mse, cuda::masked_mse_scale);
    add!(cuda::cuda_open, cuda::cuda_info, cuda::cuda_warmup, cuda::cuda_why_not);
    add!(select_reader, use_tch_reader, build_info);
    Ok(())
}
