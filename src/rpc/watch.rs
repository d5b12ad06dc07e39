//! The stream of a watch: what a watcher is told, until somebody ends it.
//!
//! Owns how a watch ends: with its client, at its deadline, with the gateway. Does not own what is told ([`crate::gateway::watch`]), nor what a message
//! is (`convert`). The stream is asked for a message when HTTP/2 has room for one, and does nothing in between: a client that takes nothing holds a
//! place in the log, and what is on its way; one that does so for too long is cut off (`rpc/router.rs`).
//!
//! Cancellation: dropped, it is forgotten.

use std::{
    future::{Ready, ready},
    pin::Pin,
    sync::Arc,
};

use futures_util::stream;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, codegen::tokio_stream::Stream, server::ServerStreamingService};

use crate::{
    error::{Error, ErrorKind},
    gateway::watch::Watcher,
    rpc::{
        convert,
        proto::{WatchRequest, WatchResponse},
        service::{GatewayService, shutting_down},
        status::to_status,
    },
};

/// The method of the stream: what is told, until its client's deadline.
pub(crate) struct Watching {
    service: Arc<GatewayService>,
    deadline: Option<Instant>,
}

impl Watching {
    pub(crate) fn new(service: Arc<GatewayService>, deadline: Option<Instant>) -> Watching {
        Watching { service, deadline }
    }

    fn begin(&self, request: WatchRequest) -> Result<Watch, Error> {
        let GatewayService { gateway, stop, .. } = &*self.service;
        if stop.is_cancelled() {
            return Err(shutting_down());
        }
        Ok(Watch {
            watcher: gateway.watch(convert::watch(request)?)?,
            deadline: self.deadline,
            stop: stop.clone(),
        })
    }
}

impl ServerStreamingService<WatchRequest> for Watching {
    type Response = WatchResponse;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<WatchRequest>) -> Self::Future {
        let begun = self.begin(request.into_inner()).map_err(to_status);
        ready(begun.map(|watch| Response::new(watch.told())))
    }
}

/// One watch.
struct Watch {
    watcher: Watcher,
    /// Until when it may last.
    deadline: Option<Instant>,
    /// Tells that the gateway shuts down.
    stop: CancellationToken,
}

impl Watch {
    /// All that is told, and then why nothing more is.
    fn told(self) -> <Watching as ServerStreamingService<WatchRequest>>::ResponseStream {
        Box::pin(stream::unfold(Some(self), |watch| async move {
            let mut watch = watch?;
            Some(match watch.next().await {
                Ok(message) => (Ok(message), Some(watch)),
                Err(end) => (Err(to_status(end)), None),
            })
        }))
    }

    async fn next(&mut self) -> Result<WatchResponse, Error> {
        let deadline = self.deadline;
        let ended = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(shutting_down()),
            told = self.watcher.next() => Ok(convert::watch_response(told)),
            () = ended => Err(out_of_time()),
        }
    }
}

fn out_of_time() -> Error {
    let message = "the deadline of the watch passed: begin it again with its last token";
    Error::new(ErrorKind::Timeout, message)
}
