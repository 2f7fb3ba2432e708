//! All checks of shape, dtype, device and strides: of metadata alone, on any device.

use crate::tensor::{DType, Device, Error, Result, TensorView};
use std::fmt::Display;

/// Checks for an operator, whose name begins the messages.
#[derive(Clone, Copy)]
pub(crate) struct Check(pub &'static str);

impl Check {
    /// A feature map `[B, C, H, W]` of a floating-point dtype.
    pub(crate) fn map(self, argument: &str, view: &TensorView) -> Result<[usize; 4]> {
        self.float(argument, view)?;
        self.rank(argument, view, "[B, C, H, W]", &[4])?;
        let s = view.sizes();
        if s[2].checked_mul(s[3]).is_none_or(|positions| positions >= u32::MAX as usize) {
            let rule = "have fewer than 4294967295 positions a plane";
            return Err(self.shape(argument, rule, view));
        }
        Ok([s[0], s[1], s[2], s[3]])
    }

    pub(crate) fn float(self, argument: &str, view: &TensorView) -> Result<()> {
        if view.dtype.is_float() {
            return Ok(());
        }
        let rule = "be float64, float32, float16 or bfloat16";
        Err(Error::of_type(self.0, argument, rule, view.dtype))
    }

    pub(crate) fn int(self, argument: &str, view: &TensorView) -> Result<()> {
        if view.dtype.is_int() {
            return Ok(());
        }
        Err(Error::of_type(self.0, argument, "be of an integer dtype", view.dtype))
    }

    pub(crate) fn same_dtype(
        self, argument: &str, view: &TensorView, other: &str, than: &TensorView,
    ) -> Result<()> {
        if view.dtype == than.dtype {
            return Ok(());
        }
        let rule = format!("have the dtype of {other}, {}", than.dtype);
        Err(Error::of_type(self.0, argument, rule, view.dtype))
    }

    pub(crate) fn of_dtype(self, argument: &str, view: &TensorView, dtype: DType) -> Result<()> {
        if view.dtype == dtype {
            return Ok(());
        }
        Err(Error::of_type(self.0, argument, format!("be {dtype}"), view.dtype))
    }

    /// An output: shape, dtype and device of `like`, dense.
    pub(crate) fn output(self, argument: &str, view: &TensorView, like: &TensorView) -> Result<()> {
        self.sizes(argument, view, "of its input", like.sizes())?;
        self.same_dtype(argument, view, "its input", like)?;
        self.same_device(argument, view, "its input", like)?;
        if view.is_contiguous() || view.is_channels_last() {
            return Ok(());
        }
        let strides = format!("strides {:?}", view.strides());
        Err(self.value(argument, "be contiguous or channels_last", strides))
    }

    /// Row-major without gaps.
    pub(crate) fn contiguous(self, argument: &str, view: &TensorView) -> Result<()> {
        if view.is_contiguous() {
            return Ok(());
        }
        Err(self.value(argument, "be contiguous", format_args!("strides {:?}", view.strides())))
    }

    pub(crate) fn same_device(
        self, argument: &str, view: &TensorView, other: &str, than: &TensorView,
    ) -> Result<()> {
        if view.device == than.device {
            return Ok(());
        }
        let rule = format!("be on the device of {other}, {}", than.device);
        Err(Error::of_value(self.0, argument, rule, &view.device))
    }

    /// One of these ranks; `layout` names the dimensions.
    pub(crate) fn rank(
        self, argument: &str, view: &TensorView, layout: &str, ranks: &[usize],
    ) -> Result<()> {
        if ranks.contains(&view.rank()) {
            return Ok(());
        }
        Err(self.shape(argument, format!("have the shape {layout}"), view))
    }

    pub(crate) fn sizes(
        self, argument: &str, view: &TensorView, layout: &str, sizes: &[usize],
    ) -> Result<()> {
        if view.sizes() == sizes {
            return Ok(());
        }
        Err(self.shape(argument, format!("have the shape {layout} = {sizes:?}"), view))
    }

    /// `[G, rest..]` with G one of 1 and the batch; returns G.
    pub(crate) fn groups(
        self, argument: &str, view: &TensorView, batch: usize, layout: &str, rest: &[usize],
    ) -> Result<usize> {
        let s = view.sizes();
        if s.len() == rest.len() + 1 && s[1..] == *rest && (s[0] == 1 || s[0] == batch) {
            return Ok(s[0]);
        }
        let choices = if batch == 1 { "1".to_owned() } else { format!("1 or {batch}") };
        let rest: String = rest.iter().map(|d| format!(", {d}")).collect();
        Err(self.shape(argument, format!("have the shape {layout} = [{choices}{rest}]"), view))
    }

    /// Host memory, for the CPU kernels.
    pub(crate) fn on_cpu(self, argument: &str, view: &TensorView) -> Result<()> {
        if view.device == Device::Cpu {
            return Ok(());
        }
        let (what, supported) = (format!("{argument} on {}", view.device), "cpu".to_owned());
        Err(Error::Unsupported { op: self.0, what, supported })
    }

    /// A failed rule about a value.
    pub(crate) fn value(self, argument: &str, rule: impl Display, value: impl Display) -> Error {
        Error::of_value(self.0, argument, rule, value)
    }

    fn shape(self, argument: &str, rule: impl Display, view: &TensorView) -> Error {
        Error::of_value(self.0, argument, rule, format_args!("shape {}", view.shape_text()))
    }
}
