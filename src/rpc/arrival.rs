//! A request's body, which has to arrive before the call's deadline.
//!
//! Owns that bound alone: a client that begins a message and never ends it would hold what it sent, and its stream, for as long as its
//! connection lives, and would keep a shutdown waiting. A stream of messages may last; what it waits for is bounded where it is read
//! (`rpc/stream.rs`). Invariant: what arrived in time is untouched.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::{
    error::{Error, ErrorKind},
    rpc::status::to_status,
};

/// A body with a deadline, if it is to have one.
pub(crate) struct Arrival {
    body: Incoming,
    deadline: Option<Instant>,
    /// Made only when the body is not there at once.
    expiry: Option<Pin<Box<Sleep>>>,
}

impl Arrival {
    pub(crate) fn new(body: Incoming, deadline: Option<Instant>) -> Arrival {
        Arrival {
            body,
            deadline,
            expiry: None,
        }
    }
}

impl Body for Arrival {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let Some(deadline) = this.deadline else {
            return Poll::Pending;
        };
        let expiry = this.expiry.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        expiry.as_mut().poll(context).map(|()| {
            let error = Error::new(ErrorKind::Timeout, "the request had not arrived whole at the deadline");
            Some(Err(to_status(error).into()))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
