//! One connection's way from a path to a service, and what is said about every call whichever service answers it.
//!
//! Owns the table of services, the counting of calls (a stream is one, which ends with it), how an answer is handed to HTTP/2, and the
//! statuses of requests that fail before a handler sees them. Routes by
//! a plain match: the generic routers box each call once more. Invariant: INTERNAL leaves here only with our own details, so it always
//! means a fault of ours.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method as HttpMethod, Request, Response, StatusCode, header::CONTENT_TYPE};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::Instant;
use tonic::{Code, Status, body::Body, codegen::Service};
use tonic_health::{pb::health_server::HealthServer, server::HealthService};

use crate::{
    error::{Error, ErrorKind},
    rpc::{
        arrival::Arrival,
        connection::Waits,
        proto::gateway_server::GatewayServer,
        reflection::Reflection,
        service::{CallLimits, GatewayService, stream_deadline},
        status::to_status,
    },
    telemetry::calls::{Method, ThreadCounters},
};

/// A call on its way.
pub(crate) type Call = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// A service whose type cannot be named.
pub(crate) type ErasedService = Arc<dyn Fn(Request<Incoming>) -> Call + Send + Sync>;

/// Hides a service's type.
pub(crate) fn erase<S>(service: S) -> ErasedService
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = std::convert::Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    Arc::new(move |request| {
        let mut service = service.clone();
        Box::pin(async move {
            match service.call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        })
    })
}

/// The services of one serving thread.
#[derive(Clone)]
pub(crate) struct Router {
    pub(crate) gateway: GatewayServer<GatewayService>,
    /// The same service, reading the larger messages of batches.
    pub(crate) batches: GatewayServer<GatewayService>,
    pub(crate) health: HealthServer<HealthService>,
    pub(crate) reflection: Option<Reflection>,
    pub(crate) counters: Arc<ThreadCounters>,
    pub(crate) limits: CallLimits,
}

impl Router {
    fn route(&self, request: Request<Incoming>) -> (Method, Call) {
        if let Some(refusal) = not_grpc(&request) {
            return (Method::Other, Box::pin(std::future::ready(refusal)));
        }
        let path = request.uri().path();
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
            return (Method::Other, unimplemented());
        };
        match service {
            "tidegate.v1.Gateway" => {
                let method = match method {
                    "Get" => Method::Get,
                    "Put" => Method::Put,
                    "Delete" => Method::Delete,
                    "BatchGet" => Method::BatchGet,
                    "BatchWrite" => Method::BatchWrite,
                    "WriteStream" => Method::WriteStream,
                    "Scan" => Method::Scan,
                    "Touch" => Method::Touch,
                    "Increment" => Method::Increment,
                    "AwaitPersisted" => Method::AwaitPersisted,
                    _ => Method::Other,
                };
                let mut server = match method {
                    Method::BatchGet | Method::BatchWrite => self.batches.clone(),
                    _ => self.gateway.clone(),
                };
                let request = match method {
                    Method::WriteStream => Self::lasting(request),
                    _ => self.bounded(request),
                };
                (method, answer(server.call(request)))
            }
            "grpc.health.v1.Health" => (Method::Other, answer(self.health.clone().call(self.bounded(request)))),
            _ => {
                let reflection = self.reflection.as_ref().and_then(|services| services.named(service));
                (
                    Method::Other,
                    reflection.map_or_else(unimplemented, |service| service(request)),
                )
            }
        }
    }

    /// The request with its deadline, before which its body has to have arrived.
    fn bounded(&self, mut request: Request<Incoming>) -> Request<Arrival> {
        let deadline = self.limits.deadlines.deadline(request.headers());
        request.extensions_mut().insert(deadline);
        request.map(|body| Arrival::new(body, Some(deadline.0)))
    }

    /// The request of a stream, which lasts for as long as its client said, if it said so.
    fn lasting(mut request: Request<Incoming>) -> Request<Arrival> {
        let deadline = stream_deadline(request.headers());
        request.extensions_mut().insert(deadline);
        request.map(|body| Arrival::new(body, None))
    }

    /// The largest message of a method.
    fn message_bytes_max(&self, method: Method) -> usize {
        match method {
            Method::BatchGet | Method::BatchWrite => self.limits.batch_bytes_max,
            _ => self.limits.message_bytes_max,
        }
    }
}

impl hyper::service::Service<Request<Incoming>> for Router {
    type Response = Response<AnswerBody>;
    type Error = std::convert::Infallible;
    type Future = CountedCall;

    fn call(&self, request: Request<Incoming>) -> CountedCall {
        let started = Instant::now();
        let (method, call) = self.route(request);
        self.counters.begin(method);
        CountedCall {
            call,
            message_bytes_max: self.message_bytes_max(method),
            unread_max: self.limits.stream_unread_max,
            count: Some(Count {
                method,
                started,
                counters: Arc::clone(&self.counters),
                answered: false,
            }),
        }
    }
}

/// One call, counted once: by the code of its answer, or as CANCELLED when its client went away first.
struct Count {
    method: Method,
    started: Instant,
    counters: Arc<ThreadCounters>,
    answered: bool,
}

impl Count {
    fn answered(&mut self, code: Code) {
        self.answered = true;
        self.counters.call(self.method, code, self.started.elapsed());
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        if !self.answered {
            self.answered(Code::Cancelled);
        }
        self.counters.end(self.method);
    }
}

/// A call that is counted.
pub(crate) struct CountedCall {
    call: Call,
    message_bytes_max: usize,
    unread_max: Duration,
    /// Goes with the body of a stream that began, and ends with it.
    count: Option<Count>,
}

impl Future for CountedCall {
    type Output = Result<Response<AnswerBody>, std::convert::Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Poll::Ready(response) = self.call.as_mut().poll(context) else {
            return Poll::Pending;
        };
        let response = own_status(response, self.message_bytes_max);
        // An answer without a status in its headers carries it behind its messages.
        let code = status_code(response.headers());
        let mut count = self.count.take();
        let lasts = code.is_none() && count.as_ref().is_some_and(|count| count.method == Method::WriteStream);
        if !lasts && let Some(mut count) = count.take() {
            // Without a code a unary call is OK.
            count.answered(code.unwrap_or(Code::Ok));
        }
        let unread_max = (!lasts).then_some(self.unread_max);
        Poll::Ready(Ok(response.map(|body| AnswerBody {
            body,
            rest: Bytes::new(),
            unread_max,
            count,
        })))
    }
}

/// The most of an answer that is handed to HTTP/2 at a time. What it was handed it keeps without bound in time; the rest is here, and is
/// dropped with a client that takes nothing.
const HANDED_BYTES_MAX: usize = 32 * 1024;

/// An answer on its way to its client, part by part.
pub(crate) struct AnswerBody {
    body: Body,
    /// What is left of the part of `body` that was taken last.
    rest: Bytes,
    /// How long its client may take nothing of it; a stream of writes sees to that itself.
    unread_max: Option<Duration>,
    /// Of a stream, which is counted at its end.
    count: Option<Count>,
}

impl AnswerBody {
    fn poll_part(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.rest.is_empty() {
            let frame = match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => frame,
                other => return other,
            };
            if let Some(code) = frame.trailers_ref().and_then(status_code)
                && let Some(mut count) = self.count.take()
            {
                count.answered(code);
            }
            match frame.into_data() {
                Ok(data) => self.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        let part = self.rest.split_to(self.rest.len().min(HANDED_BYTES_MAX));
        Poll::Ready(Some(Ok(Frame::data(part))))
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let part = self.poll_part(context);
        // It is asked for a part once the client has taken, or has room for, the one before.
        if let Some(unread_max) = self.unread_max {
            match part {
                Poll::Ready(_) => Waits::ForClient(unread_max).note(),
                Poll::Pending => Waits::ForUs.note(),
            }
        }
        part
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // hyper asks before the first part is taken.
        self.body.size_hint()
    }
}

pub(crate) fn answer<F>(call: F) -> Call
where
    F: Future<Output = Result<Response<Body>, std::convert::Infallible>> + Send + 'static,
{
    Box::pin(async move {
        match call.await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    })
}

pub(crate) fn unimplemented() -> Call {
    let status = Status::unimplemented("no such service or method: server reflection lists what there is");
    Box::pin(std::future::ready(status.into_http()))
}

/// What is no gRPC at all is answered in HTTP's terms, as gRPC's HTTP/2 mapping demands.
pub(crate) fn not_grpc(request: &Request<Incoming>) -> Option<Response<Body>> {
    let content_type = request
        .headers()
        .get(CONTENT_TYPE)
        .map_or(&b""[..], |value| value.as_bytes());
    let status = if request.method() != HttpMethod::POST {
        StatusCode::METHOD_NOT_ALLOWED
    } else if !content_type.starts_with(b"application/grpc") || content_type.starts_with(b"application/grpc-web") {
        StatusCode::UNSUPPORTED_MEDIA_TYPE
    } else {
        return None;
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    Some(response)
}

/// tonic answers what it cannot read itself, with codes that blame the server (INTERNAL) or mean something else (OUT_OF_RANGE).
/// Such answers have no details; ours always do.
pub(crate) fn own_status(response: Response<Body>, message_bytes_max: usize) -> Response<Body> {
    let headers = response.headers();
    if headers.contains_key(Status::GRPC_STATUS_DETAILS) {
        return response;
    }
    match status_code(headers).and_then(|code| unread(code, message_bytes_max)) {
        Some(error) => to_status(error).into_http(),
        None => response,
    }
}

/// What a code without our details says of a message that tonic could not read.
pub(crate) fn unread(code: Code, message_bytes_max: usize) -> Option<Error> {
    match code {
        Code::OutOfRange => Some(Error::new(
            ErrorKind::TooLarge,
            format!("the request is larger than the {message_bytes_max} bytes that this server reads: send less"),
        )),
        Code::Internal | Code::Unknown => Some(Error::new(
            ErrorKind::Invalid,
            "the request is no complete gRPC message: check its length prefix, its compression flag and its encoding",
        )),
        _ => None,
    }
}

fn status_code(headers: &HeaderMap) -> Option<Code> {
    headers
        .get(Status::GRPC_STATUS)
        .map(|value| Code::from_bytes(value.as_bytes()))
}
