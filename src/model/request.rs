//! Request ids: what makes a write that is sent twice be written once.
//!
//! Owns what a valid id is, and what is remembered of a request: what it asked for, as a fingerprint, and how it was first answered. Owns
//! no table of them. An id is unique within its namespace.

use std::{fmt, sync::Arc};

use super::{Key, Timestamp, Version};

/// The longest request id, in bytes of UTF-8.
pub const REQUEST_ID_BYTES_MAX: usize = 64;

/// What a request is charged beyond its id, wherever bytes are bounded: its fingerprint, its end, and what frames them in a record of the
/// journal.
const REQUEST_FRAME_BYTES: usize = 32;

/// What the ids begin with that a gateway made up.
const MADE_UP: &str = "tidegate:";

/// A request id: 1 to 64 bytes without NUL. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// An id as a caller sent it.
    ///
    /// # Errors
    /// The rule that it breaks, in words for the caller.
    pub fn new(id: &str) -> Result<RequestId, &'static str> {
        if id.is_empty() {
            return Err("must not be empty");
        }
        if id.len() > REQUEST_ID_BYTES_MAX {
            return Err("must have at most 64 bytes of UTF-8");
        }
        if id.contains('\0') {
            return Err("must not hold the NUL character");
        }
        if id.starts_with(MADE_UP) {
            return Err("must not begin with \"tidegate:\", as the gateway's own do");
        }
        Ok(RequestId(id.into()))
    }

    /// One that nobody has sent, for what the gateway tries again by itself.
    pub fn made_up() -> RequestId {
        RequestId(format!("{MADE_UP}{:032x}", rand::random::<u128>()).into())
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for RequestId {
    /// Shows the size only: an id may name a person.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RequestId({} bytes)", self.0.len())
    }
}

/// What a request asked for, as a hash: two requests with one id are the same, or one of them is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 16]);

/// A write that is to be written once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// What it asks for.
    pub fingerprint: Fingerprint,
    /// Until when it is remembered, by the clock of the gateway that took it.
    pub ends_at: Timestamp,
}

impl Request {
    /// What [`Request::bytes`] is at most.
    pub const BYTES_MAX: usize = REQUEST_ID_BYTES_MAX + REQUEST_FRAME_BYTES;

    /// What it is charged wherever bytes are bounded.
    pub fn bytes(&self) -> usize {
        self.id.as_str().len() + REQUEST_FRAME_BYTES
    }
}

/// How a request was first answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The version of its write.
    pub version: Version,
    /// What the counter became, of an increment.
    pub counter: Option<i64>,
    /// When the record ceases to exist.
    pub expires_at: Option<Timestamp>,
}

/// A request that was answered: what is remembered, for as long as its window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// The request.
    pub request: Request,
    /// Its answer.
    pub answer: Answer,
}

/// An answered request with the key that it wrote, whose namespace it is named in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyedAnswer {
    /// What was written.
    pub key: Key,
    /// What is remembered.
    pub answered: Answered,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_short_text_without_nul() {
        for bad in ["", "a\0b", &"x".repeat(65)] {
            assert!(RequestId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "é", &"x".repeat(64)] {
            assert_eq!(RequestId::new(good).expect("valid").as_str(), good);
        }
        assert!(
            RequestId::new(RequestId::made_up().as_str()).is_err(),
            "it is the gateway's own"
        );
        assert_ne!(RequestId::made_up(), RequestId::made_up());
    }

    #[test]
    fn debug_output_shows_no_id() {
        let id = RequestId::new("secret").expect("valid");
        assert!(!format!("{id:?}").contains("secret"));
    }
}
