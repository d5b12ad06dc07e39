//! Callers that wait for the store, and the tries of what they share.
//!
//! Owns the loop: take a batch, try it, and try again what is worth it, until each caller is answered. Does not own what is tried, nor what its
//! results mean ([`Callers`]), nor the waiting line ([`super::gather`]), nor who waits for a record that is held ([`super::aside`]). Invariants: each caller
//! is answered once, or is gone; none is told "not applied" once a try that held its question has ended without a word, unless what is tried knows
//! better.
//!
//! A record that another session holds must not stop those who want others. So a try waits for it a moment only; then its batch is divided until those
//! who want that record are alone, and these wait aside. Between two batches one such group is tried, and so takes a moment of the worker's time.

use std::{future::Future, sync::Arc, time::Duration};

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    error::{Error, ErrorKind},
    store::{
        Session, Store, StoreError, StoreErrorKind,
        aside::Aside,
        gather::{Answer, Gatherer, RETRY_AFTER, out_of_time, shutting_down, store_down},
    },
    telemetry::{CommitLabels, CommitPath, StoreMetrics},
};

/// Tries, after which a store that refuses for a reason that will pass makes its callers come back.
pub(super) const TRIES_MAX: u32 = 5;
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// A question in the line.
pub(super) struct Ask<Q> {
    pub(super) question: Q,
    pub(super) deadline: Instant,
}

/// A caller whose question was taken from the line.
pub(super) struct Caller<Q, R> {
    pub(super) question: Q,
    pub(super) deadline: Instant,
    pub(super) answer: Answer<R>,
    /// A try that held it ended `Unknown`: it may have taken effect, or may yet.
    pub(super) open: bool,
}

impl<Q, R> Caller<Q, R> {
    pub(super) fn succeed(self, result: R) {
        // A caller that is gone does not want to know.
        let _gone = self.answer.send(Ok(result));
    }

    pub(super) fn fail(self, error: Error) {
        let error = if self.open { error.unknown() } else { error };
        let _gone = self.answer.send(Err(error));
    }

    fn new((Ask { question, deadline }, answer): (Ask<Q>, Answer<R>)) -> Caller<Q, R> {
        Caller {
            question,
            deadline,
            answer,
            open: false,
        }
    }
}

/// Answers the callers for which `error` has one, and lets the others stand.
pub(super) fn fail_if<Q, R>(
    callers: &mut Vec<Caller<Q, R>>,
    now: Instant,
    error: &mut impl FnMut(&Caller<Q, R>, Instant) -> Option<Error>,
) {
    let mut at = 0;
    while let Some(caller) = callers.get(at) {
        match error(caller, now) {
            Some(error) => callers.remove(at).fail(error),
            None => at += 1,
        }
    }
}

/// Callers that share a try.
pub(super) trait Callers: Sized + Send + Sync + 'static {
    /// What each asks.
    type Question: Send + 'static;
    /// What each is answered.
    type Result: Send + 'static;
    /// What a try needs to know besides.
    type Context: Send + Sync + 'static;

    /// What a caller is told when the store refuses for a reason that will pass.
    const REFUSED: &str;

    /// Under which label their tries are measured, if they are.
    const PATH: Option<CommitPath>;

    /// Whether who wants a record that another session of the store holds waits for it aside.
    const WAITS_ASIDE: bool = false;

    /// Callers as a statement wants them.
    fn gather(callers: Vec<Caller<Self::Question, Self::Result>>) -> Self;

    /// In how many parts they can be divided: none when all are answered.
    fn parts(&self) -> usize;

    /// Cuts off the second half of them.
    fn split_off_half(&mut self) -> Self;

    /// Cuts off those who want the second half of the records. `None`: they all want one.
    fn split_off_records(&mut self) -> Option<Self> {
        None
    }

    /// Takes those from others who want the record that these want.
    fn alike(&self, _others: &mut Self) -> Self {
        Self::gather(Vec::new())
    }

    /// Lets others be tried with these.
    fn join(&mut self, _others: Self) {}

    /// What a question weighs in a batch, in bytes.
    fn weight(_question: &Self::Question) -> usize {
        0
    }

    /// One try for all of them.
    fn send(
        &self,
        session: &mut Session,
        context: &Self::Context,
    ) -> impl Future<Output = Result<Vec<Self::Result>, StoreError>> + Send;

    /// Answers all of them with the results of a try.
    fn answer(self, results: Vec<Self::Result>, metrics: Option<&Metrics>);

    /// A try ended `Unknown`.
    fn lost(&mut self, error: &StoreError, tries: u32);

    /// The store rejects what the last try held, which cannot be divided further: fails its callers, and leaves those who ask for something else.
    fn reject(&mut self, refusal: StoreError);

    /// Answers the callers for which `error` has one, and lets the others stand.
    fn fail_if(&mut self, error: impl FnMut(&Caller<Self::Question, Self::Result>, Instant) -> Option<Error>);
}

/// What is measured of tries.
pub(super) struct Metrics {
    duration: Histogram,
    batch: Histogram,
    retries: Counter,
    pub(super) superseded: Counter,
}

impl Metrics {
    pub(super) fn new(metrics: &StoreMetrics, path: CommitPath) -> Metrics {
        let labels = CommitLabels { path };
        Metrics {
            duration: metrics.commit_duration.get_or_create_owned(&labels),
            batch: metrics.commit_batch.get_or_create_owned(&labels),
            retries: metrics.retries.get_or_create_owned(&labels),
            superseded: metrics.superseded.get_or_create_owned(&labels),
        }
    }
}

/// The line of callers of a kind.
pub(super) type Line<C> = Gatherer<Ask<<C as Callers>::Question>, <C as Callers>::Result>;

/// One connection that tries what callers ask.
pub(super) struct Worker<C: Callers> {
    pub(super) session: Session,
    pub(super) store: Store,
    pub(super) line: Arc<Line<C>>,
    pub(super) stop: CancellationToken,
    pub(super) context: C::Context,
    pub(super) metrics: Option<Metrics>,
}

impl<C: Callers> Worker<C> {
    /// Starts its task, on the current runtime. When it is told to stop it finishes the try that runs, answers what still waits with
    /// `Unavailable`, and ends.
    pub(super) fn start(self) -> JoinHandle<()> {
        tokio::spawn(self.run())
    }

    async fn run(mut self) {
        let mut aside = Aside::new(self.line.bounds());
        while let Some(Some(batch)) = self.stop.run_until_cancelled(next::<C>(&self.line, aside.due())).await {
            let mut callers = C::gather(batch.into_iter().map(Caller::new).collect());
            aside.claim(&mut callers);
            self.settle(callers, &mut aside).await;
            // One, so that a batch waits for one at most.
            if let Some(callers) = aside.take_due() {
                if let Some(metrics) = &self.metrics {
                    metrics.retries.inc();
                }
                self.settle(callers, &mut aside).await;
            }
        }
        aside.fail_all(shutting_down);
        self.line.close();
    }

    /// Tries until each caller is answered, or waits aside.
    async fn settle(&mut self, callers: C, aside: &mut Aside<C>) {
        // What is left to settle, each in statements of its own.
        let mut left = vec![callers];
        while let Some(callers) = left.pop() {
            left.extend(self.serve(callers, aside).await);
        }
    }

    /// Tries until each caller is answered, or waits aside, or must go on in other statements, which are returned.
    async fn serve(&mut self, mut callers: C, aside: &mut Aside<C>) -> Vec<C> {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        let mut tries = 0;
        loop {
            callers.fail_if(|caller, now| (caller.deadline <= now).then(out_of_time));
            if self.store.breaker().is_open() {
                callers.fail_if(|caller, _| (!caller.open).then(store_down));
            } else if callers.parts() > 0 {
                if let Some(metrics) = self.metrics.as_ref().filter(|_| tries > 0) {
                    metrics.retries.inc();
                }
                tries += 1;
                match self.send(&callers).await {
                    Ok(results) => {
                        callers.answer(results, self.metrics.as_ref());
                        return Vec::new();
                    }
                    Err(error) if error.kind == StoreErrorKind::Rejected => return self.divide(callers, error).await,
                    Err(error) if C::WAITS_ASIDE && error.is_held() => {
                        return match callers.split_off_records() {
                            Some(second) => vec![second, callers],
                            None => {
                                tracing::debug!(%error, "another session of the store holds a record that is wanted");
                                aside.add(callers);
                                Vec::new()
                            }
                        };
                    }
                    Err(error) => absorb(&mut callers, &error, tries),
                }
            }
            if callers.parts() == 0 {
                return Vec::new();
            }
            self.pause(&mut callers, backoff.delay()).await;
        }
    }

    async fn send(&mut self, callers: &C) -> Result<Vec<C::Result>, StoreError> {
        let begun = Instant::now();
        let results = callers.send(&mut self.session, &self.context).await;
        if let Some(metrics) = &self.metrics {
            metrics.duration.observe(begun.elapsed().as_secs_f64());
            metrics.batch.observe(callers.parts() as f64);
        }
        results
    }

    /// After a refusal of rows: the halves to try, down to the row at fault, which fails alone.
    async fn divide(&mut self, mut callers: C, refusal: StoreError) -> Vec<C> {
        if callers.parts() > 1 {
            let second = callers.split_off_half();
            return vec![second, callers];
        }
        // Only a row that fails where a harmless one does not is itself at fault.
        if let Err(error) = self.session.probe().await {
            tracing::warn!(%error, "the store refuses every row");
            callers.fail_if(|_, _| Some(refused_for_now(C::REFUSED, &refusal)));
            return Vec::new();
        }
        // Or the table was mended between the refusal and the probe: so the row once more.
        match self.send(&callers).await {
            Ok(results) => {
                callers.answer(results, self.metrics.as_ref());
                return Vec::new();
            }
            Err(error) if error.kind == StoreErrorKind::Rejected => {
                tracing::debug!(%error, "the store refuses a write for good");
                callers.reject(error);
            }
            Err(error) => absorb(&mut callers, &error, 1),
        }
        if callers.parts() == 0 {
            Vec::new()
        } else {
            vec![callers]
        }
    }

    /// Waits before the next try. What cannot have one before its deadline and is not open is told so now, while "not applied" is
    /// still certain to reach its caller.
    async fn pause(&mut self, callers: &mut C, delay: Duration) {
        callers.fail_if(|caller, now| {
            (!caller.open && caller.deadline <= now + delay).then(|| {
                Error::new(ErrorKind::Unavailable, "the store did not answer in time").retry_after(RETRY_AFTER)
            })
        });
        if callers.parts() == 0 {
            return;
        }
        let slept = self.stop.run_until_cancelled(tokio::time::sleep(delay)).await;
        if slept.is_none() {
            callers.fail_if(|_, _| Some(shutting_down()));
        }
    }
}

/// The next batch: an empty one when somebody who waits aside is due first. `None`: the line is closed. Cancel-safe, as [`Gatherer::take`] is.
async fn next<C: Callers>(line: &Line<C>, due: Option<Instant>) -> Option<Vec<(Ask<C::Question>, Answer<C::Result>)>> {
    let Some(due) = due else {
        return line.take().await;
    };
    tokio::select! {
        biased;
        batch = line.take() => batch,
        () = sleep_until(due) => Some(Vec::new()),
    }
}

/// What a try that failed as a whole means for its callers.
fn absorb<C: Callers>(callers: &mut C, error: &StoreError, tries: u32) {
    match error.kind {
        StoreErrorKind::Unreachable => callers.fail_if(|caller, _| (!caller.open).then(store_down)),
        StoreErrorKind::Unknown => callers.lost(error, tries),
        StoreErrorKind::Transient | StoreErrorKind::Rejected if tries >= TRIES_MAX => {
            tracing::warn!(%error, rows = callers.parts(), "the store takes no commit at present");
            callers.fail_if(|caller, _| (!caller.open).then(|| refused_for_now(C::REFUSED, error)));
        }
        StoreErrorKind::Transient | StoreErrorKind::Rejected => {}
    }
}

/// What a caller is told when the store refuses, and will not for ever.
pub(super) fn refused_for_now(message: &'static str, error: &StoreError) -> Error {
    Error::new(ErrorKind::Unavailable, message)
        .retry_after(RETRY_AFTER)
        .because(error.to_string())
}

/// What a caller is told whose write the store rejects.
pub(super) fn rejected(refusal: &Arc<StoreError>) -> Error {
    Error::new(ErrorKind::Rejected, "the store rejects this record for good").because(Arc::clone(refusal))
}
