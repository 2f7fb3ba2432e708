//! A kernel from its name to a stream: compiled or read from disk, loaded once a device, launched.

use super::args::{code, Order};
use super::driver::{is_bad_image, is_out_of_memory, Handle};
use super::nvrtc::{Program, Target};
use super::{cache, opened, Cuda};
use crate::tensor::{CudaFailure as Failure, DType, Error, Result as Checked, Run};
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

type Result<T> = std::result::Result<T, Failure>;

/// A file that kernels include, by its name there, and its text.
type Header = (&'static str, &'static str);
/// The headers of all kernels.
pub(crate) const HEADERS: [Header; 3] = [
    ("common.cuh", include_str!("common.cuh")),
    ("philox.cuh", include_str!("philox.cuh")),
    ("sampling.cuh", include_str!("sampling.cuh")),
];
/// Fused multiply-adds are written out in the kernels, so the bits do not depend on the compiler.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "-default-device"];
/// The first capability with what the kernels use: `__grid_constant__`, shuffles with a mask.
const OLDEST: u32 = 70;
/// Threads a block, of every kernel.
const THREADS: u32 = 256;

/// A kernel.cu.
#[derive(Debug)]
pub(crate) struct Source {
    /// The operator's name.
    pub name: &'static str,
    pub text: &'static str,
    /// Its further files.
    pub parts: &'static [Header],
}

/// A kernel in all its variants.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub source: &'static Source,
    /// Its bit of SOKD_KERNELS; kernels that share one are compiled together.
    pub bit: u32,
    pub name: &'static str,
    /// Whether there is one for each dtype, and for each order.
    pub per: (bool, bool),
}

impl Kernel {
    pub(crate) const fn new(
        source: &'static Source, bit: u32, name: &'static str, per: (bool, bool),
    ) -> Self {
        Self { source, bit, name, per }
    }
}

/// A kernel for one dtype and one order, as far as it has variants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Variant {
    kernel: &'static Kernel,
    dtype: Option<DType>,
    order: Option<Order>,
}

impl Kernel {
    fn variant(&'static self, dtype: DType, order: Order) -> Variant {
        let (by_dtype, by_order) = self.per;
        Variant { kernel: self, dtype: by_dtype.then_some(dtype), order: by_order.then_some(order) }
    }

    /// Every variant for these dtypes and orders, each once.
    pub(crate) fn variants(&'static self, dtypes: &[DType], orders: &[Order]) -> Vec<Variant> {
        let mut variants: Vec<Variant> = Vec::new();
        for (dtype, order) in
            dtypes.iter().flat_map(|dtype| orders.iter().map(|order| (*dtype, *order)))
        {
            let variant = self.variant(dtype, order);
            if !variants.iter().any(|other| other.unit() == variant.unit()) {
                variants.push(variant);
            }
        }
        variants
    }
}

impl Variant {
    /// Kernels of one source and bit are compiled together.
    fn unit(&self) -> Unit {
        Unit {
            source: self.kernel.source.name,
            bit: self.kernel.bit,
            dtype: self.dtype,
            order: self.order,
        }
    }

    /// Whether its translation unit has other kernels too.
    pub(crate) fn shares_unit(&self) -> bool {
        self.dtype.is_none()
    }

    /// The name of its entry: `masked_mse_f32_planes`.
    fn symbol(&self) -> String {
        self.unit().named(self.kernel.name)
    }
}

/// A translation unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Unit {
    source: &'static str,
    bit: u32,
    dtype: Option<DType>,
    order: Option<Order>,
}

impl Unit {
    fn named(&self, name: &str) -> String {
        let dtype = match self.dtype {
            Some(DType::F64) => "_f64",
            Some(DType::F16) => "_f16",
            Some(DType::BF16) => "_bf16",
            Some(_) => "_f32",
            None => "",
        };
        let order = self.order.map_or("", |order| ["_planes", "_lanes"][order as usize]);
        format!("{name}{dtype}{order}")
    }

    /// The options that select this unit; a kernel without variants takes any dtype and order.
    fn options(&self) -> [String; 3] {
        let (dtype, order) =
            (self.dtype.unwrap_or(DType::F32), self.order.unwrap_or(Order::Planes));
        [
            format!("-DSOKD_DTYPES={}", 1 << code(dtype)),
            format!("-DSOKD_ORDERS={}", 1 << order as u32),
            format!("-DSOKD_KERNELS={}", self.bit),
        ]
    }
}

/// The module of one unit.
type Slot = Arc<Mutex<Option<Handle>>>;

/// Everything that is loaded, until the process ends: a graph capture forbids unloading.
#[derive(Default)]
pub(super) struct Modules {
    devices: Mutex<HashMap<usize, Device>>,
    /// Ready to launch.
    functions: RwLock<HashMap<(usize, &'static str, Unit), Handle>>,
    /// A lock for each: threads that need the same unit wait, others compile meanwhile.
    units: Mutex<HashMap<(usize, Unit), Slot>>,
    compiled: AtomicUsize,
    cached: AtomicUsize,
}

impl Modules {
    /// Units compiled, and units from the disk.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.compiled.load(Ordering::Relaxed), self.cached.load(Ordering::Relaxed))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Device {
    context: Handle,
    target: Target,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The contents are valid after every single operation.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A stream of a device, for the launches of one call.
pub(crate) struct Queue {
    op: &'static str,
    cuda: &'static Cuda,
    ordinal: usize,
    device: Device,
    stream: Handle,
}

/// Runs `work` with torch's current stream of this device, in the device's primary context.
pub(crate) fn on_device<T>(
    op: &'static str, ordinal: usize, run: &Run, work: impl FnOnce(&Queue) -> Checked<T>,
) -> Checked<T> {
    let failed = |failure| Error::Cuda { op, failure };
    let cuda = opened().map_err(failed)?;
    let device = cuda.device(ordinal).map_err(failed)?;
    let queue = Queue { op, cuda, ordinal, device, stream: Handle::at(run.stream) };
    // The errors of the context must not replace those of the work.
    cuda.driver.within(device.context, || Ok(work(&queue))).map_err(failed)?
}

impl Queue {
    /// Launches one kernel on the stream; a no-op for a grid without blocks.
    ///
    /// # Safety
    /// `args` is the argument structure of this kernel, filled as kernel.cu defines it, with memory
    /// of this device that torch keeps for this stream.
    pub(crate) unsafe fn launch<A: Copy>(
        &self, kernel: &'static Kernel, (dtype, order): (DType, Order), grid: [i64; 2], args: &A,
    ) -> Checked<()> {
        let failed = |failure| Error::Cuda { op: self.op, failure };
        if grid.contains(&0) {
            return Ok(());
        }
        let grid = self.sides(grid)?;
        let function = self.function(&kernel.variant(dtype, order)).map_err(failed)?;
        let mut args = *args;
        let argument = (&raw mut args).cast();
        // SAFETY: the caller's promise; the driver copies the structure.
        unsafe { self.cuda.driver.launch(function, (grid, THREADS), self.stream, argument) }
            .map_err(failed)
    }

    fn sides(&self, grid: [i64; 2]) -> Checked<[u32; 2]> {
        if (0..1 << 31).contains(&grid[0]) && (0..1 << 16).contains(&grid[1]) {
            return Ok(grid.map(|side| side as u32));
        }
        let (what, supported) = (
            format!("{} blocks on cuda:{}", grid[0], self.ordinal),
            "fewer than 2147483648".into(),
        );
        Err(Error::Unsupported { op: self.op, what, supported })
    }

    /// Compiles and loads one variant, without a launch.
    pub(crate) fn prepare(&self, variant: &Variant) -> Checked<()> {
        self.function(variant).map(|_| ()).map_err(|failure| Error::Cuda { op: self.op, failure })
    }

    fn function(&self, variant: &Variant) -> Result<Handle> {
        let functions = &self.cuda.modules.functions;
        let key = (self.ordinal, variant.kernel.name, variant.unit());
        if let Some(function) = functions.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(*function);
        }
        // A module loads a kernel on its first use: this holds for those of a loaded module, too.
        if self.cuda.driver.is_capturing(self.stream)? {
            let float64 = variant.dtype == Some(DType::F64);
            return Err(Failure::Capturing {
                kernel: variant.symbol(),
                ordinal: self.ordinal,
                float64,
            });
        }
        let function = match self.fetch(variant) {
            // torch caches freed memory; the driver may need some of it.
            Err(failure) if is_out_of_memory(&failure) => {
                (self.cuda.release)();
                self.fetch(variant)?
            }
            fetched => fetched?,
        };
        functions.write().unwrap_or_else(PoisonError::into_inner).insert(key, function);
        Ok(function)
    }

    fn fetch(&self, variant: &Variant) -> Result<Handle> {
        let symbol = CString::new(variant.symbol()).unwrap_or_default();
        self.cuda.driver.beside_captures(|| {
            let module = self.module(variant)?;
            self.cuda.driver.function(module, &symbol)
        })
    }

    fn module(&self, variant: &Variant) -> Result<Handle> {
        let unit = variant.unit();
        let slot =
            Arc::clone(locked(&self.cuda.modules.units).entry((self.ordinal, unit)).or_default());
        let mut slot = locked(&slot);
        if let Some(module) = *slot {
            return Ok(module);
        }
        let module = self.cuda.load(variant.kernel.source, unit, self.device.target)?;
        *slot = Some(module);
        Ok(module)
    }
}

impl Cuda {
    pub(super) fn device(&self, ordinal: usize) -> Result<Device> {
        let mut devices = locked(&self.modules.devices);
        if let Some(device) = devices.get(&ordinal) {
            return Ok(*device);
        }
        let count = self.driver.init()?;
        if ordinal >= count {
            return Err(Failure::NoDevice { ordinal, count });
        }
        let (context, capability) = self.driver.device(ordinal)?;
        if capability < OLDEST {
            return Err(Failure::OldDevice { ordinal, capability });
        }
        let device = Device { context, target: self.nvrtc.target(capability)? };
        devices.insert(ordinal, device);
        Ok(device)
    }

    /// A unit's module, in the current context: from the cache, else compiled and stored there.
    fn load(&self, source: &Source, unit: Unit, target: Target) -> Result<Handle> {
        let choice = unit.options();
        let options: Vec<&str> =
            OPTIONS.into_iter().chain(choice.iter().map(String::as_str)).collect();
        let name = format!("{}.cu", source.name);
        let headers: Vec<Header> = HEADERS.iter().chain(source.parts).copied().collect();
        let program =
            Program { name: &name, text: source.text, headers: &headers, options: &options };
        let folder = cache::folder();
        let key = self.key(unit, program, target);
        if let Some(image) = folder.as_ref().and_then(|folder| cache::load(folder, &key)) {
            match self.driver.load(&image) {
                // By an NVRTC newer than this driver, for example: compile, and replace the file.
                Err(failure) if is_bad_image(&failure) => {}
                loaded => {
                    self.modules.cached.fetch_add(usize::from(loaded.is_ok()), Ordering::Relaxed);
                    return loaded;
                }
            }
        }
        let image = self.nvrtc.compile(program, target)?;
        self.modules.compiled.fetch_add(1, Ordering::Relaxed);
        if let Some(folder) = folder {
            // Without the file the next process compiles again; this process has the image.
            let _ = cache::store(&folder, &key, &image);
        }
        self.driver.load(&image)
    }

    fn key(&self, unit: Unit, program: Program, target: Target) -> cache::Key {
        let label = format!("{}-{}-{}", unit.named(unit.source), unit.bit, target.name());
        let (major, minor) = self.nvrtc.version();
        let made_by =
            [env!("CARGO_PKG_VERSION").to_owned(), format!("{major}.{minor}"), target.name()];
        let headers = program.headers.iter().flat_map(|(name, text)| [*name, *text]);
        let parts = made_by.iter().map(String::as_str).chain(program.options.iter().copied());
        cache::Key::new(label, parts.chain([program.name, program.text]).chain(headers))
    }
}
