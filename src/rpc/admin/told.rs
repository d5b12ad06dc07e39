//! Calls that tell one thing after another: the stream that their caller has, and the task behind it.
//!
//! Owns how such a call ends: with what it does, with its deadline, with the process, or with its caller. What is not taken is not piled up: one
//! thing is under way, and one message waits. Does not own what is told.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, codegen::tokio_stream::Stream};

use crate::{
    error::{Error, ErrorKind},
    rpc::status::to_status,
};

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
    let (things, mut told) = mpsc::channel(1);
    let (messages, stream) = mpsc::channel(1);
    let work = work(things);
    tokio::spawn(async move {
        let handing_on = async {
            while let Some(thing) = told.recv().await {
                if messages.send(Ok(message(thing))).await.is_err() {
                    return;
                }
            }
        };
        let ended = tokio::select! {
            (ended, ()) = async { tokio::join!(work, handing_on) } => ended,
            () = messages.closed() => return,
            () = sleep_until(bounds.deadline) => {
                let message = "the deadline passed before the end: what was told of is done, the rest is not";
                Err(Error::new(ErrorKind::Timeout, message))
            }
            () = bounds.stop.cancelled() => Err(Error::new(ErrorKind::Unavailable, "the gateway is shutting down")),
        };
        drop(bounds.place);
        if let Err(error) = ended {
            // Who does not listen any more does not miss it.
            let _ = messages.send(Err(to_status(error))).await;
        }
    });
    Told(stream)
}
