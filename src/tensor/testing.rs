//! Tensors for tests: any shape, dtype and strides, with memory of their own and a watch on the
//! bytes around them.

use crate::tensor::{DType, Device, TensorView};
use proptest::prelude::*;

/// The number of cases of a property test, overridden by `SOKD_PROPTEST_CASES`.
pub(crate) fn cases(usual: u32) -> ProptestConfig {
    let given = std::env::var("SOKD_PROPTEST_CASES").ok();
    ProptestConfig::with_cases(given.and_then(|cases| cases.parse().ok()).unwrap_or(usual))
}

/// How a tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Lay {
    /// Row-major.
    Contiguous,
    /// The second dimension innermost.
    ChannelsLast,
    /// Row-major, part of a larger tensor in every dimension.
    Sliced,
    /// The second dimension innermost, part of a larger tensor in every dimension.
    ChannelsLastSliced,
    /// The dimensions in reverse.
    Reversed,
    /// The first dimension has stride 0.
    Expanded,
    /// The last dimension has stride 0.
    ExpandedInside,
}

/// All layouts that an input may have.
pub(crate) fn any_lay() -> impl Strategy<Value = Lay> {
    use Lay::*;
    prop::sample::select(vec![
        Contiguous,
        ChannelsLast,
        Sliced,
        ChannelsLastSliced,
        Reversed,
        Expanded,
        ExpandedInside,
    ])
}

/// All dtypes that are computed with.
pub(crate) fn any_float() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F64, DType::F32, DType::F16, DType::BF16])
}

fn strides(shape: &[usize], lay: Lay) -> Vec<isize> {
    let rank = shape.len();
    let last = matches!(lay, Lay::ChannelsLast | Lay::ChannelsLastSliced) && rank == 4;
    let inner_first: Vec<usize> = match lay {
        Lay::Reversed => (0..rank).collect(),
        _ if last => vec![1, 3, 2, 0],
        _ => (0..rank).rev().collect(),
    };
    let gap = usize::from(matches!(lay, Lay::Sliced | Lay::ChannelsLastSliced));
    let (mut strides, mut next) = (vec![0; rank], 1);
    for (i, d) in inner_first.into_iter().enumerate() {
        strides[d] = next;
        next *= (shape[d].max(1) + gap * (i + 1)) as isize;
    }
    match lay {
        Lay::Expanded if rank > 0 => strides[0] = 0,
        Lay::ExpandedInside if rank > 0 => strides[rank - 1] = 0,
        _ => {}
    }
    strides
}

const CANARY: u8 = 0xa5;

/// A tensor that owns its memory.
pub(crate) struct Owned {
    store: Vec<u8>,
    /// What kernels see.
    pub view: TensorView,
}

impl Owned {
    /// An output: every byte is a canary.
    pub(crate) fn empty(shape: &[usize], dtype: DType, lay: Lay) -> Self {
        let strides = strides(shape, lay);
        let reach: isize =
            shape.iter().zip(&strides).map(|(&d, &s)| (d.max(1) as isize - 1) * s).sum::<isize>()
                + 1;
        let around = 64 / dtype.size();
        let mut store = vec![CANARY; (reach as usize + 2 * around) * dtype.size() + 8];
        let aligned = store.as_ptr().align_offset(8) + around * dtype.size();
        // SAFETY: the store holds `reach` elements from there on, and as much again on both sides.
        let view = unsafe {
            TensorView::new(store.as_mut_ptr().add(aligned), dtype, Device::Cpu, shape, &strides)
        };
        Self { store, view: view.expect("rank of at most 8") }
    }

    /// An input: value `i` in row-major order, rounded to the dtype.
    pub(crate) fn new(
        shape: &[usize],
        dtype: DType,
        lay: Lay,
        values: impl Fn(usize) -> f64,
    ) -> Self {
        let owned = Self::empty(shape, dtype, lay);
        for (i, index) in indices(shape).into_iter().enumerate() {
            // SAFETY: the index is within the sizes.
            unsafe { owned.view.write_f64(&index, values(i)) };
        }
        owned
    }

    /// All values in row-major order, as they were rounded.
    pub(crate) fn values(&self) -> Vec<f64> {
        // SAFETY: the index is within the sizes.
        indices(self.view.sizes())
            .iter()
            .map(|index| unsafe { self.view.read_f64(index) })
            .collect()
    }

    /// Every byte that belongs to no element is as it was.
    pub(crate) fn is_intact_around(&self) -> bool {
        let mut mine = vec![false; self.store.len()];
        let first = self.view.ptr() as usize - self.store.as_ptr() as usize;
        for index in indices(self.view.sizes()) {
            let at: isize =
                index.iter().zip(self.view.strides()).map(|(&i, &s)| i as isize * s).sum();
            let size = self.view.dtype.size();
            mine[first + at as usize * size..][..size].fill(true);
        }
        self.store.iter().zip(mine).all(|(byte, mine)| mine || *byte == CANARY)
    }
}

/// All indices of a shape in row-major order.
pub(crate) fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    let index = |mut i: usize| {
        let mut index = vec![0; shape.len()];
        for d in (0..shape.len()).rev() {
            (index[d], i) = (i % shape[d], i / shape[d]);
        }
        index
    };
    (0..shape.iter().product()).map(index).collect()
}

/// Uniform numbers in [0, 1), the same for the same seed.
pub(crate) struct Uniform(pub u64);

impl Uniform {
    /// The next one, with 24 bits.
    pub(crate) fn next(&mut self) -> f64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / (1u64 << 24) as f64
    }

    /// The next `count`.
    pub(crate) fn take(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.next()).collect()
    }
}
