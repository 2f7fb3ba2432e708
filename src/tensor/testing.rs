//! Tensors for tests: any shape, dtype and strides, in separate memory between pages that fault
//! and with a check of the bytes around them.

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
    /// The last dimension backwards: a negative stride, as NumPy has them.
    Flipped,
    /// The last two dimensions have stride 1: windows that overlap.
    Overlapping,
}

/// All layouts that an input may have.
pub(crate) fn any_lay() -> impl Strategy<Value = Lay> {
    use Lay::*;
    prop::sample::select(vec![
        Contiguous, ChannelsLast, Sliced, ChannelsLastSliced, Reversed, Expanded, ExpandedInside,
        Flipped, Overlapping,
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
        Lay::Flipped if rank > 0 => strides[rank - 1] = -1,
        Lay::Overlapping if rank > 1 => strides[rank - 2] = 1,
        _ => {}
    }
    strides
}

/// Uniform numbers and NaN, infinities, both zeros and tiny numbers among them.
pub(crate) fn wild(seed: u64, count: usize) -> Vec<f64> {
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 0.0, 1e-7, -1e-40];
    let mut uniform = Uniform(seed);
    let mut value = || {
        let plain = 4.0 * uniform.next() - 2.0;
        odd.get((uniform.next() * 100.0) as usize).copied().unwrap_or(plain)
    };
    (0..count).map(|_| value()).collect()
}

const CANARY: u8 = 0xa5;

/// Memory between two pages that may not be touched: a kernel that reads or writes beyond either
/// end stops the test with a fault.
struct Store {
    map: *mut u8,
    page: usize,
    size: usize,
}

#[cfg(unix)]
impl Store {
    /// At least so many bytes, all canaries.
    fn new(bytes: usize) -> Self {
        use libc::{MAP_ANONYMOUS, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE};
        // SAFETY: sysconf has no requirements.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let size = bytes.next_multiple_of(page).max(page);
        let (flags, nowhere) = (MAP_PRIVATE | MAP_ANONYMOUS, std::ptr::null_mut());
        // SAFETY: a new mapping, of which all but the first and the last page become accessible.
        let map = unsafe {
            let map = libc::mmap(nowhere, size + 2 * page, PROT_NONE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED, "no memory");
            let inside = map.byte_add(page);
            assert_eq!(libc::mprotect(inside, size, PROT_READ | PROT_WRITE), 0, "no memory");
            std::ptr::write_bytes(inside.cast::<u8>(), CANARY, size);
            map.cast()
        };
        Self { map, page, size }
    }
}

#[cfg(not(unix))]
impl Store {
    /// At least so many bytes, all canaries; without the two pages, and never freed.
    fn new(bytes: usize) -> Self {
        let size = bytes.next_multiple_of(16);
        Self {
            map: vec![u128::from_ne_bytes([CANARY; 16]); size / 16].leak().as_mut_ptr().cast(),
            page: 0,
            size,
        }
    }
}

impl Store {
    fn first(&self) -> *mut u8 {
        self.map.wrapping_add(self.page)
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes are accessible and initialised.
        unsafe { std::slice::from_raw_parts(self.first(), self.size) }
    }
}

#[cfg(unix)]
impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nothing uses any more.
        unsafe { libc::munmap(self.map.cast(), self.size + 2 * self.page) };
    }
}

/// A tensor that owns its memory.
pub(crate) struct Owned {
    store: Store,
    /// What kernels see.
    pub view: TensorView,
}

impl Owned {
    /// An output: every byte is a canary. The tensor begins with the store or ends with it; the
    /// number of its bytes decides.
    pub(crate) fn empty(shape: &[usize], dtype: DType, lay: Lay) -> Self {
        let strides = strides(shape, lay);
        let steps = || shape.iter().zip(&strides).map(|(&d, &s)| (d.max(1) as isize - 1) * s);
        let before = -steps().filter(|step| *step < 0).sum::<isize>() as usize;
        let behind = steps().filter(|step| *step > 0).sum::<isize>() as usize;
        let bytes = (before + behind + 1) * dtype.size();
        let store = Store::new(bytes + 64);
        let at = if (bytes / 8).is_multiple_of(2) { 0 } else { store.size - bytes }
            + before * dtype.size();
        // SAFETY: the store holds `before` elements before that place and `behind` after it.
        let view =
            unsafe { TensorView::new(store.first().add(at), dtype, Device::Cpu, shape, &strides) };
        Self { store, view: view.expect("rank of at most 8") }
    }

    /// An input: value `i` in row-major order, rounded to the dtype.
    pub(crate) fn new(
        shape: &[usize], dtype: DType, lay: Lay, values: impl Fn(usize) -> f64,
    ) -> Self {
        let owned = Self::empty(shape, dtype, lay);
        let mut i = 0;
        each_index(shape, |index| {
            // SAFETY: the index is within the sizes.
            unsafe { owned.view.write_f64(index, values(i)) };
            i += 1;
        });
        owned
    }

    /// All values in row-major order, as they were rounded.
    pub(crate) fn values(&self) -> Vec<f64> {
        let mut values = Vec::with_capacity(self.view.sizes().iter().product());
        // SAFETY: the index is within the sizes.
        each_index(self.view.sizes(), |index| values.push(unsafe { self.view.read_f64(index) }));
        values
    }

    /// Whether every byte outside the elements is unchanged.
    pub(crate) fn is_intact_around(&self) -> bool {
        let mut mine = vec![false; self.store.size];
        let (first, size) =
            (self.view.ptr() as usize - self.store.first() as usize, self.view.dtype.size());
        each_index(self.view.sizes(), |index| {
            let at: isize =
                index.iter().zip(self.view.strides()).map(|(&i, &s)| i as isize * s).sum();
            mine[first.wrapping_add_signed(at * size as isize)..][..size].fill(true);
        });
        self.store.bytes().iter().zip(mine).all(|(byte, mine)| mine || *byte == CANARY)
    }
}

/// Calls `visit` with all indices of a shape in row-major order.
pub(crate) fn each_index(shape: &[usize], mut visit: impl FnMut(&[usize])) {
    let mut index = vec![0; shape.len()];
    for _ in 0..shape.iter().product() {
        visit(&index);
        for d in (0..shape.len()).rev() {
            index[d] = (index[d] + 1) % shape[d];
            if index[d] > 0 {
                break;
            }
        }
    }
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
