//! Areas of interest: the k best local maxima of the heat, a box around each, and how many boxes
//! cover each cell.
//!
//! heat = sqrt(heat_s * heat_t), size and offset = (student + teacher) / 2, where a teacher is
//! given
//!
//! peak: heat[b,a,y,x] > 0 and >= every cell of the kernel x kernel window around it (outside the
//! map: ignored), none of them NaN
//!
//! box = trunc(clamp(cell + offset -+ size / 2, 0, side - 1)), both corners inclusive
//!
//! coverage[b,y,x] = boxes over the cell
//!
//! Peaks are ordered by (heat descending, flat index (a*H + y)*W + x ascending). Missing ones: box
//! (0, 0, -1, -1), score 0. A NaN in size or offset sets the corners that depend on it to 0. All is
//! computed in f32 (f64 for f64). No gradient flows through areas.

mod boxes;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod heat;
#[cfg(test)]
mod naive;
mod peaks;

use crate::simd::{by_dtype, Real};
use crate::tensor::{Check, DType, Device, Result, Run, TensorView};

const CHECK: Check = Check("areas");

/// The inputs of a call.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
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

/// The outputs of a call.
#[derive(Clone, Copy)]
pub(crate) struct Outputs<'a> {
    /// `[B, H, W]` f32, contiguous.
    pub coverage: &'a TensorView,
    /// `[B, k, 4]` i64, contiguous: y0 x0 y1 x1, inclusive.
    pub boxes: &'a TensorView,
    /// `[B, k]` f32 (f64 for f64 heat), contiguous.
    pub scores: &'a TensorView,
}

impl Args<'_> {
    /// Checks metadata, on any device.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { heat, size, offset, teacher, k, kernel } = *self;
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
            let rule = format_args!("be at least 1 and at most A*H*W = {cells}");
            return Err(CHECK.value("k", rule, k));
        }
        if kernel < 1 || kernel % 2 == 0 {
            return Err(CHECK.value("kernel", "be odd and at least 1", kernel));
        }
        Ok(())
    }

    /// Finds the areas and writes all three outputs.
    pub(crate) fn forward(&self, outputs: &Outputs, run: &Run) -> Result<()> {
        self.check()?;
        outputs.check(self)?;
        match self.heat.device {
            #[cfg(feature = "cuda")]
            // SAFETY: checked above, the devices too.
            Device::Cuda(ordinal) => unsafe { cuda::forward(self, outputs, ordinal, run) },
            _ => {
                CHECK.on_cpu("heat", self.heat)?;
                // SAFETY: checked above: T is heat's dtype, the shapes agree, everything is in host
                // memory.
                by_dtype!(self.heat.dtype, T => unsafe {
                    cpu::forward::<T>(self, outputs, run.threads)
                });
                Ok(())
            }
        }
    }
}

impl Outputs<'_> {
    fn check(&self, args: &Args) -> Result<()> {
        let (heat, k) = (args.heat, args.k as usize);
        let s = heat.sizes();
        for (name, view, dtype, layout, sizes) in [
            ("coverage", self.coverage, DType::F32, "[B, H, W]", &[s[0], s[2], s[3]][..]),
            ("boxes", self.boxes, DType::I64, "[B, k, 4]", &[s[0], k, 4]),
            ("scores", self.scores, heat.dtype.accumulator(), "[B, k]", &[s[0], k]),
        ] {
            CHECK.of_dtype(name, view, dtype)?;
            CHECK.sizes(name, view, layout, sizes)?;
            CHECK.same_device(name, view, "heat", heat)?;
            CHECK.contiguous(name, view)?;
        }
        Ok(())
    }
}

fn like_heat(
    name: &str, view: &TensorView, heat: &TensorView, layout: &str, sizes: &[usize],
) -> Result<()> {
    CHECK.same_dtype(name, view, "heat", heat)?;
    CHECK.sizes(name, view, layout, sizes)?;
    CHECK.same_device(name, view, "heat", heat)
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
