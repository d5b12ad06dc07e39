//! The service of `tidegate.v1.Gateway`: decode, call the gateway, encode. It decides nothing.
//!
//! Owns the translation of a call's deadline. Cancellation: when a client goes away tonic drops the method's future; a read ends
//! there, a write goes on once the gateway admitted it (see [`crate::gateway`]).

use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::{
    gateway::Gateway,
    rpc::{
        convert,
        proto::{
            DeleteRequest, DeleteResponse, GetRequest, GetResponse, PutRequest, PutResponse,
            gateway_server::Gateway as GatewayRpc,
        },
        status::to_status,
    },
};

/// What a call may ask of the service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallLimits {
    pub(crate) value_bytes_max: usize,
    pub(crate) deadline_default: Duration,
    pub(crate) deadline_max: Duration,
}

/// The service, one for each serving thread.
#[derive(Clone)]
pub(crate) struct GatewayService {
    gateway: Gateway,
    limits: CallLimits,
}

impl GatewayService {
    pub(crate) fn new(gateway: Gateway, limits: CallLimits) -> GatewayService {
        GatewayService { gateway, limits }
    }
}

impl CallLimits {
    /// Until when a call with these headers may take, counted from now: from their arrival.
    pub(crate) fn deadline(&self, headers: &HeaderMap) -> Deadline {
        let asked = headers
            .get("grpc-timeout")
            .and_then(|value| timeout(value.to_str().ok()?));
        Deadline(Instant::now() + asked.unwrap_or(self.deadline_default).min(self.deadline_max))
    }
}

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
        let found = self.gateway.get(&key, options, deadline).await.map_err(to_status)?;
        Ok(Response::new(convert::get_response(found)))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let deadline = deadline(&request);
        let write = convert::put(request.into_inner(), self.limits.value_bytes_max).map_err(to_status)?;
        let written = self.gateway.write(write, deadline).await.map_err(to_status)?;
        Ok(Response::new(convert::put_response(written)))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        let deadline = deadline(&request);
        let write = convert::delete(request.get_ref()).map_err(to_status)?;
        let written = self.gateway.write(write, deadline).await.map_err(to_status)?;
        Ok(Response::new(convert::delete_response(written)))
    }
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
