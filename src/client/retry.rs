//! What is tried again, when, and where.
//!
//! Owns the rule. Does not own the calls. Invariants: a write whose earlier try may have been applied is repeated only under its request id, and
//! only where that id is known; nothing is tried again that would fail again.

use std::time::Duration;

use tokio::time::Instant;

use super::{DURATION_MAX, Error, Failure, Reason};
use crate::backoff::Backoff;

/// How often and how eagerly a call is tried again, always within its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// The most tries of one call, the first included. Default: 10.
    pub tries_max: u32,
    /// The bound of the wait before the second try; each further one is twice as long. Default: 50 ms.
    pub backoff_first: Duration,
    /// The longest wait, unless the gateway asks for a longer one. Default: 2 s.
    pub backoff_max: Duration,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry {
            tries_max: 10,
            backoff_first: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
        }
    }
}

impl Retry {
    /// Every call is tried once.
    pub const NONE: Retry = Retry {
        tries_max: 1,
        backoff_first: Duration::ZERO,
        backoff_max: Duration::ZERO,
    };
}

/// What a call does, as far as its repetition goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// It changes nothing.
    Read,
    /// It changes nothing, and is about the one gateway that is asked: no other can answer in its stead.
    ReadHere,
    /// It writes.
    Write {
        /// Whether it has a request id.
        has_id: bool,
        /// Whether that id holds on every gateway: the store decides the write. Else it may be known only to the gateway that took it.
        holds_everywhere: bool,
    },
}

impl Effect {
    pub(super) fn is_write(self) -> bool {
        matches!(self, Effect::Write { .. })
    }
}

/// The tries of one call.
#[derive(Debug)]
pub(super) struct Tries {
    effect: Effect,
    retry: Retry,
    made: u32,
    backoff: Backoff,
    /// When the first try that may have been applied was sent; `None` if there is none.
    unknown_since: Option<Instant>,
}

/// Another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Again {
    /// After this long.
    pub(super) delay: Duration,
    /// Over the next channel; else over the same.
    pub(super) elsewhere: bool,
}

impl Tries {
    pub(super) fn new(effect: Effect, retry: Retry) -> Tries {
        Tries {
            effect,
            retry,
            made: 0,
            backoff: Backoff::new(
                retry.backoff_first.min(DURATION_MAX),
                retry.backoff_max.min(DURATION_MAX),
            ),
            unknown_since: None,
        }
    }

    /// After a try that was sent at that time and failed: the next one; or what the call fails with, which says whether any of its tries may have
    /// been applied.
    pub(super) fn after(&mut self, error: Error, sent: Instant) -> Result<(Again, Error), Error> {
        self.made += 1;
        let was_unknown = self.unknown_since.is_some();
        if error.may_be_applied() {
            self.unknown_since.get_or_insert(sent);
        }
        let has_id = matches!(self.effect, Effect::Write { has_id: true, .. });
        let asked_delay = match &error {
            Error::Failed(failure) if failure.retry_delay.is_none() => {
                return Err(if was_unknown && !(has_id && settles(failure)) {
                    error.after_unknown()
                } else {
                    error
                });
            }
            Error::Failed(failure) => failure.retry_delay.unwrap_or_default().min(DURATION_MAX),
            Error::Unreachable { .. } => Duration::ZERO,
            Error::Address { .. } | Error::TimedOut { .. } => return Err(self.last(error)),
        };
        let is_unknown = self.unknown_since.is_some();
        if self.made >= self.retry.tries_max || (is_unknown && !has_id) {
            return Err(self.last(error));
        }
        let may_move = match self.effect {
            Effect::Read => true,
            Effect::ReadHere => false,
            Effect::Write { holds_everywhere, .. } => holds_everywhere || !is_unknown,
        };
        // Not sooner than asked for, and not at the same moment as all others who were told the same.
        let asked_delay = asked_delay.mul_f64(rand::random_range(1.0..=1.25));
        let again = Again {
            delay: self.backoff.delay().max(asked_delay),
            elsewhere: may_move,
        };
        Ok((again, self.last(error)))
    }

    /// Until when it may be tried again, of a call with that deadline, if ids hold for that window: once an id may be forgotten, a repeat of a
    /// write that was applied would be another write.
    pub(super) fn until(&self, deadline: Instant, window: Duration) -> Instant {
        let forgotten = self.unknown_since.map(|since| since + window);
        forgotten.map_or(deadline, |forgotten| forgotten.min(deadline))
    }

    /// What the call fails with if this is its last try.
    pub(super) fn last(&self, error: Error) -> Error {
        if self.unknown_since.is_some() {
            error.after_unknown()
        } else {
            error
        }
    }
}

/// Whether what a gateway says of a try under an id is also true of the earlier ones: it knows the id, or the record, and had one of them been
/// applied this would be its answer. Any other refusal may come before either is looked at, as of a gateway that was configured anew meanwhile.
fn settles(failure: &Failure) -> bool {
    matches!(
        failure.reason,
        Reason::Conflict | Reason::Absent | Reason::NotACounter | Reason::OutOfRange | Reason::Rejected
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::{Error as Told, ErrorKind},
        rpc::status::to_status,
    };

    const READ: Effect = Effect::Read;
    const BARE: Effect = Effect::Write {
        has_id: false,
        holds_everywhere: false,
    };
    const NAMED: Effect = Effect::Write {
        has_id: true,
        holds_everywhere: false,
    };
    const DECIDED: Effect = Effect::Write {
        has_id: true,
        holds_everywhere: true,
    };

    fn told(error: Told) -> Error {
        Error::of(&to_status(error), true)
    }

    fn lost(may_be_applied: bool) -> Error {
        Error::Unreachable {
            message: "gone".to_owned(),
            may_be_applied,
        }
    }

    fn one(effect: Effect, error: Error) -> Option<Again> {
        let mut tries = Tries::new(effect, Retry::default());
        tries.after(error, Instant::now()).ok().map(|(again, _)| again)
    }

    #[test]
    fn only_what_can_succeed_is_tried_again() {
        for kind in [ErrorKind::Overloaded, ErrorKind::Unavailable, ErrorKind::NotVisible] {
            for effect in [READ, BARE, NAMED] {
                assert!(
                    one(effect, told(Told::new(kind, "why"))).is_some(),
                    "{kind:?} {effect:?}"
                );
            }
        }
        for kind in [
            ErrorKind::Invalid,
            ErrorKind::TooLarge,
            ErrorKind::Conflict,
            ErrorKind::Absent,
            ErrorKind::Rejected,
            ErrorKind::Timeout,
            ErrorKind::Internal,
        ] {
            assert_eq!(one(READ, told(Told::new(kind, "why"))), None, "{kind:?}");
        }
        assert_eq!(one(READ, Error::TimedOut { may_be_applied: false }), None);
    }

    #[test]
    fn the_gateway_s_delay_is_waited_for_and_spread() {
        let asked = Duration::from_secs(3);
        let full = told(Told::new(ErrorKind::Overloaded, "full").retry_after(asked));
        let delay = one(READ, full).expect("worth it").delay;
        assert!(delay >= asked && delay <= asked * 2, "{delay:?}");
        let delay = one(READ, lost(false)).expect("worth it").delay;
        assert!(delay <= Retry::default().backoff_first, "{delay:?}");
    }

    #[test]
    fn a_write_that_may_have_been_applied_is_repeated_only_under_its_id_and_where_that_is_known() {
        assert_eq!(one(BARE, lost(true)), None);
        assert!(one(BARE, lost(false)).expect("nothing was sent").elsewhere);
        assert!(!one(NAMED, lost(true)).expect("it has an id").elsewhere);
        assert!(one(NAMED, lost(false)).expect("it has an id").elsewhere);
        assert!(one(DECIDED, lost(true)).expect("the store knows the id").elsewhere);

        // Once unknown, it stays where it was, whatever the later tries say.
        let mut tries = Tries::new(NAMED, Retry::default());
        assert!(
            !tries
                .after(lost(true), Instant::now())
                .expect("it has an id")
                .0
                .elsewhere
        );
        let (again, error) = tries.after(lost(false), Instant::now()).expect("it has an id");
        assert!(!again.elsewhere && error.may_be_applied());
    }

    #[test]
    fn a_definite_answer_settles_the_earlier_tries_of_an_id_alone() {
        let conflict = || told(Told::new(ErrorKind::Conflict, "why"));
        let mut tries = Tries::new(DECIDED, Retry::default());
        tries.after(lost(true), Instant::now()).expect("it has an id");
        let error = tries
            .after(conflict(), Instant::now())
            .expect_err("it would fail again");
        assert!(!error.may_be_applied());
        assert_eq!(error.failure(), conflict().failure());
        // What may be said without a look at the id settles nothing.
        for kind in [
            ErrorKind::Invalid,
            ErrorKind::TooLarge,
            ErrorKind::Timeout,
            ErrorKind::Internal,
        ] {
            let mut tries = Tries::new(DECIDED, Retry::default());
            tries.after(lost(true), Instant::now()).expect("it has an id");
            let error = tries
                .after(told(Told::new(kind, "why")), Instant::now())
                .expect_err("it would fail again");
            assert!(error.may_be_applied(), "{kind:?}");
        }
    }

    #[test]
    fn nothing_is_repeated_once_its_id_may_be_forgotten() {
        let (sent, window) = (Instant::now(), Duration::from_secs(600));
        let deadline = sent + window * 2;
        let mut tries = Tries::new(DECIDED, Retry::default());
        tries.after(lost(false), sent).expect("nothing was sent");
        assert_eq!(tries.until(deadline, window), deadline);
        let later = sent + Duration::from_secs(5);
        tries.after(lost(true), later).expect("it has an id");
        tries.after(lost(true), later + window / 2).expect("it has an id");
        assert_eq!(tries.until(deadline, window), later + window);
    }

    #[test]
    fn what_is_about_one_gateway_is_asked_of_no_other() {
        assert!(!one(Effect::ReadHere, lost(false)).expect("worth it").elsewhere);
        assert!(one(READ, lost(false)).expect("worth it").elsewhere);
    }

    #[test]
    fn no_delay_is_too_long_to_reckon_with() {
        let asked = told(Told::new(ErrorKind::Overloaded, "full").retry_after(Duration::from_secs(u64::MAX / 2)));
        assert!(one(READ, asked).expect("worth it").delay <= DURATION_MAX * 2);
        let endless = Retry {
            backoff_first: Duration::MAX,
            backoff_max: Duration::MAX,
            ..Retry::default()
        };
        let mut tries = Tries::new(READ, endless);
        assert!(tries.after(lost(false), Instant::now()).is_ok());
    }

    #[test]
    fn tries_are_bounded() {
        let mut tries = Tries::new(
            READ,
            Retry {
                tries_max: 3,
                ..Retry::default()
            },
        );
        assert!(tries.after(lost(false), Instant::now()).is_ok() && tries.after(lost(false), Instant::now()).is_ok());
        assert!(tries.after(lost(false), Instant::now()).is_err());
        assert!(
            Tries::new(READ, Retry::NONE)
                .after(lost(false), Instant::now())
                .is_err()
        );
    }
}
