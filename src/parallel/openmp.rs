//! The OpenMP threads that PyTorch keeps, where this process has them.
//!
//! After each of its operators they spin for milliseconds, waiting for the next. Threads of our own would share the cores with them, and
//! take twice as long; so the work goes to them. Where there are none (no PyTorch, another system), `parallel` has its own pool.

use std::ffi::{c_char, c_uint, c_void, CStr};
use std::process;
use std::sync::OnceLock;

type Region = extern "C" fn(*mut c_void);
type Parallel = unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint);

/// What GNU's OpenMP calls a parallel region, and LLVM's and Intel's for its sake.
const NAME: &CStr = c"GOMP_parallel";

/// Runs `work` on `threads` threads at a time, the calling one included; returns when all are through. False: not done, no OpenMP here.
///
/// `work` must not panic.
pub(crate) fn run(threads: usize, work: &(dyn Fn() + Sync)) -> bool {
    let Some(parallel) = parallel() else { return false };
    let mut work = work;
    // SAFETY: `region` gets a pointer to `work`, which outlives the call: it returns when all threads are through.
    unsafe { parallel(region, (&raw mut work).cast(), c_uint::try_from(threads).unwrap_or(1), 0) };
    true
}

extern "C" fn region(work: *mut c_void) {
    // SAFETY: `run` passes a reference of this type, which all threads only read.
    let work = unsafe { *work.cast::<&(dyn Fn() + Sync)>() };
    work();
}

/// Notes that this process loaded the library: threads do not survive a fork, and OpenMP would wait for them in the child for ever.
#[cfg(feature = "python")]
pub(crate) fn remember_process() {
    OWNER.get_or_init(process::id);
}

static OWNER: OnceLock<u32> = OnceLock::new();

fn parallel() -> Option<Parallel> {
    static FOUND: OnceLock<Option<Parallel>> = OnceLock::new();
    let found = (*FOUND.get_or_init(find))?;
    (OWNER.get() == Some(&process::id())).then_some(found)
}

#[cfg(target_os = "linux")]
fn find() -> Option<Parallel> {
    extern "C" {
        fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    // SAFETY: the null handle is RTLD_DEFAULT, what the process has loaded for all to see; the name is a C string.
    let symbol = unsafe { dlsym(std::ptr::null_mut(), NAME.as_ptr()) };
    // SAFETY: a function of this name has this type in every OpenMP library (its ABI has not changed since GCC 4.9).
    (!symbol.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) })
}

#[cfg(not(target_os = "linux"))]
fn find() -> Option<Parallel> {
    None
}
