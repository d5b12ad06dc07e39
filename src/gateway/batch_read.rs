//! Reading many keys at once: down the tiers as a single read goes, each tier asked once for all who are left.
//!
//! Owns who is asked for what in which order, and how much of a batch is held in memory. Does not own what answers ([`super::read`]), what
//! lands where ([`super::load`], [`super::shared`]), nor the flights. What does not fit the common way is read as a single key: copies that
//! are large, writes of an earlier process, and what another replica is loading.
//!
//! Invariants: what L1 answers costs no more than the look; of a key that is there twice one read is made; each key is answered by itself, at the
//! latest at the deadline; whoever joins a flight that a batch leads is answered as by any other leader, or boards anew.
//!
//! Cancellation: the loads of `CACHED` reads run in a task of their own, as that of a single read does, and land; the others end with the call.

use std::{
    collections::HashMap,
    future::{Future, ready},
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
};

use foldhash::fast::RandomState;
use futures_util::{
    future::{join, join_all},
    stream::{self, StreamExt as _},
};
use tokio::{
    select,
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{
    Found, Gateway, ReadConsistency, ReadOptions, found_at,
    freshness::{Demand, last_word_at},
    load::shorten,
    no_tier_answered,
    read::{Above, newest_of, too_many_loads},
    shared::{Claim, FillToken},
    stopped,
};
use crate::{
    cache::{
        Loaded,
        flight::{Join, Lead, LoadResult, Ticket},
        memory::Token,
    },
    error::{Error, ErrorKind},
    model::Key,
};

/// How many bytes of values a batch brings up from the store, and how many of large copies from Redis: more than an answer holds, so that
/// nothing that fits into one is missing.
const BYTES_MAX: usize = 4 << 20;

/// How many keys are read by themselves at a time whose copies are large.
const LARGE_AT_A_TIME: usize = 8;

/// Where the caller waits for a key.
enum Waiting {
    /// For this batch.
    Here(oneshot::Receiver<LoadResult>),
    /// For the flight of another.
    There(Join),
    /// For nothing: as many keys are being loaded as may be.
    Refused,
}

/// A key that the tiers below L1 are asked for.
struct Asked {
    key: Key,
    caller: oneshot::Sender<LoadResult>,
    /// The duty to those who join, and to L1, of a `CACHED` read.
    flight: Option<(Lead, Token)>,
}

impl Asked {
    fn end(self, gateway: &Gateway, outcome: LoadResult) {
        let outcome = match self.flight {
            Some((lead, token)) => gateway.land(lead, token, outcome),
            None => outcome,
        };
        // A caller that is gone does not want to know.
        let _gone = self.caller.send(outcome);
    }

    /// Leaves it unread. Who joined boards anew.
    fn leave(self) {
        let message = "the values of this batch are more than one answer holds: ask again for this key";
        let _gone = self.caller.send(Err(Error::new(ErrorKind::TooLarge, message)));
    }
}

/// A key that the store is asked for.
struct ToLoad {
    asked: Asked,
    above: Option<Loaded>,
    token: Option<FillToken>,
    /// Whether Redis could not say what stands there.
    blind: bool,
}

impl Gateway {
    /// Reads keys, each as [`Gateway::get`] would: an answer for each, in their order. Of values that are not in memory yet it brings up some MiB:
    /// the keys beyond are answered with `TooLarge`, to be asked for again; the first one never is.
    pub async fn get_all(&self, keys: &[Key], options: ReadOptions, deadline: Instant) -> Vec<Result<Found, Error>> {
        let (started, consistency) = (Instant::now(), options.consistency);
        // So that what is answered in time is told, though another key is not.
        let deadline = last_word_at(deadline);
        let demand = self.demand(options.freshness);
        let asks_memory = consistency == ReadConsistency::Cached && options.freshness.min_version.is_none();
        let mut answers: Vec<Option<Result<Found, Error>>> = Vec::with_capacity(keys.len());
        let mut missing = Vec::new();
        for (place, key) in keys.iter().enumerate() {
            let hit = if asks_memory {
                self.get_from_memory(key, demand)
            } else {
                None
            };
            if hit.is_none() {
                missing.push(place);
            }
            answers.push(hit.map(|loaded| Ok(found_at(loaded, demand.since))));
        }
        if !missing.is_empty() {
            // Apart, for the sake of those who miss nothing.
            let below = Box::pin(self.get_below(keys, &missing, options, demand, deadline));
            for (place, answer) in below.await {
                answers[place] = Some(answer);
            }
        }
        let answers = answers
            .into_iter()
            .map(|answer| answer.unwrap_or_else(|| Err(stopped())));
        let answers: Vec<_> = answers.collect();
        for (key, answer) in keys.iter().zip(&answers) {
            self.count_read(key, consistency, answer, started);
        }
        answers
    }

    /// Reads the keys in these places from the tiers below L1, each of them once.
    async fn get_below(
        &self,
        keys: &[Key],
        places: &[usize],
        options: ReadOptions,
        demand: Demand,
        deadline: Instant,
    ) -> Vec<(usize, Result<Found, Error>)> {
        let mut numbers: HashMap<&Key, usize, RandomState> = HashMap::default();
        let mut distinct: Vec<&Key> = Vec::with_capacity(places.len());
        let number_of = |place: &usize| {
            let key = &keys[*place];
            *numbers.entry(key).or_insert_with(|| {
                distinct.push(key);
                distinct.len() - 1
            })
        };
        let numbered: Vec<usize> = places.iter().map(number_of).collect();
        let found = if options.freshness.min_version.is_some() {
            // Nobody's batch: each waits for its version.
            join_all(distinct.iter().map(|key| self.find(key, options, deadline))).await
        } else {
            self.find_all(&distinct, options, demand, deadline).await
        };
        let answers = places.iter().zip(numbered);
        answers.map(|(place, number)| (*place, found[number].clone())).collect()
    }

    async fn find_all(
        &self,
        keys: &[&Key],
        options: ReadOptions,
        demand: Demand,
        deadline: Instant,
    ) -> Vec<Result<Found, Error>> {
        let mut batch = Vec::with_capacity(keys.len());
        let waiting: Vec<Waiting> = keys
            .iter()
            .map(|key| self.board_batch(key, options.consistency, &mut batch))
            .collect();
        let answers = keys.iter().zip(waiting).map(|(key, waiting)| async move {
            let looking = self.landed(key, waiting, demand, deadline);
            let answer = timeout_at(deadline, self.or_recall(key, options, looking, deadline)).await;
            let answer = answer.unwrap_or_else(|_| Err(no_tier_answered()));
            answer.map(|loaded| self.found(loaded))
        });
        let (answers, gateway) = (join_all(answers), self.clone());
        match options.consistency {
            ReadConsistency::Cached => {
                let deadline = deadline.max(Instant::now() + self.parts().load_wait);
                self.inner.tasks.spawn(async move {
                    let left = batch.into_iter().filter_map(|asked| gateway.end_landed(asked, demand));
                    gateway.look_below(left.collect(), demand, deadline).await;
                });
                answers.await
            }
            ReadConsistency::Shared => with(self.look_below(batch, demand, deadline), answers).await,
            ReadConsistency::Store => {
                let to_load = batch.into_iter().map(|asked| ToLoad {
                    asked,
                    above: None,
                    token: None,
                    blind: false,
                });
                with(self.load_all(to_load.collect(), deadline), answers).await
            }
        }
    }

    /// A place to wait for a key: in another's flight, or in this batch, which then leads.
    fn board_batch(&self, key: &Key, consistency: ReadConsistency, batch: &mut Vec<Asked>) -> Waiting {
        let flight = match consistency {
            ReadConsistency::Cached => match self.board(key) {
                Ticket::Lead(lead) => Some(lead),
                Ticket::Join(join) => return Waiting::There(join),
                Ticket::Full => return Waiting::Refused,
            },
            ReadConsistency::Shared | ReadConsistency::Store => None,
        };
        let (caller, receiver) = oneshot::channel();
        batch.push(Asked {
            key: key.clone(),
            caller,
            // Before any slower tier is looked at.
            flight: flight.map(|lead| (lead, self.parts().memory.leave_token(key))),
        });
        Waiting::Here(receiver)
    }

    async fn landed(&self, key: &Key, waiting: Waiting, demand: Demand, deadline: Instant) -> LoadResult {
        match waiting {
            Waiting::Here(receiver) => receiver.await.unwrap_or_else(|_| Err(stopped())),
            Waiting::There(join) => match self.arrive(join, demand, deadline).await {
                Some(outcome) => outcome,
                None => self.get_cached(key, demand, deadline).await,
            },
            Waiting::Refused => Err(too_many_loads()),
        }
    }

    /// Ends what an earlier flight has landed by now; gives back what has to be looked for.
    fn end_landed(&self, asked: Asked, demand: Demand) -> Option<Asked> {
        let Some(loaded) = self.landed_before(&asked.key, demand) else {
            return Some(asked);
        };
        if let Some((lead, _token)) = asked.flight {
            lead.end(Ok(loaded.clone()));
        }
        let _gone = asked.caller.send(Ok(loaded));
        None
    }

    /// Looks into pending and Redis for all of them, and asks the store for what is left.
    async fn look_below(&self, batch: Vec<Asked>, demand: Demand, deadline: Instant) {
        let keys: Vec<&Key> = batch.iter().map(|asked| &asked.key).collect();
        let above = self.look_above_store_all(&keys).await;
        let now = self.parts().clock.now();
        let (mut by_itself, mut to_reload) = (Vec::new(), Vec::new());
        for (asked, above) in batch.into_iter().zip(above) {
            match above.map(|above| Above::judge(above, demand, now)) {
                Some(Above::Answer(loaded)) => asked.end(self, Ok(loaded)),
                Some(Above::Reload(above)) => to_reload.push((asked, above)),
                Some(Above::Unconfirmed(_)) | None => by_itself.push(asked),
            }
        }
        join(
            self.reload_all(to_reload, demand, deadline),
            self.read_by_themselves(by_itself, demand, deadline),
        )
        .await;
    }

    /// As [`Gateway::reload`], of many.
    async fn reload_all(&self, batch: Vec<(Asked, Option<Loaded>)>, demand: Demand, deadline: Instant) {
        if batch.is_empty() {
            return;
        }
        let wanted = |found: &Loaded, now| demand.met_by_fresh(found, now);
        let claims = if self.parts().loads.store_is_down() {
            batch.iter().map(|_| self.unclaimed()).collect()
        } else {
            let keys: Vec<&Key> = batch.iter().map(|(asked, _)| &asked.key).collect();
            self.claim_all(&keys, wanted).await
        };
        let (mut to_load, mut elsewhere) = (Vec::new(), Vec::new());
        for ((asked, above), claim) in batch.into_iter().zip(claims) {
            match claim {
                Claim::Found(found) => {
                    let found = self.overlay_pending(&asked.key, found);
                    asked.end(self, Ok(found));
                }
                Claim::Load {
                    token,
                    above: shared,
                    blind,
                } => to_load.push(ToLoad {
                    asked,
                    above: newest_of(above, shared),
                    token,
                    blind,
                }),
                Claim::Wait { .. } => elsewhere.push(async move {
                    let outcome = self.reload(&asked.key, above, wanted, deadline).await;
                    asked.end(self, outcome);
                }),
            }
        }
        join(self.load_all(to_load, deadline), join_all(elsewhere)).await;
    }

    /// Asks the store for all of them at once, overlays what it says, and offers that to Redis.
    async fn load_all(&self, batch: Vec<ToLoad>, deadline: Instant) {
        // From before the query was sent: the copies are at least as new.
        let asked_at = self.parts().clock.now();
        let pending: Vec<_> = batch.iter().map(|load| self.look_in_pending(&load.asked.key)).collect();
        for load in &batch {
            self.inner.counters.namespaces.load(load.asked.key.namespace());
        }
        let loads = &self.parts().loads;
        let questions = loads.ask_all(batch.iter().map(|load| &load.asked.key), deadline);
        let (mut bytes, mut fills) = (0, Vec::new());
        for ((load, pending), question) in batch.into_iter().zip(pending).zip(questions) {
            let ToLoad {
                asked,
                above,
                token,
                blind,
            } = load;
            if bytes > BYTES_MAX {
                asked.leave();
                continue;
            }
            let entry = match question {
                Ok(question) => loads.answer(question, deadline).await,
                Err(error) => Err(error),
            };
            let outcome = entry.map(|entry| {
                bytes += entry.as_ref().map_or(0, |entry| entry.value_bytes());
                let stored = self.stored(&asked.key, entry, asked_at);
                let mut loaded = self.overlay(&asked.key, stored, pending, above);
                if blind {
                    shorten(&mut loaded.copy);
                }
                fills.extend(token.and_then(|token| token.offer(&loaded)));
                loaded
            });
            asked.end(self, outcome);
        }
        self.land_all(fills);
    }

    /// Reads keys one by one, a few at a time.
    async fn read_by_themselves(&self, batch: Vec<Asked>, demand: Demand, deadline: Instant) {
        let bytes = &AtomicUsize::new(0);
        let reading = stream::iter(batch).map(|asked| async move {
            if bytes.load(Ordering::Relaxed) > BYTES_MAX {
                return asked.leave();
            }
            let outcome = self.get_shared(&asked.key, demand, deadline).await;
            if let Ok(Loaded { copy, .. }) = &outcome {
                let value = copy.entry.as_ref().map_or(0, |entry| entry.value_bytes());
                bytes.fetch_add(value, Ordering::Relaxed);
            }
            asked.end(self, outcome);
        });
        // In their order, so that the first ones are answered.
        reading.buffered(LARGE_AT_A_TIME).for_each(|()| ready(())).await;
    }
}

/// Runs a batch for as long as its answers take.
async fn with<T>(loading: impl Future<Output = ()>, answers: impl Future<Output = T>) -> T {
    let (mut loading, mut answers) = (pin!(loading), pin!(answers));
    select! {
        biased;
        answers = &mut answers => answers,
        () = &mut loading => answers.await,
    }
}
