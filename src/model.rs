//! The vocabulary: keys, versions, entries, tags, writes, conditions, request ids.
//!
//! Owns what is valid: a [`Key`] or a [`Version`] that exists is a valid one. Of two entries of a key the one with the higher
//! version stands: that is the one rule, and each tier applies it. Owns no I/O, no clock and no tier.

mod condition;
mod request;
mod tags;

pub use condition::Condition;
pub use request::{Answer, Answered, Fingerprint, KeyedAnswer, REQUEST_ID_BYTES_MAX, Request, RequestId};
pub use tags::{BrokenTag, TAG_BYTES_MAX, TAGS_MAX, Tags, check_tag};

use std::{
    fmt,
    hash::{Hash, Hasher},
    num::NonZeroI64,
    sync::Arc,
};

use bytes::Bytes;

/// The longest namespace, in bytes (all of its characters are ASCII).
pub const NAMESPACE_BYTES_MAX: usize = 63;

/// The longest key, in bytes of UTF-8: both parts of the primary key must fit one PostgreSQL index row.
pub const KEY_BYTES_MAX: usize = 1024;

/// What is charged for an entry beyond its key and value wherever bytes are bounded: maps, orders, versions, times, allocations. Measured
/// over 100,000 small pending writes, and rounded up.
const ENTRY_OVERHEAD_BYTES: usize = 512;

/// A namespace and a key within it, both known to be valid.
///
/// Ordered by namespace, then key, byte by byte: the order of the stores' primary key. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The namespace, NUL, the key. NUL is in neither, so the text is injective, and it sorts below every other byte.
    text: Arc<str>,
    namespace_len: u8,
}

/// Which part of a [`Key`] is wrong, and why, in words for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidKey {
    /// What is wrong with the namespace.
    pub namespace: Option<&'static str>,
    /// What is wrong with the key.
    pub key: Option<&'static str>,
}

impl Key {
    /// A key of a namespace.
    ///
    /// # Errors
    /// Names every part that breaks its rule: a namespace is `[a-z][a-z0-9_.-]{0,62}`, a key 1 to 1,024 bytes without NUL.
    pub fn new(namespace: &str, key: &str) -> Result<Key, InvalidKey> {
        let invalid = InvalidKey {
            namespace: check_namespace(namespace).err(),
            key: check_key(key).err(),
        };
        if invalid.namespace.is_some() || invalid.key.is_some() {
            return Err(invalid);
        }
        let mut text = String::with_capacity(namespace.len() + 1 + key.len());
        text.push_str(namespace);
        text.push('\0');
        text.push_str(key);
        // At most 63, checked above.
        Ok(Key {
            text: text.into(),
            namespace_len: namespace.len() as u8,
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.text[..usize::from(self.namespace_len)]
    }

    /// The key within its namespace.
    pub fn key(&self) -> &str {
        &self.text[usize::from(self.namespace_len) + 1..]
    }

    /// The size of both parts together, in bytes.
    pub fn bytes(&self) -> usize {
        self.text.len() - 1
    }

    /// The namespace, NUL, the key: texts are ordered as their keys are.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.text.as_bytes());
    }
}

impl fmt::Debug for Key {
    /// Shows the namespace only: a key may name a person, and debug output ends up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({}, {} bytes)", self.namespace(), self.key().len())
    }
}

/// Checks a namespace: `[a-z][a-z0-9_.-]{0,62}`.
///
/// # Errors
/// The rule that it breaks, in words for the caller.
pub fn check_namespace(namespace: &str) -> Result<(), &'static str> {
    let mut bytes = namespace.bytes();
    match bytes.next() {
        None => return Err("must not be empty"),
        Some(b'a'..=b'z') => {}
        Some(_) => return Err("must begin with a lower-case letter (a-z)"),
    }
    if namespace.len() > NAMESPACE_BYTES_MAX {
        return Err("must have at most 63 characters");
    }
    if !bytes.all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-')) {
        return Err("may hold only lower-case letters, digits, '_', '.' and '-'");
    }
    Ok(())
}

fn check_key(key: &str) -> Result<(), &'static str> {
    if key.is_empty() {
        return Err("must not be empty");
    }
    if key.len() > KEY_BYTES_MAX {
        return Err("must have at most 1,024 bytes of UTF-8");
    }
    if key.contains('\0') {
        return Err("must not hold the NUL character");
    }
    Ok(())
}

/// What a change made of a key, as far as it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It was written.
    Put,
    /// It was deleted.
    Delete,
    /// What was known of it may not hold any more.
    Invalidate,
}

impl ChangeKind {
    /// What the write of an entry makes of its key.
    pub fn of(entry: &Entry) -> ChangeKind {
        if entry.value.is_some() {
            ChangeKind::Put
        } else {
            ChangeKind::Delete
        }
    }
}

/// A point in time, in milliseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// This time and a duration, saturating at the end of time.
    #[must_use]
    pub fn after(self, duration: std::time::Duration) -> Timestamp {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Timestamp(self.0.saturating_add(millis))
    }

    /// How long ago `earlier` was; zero if it is not earlier.
    pub fn since(self, earlier: Timestamp) -> std::time::Duration {
        let millis = self.0.saturating_sub(earlier.0).max(0);
        std::time::Duration::from_millis(millis.unsigned_abs())
    }
}

/// The place of a write among all writes of its key: 42 bits of milliseconds since 2024-01-01, 11 bits of counter, 10 bits of
/// node. Positive, so it is one `bigint` everywhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(NonZeroI64);

/// 2024-01-01T00:00:00Z in milliseconds since the Unix epoch: where versions begin.
pub const VERSION_EPOCH_MILLIS: i64 = 1_704_067_200_000;

/// The bits of a version that name the node.
pub const NODE_BITS: u32 = 10;
/// The bits of a version that count within a millisecond.
pub const COUNTER_BITS: u32 = 11;

impl Version {
    /// A version from its number; `None` unless positive.
    pub fn new(number: i64) -> Option<Version> {
        if number <= 0 {
            return None;
        }
        NonZeroI64::new(number).map(Version)
    }

    /// The number: what is stored and sent.
    pub fn get(self) -> i64 {
        self.0.get()
    }

    /// The gateway that stamped it.
    pub fn node(self) -> u16 {
        // Ten bits.
        (self.get() & ((1 << NODE_BITS) - 1)) as u16
    }

    /// When it was stamped, by the clock of the gateway that did.
    pub fn stamped_at(self) -> Timestamp {
        Timestamp((self.get() >> (NODE_BITS + COUNTER_BITS)) + VERSION_EPOCH_MILLIS)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Version({})", self.get())
    }
}

/// A time of the shared cache, or of one namespace in it: part of every key there, so a new one empties it. Positive and random; two are
/// the same or not, and neither is later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Epoch(pub i64);

impl Epoch {
    /// An epoch that never was.
    pub fn random() -> Epoch {
        Epoch(rand::random_range(1..=i64::MAX))
    }
}

/// What one write made of a key.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// The write's version.
    pub version: Version,
    /// The value; `None` is a tombstone, what a delete leaves.
    pub value: Option<Bytes>,
    /// When the record ceases to exist: from then on the entry counts as a tombstone.
    pub expires_at: Option<Timestamp>,
}

impl Entry {
    /// Whether a reader sees a record at `now`: there is a value, and its expiry is not reached.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.value.is_some() && self.expires_at.is_none_or(|at| now < at)
    }

    /// The size of the value, in bytes.
    pub fn value_bytes(&self) -> usize {
        self.value.as_ref().map_or(0, Bytes::len)
    }
}

impl fmt::Debug for Entry {
    /// Shows the size of the value, never the value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("version", &self.version)
            .field("value_bytes", &self.value.as_ref().map(Bytes::len))
            .field("expires_at", &self.expires_at)
            .finish()
    }
}

/// The tier that answered a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// L1, the cache in this process.
    L1,
    /// A write accepted here that the store does not have yet.
    Pending,
    /// L2, Redis.
    L2,
    /// The store.
    Store,
}

/// An entry on its way to a tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// What it is written under.
    pub key: Key,
    /// What is written.
    pub entry: Entry,
    /// What the record is tagged with from now on, in the store alone: those of an earlier write of the key go. A tombstone has none.
    pub tags: Tags,
    /// The requests that are answered once this is durable: its own, if it has an id, and those of older writes of the key that it stands for.
    pub requests: Vec<Answered>,
}

impl Write {
    /// [`weight`].
    pub fn weight(&self) -> usize {
        weight(&self.key, self.content_bytes())
    }

    /// What is remembered with it, and under which key.
    pub fn answers(&self) -> impl Iterator<Item = KeyedAnswer> {
        let keyed = |answered: &Answered| KeyedAnswer {
            key: self.key.clone(),
            answered: answered.clone(),
        };
        self.requests.iter().map(keyed)
    }

    /// [`content_bytes`], and its request ids.
    pub fn content_bytes(&self) -> usize {
        let ids: usize = self.requests.iter().map(|answered| answered.request.bytes()).sum();
        content_bytes(self.entry.value.as_ref(), &self.tags) + ids
    }
}

/// The size of what a write holds beside its key and its request ids ([`Request::bytes`]): its value and its tags, in bytes.
pub fn content_bytes(value: Option<&Bytes>, tags: &Tags) -> usize {
    value.map_or(0, Bytes::len) + tags.bytes()
}

/// What a write is charged wherever bytes are bounded.
pub fn weight(key: &Key, content_bytes: usize) -> usize {
    key.bytes() + content_bytes + ENTRY_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_two_parts() {
        let key = Key::new("orders", "a:b").expect("valid");
        assert_eq!((key.namespace(), key.key()), ("orders", "a:b"));
        assert_eq!(key.bytes(), 9);
    }

    #[test]
    fn keys_sort_by_namespace_then_key_byte_by_byte() {
        let order = [("a", "z"), ("a.b", "a"), ("ab", "A"), ("ab", "a"), ("ab", "é")];
        let keys: Vec<Key> = order.iter().map(|(n, k)| Key::new(n, k).expect("valid")).collect();
        assert!(keys.is_sorted());
    }

    #[test]
    fn invalid_parts_are_both_named() {
        let invalid = Key::new("Orders", "").expect_err("both are wrong");
        assert!(invalid.namespace.is_some() && invalid.key.is_some());
        for (namespace, key) in [
            ("", "k"),
            ("1a", "k"),
            ("a b", "k"),
            ("é", "k"),
            (&"a".repeat(64), "k"),
            ("a", ""),
            ("a", "a\0b"),
            ("a", &"k".repeat(1025)),
        ] {
            assert!(Key::new(namespace, key).is_err(), "{namespace:?} {key:?}");
        }
        assert!(Key::new(&"a".repeat(63), &"k".repeat(1024)).is_ok());
    }

    #[test]
    fn debug_output_shows_no_key_no_value_and_no_tag() {
        let write = Write {
            key: Key::new("orders", "secret-key").expect("valid"),
            entry: Entry {
                version: Version::new(1).expect("positive"),
                value: Some(Bytes::from_static(b"secret-value")),
                expires_at: None,
            },
            tags: Tags::new(&["secret-tag"]).expect("valid"),
            requests: Vec::new(),
        };
        assert!(!format!("{write:?}").contains("secret"));
    }

    #[test]
    fn a_version_is_positive() {
        assert!(Version::new(0).is_none() && Version::new(-1).is_none());
        assert_eq!(Version::new(i64::MAX).map(Version::node), Some(1023));
    }
}
