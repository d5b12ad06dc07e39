//! The service of `tidegate.v1.Admin`: decode, call the gateway, encode. It decides nothing.
//!
//! Owns a call's deadline, how many warmings and how many walks through the dead letters run at a time, and the pace of what warmings tell.
//! Cancellation: when a client goes away tonic drops the method's future, or the stream; an invalidation ends there, a warming begins no more
//! loads, a retry goes on to no further letter.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{
    Asked, Deadline, convert,
    told::{self, Told, tell},
};
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
            DiscardDeadLettersRequest, DiscardDeadLettersResponse, ExportDeadLettersRequest, ExportDeadLettersResponse,
            FlushRequest, FlushResponse, InvalidateRequest, InvalidateResponse, ListDeadLettersRequest,
            ListDeadLettersResponse, LogLevelRequest, LogLevelResponse, NamespacesRequest, NamespacesResponse,
            PauseRequest, PauseResponse, QueueRequest, QueueResponse, ResumeRequest, ResumeResponse,
            RetryDeadLettersRequest, RetryDeadLettersResponse, StatsRequest, StatsResponse, WarmRequest, WarmResponse,
            admin_server::Admin as AdminRpc,
        },
        status::to_status,
    },
    telemetry::{calls::CallMetrics, log::Log},
};

/// How many warmings run at a time.
const WARMINGS_MAX: usize = 4;

/// How many retries and exports of dead letters run at a time.
const LETTER_WALKS_MAX: usize = 2;

/// How many lists and discards of dead letters have a connection to the store at a time; the others wait, until their deadlines.
const LETTER_CALLS_MAX: usize = 4;

/// How many namespaces are told of in one answer.
const NAMESPACES_TOLD_MAX: usize = 1_000;

/// The least time between two messages of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// The service, one for all connections.
#[derive(Clone)]
pub(super) struct AdminService {
    gateway: Gateway,
    calls: CallMetrics,
    started: Timestamp,
    log: Log,
    warmings: Arc<Semaphore>,
    letter_walks: Arc<Semaphore>,
    letter_calls: Arc<Semaphore>,
    stop: CancellationToken,
}

impl AdminService {
    pub(super) fn new(asked: Asked, stop: CancellationToken) -> AdminService {
        let Asked { gateway, calls, log } = asked;
        AdminService {
            gateway,
            calls,
            started: wall_time(),
            log,
            warmings: Arc::new(Semaphore::new(WARMINGS_MAX)),
            letter_walks: Arc::new(Semaphore::new(LETTER_WALKS_MAX)),
            letter_calls: Arc::new(Semaphore::new(LETTER_CALLS_MAX)),
            stop,
        }
    }

    /// The bounds of a walk through the dead letters, if there is room for one more.
    fn letter_walk(&self, deadline: Instant) -> Result<told::Bounds, Status> {
        let Ok(place) = Arc::clone(&self.letter_walks).try_acquire_owned() else {
            let message =
                format!("{LETTER_WALKS_MAX} retries or exports of dead letters run, as many as may at a time");
            return Err(to_status(Error::new(ErrorKind::Overloaded, message)));
        };
        let stop = self.stop.clone();
        Ok(told::Bounds { deadline, stop, place })
    }
}

/// A call that is given up at its deadline.
async fn in_time<T>(
    deadline: Instant,
    message: &'static str,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Status> {
    let ended = timeout_at(deadline, call).await;
    let ended = ended.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, message).unknown()));
    ended.map_err(to_status)
}

fn deadline<T>(request: &Request<T>) -> Instant {
    let deadline = request.extensions().get::<Deadline>();
    deadline.map_or_else(Instant::now, |deadline| deadline.0)
}

#[tonic::async_trait]
impl AdminRpc for AdminService {
    type WarmStream = Told<WarmResponse>;
    type RetryDeadLettersStream = Told<RetryDeadLettersResponse>;
    type ExportDeadLettersStream = Told<ExportDeadLettersResponse>;

    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let namespace = convert::namespace(&request.get_ref().namespace).map_err(to_status)?;
        let stats = self.gateway.stats(&self.calls, namespace);
        Ok(Response::new(convert::stats_response(stats, self.started)))
    }

    async fn invalidate(&self, request: Request<InvalidateRequest>) -> Result<Response<InvalidateResponse>, Status> {
        let deadline = deadline(&request);
        let target = convert::invalidate(request.into_inner()).map_err(to_status)?;
        let message = "the deadline passed before every copy was dropped: some are, others not";
        let invalidated = in_time(deadline, message, self.gateway.invalidate(target)).await?;
        Ok(Response::new(convert::invalidate_response(invalidated)))
    }

    async fn warm(&self, request: Request<WarmRequest>) -> Result<Response<Told<WarmResponse>>, Status> {
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
        Ok(Response::new(Told(stream)))
    }

    async fn namespaces(&self, request: Request<NamespacesRequest>) -> Result<Response<NamespacesResponse>, Status> {
        let namespace = convert::namespace(&request.get_ref().namespace).map_err(to_status)?;
        let (views, more) = match namespace {
            Some(namespace) => (vec![self.gateway.namespace(&self.calls, namespace)], false),
            None => self.gateway.namespaces(&self.calls, NAMESPACES_TOLD_MAX),
        };
        let defaults = self.gateway.default_settings();
        Ok(Response::new(convert::namespaces_response(views, more, defaults)))
    }

    async fn queue(&self, request: Request<QueueRequest>) -> Result<Response<QueueResponse>, Status> {
        let (namespace, oldest) = convert::queue(request.get_ref()).map_err(to_status)?;
        let view = self.gateway.queue(&self.calls, namespace, oldest).map_err(to_status)?;
        let (journal, now) = (self.gateway.journal_state(), wall_time());
        let response = convert::queue_response(view, journal, now, NAMESPACES_TOLD_MAX);
        Ok(Response::new(response))
    }

    async fn pause(&self, request: Request<PauseRequest>) -> Result<Response<PauseResponse>, Status> {
        let PauseRequest { namespace, unused } = request.get_ref();
        convert::check_one_namespace(namespace).map_err(to_status)?;
        let paused = self.gateway.pause(&self.calls, namespace, *unused);
        let (before, queue) = paused.map_err(to_status)?;
        Ok(Response::new(PauseResponse {
            was_paused: before.is_some(),
            pending: Some(convert::pending_of(&queue)),
        }))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, Status> {
        let ResumeRequest { namespace } = request.get_ref();
        convert::check_one_namespace(namespace).map_err(to_status)?;
        let resumed = self.gateway.resume(&self.calls, namespace);
        let (was_paused, queue) = resumed.map_err(to_status)?;
        Ok(Response::new(ResumeResponse {
            was_paused,
            pending: Some(convert::pending_of(&queue)),
        }))
    }

    async fn flush(&self, request: Request<FlushRequest>) -> Result<Response<FlushResponse>, Status> {
        let deadline = deadline(&request);
        let namespace = convert::namespace(&request.get_ref().namespace).map_err(to_status)?;
        let flushing = self.gateway.flush(&self.calls, namespace, deadline);
        let flushed = tokio::select! {
            flushed = flushing => flushed.map_err(to_status)?,
            () = self.stop.cancelled() => {
                let message = "the gateway is shutting down, and drains whatever is pending";
                return Err(to_status(Error::new(ErrorKind::Unavailable, message)));
            }
        };
        Ok(Response::new(FlushResponse {
            waited_for: flushed.waited_for,
            dead_lettered: flushed.dead_lettered,
        }))
    }

    async fn list_dead_letters(
        &self,
        request: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersResponse>, Status> {
        let deadline = deadline(&request);
        let page = convert::letters::list(request.get_ref()).map_err(to_status)?;
        // One more than the page has says whether there are more.
        let listing = async {
            let _place = self.letter_calls.acquire().await;
            self.gateway.letters(page.namespace, page.after, page.size + 1).await
        };
        let message = "the deadline passed before the store told of its dead letters";
        let letters = in_time(deadline, message, listing).await?;
        Ok(Response::new(convert::letters::list_response(letters, &page)))
    }

    async fn retry_dead_letters(
        &self,
        request: Request<RetryDeadLettersRequest>,
    ) -> Result<Response<Told<RetryDeadLettersResponse>>, Status> {
        let deadline = deadline(&request);
        let chosen = convert::letters::retry(request.into_inner()).map_err(to_status)?;
        let (bounds, gateway) = (self.letter_walk(deadline)?, self.gateway.clone());
        let work = |told| async move { gateway.retry_letters(chosen, &told).await };
        Ok(Response::new(tell(bounds, convert::letters::retry_response, work)))
    }

    async fn discard_dead_letters(
        &self,
        request: Request<DiscardDeadLettersRequest>,
    ) -> Result<Response<DiscardDeadLettersResponse>, Status> {
        let deadline = deadline(&request);
        let chosen = convert::letters::discard(request.into_inner()).map_err(to_status)?;
        let message = "the deadline passed before all of them were discarded: some are, others not";
        let discarding = async {
            let _place = self.letter_calls.acquire().await;
            self.gateway.discard_letters(chosen).await
        };
        let discarded = in_time(deadline, message, discarding).await?;
        Ok(Response::new(DiscardDeadLettersResponse { discarded }))
    }

    async fn export_dead_letters(
        &self,
        request: Request<ExportDeadLettersRequest>,
    ) -> Result<Response<Told<ExportDeadLettersResponse>>, Status> {
        let deadline = deadline(&request);
        let (namespace, after) = convert::letters::export(request.get_ref()).map_err(to_status)?;
        let (bounds, gateway) = (self.letter_walk(deadline)?, self.gateway.clone());
        let work = |told| async move { gateway.export_letters(namespace, after, &told).await };
        Ok(Response::new(tell(bounds, convert::letters::export_response, work)))
    }

    async fn log_level(&self, request: Request<LogLevelRequest>) -> Result<Response<LogLevelResponse>, Status> {
        let change = convert::log_level(request.get_ref()).map_err(to_status)?;
        let filter = match change {
            Some(change) => self.log.change(change).map_err(to_status)?,
            None => self.log.filter(),
        };
        Ok(Response::new(convert::log_level_response(filter)))
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
