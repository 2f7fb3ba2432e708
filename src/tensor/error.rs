//! All errors and their messages. `{op}: {argument} must {rule}, got {value}`.

use std::fmt;

/// The Python class that a failure becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Wrong type, or a mix of dtypes.
    Type,
    /// Bad shape or value.
    Value,
    /// Valid, but not in this build.
    NotImplemented,
    /// The device or its compiler failed.
    Runtime,
}

/// A failure. `Display` is its message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("{op}: {argument} must {rule}, got {value}")]
    Type { op: &'static str, argument: String, rule: String, value: String },
    #[error("{op}: {argument} must {rule}, got {value}")]
    Value { op: &'static str, argument: String, rule: String, value: String },
    #[error("{op}: {what}; supported: {supported}")]
    Unsupported { op: &'static str, what: String, supported: String },
    #[error("{op}: {failure}")]
    Cuda { op: &'static str, failure: CudaFailure },
}

/// How CUDA can fail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CudaFailure {
    #[error("no {library} here: {reason}")]
    NoLibrary { library: &'static str, reason: String },
    /// Something was opened that is too old, or something else.
    #[error("the {library} lacks {symbol}")]
    NoSymbol { library: &'static str, symbol: &'static str },
    #[error("the CUDA driver and NVRTC are not open; sokd.show_config() prints the reason")]
    NotOpen,
    #[error("device cuda:{ordinal} must be one of the {count} that the CUDA driver has")]
    NoDevice { ordinal: usize, count: usize },
    #[error("the CUDA driver failed in {call}: {name} ({text})")]
    Driver { call: &'static str, code: i32, name: String, text: String },
    #[error("NVRTC failed in {call}: {reason}")]
    Nvrtc { call: &'static str, reason: String },
    #[error(
        "NVRTC {}.{} could not compile {name} for {arch}: {reason}\n{log}",
        version.0,
        version.1
    )]
    Compile { version: (i32, i32), name: String, arch: String, reason: String, log: String },
    /// A device older than the oldest architecture of the compiler.
    #[error(
        "NVRTC {}.{} compiles for no device of compute capability {}.{}",
        version.0,
        version.1,
        capability / 10,
        capability % 10
    )]
    UnknownArch { version: (i32, i32), capability: u32 },
    /// A device that lacks what the kernels use.
    #[error(
        "cuda:{ordinal} has compute capability {}.{}, and the kernels need 7.0",
        capability / 10,
        capability % 10
    )]
    OldDevice { ordinal: usize, capability: u32 },
    /// A kernel is compiled and loaded when it is first used, which a capture forbids.
    #[error(
        "kernel {kernel} is not loaded on cuda:{ordinal}, and a CUDA graph is being captured; \
         call sokd.warmup({}) before the capture",
        warmup(*ordinal, *float64)
    )]
    Capturing { kernel: String, ordinal: usize, float64: bool },
}

/// The call that loads the kernel; its default has no float64.
fn warmup(ordinal: usize, float64: bool) -> String {
    let dtypes = if float64 { ", dtypes=[torch.float64]" } else { "" };
    format!("\"cuda:{ordinal}\"{dtypes}")
}

/// The result of a checked operation.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn of_type(
        op: &'static str, argument: &str, rule: impl fmt::Display, value: impl fmt::Display,
    ) -> Self {
        Self::Type {
            op,
            argument: argument.into(),
            rule: rule.to_string(),
            value: value.to_string(),
        }
    }

    pub(crate) fn of_value(
        op: &'static str, argument: &str, rule: impl fmt::Display, value: impl fmt::Display,
    ) -> Self {
        Self::Value {
            op,
            argument: argument.into(),
            rule: rule.to_string(),
            value: value.to_string(),
        }
    }

    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Type { .. } => Class::Type,
            Self::Value { .. } => Class::Value,
            Self::Unsupported { .. } => Class::NotImplemented,
            Self::Cuda { .. } => Class::Runtime,
        }
    }
}
