//! The drain workers: the only ones that take batches from the queue and commit them.
//!
//! Owns when a worker acts, how it tries again, and what becomes of a row that the store refuses; also that request ids which no batch takes
//! along are brought to the store. Does not own the order of draining
//! (the pending table), the halving of rejected batches (`bisect`) nor what an error means (the store). A batch starts when
//! none is in flight, something is due, and either a whole batch is there or the last one began long enough ago: what a journal has made durable is
//! in no hurry, and a store that keeps up would otherwise be given many small batches, each nearly as dear as a large one
//! (docs/decisions/0024-batches-are-gathered.md has the figures). Invariants: a
//! worker has one batch in flight; a write leaves the table only once the store holds it, or something newer, or its dead letter;
//! a failure is never the end of a write. Commits may be repeated, so one with an unknown outcome is simply tried again.

use std::{
    collections::VecDeque,
    future, mem,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    Config, DropReason, Dropped, Notice, Shard, Shared,
    bisect::Bisection,
    pending::{Settled, entries_of},
    report::Doing,
};
use crate::{
    backoff::Backoff,
    model::{KeyedAnswer, Write},
    store::{Committed, DeadLetter, Session, StoreError, StoreErrorKind},
    telemetry::{CommitLabels, CommitPath, StoreMetrics},
};

/// How many writes are taken or settled under one hold of the shard's lock, which the callers' threads need too.
const LOCKED_MAX: usize = 128;

/// The longest wait between tries once the queue is closed: its deadline is near.
const CLOSING_BACKOFF_MAX: Duration = Duration::from_secs(1);

/// The worker of one shard.
pub(super) struct Worker {
    shared: Arc<Shared>,
    index: usize,
    session: Session,
    notices: mpsc::Sender<Notice>,
    batch_writes_max: usize,
    batch_bytes_max: usize,
    interval: Duration,
    /// Until when the next batch is gathered.
    gathers_until: Option<Instant>,
    commits: Retry,
    /// A bisection that an outage interrupted; its rows stay in flight.
    unfinished: Option<Bisection>,
    /// Rows to be buried. They stay in flight until they are, so that nobody takes them; the others pass them by.
    condemned: VecDeque<DeadLetter>,
    burials: Retry,
    /// Of request ids by themselves.
    remembrances: Retry,
    /// Whether the last thing done was to bring such ids to the store: a batch is next then, if there is one.
    has_remembered: bool,
    metrics: Metrics,
}

/// [`StoreMetrics`] of this path.
struct Metrics {
    commit_duration: Histogram,
    commit_batch: Histogram,
    retries: Counter,
    superseded: Counter,
    dead_letters: Counter,
}

/// What there is to do.
enum Event {
    /// Commit these.
    Drain(Bisection),
    /// Bury this.
    Bury(DeadLetter),
    /// Bring these to the store.
    Remember(Vec<KeyedAnswer>),
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        index: usize,
        session: Session,
        notices: mpsc::Sender<Notice>,
        config: &Config,
        metrics: &StoreMetrics,
    ) -> Worker {
        let labels = CommitLabels {
            path: CommitPath::Behind,
        };
        Worker {
            shared,
            index,
            session,
            notices,
            batch_writes_max: config.drain_batch_writes_max.get(),
            batch_bytes_max: config.drain_batch_bytes_max.get(),
            interval: config.drain_interval,
            gathers_until: None,
            commits: Retry::new(config),
            unfinished: None,
            condemned: VecDeque::new(),
            burials: Retry::new(config),
            remembrances: Retry::new(config),
            has_remembered: false,
            metrics: Metrics {
                commit_duration: metrics.commit_duration.get_or_create_owned(&labels),
                commit_batch: metrics.commit_batch.get_or_create_owned(&labels),
                retries: metrics.retries.get_or_create_owned(&labels),
                superseded: metrics.superseded.get_or_create_owned(&labels),
                dead_letters: metrics.dead_letters.clone(),
            },
        }
    }

    /// Drains for ever. Dropped in the middle, it leaves its batch in flight: no other worker may follow it in this process.
    pub(super) async fn run(mut self) {
        loop {
            let event = self.select().await;
            self.tell_doing(Doing::Writing);
            match event {
                Event::Drain(batch) => self.drain(batch).await,
                Event::Bury(letter) => self.bury(letter).await,
                Event::Remember(answers) => self.remember(answers).await,
            }
        }
    }

    /// Waits until there is something to do.
    async fn select(&mut self) -> Event {
        loop {
            let closed = self.shared.budget.is_closed();
            let now = Instant::now();
            let wake_at = match self.decide(now, closed) {
                Ok(event) => return event,
                Err(wake_at) => wake_at,
            };
            self.tell_doing(self.waiting_for(now));
            let may_drain = self.commits.is_over(now, closed);
            tokio::select! {
                // What is accepted meanwhile does not shorten a backoff; the word of it is kept until then.
                () = self.shard().changed.notified(), if may_drain => {}
                () = at(wake_at) => {}
                () = self.shared.closing.cancelled(), if !closed => {}
            }
        }
    }

    /// What it waits for where there is nothing to do.
    fn waiting_for(&self, now: Instant) -> Doing {
        let retries = [&self.commits, &self.burials, &self.remembrances];
        if retries.into_iter().any(Retry::is_failing) {
            Doing::BackingOff
        } else if self.gathers_until.is_some_and(|until| now < until) {
            Doing::Gathering
        } else {
            Doing::Idle
        }
    }

    fn tell_doing(&self, doing: Doing) {
        self.shard().board.does(doing, self.shared.clock.now());
    }

    /// What there is to do at `now`, or else when to look again; `None`: when told.
    fn decide(&mut self, now: Instant, closed: bool) -> Result<Event, Option<Instant>> {
        let mut wake_at: Option<Instant> = None;
        if !self.condemned.is_empty() {
            if self.burials.is_over(now, closed)
                && let Some(letter) = self.condemned.pop_front()
            {
                return Ok(Event::Bury(letter));
            }
            wake_at = self.burials.ends_at(closed);
        }
        // In turns, so that neither waits for the end of the other.
        if !mem::take(&mut self.has_remembered)
            && let Some(answers) = self.take_loose(now, closed)
        {
            return Ok(Event::Remember(answers));
        }
        let next_try = if self.commits.is_over(now, closed) {
            if let Some(batch) = self.unfinished.take() {
                return Ok(Event::Drain(batch));
            }
            match self.gathers_until(now) {
                Some(until) => Some(until),
                None => {
                    let batch = self.take();
                    if !batch.is_empty() {
                        self.gathers_until = Some(now + self.interval);
                        return Ok(Event::Drain(Bisection::new(batch)));
                    }
                    let due = self.shard().pending.lock().next_due();
                    due.map(|due| now + due.since(self.shared.clock.now()))
                }
            }
        } else {
            self.commits.ends_at(closed)
        };
        if let Some(answers) = self.take_loose(now, closed) {
            return Ok(Event::Remember(answers));
        }
        let is_owed = self.shard().pending.lock().loose() > 0;
        let next_remembrance = self.remembrances.ends_at(closed).filter(|_| is_owed);
        Err(wake_at.into_iter().chain(next_try).chain(next_remembrance).min())
    }

    /// Until when more is gathered, if it is: `None` where a whole batch is there, or nothing may wait.
    fn gathers_until(&self, now: Instant) -> Option<Instant> {
        let until = self.gathers_until.filter(|until| now < *until)?;
        if self.shared.is_hurried() {
            return None;
        }
        let mut pending = self.shard().pending.lock();
        let is_whole = pending.gather(self.shared.clock.now(), self.batch_writes_max, self.batch_bytes_max);
        (!is_whole && !pending.is_awaited()).then_some(until)
    }

    /// Request ids that no batch takes along, if there are any and their time has come.
    fn take_loose(&self, now: Instant, closed: bool) -> Option<Vec<KeyedAnswer>> {
        if !self.remembrances.is_over(now, closed) {
            return None;
        }
        let answers = self
            .shard()
            .pending
            .lock()
            .take_loose(self.batch_writes_max.min(LOCKED_MAX));
        Some(answers).filter(|answers| !answers.is_empty())
    }

    fn take(&self) -> Vec<Write> {
        let mut batch: Vec<Write> = Vec::new();
        let (mut entries, mut bytes) = (0, 0);
        while entries < self.batch_writes_max && bytes < self.batch_bytes_max {
            let (entries_max, bytes_max) = (self.batch_writes_max - entries, self.batch_bytes_max - bytes);
            let hurried = self.shared.is_hurried();
            let taken = self.shared.change(self.shard(), |pending| {
                // Under the lock, so that nothing accepted before is due after.
                let now = self.shared.clock.now();
                pending.take(now, entries_max.min(LOCKED_MAX), bytes_max, hurried)
            });
            if taken.is_empty() {
                break;
            }
            entries += taken.iter().map(entries_of).sum::<usize>();
            bytes += taken.iter().map(Write::weight).sum::<usize>();
            batch.extend(taken);
        }
        let (batch, outdated) = sorted(batch);
        if !outdated.is_empty() {
            // For the ids that were to go with them.
            self.release(outdated.iter());
        }
        batch
    }

    /// Commits a batch; where the store rejects it, all of it but the rows to blame, and condemns those. What an outage left undecided
    /// goes back to the table, to be joined with what comes meanwhile; a bisection is kept instead and goes on where it was,
    /// for a store that fails now and then might never see its end otherwise.
    async fn drain(&mut self, mut batch: Bisection) {
        if self.commits.is_failing() {
            self.metrics.retries.inc();
        }
        let result = self.bisect(&mut batch).await;
        let refused = batch.take_condemned().into_iter();
        self.condemn(refused.map(|(write, error)| DeadLetter {
            write,
            code: error.code,
            reason: error.message,
        }));
        let Err(error) = result else { return self.recovered() };
        if batch.is_split() && error.kind != StoreErrorKind::Rejected {
            batch.interrupted();
            self.unfinished = Some(batch);
        } else {
            self.release(batch.undecided());
        }
        self.failed(&error);
    }

    /// Commits until everything is decided, or until an outage. One that is `Rejected` is the table's: it refuses every row.
    async fn bisect(&mut self, batch: &mut Bisection) -> Result<(), StoreError> {
        while let Some(part) = batch.part() {
            let refusal = match self.commit(part).await {
                Ok(committed) if committed == [Committed::Skipped] => swallowed(),
                Ok(committed) => {
                    self.settle(part, &committed).await;
                    let skipped = committed
                        .iter()
                        .enumerate()
                        .filter(|(_, one)| **one == Committed::Skipped);
                    batch.committed(committed.contains(&Committed::Applied), skipped.map(|(place, _)| place));
                    continue;
                }
                Err(error) if error.kind != StoreErrorKind::Rejected => return Err(error),
                #[cfg(feature = "planted-faults")]
                Err(error) if crate::planted::is(crate::planted::Fault::BatchDeadLettered) => {
                    batch.condemn(&error);
                    continue;
                }
                Err(_) if part.len() > 1 => {
                    batch.halve();
                    continue;
                }
                Err(error) => error,
            };
            if batch.rejected(refusal) {
                match self.session.probe().await {
                    Ok(()) => batch.took(),
                    Err(probe) if probe.kind == StoreErrorKind::Rejected => {}
                    Err(probe) => return Err(probe),
                }
            }
            if let Some(refusal) = batch.table_refusal() {
                return Err(refusal);
            }
        }
        Ok(())
    }

    async fn commit(&mut self, writes: &[Write]) -> Result<Vec<Committed>, StoreError> {
        #[cfg(feature = "planted-faults")]
        super::planted::checkpoint(self.shard(), writes);
        kill_point!(DrainBeforeCommit);
        let started = Instant::now();
        let ids: usize = writes.iter().map(|write| write.requests.len()).sum();
        let result = if ids <= self.batch_writes_max {
            self.session.commit(writes).await
        } else {
            self.commit_in_pieces(writes).await
        };
        kill_point!(DrainCommitted);
        self.metrics.commit_duration.observe(started.elapsed().as_secs_f64());
        self.metrics.commit_batch.observe(writes.len() as f64);
        result
    }

    /// Commits writes that have more ids than a transaction should: first the ids, piece by piece, then the writes. A write that is in the store
    /// has its ids there, so whoever sends it again after a crash is known.
    async fn commit_in_pieces(&mut self, writes: &[Write]) -> Result<Vec<Committed>, StoreError> {
        let mut ids = writes.iter().flat_map(Write::answers);
        loop {
            let piece: Vec<KeyedAnswer> = ids.by_ref().take(self.batch_writes_max).collect();
            if piece.is_empty() {
                break;
            }
            self.session.remember(&piece).await.map_err(not_a_row)?;
        }
        let bare = |write: &Write| Write {
            requests: Vec::new(),
            ..write.clone()
        };
        let bare: Vec<Write> = writes.iter().map(bare).collect();
        self.session.commit(&bare).await
    }

    /// Brings request ids to the store that no write takes along, and lets go of what they hold; or puts them back.
    async fn remember(&mut self, answers: Vec<KeyedAnswer>) {
        self.has_remembered = true;
        match self.session.remember(&answers).await {
            Ok(()) => {
                self.remembrances.succeeded();
                let shared = &self.shared;
                shared.leave(self.shard(), |pending, left| pending.remembered(&answers, left));
            }
            Err(error) => {
                if !self.remembrances.is_failing() {
                    tracing::warn!(%error, "the store does not take request ids; they are kept and tried again");
                }
                self.remembrances.failed(Instant::now());
                self.shard().pending.lock().not_remembered(&answers);
            }
        }
    }

    /// Lets go of committed writes, and then tells which of them the store did not need: what is told while it is still pending
    /// could be found there, and cached, again. One that an earlier process had accepted is told instead, and let go of once it is
    /// published. Condemns those that came too late: they stay until they are buried.
    async fn settle(&mut self, writes: &[Write], committed: &[Committed]) {
        debug_assert_eq!(writes.len(), committed.len());
        let (mut late, mut notices, mut unpublished) = (Vec::new(), Vec::new(), Vec::new());
        for (writes, committed) in writes.chunks(LOCKED_MAX).zip(committed.chunks(LOCKED_MAX)) {
            self.shared.leave(self.shard(), |pending, left| {
                for (write, committed) in writes.iter().zip(committed) {
                    let (key, version) = (&write.key, write.entry.version);
                    match *committed {
                        Committed::Applied => {
                            let is_unpublished = pending.is_unpublished(key, version);
                            match pending.settle(key, version, left) {
                                Settled::ToPublish => notices.push(Notice::Confirmed(write.clone())),
                                Settled::Left if is_unpublished => unpublished.push((key.clone(), version)),
                                Settled::Left => {}
                            }
                        }
                        Committed::Superseded { standing } => {
                            pending.lose(key, version, standing, left);
                            notices.push(dropped(write, DropReason::Superseded { standing }));
                        }
                        // What a delete asks for is so already.
                        Committed::BelowHorizon { .. } if write.entry.value.is_none() => {
                            pending.lose(key, version, version, left);
                        }
                        Committed::BelowHorizon { horizon } => {
                            late.push(DeadLetter::below_horizon(write.clone(), horizon));
                        }
                        Committed::Skipped => {}
                    }
                }
            });
        }
        self.condemn(late);
        if !unpublished.is_empty() {
            notices.push(Notice::Unpublished(unpublished));
        }
        for notice in notices {
            if matches!(notice, Notice::Dropped(_)) {
                self.metrics.superseded.inc();
            }
            self.tell(notice).await;
        }
    }

    fn release<'a>(&self, writes: impl Iterator<Item = &'a Write>) {
        self.shared.change(self.shard(), |pending| {
            for write in writes {
                pending.release(&write.key, write.entry.version);
            }
        });
    }

    fn condemn(&mut self, letters: impl IntoIterator<Item = DeadLetter>) {
        let known = self.condemned.len();
        self.condemned.extend(letters);
        if let Some(first) = self.condemned.get(known) {
            tracing::warn!(
                rows = self.condemned.len() - known,
                code = first.code,
                reason = first.reason,
                "the store refuses rows for good; they go to the dead letters"
            );
        }
    }

    /// Buries a condemned row, or puts it back behind the others.
    async fn bury(&mut self, letter: DeadLetter) {
        match self.session.bury(&letter).await {
            Ok(()) => {
                self.burials.succeeded();
                self.shard().board.succeeded();
                self.metrics.dead_letters.inc();
                // Before anybody is told who waits for it.
                self.shared.dead_lettered.fetch_add(1, Ordering::Relaxed);
                let Write { key, entry, .. } = &letter.write;
                let shared = &self.shared;
                shared.leave(self.shard(), |pending, left| pending.bury(key, entry.version, left));
                self.tell(dropped(&letter.write, DropReason::DeadLettered)).await;
            }
            Err(error) => {
                if !self.burials.is_failing() {
                    tracing::warn!(%error, "the store does not take dead letters; they are kept and tried again");
                }
                self.shard().board.failed(&error, self.shared.clock.now());
                self.burials.failed(Instant::now());
                self.condemned.push_back(letter);
            }
        }
    }

    async fn tell(&mut self, notice: Notice) {
        // Nobody listens any more only when the gateway is going down.
        let _unheard = self.notices.send(notice).await;
    }

    fn failed(&mut self, error: &StoreError) {
        if !self.commits.is_failing() && self.shared.failing.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(%error, kind = ?error.kind, "the store does not take pending writes; they are kept and tried again");
        }
        self.shard().board.failed(error, self.shared.clock.now());
        self.commits.failed(Instant::now());
        // When to try again is for the backoff to say.
        self.gathers_until = None;
    }

    fn recovered(&mut self) {
        if self.commits.is_failing() && self.shared.failing.fetch_sub(1, Ordering::Relaxed) == 1 {
            tracing::info!("the store takes pending writes again");
        }
        self.shard().board.succeeded();
        self.commits.succeeded();
    }

    fn shard(&self) -> &Shard {
        &self.shared.shards[self.index]
    }
}

/// When to try something again that failed.
#[derive(Debug)]
struct Retry {
    backoff: Backoff,
    /// When the last try failed, and how long to wait since; `None` after one that did not.
    failed: Option<(Instant, Duration)>,
}

impl Retry {
    fn new(config: &Config) -> Retry {
        Retry {
            backoff: Backoff::new(config.retry_backoff_min, config.retry_backoff_max),
            failed: None,
        }
    }

    fn is_failing(&self) -> bool {
        self.failed.is_some()
    }

    fn failed(&mut self, now: Instant) {
        self.failed = Some((now, self.backoff.delay()));
    }

    fn succeeded(&mut self) {
        self.backoff.reset();
        self.failed = None;
    }

    /// When the wait ends; `None`: there is none.
    fn ends_at(&self, closed: bool) -> Option<Instant> {
        self.failed
            .map(|(failed_at, delay)| failed_at + if closed { delay.min(CLOSING_BACKOFF_MAX) } else { delay })
    }

    fn is_over(&self, now: Instant, closed: bool) -> bool {
        self.ends_at(closed).is_none_or(|ends_at| ends_at <= now)
    }
}

fn dropped(write: &Write, why: DropReason) -> Notice {
    Notice::Dropped(Dropped {
        key: write.key.clone(),
        version: write.entry.version,
        why,
    })
}

fn swallowed() -> StoreError {
    let message = "the store neither took the row nor holds a newer one: a trigger or a rule of the table swallowed it";
    StoreError::new(StoreErrorKind::Rejected, message)
}

/// Writes as a commit wants them: sorted, no key twice. A key comes twice when its write is overtaken and followed by a newer one
/// between two holds of the shard's lock; the older one, which comes second here, has left the table by then.
fn sorted(mut batch: Vec<Write>) -> (Vec<Write>, Vec<Write>) {
    batch.sort_unstable_by(|a, b| a.key.cmp(&b.key).then(b.entry.version.cmp(&a.entry.version)));
    let mut outdated = Vec::new();
    batch.dedup_by(|later, kept| {
        let is_outdated = later.key == kept.key;
        if is_outdated {
            outdated.push(later.clone());
        }
        is_outdated
    });
    (batch, outdated)
}

/// What refuses an id refuses every id: no row of the batch is to blame.
fn not_a_row(error: StoreError) -> StoreError {
    match error.kind {
        StoreErrorKind::Rejected => StoreError {
            kind: StoreErrorKind::Transient,
            ..error
        },
        _ => error,
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Entry, Key, Tags, Version};

    #[test]
    fn a_key_taken_twice_is_committed_once_as_the_newer() {
        let write = |key: &str, version| Write {
            key: Key::new("test", key).expect("valid"),
            entry: Entry {
                version: Version::new(version).expect("positive"),
                value: None,
                expires_at: None,
            },
            tags: Tags::default(),
            requests: Vec::new(),
        };
        let (batch, outdated) = sorted(vec![write("b", 1), write("c", 5), write("a", 9), write("b", 4)]);
        assert_eq!(batch, [write("a", 9), write("b", 4), write("c", 5)]);
        assert_eq!(outdated, [write("b", 1)]);
    }

    #[test]
    fn a_wait_doubles_up_to_its_bound_and_is_capped_while_closing() {
        let mut retry = Retry::new(&Config::default());
        let now = Instant::now();
        assert!(retry.is_over(now, false));
        let mut bound = Duration::from_millis(50);
        for _ in 0..100 {
            retry.failed(now);
            let wait = retry.ends_at(false).map(|at| at - now).expect("a wait");
            assert!(wait >= bound / 2 && wait <= bound, "{wait:?} of {bound:?}");
            bound = (bound * 2).min(Duration::from_secs(10));
        }
        assert!(retry.is_over(now + CLOSING_BACKOFF_MAX, true));
        retry.succeeded();
        assert!(retry.is_over(now, false));
    }
}
