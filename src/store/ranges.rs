//! Ranges of keys: what a scan asks the store.
//!
//! Owns a few connections of their own, so that a scan holds up neither reads nor writes, the line before them, and what each caller is told.
//! Does not own what a page is (the gateway's), nor values ([`super::load`]). Invariant, on which a page sees every write that was answered
//! before it was asked for: the query that answers a caller was sent after the caller asked.
//!
//! A query that fails is tried again, for it changes nothing.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    error::{Error, ErrorKind, Outcome},
    store::{
        Config, Session, Store, StoreErrorKind,
        gather::{Answer, Bounds, Gatherer, shutting_down, store_down},
        load::refused_for_now,
        operation::RangeRow,
    },
};

/// Tries of a query, after which its caller is told to come back.
const TRIES_MAX: u32 = 4;
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(200);

/// The scans' path out of the store. Clones share it.
#[derive(Clone)]
pub struct Ranges {
    line: Arc<Gatherer<Ask, Vec<RangeRow>>>,
    store: Store,
    connections: usize,
}

/// Rows to find, as of [`super::Connection::rows_below`].
#[derive(Debug, Clone)]
pub struct Range {
    /// The namespace.
    pub namespace: String,
    /// What the keys begin with.
    pub prefix: String,
    /// The key after which the rows begin.
    pub after: Option<String>,
    /// The most rows. If they are fewer there are no more.
    pub limit: u32,
}

struct Ask {
    range: Range,
    deadline: Instant,
}

impl Ranges {
    /// The path, closed until [`Ranges::start`] opens connections behind it: until then, calls wait.
    pub fn new(store: Store, config: &Config) -> Ranges {
        let bounds = Bounds {
            waiting_max: config.waiting_scans_max.get(),
            // A range is a few keys.
            waiting_bytes_max: usize::MAX,
            // Each is a query of its own.
            batch_max: 1,
            batch_bytes_max: usize::MAX,
        };
        Ranges {
            line: Arc::new(Gatherer::new(bounds, Outcome::NotApplied)),
            store,
            connections: config.scan_connections.get(),
        }
    }

    /// Starts the tasks that ask, on the current runtime; each connects when it is first needed. When `stop` is cancelled they finish the query
    /// that runs, answer what still waits with `Unavailable`, and end.
    #[must_use = "a task that ends before it was told to has died"]
    pub fn start(&self, stop: &CancellationToken) -> Vec<JoinHandle<()>> {
        (0..self.connections)
            .map(|_| {
                let finder = Finder {
                    session: self.store.session(),
                    store: self.store.clone(),
                    line: Arc::clone(&self.line),
                    stop: stop.clone(),
                };
                tokio::spawn(finder.run())
            })
            .collect()
    }

    /// The rows of a range, live or not, in the order of their keys. The query is sent after this call began.
    ///
    /// One whose future is dropped before its query was sent is skipped.
    ///
    /// # Errors
    /// `Overloaded`: too many scans wait. `Unavailable`: the store is not there, or the gateway shuts down. `Timeout`: the deadline passed.
    /// `Internal`: the store rejects the query.
    pub async fn rows(&self, range: Range, deadline: Instant) -> Result<Vec<RangeRow>, Error> {
        let ask = Ask { range, deadline };
        self.line.ask(ask, 0, deadline, self.store.breaker()).await
    }
}

/// One connection that finds rows.
struct Finder {
    session: Session,
    store: Store,
    line: Arc<Gatherer<Ask, Vec<RangeRow>>>,
    stop: CancellationToken,
}

impl Finder {
    async fn run(mut self) {
        while let Some(Some(batch)) = self.stop.run_until_cancelled(self.line.take()).await {
            for (ask, answer) in batch {
                let found = self.find(&ask, &answer).await;
                // A caller that is gone does not want to know.
                let _gone = answer.send(found);
            }
        }
        self.line.close();
    }

    async fn find(&mut self, ask: &Ask, caller: &Answer<Vec<RangeRow>>) -> Result<Vec<RangeRow>, Error> {
        let Range {
            namespace,
            prefix,
            after,
            limit,
        } = &ask.range;
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        for tries in 1.. {
            if caller.is_closed() || self.store.breaker().is_open() {
                return Err(store_down());
            }
            let rows = self.session.rows_below(namespace, prefix, after.as_deref(), *limit);
            let error = match rows.await {
                Ok(rows) => return Ok(rows),
                Err(error) => error,
            };
            match error.kind {
                StoreErrorKind::Unreachable => return Err(store_down()),
                StoreErrorKind::Rejected => {
                    tracing::error!(%error, "the store rejects the query of a scan");
                    let message = "the store rejects the query of this scan";
                    return Err(Error::new(ErrorKind::Internal, message).because(error));
                }
                StoreErrorKind::Transient | StoreErrorKind::Unknown => {}
            }
            let delay = backoff.delay();
            if tries >= TRIES_MAX || ask.deadline <= Instant::now() + delay {
                return Err(refused_for_now(&error));
            }
            if self.stop.run_until_cancelled(sleep(delay)).await.is_none() {
                break;
            }
        }
        Err(shutting_down())
    }
}
