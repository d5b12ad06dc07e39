//! Dead letters, as operators look at them and deal with them.
//!
//! Owns what is known of a letter and which are asked for. Does not own how one comes to be (the drain's), nor what a retry is (the
//! gateway's). Invariant: the value of a letter is had only where it is asked for.

use bytes::Bytes;

use crate::{
    model::{Entry, Key, Tags, Timestamp, Version, Write},
    store::{StoreError, StoreErrorKind},
};

/// A dead letter as the store keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptLetter {
    /// Its id: later ones have higher ids.
    pub id: i64,
    /// The key of the write.
    pub key: Key,
    /// The version of the write.
    pub version: Version,
    /// The length of its value; `None` deletes.
    pub value_bytes: Option<usize>,
    /// Its value, where that was asked for.
    pub value: Option<Bytes>,
    /// When the record ceases to exist.
    pub expires_at: Option<Timestamp>,
    /// What the record is tagged with.
    pub tags: Tags,
    /// The store's code for the last refusal.
    pub code: Option<String>,
    /// The store's message for it.
    pub reason: String,
    /// How often it was refused.
    pub attempts: u32,
    /// When it became a dead letter, by the store's clock.
    pub buried_at: Timestamp,
    /// When a retry failed last, by the store's clock.
    pub retried_at: Option<Timestamp>,
}

impl KeptLetter {
    /// The write, of a letter with its value.
    pub fn write(&self) -> Write {
        Write {
            key: self.key.clone(),
            entry: Entry {
                version: self.version,
                value: self.value.clone(),
                expires_at: self.expires_at,
            },
            tags: self.tags.clone(),
            requests: Vec::new(),
        }
    }
}

/// Which letters are asked for: in the order of their ids.
#[derive(Debug, Clone, Copy)]
pub struct LetterRange<'a> {
    /// Those of this namespace; `None`: of all.
    pub namespace: Option<&'a str>,
    /// Those with ids above this.
    pub after: i64,
    /// And up to this.
    pub up_to: i64,
    /// At most so many. If they are fewer there are no more.
    pub limit: u32,
    /// Whether their values come along: whoever asks bounds what they have together.
    pub values: bool,
}

/// A row that no gateway wrote.
pub(super) fn no_letter() -> StoreError {
    let message = "tidegate_dead_letters holds a row that no gateway wrote: mend or delete it";
    StoreError::new(StoreErrorKind::Transient, message)
}
