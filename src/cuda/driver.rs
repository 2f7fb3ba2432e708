//! The CUDA driver, opened at run time: sixteen functions of its stable C interface.
//!
//! Bound by hand rather than through cudarc, for three reasons. Its result codes are Rust enums, so
//! a code that a newer driver returns would be undefined behaviour, and here they are numbers. It
//! panics where a library or a symbol is missing; here that is a [`Failure`]. And it takes the
//! first NVRTC on the path, but it must be the one that torch uses.

use super::bindings;
use crate::tensor::CudaFailure as Failure;
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::ptr::null_mut;

/// A context, module, function or stream of the driver. Streams are torch's, and null is the
/// default one; the others are never released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Handle(*mut c_void);

// SAFETY: the driver takes its handles from every thread, and this crate does not dereference them.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    const NULL: Self = Self(null_mut());

    /// A handle from its address in torch.
    pub(crate) fn at(address: usize) -> Self {
        Self(address as *mut c_void)
    }
}

bindings! {
    Api, "CUDA driver" {
        init = "cuInit"(flags: c_uint),
        driver_version = "cuDriverGetVersion"(version: *mut c_int),
        error_name = "cuGetErrorName"(code: c_int, name: *mut *const c_char),
        error_string = "cuGetErrorString"(code: c_int, text: *mut *const c_char),
        device_count = "cuDeviceGetCount"(count: *mut c_int),
        device_get = "cuDeviceGet"(device: *mut c_int, ordinal: c_int),
        device_attribute = "cuDeviceGetAttribute"(
            value: *mut c_int, attribute: c_int, device: c_int
        ),
        primary_retain = "cuDevicePrimaryCtxRetain"(context: *mut Handle, device: c_int),
        context_get = "cuCtxGetCurrent"(context: *mut Handle),
        context_push = "cuCtxPushCurrent_v2"(context: Handle),
        context_pop = "cuCtxPopCurrent_v2"(context: *mut Handle),
        module_load = "cuModuleLoadData"(module: *mut Handle, image: *const c_void),
        module_function = "cuModuleGetFunction"(
            function: *mut Handle, module: Handle, name: *const c_char
        ),
        capture_mode = "cuThreadExchangeStreamCaptureMode"(mode: *mut c_int),
        is_capturing = "cuStreamIsCapturing"(stream: Handle, status: *mut c_int),
        launch = "cuLaunchKernel"(
            function: Handle,
            grid_x: c_uint, grid_y: c_uint, grid_z: c_uint,
            block_x: c_uint, block_y: c_uint, block_z: c_uint,
            shared: c_uint, stream: Handle, parameters: *mut *mut c_void, extra: *mut *mut c_void
        ),
    }
}

const NAMES: [&str; 3] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
// Of the driver's enums.
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;
const CAPTURE_MODE_RELAXED: c_int = 2;
const OUT_OF_MEMORY: c_int = 2;
/// The default stream cannot be used while a stream that synchronises with it is captured.
const STREAM_CAPTURE_IMPLICIT: c_int = 906;
/// Invalid image, no binary for this device, invalid PTX, PTX of a newer version.
const BAD_IMAGE: [c_int; 4] = [200, 209, 218, 222];

/// The driver's functions.
pub(crate) struct Driver {
    api: Api,
}

type Result<T> = std::result::Result<T, Failure>;

impl Driver {
    /// Opens the library. Nothing is initialised, so the process may still fork.
    pub(crate) fn open() -> Result<Self> {
        Ok(Self { api: Api::open(NAMES.iter().map(|name| (*name).to_owned()))? })
    }

    /// Initialises the driver (again is free); number of devices.
    pub(crate) fn init(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: `Api` holds the functions with the signatures of their header, here and below.
        self.check("cuInit", unsafe { (self.api.init)(0) })?;
        // SAFETY: a place for one int.
        self.check("cuDeviceGetCount", unsafe { (self.api.device_count)(&mut count) })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The newest CUDA version of this driver, (major, minor).
    pub(crate) fn version(&self) -> Result<(i32, i32)> {
        let mut version = 0;
        // SAFETY: a place for one int.
        self.check("cuDriverGetVersion", unsafe { (self.api.driver_version)(&mut version) })?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// A device's primary context, torch's own, never released; its compute capability, 90 for 9.0.
    pub(crate) fn device(&self, ordinal: usize) -> Result<(Handle, u32)> {
        let (mut device, mut context) = (0, Handle::NULL);
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: a place for one device.
        self.check("cuDeviceGet", unsafe { (self.api.device_get)(&mut device, ordinal) })?;
        let major = self.attribute(device, COMPUTE_CAPABILITY_MAJOR)?;
        let minor = self.attribute(device, COMPUTE_CAPABILITY_MINOR)?;
        // SAFETY: a device that the driver just named, and a place for its context.
        let code = unsafe { (self.api.primary_retain)(&mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", code)?;
        Ok((context, major * 10 + minor))
    }

    fn attribute(&self, device: c_int, attribute: c_int) -> Result<u32> {
        let mut value = 0;
        // SAFETY: a device that the driver named, and a place for one int.
        let code = unsafe { (self.api.device_attribute)(&mut value, attribute, device) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// Runs `work` in this context, and restores the thread's own.
    pub(crate) fn within<T>(&self, context: Handle, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut before = Handle::NULL;
        // SAFETY: a place for one context.
        self.check("cuCtxGetCurrent", unsafe { (self.api.context_get)(&mut before) })?;
        if before == context {
            return work();
        }
        // SAFETY: a context that `device` retained, and that is never released.
        self.check("cuCtxPushCurrent", unsafe { (self.api.context_push)(context) })?;
        let done = work();
        let mut popped = Handle::NULL;
        // SAFETY: the context pushed above; `work` leaves the stack as it was.
        let code = unsafe { (self.api.context_pop)(&mut popped) };
        done.and_then(|value| self.check("cuCtxPopCurrent", code).map(|()| value))
    }

    /// Runs `work`, which adds nothing to a stream, in the relaxed capture mode.
    ///
    /// By default, loading a module during any thread's capture fails and invalidates the capture.
    pub(crate) fn beside_captures<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        const CALL: &str = "cuThreadExchangeStreamCaptureMode";
        let mut mode = CAPTURE_MODE_RELAXED;
        // SAFETY: a place for one mode, which is exchanged for the thread's own.
        self.check(CALL, unsafe { (self.api.capture_mode)(&mut mode) })?;
        let done = work();
        // SAFETY: a place for one mode; restores the thread's own.
        let code = unsafe { (self.api.capture_mode)(&mut mode) };
        done.and_then(|value| self.check(CALL, code).map(|()| value))
    }

    /// Loads a cubin, or PTX that ends in a zero, into the current context.
    pub(crate) fn load(&self, image: &[u8]) -> Result<Handle> {
        let mut module = Handle::NULL;
        // SAFETY: a whole image, which the driver copies.
        let code = unsafe { (self.api.module_load)(&mut module, image.as_ptr().cast()) };
        self.check("cuModuleLoadData", code).map(|()| module)
    }

    /// A kernel of a loaded module.
    pub(crate) fn function(&self, module: Handle, name: &CStr) -> Result<Handle> {
        let mut function = Handle::NULL;
        // SAFETY: a module that `load` returned; it is never unloaded.
        let code = unsafe { (self.api.module_function)(&mut function, module, name.as_ptr()) };
        self.check("cuModuleGetFunction", code).map(|()| function)
    }

    /// Whether this stream is being captured, or may not be used during another one's capture.
    pub(crate) fn is_capturing(&self, stream: Handle) -> Result<bool> {
        let mut status = 0;
        // SAFETY: a live stream of torch's, in the current context.
        let code = unsafe { (self.api.is_capturing)(stream, &mut status) };
        if code == STREAM_CAPTURE_IMPLICIT {
            return Ok(true);
        }
        self.check("cuStreamIsCapturing", code).map(|()| status != 0)
    }

    /// Launches one kernel on a stream.
    ///
    /// # Safety
    /// `parameters` points to the kernel's one argument, of the type that the kernel takes; the
    /// memory that it names is the device's and lives until the stream has passed this kernel.
    pub(crate) unsafe fn launch(
        &self, function: Handle, (grid, threads): ([u32; 2], u32), stream: Handle,
        argument: *mut c_void,
    ) -> Result<()> {
        let mut parameters = [argument];
        // SAFETY: the driver copies the argument before it returns; the rest is the caller's
        // promise.
        let code = unsafe {
            (self.api.launch)(
                function,
                grid[0],
                grid[1],
                1,
                threads,
                1,
                1,
                0,
                stream,
                parameters.as_mut_ptr(),
                null_mut(),
            )
        };
        self.check("cuLaunchKernel", code)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
        // SAFETY: places for two pointers, which stay null for a code without a name.
        unsafe {
            (self.api.error_name)(code, &mut name);
            (self.api.error_string)(code, &mut text);
        }
        let read = |pointer: *const c_char, or: &str| match pointer.is_null() {
            true => or.to_owned(),
            // SAFETY: the driver's constant string.
            false => unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned(),
        };
        let (name, text) = (read(name, &format!("error {code}")), read(text, "no explanation"));
        Err(Failure::Driver { call, code, name, text })
    }
}

/// Whether the device was out of memory.
pub(crate) fn is_out_of_memory(failure: &Failure) -> bool {
    matches!(failure, Failure::Driver { code: OUT_OF_MEMORY, .. })
}

/// Whether the image itself is unsuitable, rather than memory or the device.
pub(crate) fn is_bad_image(failure: &Failure) -> bool {
    matches!(failure, Failure::Driver { code, .. } if BAD_IMAGE.contains(code))
}
