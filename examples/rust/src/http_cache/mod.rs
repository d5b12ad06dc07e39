//! A cache of HTTP responses in the gateway, as a layer before a service: what one replica answered, the others need not work out again.
//!
//! Owns the layer: what it asks the gateway, what it keeps there, and what it says of that in `Cache-Status`. What may be kept is decided by
//! `policy`, what a kept response looks like by `stored`. Only what the service allows is kept, by `Cache-Control: max-age` or `s-maxage`, and
//! for as long: the record's ttl is that lifetime, so the gateway never gives out a response that is too old. A request that changes
//! something (POST, PUT, PATCH, DELETE) removes what is kept under its own address once it has succeeded. One that was being worked out at that
//! moment may be kept after that: such a response is old for as long as its own lifetime, which is what that is for.
//!
//! Invariants: the service is asked whenever the gateway does not answer within the patience, so an outage of the gateway costs that, and no
//! request; a response whose length is not known, or is too large, is passed on as it comes; what is in the gateway and is no response
//! counts as nothing.

mod policy;
mod stored;

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, HttpBody, to_bytes},
    extract::Request,
    response::Response,
};
use http::{HeaderValue, StatusCode};
use prost::Message;
use tidegate::rpc::proto::{DeleteRequest, GetRequest, PutRequest, WriteMode};
use tonic::{Status, transport::Channel};
use tower_layer::Layer;
use tower_service::Service;

use self::{policy::Part, stored::Stored};
use crate::gateway::{Client, within};

/// The header that says what the cache had to do with an answer.
const CACHE_STATUS: &str = "cache-status";

/// Keeps responses in a namespace of the gateway.
#[derive(Clone)]
pub struct HttpCache {
    gateway: Client,
    namespace: String,
    patience: Duration,
    body_bytes_max: u64,
}

impl HttpCache {
    /// A cache in a namespace, which it has for itself. Responses are written behind: give the namespace `durability = "memory"`, for what a
    /// crash takes away is worked out again.
    pub fn new(channel: Channel, namespace: impl Into<String>) -> HttpCache {
        HttpCache {
            gateway: Client::new(channel),
            namespace: namespace.into(),
            patience: Duration::from_millis(250),
            body_bytes_max: 512 * 1024,
        }
    }

    /// How long a request may wait for the gateway: once for what it has, and once to keep an answer. Default: 250 ms.
    pub fn patience(self, patience: Duration) -> HttpCache {
        HttpCache { patience, ..self }
    }

    /// The longest body that is kept, in bytes: with its headers it must fit into a value of the gateway. Default: 512 KiB.
    pub fn body_bytes_max(self, body_bytes_max: u64) -> HttpCache {
        HttpCache { body_bytes_max, ..self }
    }

    /// What is kept under a key.
    async fn get(&self, key: &str) -> Result<Option<Response>, Status> {
        let request = GetRequest {
            namespace: self.namespace.clone(),
            key: key.to_owned(),
            ..GetRequest::default()
        };
        let answer = self.gateway.clone().get(within(self.patience, request)).await?;
        Ok(answer.into_inner().entry.and_then(|entry| Stored::read(entry.value)))
    }

    /// Keeps a response, if the gateway takes it in time.
    async fn put(&self, key: String, response: &Stored, lifetime: Duration) -> Result<(), Status> {
        let request = PutRequest {
            namespace: self.namespace.clone(),
            key,
            value: response.encode_to_vec().into(),
            write_mode: WriteMode::Behind.into(),
            ttl: prost_types::Duration::try_from(lifetime).ok(),
            ..PutRequest::default()
        };
        self.gateway.clone().put(within(self.patience, request)).await.map(drop)
    }

    /// Removes what is kept under a key.
    async fn delete(&self, key: String) -> Result<(), Status> {
        let request = DeleteRequest {
            namespace: self.namespace.clone(),
            key,
            write_mode: WriteMode::Behind.into(),
            ..DeleteRequest::default()
        };
        self.gateway
            .clone()
            .delete(within(self.patience, request))
            .await
            .map(drop)
    }

    /// Keeps the answer of the service, if it may be, and says whether it did.
    async fn keep(&self, key: String, response: Response, why: &str) -> Response {
        let lifetime = policy::lifetime(response.status(), response.headers());
        let exact = response.body().size_hint().exact();
        let (Some(lifetime), Some(length)) = (lifetime, exact.filter(|length| *length <= self.body_bytes_max)) else {
            return told(response, &format!("tidegate; fwd={why}"));
        };
        let (head, body) = response.into_parts();
        // It is as long as it says, or it broke off: then there is nothing to answer with.
        let Ok(body) = to_bytes(body, usize::try_from(length).unwrap_or(usize::MAX)).await else {
            let mut broken = Response::new(Body::empty());
            *broken.status_mut() = StatusCode::BAD_GATEWAY;
            return broken;
        };
        let stored = Stored::new(head.status, &head.headers, body.clone());
        let kept = self.put(key, &stored, lifetime).await.is_ok();
        let said = format!("tidegate; fwd={why}{}", if kept { "; stored" } else { "" });
        told(Response::from_parts(head, Body::from(body)), &said)
    }
}

/// The response, which says what the cache had to do with it.
fn told(mut response: Response, said: &str) -> Response {
    if let Ok(said) = HeaderValue::from_str(said) {
        response.headers_mut().append(CACHE_STATUS, said);
    }
    response
}

impl<S> Layer<S> for HttpCache {
    type Service = Cached<S>;

    fn layer(&self, inner: S) -> Cached<S> {
        Cached {
            cache: self.clone(),
            inner,
        }
    }
}

/// A service behind an [`HttpCache`].
#[derive(Clone)]
pub struct Cached<S> {
    cache: HttpCache,
    inner: S,
}

impl<S> Service<Request> for Cached<S>
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
        let cache = self.cache.clone();
        Box::pin(async move {
            match policy::part(&request) {
                Part::Bypass => Ok(told(inner.call(request).await?, "tidegate; fwd=bypass")),
                Part::Answer(key) => match cache.get(&key).await {
                    Ok(Some(response)) => Ok(told(response, "tidegate; hit")),
                    Ok(None) => Ok(cache.keep(key, inner.call(request).await?, "uri-miss").await),
                    // Nothing is offered to a gateway that did not answer: it would cost the patience once more.
                    Err(_) => Ok(told(
                        inner.call(request).await?,
                        "tidegate; fwd=bypass; detail=unavailable",
                    )),
                },
                Part::Refresh(key) => Ok(cache.keep(key, inner.call(request).await?, "request").await),
                Part::Forget(key) => {
                    let response = inner.call(request).await?;
                    let succeeded = response.status().is_success() || response.status().is_redirection();
                    let forgotten = succeeded && cache.delete(key).await.is_ok();
                    let said = if forgotten {
                        "tidegate; fwd=method; detail=forgotten"
                    } else {
                        "tidegate; fwd=method"
                    };
                    Ok(told(response, said))
                }
            }
        })
    }
}
