//! `TensorView`: the metadata of a tensor that kernels take.

use super::DType;
use std::fmt;

/// Where the memory lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Cpu,
    Cuda(usize),
    /// Anything else, by the name torch gives it.
    Other(String),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(i) => write!(f, "cuda:{i}"),
            Self::Other(name) => f.write_str(name),
        }
    }
}

/// The largest rank of a tensor.
pub(crate) const MAX_RANK: usize = 8;

/// Pointer, dtype, sizes, strides (in elements) and device of a tensor with another owner.
///
/// A view has no lifetime: its maker keeps the tensor alive until the call that uses it returns.
#[derive(Clone, Debug)]
pub(crate) struct TensorView {
    ptr: *mut u8,
    pub dtype: DType,
    /// Where the memory lies.
    pub device: Device,
    rank: usize,
    sizes: [usize; MAX_RANK],
    strides: [isize; MAX_RANK],
}

// SAFETY: a view is plain metadata; kernels write disjoint elements from several threads.
unsafe impl Send for TensorView {}
// SAFETY: as above.
unsafe impl Sync for TensorView {}

impl TensorView {
    /// A view from its parts; `None` when the rank is above [`MAX_RANK`].
    ///
    /// # Safety
    /// Every element that `sizes` and `strides` reach from `ptr` must be readable (writable, if the
    /// view is an output) for as long as the view is used.
    pub(crate) unsafe fn new(
        ptr: *mut u8, dtype: DType, device: Device, sizes: &[usize], strides: &[isize],
    ) -> Option<Self> {
        if sizes.len() > MAX_RANK || sizes.len() != strides.len() {
            return None;
        }
        let mut view = Self {
            ptr,
            dtype,
            device,
            rank: sizes.len(),
            sizes: [1; MAX_RANK],
            strides: [0; MAX_RANK],
        };
        view.sizes[..sizes.len()].copy_from_slice(sizes);
        view.strides[..sizes.len()].copy_from_slice(strides);
        Some(view)
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn sizes(&self) -> &[usize] {
        &self.sizes[..self.rank]
    }

    /// Strides in elements, outermost first.
    pub(crate) fn strides(&self) -> &[isize] {
        &self.strides[..self.rank]
    }

    pub(crate) fn numel(&self) -> usize {
        self.sizes().iter().product()
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    pub(crate) fn as_ptr<T>(&self) -> *mut T {
        self.ptr.cast()
    }

    /// The view without its first dimension, at `index` of it.
    pub(crate) fn select(&self, index: usize) -> Self {
        debug_assert!(self.rank > 0 && index < self.sizes[0]);
        let offset = self.strides[0] * index as isize * self.dtype.size() as isize;
        let mut view = self.clone();
        view.ptr = self.ptr.wrapping_offset(offset);
        view.rank -= 1;
        view.sizes.copy_within(1.., 0);
        view.strides.copy_within(1.., 0);
        view
    }

    /// Row-major without gaps.
    pub(crate) fn is_contiguous(&self) -> bool {
        self.is_dense_in((0..self.rank).rev())
    }

    /// `[B, C, H, W]` stored as `[B, H, W, C]` without gaps.
    pub(crate) fn is_channels_last(&self) -> bool {
        self.rank == 4 && self.is_dense_in([1, 3, 2, 0].into_iter())
    }

    fn is_dense_in(&self, inner_first: impl Iterator<Item = usize>) -> bool {
        let mut expected = 1isize;
        for d in inner_first {
            if self.sizes[d] != 1 && self.strides[d] != expected {
                return self.numel() == 0;
            }
            expected *= self.sizes[d] as isize;
        }
        true
    }

    /// The shape in Python's form: `[2, 3, 4]`.
    pub(crate) fn shape_text(&self) -> String {
        format!("{:?}", self.sizes())
    }

    /// Reads one number as f64, whatever the dtype.
    ///
    /// # Safety
    /// The view must be in host memory and `index` within its sizes.
    pub(crate) unsafe fn read_f64(&self, index: &[usize]) -> f64 {
        let offset: isize = index.iter().zip(self.strides()).map(|(&i, &s)| i as isize * s).sum();
        // SAFETY: `index` is within the sizes; the caller of `new` promised that memory.
        unsafe {
            match self.dtype {
                DType::F64 => *self.as_ptr::<f64>().offset(offset),
                DType::F32 => f64::from(*self.as_ptr::<f32>().offset(offset)),
                DType::F16 => (*self.as_ptr::<half::f16>().offset(offset)).to_f64(),
                DType::BF16 => (*self.as_ptr::<half::bf16>().offset(offset)).to_f64(),
                _ => self.read_i64(index) as f64,
            }
        }
    }

    /// Reads one integer or bool as i64; floats are truncated.
    ///
    /// # Safety
    /// As for [`TensorView::read_f64`].
    pub(crate) unsafe fn read_i64(&self, index: &[usize]) -> i64 {
        let offset: isize = index.iter().zip(self.strides()).map(|(&i, &s)| i as isize * s).sum();
        // SAFETY: as for `read_f64`.
        unsafe {
            match self.dtype {
                DType::I64 => *self.as_ptr::<i64>().offset(offset),
                DType::I32 => i64::from(*self.as_ptr::<i32>().offset(offset)),
                DType::I16 => i64::from(*self.as_ptr::<i16>().offset(offset)),
                DType::I8 => i64::from(*self.as_ptr::<i8>().offset(offset)),
                DType::U8 | DType::Bool => i64::from(*self.as_ptr::<u8>().offset(offset)),
                _ => self.read_f64(index) as i64,
            }
        }
    }

    /// Writes one number, rounded to the dtype.
    ///
    /// # Safety
    /// As for [`TensorView::read_f64`], and no other thread may use that element meanwhile.
    pub(crate) unsafe fn write_f64(&self, index: &[usize], value: f64) {
        let offset: isize = index.iter().zip(self.strides()).map(|(&i, &s)| i as isize * s).sum();
        // SAFETY: as for `read_f64`.
        unsafe {
            match self.dtype {
                DType::F64 => *self.as_ptr::<f64>().offset(offset) = value,
                DType::F32 => *self.as_ptr::<f32>().offset(offset) = value as f32,
                DType::F16 => {
                    *self.as_ptr::<half::f16>().offset(offset) = half::f16::from_f64(value)
                }
                DType::BF16 => {
                    *self.as_ptr::<half::bf16>().offset(offset) = half::bf16::from_f64(value)
                }
                DType::I64 => *self.as_ptr::<i64>().offset(offset) = value as i64,
                DType::I32 => *self.as_ptr::<i32>().offset(offset) = value as i32,
                DType::I16 => *self.as_ptr::<i16>().offset(offset) = value as i16,
                DType::I8 => *self.as_ptr::<i8>().offset(offset) = value as i8,
                DType::U8 | DType::Bool => *self.as_ptr::<u8>().offset(offset) = value as u8,
            }
        }
    }
}
