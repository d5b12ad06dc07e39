//! Operations that the store decides: callers that wait for it share its transactions.
//!
//! Owns the grouping of operations into transactions and what each caller is told. Does not own what is decided (`decide.rs`), nor versions
//! (the caller stamps, and restamps what is `Outdated`). Invariants: an operation is only ever sent under the version and the request id that its
//! caller gave it; it is applied at most once, however often it is tried; "not applied" is only answered when it is not, and never will be.
//!
//! One transaction holds any number of operations of a key, sorted by version, and moves its row once.
//!
//! What a try tells, and what becomes of the operations (an operation is *open* once a transaction that held it ended `Unknown`):
//!
//! | try | an operation that is not open | an open operation |
//! |---|---|---|
//! | decided | what was decided | the same |
//! | `Rejected`, several operations | tried again in halves | the same |
//! | `Rejected`, alone, a harmless row is not | Rejected, not applied | Rejected, unknown |
//! | `Rejected`, alone, so is a harmless row | Unavailable, not applied | Unavailable, unknown |
//! | another session holds a row, several rows | tried again in halves | the same |
//! | another session holds a row, alone | set aside, and tried again until its deadline, then Unavailable, not applied | the same, Unavailable, unknown |
//! | so many are set aside | Overloaded, not applied | Overloaded, unknown |
//! | else `Transient` | a few more tries, then Unavailable, not applied | tried again until its deadline |
//! | `Unreachable`, or the breaker is open | Unavailable, not applied, at once | tried again, once it has closed, until its deadline |
//! | `Unknown` | open | tried again until its deadline |
//! | none before its deadline | Timeout, not applied | Timeout, unknown |
//! | none before the shutdown | Unavailable, not applied | Unavailable, unknown |
//!
//! **Why what is decided of an open operation is definite.** An earlier try left its request id in the transaction in which it took effect, or
//! took none. A try waits for the locks of the rows that it reads before it asks which ids are known, and the earlier one holds those
//! that it changed until it is over: if it was applied, that is seen (`Repeated`), and if it is not seen, it never will be applied. Where the earlier
//! one made the row, there was nothing to lock: then this one waits for it when it inserts the row itself, finds the key taken, and begins anew;
//! and where it would insert nothing, the backend makes it wait for the earlier one's id all the same. So no try has to guess, as a commit without an
//! id has to when a higher version stands.
//!
//! Look-ups of what is known of requests and of dead letters have a connection of their own.

use std::sync::Arc;

use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    error::{Error, Outcome},
    model::{Answered, Key, RequestId, Version},
    store::{
        Config, Session, Store, StoreError,
        gather::{Bounds, Gatherer},
        lookups::{Found, Lookup, Lookups},
        operation::{Decided, Operation},
        tries::{self, Ask, Callers, Line, Metrics, Worker, rejected},
    },
    telemetry::{CommitPath, StoreMetrics},
};

/// The path of operations into the store. Clones share it.
#[derive(Clone)]
pub struct GroupDecide {
    line: Arc<Line<Operations>>,
    lookups: Arc<Line<Lookups>>,
    store: Store,
    connections: usize,
    clock: Arc<Clock>,
    metrics: StoreMetrics,
}

impl GroupDecide {
    /// The path, closed until [`GroupDecide::start`] opens connections behind it: until then, calls wait. Each try goes by what `clock` shows then.
    pub fn new(store: Store, config: &Config, clock: Arc<Clock>, metrics: StoreMetrics) -> GroupDecide {
        let bounds = Bounds {
            waiting_max: config.waiting_commits_max.get(),
            waiting_bytes_max: config.waiting_commits_bytes_max.get(),
            batch_max: config.commit_batch_writes_max.get(),
            batch_bytes_max: config.commit_batch_bytes_max.get(),
        };
        let lookup_bounds = Bounds {
            waiting_max: config.waiting_loads_max.get(),
            // Names and keys are bounded one by one.
            waiting_bytes_max: usize::MAX,
            batch_max: config.load_batch_keys_max.get(),
            batch_bytes_max: usize::MAX,
        };
        GroupDecide {
            line: Arc::new(Gatherer::new(bounds, Outcome::Unknown)),
            lookups: Arc::new(Gatherer::new(lookup_bounds, Outcome::NotApplied)),
            connections: config.decide_connections.get().min(store.writers_max()).max(1),
            store,
            clock,
            metrics,
        }
    }

    /// Starts the tasks that decide and look up, on the current runtime. When `stop` is cancelled they finish the transaction that runs, answer
    /// what still waits with `Unavailable`, and end.
    #[must_use = "a task that ends before it was told to has died"]
    pub fn start(&self, stop: &CancellationToken) -> Vec<JoinHandle<()>> {
        let deciding =
            (0..self.connections).map(|_| self.worker::<Operations>(&self.line, Arc::clone(&self.clock), stop));
        let looking_up = [self.worker::<Lookups>(&self.lookups, (), stop)];
        deciding.chain(looking_up).collect()
    }

    fn worker<C: Callers>(&self, line: &Arc<Line<C>>, context: C::Context, stop: &CancellationToken) -> JoinHandle<()> {
        let worker: Worker<C> = Worker {
            session: self.store.session(),
            store: self.store.clone(),
            line: Arc::clone(line),
            stop: stop.clone(),
            context,
            metrics: C::PATH.map(|path| Metrics::new(&self.metrics, path)),
        };
        worker.start()
    }

    /// Decides an operation, and says what the store made of it: always a definite answer.
    ///
    /// Once begun, the operation goes on when the future is dropped. At the deadline one that still waits is taken back; one that a connection
    /// has is answered with what became of it, which may be up to a call's bound later.
    ///
    /// # Errors
    /// Each says whether the operation may still take effect. `Overloaded`: too many operations wait. `Rejected`: the store rejects the
    /// record for good. `Unavailable`: the store is not there, or another session of it holds the record, or the gateway shuts down. `Timeout`: the deadline passed.
    pub async fn decide(&self, operation: Operation, deadline: Instant) -> Result<Decided, Error> {
        let weight = operation.weight();
        let ask = Ask {
            question: operation,
            deadline,
        };
        self.line.ask(ask, weight, deadline, self.store.breaker()).await
    }

    /// What the store remembers of a request. One whose window is over may be answered or not. Changes nothing; dropping the future is harmless.
    ///
    /// # Errors
    /// `Overloaded`: too many look-ups wait. `Unavailable`: the store is not there, or the gateway shuts down. `Timeout`: the deadline passed.
    pub async fn answer_of(
        &self,
        namespace: &str,
        id: &RequestId,
        deadline: Instant,
    ) -> Result<Option<Answered>, Error> {
        let lookup = Lookup::Answer {
            namespace: namespace.to_owned(),
            id: id.clone(),
        };
        match self.look_up(lookup, deadline).await? {
            Found::Answer(answered) => Ok(answered),
            Found::Buried(_) => Ok(None),
        }
    }

    /// Whether the dead-letter table holds this version of a key or a higher one: a write that was coalesced goes there under the version of the
    /// one that covers it. To be asked of a write that the store has neither itself nor a higher one of. Changes nothing; dropping the future is
    /// harmless.
    ///
    /// # Errors
    /// As of [`GroupDecide::answer_of`].
    pub async fn is_buried(&self, key: &Key, version: Version, deadline: Instant) -> Result<bool, Error> {
        let lookup = Lookup::Buried {
            key: key.clone(),
            version,
        };
        Ok(self.look_up(lookup, deadline).await? == Found::Buried(true))
    }

    async fn look_up(&self, lookup: Lookup, deadline: Instant) -> Result<Found, Error> {
        let ask = Ask {
            question: lookup,
            deadline,
        };
        self.lookups.ask(ask, 1, deadline, self.store.breaker()).await
    }
}

/// A caller's operation, on its way.
type Caller = tries::Caller<Operation, Decided>;

/// The operations of a transaction, sorted by key, then by version.
struct Operations(Vec<Caller>);

impl Callers for Operations {
    type Question = Operation;
    type Result = Decided;
    type Context = Arc<Clock>;

    const REFUSED: &str = "the store takes no writes at present";
    const PATH: Option<CommitPath> = Some(CommitPath::Decided);
    const WAITS_ASIDE: bool = true;

    fn gather(mut callers: Vec<Caller>) -> Operations {
        callers.sort_by(|a, b| (&a.question.key, a.question.version).cmp(&(&b.question.key, b.question.version)));
        Operations(callers)
    }

    fn parts(&self) -> usize {
        self.0.len()
    }

    fn split_off_half(&mut self) -> Operations {
        Operations(self.0.split_off(self.0.len() / 2))
    }

    fn split_off_records(&mut self) -> Option<Operations> {
        // The beginning of a record in the second half, or else the last one's.
        let middle = self.0.get(self.0.len() / 2)?.question.key.clone();
        let mut cut = self.0.partition_point(|caller| caller.question.key < middle);
        if cut == 0 {
            cut = self.0.partition_point(|caller| caller.question.key <= middle);
        }
        (cut < self.0.len()).then(|| Operations(self.0.split_off(cut)))
    }

    fn alike(&self, others: &mut Operations) -> Operations {
        let Some(first) = self.0.first() else {
            return Operations(Vec::new());
        };
        let key = &first.question.key;
        let begin = others.0.partition_point(|caller| caller.question.key < *key);
        let end = others.0.partition_point(|caller| caller.question.key <= *key);
        Operations(others.0.drain(begin..end).collect())
    }

    fn join(&mut self, others: Operations) {
        let callers = std::mem::take(&mut self.0);
        *self = Operations::gather(callers.into_iter().chain(others.0).collect());
    }

    fn weight(operation: &Operation) -> usize {
        operation.weight()
    }

    async fn send(&self, session: &mut Session, clock: &Arc<Clock>) -> Result<Vec<Decided>, StoreError> {
        let operations: Vec<Operation> = self.0.iter().map(|caller| caller.question.clone()).collect();
        session.decide(&operations, clock.now()).await
    }

    fn answer(self, results: Vec<Decided>, metrics: Option<&Metrics>) {
        for (caller, decided) in self.0.into_iter().zip(results) {
            if let (Decided::Outdated { .. }, Some(metrics)) = (&decided, metrics) {
                metrics.superseded.inc();
            }
            caller.succeed(decided);
        }
    }

    fn lost(&mut self, error: &StoreError, _: u32) {
        tracing::warn!(%error, operations = self.parts(), "the outcome of a transaction is unknown; it is tried again");
        for caller in &mut self.0 {
            caller.open = true;
        }
    }

    fn reject(&mut self, refusal: StoreError) {
        let refusal = Arc::new(refusal);
        self.fail_if(|_, _| Some(rejected(&refusal)));
    }

    fn fail_if(&mut self, mut error: impl FnMut(&Caller, Instant) -> Option<Error>) {
        tries::fail_if(&mut self.0, Instant::now(), &mut error);
    }
}

#[cfg(test)]
mod tests;
