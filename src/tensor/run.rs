//! What a call may use beside its arguments: threads on the CPU; a stream and scratch memory on CUDA.

use crate::tensor::{Error, Result};

/// Gives the address of so many bytes of device memory, which stay for the length of the call; torch's allocator stands behind it.
pub(crate) type Allocate<'a> = &'a (dyn Fn(usize) -> Result<u64> + Sync);

/// The resources of one call.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    /// At most so many, on the CPU.
    pub threads: usize,
    /// torch's current stream of the device, as the driver's handle.
    pub stream: usize,
    /// For CUDA kernels that reduce.
    pub allocate: Option<Allocate<'a>>,
}

/// So many threads of the CPU.
impl From<usize> for Run<'_> {
    fn from(threads: usize) -> Self {
        Self { threads, stream: 0, allocate: None }
    }
}

impl Run<'_> {
    /// Scratch memory, aligned to 8 bytes at least; 0 bytes need none.
    pub(crate) fn scratch(&self, op: &'static str, bytes: usize) -> Result<u64> {
        match self.allocate {
            _ if bytes == 0 => Ok(0),
            Some(allocate) => allocate(bytes),
            None => Err(Error::of_value(
                op,
                "allocate",
                "be given for a kernel that needs scratch memory",
                "None",
            )),
        }
    }
}
