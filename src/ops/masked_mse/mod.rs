//! The weighted mean squared difference of two maps, and its gradient, in one pass over memory.
//!
//! loss = scale / N * sum over b, c, y, x of weight[b,y,x] * (student - teacher)[b,c,y,x]^2
//!
//! d_student = 2 * scale / N * weight * (student - teacher)
//!
//! N is B*C*H*W (`elements`) or C * sum of weight (`area`); N = 0: loss 0 and gradient 0. The
//! teacher's gradient is the opposite of the student's; the weight counts as a constant. Sums run
//! in f32 over 2048 elements at a time (f64 for f64), then in f64.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod grid;
#[cfg(test)]
mod naive;
mod weights;

use crate::simd::by_dtype;
use crate::tensor::{Check, Device, Result, Run, TensorView};

const CHECK: Check = Check("masked_mse");

/// The inputs of a call.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
    /// `[B, C, H, W]`, a float dtype, any strides.
    pub student: &'a TensorView,
    /// Like student, any strides.
    pub teacher: &'a TensorView,
    /// `[B, H, W]` or `[B, 1, H, W]`, at least 0, any float dtype, any strides; None: 1 everywhere.
    pub weight: Option<&'a TensorView>,
    /// `elements` or `area`.
    pub normalise: &'a str,
    /// A factor of loss and gradient.
    pub scale: f64,
}

impl Args<'_> {
    /// Checks metadata, on any device.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { student, teacher, weight, normalise, .. } = *self;
        let [batch, _, height, width] = CHECK.map("student", student)?;
        CHECK.same_dtype("teacher", teacher, "student", student)?;
        CHECK.sizes("teacher", teacher, "of student", student.sizes())?;
        CHECK.same_device("teacher", teacher, "student", student)?;
        if let Some(weight) = weight {
            CHECK.float("weight", weight)?;
            match weight.rank() {
                4 => CHECK.sizes("weight", weight, "[B, 1, H, W]", &[batch, 1, height, width])?,
                _ => CHECK.sizes("weight", weight, "[B, H, W]", &[batch, height, width])?,
            }
            CHECK.same_device("weight", weight, "student", student)?;
        }
        if ["elements", "area"].contains(&normalise) {
            return Ok(());
        }
        let found = format_args!("\"{normalise}\"");
        Err(CHECK.value("normalise", "be \"elements\" or \"area\"", found))
    }

    /// Computes the loss, one element: f32, or f64 for f64 features; and the gradient where there
    /// is room for it, like student (contiguous or channels_last).
    pub(crate) fn forward(
        &self, loss: &TensorView, d_student: Option<&TensorView>, run: &Run,
    ) -> Result<()> {
        let student = self.student;
        self.check()?;
        CHECK.of_dtype("loss", loss, student.dtype.accumulator())?;
        CHECK.sizes("loss", loss, "[]", &[])?;
        CHECK.same_device("loss", loss, "student", student)?;
        d_student.map_or(Ok(()), |d_student| CHECK.output("d_student", d_student, student))?;
        match student.device {
            #[cfg(feature = "cuda")]
            // SAFETY: checked above, the devices too.
            Device::Cuda(ordinal) => unsafe { cuda::forward(self, loss, d_student, ordinal, run) },
            _ => {
                CHECK.on_cpu("student", student)?;
                // SAFETY: checked above: T is the maps' dtype, all shapes agree, everything is in
                // host memory.
                let value = by_dtype!(student.dtype, T => unsafe {
                    cpu::forward::<T>(self, d_student, run.threads)
                })?;
                // SAFETY: loss has no dimensions, and is in host memory.
                unsafe { loss.write_f64(&[], value) };
                Ok(())
            }
        }
    }
}

/// gradient *= upstream, in place, on a CUDA device; where upstream is one, nothing is written.
///
/// `gradient`: a `d_student`; `upstream`: one element of the loss's dtype.
pub(crate) fn scale(gradient: &TensorView, upstream: &TensorView, run: &Run) -> Result<()> {
    CHECK.map("gradient", gradient)?;
    CHECK.output("gradient", gradient, gradient)?;
    CHECK.of_dtype("upstream", upstream, gradient.dtype.accumulator())?;
    CHECK.sizes("upstream", upstream, "[]", &[])?;
    CHECK.same_device("upstream", upstream, "gradient", gradient)?;
    match gradient.device {
        #[cfg(feature = "cuda")]
        // SAFETY: checked above, the devices too.
        Device::Cuda(ordinal) => unsafe { cuda::scale(gradient, upstream, ordinal, run) },
        _ => Err(CHECK.value("gradient", "be on a CUDA device", &gradient.device)),
    }
}
