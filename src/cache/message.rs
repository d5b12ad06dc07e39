//! What replicas tell each other about a key: the message, as it goes through Redis.
//!
//! Owns the bytes, both ways. Does not own how a message travels (`redis` does) nor what is done when one is heard (the gateway). Invariants:
//! decoding is total, and what it does not know for certain is foreign; a message that decodes is the one that was encoded, byte for byte.
//!
//! What is told at once begins with the origin, eight bytes, big-endian; then its messages, at least one:
//!
//! | bytes | what |
//! |---|---|
//! | 0 | the kind: one of the constants below |
//! | 1..9 | the version, or the number of a recall, positive, big-endian; 0 where there is none |
//! | 9..11 | how many bytes follow, big-endian |
//! | 11.. | the namespace, NUL, the key or the prefix; both empty where there is none |

use std::fmt;

use crate::model::{ChangeKind, KEY_BYTES_MAX, Key, Version, check_namespace};

const HEAD_BYTES: usize = 11;

const OUTDATED: u8 = 1;
const DROPPED: u8 = 2;
const INVALIDATED: u8 = 3;
const INVALIDATED_PREFIX: u8 = 4;
const EPOCH_MOVED: u8 = 5;
const PUT: u8 = 6;
const DELETED: u8 = 7;
const RECALL: u8 = 8;
const RECALLED: u8 = 9;

/// Who sent a message: a process, from its start to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin(pub u64);

impl Origin {
    /// An origin that no other process has, but by a chance of one in 2^64.
    pub fn random() -> Origin {
        Origin(rand::random())
    }

    /// The bytes of an origin.
    pub(super) fn encode(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }

    /// Who sent a message, without a look at the rest of it.
    pub(super) fn of(bytes: &[u8]) -> Option<Origin> {
        bytes.first_chunk().map(|origin| Origin(u64::from_be_bytes(*origin)))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What a replica tells the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// This version was written: an older copy and a known absence are of no use any more.
    Written {
        /// The key.
        key: Key,
        /// What was written.
        version: Version,
        /// What that made of the key: `Invalidate` where that is not known.
        kind: ChangeKind,
    },
    /// Exactly this version was withdrawn.
    Dropped {
        /// The key.
        key: Key,
        /// What was withdrawn.
        version: Version,
    },
    /// Every copy of the key goes, whatever its version.
    Invalidated {
        /// The key.
        key: Key,
    },
    /// Every copy of the keys that begin so goes, whatever its version.
    InvalidatedPrefix {
        /// Their namespace.
        namespace: String,
        /// How they begin; empty: every key of the namespace.
        prefix: String,
    },
    /// The control row says something new.
    EpochMoved,
    /// Whoever has writes pending of the keys that begin so is to tell them again, and then that it has.
    Recall {
        /// Their namespace.
        namespace: String,
        /// How they begin; empty: every key of the namespace.
        prefix: String,
        /// What to say that under. Positive.
        number: i64,
    },
    /// All that was pending here was told since it was recalled under this number.
    Recalled {
        /// The number.
        number: i64,
    },
}

/// Bytes that this gateway would not have sent: somebody else's, or a newer one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the message is not one of this gateway's")]
pub struct Foreign;

impl Message {
    /// The bytes of a message, to follow its origin's. One with a namespace or a prefix that no key can have is foreign to whoever hears it.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, version, namespace, key) = match self {
            Message::Written { key, version, kind } => {
                let kind = match kind {
                    ChangeKind::Put => PUT,
                    ChangeKind::Delete => DELETED,
                    ChangeKind::Invalidate => OUTDATED,
                };
                (kind, version.get(), key.namespace(), key.key())
            }
            Message::Dropped { key, version } => (DROPPED, version.get(), key.namespace(), key.key()),
            Message::Invalidated { key } => (INVALIDATED, 0, key.namespace(), key.key()),
            Message::InvalidatedPrefix { namespace, prefix } => {
                (INVALIDATED_PREFIX, 0, namespace.as_str(), prefix.as_str())
            }
            Message::EpochMoved => (EPOCH_MOVED, 0, "", ""),
            Message::Recall {
                namespace,
                prefix,
                number,
            } => (RECALL, *number, namespace.as_str(), prefix.as_str()),
            Message::Recalled { number } => (RECALLED, *number, "", ""),
        };
        let names = namespace.len() + 1 + key.len();
        let mut bytes = Vec::with_capacity(HEAD_BYTES + names);
        bytes.push(kind);
        bytes.extend_from_slice(&version.to_be_bytes());
        // No key is so long.
        bytes.extend_from_slice(&u16::try_from(names).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend_from_slice(namespace.as_bytes());
        bytes.push(0);
        bytes.extend_from_slice(key.as_bytes());
        bytes
    }

    /// A message by itself, with its origin.
    pub fn told(&self, origin: Origin) -> Vec<u8> {
        [&origin.encode()[..], &self.encode()].concat()
    }

    /// Messages that are told at once, with their origin: at least one.
    pub fn told_together(messages: &[Message], origin: Origin) -> Vec<u8> {
        let mut bytes = origin.encode().to_vec();
        for message in messages {
            bytes.extend(message.encode());
        }
        bytes
    }

    /// The messages that the bytes are, and who sent them.
    ///
    /// # Errors
    /// [`Foreign`] for anything that is not an origin and what [`Message::encode`] makes of valid messages.
    pub fn decode(bytes: &[u8]) -> Result<(Origin, Vec<Message>), Foreign> {
        let origin = Origin::of(bytes).ok_or(Foreign)?;
        let mut rest = &bytes[8..];
        let mut messages = Vec::new();
        while messages.is_empty() || !rest.is_empty() {
            let (message, behind) = Message::decode_first(rest)?;
            messages.push(message);
            rest = behind;
        }
        Ok((origin, messages))
    }

    /// The first of the messages, and what is behind it.
    fn decode_first(bytes: &[u8]) -> Result<(Message, &[u8]), Foreign> {
        let (kind, rest) = bytes.split_first().ok_or(Foreign)?;
        let (version, rest) = rest.split_first_chunk().ok_or(Foreign)?;
        let version = i64::from_be_bytes(*version);
        let (length, rest) = rest.split_first_chunk().ok_or(Foreign)?;
        let length = usize::from(u16::from_be_bytes(*length));
        let (names, behind) = rest.split_at_checked(length).ok_or(Foreign)?;
        let names = str::from_utf8(names).map_err(|_| Foreign)?;
        let (namespace, name) = names.split_once('\0').ok_or(Foreign)?;
        let key = || Key::new(namespace, name).map_err(|_| Foreign);
        let written = |kind| {
            Ok(Message::Written {
                key: key()?,
                version: Version::new(version).ok_or(Foreign)?,
                kind,
            })
        };
        let message = match (*kind, version) {
            (PUT, _) => written(ChangeKind::Put)?,
            (DELETED, _) => written(ChangeKind::Delete)?,
            (OUTDATED, _) => written(ChangeKind::Invalidate)?,
            (DROPPED, version) => Message::Dropped {
                key: key()?,
                version: Version::new(version).ok_or(Foreign)?,
            },
            (INVALIDATED, 0) => Message::Invalidated { key: key()? },
            (INVALIDATED_PREFIX, 0) if check_namespace(namespace).is_ok() && is_prefix(name) => {
                Message::InvalidatedPrefix {
                    namespace: namespace.to_owned(),
                    prefix: name.to_owned(),
                }
            }
            (EPOCH_MOVED, 0) if names == "\0" => Message::EpochMoved,
            (RECALL, number @ 1..) if check_namespace(namespace).is_ok() && is_prefix(name) => Message::Recall {
                namespace: namespace.to_owned(),
                prefix: name.to_owned(),
                number,
            },
            (RECALLED, number @ 1..) if names == "\0" => Message::Recalled { number },
            _ => return Err(Foreign),
        };
        Ok((message, behind))
    }
}

/// Whether a key can begin so.
fn is_prefix(text: &str) -> bool {
    text.len() <= KEY_BYTES_MAX && !text.contains('\0')
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn key() -> impl Strategy<Value = Key> {
        let name = prop_oneof![
            10 => "[^\0]{1,40}",
            1 => Just("k".repeat(KEY_BYTES_MAX)),
        ];
        ("[a-z][a-z0-9_.-]{0,62}", name).prop_map(|(namespace, name)| Key::new(&namespace, &name).expect("valid"))
    }

    fn message() -> impl Strategy<Value = Message> {
        let version = || (1..=i64::MAX).prop_map(|number| Version::new(number).expect("positive"));
        let kind = prop_oneof![
            Just(ChangeKind::Put),
            Just(ChangeKind::Delete),
            Just(ChangeKind::Invalidate)
        ];
        prop_oneof![
            (key(), version(), kind).prop_map(|(key, version, kind)| Message::Written { key, version, kind }),
            (key(), version()).prop_map(|(key, version)| Message::Dropped { key, version }),
            key().prop_map(|key| Message::Invalidated { key }),
            (key(), any::<bool>()).prop_map(|(key, whole)| Message::InvalidatedPrefix {
                namespace: key.namespace().to_owned(),
                prefix: if whole { String::new() } else { key.key().to_owned() },
            }),
            Just(Message::EpochMoved),
            (key(), any::<bool>(), 1..=i64::MAX).prop_map(|(key, whole, number)| Message::Recall {
                namespace: key.namespace().to_owned(),
                prefix: if whole { String::new() } else { key.key().to_owned() },
                number,
            }),
            (1..=i64::MAX).prop_map(|number| Message::Recalled { number }),
        ]
    }

    fn told(origin: Origin, messages: &[Message]) -> Vec<u8> {
        Message::told_together(messages, origin)
    }

    proptest! {
        #[test]
        fn messages_come_back_as_they_went(messages in vec(message(), 1..4), origin in any::<u64>()) {
            let bytes = told(Origin(origin), &messages);
            prop_assert_eq!(Message::decode(&bytes), Ok((Origin(origin), messages)));
        }

        #[test]
        fn what_decodes_is_what_would_be_sent(
            message in message(), cut in any::<prop::sample::Index>(), changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            tail in vec(any::<u8>(), 0..8)
        ) {
            let mut bytes = message.told(Origin(7));
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.extend_from_slice(&tail);
            bytes.truncate(cut.index(bytes.len() * 3));
            if let Ok((origin, messages)) = Message::decode(&bytes) {
                prop_assert_eq!(told(origin, &messages), bytes);
            }
        }

        #[test]
        fn what_was_cut_short_within_a_message_is_foreign(message in message(), cut in any::<prop::sample::Index>()) {
            let bytes = message.told(Origin(7));
            prop_assert_eq!(Message::decode(&bytes[..cut.index(bytes.len())]), Err(Foreign));
        }

        #[test]
        fn any_bytes_are_a_message_or_foreign(bytes in vec(any::<u8>(), 0..64)) {
            if let Ok((origin, messages)) = Message::decode(&bytes) {
                prop_assert_eq!(told(origin, &messages), bytes);
            }
        }
    }

    #[test]
    fn what_no_gateway_sends_is_foreign() {
        let bytes = |kind: u8, version: i64, names: &str| {
            let mut bytes = vec![0; 8];
            bytes.push(kind);
            bytes.extend_from_slice(&version.to_be_bytes());
            let length = u16::try_from(names.len()).expect("short");
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(names.as_bytes());
            bytes
        };
        let long = format!("orders\0{}", "k".repeat(KEY_BYTES_MAX + 1));
        for (kind, version, names) in [
            (0, 0, "\0"),
            (10, 0, "\0"),
            (PUT, 0, "orders\0k"),
            (DELETED, -1, "orders\0k"),
            (DROPPED, -1, "orders\0k"),
            (INVALIDATED, 1, "orders\0k"),
            (INVALIDATED_PREFIX, 1, "orders\0k"),
            (EPOCH_MOVED, 1, "\0"),
            (EPOCH_MOVED, 0, "orders\0k"),
            (EPOCH_MOVED, 0, ""),
            (OUTDATED, 1, "orders"),
            (PUT, 1, "orders\0"),
            (DELETED, 1, "Orders\0k"),
            (PUT, 1, &long),
            (INVALIDATED, 0, "orders\0a\0b"),
            (INVALIDATED_PREFIX, 0, "\0k"),
            (INVALIDATED_PREFIX, 0, "orders\0a\0b"),
            (INVALIDATED_PREFIX, 0, &long),
            (RECALL, 0, "orders\0k"),
            (RECALL, 1, "\0k"),
            (RECALL, 1, &long),
            (RECALLED, 0, "\0"),
            (RECALLED, 1, "orders\0k"),
        ] {
            let bytes = bytes(kind, version, names);
            assert_eq!(Message::decode(&bytes), Err(Foreign), "{kind} {version} {names:?}");
        }
    }
}
