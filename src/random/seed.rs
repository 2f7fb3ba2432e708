//! A 64-bit seed of a generator: a number, or a tensor on the device that draws.

use crate::tensor::{Check, DType, Result, TensorView};

/// A 64-bit seed.
#[derive(Clone, Debug)]
pub(crate) enum Seed {
    Value(u64),
    /// int64 `[1]`, on the device of the work.
    Tensor(TensorView),
}

impl From<u64> for Seed {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}

impl Seed {
    /// Checks a tensor's dtype and shape.
    pub(crate) fn check(&self, check: Check, name: &str) -> Result<()> {
        let Self::Tensor(view) = self else { return Ok(()) };
        check.of_dtype(name, view, DType::I64)?;
        check.sizes(name, view, "[1]", &[1])
    }

    /// Checks a tensor's dtype, shape and device; the device must be that of another argument.
    pub(crate) fn check_beside(
        &self, check: Check, name: &str, of: &str, other: &TensorView,
    ) -> Result<()> {
        let Self::Tensor(view) = self else { return Ok(()) };
        self.check(check, name)?;
        check.same_device(name, view, of, other)
    }

    /// The number; a tensor must be in host memory.
    pub(crate) fn value(&self, check: Check, name: &str) -> Result<u64> {
        let view = match self {
            Self::Value(value) => return Ok(*value),
            Self::Tensor(view) => view,
        };
        self.check(check, name)?;
        check.on_cpu(name, view)?;
        // SAFETY: int64 [1], in host memory.
        Ok(unsafe { view.read_i64(&[0]) } as u64)
    }
}
