//! The service of `tidegate.v1.Gateway`: what each of its unary methods asks of the gateway, and how it is answered. It decides nothing.
//!
//! Owns the translation of a call's deadline. Does not own the framing of messages (`rpc/unary.rs`), nor the stream of writes
//! (`rpc/stream.rs`). Cancellation: when a client goes away hyper drops the method's future; a read ends there, a write goes on once the
//! gateway admitted it (see [`crate::gateway`]).

use std::{sync::Arc, time::Duration};

use http::HeaderMap;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Status;

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
        },
        status::{to_status, to_status_about},
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
    /// The same of what a watch has to tell.
    pub(crate) watch_unread_max: Duration,
}

/// How much time a call gets that asks for none, and the most that one may ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    pub(crate) default: Duration,
    pub(crate) max: Duration,
}

/// The service, one for each serving thread.
pub(crate) struct GatewayService {
    pub(crate) gateway: Gateway,
    pub(crate) limits: CallLimits,
    /// Tells streams, and calls that wait for others, that the gateway shuts down.
    pub(crate) stop: CancellationToken,
}

impl Deadlines {
    /// Until when a call with these headers may take, counted from their arrival.
    pub(crate) fn deadline(&self, headers: &HeaderMap, arrived: Instant) -> Instant {
        arrived + asked(headers).unwrap_or(self.default).min(self.max)
    }
}

/// Until when a stream with these headers may last: for as long as its client said, or without end.
pub(crate) fn stream_deadline(headers: &HeaderMap) -> Option<Instant> {
    asked(headers).and_then(|asked| Instant::now().checked_add(asked))
}

/// How much time a client gives a call.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    timeout(headers.get("grpc-timeout")?.to_str().ok()?)
}

impl GatewayService {
    pub(crate) async fn get(self: Arc<Self>, request: GetRequest, deadline: Instant) -> Result<GetResponse, Status> {
        let (key, options) = convert::get(&request).map_err(to_status)?;
        let found = self.gateway.get(&key, options, deadline);
        let found = match options.freshness.min_version {
            None => found.await,
            Some(_) => while_running(&self.stop, found)
                .await
                .unwrap_or_else(|| Err(shutting_down())),
        };
        let found = found.map_err(to_status)?;
        Ok(convert::get_response(found))
    }

    pub(crate) async fn put(self: Arc<Self>, request: PutRequest, deadline: Instant) -> Result<PutResponse, Status> {
        let write = convert::put(request, self.limits.value_bytes_max).map_err(to_status)?;
        let written = write_while_running(&self.gateway, &self.stop, write, deadline).await;
        let written = written.map_err(to_status)?;
        Ok(convert::put_response(written))
    }

    pub(crate) async fn batch_get(
        self: Arc<Self>,
        request: BatchGetRequest,
        deadline: Instant,
    ) -> Result<BatchGetResponse, Status> {
        let (keys, options) = convert::batch_get(&request).map_err(to_status)?;
        let answers = self.gateway.get_all(&keys, options, deadline).await;
        Ok(convert::batch_get_response(answers))
    }

    pub(crate) async fn batch_write(
        self: Arc<Self>,
        request: BatchWriteRequest,
        deadline: Instant,
    ) -> Result<BatchWriteResponse, Status> {
        let items = convert::batch_write(request, self.limits.value_bytes_max).map_err(to_status)?;
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
        Ok(BatchWriteResponse { results })
    }

    pub(crate) async fn scan(self: Arc<Self>, request: ScanRequest, deadline: Instant) -> Result<ScanResponse, Status> {
        let scan = convert::scan(request).map_err(to_status)?;
        let page = self.gateway.scan(scan, deadline).await.map_err(to_status)?;
        Ok(convert::scan_response(page))
    }

    pub(crate) async fn touch(
        self: Arc<Self>,
        request: TouchRequest,
        deadline: Instant,
    ) -> Result<TouchResponse, Status> {
        let touch = convert::touch(&request).map_err(to_status)?;
        let touched = self.gateway.touch(touch, deadline).await.map_err(to_status)?;
        Ok(convert::touch_response(touched))
    }

    pub(crate) async fn increment(
        self: Arc<Self>,
        request: IncrementRequest,
        deadline: Instant,
    ) -> Result<IncrementResponse, Status> {
        let increment = convert::increment(&request).map_err(to_status)?;
        let counted = self.gateway.increment(increment, deadline).await.map_err(to_status)?;
        Ok(convert::increment_response(counted))
    }

    pub(crate) async fn await_persisted(
        self: Arc<Self>,
        request: AwaitPersistedRequest,
        deadline: Instant,
    ) -> Result<AwaitPersistedResponse, Status> {
        let answer = match convert::await_persisted(&request).map_err(to_status)? {
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
        Ok(answer)
    }

    pub(crate) async fn delete(
        self: Arc<Self>,
        request: DeleteRequest,
        deadline: Instant,
    ) -> Result<DeleteResponse, Status> {
        let write = convert::delete(&request).map_err(to_status)?;
        let written = write_while_running(&self.gateway, &self.stop, write, deadline).await;
        let written = written.map_err(to_status)?;
        Ok(convert::delete_response(written))
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
