//! Every failure, worded once. `{op}: {argument} must {rule}, got {value}`.

use std::fmt;

/// The Python class that a failure becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Wrong type, or a mix of dtypes.
    Type,
    /// Bad shape or value.
    Value,
    /// Valid, but not in this build.
    NotImplemented,
}

/// A failed check. `Display` is the sentence that a user reads.
#[allow(missing_docs)] // The fields are the sentence's own words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An argument has the wrong type or dtype.
    #[error("{op}: {argument} must {rule}, got {value}")]
    Type { op: &'static str, argument: String, rule: String, value: String },
    /// An argument has a bad shape or value.
    #[error("{op}: {argument} must {rule}, got {value}")]
    Value { op: &'static str, argument: String, rule: String, value: String },
    /// A valid request that this build cannot serve.
    #[error("{op}: {what}; supported: {supported}")]
    Unsupported { op: &'static str, what: String, supported: String },
}

/// What a checked operation returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A wrong type or dtype.
    pub fn of_type(
        op: &'static str,
        argument: &str,
        rule: impl fmt::Display,
        value: impl fmt::Display,
    ) -> Self {
        Self::Type { op, argument: argument.into(), rule: rule.to_string(), value: value.to_string() }
    }

    /// A bad shape or value.
    pub fn of_value(
        op: &'static str,
        argument: &str,
        rule: impl fmt::Display,
        value: impl fmt::Display,
    ) -> Self {
        Self::Value { op, argument: argument.into(), rule: rule.to_string(), value: value.to_string() }
    }

    /// The Python class for this failure.
    pub fn class(&self) -> Class {
        match self {
            Self::Type { .. } => Class::Type,
            Self::Value { .. } => Class::Value,
            Self::Unsupported { .. } => Class::NotImplemented,
        }
    }
}
