//! A limit of rates: so many requests of a client in a window of time, counted in the gateway for all replicas of a service.
//!
//! Owns the layer, and what a refused client is told. A client is counted by one record, which its first request creates with the window as
//! its lifetime: `Increment` counts exactly, whoever else counts, and never prolongs it. So there is no clock to agree on, nothing to clear
//! away, and a client whose window is over begins a new one with its next request. Of two windows that follow each other a client can use the
//! whole of both within a short time: that is what a fixed window is.
//!
//! Does not own who a client is: a function of the request says so. Invariants: a request is counted at most once; a count has the patience to
//! be answered, and where it is not, the layer does as it was told, and the service is never held up for longer.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use axum::{body::Body, extract::Request, response::Response};
use http::{HeaderMap, HeaderValue, StatusCode, header::RETRY_AFTER};
use tidegate::rpc::proto::{IncrementRequest, IncrementResponse};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;
use tower_layer::Layer;
use tower_service::Service;

use crate::gateway::{Client, within};

/// Who sent a request: what is counted under. `None`: it is not counted, and always passes.
pub type Who = dyn Fn(&Request) -> Option<String> + Send + Sync;

/// What becomes of a request that could not be counted, for the gateway, or its store, cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uncounted {
    /// It passes: the limit protects from excess, and an outage is no reason to serve nobody.
    Passes,
    /// It is refused with 503: the limit is what is sold, or what protects something that must not be reached without.
    IsRefused,
}

/// So many requests in a window, for each client.
#[derive(Clone)]
pub struct RateLimit {
    gateway: Client,
    namespace: String,
    limit: u32,
    window: Duration,
    patience: Duration,
    uncounted: Uncounted,
    who: Arc<Who>,
}

impl RateLimit {
    /// Allows each client that `who` tells apart `limit` requests in a `window`, which begins with its first. The counters are records of the
    /// namespace, which the layer has for itself; limits that have one namespace share their counters.
    pub fn new(
        channel: Channel,
        namespace: impl Into<String>,
        limit: u32,
        window: Duration,
        who: impl Fn(&Request) -> Option<String> + Send + Sync + 'static,
    ) -> RateLimit {
        RateLimit {
            gateway: Client::new(channel),
            namespace: namespace.into(),
            limit,
            window,
            patience: Duration::from_millis(500),
            uncounted: Uncounted::Passes,
            who: Arc::new(who),
        }
    }

    /// How long a request may wait to be counted. Default: 500 ms.
    pub fn patience(self, patience: Duration) -> RateLimit {
        RateLimit { patience, ..self }
    }

    /// What becomes of a request that could not be counted. Default: it passes.
    pub fn uncounted(self, uncounted: Uncounted) -> RateLimit {
        RateLimit { uncounted, ..self }
    }

    /// Counts a request of a client. It is not tried again: one that is lost on the way may be counted, which does no harm.
    async fn count(&self, who: String) -> Result<Count, Status> {
        let request = IncrementRequest {
            namespace: self.namespace.clone(),
            key: who,
            delta: None,
            ttl: prost_types::Duration::try_from(self.window).ok(),
            request_id: String::new(),
        };
        let answer = self.gateway.clone().increment(within(self.patience, request)).await?;
        Ok(Count::of(&answer.into_inner(), self.limit))
    }
}

/// Where a client stands.
struct Count {
    allowed: bool,
    limit: u32,
    remaining: i64,
    /// Seconds, rounded up, until its window is over.
    reset: u64,
}

impl Count {
    fn of(answer: &IncrementResponse, limit: u32) -> Count {
        let ends = answer.expire_time.and_then(|time| SystemTime::try_from(time).ok());
        // By this machine's clock, while the gateway's says when the window ends: what is told is a hint, what is counted is exact.
        let left = ends.and_then(|ends| ends.duration_since(SystemTime::now()).ok());
        Count {
            allowed: answer.value <= i64::from(limit),
            limit,
            remaining: (i64::from(limit) - answer.value).max(0),
            reset: left.unwrap_or_default().as_secs() + 1,
        }
    }

    fn tell(&self, headers: &mut HeaderMap) {
        headers.insert("ratelimit-limit", HeaderValue::from(self.limit));
        headers.insert("ratelimit-remaining", HeaderValue::from(self.remaining));
        headers.insert("ratelimit-reset", HeaderValue::from(self.reset));
        if !self.allowed {
            headers.insert(RETRY_AFTER, HeaderValue::from(self.reset));
        }
    }
}

/// What a request that was not counted is answered with, if it does not pass.
fn refusal(failure: &Status, uncounted: Uncounted) -> Option<Response> {
    // No key: longer than 1,024 bytes, or nothing at all. That is the client's doing, and no outage.
    if failure.code() == Code::InvalidArgument {
        return Some(empty(StatusCode::BAD_REQUEST));
    }
    if uncounted == Uncounted::Passes {
        return None;
    }
    let mut response = empty(StatusCode::SERVICE_UNAVAILABLE);
    let delay = failure.get_details_retry_info().and_then(|info| info.retry_delay);
    let seconds = delay.unwrap_or_default().as_secs().max(1);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    Some(response)
}

fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

impl<S> Layer<S> for RateLimit {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited {
            limit: self.clone(),
            inner,
        }
    }
}

/// A service behind a [`RateLimit`].
#[derive(Clone)]
pub struct Limited<S> {
    limit: RateLimit,
    inner: S,
}

impl<S> Service<Request> for Limited<S>
where
    S: Service<Request, Response = Response> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        // The one that is ready answers; the clone that stays behind may not be.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let limit = self.limit.clone();
        let who = (limit.who)(&request);
        Box::pin(async move {
            let Some(who) = who else {
                return inner.call(request).await;
            };
            match limit.count(who).await {
                Ok(count) => {
                    let mut response = if count.allowed {
                        inner.call(request).await?
                    } else {
                        empty(StatusCode::TOO_MANY_REQUESTS)
                    };
                    count.tell(response.headers_mut());
                    Ok(response)
                }
                Err(failure) => match refusal(&failure, limit.uncounted) {
                    Some(refused) => Ok(refused),
                    None => inner.call(request).await,
                },
            }
        })
    }
}
