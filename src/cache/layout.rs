//! How a copy is laid out as a Redis value.
//!
//! Owns the bytes, both ways. Does not own the Redis key, nor when Redis forgets it (`redis` does). Invariant: decoding is total: what it
//! does not know for certain is foreign, and a miss. The script (`redis/slot.lua`) reads and writes the same bytes, and takes what is of
//! another format for nothing; so a new format comes with keys of its own.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | version, big-endian; 0 where no entry stands and none has gone |
//! | 8 | mark and format: `0xD0` + 2. The mark tells our values from others; it stays in every format |
//! | 9 | flags: 1 = tombstone, 2 = has an expiry, 4 = a known absence, 8 = a floor (and no entry, either); all others 0 |
//! | 10..18 | `loaded_at`, milliseconds since the Unix epoch, big-endian, as the next two |
//! | 18..26 | `fresh_until` |
//! | 26..34 | `expires_at`; 0 without the flag |
//! | 34..42 | the token of who will land; 0 for none |
//! | 42..50 | until when others wait for it, by Redis's clock; 0 without a token |
//! | 50.. | the value, byte for byte; nothing for a tombstone, and where no entry stands |
//!
//! A floor is the version of what went from the slot, which is otherwise empty: what is older may still be on its way there, and must not enter.

use bytes::Bytes;

use crate::{
    cache::Copy,
    model::{Entry, Timestamp, Version},
};

/// The size of the header, in bytes.
pub(super) const HEADER_BYTES: usize = 50;

/// The mark of our values and this format's number.
const FORMAT: u8 = 0xD2;

const TOMBSTONE: u8 = 1;
const EXPIRES: u8 = 2;
const ABSENT: u8 = 4;
const FLOOR: u8 = 8;

/// A value that this gateway did not write, or one of a newer format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value is not one of this gateway's")]
pub(super) struct Foreign;

/// The header that goes before the value of a copy. It holds no token: a landing clears it.
pub(super) fn header(copy: &Copy) -> [u8; HEADER_BYTES] {
    let (mut flags, mut expires_at) = (0, 0);
    match &copy.entry {
        None => flags |= ABSENT,
        Some(entry) => {
            if entry.value.is_none() {
                flags |= TOMBSTONE;
            }
            if let Some(at) = entry.expires_at {
                flags |= EXPIRES;
                expires_at = at.0;
            }
        }
    }
    let mut header = [0; HEADER_BYTES];
    header[0..8].copy_from_slice(&copy.version().map_or(0, Version::get).to_be_bytes());
    header[8] = FORMAT;
    header[9] = flags;
    header[10..18].copy_from_slice(&copy.loaded_at.0.to_be_bytes());
    header[18..26].copy_from_slice(&copy.fresh_until.0.to_be_bytes());
    header[26..34].copy_from_slice(&expires_at.to_be_bytes());
    header
}

/// The copy that a slot holds, if it holds more than a token or a floor. Its value shares the given bytes.
///
/// # Errors
/// [`Foreign`] for anything that [`header`], a value and the script do not make.
pub(super) fn decode(slot: Bytes) -> Result<Option<Copy>, Foreign> {
    let header: [u8; HEADER_BYTES] = slot
        .get(..HEADER_BYTES)
        .and_then(|header| header.try_into().ok())
        .ok_or(Foreign)?;
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        i64::from_be_bytes(bytes)
    };
    let flags = header[9];
    if header[8] != FORMAT {
        return Err(Foreign);
    }
    let payload = slot.slice(HEADER_BYTES..);
    let is_bare = payload.is_empty() && header[10..34] == [0; 24];
    let entry = match (Version::new(number(0)), flags) {
        // Nothing but a token, or a floor.
        (None, 0) if number(0) == 0 && is_bare => return Ok(None),
        (Some(_), FLOOR) if is_bare => return Ok(None),
        (None, ABSENT) if number(0) == 0 && payload.is_empty() && number(26) == 0 => None,
        (Some(version), flags) if flags & !(TOMBSTONE | EXPIRES) == 0 => {
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
            Some(Entry {
                version,
                value,
                expires_at,
            })
        }
        _ => return Err(Foreign),
    };
    Ok(Some(Copy {
        entry,
        loaded_at: Timestamp(number(10)),
        fresh_until: Timestamp(number(18)),
    }))
}

/// The version that the script answered with; `None` for eight zeros: nothing stands.
///
/// # Errors
/// [`Foreign`] unless the answer is eight bytes that are either.
pub(super) fn version(answer: &[u8]) -> Result<Option<Version>, Foreign> {
    let number = i64::from_be_bytes(answer.try_into().map_err(|_| Foreign)?);
    match Version::new(number) {
        None if number != 0 => Err(Foreign),
        version => Ok(version),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    fn encode(copy: &Copy) -> Vec<u8> {
        let mut value = header(copy).to_vec();
        value.extend_from_slice(copy.entry.as_ref().and_then(|e| e.value.as_deref()).unwrap_or_default());
        value
    }

    prop_compose! {
        fn entries()(
            version in 1..=i64::MAX,
            value in option::of(vec(any::<u8>(), 0..64)),
            expires_at in option::of(any::<i64>()),
        ) -> Entry {
            Entry {
                version: Version::new(version).expect("positive"),
                value: value.map(Bytes::from),
                expires_at: expires_at.map(Timestamp),
            }
        }
    }

    prop_compose! {
        fn copies()(entry in option::of(entries()), loaded_at in any::<i64>(), fresh_until in any::<i64>()) -> Copy {
            Copy { entry, loaded_at: Timestamp(loaded_at), fresh_until: Timestamp(fresh_until) }
        }
    }

    proptest! {
        #[test]
        fn a_copy_comes_back_as_it_went_whatever_token_is_beside_it(copy in copies(), token in any::<[u8; 16]>()) {
            let mut slot = encode(&copy);
            slot[34..HEADER_BYTES].copy_from_slice(&token);
            prop_assert_eq!(decode(Bytes::from(slot)), Ok(Some(copy)));
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
            // The token is not part of the copy.
            value[34..HEADER_BYTES].fill(0);
            if let Ok(Some(copy)) = decode(Bytes::from(value.clone())) {
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
    fn a_floor_is_no_copy() {
        let mut slot = [0; HEADER_BYTES];
        slot[7..10].copy_from_slice(&[7, FORMAT, FLOOR]);
        slot[34..].fill(7);
        assert_eq!(decode(Bytes::copy_from_slice(&slot)), Ok(None));
        for at in (0..1).chain(9..34) {
            let mut slot = slot;
            slot[at] = 0xF0;
            assert_eq!(decode(Bytes::copy_from_slice(&slot)), Err(Foreign), "{at}");
        }
        slot[7] = 0;
        assert_eq!(decode(Bytes::copy_from_slice(&slot)), Err(Foreign), "of nothing");
    }

    #[test]
    fn a_token_alone_is_no_copy() {
        let mut slot = [0; HEADER_BYTES];
        slot[8] = FORMAT;
        slot[34..].fill(7);
        assert_eq!(decode(Bytes::copy_from_slice(&slot)), Ok(None));
        for at in 9..34 {
            let mut slot = slot;
            slot[at] = 0xF0;
            assert_eq!(decode(Bytes::copy_from_slice(&slot)), Err(Foreign), "{at}");
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
        assert_eq!(
            decode_of(|value| value[7] = 0),
            Err(Foreign),
            "a value without a version"
        );
    }

    fn decode_of(change: impl FnOnce(&mut [u8])) -> Result<Option<Copy>, Foreign> {
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
