//! The only file that speaks to Python: read the arguments, release the GIL, call the operator, map the error.
//!
//! Every output is allocated by the caller. `threads` is torch's thread count; `stream` and `allocate` are torch's stream and
//! allocator of the device, for CUDA.

use crate::bind::read::{self, raise};
use crate::ops::{areas, draw, masked_mse, refine};
use crate::random::Seed;
use crate::tensor::Check;
use crate::tensor::Run;
use crate::tensor::TensorView;
use crate::tensor::{Error, Result as Checked};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::{Mutex, OnceLock, PoisonError};

mod cuda;

type Object<'a, 'py> = &'a Bound<'py, PyAny>;
type Maybe<'py> = Option<Bound<'py, PyAny>>;

fn optional(op: &'static str, argument: &str, object: &Maybe) -> PyResult<Option<TensorView>> {
    object.as_ref().map(|object| read::view(op, argument, object)).transpose()
}

/// threads, stream, allocate.
type Resources<'py> = (usize, usize, Maybe<'py>);

/// Runs an operator without the GIL. The arguments stay alive: Python's caller holds them; scratch memory lives until the return,
/// and torch's allocator gives it to nobody but later work of the same stream.
fn released<F>(py: Python<'_>, (threads, stream, allocate): Resources, work: F) -> PyResult<()>
where
    F: FnOnce(Run) -> Checked<()> + Send,
{
    let Some(allocate) = allocate.map(Bound::unbind) else {
        return py.allow_threads(|| work(Run { threads, stream, allocate: None })).map_err(raise);
    };
    let (kept, failed) = (Mutex::new(Vec::new()), OnceLock::new());
    let scratch = |bytes: usize| {
        Python::with_gil(|py| {
            let memory = allocate.bind(py).call1((bytes,))?;
            let address = memory.call_method0("data_ptr")?.extract::<u64>()?;
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(memory.unbind());
            Ok(address)
        })
        .map_err(|error: PyErr| {
            // The caller of Python's allocator wants its own exception back, not our words for it.
            let _ = failed.set(error);
            Error::of_value("scratch", "allocate", "give memory", "an exception")
        })
    };
    let done = py.allow_threads(|| work(Run { threads, stream, allocate: Some(&scratch) }));
    failed.into_inner().map_or(done.map_err(raise), Err)
}

/// The five parts of a plan, owned for the length of a call.
type Parts = [Option<TensorView>; 5];

fn read_parts(op: &'static str, parts: [(&str, &Maybe); 5]) -> PyResult<Parts> {
    let mut views = [const { None }; 5];
    for (view, (name, object)) in views.iter_mut().zip(parts) {
        *view = optional(op, name, object)?;
    }
    Ok(views)
}

fn plan_of([theta, hole, sigma, perm, keep]: Parts, seed: Seed) -> refine::Plan {
    refine::Plan { theta, hole, sigma, perm, keep, seed }
}

/// A seed is an int, or an int64 tensor [1]. A tensor is never read as an int: one of CUDA, asked for its value, would wait for it.
fn read_seed(op: &'static str, name: &str, seed: Object) -> PyResult<Seed> {
    if !seed.hasattr(intern!(seed.py(), "data_ptr"))? {
        let bits = seed.extract::<i64>().map(|value| value as u64).or_else(|_| seed.extract());
        if let Ok(bits) = bits {
            return Ok(Seed::Value(bits));
        }
    }
    let seed = Seed::Tensor(read::view(op, name, seed)?);
    seed.check(Check(op), name).map_err(raise)?;
    Ok(seed)
}

#[pyfunction]
#[pyo3(signature = (refined, features, theta, hole, sigma, perm, keep, seed, threads, stream=0, allocate=None))]
#[allow(clippy::too_many_arguments)]
fn refine_forward(
    py: Python<'_>,
    refined: Object,
    features: Object,
    theta: Maybe,
    hole: Maybe,
    sigma: Maybe,
    perm: Maybe,
    keep: Maybe,
    seed: Object,
    threads: usize,
    stream: usize,
    allocate: Maybe,
) -> PyResult<()> {
    let op = "refine";
    let parts =
        [("theta", &theta), ("hole", &hole), ("sigma", &sigma), ("perm", &perm), ("keep", &keep)];
    let (features, parts) = (read::view(op, "features", features)?, read_parts(op, parts)?);
    let (refined, seed) = (read::view(op, "refined", refined)?, read_seed(op, "seed", seed)?);
    let plan = plan_of(parts, seed);
    released(py, (threads, stream, allocate), |run| {
        refine::Args { features: &features, plan: &plan }.forward(&refined, &run)
    })
}

#[pyfunction]
#[pyo3(signature = (d_features, d_theta, d_sigma, d_straight, upstream, features, theta, hole, sigma, perm, keep, seed, threads, stream=0, allocate=None))]
#[allow(clippy::too_many_arguments)]
fn refine_backward(
    py: Python<'_>,
    d_features: Maybe,
    d_theta: Maybe,
    d_sigma: Maybe,
    d_straight: Maybe,
    upstream: Object,
    features: Object,
    theta: Maybe,
    hole: Maybe,
    sigma: Maybe,
    perm: Maybe,
    keep: Maybe,
    seed: Object,
    threads: usize,
    stream: usize,
    allocate: Maybe,
) -> PyResult<()> {
    let op = "refine";
    let parts =
        [("theta", &theta), ("hole", &hole), ("sigma", &sigma), ("perm", &perm), ("keep", &keep)];
    let (features, parts) = (read::view(op, "features", features)?, read_parts(op, parts)?);
    let (upstream, seed) = (read::view(op, "upstream", upstream)?, read_seed(op, "seed", seed)?);
    let d_features = optional(op, "d_features", &d_features)?;
    let d_theta = optional(op, "d_theta", &d_theta)?;
    let d_sigma = optional(op, "d_sigma", &d_sigma)?;
    let d_straight = optional(op, "d_straight", &d_straight)?;
    let gradients = refine::Gradients {
        d_features: d_features.as_ref(),
        d_theta: d_theta.as_ref(),
        d_sigma: d_sigma.as_ref(),
        d_straight: d_straight.as_ref(),
    };
    let plan = plan_of(parts, seed);
    released(py, (threads, stream, allocate), |run| {
        refine::Args { features: &features, plan: &plan }.backward(&gradients, &upstream, &run)
    })
}

#[pyfunction]
#[pyo3(signature = (dots, features, upstream, theta, hole, sigma, perm, keep, seed, threads, stream=0, allocate=None))]
#[allow(clippy::too_many_arguments)]
fn refine_dots(
    py: Python<'_>,
    dots: Object,
    features: Object,
    upstream: Object,
    theta: Maybe,
    hole: Maybe,
    sigma: Maybe,
    perm: Maybe,
    keep: Maybe,
    seed: Object,
    threads: usize,
    stream: usize,
    allocate: Maybe,
) -> PyResult<()> {
    let op = "refine_dots";
    let parts =
        [("theta", &theta), ("hole", &hole), ("sigma", &sigma), ("perm", &perm), ("keep", &keep)];
    let (features, parts) = (read::view(op, "features", features)?, read_parts(op, parts)?);
    let (dots, upstream) = (read::view(op, "dots", dots)?, read::view(op, "upstream", upstream)?);
    let seed = read_seed(op, "seed", seed)?;
    let plan = plan_of(parts, seed);
    released(py, (threads, stream, allocate), |run| {
        refine::Args { features: &features, plan: &plan }.dots(&dots, &upstream, &run)
    })
}

#[pyfunction]
#[pyo3(signature = (features, theta, hole, sigma, perm, keep, straight, seed))]
#[allow(clippy::too_many_arguments)]
fn check_refine(
    features: Object,
    theta: Maybe,
    hole: Maybe,
    sigma: Maybe,
    perm: Maybe,
    keep: Maybe,
    straight: Maybe,
    seed: Object,
) -> PyResult<()> {
    let op = "refine";
    let parts =
        [("theta", &theta), ("hole", &hole), ("sigma", &sigma), ("perm", &perm), ("keep", &keep)];
    let (features, parts) = (read::view(op, "features", features)?, read_parts(op, parts)?);
    let straight = optional(op, "straight", &straight)?;
    let plan = plan_of(parts, read_seed(op, "seed", seed)?);
    let args = refine::Args { features: &features, plan: &plan };
    args.check().map_err(raise)?;
    straight.map_or(Ok(()), |straight| args.check_straight(&straight)).map_err(raise)
}

#[pyfunction]
#[pyo3(signature = (features, upstream, theta, hole, sigma, perm, keep, seed))]
#[allow(clippy::too_many_arguments)]
fn check_refine_dots(
    features: Object,
    upstream: Maybe,
    theta: Maybe,
    hole: Maybe,
    sigma: Maybe,
    perm: Maybe,
    keep: Maybe,
    seed: Object,
) -> PyResult<()> {
    let op = "refine_dots";
    let parts =
        [("theta", &theta), ("hole", &hole), ("sigma", &sigma), ("perm", &perm), ("keep", &keep)];
    let (features, parts) = (read::view(op, "features", features)?, read_parts(op, parts)?);
    let upstream = optional(op, "upstream", &upstream)?;
    let plan = plan_of(parts, read_seed(op, "seed", seed)?);
    let args = refine::Args { features: &features, plan: &plan };
    args.check_dots(upstream.as_ref()).map(|_| ()).map_err(raise)
}

type Triple<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);

fn read_teacher(op: &'static str, teacher: Option<Triple>) -> PyResult<Option<[TensorView; 3]>> {
    let Some((heat, size, offset)) = teacher else { return Ok(None) };
    let read = |name, object| read::view(op, name, object);
    Ok(Some([
        read("teacher heat", &heat)?,
        read("teacher size", &size)?,
        read("teacher offset", &offset)?,
    ]))
}

#[pyfunction]
#[pyo3(name = "areas", signature = (coverage, boxes, scores, heat, size, offset, teacher, k, kernel, threads, stream=0, allocate=None))]
#[allow(clippy::too_many_arguments)]
fn areas_forward(
    py: Python<'_>,
    coverage: Object,
    boxes: Object,
    scores: Object,
    heat: Object,
    size: Object,
    offset: Object,
    teacher: Option<Triple>,
    k: i64,
    kernel: i64,
    threads: usize,
    stream: usize,
    allocate: Maybe,
) -> PyResult<()> {
    let op = "areas";
    let named = [("coverage", coverage), ("boxes", boxes), ("scores", scores)];
    let [coverage, boxes, scores] = read_all(op, named)?;
    let [heat, size, offset] = read_all(op, [("heat", heat), ("size", size), ("offset", offset)])?;
    let teacher = read_teacher(op, teacher)?;
    released(py, (threads, stream, allocate), |run| {
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

fn read_all(op: &'static str, named: [(&str, Object); 3]) -> PyResult<[TensorView; 3]> {
    let [a, b, c] = named.map(|(name, object)| read::view(op, name, object));
    Ok([a?, b?, c?])
}

#[pyfunction]
#[pyo3(signature = (heat, size, offset, teacher, k, kernel))]
fn check_areas(
    heat: Object,
    size: Object,
    offset: Object,
    teacher: Option<Triple>,
    k: i64,
    kernel: i64,
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
#[pyo3(name = "masked_mse", signature = (loss, d_student, student, teacher, weight, normalise, scale, threads, stream=0, allocate=None))]
#[allow(clippy::too_many_arguments)]
fn masked_mse_forward(
    py: Python<'_>,
    loss: Object,
    d_student: Maybe,
    student: Object,
    teacher: Object,
    weight: Maybe,
    normalise: &str,
    scale: f64,
    threads: usize,
    stream: usize,
    allocate: Maybe,
) -> PyResult<()> {
    let op = "masked_mse";
    let [loss, student, teacher] =
        read_all(op, [("loss", loss), ("student", student), ("teacher", teacher)])?;
    let (d_student, weight) =
        (optional(op, "d_student", &d_student)?, optional(op, "weight", &weight)?);
    released(py, (threads, stream, allocate), |run| {
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
    student: Object,
    teacher: Object,
    weight: Maybe,
    normalise: &str,
) -> PyResult<()> {
    let op = "masked_mse";
    let (student, teacher) =
        (read::view(op, "student", student)?, read::view(op, "teacher", teacher)?);
    let weight = optional(op, "weight", &weight)?;
    let weight = weight.as_ref();
    masked_mse::Args { student: &student, teacher: &teacher, weight, normalise, scale: 1.0 }
        .check()
        .map_err(raise)
}

/// Uniforms f32 [n] and the seed of the noise, int64 [1], from the seed and the counter of a policy.
#[pyfunction]
#[pyo3(name = "draw", signature = (uniforms, noise_seed, seed, counter, stream=0))]
fn draw_once(
    py: Python,
    uniforms: Object,
    noise_seed: Object,
    seed: Object,
    counter: Object,
    stream: usize,
) -> PyResult<()> {
    let op = "draw";
    let (uniforms, noise_seed) =
        (read::view(op, "uniforms", uniforms)?, read::view(op, "noise_seed", noise_seed)?);
    let (seed, counter) = (read_seed(op, "seed", seed)?, read_seed(op, "counter", counter)?);
    released(py, (1, stream, None), |run| {
        draw::Args { seed: &seed, counter: &counter }.forward(&uniforms, &noise_seed, &run)
    })
}

/// Chooses the reader for torch tensors.
#[pyfunction]
fn select_reader(name: &str) -> PyResult<()> {
    if read::select(name) {
        return Ok(());
    }
    let rule = if read::TCH_BUILT_FOR.is_some() {
        "be 'tch' or 'portable'"
    } else {
        "be 'portable' in this build"
    };
    Err(raise(crate::tensor::Error::of_value(
        "select_reader",
        "name",
        rule,
        format_args!("'{name}'"),
    )))
}

/// What this build has and uses.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("reader", read::selected())?;
    info.set_item("tch_built_for", read::TCH_BUILT_FOR)?;
    info.set_item("simd", crate::simd::level().name())?;
    info.set_item("cuda", cfg!(feature = "cuda"))?;
    Ok(info)
}

/// The extension module.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    crate::parallel::remember_process();
    module.add_function(wrap_pyfunction!(refine_forward, module)?)?;
    module.add_function(wrap_pyfunction!(refine_backward, module)?)?;
    module.add_function(wrap_pyfunction!(refine_dots, module)?)?;
    module.add_function(wrap_pyfunction!(areas_forward, module)?)?;
    module.add_function(wrap_pyfunction!(masked_mse_forward, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::masked_mse_scale, module)?)?;
    module.add_function(wrap_pyfunction!(draw_once, module)?)?;
    module.add_function(wrap_pyfunction!(check_refine, module)?)?;
    module.add_function(wrap_pyfunction!(check_refine_dots, module)?)?;
    module.add_function(wrap_pyfunction!(check_areas, module)?)?;
    module.add_function(wrap_pyfunction!(check_masked_mse, module)?)?;
    module.add_function(wrap_pyfunction!(select_reader, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_open, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_info, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_warmup, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_why_not, module)?)?;
    module.add_function(wrap_pyfunction!(build_info, module)?)
}
