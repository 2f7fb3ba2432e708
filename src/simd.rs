//! Vector code on stable Rust: loops over `[T; LANES]` that the compiler vectorises, compiled once for every instruction set and
//! picked at run time.
//!
//! Every level runs the same operations in the same order (fused multiply-adds are written out), so the bits do not depend on the CPU.

pub use crate::elem::{Bf16, Elem, F16};
use crate::row::Row;
use std::sync::OnceLock;

/// Elements that the kernels work on side by side (channels, in nearly all of them): one AVX-512 register of f32.
pub const LANES: usize = 16;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Whatever the target has by default.
    Scalar,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
}

impl Level {
    /// The name that `show_config` prints and `SOKD_SIMD` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Every level that this CPU has, best first.
    pub fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                levels.push(Self::Avx512);
            }
            if avx2 {
                levels.push(Self::Avx2);
            }
        }
        levels.push(Self::Scalar);
        levels
    }
}

/// The level in use: the best one, or the one that the environment variable `SOKD_SIMD` names, if the CPU has it.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let levels = Level::available();
        let wanted = std::env::var("SOKD_SIMD").ok();
        let named = levels.iter().find(|l| Some(l.name()) == wanted.as_deref());
        *named.unwrap_or(&levels[0])
    })
}

/// A piece of work whose `run` is compiled once for every level. `run` and all that it calls must be `#[inline(always)]`.
pub trait Job {
    /// What it returns.
    type Out;
    /// Does the work.
    fn run(self) -> Self::Out;
    /// The same with rows in the registers of AVX2.
    #[inline(always)]
    fn run_avx2(self) -> Self::Out
    where
        Self: Sized,
    {
        self.run()
    }
    /// The same with rows in the registers of AVX-512.
    #[inline(always)]
    fn run_avx512(self) -> Self::Out
    where
        Self: Sized,
    {
        self.run()
    }
}

/// Runs a job at the level in use.
#[inline]
pub fn run<J: Job>(job: J) -> J::Out {
    run_at(level(), job)
}

/// Runs a job at a given level, which the CPU must have (tests compare the levels).
#[inline]
pub fn run_at<J: Job>(level: Level, job: J) -> J::Out {
    match level {
        // SAFETY: `Level::available` found these features on this CPU.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { run_avx512(job) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { run_avx2(job) },
        _ => job.run(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
fn run_avx512<J: Job>(job: J) -> J::Out {
    job.run_avx512()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
fn run_avx2<J: Job>(job: J) -> J::Out {
    job.run_avx2()
}

/// What the kernels compute in: f32, or f64 for f64 tensors.
pub trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::AddAssign
    + 'static
{
    /// A row in the registers of AVX-512.
    type Rows512: Row<Self>;
    /// A row in the registers of AVX2.
    type Rows256: Row<Self>;
    /// Rounds from f64.
    fn of(value: f64) -> Self;
    /// Widens (or keeps) an f32.
    fn of_f32(value: f32) -> Self;
    /// Widens to f64.
    fn to_f64(self) -> f64;
    /// self * b + c, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    /// Square root.
    fn root(self) -> Self;
    /// All bits set, or none.
    fn mask(set: bool) -> Self;
    /// The bits that both have.
    fn and(self, other: Self) -> Self;
    /// Turns 16 rows about their diagonal.
    fn transpose(from: &[[Self; LANES]; LANES], to: &mut [[Self; LANES]; LANES]);
}

macro_rules! real {
    ($t:ty, $transpose:path, $rows512:ident, $rows256:ident) => {
        impl Real for $t {
            #[cfg(target_arch = "x86_64")]
            type Rows512 = crate::row::x86::$rows512;
            #[cfg(target_arch = "x86_64")]
            type Rows256 = crate::row::x86::$rows256;
            #[cfg(not(target_arch = "x86_64"))]
            type Rows512 = crate::row::Plain<$t>;
            #[cfg(not(target_arch = "x86_64"))]
            type Rows256 = crate::row::Plain<$t>;
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn of_f32(value: f32) -> Self {
                value as Self
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn fma(self, b: Self, c: Self) -> Self {
                self.mul_add(b, c)
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn mask(set: bool) -> Self {
                Self::from_bits(if set { !0 } else { 0 })
            }
            #[inline(always)]
            fn and(self, other: Self) -> Self {
                Self::from_bits(self.to_bits() & other.to_bits())
            }
            #[inline(always)]
            fn transpose(from: &[[Self; LANES]; LANES], to: &mut [[Self; LANES]; LANES]) {
                $transpose(from, to)
            }
        }
    };
}
real!(f32, crate::transpose::transpose_f32, Wide32, Half32);
real!(f64, crate::transpose::transpose_any, Wide64, Half64);

/// The three ways of a job that works on rows: `self.rows::<R>()` does it with rows of the kind `R`.
macro_rules! by_rows {
    ($a:ty) => {
        #[inline(always)]
        fn run(self) -> Self::Out {
            self.rows::<crate::row::Plain<$a>>()
        }
        #[inline(always)]
        fn run_avx2(self) -> Self::Out {
            self.rows::<<$a as Real>::Rows256>()
        }
        #[inline(always)]
        fn run_avx512(self) -> Self::Out {
            self.rows::<<$a as Real>::Rows512>()
        }
    };
}
pub(crate) use by_rows;
