//! Linearizability of a key that is written only through and read from the store.
//!
//! Owns the sweep. Of two calls of which one returned before the other began, the later one is not below the earlier one, where a write is just
//! below the reads that show it. Then sorting by that is a linearization: it agrees with the times, and every read follows its write. It
//! is the order of versions, as promised, and not just any. A write that was acknowledged and never stood in the store shared its commit with
//! a higher one, which took its place: it comes right before that, whatever its version. A write that was refused for what stood is a read of the
//! store. A read of a cache is not judged here, but what it showed must be committed:
//! nothing that begins after it is below.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{Known, Rule, Verdict, is_of_store};
use crate::history::{Act, Change, Nanos, Op, Outcome, Version};

/// Where a call stands in the order: by the version, and beside that.
type Place = (Version, Beside);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Beside {
    /// Superseded by it.
    Before,
    /// It.
    At,
    /// A read of it.
    After,
}

/// A call that came back, by when.
type Returned = Reverse<(Nanos, Place)>;

pub(super) fn judge(known: &Known<'_>, ops: &[&Op], verdict: &mut Verdict) {
    let mut under_way: BinaryHeap<Returned> = BinaryHeap::new();
    let mut floor: Place = (0, Beside::At);
    for op in ops {
        while let Some(Reverse((ret, place))) = under_way.peek()
            && *ret < op.call
        {
            floor = floor.max(*place);
            under_way.pop();
        }
        match place(known, op, floor) {
            Found::At(place) => {
                verdict.judged.ordered += 1;
                if place < floor {
                    let what = format!(
                        "{} at {} is version {}, and {} was complete before",
                        name(op),
                        op.call,
                        place.0,
                        floor.0
                    );
                    let shows_value = matches!(
                        op.act,
                        Act::Read { .. }
                            | Act::Write {
                                outcome: Outcome::Refused(_),
                                ..
                            }
                    );
                    verdict.complain(
                        known.blame(Rule::OutOfOrder, floor.0, shows_value),
                        known.key,
                        op.call,
                        what,
                    );
                }
                under_way.push(Reverse((returned(op), place)));
            }
            Found::Evidence(place) => under_way.push(Reverse((op.ret, place))),
            Found::Superseded(None) => {
                verdict.judged.ordered += 1;
                let what = format!(
                    "{} at {} was acknowledged and never stood in the store, and nothing above version {} took its place meanwhile",
                    name(op),
                    op.call,
                    floor.0
                );
                verdict.complain(Rule::OutOfOrder, known.key, op.call, what);
            }
            Found::Superseded(Some(place)) => {
                verdict.judged.ordered += 1;
                under_way.push(Reverse((op.ret, place)));
            }
            Found::Absent(None) => {
                verdict.judged.ordered += 1;
                let what = format!(
                    "{} at {} shows nothing, and version {} was complete before, above every delete",
                    name(op),
                    op.call,
                    floor.0
                );
                verdict.complain(Rule::OutOfOrder, known.key, op.call, what);
            }
            Found::Absent(Some(place)) => {
                verdict.judged.ordered += 1;
                under_way.push(Reverse((op.ret, place)));
            }
            Found::Nothing => {}
        }
    }
}

enum Found {
    At(Place),
    /// An acknowledged write that never stood in the store: what took its place, the lowest that it can be.
    Superseded(Option<Place>),
    /// Not judged, and nothing is below it from then on.
    Evidence(Place),
    /// A read that shows nothing: the lowest place it can have, which leaves the most room to what follows.
    Absent(Option<Place>),
    Nothing,
}

fn place(known: &Known<'_>, op: &Op, floor: Place) -> Found {
    match &op.act {
        Act::Write {
            outcome: Outcome::Refused(Some(version)),
            ..
        } => Found::At((*version, Beside::After)),
        Act::Write {
            outcome: Outcome::Refused(None),
            ..
        } => {
            // In the midst of a transaction it may have seen what never came into the row.
            match known.absence(floor.0, op.ret, false) {
                Some(version) => Found::Absent(Some((version, Beside::After))),
                None if known.has_untold_delete(op.ret) => Found::Nothing,
                None => Found::Absent(None),
            }
        }
        Act::Write { .. } => match known.version(op) {
            None => Found::Nothing,
            Some(version) if known.is_applied(version) => Found::At((version, Beside::At)),
            Some(version) => {
                let below = if floor.1 == Beside::Before {
                    floor.0 - 1
                } else {
                    floor.0
                };
                let above = known.applied_above(version.max(below), op.ret);
                Found::Superseded(above.map(|above| (above, Beside::Before)))
            }
        },
        Act::Read {
            consistency,
            found: Some((version, _)),
            ..
        } => {
            if is_of_store(*consistency) {
                Found::At((*version, Beside::After))
            } else {
                Found::Evidence((*version, Beside::At))
            }
        }
        Act::Read {
            consistency,
            found: None,
            ..
        } => {
            if is_of_store(*consistency) {
                Found::Absent(
                    known
                        .absence(floor.0, op.ret, true)
                        .map(|version| (version, Beside::After)),
                )
            } else {
                Found::Nothing
            }
        }
    }
}

/// When a call was over: never, if its caller does not know whether it was.
fn returned(op: &Op) -> Nanos {
    match op.act {
        Act::Write {
            outcome: Outcome::Unknown,
            ..
        } => Nanos::MAX,
        Act::Write { .. } | Act::Read { .. } => op.ret,
    }
}

fn name(op: &Op) -> &'static str {
    match op.act {
        Act::Write {
            outcome: Outcome::Refused(_),
            ..
        } => "a refusal",
        Act::Write { change, .. } => match change {
            Change::Put(_) => "a put",
            Change::Delete => "a delete",
            Change::Touch => "a touch",
            Change::Add { .. } => "an add",
        },
        Act::Read { .. } => "a read of the store",
    }
}
