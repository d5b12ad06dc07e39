//! Resume tokens: where a watch goes on, for a client that knows nothing of it.
//!
//! Owns their bytes: a format, a checksum over all that the token is of, the identity of the log, and the position in it; as base64 for URLs.
//! Does not own what a position is. Invariant: reading is total, and only what was made for this namespace and this prefix is read, by
//! whichever gateway. The checksum tells a mistake, not a forger, who could as well begin anew: a token grants nothing.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use super::log::Filter;
use crate::error::{Error, FieldViolation};

/// The longest token that is looked at, in bytes; ours have 28.
const TOKEN_BYTES_MAX: usize = 64;

const FORMAT: u8 = 1;

/// A place in the log of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Which log.
    pub(super) log: u64,
    pub(super) position: u64,
}

/// The token of a place, for who watches this.
pub(super) fn write(filter: &Filter, place: Place) -> String {
    let mut token = Vec::with_capacity(21);
    token.push(FORMAT);
    token.extend_from_slice(&check(filter, place));
    token.extend_from_slice(&place.log.to_be_bytes());
    token.extend_from_slice(&place.position.to_be_bytes());
    URL_SAFE_NO_PAD.encode(token)
}

/// The place that a token names.
///
/// # Errors
/// `Invalid`: the token is none, or of something else.
pub(super) fn read(filter: &Filter, token: &str) -> Result<Place, Error> {
    decode(filter, token).ok_or_else(|| {
        Error::invalid(vec![FieldViolation {
            field: "resume_token".into(),
            description: "must be that of a message of an earlier watch, of the same namespace and prefix; leave it out to begin anew"
                .into(),
        }])
    })
}

fn decode(filter: &Filter, token: &str) -> Option<Place> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let token = URL_SAFE_NO_PAD.decode(token).ok()?;
    let (format, token) = token.split_first()?;
    let (given, token) = token.split_first_chunk::<4>()?;
    let (log, token) = token.split_first_chunk()?;
    let (position, rest) = token.split_first_chunk()?;
    let place = Place {
        log: u64::from_be_bytes(*log),
        position: u64::from_be_bytes(*position),
    };
    (*format == FORMAT && rest.is_empty() && *given == check(filter, place)).then_some(place)
}

fn check(filter: &Filter, place: Place) -> [u8; 4] {
    let mut check = crc32c::crc32c(&[FORMAT]);
    // None of them holds a NUL, so where each ends counts, too.
    for part in [&filter.namespace, &filter.prefix] {
        check = crc32c::crc32c_append(check, part.as_bytes());
        check = crc32c::crc32c_append(check, &[0]);
    }
    check = crc32c::crc32c_append(check, &place.log.to_be_bytes());
    check = crc32c::crc32c_append(check, &place.position.to_be_bytes());
    check.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::ErrorKind;

    fn filter(prefix: &str) -> Filter {
        Filter {
            namespace: "orders".to_owned(),
            prefix: prefix.to_owned(),
        }
    }

    proptest! {
        #[test]
        fn a_token_comes_back_as_it_went_and_only_there(prefix in "[a-c\u{e9}]{0,4}", log: u64, position: u64) {
            let place = Place { log, position };
            let token = write(&filter(&prefix), place);
            prop_assert!(token.len() <= 28);
            prop_assert_eq!(read(&filter(&prefix), &token).ok(), Some(place));
            let longer = filter(&(prefix.clone() + "x"));
            prop_assert!(read(&longer, &token).is_err());
            let other = Filter { namespace: "order".to_owned(), prefix };
            prop_assert!(read(&other, &token).is_err());
        }

        #[test]
        fn what_was_changed_or_cut_is_refused(log: u64, position: u64, at in any::<usize>(), bit in 0..6_u32) {
            let token = write(&filter(""), Place { log, position });
            let at = at % token.len();
            prop_assert!(read(&filter(""), &token[..at]).is_err());
            const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
            let mut changed = token.clone().into_bytes();
            let digit = DIGITS.iter().position(|digit| *digit == changed[at]).expect("a digit");
            changed[at] = DIGITS[digit ^ (1 << bit)];
            let changed = String::from_utf8(changed).expect("text");
            prop_assert!(read(&filter(""), &changed).is_err());
        }

        #[test]
        fn no_text_at_all_upsets_it(token in ".{0,80}") {
            prop_assert!(read(&filter(""), &token).is_err());
        }
    }

    #[test]
    fn what_is_no_token_is_blamed_by_its_field() {
        for foreign in [String::new(), "A".repeat(TOKEN_BYTES_MAX + 1), "AAAA====".to_owned()] {
            let refused = read(&filter(""), &foreign).expect_err("foreign");
            assert_eq!(refused.kind(), ErrorKind::Invalid);
            assert_eq!(refused.violations()[0].field, "resume_token");
        }
    }
}
