//! Read-through: concurrent misses share the store's queries.
//!
//! Owns the grouping of keys into queries and what each caller is told. Does not own the caches, nor one flight per key (the
//! gateway's). Invariant, on which reads from the store are linearizable: the query that answers a caller was sent after the caller
//! asked. It holds because a query is made of questions taken from the line, and nobody joins one that is under way.
//!
//! Several callers of one key share one row of a query. A query that fails is tried again: it changes nothing, so a lost connection is
//! no obstacle. A query that the store rejects is divided until the key at fault fails alone.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    error::{Error, ErrorKind, Outcome},
    model::{Entry, Key},
    store::{
        Config, Session, Store, StoreError, StoreErrorKind,
        gather::{Answer, Bounds, Gatherer, Place, RETRY_AFTER, shutting_down, store_down},
    },
    telemetry::StoreMetrics,
};

/// Tries of a query, after which its callers are told to come back.
const TRIES_MAX: u32 = 4;
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(200);

/// The read-through path out of the store. Clones share it.
#[derive(Clone)]
pub struct GroupLoad {
    line: Arc<Gatherer<Ask, Option<Entry>>>,
    store: Store,
    connections: usize,
    metrics: StoreMetrics,
}

struct Ask {
    key: Key,
    deadline: Instant,
}

impl GroupLoad {
    /// The path, closed until [`GroupLoad::start`] opens connections behind it: until then, calls wait.
    pub fn new(store: Store, config: &Config, metrics: StoreMetrics) -> GroupLoad {
        let bounds = Bounds {
            waiting_max: config.waiting_loads_max.get(),
            // Keys are bounded one by one, and the values of an answer by the store.
            waiting_bytes_max: usize::MAX,
            batch_max: config.load_batch_keys_max.get(),
            batch_bytes_max: usize::MAX,
        };
        GroupLoad {
            line: Arc::new(Gatherer::new(bounds, Outcome::NotApplied)),
            store,
            connections: config.load_connections.get(),
            metrics,
        }
    }

    /// Whether the store is held to be down, so that a load fails at once.
    pub fn store_is_down(&self) -> bool {
        self.store.breaker().is_open()
    }

    /// Starts the tasks that load, on the current runtime. When `stop` is cancelled they finish the query that runs, answer what still
    /// waits with `Unavailable`, and end.
    #[must_use = "a task that ends before it was told to has died"]
    pub fn start(&self, stop: &CancellationToken) -> Vec<JoinHandle<()>> {
        (0..self.connections)
            .map(|_| {
                let loader = Loader {
                    session: self.store.session(),
                    store: self.store.clone(),
                    line: Arc::clone(&self.line),
                    stop: stop.clone(),
                    metrics: self.metrics.clone(),
                };
                tokio::spawn(loader.run())
            })
            .collect()
    }

    /// Loads a key's entry, tombstones included; `None` where the store has no row. The query is sent after this call began, so it sees
    /// every commit that was answered before.
    ///
    /// A load whose future is dropped before its query was sent is skipped.
    ///
    /// # Errors
    /// `Overloaded`: too many loads wait. `Unavailable`: the store is not there, or the gateway shuts down. `Timeout`: the deadline
    /// passed. `Internal`: the store rejects the query of this key.
    pub async fn load(&self, key: &Key, deadline: Instant) -> Result<Option<Entry>, Error> {
        let ask = Ask {
            key: key.clone(),
            deadline,
        };
        self.line.ask(ask, key.bytes(), deadline, self.store.breaker()).await
    }

    /// Asks for the entries of keys, each as [`GroupLoad::load`] would, and all in one query as far as its bounds let it. What came of each
    /// is to be had from [`GroupLoad::answer`].
    ///
    /// # Errors
    /// Of each key: `Overloaded` and `Unavailable`.
    pub fn ask_all<'a>(&self, keys: impl IntoIterator<Item = &'a Key>, deadline: Instant) -> Vec<Result<Asked, Error>> {
        let asks = keys.into_iter().map(|key| {
            let ask = Ask {
                key: key.clone(),
                deadline,
            };
            (ask, key.bytes())
        });
        let places = self.line.join_all(asks, self.store.breaker());
        places.into_iter().map(|place| place.map(Asked)).collect()
    }

    /// Waits for the entry of a key that was asked for.
    ///
    /// # Errors
    /// As of [`GroupLoad::load`].
    pub async fn answer(&self, asked: Asked, deadline: Instant) -> Result<Option<Entry>, Error> {
        self.line.wait(asked.0, deadline, self.store.breaker()).await
    }
}

/// A key that was asked for. Dropped before its query was sent, the key is skipped.
#[must_use = "a key whose entry nobody awaits is asked for nothing"]
pub struct Asked(Place<Option<Entry>>);

/// A caller's question, on its way.
struct Caller {
    key: Key,
    deadline: Instant,
    answer: Answer<Option<Entry>>,
}

/// One connection that loads.
struct Loader {
    session: Session,
    store: Store,
    line: Arc<Gatherer<Ask, Option<Entry>>>,
    stop: CancellationToken,
    metrics: StoreMetrics,
}

impl Loader {
    async fn run(mut self) {
        while let Some(Some(batch)) = self.stop.run_until_cancelled(self.line.take()).await {
            // What is left to answer, each in queries of its own.
            let mut left = vec![callers(batch)];
            while let Some(callers) = left.pop() {
                left.extend(self.serve(callers).await);
            }
        }
        self.line.close();
    }

    /// Tries a query until each of its callers is answered, or must go on in other queries, which are returned.
    async fn serve(&mut self, mut callers: Vec<Caller>) -> Vec<Vec<Caller>> {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        let mut tries = 0;
        loop {
            callers.retain(|caller| !caller.answer.is_closed());
            if callers.is_empty() {
                return Vec::new();
            }
            if self.store.breaker().is_open() {
                return fail(callers, store_down);
            }
            tries += 1;
            let keys = distinct(&callers);
            let error = match self.query(&keys).await {
                Ok(entries) => return answer(callers, &keys, entries),
                Err(error) => error,
            };
            match error.kind {
                StoreErrorKind::Unreachable => return fail(callers, store_down),
                StoreErrorKind::Rejected => return divide(callers, &keys, error),
                StoreErrorKind::Transient | StoreErrorKind::Unknown if tries >= TRIES_MAX => {
                    tracing::warn!(%error, keys = keys.len(), "the store answers no load at present");
                    return fail(callers, || refused_for_now(&error));
                }
                StoreErrorKind::Transient | StoreErrorKind::Unknown => {}
            }
            let delay = backoff.delay();
            let again = Instant::now() + delay;
            let (hopeless, others) = callers.into_iter().partition(|caller| caller.deadline <= again);
            callers = others;
            fail(hopeless, || refused_for_now(&error));
            if callers.is_empty() {
                return Vec::new();
            }
            if self.stop.run_until_cancelled(sleep(delay)).await.is_none() {
                return fail(callers, shutting_down);
            }
        }
    }

    async fn query(&mut self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let begun = Instant::now();
        let entries = self.session.load(keys).await?;
        self.metrics.load_duration.observe(begun.elapsed().as_secs_f64());
        self.metrics.load_batch.observe(keys.len() as f64);
        Ok(entries)
    }
}

/// A batch, sorted by key.
fn callers(batch: Vec<(Ask, Answer<Option<Entry>>)>) -> Vec<Caller> {
    let mut callers: Vec<Caller> = batch
        .into_iter()
        .map(|(Ask { key, deadline }, answer)| Caller { key, deadline, answer })
        .collect();
    callers.sort_by(|a, b| a.key.cmp(&b.key));
    callers
}

fn distinct(callers: &[Caller]) -> Vec<Key> {
    let mut keys: Vec<Key> = callers.iter().map(|caller| caller.key.clone()).collect();
    keys.dedup();
    keys
}

/// Gives every caller its key's entry. Both sides are sorted by key. Those whose keys were beyond the bytes of one answer go on in another query.
fn answer(mut callers: Vec<Caller>, keys: &[Key], entries: Vec<Option<Entry>>) -> Vec<Vec<Caller>> {
    let beyond = match keys.get(entries.len()) {
        Some(_) if entries.is_empty() => {
            let error = || Error::new(ErrorKind::Internal, "the store answers a load with nothing");
            return fail(callers, error);
        }
        Some(first) => callers.split_off(callers.partition_point(|caller| caller.key < *first)),
        None => Vec::new(),
    };
    let mut found = keys.iter().zip(entries).peekable();
    for caller in callers {
        while found.next_if(|(key, _)| **key < caller.key).is_some() {}
        if let Some((_, entry)) = found.peek() {
            // A caller that is gone does not want to know.
            let _gone = caller.answer.send(Ok(entry.clone()));
        }
    }
    if beyond.is_empty() { Vec::new() } else { vec![beyond] }
}

/// After a rejected query: its halves, or the error where it held one key.
fn divide(mut callers: Vec<Caller>, keys: &[Key], error: StoreError) -> Vec<Vec<Caller>> {
    if keys.len() > 1 {
        let middle = &keys[keys.len() / 2];
        let second = callers.split_off(callers.partition_point(|caller| caller.key < *middle));
        return vec![second, callers];
    }
    tracing::error!(%error, "the store rejects the load of a key");
    fail(callers, || {
        Error::new(ErrorKind::Internal, "the store rejects the load of this key").because(error.to_string())
    })
}

fn fail(callers: Vec<Caller>, error: impl Fn() -> Error) -> Vec<Vec<Caller>> {
    for caller in callers {
        let _gone = caller.answer.send(Err(error()));
    }
    Vec::new()
}

pub(super) fn refused_for_now(error: &StoreError) -> Error {
    Error::new(ErrorKind::Unavailable, "the store answers no reads at present")
        .retry_after(RETRY_AFTER)
        .because(error.to_string())
}

#[cfg(test)]
mod tests;
