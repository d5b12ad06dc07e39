//! What a call can fail with: few kinds, each telling the caller what to do, and whether a write may still take effect.
//!
//! Owns the vocabulary only. Each module turns its own errors into these at its edge; `rpc/status.rs` alone maps them to gRPC.
//! Messages are sentences for the caller: they never hold a value, a credential or a store's row.

use std::{borrow::Cow, error, fmt, sync::Arc, time::Duration};

use crate::model::Version;

/// What the caller should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Fix the request; the fields at fault are named.
    Invalid,
    /// Send less: it is more than the gateway takes.
    TooLarge,
    /// Do not send this record again as it is: the store rejects it for good.
    Rejected,
    /// Come back later: a bound is reached.
    Overloaded,
    /// Try again, or elsewhere: something that the call needs is not there, or the gateway is shutting down.
    Unavailable,
    /// Read the key and decide anew: the write's condition does not hold.
    Conflict,
    /// Create the record first: the call wants one, and there is none.
    Absent,
    /// Use another key: the record is no counter.
    NotACounter,
    /// Add less: the counter would leave its range.
    OutOfRange,
    /// Look at what there is: nothing of that name is known here.
    NotFound,
    /// Resume the drain first: it is paused.
    Paused,
    /// Nothing: a later write of the same batch has the key.
    Superseded,
    /// Look into the dead letters: the store rejected an accepted write for good.
    DeadLettered,
    /// Come back later, or allow more time: the awaited version is not in the store yet.
    NotPersisted,
    /// Try again, or elsewhere: the version that the read asks for cannot be seen here yet.
    NotVisible,
    /// Forget the version that the read asks for: it is too far ahead of every clock that can have stamped it.
    TooNew,
    /// Allow more time.
    Timeout,
    /// Report it: a fault of the gateway.
    Internal,
}

/// Whether a failed write can still take effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It changed nothing and never will.
    NotApplied,
    /// It may have been applied, or may be yet.
    Unknown,
}

/// A field of a request that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field, as the proto names it; of a repeated one with its place, from 0: `keys[17]`.
    pub field: Cow<'static, str>,
    /// What it must be.
    pub description: Cow<'static, str>,
}

/// A failed call. Cheap to clone: callers that share a load share its failure.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    outcome: Outcome,
    message: Cow<'static, str>,
    violations: Vec<FieldViolation>,
    retry_after: Option<Duration>,
    standing: Option<Version>,
    source: Option<Arc<dyn error::Error + Send + Sync>>,
}

impl Error {
    /// An error of a kind that changed nothing.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Error {
        Error {
            kind,
            outcome: Outcome::NotApplied,
            message: message.into(),
            violations: Vec::new(),
            retry_after: None,
            standing: None,
            source: None,
        }
    }

    /// A request with fields that break their rules.
    pub fn invalid(violations: Vec<FieldViolation>) -> Error {
        Error {
            violations,
            ..Error::new(ErrorKind::Invalid, "the request is invalid")
        }
    }

    /// The same, of a write that may still take effect.
    #[must_use]
    pub fn unknown(mut self) -> Error {
        self.outcome = Outcome::Unknown;
        self
    }

    /// The same, worth another try after `delay`.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Error {
        self.retry_after = Some(delay);
        self
    }

    /// The same, with the version of the live record that stands, if there is one: of [`ErrorKind::Conflict`].
    #[must_use]
    pub fn standing(mut self, version: Option<Version>) -> Error {
        self.standing = version;
        self
    }

    /// The same, with its cause, which is logged and never sent.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Error {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// What the caller should do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether a write may still take effect.
    pub fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// A sentence for the caller.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The fields at fault, of [`ErrorKind::Invalid`].
    pub fn violations(&self) -> &[FieldViolation] {
        &self.violations
    }

    /// The version of the live record that stands, if there is one: of [`ErrorKind::Conflict`].
    pub fn standing_version(&self) -> Option<Version> {
        self.standing
    }

    /// After which time another try makes sense.
    pub fn retry_delay(&self) -> Option<Duration> {
        self.retry_after
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
