//! CUDA from the host's side: [`driver`] and [`nvrtc`] are libraries found at run time, [`cache`]
//! keeps what was compiled, [`args`] mirrors the structures of the kernels, [`launch`] puts kernels
//! on torch's streams.
//!
//! Nothing here synchronises, allocates device memory or unloads a module (which a graph capture
//! would forbid). Without a driver or NVRTC, [`open`] returns the reason, and the Python package
//! uses its reference path.

pub(crate) mod args;
pub(crate) mod cache;
mod driver;
pub(crate) mod launch;
mod nvrtc;

use crate::parallel;
use crate::tensor::{CudaFailure as Failure, DType, Error, Result as Checked, Run};
use args::Order;
use driver::Driver;
use launch::{Kernel, Modules, Variant};
use libloading::Library;
use nvrtc::Nvrtc;
use std::error::Error as _;
use std::sync::{Mutex, OnceLock, PoisonError};

/// The functions of a library as a structure of pointers. Every one is looked up when the library
/// is opened, so that a missing one is an error there and not a crash later.
macro_rules! bindings {
    (@returns) => { std::ffi::c_int };
    (@returns $type:ty) => { $type };
    ($api:ident, $library:literal {
        $($field:ident = $symbol:literal(
            $($argument:ident: $type:ty),* $(,)?
        ) $(-> $returned:ty)?),* $(,)?
    }) => {
        struct $api {
            $($field: unsafe extern "C" fn(
                $($argument: $type),*
            ) -> bindings!(@returns $($returned)?)),*
        }

        impl $api {
            fn open(names: impl Iterator<Item = String>) -> Result<Self> {
                let library = super::first_library($library, names)?;
                Ok(Self {
                    // SAFETY: the signature is that of the library's header.
                    $($field: unsafe { super::symbol(library, $library, $symbol) }?),*
                })
            }
        }
    };
}
use bindings;

/// The first of these that opens. It stays open, because pointers into it stay in use.
fn first_library(
    library: &'static str, names: impl Iterator<Item = String>,
) -> Result<&'static Library, Failure> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: NVIDIA's libraries may be loaded at any time; torch does the same.
        match unsafe { Library::new(&name) } {
            Ok(found) => return Ok(Box::leak(Box::new(found))),
            Err(error) => {
                reasons.push(error.source().map_or_else(|| error.to_string(), ToString::to_string))
            }
        }
    }
    // The first name is the one that should be there.
    let reason = reasons.into_iter().next().unwrap_or_else(|| "no name to look for".to_owned());
    Err(Failure::NoLibrary { library, reason })
}

/// # Safety
/// `T` is a function pointer with the symbol's signature.
unsafe fn symbol<T: Copy>(
    from: &'static Library, library: &'static str, symbol: &'static str,
) -> Result<T, Failure> {
    // SAFETY: the caller's promise.
    let found = unsafe { from.get::<T>(symbol) };
    found.map(|found| *found).map_err(|_| Failure::NoSymbol { library, symbol })
}

/// The libraries, and what is loaded on each device.
pub(crate) struct Cuda {
    driver: Driver,
    nvrtc: Nvrtc,
    modules: Modules,
    /// Releases cached memory of torch.
    release: fn(),
}

static CUDA: OnceLock<Cuda> = OnceLock::new();

/// Opens the driver and the first NVRTC of these names; initialises nothing, and only once.
///
/// `release` is called where the driver is out of memory for a kernel's code, before a second try.
pub(crate) fn open(nvrtc: &[String], release: fn()) -> Result<&'static Cuda, Failure> {
    if let Some(cuda) = CUDA.get() {
        return Ok(cuda);
    }
    let driver = Driver::open()?;
    let nvrtc = Nvrtc::open(nvrtc.iter().cloned())?;
    Ok(CUDA.get_or_init(|| Cuda { driver, nvrtc, modules: Modules::default(), release }))
}

/// What [`open`] opened.
fn opened() -> Result<&'static Cuda, Failure> {
    CUDA.get().ok_or(Failure::NotOpen)
}

/// Compiles and loads kernels for these dtypes and orders on one device, several at a time.
pub(crate) fn warmup(
    op: &'static str, ordinal: usize, kernels: &'static [&[&Kernel]], dtypes: &[DType],
    orders: &[Order], run: Run,
) -> Checked<()> {
    let kernels = kernels.iter().copied().flatten();
    let mut variants: Vec<Variant> =
        kernels.flat_map(|kernel| kernel.variants(dtypes, orders)).collect();
    // Variants of one translation unit share a lock, so the few that share one come last.
    variants.sort_by_key(Variant::shares_unit);
    let (stream, failed) = (Run { allocate: None, ..run }, Mutex::new(None));
    parallel::for_each(run.threads, variants.len(), |i| {
        let done = launch::on_device(op, ordinal, &stream, |queue| queue.prepare(&variants[i]));
        if let Err(error) = done {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Why no kernel can run on this device: too old for the kernels or for the compiler.
pub(crate) fn why_not(op: &'static str, ordinal: usize) -> Checked<Option<String>> {
    let why = |failure: Failure| match failure {
        Failure::OldDevice { .. } | Failure::UnknownArch { .. } => Ok(Some(failure.to_string())),
        failure => Err(Error::Cuda { op, failure }),
    };
    opened().and_then(|cuda| cuda.device(ordinal)).map_or_else(why, |_| Ok(None))
}

/// Versions and counts for `sokd.show_config()`.
#[derive(Clone, Debug)]
pub(crate) struct Info {
    /// The newest CUDA version of the driver.
    pub driver: (i32, i32),
    /// The compiler's version.
    pub nvrtc: (i32, i32),
    /// Translation units compiled in this process.
    pub compiled: usize,
    /// Translation units that came from the disk instead.
    pub cached: usize,
}

pub(crate) fn info(op: &'static str) -> Checked<Info> {
    let info = || {
        let cuda = opened()?;
        let (compiled, cached) = cuda.modules.counts();
        Ok(Info { driver: cuda.driver.version()?, nvrtc: cuda.nvrtc.version(), compiled, cached })
    };
    info().map_err(|failure| Error::Cuda { op, failure })
}
