//! Areas of interest: the k best local maxima of the heat, a box around each, and how many boxes cover each cell.
//!
//! heat = sqrt(heat_s * heat_t), size and offset = (student + teacher) / 2, where a teacher is given
//!
//! peak: heat[b,a,y,x] >= every cell of the kernel x kernel window around it (outside the map: ignored), none of them NaN
//!
//! box = trunc(clamp(cell + offset -+ size / 2, 0, side - 1)), both corners inclusive;   coverage[b,y,x] = boxes over the cell
//!
//! Peaks are ordered by (heat descending, flat index (a*H + y)*W + x ascending). Missing ones: box (0, 0, -1, -1), score 0. A NaN in
//! size or offset makes 0 of the corners it reaches. All is computed in f32 (f64 for f64). No gradient flows through areas.

mod boxes;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod heat;
#[cfg(test)]
mod naive;
mod peaks;

use crate::simd::{Bf16, Real, F16};
#[cfg(feature = "cuda")]
use crate::tensor::Device;
use crate::tensor::{Check, DType, Result, Run, TensorView};

const CHECK: Check = Check("areas");

/// What one call reads and writes.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
    /// `[B, H, W]` f32, contiguous.
    pub coverage: &'a TensorView,
    /// `[B, k, 4]` i64, contiguous: y0 x0 y1 x1, inclusive.
    pub boxes: &'a TensorView,
    /// `[B, k]` f32 (f64 for f64 heat), contiguous.
    pub scores: &'a TensorView,
    /// `[B, A, H, W]`, a float dtype, any strides.
    pub heat: &'a TensorView,
    /// `[B, 2, H, W]`: width and height, in cells; of the dtype of heat, any strides.
    pub size: &'a TensorView,
    /// `[B, 2, H, W]`: x and y, in cells; of the dtype of heat, any strides.
    pub offset: &'a TensorView,
    /// The teacher's heat, size and offset, for the mutual areas.
    pub teacher: Option<[&'a TensorView; 3]>,
    /// Areas of each sample, 1 to A*H*W.
    pub k: i64,
    /// Side of the window of a peak; odd.
    pub kernel: i64,
}

/// Judges the arguments by their metadata, on any device.
pub(crate) fn check(
    heat: &TensorView,
    size: &TensorView,
    offset: &TensorView,
    teacher: Option<[&TensorView; 3]>,
    k: i64,
    kernel: i64,
) -> Result<()> {
    let [batch, maps, height, width] = CHECK.map("heat", heat)?;
    let pairs = [batch, 2, height, width];
    like_heat("size", size, heat, "[B, 2, H, W]", &pairs)?;
    like_heat("offset", offset, heat, "[B, 2, H, W]", &pairs)?;
    if let Some([heat_t, size_t, offset_t]) = teacher {
        like_heat("the teacher's heat", heat_t, heat, "of heat", heat.sizes())?;
        like_heat("the teacher's size", size_t, heat, "[B, 2, H, W]", &pairs)?;
        like_heat("the teacher's offset", offset_t, heat, "[B, 2, H, W]", &pairs)?;
    }
    let cells = maps * height * width;
    if usize::try_from(k).map_or(true, |k| k == 0 || k > cells) {
        return Err(CHECK.value("k", format_args!("be at least 1 and at most A*H*W = {cells}"), k));
    }
    if kernel < 1 || kernel % 2 == 0 {
        return Err(CHECK.value("kernel", "be odd and at least 1", kernel));
    }
    Ok(())
}

fn like_heat(
    name: &str,
    view: &TensorView,
    heat: &TensorView,
    layout: &str,
    sizes: &[usize],
) -> Result<()> {
    CHECK.same_dtype(name, view, "heat", heat)?;
    CHECK.sizes(name, view, layout, sizes)?;
    CHECK.same_device(name, view, "heat", heat)
}

impl Args<'_> {
    /// Finds the areas and writes all three outputs.
    pub(crate) fn forward<'r>(&self, run: impl Into<Run<'r>>) -> Result<()> {
        let run = run.into();
        check(self.heat, self.size, self.offset, self.teacher, self.k, self.kernel)?;
        self.check_outputs()?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(ordinal) = self.heat.device {
            // SAFETY: checked above, the devices too.
            return unsafe { cuda::forward(self, ordinal, &run) };
        }
        CHECK.on_cpu("heat", self.heat)?;
        // SAFETY: checked above: every arm has heat's dtype, the shapes agree, everything is in host memory.
        unsafe {
            match self.heat.dtype {
                DType::F64 => cpu::forward::<f64>(self, run.threads),
                DType::F16 => cpu::forward::<F16>(self, run.threads),
                DType::BF16 => cpu::forward::<Bf16>(self, run.threads),
                _ => cpu::forward::<f32>(self, run.threads),
            }
        }
        Ok(())
    }

    fn check_outputs(&self) -> Result<()> {
        let (s, k) = (self.heat.sizes(), self.k as usize);
        let outputs = [
            ("coverage", self.coverage, DType::F32, "[B, H, W]", &[s[0], s[2], s[3]][..]),
            ("boxes", self.boxes, DType::I64, "[B, k, 4]", &[s[0], k, 4]),
            ("scores", self.scores, self.heat.dtype.accumulator(), "[B, k]", &[s[0], k]),
        ];
        for (name, view, dtype, layout, sizes) in outputs {
            CHECK.of_dtype(name, view, dtype)?;
            CHECK.sizes(name, view, layout, sizes)?;
            CHECK.same_device(name, view, "heat", self.heat)?;
            CHECK.contiguous(name, view)?;
        }
        Ok(())
    }
}

/// The first, unless it is less or NaN.
#[inline(always)]
fn larger<A: Real>(a: A, b: A) -> A {
    if a > b {
        a
    } else {
        b
    }
}
