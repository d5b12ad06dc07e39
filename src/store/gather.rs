//! Gathers what many callers ask at once into batches: while the workers are busy, questions wait and become the next batch.
//!
//! Owns the waiting line, its bounds, and the caller's wait. Does not own what is asked (`commit.rs`, `load.rs`) nor the workers. No
//! timer delays a batch: an idle worker takes what is there, so batches are as large as the load makes them. Invariants: a question
//! is either waiting, or taken by exactly one worker, or withdrawn, and nothing withdrawn is ever taken; it waits only where a
//! bound leaves room.
//!
//! A caller that goes away (its future is dropped) leaves its question where it is: a write goes on, a load is skipped by its worker,
//! which sees that nobody listens. A caller whose deadline passes, or that sees the breaker open, withdraws a question that still
//! waits; once taken, the deadline still ends its wait but not the question, and the error says that the outcome is open.

use std::{collections::BTreeMap, mem, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    error::{Error, ErrorKind, Outcome},
    store::breaker::Breaker,
};

/// When a caller should come back after the store was not there: the breaker's watch looks twice as often.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// When a caller should come back after it found the line full: a few batches later.
pub(super) const RETRY_AFTER_FULL: Duration = Duration::from_millis(100);

/// The bounds of a [`Gatherer`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Questions that wait.
    pub(super) waiting_max: usize,
    /// Their weights' sum. A single heavier question is let in when nothing else waits.
    pub(super) waiting_bytes_max: usize,
    /// Questions of one batch.
    pub(super) batch_max: usize,
    /// Their weights' sum. A single heavier question is a batch of its own.
    pub(super) batch_bytes_max: usize,
}

/// Where a caller waits for the answer to its question.
pub(super) type Answer<R> = oneshot::Sender<Result<R, Error>>;

/// The line in which questions `Q` wait to be answered with `R`. Callers and workers may be on different runtimes.
pub(super) struct Gatherer<Q, R> {
    line: Mutex<Line<Q, R>>,
    arrived: Notify,
    bounds: Bounds,
    /// What is left open when a caller's deadline passes after its question was taken.
    taken: Outcome,
}

/// A question's place in the line. Who drops it does not want the answer any more.
#[must_use = "a question whose answer nobody awaits is asked for nothing"]
pub(super) struct Place<R> {
    number: u64,
    answer: oneshot::Receiver<Result<R, Error>>,
}

struct Line<Q, R> {
    /// By order of arrival.
    waiting: BTreeMap<u64, Waiting<Q, R>>,
    arrivals: u64,
    bytes: usize,
    closed: bool,
}

struct Waiting<Q, R> {
    question: Q,
    weight: usize,
    answer: Answer<R>,
}

impl<Q, R> Gatherer<Q, R> {
    /// An empty line. `taken`: what a question can have done once a worker took it.
    pub(super) fn new(bounds: Bounds, taken: Outcome) -> Gatherer<Q, R> {
        Gatherer {
            line: Mutex::new(Line {
                waiting: BTreeMap::new(),
                arrivals: 0,
                bytes: 0,
                closed: false,
            }),
            arrived: Notify::new(),
            bounds,
            taken,
        }
    }

    /// The bounds it keeps.
    pub(super) fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Asks, and waits for the answer: until the deadline, and where answering has effects, for as long as the worker that took the
    /// question takes, for its word is more exact than none.
    ///
    /// Dropping the future does not withdraw the question.
    ///
    /// # Errors
    /// `Overloaded` when the line is full; `Unavailable` while the breaker is open or when it opens before the question is taken,
    /// and when the line is closed; `Timeout` at the deadline; `Unavailable`, too, when the worker ended; else what the worker answers.
    pub(super) async fn ask(
        &self,
        question: Q,
        weight: usize,
        deadline: Instant,
        breaker: &Breaker,
    ) -> Result<R, Error> {
        if breaker.is_open() {
            return Err(store_down());
        }
        let place = self.line.lock().enter(question, weight, &self.bounds)?;
        self.arrived.notify_one();
        self.wait(place, deadline, breaker).await
    }

    /// Puts questions into the line with nothing between them, so that one batch takes them all, as far as its bounds let it: a place for
    /// each, to be waited at with [`Gatherer::wait`].
    ///
    /// # Errors
    /// Of each: `Overloaded` where the line is full, `Unavailable` while the breaker is open, and when the line is closed.
    pub(super) fn join_all(
        &self,
        questions: impl IntoIterator<Item = (Q, usize)>,
        breaker: &Breaker,
    ) -> Vec<Result<Place<R>, Error>> {
        let questions = questions.into_iter();
        if breaker.is_open() {
            return questions.map(|_| Err(store_down())).collect();
        }
        let places = {
            let mut line = self.line.lock();
            questions
                .map(|(question, weight)| line.enter(question, weight, &self.bounds))
                .collect()
        };
        self.arrived.notify_one();
        places
    }

    /// Waits for the answer to a question that is in the line, or was taken from it: as [`Gatherer::ask`].
    ///
    /// # Errors
    /// As of [`Gatherer::ask`], but for `Overloaded`.
    pub(super) async fn wait(&self, place: Place<R>, deadline: Instant, breaker: &Breaker) -> Result<R, Error> {
        let Place { number, mut answer } = place;
        tokio::select! {
            biased;
            answered = &mut answer => return self.answered(answered),
            () = breaker.opened() => if self.withdraw(number) {
                return Err(store_down());
            },
            () = sleep_until(deadline) => if self.withdraw(number) {
                return Err(out_of_time());
            },
        }
        // A worker has it, and knows what became of it.
        match self.taken {
            Outcome::Unknown => self.answered(answer.await),
            Outcome::NotApplied => match timeout_at(deadline, answer).await {
                Ok(answered) => self.answered(answered),
                Err(_) => Err(out_of_time()),
            },
        }
    }

    /// Waits until questions wait, and takes as many as a batch may hold, oldest first. `None`: the line is closed.
    ///
    /// Cancel-safe: nothing is taken by a call that does not return.
    pub(super) async fn take(&self) -> Option<Vec<(Q, Answer<R>)>> {
        loop {
            // Listening begins before the look, so that an arrival between the two is heard.
            let arrived = self.arrived.notified();
            {
                let mut line = self.line.lock();
                if let Some(batch) = line.take(&self.bounds) {
                    // Arrivals that found every worker between its look and its sleep left one wake-up in all.
                    if !line.waiting.is_empty() {
                        self.arrived.notify_one();
                    }
                    return Some(batch);
                }
                if line.closed {
                    return None;
                }
            }
            arrived.await;
        }
    }

    /// Lets nobody in any more, and answers all that wait: the gateway shuts down. May be repeated.
    pub(super) fn close(&self) {
        let waiting = {
            let mut line = self.line.lock();
            line.closed = true;
            line.bytes = 0;
            mem::take(&mut line.waiting)
        };
        self.arrived.notify_waiters();
        for waiting in waiting.into_values() {
            let _gone = waiting.answer.send(Err(shutting_down()));
        }
    }

    fn answered(&self, answered: Result<Result<R, Error>, oneshot::error::RecvError>) -> Result<R, Error> {
        answered.unwrap_or_else(|_| {
            // It ends only with the process, in order or not.
            let error = Error::new(
                ErrorKind::Unavailable,
                "the gateway was stopped in the middle of the call",
            );
            Err(self.after_taking(error))
        })
    }

    fn after_taking(&self, error: Error) -> Error {
        match self.taken {
            Outcome::NotApplied => error,
            Outcome::Unknown => error.unknown(),
        }
    }

    /// Takes a question back. `false`: a worker has it.
    fn withdraw(&self, number: u64) -> bool {
        let mut line = self.line.lock();
        let withdrawn = line.waiting.remove(&number);
        line.bytes -= withdrawn.as_ref().map_or(0, |waiting| waiting.weight);
        withdrawn.is_some()
    }
}

impl<Q, R> Line<Q, R> {
    fn enter(&mut self, question: Q, weight: usize, bounds: &Bounds) -> Result<Place<R>, Error> {
        if self.closed {
            return Err(shutting_down());
        }
        let full =
            self.waiting.len() >= bounds.waiting_max || self.bytes.saturating_add(weight) > bounds.waiting_bytes_max;
        if full && !self.waiting.is_empty() {
            return Err(
                Error::new(ErrorKind::Overloaded, "too many calls are waiting for the store")
                    .retry_after(RETRY_AFTER_FULL),
            );
        }
        let number = self.arrivals;
        self.arrivals += 1;
        self.bytes += weight;
        let (sender, answer) = oneshot::channel();
        let waiting = Waiting {
            question,
            weight,
            answer: sender,
        };
        self.waiting.insert(number, waiting);
        Ok(Place { number, answer })
    }

    fn take(&mut self, bounds: &Bounds) -> Option<Vec<(Q, Answer<R>)>> {
        let mut batch = Vec::with_capacity(self.waiting.len().min(bounds.batch_max));
        let mut bytes = 0usize;
        while batch.len() < bounds.batch_max {
            let Some(first) = self.waiting.first_entry() else { break };
            bytes = bytes.saturating_add(first.get().weight);
            if bytes > bounds.batch_bytes_max && !batch.is_empty() {
                break;
            }
            let waiting = first.remove();
            self.bytes -= waiting.weight;
            batch.push((waiting.question, waiting.answer));
        }
        (!batch.is_empty()).then_some(batch)
    }
}

/// Nothing was done in time, and nothing will be.
pub(super) fn out_of_time() -> Error {
    Error::new(ErrorKind::Timeout, "the store did not answer before the deadline")
}

/// What a caller is told while the store is held to be down.
pub(super) fn store_down() -> Error {
    Error::new(ErrorKind::Unavailable, "the store cannot be reached").retry_after(RETRY_AFTER)
}

/// What a caller is told once no further call is taken.
pub(super) fn shutting_down() -> Error {
    Error::new(ErrorKind::Unavailable, "the gateway is shutting down").retry_after(RETRY_AFTER)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::{StoreErrorKind, fake::eventually};

    fn gatherer(waiting_max: usize, waiting_bytes_max: usize) -> Arc<Gatherer<u32, u32>> {
        let bounds = Bounds {
            waiting_max,
            waiting_bytes_max,
            batch_max: 4,
            batch_bytes_max: 100,
        };
        Arc::new(Gatherer::new(bounds, Outcome::Unknown))
    }

    /// Asks in a task of its own, and returns once the question waits.
    async fn ask(
        line: &Arc<Gatherer<u32, u32>>,
        breaker: &Arc<Breaker>,
        question: u32,
        weight: usize,
    ) -> tokio::task::JoinHandle<Result<u32, Error>> {
        let before = line.line.lock().arrivals;
        let deadline = Instant::now() + Duration::from_secs(5);
        let (asked, breaker) = (Arc::clone(line), Arc::clone(breaker));
        let task = tokio::spawn(async move { asked.ask(question, weight, deadline, &breaker).await });
        eventually(|| line.line.lock().arrivals > before || task.is_finished()).await;
        task
    }

    fn waiting(line: &Gatherer<u32, u32>) -> (usize, usize) {
        let line = line.line.lock();
        (line.waiting.len(), line.bytes)
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_what_waits_up_to_its_bounds_in_order() {
        let (line, breaker) = (gatherer(100, 10_000), Arc::default());
        for (question, weight) in [(1, 10), (2, 10), (3, 10), (4, 10), (5, 60), (6, 60), (7, 500), (8, 1)] {
            ask(&line, &breaker, question, weight).await;
        }
        let mut batches = Vec::new();
        for _ in 0..4 {
            let batch = line.take().await.expect("open");
            batches.push(batch.into_iter().map(|(question, _)| question).collect::<Vec<_>>());
        }
        assert_eq!(batches, [vec![1, 2, 3, 4], vec![5], vec![6], vec![7]]);
        assert_eq!(waiting(&line), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_line_refuses_at_once() {
        let (line, breaker) = (gatherer(2, 100), Arc::default());
        let huge = ask(&line, &breaker, 1, 1_000).await;
        assert!(!huge.is_finished(), "alone, a question of any weight is let in");
        let heavy = ask(&line, &breaker, 2, 1).await.await.expect("no panic");
        let error = heavy.expect_err("too many bytes");
        assert_eq!(
            (error.kind(), error.outcome()),
            (ErrorKind::Overloaded, Outcome::NotApplied)
        );
        assert!(error.retry_delay().is_some());

        line.take().await.expect("open");
        ask(&line, &breaker, 3, 1).await;
        ask(&line, &breaker, 4, 1).await;
        let third = ask(&line, &breaker, 5, 1).await.await.expect("no panic");
        assert_eq!(third.expect_err("too many").kind(), ErrorKind::Overloaded);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_withdraws_what_waits_and_what_was_taken_gets_its_worker_s_word() {
        let (line, breaker) = (gatherer(10, 100), Arc::default());
        let taken = ask(&line, &breaker, 1, 10).await;
        let late = line.take().await.expect("open");
        let waits = ask(&line, &breaker, 2, 10).await;
        let error = waits.await.expect("no panic").expect_err("never taken");
        assert_eq!(
            (error.kind(), error.outcome()),
            (ErrorKind::Timeout, Outcome::NotApplied)
        );
        assert_eq!(waiting(&line), (0, 0));
        drop(late);
        let error = taken.await.expect("no panic").expect_err("its worker died");
        assert_eq!(
            (error.kind(), error.outcome()),
            (ErrorKind::Unavailable, Outcome::Unknown)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_breaker_withdraws_what_waits_but_not_what_was_taken() {
        let (line, breaker) = (gatherer(10, 100), Arc::new(Breaker::default()));
        let taken = ask(&line, &breaker, 1, 10).await;
        let batch = line.take().await.expect("open");
        let waits = ask(&line, &breaker, 2, 10).await;
        let begun = Instant::now();
        breaker.failed(StoreErrorKind::Unreachable);
        let error = waits.await.expect("no panic").expect_err("down");
        assert_eq!(
            (error.kind(), error.outcome()),
            (ErrorKind::Unavailable, Outcome::NotApplied)
        );
        let error = ask(&line, &breaker, 3, 10)
            .await
            .await
            .expect("no panic")
            .expect_err("down");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert_eq!(
            (waiting(&line), begun.elapsed() < Duration::from_millis(10)),
            ((0, 0), true)
        );

        for (question, answer) in batch {
            answer.send(Ok(question)).expect("the caller still waits");
        }
        assert_eq!(taken.await.expect("no panic").expect("answered"), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_outlives_its_caller_and_a_dead_worker_is_told() {
        let (line, breaker) = (gatherer(10, 100), Arc::default());
        ask(&line, &breaker, 1, 10).await.abort();
        let told = ask(&line, &breaker, 2, 10).await;
        let batch = line.take().await.expect("open");
        assert_eq!(batch.iter().map(|(question, _)| *question).collect::<Vec<_>>(), [1, 2]);
        drop(batch);
        let error = told.await.expect("no panic").expect_err("the worker is gone");
        assert_eq!(
            (error.kind(), error.outcome()),
            (ErrorKind::Unavailable, Outcome::Unknown)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn closing_answers_all_and_ends_every_worker() {
        let (line, breaker) = (gatherer(10, 100), Arc::default());
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let line = Arc::clone(&line);
                tokio::spawn(async move { line.take().await.is_none() })
            })
            .collect();
        tokio::task::yield_now().await;
        line.close();
        for worker in workers {
            assert!(worker.await.expect("no panic"));
        }
        let error = ask(&line, &breaker, 1, 10)
            .await
            .await
            .expect("no panic")
            .expect_err("closed");
        assert_eq!(
            (error.kind(), error.outcome()),
            (ErrorKind::Unavailable, Outcome::NotApplied)
        );

        let line = gatherer(10, 100);
        let waits = ask(&line, &breaker, 1, 10).await;
        line.close();
        let error = waits.await.expect("no panic").expect_err("closed");
        assert_eq!(
            (error.kind(), error.outcome()),
            (ErrorKind::Unavailable, Outcome::NotApplied)
        );
    }
}
