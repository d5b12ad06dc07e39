//! Page tokens: where a scan goes on, for a client that knows nothing of it.
//!
//! Owns their bytes: a format, a checksum over all that the token is of, and the last key that was looked at; as base64 for URLs. Does not own
//! what a page is. Invariant: reading is total, and only what was made for this namespace and this prefix is read; no gateway keeps anything of
//! a token, so each can read those of the others, and of an earlier process. The checksum tells a mistake, not a forger, who could as well name
//! the key in another way: a token grants nothing.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{
    error::{Error, FieldViolation},
    model::Key,
};

/// The longest token that is looked at, in bytes; that of the longest key has 1,372.
pub(super) const TOKEN_BYTES_MAX: usize = 2_048;

const FORMAT: u8 = 1;
const CHECK_BYTES: usize = 4;

/// The token of what comes after `last` among the keys of a namespace that begin with `prefix`.
pub(super) fn write(namespace: &str, prefix: &str, last: &str) -> String {
    let mut token = vec![FORMAT];
    token.extend_from_slice(&check(namespace, prefix, last));
    token.extend_from_slice(last.as_bytes());
    URL_SAFE_NO_PAD.encode(token)
}

/// The key after which such a page begins.
///
/// # Errors
/// `Invalid`: the token is none, or of something else.
pub(super) fn read(namespace: &str, prefix: &str, token: &str) -> Result<String, Error> {
    decode(namespace, prefix, token).ok_or_else(|| {
        Error::invalid(vec![FieldViolation {
            field: "page_token".into(),
            description: "must be next_page_token of an earlier page, of the same namespace and prefix".into(),
        }])
    })
}

fn decode(namespace: &str, prefix: &str, token: &str) -> Option<String> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let token = URL_SAFE_NO_PAD.decode(token).ok()?;
    let (format, token) = token.split_first()?;
    let (given, last) = token.split_at_checked(CHECK_BYTES)?;
    let last = std::str::from_utf8(last).ok()?;
    let is_ours = *format == FORMAT && given == check(namespace, prefix, last) && last.starts_with(prefix);
    (is_ours && Key::new(namespace, last).is_ok()).then(|| last.to_owned())
}

fn check(namespace: &str, prefix: &str, last: &str) -> [u8; CHECK_BYTES] {
    // None of them holds a NUL, so where each ends counts, too.
    let mut check = crc32c::crc32c(&[FORMAT]);
    for part in [namespace, prefix, last] {
        check = crc32c::crc32c_append(check, part.as_bytes());
        check = crc32c::crc32c_append(check, &[0]);
    }
    check.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{error::ErrorKind, model::KEY_BYTES_MAX};

    proptest! {
        #[test]
        fn a_token_comes_back_as_it_went_and_only_there(prefix in "[a-c\u{e9}]{0,4}", rest in "[ -~\u{e9}\u{7f}]{1,40}") {
            let last = format!("{prefix}{rest}");
            let token = write("orders", &prefix, &last);
            prop_assert_eq!(read("orders", &prefix, &token).ok(), Some(last.clone()));
            prop_assert!(read("order", &prefix, &token).is_err());
            prop_assert!(read("orders", &last, &token).is_err());
        }

        #[test]
        fn what_was_changed_or_cut_is_refused(last in "[a-z]{1,30}", at in any::<usize>(), bit in 0..6_u32) {
            let token = write("orders", "", &last);
            let at = at % token.len();
            prop_assert!(read("orders", "", &token[..at]).is_err());
            const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
            let mut changed = token.clone().into_bytes();
            let digit = DIGITS.iter().position(|digit| *digit == changed[at]).expect("a digit");
            changed[at] = DIGITS[digit ^ (1 << bit)];
            let changed = String::from_utf8(changed).expect("text");
            prop_assert!(read("orders", "", &changed).is_err());
        }

        #[test]
        fn no_text_at_all_upsets_it(token in ".{0,80}") {
            prop_assert!(read("orders", "", &token).is_err());
        }
    }

    #[test]
    fn the_longest_key_fits_and_longer_tokens_are_not_looked_at() {
        let last = "k".repeat(KEY_BYTES_MAX);
        let token = write("orders", "k", &last);
        assert!(token.len() <= 1_372 && token.len() < TOKEN_BYTES_MAX, "{}", token.len());
        assert_eq!(read("orders", "k", &token).ok(), Some(last));
        for foreign in [String::new(), "A".repeat(TOKEN_BYTES_MAX + 1), "AAAA====".to_owned()] {
            let refused = read("orders", "", &foreign).expect_err("foreign");
            assert_eq!(refused.kind(), ErrorKind::Invalid);
            assert_eq!(refused.violations()[0].field, "page_token");
        }
    }
}
