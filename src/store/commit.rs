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

use std::{cmp::Reverse, sync::Arc, time::Duration};

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    error::{Error, ErrorKind, Outcome},
    model::{Version, Write},
    store::{
        Committed, Config, Session, Store, StoreError, StoreErrorKind,
        gather::{Answer, Bounds, Gatherer, RETRY_AFTER, out_of_time, shutting_down, store_down},
    },
    telemetry::{CommitLabels, CommitPath, StoreMetrics},
};

/// Tries of a statement, after which a store that refuses for a reason that will pass makes its callers come back.
const TRIES_MAX: u32 = 5;
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// The write-through path into the store. Clones share it.
#[derive(Clone)]
pub struct GroupCommit {
    line: Arc<Gatherer<Ask, Committed>>,
    store: Store,
    connections: usize,
    metrics: StoreMetrics,
}

struct Ask {
    write: Write,
    deadline: Instant,
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
        let labels = CommitLabels {
            path: CommitPath::Through,
        };
        (0..self.connections)
            .map(|_| {
                let committer = Committer {
                    session: self.store.session(),
                    store: self.store.clone(),
                    line: Arc::clone(&self.line),
                    stop: stop.clone(),
                    metrics: Metrics {
                        duration: self.metrics.commit_duration.get_or_create_owned(&labels),
                        batch: self.metrics.commit_batch.get_or_create_owned(&labels),
                        retries: self.metrics.retries.get_or_create_owned(&labels),
                        superseded: self.metrics.superseded.get_or_create_owned(&labels),
                    },
                };
                tokio::spawn(committer.run())
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
        let ask = Ask { write, deadline };
        self.line.ask(ask, weight, deadline, self.store.breaker()).await
    }
}

struct Metrics {
    duration: Histogram,
    batch: Histogram,
    retries: Counter,
    superseded: Counter,
}

/// A caller's write, on its way.
struct Caller {
    write: Write,
    deadline: Instant,
    answer: Answer<Committed>,
    /// A statement that held this version ended `Unknown`: it may be in the store, now or later.
    open: bool,
}

impl Caller {
    fn version(&self) -> Version {
        self.write.entry.version
    }

    fn succeed(self, committed: Committed) {
        // A caller that is gone does not want to know.
        let _gone = self.answer.send(Ok(committed));
    }

    fn swallowed(self) {
        let message =
            "the store neither took the write nor holds a newer one: a trigger or a rule of the table swallowed it";
        self.fail(Error::new(ErrorKind::Rejected, message).unknown());
    }

    fn fail(self, error: Error) {
        let error = if self.open { error.unknown() } else { error };
        let _gone = self.answer.send(Err(error));
    }
}

/// The writes of one key, highest version first: the first is sent, the others ride along. Never empty between two steps.
type Row = Vec<Caller>;

/// One connection that commits.
struct Committer {
    session: Session,
    store: Store,
    line: Arc<Gatherer<Ask, Committed>>,
    stop: CancellationToken,
    metrics: Metrics,
}

impl Committer {
    async fn run(mut self) {
        while let Some(Some(batch)) = self.stop.run_until_cancelled(self.line.take()).await {
            // What is left to settle, each in statements of its own.
            let mut left = vec![rows(batch)];
            while let Some(rows) = left.pop() {
                left.extend(self.serve(rows).await);
            }
        }
        self.line.close();
    }

    /// Tries rows until each of their writes is answered, or must go on in other statements, which are returned.
    async fn serve(&mut self, mut rows: Vec<Row>) -> Vec<Vec<Row>> {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        let mut tries = 0;
        loop {
            fail_if(&mut rows, |caller, now| (caller.deadline <= now).then(out_of_time));
            if self.store.breaker().is_open() {
                fail_if(&mut rows, |caller, _| (!caller.open).then(store_down));
            } else if !rows.is_empty() {
                if tries > 0 {
                    self.metrics.retries.inc();
                }
                tries += 1;
                match self.send(&rows).await {
                    Ok(results) => {
                        self.answer(rows, results);
                        return Vec::new();
                    }
                    Err(error) if error.kind == StoreErrorKind::Rejected => return self.divide(rows, error).await,
                    Err(error) => absorb(&mut rows, &error, tries),
                }
            }
            if rows.is_empty() {
                return Vec::new();
            }
            self.pause(&mut rows, backoff.delay()).await;
        }
    }

    /// Sends the highest write of each row.
    async fn send(&mut self, rows: &[Row]) -> Result<Vec<Committed>, StoreError> {
        let writes: Vec<Write> = rows
            .iter()
            .filter_map(|row| row.first())
            .map(|first| first.write.clone())
            .collect();
        let begun = Instant::now();
        let results = self.session.commit(&writes).await;
        self.metrics.duration.observe(begun.elapsed().as_secs_f64());
        self.metrics.batch.observe(writes.len() as f64);
        results
    }

    /// Answers every write of a statement that was committed.
    fn answer(&self, rows: Vec<Row>, results: Vec<Committed>) {
        for (row, result) in rows.into_iter().zip(results) {
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
                        self.metrics.superseded.inc();
                        caller.succeed(Committed::Superseded { standing });
                    }
                }
            }
        }
    }

    /// After a refusal of rows: the halves to try, down to the row at fault, which fails alone.
    async fn divide(&mut self, mut rows: Vec<Row>, refusal: StoreError) -> Vec<Vec<Row>> {
        if rows.len() > 1 {
            let second = rows.split_off(rows.len() / 2);
            return vec![second, rows];
        }
        // Only a row that fails where a harmless one does not is itself at fault.
        if let Err(error) = self.session.probe().await {
            tracing::warn!(%error, "the store refuses every row");
            fail_if(&mut rows, |_, _| Some(refused_for_now(&refusal)));
            return Vec::new();
        }
        // Or the table was mended between the refusal and the probe: so the row once more.
        let refusal = match self.send(&rows).await {
            Ok(results) => {
                self.answer(rows, results);
                return Vec::new();
            }
            Err(error) if error.kind == StoreErrorKind::Rejected => error,
            Err(error) => {
                absorb(&mut rows, &error, 1);
                return vec![rows];
            }
        };
        tracing::debug!(error = %refusal, "the store refuses a write for good");
        let poison = rows.first().and_then(|row| row.first()).map(Caller::version);
        let refusal = Arc::new(refusal);
        fail_if(&mut rows, |caller, _| {
            // The same version is the same write.
            (Some(caller.version()) == poison).then(|| {
                Error::new(ErrorKind::Rejected, "the store rejects this record for good").because(Arc::clone(&refusal))
            })
        });
        if rows.is_empty() { Vec::new() } else { vec![rows] }
    }

    /// Waits before the next try. What cannot have one before its deadline and is not open is told so now, while "not applied" is
    /// still certain to reach its caller.
    async fn pause(&mut self, rows: &mut Vec<Row>, delay: Duration) {
        fail_if(rows, |caller, now| {
            (!caller.open && caller.deadline <= now + delay).then(|| {
                Error::new(ErrorKind::Unavailable, "the store did not take the write in time").retry_after(RETRY_AFTER)
            })
        });
        if rows.is_empty() {
            return;
        }
        let slept = self.stop.run_until_cancelled(tokio::time::sleep(delay)).await;
        if slept.is_none() {
            fail_if(rows, |_, _| Some(shutting_down()));
        }
    }
}

/// Groups a batch by key, sorted as the store wants it.
fn rows(batch: Vec<(Ask, Answer<Committed>)>) -> Vec<Row> {
    let mut writes: Vec<Caller> = batch
        .into_iter()
        .map(|(Ask { write, deadline }, answer)| Caller {
            write,
            deadline,
            answer,
            open: false,
        })
        .collect();
    writes.sort_by(|a, b| (&a.write.key, Reverse(a.version())).cmp(&(&b.write.key, Reverse(b.version()))));
    let mut rows: Vec<Row> = Vec::with_capacity(writes.len());
    for caller in writes {
        match rows.last_mut() {
            Some(row) if row.first().is_some_and(|first| first.write.key == caller.write.key) => row.push(caller),
            _ => rows.push(vec![caller]),
        }
    }
    rows
}

/// Answers the writes for which `error` has one, and lets the others stand.
fn fail_if(rows: &mut Vec<Row>, mut error: impl FnMut(&Caller, Instant) -> Option<Error>) {
    let now = Instant::now();
    for row in rows.iter_mut() {
        let mut at = 0;
        while let Some(caller) = row.get(at) {
            match error(caller, now) {
                Some(error) => row.remove(at).fail(error),
                None => at += 1,
            }
        }
    }
    rows.retain(|row| !row.is_empty());
}

/// What a try that failed as a whole means for its writes.
fn absorb(rows: &mut Vec<Row>, error: &StoreError, tries: u32) {
    match error.kind {
        StoreErrorKind::Unreachable => fail_if(rows, |caller, _| (!caller.open).then(store_down)),
        StoreErrorKind::Unknown => {
            tracing::warn!(%error, rows = rows.len(), "the outcome of a commit is unknown; it is tried again");
            #[cfg(feature = "planted-faults")]
            planted::refuse(rows);
            mark_open(rows);
        }
        StoreErrorKind::Transient | StoreErrorKind::Rejected if tries >= TRIES_MAX => {
            tracing::warn!(%error, rows = rows.len(), "the store takes no commit at present");
            fail_if(rows, |caller, _| (!caller.open).then(|| refused_for_now(error)));
        }
        StoreErrorKind::Transient | StoreErrorKind::Rejected => {}
    }
}

/// Marks what the last statement held. The same version is the same write.
fn mark_open(rows: &mut [Row]) {
    for row in rows {
        let sent = row.first().map(Caller::version);
        for caller in row.iter_mut().filter(|caller| Some(caller.version()) == sent) {
            caller.open = true;
        }
    }
}

fn refused_for_now(error: &StoreError) -> Error {
    Error::new(ErrorKind::Unavailable, "the store takes no writes at present")
        .retry_after(RETRY_AFTER)
        .because(error.to_string())
}

#[cfg(feature = "planted-faults")]
mod planted;
#[cfg(test)]
mod tests;
