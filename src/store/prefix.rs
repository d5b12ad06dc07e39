//! Prefixes of keys as ranges: all strings with a prefix lie together, byte by byte.
//!
//! Owns where a range ends. Does not own how a database compares (byte by byte, as the tables say).

/// The first string after all that begin with `prefix`; `None` where there is none, for every string that is not less begins with it.
pub(super) fn end(prefix: &str) -> Option<String> {
    // Of UTF-8 the order of bytes is that of code points.
    let mut characters = prefix.chars();
    while let Some(last) = characters.next_back() {
        if let Some(next) = next(last) {
            let mut end = characters.as_str().to_owned();
            end.push(next);
            return Some(end);
        }
    }
    None
}

/// The code point after one.
fn next(character: char) -> Option<char> {
    match character {
        // Surrogates are none.
        '\u{d7ff}' => Some('\u{e000}'),
        _ => char::from_u32(u32::from(character) + 1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_range_ends_after_the_last_code_point_that_has_a_next() {
        for (prefix, wanted) in [
            ("a", Some("b")),
            ("order:", Some("order;")),
            ("é", Some("ê")),
            ("\u{7f}", Some("\u{80}")),
            ("\u{d7ff}", Some("\u{e000}")),
            ("\u{ffff}", Some("\u{10000}")),
            ("a\u{10ffff}\u{10ffff}", Some("b")),
            ("\u{10ffff}", None),
            ("", None),
        ] {
            assert_eq!(end(prefix).as_deref(), wanted, "{prefix:?}");
        }
    }

    proptest! {
        #[test]
        fn a_string_is_in_the_range_exactly_if_it_has_the_prefix(
            prefix in "[ab\u{d7ff}\u{e000}\u{10ffff}]{0,3}",
            text in "[ab\u{d7ff}\u{e000}\u{10ffff}]{0,5}",
        ) {
            let within = text >= prefix && end(&prefix).is_none_or(|end| text < end);
            prop_assert_eq!(within, text.starts_with(&prefix));
        }
    }
}
