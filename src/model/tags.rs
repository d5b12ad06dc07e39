//! Tags: names that a write gives its record, by which all records of one can be found in the store again.
//!
//! Owns what is valid. Does not own where they are kept (the store; no cache has them) nor what they are good for. Invariant: [`Tags`] that
//! exist are valid, distinct and in order.

use std::{fmt, sync::Arc};

/// The most tags of a record.
pub const TAGS_MAX: usize = 16;

/// The longest tag, in bytes of UTF-8.
pub const TAG_BYTES_MAX: usize = 128;

/// What a tag is charged beyond its text, wherever bytes are bounded: what frames it in a record of the journal.
const TAG_FRAME_BYTES: usize = 3;

/// A rule that tags break.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokenTag {
    /// The place of the tag that breaks it, from 0; `None` where all together do.
    pub place: Option<usize>,
    /// The rule, in words for the caller.
    pub rule: String,
}

/// The tags of a record, each at most once, byte by byte in order. Empty by default. Cheap to clone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Tags {
    /// The tags, each followed by NUL, which is in none; `None` where there are none.
    text: Option<Arc<str>>,
}

impl Tags {
    /// What [`Tags::bytes`] is at most.
    pub const BYTES_MAX: usize = TAGS_MAX * (TAG_BYTES_MAX + TAG_FRAME_BYTES);

    /// These tags, in any order; one that is named twice is there once.
    ///
    /// # Errors
    /// Every rule that is broken: there are at most 16, named twice or not, and each has 1 to 128 bytes without NUL.
    pub fn new<T: AsRef<str>>(tags: &[T]) -> Result<Tags, Vec<BrokenTag>> {
        if tags.is_empty() {
            return Ok(Tags::default());
        }
        let broken = violations(tags);
        if !broken.is_empty() {
            return Err(broken);
        }
        let mut sorted: Vec<&str> = tags.iter().map(AsRef::as_ref).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let mut text = String::with_capacity(sorted.iter().map(|tag| tag.len() + 1).sum());
        for tag in sorted {
            text.push_str(tag);
            text.push('\0');
        }
        Ok(Tags {
            text: Some(text.into()),
        })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.text.is_none()
    }

    /// The tags, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.text.as_deref().unwrap_or_default().split_terminator('\0')
    }

    /// What they are charged wherever bytes are bounded.
    pub fn bytes(&self) -> usize {
        self.iter().map(|tag| tag.len() + TAG_FRAME_BYTES).sum()
    }
}

impl fmt::Debug for Tags {
    /// Shows how many there are, never which: a tag may name a person.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tags({})", self.iter().count())
    }
}

/// Checks a tag.
///
/// # Errors
/// The rule that it breaks, in words for the caller.
pub fn check_tag(tag: &str) -> Result<(), &'static str> {
    if tag.is_empty() {
        return Err("must not be empty");
    }
    if tag.len() > TAG_BYTES_MAX {
        return Err("must have at most 128 bytes of UTF-8");
    }
    if tag.contains('\0') {
        return Err("must not hold the NUL character");
    }
    Ok(())
}

/// What is wrong with tags. Of those beyond the number that may be, only that.
fn violations<T: AsRef<str>>(tags: &[T]) -> Vec<BrokenTag> {
    let too_many = (tags.len() > TAGS_MAX).then(|| BrokenTag {
        place: None,
        rule: format!("must be at most {TAGS_MAX}, are {}", tags.len()),
    });
    let wrong = tags.iter().take(TAGS_MAX).enumerate().filter_map(|(place, tag)| {
        let rule = check_tag(tag.as_ref()).err()?;
        Some(BrokenTag {
            place: Some(place),
            rule: rule.to_string(),
        })
    });
    too_many.into_iter().chain(wrong).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_distinct_and_in_order() {
        let tags = Tags::new(&["b", "é", "a", "b", "B", " "]).expect("valid");
        assert_eq!(tags.iter().collect::<Vec<_>>(), [" ", "B", "a", "b", "é"]);
        assert_eq!(tags.bytes(), 6 + 5 * TAG_FRAME_BYTES);
        assert_eq!(tags, Tags::new(&["é", "a", "b", "B", " "]).expect("valid"));
        assert!(!tags.is_empty());
    }

    #[test]
    fn no_tags_are_the_default() {
        let none = Tags::new::<&str>(&[]).expect("valid");
        assert_eq!(
            (none.clone(), none.bytes(), none.iter().count()),
            (Tags::default(), 0, 0)
        );
        assert!(none.is_empty());
    }

    #[test]
    fn every_rule_that_is_broken_is_named() {
        let long = "t".repeat(TAG_BYTES_MAX + 1);
        let broken = Tags::new(&["fine", "", &long, "a\0b"]).expect_err("three are wrong");
        assert_eq!(broken.len(), 3, "{broken:?}");
        let places: Vec<_> = broken.iter().map(|broken| broken.place).collect();
        assert_eq!(places, [Some(1), Some(2), Some(3)]);
        let many: Vec<String> = (0..TAGS_MAX).map(|number| format!("{number:0128}")).collect();
        assert_eq!(Tags::new(&many).expect("as many as may be").bytes(), Tags::BYTES_MAX);
        let too_many = vec!["same"; TAGS_MAX + 1];
        assert_eq!(
            Tags::new(&too_many).expect_err("too many"),
            [BrokenTag {
                place: None,
                rule: "must be at most 16, are 17".to_owned()
            }]
        );
    }

    #[test]
    fn debug_output_shows_no_tag() {
        assert_eq!(format!("{:?}", Tags::new(&["secret"]).expect("valid")), "Tags(1)");
    }
}
