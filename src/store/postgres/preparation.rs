//! Preparation: what has to succeed once in this process before a statement is sent to the server.
//!
//! Owns that it is done once, whoever needs it first, and that each try runs in a task of its own: a migration may take longer than a call, and
//! a call that is cut off must not end it. Does not own what is done ([`super::Dialler`]), nor when to try again (the callers, by their
//! own backoff), but for a refusal, which stands for a while. Invariants: one try runs at a time, and all who wait meanwhile are told its
//! end; after a success there is no other.

use std::{future::Future, time::Duration};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use crate::store::{StoreError, StoreErrorKind};

/// How long a refusal stands: the callers come back for many reasons, and each try changes what it can in a database that may be another's.
const REFUSAL_STANDS: Duration = Duration::from_secs(5);

/// How far a try has come.
#[derive(Debug)]
pub(super) enum Progress {
    /// There is no session with the server yet.
    Dialling,
    /// The tables are being brought up to date.
    Migrating,
    /// How it ended, and when.
    Ended(Result<(), StoreError>, Instant),
}

impl Progress {
    /// Whether another try may be made.
    fn is_over(&self) -> bool {
        match self {
            Progress::Dialling | Progress::Migrating | Progress::Ended(Ok(()), _) => false,
            Progress::Ended(Err(error), at) => error.kind != StoreErrorKind::Rejected || at.elapsed() >= REFUSAL_STANDS,
        }
    }
}

/// The tries: the last one.
#[derive(Default)]
pub(super) struct Preparation {
    last: Mutex<Option<watch::Receiver<Progress>>>,
}

impl Preparation {
    /// Waits for the end of the try that runs, or of one that `begin` makes. What it was, as it was. Cancel-safe: the try goes on.
    pub(super) async fn ended<F>(&self, begin: impl FnOnce(watch::Sender<Progress>) -> F) -> Result<(), StoreError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut attempt = self.attempt(begin);
        loop {
            if let Progress::Ended(result, _) = &*attempt.borrow_and_update() {
                return result.clone();
            }
            if attempt.changed().await.is_err() {
                let message = "the preparation of the store failed: this is a fault of the gateway, the log has more";
                return Err(StoreError::new(StoreErrorKind::Unreachable, message));
            }
        }
    }

    /// Whether the tables are being brought up to date now.
    pub(super) fn is_migrating(&self) -> bool {
        let last = self.last.lock();
        last.as_ref()
            .is_some_and(|attempt| matches!(*attempt.borrow(), Progress::Migrating))
    }

    fn attempt<F>(&self, begin: impl FnOnce(watch::Sender<Progress>) -> F) -> watch::Receiver<Progress>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut last = self.last.lock();
        if let Some(attempt) = &*last {
            // A task that is gone without a word has panicked.
            let died = attempt.has_changed().is_err() && !matches!(*attempt.borrow(), Progress::Ended(..));
            if !died && !attempt.borrow().is_over() {
                return attempt.clone();
            }
        }
        let (progress, attempt) = watch::channel(Progress::Dialling);
        tokio::spawn(begin(progress));
        *last = Some(attempt.clone());
        attempt
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use tokio::time::{sleep, timeout};

    use super::*;

    /// Tries that take a second; the first so many of them fail, in so many ways.
    struct Tries {
        preparation: Preparation,
        begun: Arc<AtomicUsize>,
        failures: &'static [StoreErrorKind],
    }

    impl Tries {
        fn new(failures: &'static [StoreErrorKind]) -> Tries {
            Tries {
                preparation: Preparation::default(),
                begun: Arc::default(),
                failures,
            }
        }

        async fn ended(&self) -> Result<(), StoreError> {
            let (begun, failures) = (Arc::clone(&self.begun), self.failures);
            let begin = async move |progress: watch::Sender<Progress>| {
                let number = begun.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_secs(1)).await;
                let failure = failures.get(number);
                let result = failure.map_or(Ok(()), |kind| Err(StoreError::new(*kind, format!("try {number}"))));
                progress.send_replace(Progress::Ended(result, Instant::now()));
            };
            self.preparation.ended(begin).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn callers_share_a_try_and_a_failure_is_followed_by_another() {
        let tries = Tries::new(&[StoreErrorKind::Transient]);
        let (one, other) = tokio::join!(tries.ended(), tries.ended());
        for failed in [one, other] {
            let error = failed.expect_err("the first try fails");
            assert_eq!(
                (error.kind, error.message.as_str()),
                (StoreErrorKind::Transient, "try 0")
            );
        }
        for _ in 0..3 {
            tries.ended().await.expect("the second succeeds");
        }
        assert_eq!(tries.begun.load(Ordering::Relaxed), 2, "and is the last");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_stands_for_a_while() {
        let tries = Tries::new(&[StoreErrorKind::Rejected]);
        let refused = Instant::now() + Duration::from_secs(1);
        for _ in 0..3 {
            let error = tries.ended().await.expect_err("refused");
            assert_eq!(
                (error.kind, refused.elapsed()),
                (StoreErrorKind::Rejected, Duration::ZERO)
            );
        }
        sleep(REFUSAL_STANDS).await;
        tries.ended().await.expect("the second succeeds");
        assert_eq!(tries.begun.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_gives_up_does_not_end_the_try() {
        let tries = Tries::new(&[]);
        let gave_up = timeout(Duration::from_millis(500), tries.ended()).await;
        assert!(gave_up.is_err());
        let waited = timeout(Duration::from_millis(600), tries.ended()).await;
        waited.expect("the rest of the second").expect("succeeds");
        assert_eq!(tries.begun.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_try_that_dies_is_a_failure_and_not_the_last() {
        let tries = Tries::new(&[]);
        let died = tries.preparation.ended(async |progress| drop(progress)).await;
        assert_eq!(died.expect_err("it said nothing").kind, StoreErrorKind::Unreachable);
        tries.ended().await.expect("the next succeeds");
    }
}
