//! The service of `tidegate.v1.Gateway`: decode, call the gateway, encode. It decides nothing.
//!
//! Owns the translation of a call's deadline. Does not own the stream of writes (`rpc/stream.rs`). Cancellation: when a client goes away
//! tonic drops the method's future; a read ends there, a write goes on once the gateway admitted it (see [`crate::gateway`]).

use std::time::Duration;

use http::HeaderMap;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    error::{Error, ErrorKind},
    gateway::{Gateway, WriteRequest, Written},
    model::Version,
    rpc::{
        convert::{self, AwaitedWrite},
        proto::{
            AwaitPersistedRequest, AwaitPersistedResponse, BatchGetRequest, BatchGetResponse, BatchWriteRequest,
            BatchWriteResponse, DeleteRequest, DeleteResponse, GetRequest, GetResponse, IncrementRequest,
            IncrementResponse, PutRequest, PutResponse, ScanRequest, ScanResponse, TouchRequest, TouchResponse,
            WriteStreamRequest, gateway_server::Gateway as GatewayRpc,
        },
        status::{to_status, to_status_about},
        stream::{Answers, Writes},
    },
};

/// What a call that waits still gets once the gateway shuts down: time for a look into each tier.
const LAST_LOOK: Duration = Duration::from_millis(200);

/// What a call may ask of the service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallLimits {
    pub(crate) value_bytes_max: usize,
    /// The largest message, and that of a method that takes several writes or keys in one.
    pub(crate) message_bytes_max: usize,
    pub(crate) batch_bytes_max: usize,
    pub(crate) deadlines: Deadlines,
    /// How long a stream may send nothing, and any answer be left unread.
    pub(crate) stream_idle_max: Duration,
    pub(crate) stream_unread_max: Duration,
}

/// How much time a call gets that asks for none, and the most that one may ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    pub(crate) default: Duration,
    pub(crate) max: Duration,
}

/// The service, one for each serving thread.
#[derive(Clone)]
pub(crate) struct GatewayService {
    gateway: Gateway,
    limits: CallLimits,
    /// Tells streams, and calls that wait for others, that the gateway shuts down.
    stop: CancellationToken,
}

impl GatewayService {
    pub(crate) fn new(gateway: Gateway, limits: CallLimits, stop: CancellationToken) -> GatewayService {
        GatewayService { gateway, limits, stop }
    }
}

impl Deadlines {
    /// Until when a call with these headers may take, counted from now: from their arrival.
    pub(crate) fn deadline(&self, headers: &HeaderMap) -> Deadline {
        Deadline(Instant::now() + asked(headers).unwrap_or(self.default).min(self.max))
    }
}

/// Until when a stream with these headers may last: for as long as its client said, or without end.
pub(crate) fn stream_deadline(headers: &HeaderMap) -> StreamDeadline {
    StreamDeadline(asked(headers).and_then(|asked| Instant::now().checked_add(asked)))
}

/// How much time a client gives a call.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    timeout(headers.get("grpc-timeout")?.to_str().ok()?)
}

/// A stream's deadline, if it has one, which the router leaves with the request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamDeadline(Option<Instant>);

/// A call's deadline, which the router leaves with the request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(pub(crate) Instant);

pub(crate) fn deadline<T>(request: &Request<T>) -> Instant {
    request
        .extensions()
        .get::<Deadline>()
        .map_or_else(Instant::now, |deadline| deadline.0)
}

#[tonic::async_trait]
impl GatewayRpc for GatewayService {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let deadline = deadline(&request);
        let (key, options) = convert::get(request.get_ref()).map_err(to_status)?;
        let found = self.gateway.get(&key, options, deadline);
        let found = match options.freshness.min_version {
            None => found.await,
            Some(_) => while_running(&self.stop, found)
                .await
                .unwrap_or_else(|| Err(shutting_down())),
        };
        let found = found.map_err(to_status)?;
        Ok(Response::new(convert::get_response(found)))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let deadline = deadline(&request);
        let write = convert::put(request.into_inner(), self.limits.value_bytes_max).map_err(to_status)?;
        let written = write_while_running(&self.gateway, &self.stop, write, deadline).await;
        let written = written.map_err(to_status)?;
        Ok(Response::new(convert::put_response(written)))
    }

    async fn batch_get(&self, request: Request<BatchGetRequest>) -> Result<Response<BatchGetResponse>, Status> {
        let deadline = deadline(&request);
        let (keys, options) = convert::batch_get(request.get_ref()).map_err(to_status)?;
        let answers = self.gateway.get_all(&keys, options, deadline).await;
        Ok(Response::new(convert::batch_get_response(answers)))
    }

    async fn batch_write(&self, request: Request<BatchWriteRequest>) -> Result<Response<BatchWriteResponse>, Status> {
        let deadline = deadline(&request);
        let items = convert::batch_write(request.into_inner(), self.limits.value_bytes_max).map_err(to_status)?;
        let mut valid = Vec::with_capacity(items.len());
        // What is invalid has its answer; what is not has its place.
        let judged: Vec<Option<Error>> = items
            .into_iter()
            .map(|item| item.map(|write| valid.push(write)).err())
            .collect();
        let awaits = valid.iter().any(|write| write.await_persisted);
        let outcomes = self.gateway.write_all(valid, deadline);
        let outcomes = if awaits {
            let outcomes = while_running(&self.stop, outcomes).await;
            outcomes.ok_or_else(|| to_status(shutting_down().unknown()))?
        } else {
            outcomes.await
        };
        let mut outcomes = outcomes.into_iter();
        let outcome = |invalid: Option<Error>| match invalid {
            Some(error) => Err(error),
            None => outcomes.next().unwrap_or_else(|| Err(unanswered())),
        };
        let results = judged.into_iter().map(outcome).map(convert::write_result).collect();
        Ok(Response::new(BatchWriteResponse { results }))
    }

    type WriteStreamStream = Answers;

    async fn write_stream(&self, request: Request<Streaming<WriteStreamRequest>>) -> Result<Response<Answers>, Status> {
        let deadline = request.extensions().get::<StreamDeadline>().and_then(|given| given.0);
        let writes = Writes::new(self.gateway.clone(), self.limits, deadline, self.stop.clone());
        Ok(Response::new(writes.start(request.into_inner())))
    }

    async fn scan(&self, request: Request<ScanRequest>) -> Result<Response<ScanResponse>, Status> {
        let deadline = deadline(&request);
        let scan = convert::scan(request.into_inner()).map_err(to_status)?;
        let page = self.gateway.scan(scan, deadline).await.map_err(to_status)?;
        Ok(Response::new(convert::scan_response(page)))
    }

    async fn touch(&self, request: Request<TouchRequest>) -> Result<Response<TouchResponse>, Status> {
        let deadline = deadline(&request);
        let touch = convert::touch(request.get_ref()).map_err(to_status)?;
        let touched = self.gateway.touch(touch, deadline).await.map_err(to_status)?;
        Ok(Response::new(convert::touch_response(touched)))
    }

    async fn increment(&self, request: Request<IncrementRequest>) -> Result<Response<IncrementResponse>, Status> {
        let deadline = deadline(&request);
        let increment = convert::increment(request.get_ref()).map_err(to_status)?;
        let counted = self.gateway.increment(increment, deadline).await.map_err(to_status)?;
        Ok(Response::new(convert::increment_response(counted)))
    }

    async fn await_persisted(
        &self,
        request: Request<AwaitPersistedRequest>,
    ) -> Result<Response<AwaitPersistedResponse>, Status> {
        let deadline = deadline(&request);
        let answer = match convert::await_persisted(request.get_ref()).map_err(to_status)? {
            AwaitedWrite::One(key, version) => {
                let stored = self.gateway.await_persisted(&key, version, deadline);
                let stored = while_running(&self.stop, stored).await;
                AwaitPersistedResponse {
                    version: stored
                        .unwrap_or_else(|| Err(shutting_down()))
                        .map_err(|error| to_status_about(error, "version"))?
                        .map_or(0, Version::get),
                    dead_lettered: 0,
                }
            }
            AwaitedWrite::All => {
                let stored = while_running(&self.stop, self.gateway.await_all_persisted(deadline)).await;
                let stored = stored.unwrap_or_else(|| Err(shutting_down()));
                AwaitPersistedResponse {
                    version: 0,
                    dead_lettered: stored.map_err(to_status)?,
                }
            }
        };
        Ok(Response::new(answer))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        let deadline = deadline(&request);
        let write = convert::delete(request.get_ref()).map_err(to_status)?;
        let written = write_while_running(&self.gateway, &self.stop, write, deadline).await;
        let written = written.map_err(to_status)?;
        Ok(Response::new(convert::delete_response(written)))
    }
}

/// What a call waits for that may never come, as a version that nobody wrote: until the gateway shuts down, and then for as long as it takes
/// to say what is there.
async fn while_running<T>(stop: &CancellationToken, waiting: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        outcome = waiting => Some(outcome),
        () = async { stop.cancelled().await; sleep(LAST_LOOK).await } => None,
    }
}

/// Writes, and where the store is awaited waits no longer than the gateway runs. The write itself goes on where it was admitted.
pub(crate) async fn write_while_running(
    gateway: &Gateway,
    stop: &CancellationToken,
    write: WriteRequest,
    deadline: Instant,
) -> Result<Written, Error> {
    if !write.await_persisted {
        return gateway.write(write, deadline).await;
    }
    let written = while_running(stop, gateway.write(write, deadline)).await;
    written.unwrap_or_else(|| Err(shutting_down().unknown()))
}

pub(crate) fn shutting_down() -> Error {
    Error::new(ErrorKind::Unavailable, "the gateway is shutting down")
}

/// Of a write of a batch; each has its answer.
fn unanswered() -> Error {
    Error::new(ErrorKind::Internal, "a write of the batch was not answered").unknown()
}

/// A `grpc-timeout`: up to eight digits and a unit. What is not one is no timeout, as gRPC's servers have it.
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_digits_and_a_unit() {
        assert_eq!(timeout("5S"), Some(Duration::from_secs(5)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(timeout("250m"), Some(Duration::from_millis(250)));
        for text in ["", "S", "5", "-5S", "+5S", "123456789S", "5 S", "5é", "é"] {
            assert_eq!(timeout(text), None, "{text:?}");
        }
    }
}
