//! Why a call failed, decoded: what to do about it, when to come back, and whether a write may have been applied all the same.
//!
//! Owns the reading of statuses and their details. Does not own what is tried again ([`super::retry`]). Messages are the gateway's own sentences,
//! which hold no value.

use std::{error::Error as _, fmt, time::Duration};

use tonic::{Code, ConnectError, Status};
use tonic_types::StatusExt;

use crate::rpc::{proto, status::DOMAIN};

/// Why there is no answer, or none that helps.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An address is none.
    #[error("{address:?} is no address of a gateway: {rule}")]
    Address {
        /// As it was given.
        address: String,
        /// What it must be.
        rule: String,
    },
    /// The gateway answered with a failure.
    #[error("{0}")]
    Failed(Failure),
    /// No connection could be made, or it was lost before the answer came; or something in between answered in the gateway's stead.
    #[error("no gateway answers: {message}")]
    Unreachable {
        /// What the connection said.
        message: String,
        /// Whether a write may have been applied, or may be yet. Never so of a read.
        may_be_applied: bool,
    },
    /// The time was over before an answer came.
    #[error("there was no answer within the deadline")]
    TimedOut {
        /// Whether a write may have been applied, or may be yet. Never so of a read.
        may_be_applied: bool,
    },
}

/// What a gateway said of a call, or of one item of a batch, that failed.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// What to do about it.
    pub reason: Reason,
    /// The status code.
    pub code: Code,
    /// A sentence for people.
    pub message: String,
    /// Whether a write may have been applied all the same, or may be yet. Never so of a read.
    pub may_be_applied: bool,
    /// After which time another try makes sense; `None` if it would fail again.
    pub retry_delay: Option<Duration>,
    /// Every field at fault, of [`Reason::Invalid`].
    pub violations: Vec<Violation>,
    /// Of [`Reason::Conflict`]: the version of the record that stands; `None` where there is no record.
    pub standing_version: Option<i64>,
}

/// A field that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field, as the contract names it; with its place where there are several values: `keys[17]`. Empty: the message as a whole.
    pub field: String,
    /// What it must be.
    pub description: String,
}

/// The reasons of the contract: what each asks for is at the head of `gateway.proto`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// Fix the request.
    Invalid,
    /// Send less.
    TooLarge,
    /// Come back after the delay: a bound is reached.
    Overloaded,
    /// The store rejects this record for good.
    Rejected,
    /// The condition does not hold.
    Conflict,
    /// There is no record, and the call wants one.
    Absent,
    /// The record is no counter.
    NotACounter,
    /// The counter would leave its range.
    OutOfRange,
    /// A later item of the same batch has the key.
    Superseded,
    /// The awaited write is in the dead letters.
    DeadLettered,
    /// The awaited version is not in the store yet.
    NotPersisted,
    /// Something that the call needs is not there.
    Unavailable,
    /// The version that a read asks for cannot be seen there yet.
    NotVisible,
    /// No gateway can have stamped the version that is asked for.
    TooNew,
    /// The gateway's time for the call was over.
    Timeout,
    /// A fault of the gateway.
    Internal,
    /// One that this client does not know, by its name; or, in lower case, what answered without one.
    Other(String),
}

const REASONS: [(&str, Reason); 16] = [
    ("INVALID", Reason::Invalid),
    ("TOO_LARGE", Reason::TooLarge),
    ("OVERLOADED", Reason::Overloaded),
    ("REJECTED", Reason::Rejected),
    ("CONFLICT", Reason::Conflict),
    ("ABSENT", Reason::Absent),
    ("NOT_A_COUNTER", Reason::NotACounter),
    ("OUT_OF_RANGE", Reason::OutOfRange),
    ("SUPERSEDED", Reason::Superseded),
    ("DEAD_LETTERED", Reason::DeadLettered),
    ("NOT_PERSISTED", Reason::NotPersisted),
    ("UNAVAILABLE", Reason::Unavailable),
    ("NOT_VISIBLE", Reason::NotVisible),
    ("TOO_NEW", Reason::TooNew),
    ("TIMEOUT", Reason::Timeout),
    ("INTERNAL", Reason::Internal),
];

impl Reason {
    fn named(name: &str) -> Reason {
        let known = REASONS.iter().find(|(known, _)| *known == name);
        known.map_or_else(|| Reason::Other(name.to_owned()), |(_, reason)| reason.clone())
    }

    /// Its name in the contract.
    pub fn name(&self) -> &str {
        if let Reason::Other(name) = self {
            return name;
        }
        let known = REASONS.iter().find(|(_, known)| known == self);
        known.map_or("", |(name, _)| name)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

impl Error {
    /// What a call that was a write, or was not, ended with.
    pub(super) fn of(status: &Status, is_write: bool) -> Error {
        if let Some(failure) = Failure::told(status) {
            return Error::Failed(failure);
        }
        if is_of_time(status) {
            return Error::TimedOut {
                may_be_applied: is_write,
            };
        }
        if status.source().is_some() || matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled) {
            return Error::Unreachable {
                message: cause(status),
                // A connection that was never made has carried nothing.
                may_be_applied: is_write && !has_cause::<ConnectError>(status),
            };
        }
        // A gateway of another version, a proxy, or this client: they refused the call, or the answer.
        let refused = [
            Code::Unimplemented,
            Code::Unauthenticated,
            Code::PermissionDenied,
            Code::NotFound,
        ];
        Error::Failed(Failure {
            reason: Reason::Other(format!("{:?}", status.code()).to_lowercase()),
            code: status.code(),
            message: status.message().to_owned(),
            may_be_applied: is_write && !refused.contains(&status.code()),
            retry_delay: None,
            violations: Vec::new(),
            standing_version: None,
        })
    }

    /// Whether a write may have been applied all the same, or may be yet.
    pub fn may_be_applied(&self) -> bool {
        match self {
            Error::Address { .. } => false,
            Error::Failed(failure) => failure.may_be_applied,
            Error::Unreachable { may_be_applied, .. } | Error::TimedOut { may_be_applied } => *may_be_applied,
        }
    }

    /// The same, where an earlier try of the same write may have been applied.
    pub(super) fn after_unknown(mut self) -> Error {
        match &mut self {
            Error::Address { .. } => {}
            Error::Failed(failure) => failure.may_be_applied = true,
            Error::Unreachable { may_be_applied, .. } | Error::TimedOut { may_be_applied } => *may_be_applied = true,
        }
        self
    }

    /// What the gateway said, if it is what answered.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Error::Failed(failure) => Some(failure),
            Error::Address { .. } | Error::Unreachable { .. } | Error::TimedOut { .. } => None,
        }
    }
}

impl Failure {
    /// What a gateway told in the details of a status; `None` if no gateway did.
    fn told(status: &Status) -> Option<Failure> {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN)?;
        let reason = Reason::named(&info.reason);
        let standing = info.metadata.get("standing_version");
        let violations = details.bad_request().map(|request| &request.field_violations[..]);
        let violation = |violation: &tonic_types::FieldViolation| Violation {
            field: violation.field.clone(),
            description: violation.description.clone(),
        };
        Some(Failure {
            code: status.code(),
            message: status.message().to_owned(),
            may_be_applied: info.metadata.get("outcome").is_some_and(|outcome| outcome == "unknown"),
            retry_delay: details.retry_info().and_then(|info| info.retry_delay),
            violations: violations.unwrap_or_default().iter().map(violation).collect(),
            standing_version: standing.and_then(|version| version.parse().ok()).filter(|v| *v > 0),
            reason,
        })
    }
}

impl From<proto::Failure> for Failure {
    /// Of one item of a batch.
    fn from(failure: proto::Failure) -> Failure {
        let violation = |violation: proto::FieldViolation| Violation {
            field: violation.field,
            description: violation.description,
        };
        Failure {
            reason: Reason::named(&failure.reason),
            code: Code::from(failure.code),
            message: failure.message,
            may_be_applied: failure.unknown,
            retry_delay: failure.retry_delay.and_then(|delay| delay.try_into().ok()),
            violations: failure.violations.into_iter().map(violation).collect(),
            standing_version: Some(failure.standing_version).filter(|version| *version > 0),
        }
    }
}

/// Whether this client, or something in between, ended the call because its time was over.
fn is_of_time(status: &Status) -> bool {
    status.code() == Code::DeadlineExceeded || has_cause::<tonic::TimeoutExpired>(status)
}

fn has_cause<E: std::error::Error + 'static>(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<E>())
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(status.source(), |&cause| cause.source())
}

/// The last cause says most: "connection refused", where the first says "transport error".
fn cause(status: &Status) -> String {
    let last = causes(status).last().map(ToString::to_string);
    last.unwrap_or_else(|| status.message().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::{self, ErrorKind},
        model::Version,
        rpc::status::to_status,
    };

    #[test]
    fn every_reason_of_the_contract_has_a_name_and_comes_back_from_it() {
        for (name, reason) in REASONS {
            assert_eq!((reason.name(), Reason::named(name)), (name, reason.clone()));
        }
        assert_eq!(Reason::named("LATER"), Reason::Other("LATER".to_owned()));
    }

    #[test]
    fn what_a_gateway_tells_is_read_whole() {
        let conflict = error::Error::new(ErrorKind::Conflict, "why").standing(Version::new(7));
        let error = Error::of(&to_status(conflict), true);
        let failure = error.failure().expect("a gateway told");
        assert_eq!(
            (&failure.reason, failure.standing_version),
            (&Reason::Conflict, Some(7))
        );
        assert!(!error.may_be_applied() && failure.retry_delay.is_none());

        let soon = Duration::from_millis(250);
        let full = error::Error::new(ErrorKind::Overloaded, "full")
            .retry_after(soon)
            .unknown();
        let error = Error::of(&to_status(full), true);
        let failure = error.failure().expect("a gateway told");
        assert_eq!(
            (&failure.reason, failure.retry_delay),
            (&Reason::Overloaded, Some(soon))
        );
        assert!(error.may_be_applied());

        let invalid = error::Error::invalid(vec![error::FieldViolation {
            field: "key".into(),
            description: "is empty".into(),
        }]);
        let error = Error::of(&to_status(invalid), false);
        let violations = &error.failure().expect("a gateway told").violations;
        assert_eq!(violations.len(), 1);
        assert_eq!(
            (violations[0].field.as_str(), violations[0].description.as_str()),
            ("key", "is empty")
        );
    }

    #[test]
    fn what_no_gateway_told_may_have_been_applied_if_it_was_a_write() {
        for is_write in [true, false] {
            let lost = Error::of(&Status::unavailable("a proxy"), is_write);
            assert!(matches!(lost, Error::Unreachable { .. }), "{lost:?}");
            assert_eq!(lost.may_be_applied(), is_write);
            let late = Error::of(&Status::deadline_exceeded("a proxy"), is_write);
            assert_eq!(
                late,
                Error::TimedOut {
                    may_be_applied: is_write
                }
            );
        }
        let old = Error::of(&Status::unimplemented("no such method"), true);
        assert!(!old.may_be_applied(), "{old:?}");
    }
}
