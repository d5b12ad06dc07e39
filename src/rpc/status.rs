//! [`Error`] to gRPC: the only place that knows which kind is which code, and what the details hold.
//!
//! Invariants: INTERNAL means a fault of ours and is logged with its cause; no cause is ever sent.

use std::{collections::HashMap, error::Error as _, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::error::{Error, ErrorKind, Outcome};

/// The domain of our reasons, in `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "tidegate";

/// After which time to come back when the failure itself does not know better.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The status that a caller gets.
pub fn to_status(error: Error) -> Status {
    let (code, reason, retry) = match error.kind() {
        ErrorKind::Invalid => (Code::InvalidArgument, "INVALID", false),
        ErrorKind::TooLarge => (Code::ResourceExhausted, "TOO_LARGE", false),
        ErrorKind::Rejected => (Code::FailedPrecondition, "REJECTED", false),
        ErrorKind::Overloaded => (Code::ResourceExhausted, "OVERLOADED", true),
        ErrorKind::Unavailable => (Code::Unavailable, "UNAVAILABLE", true),
        ErrorKind::NotVisible => (Code::Unavailable, "NOT_VISIBLE", true),
        ErrorKind::TooNew => (Code::FailedPrecondition, "TOO_NEW", false),
        ErrorKind::Timeout => (Code::DeadlineExceeded, "TIMEOUT", false),
        ErrorKind::Internal => (Code::Internal, "INTERNAL", false),
    };
    if error.kind() == ErrorKind::Internal {
        tracing::error!(cause = error.source(), "internal error: {error}");
    }
    let outcome = match error.outcome() {
        Outcome::NotApplied => "not_applied",
        Outcome::Unknown => "unknown",
    };
    let mut details = ErrorDetails::new();
    details.set_error_info(
        reason,
        DOMAIN,
        HashMap::from([("outcome".to_owned(), outcome.to_owned())]),
    );
    if retry {
        details.set_retry_info(Some(error.retry_delay().unwrap_or(RETRY_DELAY)));
    }
    if error.kind() == ErrorKind::TooNew {
        details.add_precondition_failure_violation("VERSION", "min_version", error.message());
    }
    for violation in error.violations() {
        details.add_bad_request_violation(violation.field, violation.description.clone());
    }
    Status::with_error_details(code, message(&error), details)
}

/// The message names the fields too: many clients show nothing else.
fn message(error: &Error) -> String {
    let mut message = error.message().to_owned();
    for (index, violation) in error.violations().iter().enumerate() {
        message.push_str(if index == 0 { ": " } else { "; " });
        if !violation.field.is_empty() {
            message.push_str(violation.field);
            message.push(' ');
        }
        message.push_str(&violation.description);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::FieldViolation;

    #[test]
    fn each_kind_has_its_code_and_reason_and_only_what_can_succeed_is_worth_another_try() {
        for (kind, code, reason, retry) in [
            (ErrorKind::Invalid, Code::InvalidArgument, "INVALID", false),
            (ErrorKind::TooLarge, Code::ResourceExhausted, "TOO_LARGE", false),
            (ErrorKind::Rejected, Code::FailedPrecondition, "REJECTED", false),
            (ErrorKind::Overloaded, Code::ResourceExhausted, "OVERLOADED", true),
            (ErrorKind::Unavailable, Code::Unavailable, "UNAVAILABLE", true),
            (ErrorKind::NotVisible, Code::Unavailable, "NOT_VISIBLE", true),
            (ErrorKind::TooNew, Code::FailedPrecondition, "TOO_NEW", false),
            (ErrorKind::Timeout, Code::DeadlineExceeded, "TIMEOUT", false),
            (ErrorKind::Internal, Code::Internal, "INTERNAL", false),
        ] {
            for (error, outcome) in [
                (Error::new(kind, "why"), "not_applied"),
                (Error::new(kind, "why").unknown(), "unknown"),
            ] {
                let status = to_status(error.because("password=secret"));
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
        let violation = |field, description: &'static str| FieldViolation {
            field,
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
}
