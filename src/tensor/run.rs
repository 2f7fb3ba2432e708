//! The resources of a call: threads on the CPU; a stream and scratch memory on CUDA.

use crate::tensor::{Error, Result};

/// Allocates device memory for the length of a call by torch's allocator; returns its address.
pub(crate) type Allocate<'a> = &'a (dyn Fn(usize) -> Result<u64> + Sync);

/// The resources of one call.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    /// The most threads on the CPU.
    pub threads: usize,
    /// torch's current stream of the device, as the driver's handle.
    pub stream: usize,
    /// For CUDA kernels that reduce.
    pub allocate: Option<Allocate<'a>>,
}

/// That many threads of the CPU.
impl From<usize> for Run<'_> {
    fn from(threads: usize) -> Self {
        Self { threads, stream: 0, allocate: None }
    }
}

impl Run<'_> {
    /// The address of scratch memory, aligned to at least 8 bytes; 0 for 0 bytes.
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
