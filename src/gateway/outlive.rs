//! Writes that outlive their callers.
//!
//! Owns that an admitted write runs to its end: in its caller's task for as long as somebody waits there, which spares it a task of its own and two
//! wake-ups, and in one of its own from when nobody does. Does not own how long a caller waits. Invariant: a write is polled until it has ended;
//! one that panicked is not polled again, and its caller hears of it.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use tokio_util::task::TaskTracker;

/// A write that panicked: a fault of the gateway.
#[derive(Debug)]
pub(super) struct Died;

/// A future that ends, whether it is waited for or not.
#[must_use = "it begins when it is waited for, or dropped"]
pub(super) struct Outliving<F: Future<Output: Send + 'static> + Send + 'static> {
    /// `None` once it has ended.
    running: Option<Pin<Box<F>>>,
    /// Of the runtime that it runs on, and is dropped on.
    tasks: TaskTracker,
}

impl<F: Future<Output: Send + 'static> + Send + 'static> Outliving<F> {
    /// In a place of its own from the beginning: it is large, and would be moved with whatever waits for it.
    pub(super) fn new(running: Pin<Box<F>>, tasks: &TaskTracker) -> Outliving<F> {
        Outliving {
            running: Some(running),
            tasks: tasks.clone(),
        }
    }
}

impl<F: Future<Output: Send + 'static> + Send + 'static> Future for Outliving<F> {
    type Output = Result<F::Output, Died>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(running) = &mut self.running else {
            return Poll::Ready(Err(Died));
        };
        // What it has locked is released by then, and it is not looked at again.
        let polled = catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(context)));
        let ended = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(output)) => Ok(output),
            Err(_) => Err(Died),
        };
        self.running = None;
        Poll::Ready(ended)
    }
}

impl<F: Future<Output: Send + 'static> + Send + 'static> Drop for Outliving<F> {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            self.tasks.spawn(running);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        sync::oneshot,
        time::{sleep, timeout},
    };

    use super::*;

    #[tokio::test]
    async fn who_waits_gets_what_comes_of_it_and_no_task_is_made() {
        let tasks = TaskTracker::new();
        let outliving = Outliving::new(Box::pin(async { 7 }), &tasks);
        assert_eq!(outliving.await.ok(), Some(7));
        assert!(tasks.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn it_goes_on_when_nobody_waits_any_more() {
        let tasks = TaskTracker::new();
        for begun in [true, false] {
            let (tell, told) = oneshot::channel();
            let outliving = Outliving::new(
                Box::pin(async {
                    sleep(Duration::from_secs(1)).await;
                    tell.send(()).expect("somebody listens");
                }),
                &tasks,
            );
            if begun {
                let given_up = timeout(Duration::from_millis(500), outliving).await;
                assert!(given_up.is_err());
            } else {
                drop(outliving);
            }
            assert_eq!(tasks.len(), 1);
            told.await.expect("it went on");
        }
        tasks.close();
        tasks.wait().await;
    }

    #[tokio::test]
    async fn a_panic_is_told_and_ends_nothing_else() {
        let tasks = TaskTracker::new();
        #[allow(clippy::panic, reason = "what is tested")]
        let outliving = Outliving::new(Box::pin(async { panic!("a fault") }), &tasks);
        let ended: Result<(), Died> = outliving.await;
        assert!(ended.is_err());
        assert!(tasks.is_empty());
    }
}
