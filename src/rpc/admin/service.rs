//! The service of `tidegate.v1.Admin`: decode, call the gateway, encode. It decides nothing.
//!
//! Owns a call's deadline, how many warmings run at a time, and the pace of what they tell. Cancellation: when a client goes away tonic
//! drops the method's future, or the stream; an invalidation ends there, and a warming begins no more loads.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, codegen::tokio_stream::Stream};

use super::{Deadline, convert};
use crate::{
    clock::wall_time,
    error::{Error, ErrorKind},
    gateway::{
        Gateway,
        warm::{Progress, Wanted},
    },
    model::Timestamp,
    rpc::{
        proto::{
            InvalidateRequest, InvalidateResponse, StatsRequest, StatsResponse, WarmRequest, WarmResponse,
            admin_server::Admin as AdminRpc,
        },
        status::to_status,
    },
    telemetry::calls::CallMetrics,
};

/// How many warmings run at a time.
const WARMINGS_MAX: usize = 4;

/// The least time between two messages of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// The service, one for all connections.
#[derive(Clone)]
pub(super) struct AdminService {
    gateway: Gateway,
    calls: CallMetrics,
    started: Timestamp,
    warmings: Arc<Semaphore>,
    stop: CancellationToken,
}

impl AdminService {
    pub(super) fn new(gateway: Gateway, calls: CallMetrics, stop: CancellationToken) -> AdminService {
        AdminService {
            gateway,
            calls,
            started: wall_time(),
            warmings: Arc::new(Semaphore::new(WARMINGS_MAX)),
            stop,
        }
    }
}

fn deadline<T>(request: &Request<T>) -> Instant {
    let deadline = request.extensions().get::<Deadline>();
    deadline.map_or_else(Instant::now, |deadline| deadline.0)
}

#[tonic::async_trait]
impl AdminRpc for AdminService {
    type WarmStream = WarmStream;

    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let namespace = convert::stats(request.get_ref()).map_err(to_status)?;
        let stats = self.gateway.stats(&self.calls, namespace);
        Ok(Response::new(convert::stats_response(stats, self.started)))
    }

    async fn invalidate(&self, request: Request<InvalidateRequest>) -> Result<Response<InvalidateResponse>, Status> {
        let deadline = deadline(&request);
        let target = convert::invalidate(request.into_inner()).map_err(to_status)?;
        let invalidated = timeout_at(deadline, self.gateway.invalidate(target)).await;
        let invalidated = invalidated.unwrap_or_else(|_| {
            let message = "the deadline passed before every copy was dropped: some are, others not";
            Err(Error::new(ErrorKind::Timeout, message).unknown())
        });
        Ok(Response::new(convert::invalidate_response(
            invalidated.map_err(to_status)?,
        )))
    }

    async fn warm(&self, request: Request<WarmRequest>) -> Result<Response<WarmStream>, Status> {
        let deadline = deadline(&request);
        let wanted = convert::warm(request.into_inner()).map_err(to_status)?;
        let Ok(place) = Arc::clone(&self.warmings).try_acquire_owned() else {
            let message = format!("{WARMINGS_MAX} warmings run, as many as may at a time");
            return Err(to_status(Error::new(ErrorKind::Overloaded, message)));
        };
        let (messages, stream) = mpsc::channel(1);
        let warming = Warming {
            gateway: self.gateway.clone(),
            messages,
            _place: place,
        };
        let stop = self.stop.clone();
        tokio::spawn(warming.run(wanted, deadline, stop));
        Ok(Response::new(WarmStream(stream)))
    }
}

/// A warming, and who hears of it.
struct Warming {
    gateway: Gateway,
    messages: mpsc::Sender<Result<WarmResponse, Status>>,
    _place: OwnedSemaphorePermit,
}

impl Warming {
    /// Warms, until nobody listens any more.
    async fn run(self, wanted: Wanted, deadline: Instant, stop: CancellationToken) {
        let (progress, seen) = watch::channel(Progress::default());
        let ended = tokio::select! {
            ended = self.gateway.warm(wanted, &progress) => ended,
            () = self.tell(seen.clone()) => return,
            () = self.messages.closed() => return,
            () = sleep_until(deadline) => Err(Error::new(ErrorKind::Timeout, "the deadline passed before every key was tried")),
            () = stop.cancelled() => Err(Error::new(ErrorKind::Unavailable, "the gateway is shutting down")),
        };
        let last = convert::warm_response(*seen.borrow());
        // Who does not listen any more does not miss it.
        let _ = self.messages.send(Ok(last)).await;
        if let Err(error) = ended {
            let _ = self.messages.send(Err(to_status(error))).await;
        }
    }

    /// Tells of progress, at its pace, as long as there is any; what the client has not taken yet is not piled up.
    async fn tell(&self, mut seen: watch::Receiver<Progress>) {
        let mut ticks = interval(PROGRESS_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if seen.changed().await.is_err() {
                return;
            }
            if let Ok(place) = self.messages.try_reserve() {
                place.send(Ok(convert::warm_response(*seen.borrow_and_update())));
            }
        }
    }
}

/// What a caller of Warm hears. Dropping it ends the warming.
pub(super) struct WarmStream(mpsc::Receiver<Result<WarmResponse, Status>>);

impl Stream for WarmStream {
    type Item = Result<WarmResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}
