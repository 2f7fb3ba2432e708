//! Instruction sets, found at run time: code for a level takes its token, which detection makes.

use super::element::Real;
use super::vector::{self, Vector};
use super::LANES;
use std::sync::OnceLock;

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// The target's default.
    Scalar,
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Level {
    /// The name that `show_config` prints and `SOKD_SIMD` takes.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
        }
    }

    /// Every level that this CPU has, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(Avx512::detect().map(Self::Avx512));
            levels.extend(Avx2::detect().map(Self::Avx2));
        }
        levels.push(Self::Scalar);
        levels
    }
}

/// The level in use: the best one, or that of the variable `SOKD_SIMD`, if the CPU has it.
pub(crate) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let levels = Level::available();
        let wanted = std::env::var("SOKD_SIMD").ok();
        let named = levels.iter().find(|l| Some(l.name()) == wanted.as_deref());
        *named.unwrap_or(&levels[0])
    })
}

/// A level's token, of no memory: its existence proves that the CPU has the level's features.
pub(crate) trait Simd: Copy {
    /// [`LANES`] numbers of f32 in the registers of this level.
    type F32: Vector<f32, Self>;
    /// The same of f64.
    type F64: Vector<f64, Self>;
    /// The level, known when compiling.
    fn level(self) -> Level;
    #[inline(always)]
    fn load<A: Real>(self, from: &[A; LANES]) -> A::Vector<Self> {
        A::Vector::<Self>::load(self, from)
    }
    /// From memory, widened if need be.
    #[inline(always)]
    fn load_f32<A: Real>(self, from: &[f32; LANES]) -> A::Vector<Self> {
        A::Vector::<Self>::load_f32(self, from)
    }
    #[inline(always)]
    fn splat<A: Real>(self, value: A) -> A::Vector<Self> {
        A::Vector::<Self>::splat(self, value)
    }
}

/// The token of [`Level::Scalar`], which every CPU has.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type F32 = vector::Plain<f32>;
    type F64 = vector::Plain<f64>;
    #[inline(always)]
    fn level(self) -> Level {
        Level::Scalar
    }
}

/// Work compiled once a level; `with_simd` and all it calls must be `#[inline(always)]`.
pub(crate) trait WithSimd {
    type Out;
    fn with_simd<S: Simd>(self, simd: S) -> Self::Out;
}

/// Runs work at the level in use.
#[inline]
pub(crate) fn run<W: WithSimd>(work: W) -> W::Out {
    run_at(level(), work)
}

/// Runs work at a given level (tests compare the levels).
#[inline]
pub(crate) fn run_at<W: WithSimd>(level: Level, work: W) -> W::Out {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(simd) => simd.run(work),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(simd) => simd.run(work),
        Level::Scalar => work.with_simd(Scalar),
    }
}

/// A level of x86: its features, listed once for the detection and for the compiler.
#[cfg(target_arch = "x86_64")]
macro_rules! level {
    ($(#[$about:meta])* $name:ident, $f32:ident, $f64:ident, [$($feature:tt),*]) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) struct $name(());

        impl $name {
            /// All features that code for this level may use.
            #[cfg(test)]
            const FEATURES: &'static [&'static str] = &[$($feature),*];

            /// The token, where the CPU has every feature of the level.
            fn detect() -> Option<Self> {
                ($(is_x86_feature_detected!($feature))&&*).then_some(Self(()))
            }

            #[inline]
            fn run<W: WithSimd>(self, work: W) -> W::Out {
                #[target_feature($(enable = $feature),*)]
                fn compiled<W: WithSimd>(simd: $name, work: W) -> W::Out {
                    work.with_simd(simd)
                }
                // SAFETY: `detect`, which alone makes tokens, found all of these features.
                unsafe { compiled(self, work) }
            }
        }

        impl Simd for $name {
            type F32 = vector::x86::$f32;
            type F64 = vector::x86::$f64;
            #[inline(always)]
            fn level(self) -> Level {
                Level::$name(self)
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
level!(
    /// The token of [`Level::Avx2`].
    Avx2, Avx2F32, Avx2F64, ["avx2", "fma", "bmi2"]
);
#[cfg(target_arch = "x86_64")]
level!(
    /// The token of [`Level::Avx512`].
    Avx512, Avx512F32, Avx512F64,
    ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "bmi2"]
);

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use std::path::Path;

    /// Every list of features in a `target_feature` attribute below a folder, with its file.
    fn enabled(folder: &Path, lists: &mut Vec<(String, String)>) {
        for entry in folder.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                enabled(&path, lists);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                for attribute in text.split(concat!("#[target_feature", "(")).skip(1) {
                    let quoted = attribute.split(")]").next().unwrap().split('"').skip(1);
                    let file = path.display().to_string();
                    lists.extend(quoted.step_by(2).map(|list| (file.clone(), list.to_owned())));
                }
            }
        }
    }

    #[test]
    fn a_level_is_detected_by_every_feature_that_its_code_enables() {
        let mut lists = Vec::new();
        enabled(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut lists);
        assert!(lists.len() > 20, "{lists:?}");
        for (file, list) in lists {
            let table = if list.contains("avx512") { Avx512::FEATURES } else { Avx2::FEATURES };
            for feature in list.split(',') {
                assert!(table.contains(&feature), "{feature} of {list:?} in {file}");
            }
        }
    }

    #[test]
    fn a_higher_level_has_what_a_lower_one_has() {
        assert!(Avx2::FEATURES.iter().all(|feature| Avx512::FEATURES.contains(feature)));
        assert!(["avx2", "fma", "bmi2"].iter().all(|feature| Avx2::FEATURES.contains(feature)));
    }

    #[test]
    fn tokens_take_no_memory() {
        assert_eq!(size_of::<Avx2>() + size_of::<Avx512>() + size_of::<Scalar>(), 0);
    }
}
