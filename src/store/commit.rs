//! Write-through: callers that wait for the store share its commits.
//!
//! Owns the grouping of writes into statements and what each caller is told. Does not own versions (the caller stamps, and restamps
//! after a definite refusal) nor the queue's drain. Invariants: a write is only ever sent under the version that its caller gave it;
//! `Applied` is only answered once the store holds that version or a newer one; "not applied" is only answered when no statement
//! that held the version can have taken effect.
//!
//! One statement holds one entry per key, the highest that waits, and is sorted by key. The lower writes of its key ride along: they
//! are concurrent with it, so once it is applied they were applied and at once superseded, which is `Applied`. They are never sent
//! unless the higher one leaves.
//!
//! What a try tells, and what becomes of the writes (a write is *open* once a statement that held it ended `Unknown`):
//!
//! | try | a write that is not open | an open write |
//! |---|---|---|
//! | applied, or the same version stands | Applied | Applied |
//! | a higher version stands, or the horizon does | Superseded: the caller may restamp | error, unknown |
//! | neither written nor superseded | Rejected, unknown: something in the table swallowed it | the same |
//! | `Rejected`, several rows | tried again in halves | the same |
//! | `Rejected`, alone, a harmless row is not | Rejected, not applied; its riders are tried in their own right | Rejected, unknown |
//! | `Rejected`, alone, so is a harmless row | Unavailable, not applied | Unavailable, unknown |
//! | `Transient` | a few more tries, then Unavailable, not applied | tried again until its deadline |
//! | `Unreachable`, or the breaker is open | Unavailable, not applied, at once | tried again, once it has closed, until its deadline |
//! | `Unknown` | open if the statement held it, else it waits along | tried again until its deadline |
//! | none before its deadline | Timeout, not applied | Timeout, unknown |
//! | none before the shutdown | Unavailable, not applied | Unavailable, unknown |
//!
//! Two connections may commit one key at once: the version decides.

use std::{cmp::Reverse, sync::Arc};

use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, ErrorKind, Outcome},
    model::{Version, Write},
    store::{
        Committed, Config, Session, Store, StoreError,
        gather::{Bounds, Gatherer},
        tries::{self, Ask, Callers, Line, Metrics, Worker, rejected},
    },
    telemetry::{CommitPath, StoreMetrics},
};

/// The write-through path into the store. Clones share it.
#[derive(Clone)]
pub struct GroupCommit {
    line: Arc<Line<Rows>>,
    store: Store,
    connections: usize,
    metrics: StoreMetrics,
}

impl GroupCommit {
    /// The path, closed until [`GroupCommit::start`] opens connections behind it: until then, calls wait.
    pub fn new(store: Store, config: &Config, metrics: StoreMetrics) -> GroupCommit {
        let bounds = Bounds {
            waiting_max: config.waiting_commits_max.get(),
            waiting_bytes_max: config.waiting_commits_bytes_max.get(),
            batch_max: config.commit_batch_writes_max.get(),
            batch_bytes_max: config.commit_batch_bytes_max.get(),
        };
        GroupCommit {
            line: Arc::new(Gatherer::new(bounds, Outcome::Unknown)),
            connections: config.commit_connections.get().min(store.writers_max()).max(1),
            store,
            metrics,
        }
    }

    /// Starts the tasks that commit, on the current runtime. When `stop` is cancelled they finish the statement that runs, answer what
    /// still waits with `Unavailable`, and end.
    #[must_use = "a task that ends before it was told to has died"]
    pub fn start(&self, stop: &CancellationToken) -> Vec<JoinHandle<()>> {
        (0..self.connections)
            .map(|_| {
                let worker: Worker<Rows> = Worker {
                    session: self.store.session(),
                    store: self.store.clone(),
                    line: Arc::clone(&self.line),
                    stop: stop.clone(),
                    context: (),
                    metrics: Rows::PATH.map(|path| Metrics::new(&self.metrics, path)),
                };
                worker.start()
            })
            .collect()
    }

    /// Commits a write, and says what the store made of it. `Superseded` is a definite refusal: this version is not in the store and
    /// never will be, so the caller may stamp the write anew, above what stands. A write at or below the horizon, which a clock that is
    /// far behind stamped, is answered so too: the horizon is then what stands.
    ///
    /// Once begun, the write goes on when the future is dropped. At the deadline a write that still waits is taken back; one that a
    /// connection has is answered with what became of it, which may be up to a call's bound later.
    ///
    /// # Errors
    /// Each says whether the write may still take effect. `Overloaded`: too many writes wait. `Rejected`: the store rejects this write
    /// for good. `Unavailable`: the store is not there, or the gateway shuts down. `Timeout`: the deadline passed.
    pub async fn commit(&self, write: Write, deadline: Instant) -> Result<Committed, Error> {
        let weight = write.weight();
        let ask = Ask {
            question: write,
            deadline,
        };
        self.line.ask(ask, weight, deadline, self.store.breaker()).await
    }
}

/// A caller's write, on its way.
type Caller = tries::Caller<Write, Committed>;

impl Caller {
    fn version(&self) -> Version {
        self.question.entry.version
    }

    fn swallowed(self) {
        let message =
            "the store neither took the write nor holds a newer one: a trigger or a rule of the table swallowed it";
        self.fail(Error::new(ErrorKind::Rejected, message).unknown());
    }
}

/// The writes of one key, highest version first: the first is sent, the others ride along. Never empty between two steps.
type Row = Vec<Caller>;

/// The rows of a statement, sorted as the store wants them.
struct Rows(Vec<Row>);

impl Callers for Rows {
    type Question = Write;
    type Result = Committed;
    type Context = ();

    const REFUSED: &str = "the store takes no writes at present";
    const PATH: Option<CommitPath> = Some(CommitPath::Through);

    fn gather(mut callers: Vec<Caller>) -> Rows {
        callers.sort_by(|a, b| (&a.question.key, Reverse(a.version())).cmp(&(&b.question.key, Reverse(b.version()))));
        let mut rows: Vec<Row> = Vec::with_capacity(callers.len());
        for caller in callers {
            match rows.last_mut() {
                Some(row)
                    if row
                        .first()
                        .is_some_and(|first| first.question.key == caller.question.key) =>
                {
                    row.push(caller);
                }
                _ => rows.push(vec![caller]),
            }
        }
        Rows(rows)
    }

    fn parts(&self) -> usize {
        self.0.len()
    }

    fn split_off_half(&mut self) -> Rows {
        Rows(self.0.split_off(self.0.len() / 2))
    }

    /// Sends the highest write of each row.
    async fn send(&self, session: &mut Session, (): &()) -> Result<Vec<Committed>, StoreError> {
        let firsts = self.0.iter().filter_map(|row| row.first());
        let writes: Vec<Write> = firsts.map(|first| first.question.clone()).collect();
        session.commit(&writes).await
    }

    fn answer(self, results: Vec<Committed>, metrics: Option<&Metrics>) {
        for (row, result) in self.0.into_iter().zip(results) {
            let standing = match result {
                Committed::Applied => None,
                Committed::Superseded { standing } | Committed::BelowHorizon { horizon: standing } => Some(standing),
                Committed::Skipped => {
                    row.into_iter().for_each(Caller::swallowed);
                    continue;
                }
            };
            for caller in row {
                match standing {
                    None => caller.succeed(Committed::Applied),
                    Some(_) if caller.open => caller.fail(Error::new(
                        ErrorKind::Unavailable,
                        "the connection to the store was lost during the commit, and a newer write stands by now",
                    )),
                    Some(standing) => {
                        if let Some(metrics) = metrics {
                            metrics.superseded.inc();
                        }
                        caller.succeed(Committed::Superseded { standing });
                    }
                }
            }
        }
    }

    /// Marks what the last statement held. The same version is the same write.
    fn lost(&mut self, error: &StoreError, _: u32) {
        tracing::warn!(%error, rows = self.parts(), "the outcome of a commit is unknown; it is tried again");
        #[cfg(feature = "planted-faults")]
        planted::refuse(&mut self.0);
        for row in &mut self.0 {
            let sent = row.first().map(Caller::version);
            for caller in row.iter_mut().filter(|caller| Some(caller.version()) == sent) {
                caller.open = true;
            }
        }
    }

    fn reject(&mut self, refusal: StoreError) {
        let poison = self.0.first().and_then(|row| row.first()).map(Caller::version);
        let refusal = Arc::new(refusal);
        // The same version is the same write.
        self.fail_if(|caller, _| (Some(caller.version()) == poison).then(|| rejected(&refusal)));
    }

    fn fail_if(&mut self, mut error: impl FnMut(&Caller, Instant) -> Option<Error>) {
        let now = Instant::now();
        for row in &mut self.0 {
            tries::fail_if(row, now, &mut error);
        }
        self.0.retain(|row| !row.is_empty());
    }
}

#[cfg(feature = "planted-faults")]
mod planted;
#[cfg(test)]
mod tests;
