//! How far an import has come.
//!
//! Owns the place: the number of lines before which every line has its outcome, with a hash of them, by which the input is known again. Pure: no
//! I/O. Invariants: the place never passes a line without an outcome; the counts are those of the lines before it, and no others.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::lines::{Line, Text};
use crate::commands::{exit::Exit, records::Ended};

/// The hash of all lines up to one.
type Chain = [u8; 32];

/// How much of the hash is in a request id, which has room for 64 bytes.
const ID_CHAIN_DIGITS: usize = 24;

/// What is in a state file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    /// The namespace, for a state goes with no other.
    import_into: String,
    /// Whether only what is absent is written, for that is part of what an id names.
    if_absent: bool,
    /// Names the import: the request ids of its writes begin so.
    run: String,
    counts: Counts,
    /// Of the lines that are done.
    chain: String,
}

/// What became of lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Counts {
    /// All of them.
    pub(super) lines: u64,
    pub(super) written: u64,
    /// Of the written ones, those that an earlier run had written and not yet counted.
    pub(super) deduplicated: u64,
    /// There was a record, and only what is absent was to be written.
    pub(super) present: u64,
    /// Past their expiry.
    pub(super) expired: u64,
    pub(super) empty: u64,
    pub(super) failed: u64,
}

/// A line that was read, and is not yet before the place.
struct Ahead {
    chain: Chain,
    /// What it counts as; `None` as long as it has no outcome.
    outcome: Option<Counts>,
}

/// The place of an import.
pub(super) struct Place {
    kept: Kept,
    /// The hash of what was read.
    chain: Chain,
    ahead: VecDeque<Ahead>,
    is_half_written: bool,
}

impl Place {
    pub(super) fn new(namespace: &str, if_absent: bool) -> Place {
        let kept = Kept {
            import_into: namespace.to_owned(),
            if_absent,
            run: format!("import-{:032x}", rand::random::<u128>()),
            counts: Counts::default(),
            chain: String::new(),
        };
        Place {
            kept,
            chain: Chain::default(),
            ahead: VecDeque::new(),
            is_half_written: false,
        }
    }

    /// Where an earlier run stood.
    pub(super) fn of(kept: Kept, namespace: &str, if_absent: bool) -> Result<Place, Ended> {
        if kept.import_into != namespace {
            let message = format!("the state file is of an import into the namespace {}", kept.import_into);
            return Err(Ended::new(Exit::Data, message));
        }
        if kept.if_absent != if_absent {
            let was = if kept.if_absent { "with" } else { "without" };
            let message = format!("the state file is of an import {was} --if-absent: go on as it began");
            return Err(Ended::new(Exit::Data, message));
        }
        Ok(Place {
            kept,
            ..Place::new(namespace, if_absent)
        })
    }

    pub(super) fn kept(&self) -> &Kept {
        &self.kept
    }

    pub(super) fn counts(&self) -> &Counts {
        &self.kept.counts
    }

    /// The request id of the write of a line that was read: the same in each run of this import, as long as the input is the same up to that
    /// line. One that was changed since has another, so that it is written, and not taken for what it was.
    pub(super) fn request_id(&self, number: u64) -> String {
        let chain = self.place_of(number).and_then(|place| self.ahead.get(place));
        let chain = hex(chain.map_or(&self.chain, |ahead| &ahead.chain));
        format!("{}-{}", self.kept.run, &chain[..ID_CHAIN_DIGITS])
    }

    /// Where a line is in what is ahead.
    fn place_of(&self, number: u64) -> Option<usize> {
        usize::try_from(number.checked_sub(self.kept.counts.lines + 1)?).ok()
    }

    /// A line that is passed over, before [`Place::begin`].
    pub(super) fn passed(&mut self, line: &Line) {
        self.chain = link(&self.chain, line);
    }

    /// The lines to pass over are passed: `after` of them because the caller said so, or those of an earlier run, which must be the same.
    pub(super) fn begin(&mut self, after: u64) -> Result<(), Ended> {
        let chain = hex(&self.chain);
        if self.kept.chain.is_empty() {
            self.kept.counts.lines = after;
            self.kept.chain = chain;
        } else if self.kept.chain != chain {
            let message = format!(
                "the first {} lines of the input are not those that the state file is about: it is another one, or has changed",
                self.kept.counts.lines
            );
            return Err(Ended::new(Exit::Data, message));
        }
        Ok(())
    }

    /// A line was read: the next one.
    pub(super) fn read(&mut self, line: &Line) {
        self.chain = link(&self.chain, line);
        self.ahead.push_back(Ahead {
            chain: self.chain,
            outcome: None,
        });
    }

    /// A line has its outcome, which counts as `count` says.
    pub(super) fn done(&mut self, number: u64, count: impl FnOnce(&mut Counts)) {
        let mut outcome = Counts::default();
        count(&mut outcome);
        let place = self.place_of(number);
        if let Some(ahead) = place.and_then(|place| self.ahead.get_mut(place)) {
            ahead.outcome = Some(outcome);
        }
        while let Some(Ahead {
            chain,
            outcome: Some(outcome),
        }) = self.ahead.front()
        {
            self.kept.chain = hex(chain);
            self.kept.counts.add(outcome);
            self.ahead.pop_front();
        }
    }

    /// The last line has no end and is no record: it stays ahead.
    pub(super) fn left_half_written(&mut self) {
        self.is_half_written = true;
    }

    pub(super) fn is_half_written(&self) -> bool {
        self.is_half_written
    }
}

impl Counts {
    /// Counts a line.
    fn add(&mut self, one: &Counts) {
        self.lines += 1;
        self.written += one.written;
        self.deduplicated += one.deduplicated;
        self.present += one.present;
        self.expired += one.expired;
        self.empty += one.empty;
        self.failed += one.failed;
    }
}

fn link(chain: &Chain, line: &Line) -> Chain {
    let mut hash = Sha256::new();
    hash.update(chain);
    match &line.text {
        Text::Whole(text) => hash.update(text),
        // No text ends so.
        Text::TooLong => hash.update(b"\n"),
    }
    hash.finalize().into()
}

fn hex(chain: &Chain) -> String {
    chain.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: u64, text: &str) -> Line {
        Line {
            number,
            text: Text::Whole(text.as_bytes().to_vec()),
            is_ended: true,
        }
    }

    fn begun(lines: &[&str]) -> Place {
        let mut place = Place::new("orders", false);
        place.begin(0).expect("nothing to compare");
        for (number, text) in (1..).zip(lines) {
            place.read(&line(number, text));
        }
        place
    }

    #[test]
    fn the_place_waits_for_the_first_line_without_an_outcome() {
        let mut place = begun(&["a", "b", "c"]);
        place.done(2, |counts| counts.failed += 1);
        place.done(3, |counts| counts.written += 1);
        assert_eq!(*place.counts(), Counts::default());
        place.done(1, |counts| counts.written += 1);
        let all = Counts {
            lines: 3,
            written: 2,
            failed: 1,
            ..Counts::default()
        };
        assert_eq!(*place.counts(), all);
    }

    #[test]
    fn an_import_goes_on_with_the_same_lines_alone() {
        let mut earlier = begun(&["a", "b", "c"]);
        for number in [1, 2] {
            earlier.done(number, |counts| counts.written += 1);
        }
        let text = serde_json::to_string(earlier.kept()).expect("it has text for keys");
        let kept: Kept = serde_json::from_str(&text).expect("it was written so");
        assert_eq!(kept, *earlier.kept());
        assert!(Place::of(kept.clone(), "other", false).is_err());
        assert!(Place::of(kept.clone(), "orders", true).is_err());

        for (second, is_same) in [("b", true), ("B", false)] {
            let mut place = Place::of(kept.clone(), "orders", false).expect("the same namespace");
            for (number, text) in [(1, "a"), (2, second)] {
                place.passed(&line(number, text));
            }
            assert_eq!(place.begin(0).is_ok(), is_same);
            if is_same {
                place.read(&line(3, "c"));
                assert_eq!(place.request_id(3), earlier.request_id(3));
                let mut changed = Place::of(kept.clone(), "orders", false).expect("the same namespace");
                for (number, text) in [(1, "a"), (2, "b")] {
                    changed.passed(&line(number, text));
                }
                changed.begin(0).expect("the same lines");
                changed.read(&line(3, "C"));
                assert_ne!(changed.request_id(3), earlier.request_id(3));
                place.done(3, |counts| counts.written += 1);
                assert_eq!(place.counts().lines, 3);
            }
        }
    }

    #[test]
    fn what_is_named_after_a_run_is_a_valid_request_id() {
        assert!(Place::new("orders", false).request_id(u64::MAX).len() <= 64);
    }
}
