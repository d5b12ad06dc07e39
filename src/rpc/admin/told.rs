//! Calls that tell one thing after another: the stream that their caller has, and the task behind it.
//!
//! Owns how such a call ends: with what it does, with its deadline, with the process, with its caller, or because its caller reads nothing. What
//! is not taken is not piled up: one thing is under way, and one message waits; how the call ended has a place beside it. Does not own what is told.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, codegen::tokio_stream::Stream};

use crate::{
    error::{Error, ErrorKind},
    rpc::status::to_status,
};

/// How long a message may wait for its caller to take it: who reads nothing keeps others from what runs a few times only.
const UNREAD_MAX: Duration = Duration::from_secs(60);

/// What a caller hears. Dropping it ends the call.
pub(super) struct Told<M>(pub(super) mpsc::Receiver<Result<M, Status>>);

impl<M> Stream for Told<M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

/// What bounds a call.
pub(super) struct Bounds {
    pub(super) deadline: Instant,
    pub(super) stop: CancellationToken,
    /// Given back when the work has ended, whether its last message was taken or not.
    pub(super) place: OwnedSemaphorePermit,
}

/// Does work that tells things over the channel that it is given, each of which becomes a message.
pub(super) fn tell<T, M, F>(bounds: Bounds, message: fn(T) -> M, work: impl FnOnce(mpsc::Sender<T>) -> F) -> Told<M>
where
    T: Send + 'static,
    M: Send + 'static,
    F: Future<Output = Result<(), Error>> + Send + 'static,
{
    let (things, told) = mpsc::channel(1);
    let (messages, stream) = mpsc::channel(2);
    // Of a new channel it is had.
    let last_word = messages.clone().try_reserve_owned().ok();
    let work = work(things);
    tokio::spawn(async move {
        let handing_on = async {
            // Dropped with this, and then the work ends, too.
            let mut told = told;
            while let Some(thing) = told.recv().await {
                match timeout(UNREAD_MAX, messages.send(Ok(message(thing)))).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => break,
                    Err(_) => return Err(unread()),
                }
            }
            Ok(())
        };
        let ended = tokio::select! {
            (ended, handed_on) = async { tokio::join!(work, handing_on) } => handed_on.and(ended),
            () = messages.closed() => return,
            () = sleep_until(bounds.deadline) => Err(out_of_time()),
            () = bounds.stop.cancelled() => Err(shutting_down()),
        };
        drop(bounds.place);
        if let (Err(error), Some(place)) = (ended, last_word) {
            place.send(Err(to_status(error)));
        }
    });
    Told(stream)
}

fn unread() -> Error {
    let message = "nothing of what is told was taken for a minute: what was told of is done, what was to be told may be, the rest is not";
    Error::new(ErrorKind::Timeout, message).unknown()
}

fn out_of_time() -> Error {
    let message =
        "the deadline passed before the end: what was told of is done, the one at hand may be, the rest is not";
    Error::new(ErrorKind::Timeout, message).unknown()
}

fn shutting_down() -> Error {
    let message = "the gateway is shutting down: what was told of is done, the one at hand may be, the rest is not";
    Error::new(ErrorKind::Unavailable, message).unknown()
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::Arc};

    use tokio::sync::Semaphore;
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;

    fn bounds(places: &Arc<Semaphore>, wait: Duration) -> Bounds {
        Bounds {
            deadline: Instant::now() + wait,
            stop: CancellationToken::new(),
            place: Arc::clone(places).try_acquire_owned().expect("there is one"),
        }
    }

    async fn next(told: &mut Told<u32>) -> Option<Result<u32, Status>> {
        poll_fn(|context| Pin::new(&mut *told).poll_next(context)).await
    }

    /// Counts, for ever or until nobody listens.
    async fn count(things: mpsc::Sender<u32>) -> Result<(), Error> {
        let mut number = 0;
        while things.send(number).await.is_ok() {
            number += 1;
        }
        Ok(())
    }

    fn is_unknown(status: &Status) -> bool {
        let info = status.get_details_error_info().expect("it is ours");
        info.metadata.get("outcome").map(String::as_str) == Some("unknown")
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_who_reads_nothing_gives_its_place_back_and_is_told_why() {
        let places = Arc::new(Semaphore::new(1));
        let mut told = tell(bounds(&places, Duration::from_secs(24 * 3600)), |number| number, count);
        let _place = timeout(2 * UNREAD_MAX, places.acquire())
            .await
            .expect("it is given back");
        assert_eq!(next(&mut told).await.expect("the one that waited").expect("it"), 0);
        let last = next(&mut told).await.expect("the last word").expect_err("the reason");
        assert_eq!(last.code(), Code::DeadlineExceeded, "{last:?}");
        assert!(is_unknown(&last), "{last:?}");
        assert!(next(&mut told).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn of_what_a_deadline_or_a_shutdown_cuts_off_the_outcome_is_not_known() {
        let places = Arc::new(Semaphore::new(1));
        for shutdown in [false, true] {
            let bounds = bounds(&places, Duration::from_secs(1));
            if shutdown {
                bounds.stop.cancel();
            }
            let mut told = tell(
                bounds,
                |number| number,
                |things: mpsc::Sender<u32>| async move {
                    things.closed().await;
                    Ok(())
                },
            );
            let last = next(&mut told).await.expect("the last word").expect_err("the reason");
            assert!(is_unknown(&last), "{last:?}");
            let _place = places.acquire().await.expect("it is given back");
        }
    }
}
