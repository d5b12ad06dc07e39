//! [`Error`] to gRPC: the only place that knows which kind is which code, and what the details hold.
//!
//! Invariants: INTERNAL means a fault of ours and is logged with its cause; no cause is ever sent.

use std::{collections::HashMap, error::Error as _, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    error::{Error, ErrorKind, FieldViolation, Outcome},
    model::Version,
    rpc::proto,
};

/// The domain of our reasons, in `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "tidegate";

/// After which time to come back when the failure itself does not know better.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The status that a caller gets.
pub fn to_status(error: Error) -> Status {
    to_status_about(error, "min_version")
}

/// The same, of a call whose field `version_field` is at fault where a version is too new.
pub(crate) fn to_status_about(error: Error, version_field: &'static str) -> Status {
    let Meaning { code, reason, retry } = meaning(error.kind());
    tell(&error);
    let outcome = match error.outcome() {
        Outcome::NotApplied => "not_applied",
        Outcome::Unknown => "unknown",
    };
    let mut metadata = HashMap::from([("outcome".to_owned(), outcome.to_owned())]);
    if error.kind() == ErrorKind::Conflict {
        metadata.insert("standing_version".to_owned(), standing(&error).to_string());
    }
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, metadata);
    if retry {
        details.set_retry_info(Some(error.retry_delay().unwrap_or(RETRY_DELAY)));
    }
    if error.kind() == ErrorKind::TooNew {
        details.add_precondition_failure_violation("VERSION", version_field, error.message());
    }
    for violation in error.violations() {
        details.add_bad_request_violation(violation.field.clone(), violation.description.clone());
    }
    Status::with_error_details(code, message(&error), details)
}

/// The same as one answer of several.
pub(crate) fn to_failure(error: Error) -> proto::Failure {
    let Meaning { code, reason, retry } = meaning(error.kind());
    tell(&error);
    let delay = retry.then(|| error.retry_delay().unwrap_or(RETRY_DELAY));
    let violation = |violation: &FieldViolation| proto::FieldViolation {
        field: violation.field.to_string(),
        description: violation.description.to_string(),
    };
    proto::Failure {
        code: code.into(),
        message: message(&error),
        reason: reason.to_owned(),
        unknown: error.outcome() == Outcome::Unknown,
        // Ours are far below the range of a proto Duration.
        retry_delay: delay.and_then(|delay| delay.try_into().ok()),
        standing_version: standing(&error),
        violations: error.violations().iter().map(violation).collect(),
    }
}

/// What a kind of failure is called, and whether another try makes sense.
struct Meaning {
    code: Code,
    reason: &'static str,
    retry: bool,
}

fn meaning(kind: ErrorKind) -> Meaning {
    let (code, reason, retry) = match kind {
        ErrorKind::Invalid => (Code::InvalidArgument, "INVALID", false),
        ErrorKind::TooLarge => (Code::ResourceExhausted, "TOO_LARGE", false),
        ErrorKind::Rejected => (Code::FailedPrecondition, "REJECTED", false),
        ErrorKind::Overloaded => (Code::ResourceExhausted, "OVERLOADED", true),
        ErrorKind::Unavailable => (Code::Unavailable, "UNAVAILABLE", true),
        ErrorKind::Conflict => (Code::Aborted, "CONFLICT", false),
        ErrorKind::Absent => (Code::FailedPrecondition, "ABSENT", false),
        ErrorKind::NotACounter => (Code::FailedPrecondition, "NOT_A_COUNTER", false),
        ErrorKind::OutOfRange => (Code::OutOfRange, "OUT_OF_RANGE", false),
        ErrorKind::NotFound => (Code::NotFound, "NOT_FOUND", false),
        ErrorKind::Paused => (Code::FailedPrecondition, "PAUSED", false),
        ErrorKind::Superseded => (Code::Aborted, "SUPERSEDED", false),
        ErrorKind::DeadLettered => (Code::FailedPrecondition, "DEAD_LETTERED", false),
        ErrorKind::NotPersisted => (Code::Unavailable, "NOT_PERSISTED", true),
        ErrorKind::NotVisible => (Code::Unavailable, "NOT_VISIBLE", true),
        ErrorKind::TooNew => (Code::FailedPrecondition, "TOO_NEW", false),
        ErrorKind::Timeout => (Code::DeadlineExceeded, "TIMEOUT", false),
        ErrorKind::Internal => (Code::Internal, "INTERNAL", false),
    };
    Meaning { code, reason, retry }
}

/// Logs what is our fault.
fn tell(error: &Error) {
    if error.kind() == ErrorKind::Internal {
        tracing::error!(cause = error.source(), "internal error: {error}");
    }
}

/// The version of the record that stands in the way; 0 where there is none.
fn standing(error: &Error) -> i64 {
    error.standing_version().map_or(0, Version::get)
}

/// The message names the fields too: many clients show nothing else.
fn message(error: &Error) -> String {
    let mut message = error.message().to_owned();
    for (index, violation) in error.violations().iter().enumerate() {
        message.push_str(if index == 0 { ": " } else { "; " });
        if !violation.field.is_empty() {
            message.push_str(&violation.field);
            message.push(' ');
        }
        message.push_str(&violation.description);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_code_and_reason_and_only_what_can_succeed_is_worth_another_try() {
        for (kind, code, reason, retry) in [
            (ErrorKind::Invalid, Code::InvalidArgument, "INVALID", false),
            (ErrorKind::TooLarge, Code::ResourceExhausted, "TOO_LARGE", false),
            (ErrorKind::Rejected, Code::FailedPrecondition, "REJECTED", false),
            (ErrorKind::Overloaded, Code::ResourceExhausted, "OVERLOADED", true),
            (ErrorKind::Unavailable, Code::Unavailable, "UNAVAILABLE", true),
            (ErrorKind::Conflict, Code::Aborted, "CONFLICT", false),
            (ErrorKind::Absent, Code::FailedPrecondition, "ABSENT", false),
            (ErrorKind::NotACounter, Code::FailedPrecondition, "NOT_A_COUNTER", false),
            (ErrorKind::OutOfRange, Code::OutOfRange, "OUT_OF_RANGE", false),
            (ErrorKind::NotFound, Code::NotFound, "NOT_FOUND", false),
            (ErrorKind::Paused, Code::FailedPrecondition, "PAUSED", false),
            (ErrorKind::Superseded, Code::Aborted, "SUPERSEDED", false),
            (
                ErrorKind::DeadLettered,
                Code::FailedPrecondition,
                "DEAD_LETTERED",
                false,
            ),
            (ErrorKind::NotPersisted, Code::Unavailable, "NOT_PERSISTED", true),
            (ErrorKind::NotVisible, Code::Unavailable, "NOT_VISIBLE", true),
            (ErrorKind::TooNew, Code::FailedPrecondition, "TOO_NEW", false),
            (ErrorKind::Timeout, Code::DeadlineExceeded, "TIMEOUT", false),
            (ErrorKind::Internal, Code::Internal, "INTERNAL", false),
        ] {
            for (error, outcome) in [
                (Error::new(kind, "why"), "not_applied"),
                (Error::new(kind, "why").unknown(), "unknown"),
            ] {
                let error = error.because("password=secret");
                let failure = to_failure(error.clone());
                assert_eq!((failure.code, failure.message.as_str()), (code as i32, "why"));
                assert_eq!(failure.reason, reason);
                assert_eq!(
                    (failure.unknown, failure.retry_delay.is_some()),
                    (outcome == "unknown", retry)
                );
                let status = to_status(error);
                assert_eq!((status.code(), status.message()), (code, "why"));
                let info = status.get_details_error_info().expect("always there");
                assert_eq!((info.domain.as_str(), info.reason.as_str()), (DOMAIN, reason));
                assert_eq!(info.metadata.get("outcome").map(String::as_str), Some(outcome));
                assert_eq!(status.get_details_retry_info().is_some(), retry, "{kind:?}");
                assert!(!format!("{status:?}").contains("secret"), "causes stay here");
            }
        }
    }

    #[test]
    fn the_time_to_come_back_is_the_failure_s_own_where_it_has_one() {
        let delay = |error| {
            to_status(error)
                .get_details_retry_info()
                .and_then(|info| info.retry_delay)
        };
        let full = Error::new(ErrorKind::Overloaded, "full");
        assert_eq!(delay(full.clone()), Some(RETRY_DELAY));
        let soon = Duration::from_millis(250);
        assert_eq!(delay(full.retry_after(soon)), Some(soon));
    }

    #[test]
    fn a_version_ahead_is_a_precondition_that_names_its_field() {
        let status = to_status(Error::new(ErrorKind::TooNew, "why"));
        let failure = status.get_details_precondition_failure().expect("it is one");
        assert_eq!(failure.violations.len(), 1);
        assert_eq!(
            (
                failure.violations[0].subject.as_str(),
                failure.violations[0].description.as_str()
            ),
            ("min_version", "why")
        );
        let other = to_status(Error::new(ErrorKind::Rejected, "why"));
        assert!(other.get_details_precondition_failure().is_none());
    }

    #[test]
    fn the_fields_at_fault_are_in_the_details_and_in_the_message() {
        let violation = |field: &'static str, description: &'static str| FieldViolation {
            field: field.into(),
            description: description.into(),
        };
        let status = to_status(Error::invalid(vec![
            violation("key", "is empty"),
            violation("", "is no message"),
        ]));
        assert_eq!(status.message(), "the request is invalid: key is empty; is no message");
        let request = status.get_details_bad_request().expect("it is invalid");
        assert_eq!(request.field_violations.len(), 2);
        assert_eq!(request.field_violations[0].field, "key");
    }

    #[test]
    fn a_conflict_says_what_stands() {
        for (version, number) in [(Version::new(7), 7), (None, 0)] {
            let conflict = Error::new(ErrorKind::Conflict, "why").standing(version);
            assert_eq!(to_failure(conflict.clone()).standing_version, number);
            let info = to_status(conflict).get_details_error_info().expect("always there");
            assert_eq!(info.metadata.get("standing_version"), Some(&number.to_string()));
        }
        let other = to_status(Error::new(ErrorKind::Rejected, "why"));
        let info = other.get_details_error_info().expect("always there");
        assert!(!info.metadata.contains_key("standing_version"));
    }

    #[test]
    fn a_failure_names_the_fields_at_fault() {
        let violation = FieldViolation {
            field: "keys[17]".into(),
            description: "must not be empty".into(),
        };
        let failure = to_failure(Error::invalid(vec![violation]));
        assert_eq!(failure.message, "the request is invalid: keys[17] must not be empty");
        assert_eq!(failure.violations.len(), 1);
        assert_eq!(failure.violations[0].field, "keys[17]");
    }
}
