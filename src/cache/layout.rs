//! How a copy is laid out as a Redis value.
//!
//! Owns the bytes, both ways. Does not own the Redis key, nor when Redis forgets it (`redis` does). Invariants: the version comes
//! first in every format, so that a script can compare without knowing more; decoding is total: what it does not know for
//! certain is foreign, and a miss.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | version, positive, big-endian |
//! | 8 | mark and format: `0xD0` + 1. The mark tells our values from others; it stays in every format |
//! | 9 | flags: 1 = tombstone, 2 = has an expiry; all others 0 |
//! | 10..18 | `loaded_at`, milliseconds since the Unix epoch, big-endian, as the next two |
//! | 18..26 | `fresh_until` |
//! | 26..34 | `expires_at`; 0 without the flag |
//! | 34..42 | token; 0, none, in this format |
//! | 42.. | the value, byte for byte; nothing for a tombstone |

use bytes::Bytes;

use crate::{
    cache::Copy,
    model::{Entry, Timestamp, Version},
};

/// The size of the header, in bytes.
pub(super) const HEADER_BYTES: usize = 42;

/// The mark of our values and this format's number.
const FORMAT: u8 = 0xD1;

const TOMBSTONE: u8 = 1;
const EXPIRES: u8 = 2;

/// A value that this gateway did not write, or one of a newer format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value is not one of this gateway's")]
pub(super) struct Foreign;

/// The header that goes before an entry's value.
pub(super) fn header(entry: &Entry, loaded_at: Timestamp, fresh_until: Timestamp) -> [u8; HEADER_BYTES] {
    let mut flags = 0;
    if entry.value.is_none() {
        flags |= TOMBSTONE;
    }
    if entry.expires_at.is_some() {
        flags |= EXPIRES;
    }
    let mut header = [0; HEADER_BYTES];
    header[0..8].copy_from_slice(&entry.version.get().to_be_bytes());
    header[8] = FORMAT;
    header[9] = flags;
    header[10..18].copy_from_slice(&loaded_at.0.to_be_bytes());
    header[18..26].copy_from_slice(&fresh_until.0.to_be_bytes());
    header[26..34].copy_from_slice(&entry.expires_at.map_or(0, |at| at.0).to_be_bytes());
    header
}

/// The copy that a Redis value holds. Its value shares the given bytes.
///
/// # Errors
/// [`Foreign`] for anything that [`header`] and a value do not make.
pub(super) fn decode(value: Bytes) -> Result<Copy, Foreign> {
    let header: [u8; HEADER_BYTES] = value
        .get(..HEADER_BYTES)
        .and_then(|header| header.try_into().ok())
        .ok_or(Foreign)?;
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        i64::from_be_bytes(bytes)
    };
    let version = Version::new(number(0)).ok_or(Foreign)?;
    let flags = header[9];
    if header[8] != FORMAT || flags & !(TOMBSTONE | EXPIRES) != 0 {
        return Err(Foreign);
    }
    let payload = value.slice(HEADER_BYTES..);
    let value = match flags & TOMBSTONE {
        0 => Some(payload),
        _ if payload.is_empty() => None,
        _ => return Err(Foreign),
    };
    let expires_at = match (flags & EXPIRES, number(26)) {
        (0, 0) => None,
        (0, _) => return Err(Foreign),
        (_, at) => Some(Timestamp(at)),
    };
    Ok(Copy {
        entry: Some(Entry {
            version,
            value,
            expires_at,
        }),
        loaded_at: Timestamp(number(10)),
        fresh_until: Timestamp(number(18)),
    })
}

/// The version that a script answered with.
///
/// # Errors
/// [`Foreign`] unless the answer is a version's eight bytes.
pub(super) fn version(answer: &[u8]) -> Result<Version, Foreign> {
    let bytes = answer.try_into().map_err(|_| Foreign)?;
    Version::new(i64::from_be_bytes(bytes)).ok_or(Foreign)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    fn encode(copy: &Copy) -> Vec<u8> {
        let entry = copy.entry.as_ref().expect("an entry");
        let mut value = header(entry, copy.loaded_at, copy.fresh_until).to_vec();
        value.extend_from_slice(entry.value.as_deref().unwrap_or_default());
        value
    }

    prop_compose! {
        fn copies()(
            version in 1..=i64::MAX,
            value in option::of(vec(any::<u8>(), 0..64)),
            expires_at in option::of(any::<i64>()),
            loaded_at in any::<i64>(),
            fresh_until in any::<i64>(),
        ) -> Copy {
            Copy {
                entry: Some(Entry {
                    version: Version::new(version).expect("positive"),
                    value: value.map(Bytes::from),
                    expires_at: expires_at.map(Timestamp),
                }),
                loaded_at: Timestamp(loaded_at),
                fresh_until: Timestamp(fresh_until),
            }
        }
    }

    proptest! {
        #[test]
        fn a_copy_comes_back_as_it_went(copy in copies()) {
            prop_assert_eq!(decode(Bytes::from(encode(&copy))), Ok(copy));
        }

        #[test]
        fn a_cut_header_is_foreign(copy in copies(), cut in 0..HEADER_BYTES) {
            let value = encode(&copy);
            prop_assert_eq!(decode(Bytes::from(value).slice(..cut)), Err(Foreign));
        }

        #[test]
        fn what_decodes_is_what_would_be_written(
            start in copies(), at in 0..HEADER_BYTES, byte in any::<u8>(), tail in vec(any::<u8>(), 0..64)
        ) {
            let mut value = encode(&start);
            value[at] = byte;
            value.extend_from_slice(&tail);
            // The token is room for a later format: it is not read.
            value[34..HEADER_BYTES].fill(0);
            if let Ok(copy) = decode(Bytes::from(value.clone())) {
                prop_assert_eq!(encode(&copy), value);
            }
        }

        #[test]
        fn no_bytes_at_all_upset_it(value in vec(any::<u8>(), 0..128)) {
            let _ = decode(Bytes::from(value.clone()));
            let _ = version(&value);
        }
    }

    #[test]
    fn a_newer_format_and_another_mark_are_foreign() {
        let copy = decode_of(|_| ());
        assert!(copy.is_ok());
        for byte in (0..=u8::MAX).filter(|byte| *byte != FORMAT) {
            assert_eq!(decode_of(|value| value[8] = byte), Err(Foreign));
        }
        for flag in 2..8 {
            assert_eq!(decode_of(|value| value[9] |= 1 << flag), Err(Foreign));
        }
        assert_eq!(decode_of(|value| value[0] = 0x80), Err(Foreign), "a negative version");
        assert_eq!(decode_of(|value| value[9] = TOMBSTONE), Err(Foreign), "with a value");
    }

    fn decode_of(change: impl FnOnce(&mut [u8])) -> Result<Copy, Foreign> {
        let mut value = encode(&Copy {
            entry: Some(Entry {
                version: Version::new(7).expect("positive"),
                value: Some(Bytes::from_static(b"value")),
                expires_at: None,
            }),
            loaded_at: Timestamp(1),
            fresh_until: Timestamp(2),
        });
        change(&mut value);
        decode(Bytes::from(value))
    }
}
