//! How fresh an answer must be, and what answers when the store cannot.
//!
//! Owns what a read may ask for beyond its consistency: an age that the answer must not exceed, a version that it must have reached; the
//! wait for such a version; and the grace in which a copy past its lifetime still answers, marked stale, while the store is silent. Does
//! not own the order of the tiers (`read`), nor what a copy's lifetime is.
//!
//! Invariants: who asks for either gets no copy that was kept for an outage; a version that a client sends is compared and never observed, so it
//! moves no clock; the record's own expiry wins over everything here. Safe to drop at any await: nothing but loads, which run in tasks of
//! their own, outlives a read.

use std::{future::Future, pin::pin, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};

use super::{Gateway, ReadConsistency};
use crate::{
    cache::{Copy, Loaded, redis::KEPT_MIN},
    clock::is_far_ahead,
    error::{Error, ErrorKind},
    model::{Key, Source, Timestamp, Version},
};

/// Between two looks at what is pending and at Redis for a version that cannot be seen yet: at first, and at most.
const PAUSE_FIRST: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// From the end of a look that reached the store to the next one: at first, and at most.
const STORE_PAUSE_FIRST: Duration = Duration::from_millis(20);
const STORE_PAUSE_MAX: Duration = Duration::from_millis(320);

/// How long before its deadline a call that waits in vain is answered, so that its caller still hears it; and a share of the time that is left,
/// for clients round up what they tell of a long one.
const LAST_WORD: Duration = Duration::from_millis(20);
const LAST_WORD_SHARE: u32 = 64;

/// After which time to ask again for a version that could not be seen.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// What a read asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOptions {
    /// Which copies may answer.
    pub consistency: ReadConsistency,
    /// How fresh they must be.
    pub freshness: Freshness,
}

impl From<ReadConsistency> for ReadOptions {
    fn from(consistency: ReadConsistency) -> ReadOptions {
        ReadOptions {
            consistency,
            freshness: Freshness::default(),
        }
    }
}

/// How fresh an answer must be beyond its lifetime. By default: no more than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Freshness {
    /// How long ago the copy that answers may have been known to be current. What is pending is current.
    pub max_staleness: Option<Duration>,
    /// The version that the answer must have reached.
    pub min_version: Option<Version>,
}

/// What one look down the tiers must find.
#[derive(Debug, Clone, Copy)]
pub(super) struct Demand {
    freshness: Freshness,
    /// When the look began.
    pub(super) since: Timestamp,
    /// The horizon of the collection as it was known then. A key that the store has no row of since then has been collected up to it.
    horizon: Option<Version>,
}

impl Demand {
    /// Whether what was found may answer, as far as its freshness goes.
    pub(super) fn met_by(&self, found: &Loaded, now: Timestamp) -> bool {
        self.is_recent(&found.copy, now) && self.has_version(found, now)
    }

    /// The same of what may answer by its lifetime alone.
    pub(super) fn met_by_fresh(&self, found: &Loaded, now: Timestamp) -> bool {
        found.copy.is_fresh(now) && self.met_by(found, now)
    }

    /// Whether asking anew could find no more than this now: it may answer, or the look that found it began no earlier than ours.
    pub(super) fn settled_by(&self, found: &Loaded, now: Timestamp) -> bool {
        self.is_recent(&found.copy, now) && (self.has_version(found, now) || self.was_found_since(&found.copy, now))
    }

    fn is_recent(&self, copy: &Copy, now: Timestamp) -> bool {
        let Some(max) = self.freshness.max_staleness else {
            return true;
        };
        // Nobody knows how old a copy is that another replica's clock has dated ahead.
        copy.loaded_at <= now && (now.since(copy.loaded_at) <= max || self.was_found_since(copy, now))
    }

    fn has_version(&self, found: &Loaded, now: Timestamp) -> bool {
        let Some(min) = self.freshness.min_version else {
            return true;
        };
        match found.copy.version() {
            Some(version) => version >= min,
            // No row can be made any more by what is at or below the horizon; an absence from before that says nothing.
            None => {
                found.source == Source::Store
                    && self.was_found_since(&found.copy, now)
                    && self.horizon.is_some_and(|horizon| min <= horizon)
            }
        }
    }

    fn was_found_since(&self, copy: &Copy, now: Timestamp) -> bool {
        (self.since..=now).contains(&copy.loaded_at)
    }
}

impl Gateway {
    /// Reads a key as it was asked for; at the latest shortly before the deadline where it waits for a version.
    pub(super) async fn answer(&self, key: &Key, options: ReadOptions, deadline: Instant) -> Result<Loaded, Error> {
        if let Some(version) = options.freshness.min_version {
            return Box::pin(self.await_version(key, version, options, deadline)).await;
        }
        self.or_recall(key, options, self.look(key, options, deadline), deadline)
            .await
    }

    /// What a look down the tiers finds; and where the namespace has a grace, what was known when the store does not answer that look, or
    /// not in time.
    pub(super) async fn or_recall(
        &self,
        key: &Key,
        options: ReadOptions,
        looking: impl Future<Output = Result<Loaded, Error>>,
        deadline: Instant,
    ) -> Result<Loaded, Error> {
        let grace = self.parts().namespaces.get(key.namespace()).stale_if_error;
        let wants_current = options.freshness.max_staleness.is_some() || options.consistency == ReadConsistency::Store;
        if grace.is_zero() || wants_current {
            return looking.await;
        }
        self.look_or_recall(key, looking, grace, deadline).await
    }

    /// One look down the tiers.
    async fn look(&self, key: &Key, options: ReadOptions, deadline: Instant) -> Result<Loaded, Error> {
        let demand = self.demand(options.freshness);
        match options.consistency {
            ReadConsistency::Cached => self.get_cached(key, demand, deadline).await,
            ReadConsistency::Shared => self.get_shared(key, demand, deadline).await,
            ReadConsistency::Store => self.get_stored(key, None, deadline).await,
        }
    }

    pub(super) fn demand(&self, freshness: Freshness) -> Demand {
        Demand {
            freshness,
            since: self.parts().clock.now(),
            horizon: self.parts().sharing.known_horizon(),
        }
    }

    /// Looks again and again until the version can be seen: often where it costs little, at what is pending and in Redis, and
    /// seldom down to the store.
    async fn await_version(
        &self,
        key: &Key,
        version: Version,
        options: ReadOptions,
        deadline: Instant,
    ) -> Result<Loaded, Error> {
        let waiting = async {
            let (mut pause, mut store_pause) = (PAUSE_FIRST, STORE_PAUSE_FIRST);
            loop {
                let demand = self.demand(options.freshness);
                let mut looking = pin!(self.look(key, options, deadline));
                // When to go down to the store again; set once this look has ended.
                let mut again = None;
                while again.is_none_or(|again| Instant::now() < again) {
                    tokio::select! {
                        found = &mut looking, if again.is_none() => {
                            let (found, now) = (found?, self.parts().clock.now());
                            if demand.has_version(&found, now) {
                                return Ok(found);
                            }
                            if is_far_ahead(version, now) {
                                return Err(too_new());
                            }
                            again = Some(Instant::now() + store_pause);
                            store_pause = (store_pause * 2).min(STORE_PAUSE_MAX);
                        }
                        () = sleep(pause) => {
                            pause = (pause * 2).min(PAUSE_MAX);
                            if self.is_visible_above_store(key, &demand, options.consistency).await {
                                break;
                            }
                        }
                    }
                }
            }
        };
        let ended = timeout_at(last_word_at(deadline), waiting).await;
        ended.unwrap_or_else(|_| Err(not_visible()))
    }

    /// Whether the version can be seen without the store, as far as the consistency lets it.
    async fn is_visible_above_store(&self, key: &Key, demand: &Demand, consistency: ReadConsistency) -> bool {
        let found = match consistency {
            ReadConsistency::Store => self.look_in_pending(key),
            ReadConsistency::Cached | ReadConsistency::Shared => self.look_above_store(key).await,
        };
        found.is_some_and(|found| demand.has_version(&found, self.parts().clock.now()))
    }

    /// Falls back on what was known when the store does not answer, or not in time.
    async fn look_or_recall(
        &self,
        key: &Key,
        looking: impl Future<Output = Result<Loaded, Error>>,
        grace: Duration,
        deadline: Instant,
    ) -> Result<Loaded, Error> {
        let mut looking = pin!(looking);
        let failed = match timeout_at(last_word_at(deadline), &mut looking).await {
            Ok(Err(error)) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout) => Some(error),
            Ok(ended) => return ended,
            Err(_) => None,
        };
        match (self.recall(key, grace, deadline).await, failed) {
            (Some(known), _) => {
                self.parts().metrics.stale_answers.inc();
                Ok(known)
            }
            (None, Some(error)) => Err(error),
            // The little time that is left may do.
            (None, None) => looking.await,
        }
    }

    /// The newest that is known of a key without the store, if that is a live record whose grace is not over.
    async fn recall(&self, key: &Key, grace: Duration, deadline: Instant) -> Option<Loaded> {
        // A slow Redis must not cost the answer that this process knows.
        let above = timeout_at(last_word_at(deadline), self.look_above_store(key)).await;
        let above = above.ok().flatten();
        // Last, for what is written meanwhile lands there.
        let own = self
            .parts()
            .memory
            .last_known(key, self.parts().clock.now())
            .map(|copy| Loaded {
                copy,
                source: Source::L1,
                stale: true,
            });
        let newest = [above, own]
            .into_iter()
            .flatten()
            .max_by_key(|known| (known.copy.version(), known.copy.loaded_at))?;
        if newest.source == Source::Pending {
            return Some(newest);
        }
        let now = self.parts().clock.now();
        let is_live = newest.copy.entry.as_ref().is_some_and(|entry| entry.is_live(now));
        let may_answer = is_live && now < newest.copy.fresh_until.after(grace);
        may_answer.then_some(Loaded { stale: true, ..newest })
    }
}

/// Whether Redis holds a copy for nothing but an outage of the store: a live record, past its lifetime, and from too long ago to be a write that
/// is pending elsewhere, which its owner renews. What the store answers stands against such a copy, be it that there is no row: else
/// what was removed from the store long ago would come back.
pub(super) fn is_kept_for_outages(copy: &Copy, now: Timestamp) -> bool {
    let is_live = copy.entry.as_ref().is_some_and(|entry| entry.is_live(now));
    is_live && !copy.is_fresh(now) && copy.loaded_at.after(KEPT_MIN) < now
}

/// When a call that waits is to be answered: a little before its deadline, however near that is.
pub(super) fn last_word_at(deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(Instant::now());
    let before = LAST_WORD.saturating_add(left / LAST_WORD_SHARE);
    deadline.checked_sub(before.min(left / 4)).unwrap_or(deadline)
}

fn not_visible() -> Error {
    let message =
        "min_version is not visible on this gateway yet: ask again, allow more time, or ask the gateway that wrote it";
    Error::new(ErrorKind::NotVisible, message).retry_after(RETRY_AFTER)
}

fn too_new() -> Error {
    let message = "min_version is more than a minute ahead of this gateway's clock: pass one that a write returned";
    Error::new(ErrorKind::TooNew, message)
}

#[cfg(test)]
mod tests {
    use proptest::{option, prelude::*};

    use super::*;
    use crate::model::Entry;

    const SINCE: Timestamp = Timestamp(1_000_000);

    prop_compose! {
        /// What was found, at about the time of the look, and when that is judged.
        fn finds()(
            version in option::of(1..9_i64),
            age in -20..40_i64,
            took in 0..10_i64,
            stale in any::<bool>(),
            source in prop::sample::select(vec![Source::L1, Source::L2, Source::Pending, Source::Store]),
        ) -> (Loaded, Timestamp) {
            let entry = version.and_then(Version::new).map(|version| Entry { version, value: None, expires_at: None });
            let now = Timestamp(SINCE.0 + took);
            let copy = Copy::new(entry, Timestamp(now.0 - age), Duration::from_secs(60));
            (Loaded { copy, source, stale }, now)
        }
    }

    prop_compose! {
        fn demands()(
            max in option::of(0..30_u64),
            min in option::of(1..9_i64),
            horizon in option::of(1..9_i64),
        ) -> Demand {
            Demand {
                freshness: Freshness {
                    max_staleness: max.map(Duration::from_millis),
                    min_version: min.and_then(Version::new),
                },
                since: SINCE,
                horizon: horizon.and_then(Version::new),
            }
        }
    }

    proptest! {
        #[test]
        fn who_asks_for_nothing_takes_everything(found in finds(), horizon in 1..9_i64) {
            let demand = Demand { freshness: Freshness::default(), since: SINCE, horizon: Version::new(horizon) };
            prop_assert!(demand.met_by(&found.0, found.1));
        }

        #[test]
        fn nothing_older_than_asked_for_answers(demand in demands(), (found, now) in finds()) {
            if let (true, Some(max)) = (demand.met_by(&found, now), demand.freshness.max_staleness) {
                let of_this_look = found.copy.loaded_at >= SINCE;
                prop_assert!(found.copy.loaded_at <= now, "nothing that is dated ahead");
                prop_assert!(of_this_look || found.copy.loaded_at.after(max) >= now);
            }
        }

        #[test]
        fn nothing_below_the_version_answers(demand in demands(), (found, now) in finds()) {
            if let (true, Some(min)) = (demand.met_by(&found, now), demand.freshness.min_version) {
                match found.copy.version() {
                    Some(version) => prop_assert!(version >= min),
                    None => {
                        prop_assert!(demand.horizon >= Some(min), "only what was collected is gone without a trace");
                        prop_assert!(found.copy.loaded_at >= SINCE && found.source == Source::Store);
                    }
                }
            }
        }

        #[test]
        fn what_the_store_answers_to_this_look_is_recent_and_settles_it(demand in demands(), (mut found, now) in finds()) {
            found.source = Source::Store;
            found.copy.loaded_at = found.copy.loaded_at.clamp(SINCE, now);
            prop_assert!(demand.is_recent(&found.copy, now) && demand.settled_by(&found, now));
        }

        #[test]
        fn who_asks_for_less_takes_as_much(demand in demands(), (found, now) in finds(), more in 0..9_u64) {
            let mut easier = demand;
            easier.freshness.max_staleness = demand.freshness.max_staleness.map(|max| max + Duration::from_millis(more));
            let min = demand.freshness.min_version.map(|min| min.get() - i64::try_from(more).expect("small"));
            easier.freshness.min_version = min.and_then(Version::new);
            prop_assert!(!demand.met_by(&found, now) || easier.met_by(&found, now));
            prop_assert!(!demand.met_by(&found, now) || demand.settled_by(&found, now));
        }
    }

    #[test]
    fn only_a_live_record_from_long_ago_is_kept_for_outages() {
        let (lifetime, long_ago) = (Duration::from_secs(10), Timestamp(SINCE.0 - 61_000));
        let live = |expires_at| Entry {
            version: Version::new(1).expect("positive"),
            value: Some(bytes::Bytes::new()),
            expires_at,
        };
        let tombstone = Entry {
            value: None,
            ..live(None)
        };
        let kept = |entry, loaded_at, lifetime| is_kept_for_outages(&Copy::new(entry, loaded_at, lifetime), SINCE);
        assert!(kept(Some(live(None)), long_ago, lifetime));
        assert!(
            !kept(Some(live(None)), long_ago, Duration::from_secs(62)),
            "it is fresh"
        );
        assert!(
            !kept(Some(live(None)), Timestamp(SINCE.0 - 30_000), lifetime),
            "it may be pending elsewhere"
        );
        assert!(!kept(Some(live(Some(SINCE))), long_ago, lifetime), "it has expired");
        assert!(!kept(Some(tombstone), long_ago, lifetime) && !kept(None, long_ago, lifetime));
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_word_comes_before_the_deadline_however_near() {
        let now = Instant::now();
        for (left, word) in [(64_000, 62_980), (6_400, 6_280), (20, 15), (4, 3), (0, 0)] {
            let at = last_word_at(now + Duration::from_millis(left));
            assert_eq!(at - now, Duration::from_millis(word), "{left} ms left");
        }
    }
}
