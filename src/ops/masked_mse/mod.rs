//! Masked distillation: the weighted mean squared difference of two feature maps, and its gradient, in one pass over memory.
//!
//! loss = scale / N * sum over b, c, y, x of weight[b,y,x] * (student - teacher)[b,c,y,x]^2
//!
//! d_student = 2 * scale / N * weight * (student - teacher)
//!
//! N is B*C*H*W (`elements`) or C * sum of weight (`area`); N = 0: loss 0 and gradient 0. The teacher's gradient is the opposite of
//! the student's; the weight counts as a constant. Sums run in f32 over 2048 elements at a time (f64 for f64), then in f64.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod grid;
#[cfg(test)]
mod naive;
mod weights;

use crate::simd::{Bf16, Element, F16};
#[cfg(feature = "cuda")]
use crate::tensor::Device;
use crate::tensor::{Check, DType, Result, Run, TensorView};

const CHECK: Check = Check("masked_mse");

/// What one call reads and writes.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
    /// One element: f32, or f64 for f64 features.
    pub loss: &'a TensorView,
    /// Like student, contiguous or channels_last; None: not wanted.
    pub d_student: Option<&'a TensorView>,
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

/// Judges the arguments by their metadata, on any device.
pub(crate) fn check(
    student: &TensorView,
    teacher: &TensorView,
    weight: Option<&TensorView>,
    normalise: &str,
) -> Result<()> {
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
    Err(CHECK.value("normalise", "be \"elements\" or \"area\"", format_args!("\"{normalise}\"")))
}

/// gradient *= upstream, in place, on a CUDA device: upstream is looked at there, and where it is one nothing is moved.
///
/// `gradient`: a `d_student`; `upstream`: one element of the loss's dtype.
pub(crate) fn scale(gradient: &TensorView, upstream: &TensorView, run: &Run) -> Result<()> {
    CHECK.map("gradient", gradient)?;
    CHECK.output("gradient", gradient, gradient)?;
    CHECK.of_dtype("upstream", upstream, gradient.dtype.accumulator())?;
    CHECK.sizes("upstream", upstream, "[]", &[])?;
    CHECK.same_device("upstream", upstream, "gradient", gradient)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(ordinal) = gradient.device {
        // SAFETY: checked above, the devices too.
        return unsafe { cuda::scale(gradient, upstream, ordinal, run) };
    }
    let _ = run;
    Err(CHECK.value("gradient", "be on a CUDA device", &gradient.device))
}

impl Args<'_> {
    /// Computes the loss, and the gradient where it is wanted.
    pub(crate) fn forward<'r>(&self, run: impl Into<Run<'r>>) -> Result<()> {
        let run = run.into();
        check(self.student, self.teacher, self.weight, self.normalise)?;
        self.check_outputs()?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(ordinal) = self.student.device {
            // SAFETY: checked above, the devices too.
            return unsafe { cuda::forward(self, ordinal, &run) };
        }
        CHECK.on_cpu("student", self.student)?;
        match self.student.dtype {
            DType::F64 => self.typed::<f64>(run.threads),
            DType::F16 => self.typed::<F16>(run.threads),
            DType::BF16 => self.typed::<Bf16>(run.threads),
            _ => self.typed::<f32>(run.threads),
        }
    }

    fn check_outputs(&self) -> Result<()> {
        CHECK.of_dtype("loss", self.loss, self.student.dtype.accumulator())?;
        CHECK.sizes("loss", self.loss, "[]", &[])?;
        CHECK.same_device("loss", self.loss, "student", self.student)?;
        self.d_student
            .map_or(Ok(()), |d_student| CHECK.output("d_student", d_student, self.student))
    }

    fn typed<T: Element>(&self, threads: usize) -> Result<()> {
        // SAFETY: checked above: T is the maps' dtype, all shapes agree, everything is in host memory.
        let loss = unsafe { cpu::forward::<T>(self, threads) }?;
        // SAFETY: loss has no dimensions, and is in host memory.
        unsafe { self.loss.write_f64(&[], loss) };
        Ok(())
    }
}
