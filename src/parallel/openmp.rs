//! The OpenMP threads of PyTorch, where this process has them.
//!
//! After each operator they spin for milliseconds, waiting for the next one. A second set of
//! threads would compete with them for the cores and take twice as long, so work runs on them.
//! Without them (no PyTorch, another system), `parallel` uses its own pool.

use std::ffi::{c_char, c_uint, c_void, CStr};
use std::process;
use std::sync::OnceLock;

type Region = extern "C" fn(*mut c_void);
type Parallel = unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint);

/// The entry of a parallel region in GNU's OpenMP; LLVM's and Intel's export it for compatibility.
const NAME: &CStr = c"GOMP_parallel";

/// Runs `work` on `threads` threads, the caller's included, to its end; false: no OpenMP.
///
/// `work` must not panic.
pub(crate) fn run(threads: usize, work: &(dyn Fn() + Sync)) -> bool {
    let Some(parallel) = parallel() else { return false };
    let mut work = work;
    // SAFETY: `work` outlives the call, which returns when all threads have finished.
    unsafe { parallel(region, (&raw mut work).cast(), c_uint::try_from(threads).unwrap_or(1), 0) };
    true
}

extern "C" fn region(work: *mut c_void) {
    // SAFETY: `run` passes a reference of this type, which all threads only read.
    let work = unsafe { *work.cast::<&(dyn Fn() + Sync)>() };
    work();
}

/// Records this process: threads do not survive a fork, and OpenMP would wait for them forever.
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
    // SAFETY: the null handle is RTLD_DEFAULT, all symbols of the process; the name is a C string.
    let symbol = unsafe { dlsym(std::ptr::null_mut(), NAME.as_ptr()) };
    // SAFETY: this function has this type in every OpenMP library since GCC 4.9.
    (!symbol.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) })
}

#[cfg(not(target_os = "linux"))]
fn find() -> Option<Parallel> {
    None
}
