//! One connection's way from a path to a method, and what is said about every call whichever service answers it.
//!
//! Owns the table of methods, the counting of calls (a stream is one, which ends with it), how an answer is handed to HTTP/2, and the
//! statuses of requests that fail before a handler of tonic's sees them. Does not own the messages of our own calls (`unary`, `stream`).
//! Routes by a plain match. Invariant: INTERNAL leaves here only with our own details, so it always means a fault of ours.

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
use prost::Message;
use tokio::time::Instant;
use tonic::{Code, Status, body::Body, codegen::Service, server::Grpc};
use tonic_health::{pb::health_server::HealthServer, server::HealthService};

use crate::{
    error::Error,
    rpc::{
        arrival::Arrival,
        codec::Codec,
        connection::Waits,
        reflection::Reflection,
        service::{CallLimits, GatewayService, stream_deadline},
        status::to_status,
        stream::Writing,
        unary::{self, unary},
        watch::Watching,
    },
    telemetry::calls::{Method, ThreadCounters},
};

/// A call of a service of tonic's on its way.
pub(crate) type TonicCall = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// A service whose type cannot be named.
pub(crate) type ErasedService = Arc<dyn Fn(Request<Incoming>) -> TonicCall + Send + Sync>;

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
    pub(crate) gateway: Arc<GatewayService>,
    pub(crate) health: HealthServer<HealthService>,
    pub(crate) reflection: Option<Reflection>,
    pub(crate) counters: Arc<ThreadCounters>,
    pub(crate) limits: CallLimits,
}

/// A call on its way to an answer of any kind.
type Answering = Pin<Box<dyn Future<Output = Response<Content>> + Send>>;

impl Router {
    fn route(&self, request: Request<Incoming>, arrived: Instant) -> (Method, Answering) {
        if let Some(refusal) = not_grpc(&request) {
            return (Method::Other, self.foreign(std::future::ready(refusal)));
        }
        let path = request.uri().path();
        let Some((service, name)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
            return (Method::Other, self.foreign(unimplemented()));
        };
        match service {
            "tidegate.v1.Gateway" => {
                let method = method(name);
                (method, self.call_gateway(method, request, arrived))
            }
            "grpc.health.v1.Health" => {
                let deadline = self.limits.deadlines.deadline(request.headers(), arrived);
                let request = request.map(|body| Arrival::new(body, Some(deadline)));
                (Method::Other, self.foreign(answer(self.health.clone().call(request))))
            }
            _ => {
                let reflection = self.reflection.as_ref().and_then(|services| services.named(service));
                let call = reflection.map_or_else(unimplemented, |service| service(request));
                (Method::Other, self.foreign(call))
            }
        }
    }

    fn call_gateway(&self, method: Method, request: Request<Incoming>, arrived: Instant) -> Answering {
        let call = Call {
            router: self,
            method,
            request,
            arrived,
        };
        match method {
            Method::Get => call.unary(GatewayService::get),
            Method::Put => call.unary(GatewayService::put),
            Method::Delete => call.unary(GatewayService::delete),
            Method::BatchGet => call.unary(GatewayService::batch_get),
            Method::BatchWrite => call.unary(GatewayService::batch_write),
            Method::Scan => call.unary(GatewayService::scan),
            Method::Touch => call.unary(GatewayService::touch),
            Method::Increment => call.unary(GatewayService::increment),
            Method::AwaitPersisted => call.unary(GatewayService::await_persisted),
            Method::WriteStream => call.stream(),
            Method::Watch => call.watch(),
            Method::Other => self.foreign(unimplemented()),
        }
    }

    /// A call that tonic answers, whose failures are put into our own words.
    fn foreign(&self, call: impl Future<Output = Response<Body>> + Send + 'static) -> Answering {
        let message_bytes_max = self.limits.message_bytes_max;
        Box::pin(async move { own_status(call.await, message_bytes_max).map(Content::tonic) })
    }

    /// The largest message of a method.
    fn message_bytes_max(&self, method: Method) -> usize {
        match method {
            Method::BatchGet | Method::BatchWrite => self.limits.batch_bytes_max,
            _ => self.limits.message_bytes_max,
        }
    }
}

fn method(name: &str) -> Method {
    match name {
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
        "Watch" => Method::Watch,
        _ => Method::Other,
    }
}

/// A call of the gateway's own service.
struct Call<'a> {
    router: &'a Router,
    method: Method,
    request: Request<Incoming>,
    arrived: Instant,
}

impl Call<'_> {
    /// Has its one message handled, which has to arrive before the deadline of the call.
    fn unary<Q, A, F>(self, handle: fn(Arc<GatewayService>, Q, Instant) -> F) -> Answering
    where
        Q: Message + Default + 'static,
        A: Message + 'static,
        F: Future<Output = Result<A, Status>> + Send + 'static,
    {
        let Router { gateway, limits, .. } = self.router;
        let message_bytes_max = self.router.message_bytes_max(self.method);
        let deadline = limits.deadlines.deadline(self.request.headers(), self.arrived);
        let encoding = unary::encoding(self.request.headers());
        let body = Arrival::new(self.request.into_body(), Some(deadline));
        let gateway = Arc::clone(gateway);
        Box::pin(async move {
            let handle = |message| handle(gateway, message, deadline);
            match unary(body, encoding, message_bytes_max, handle).await {
                Ok(message) => unary::answered(Content::Message(message)),
                Err(status) => status.into_http::<Body>().map(Content::tonic),
            }
        })
    }

    /// The stream of writes, which lasts for as long as its client said, if it said so.
    fn stream(self) -> Answering {
        let limits = &self.router.limits;
        let deadline = stream_deadline(self.request.headers());
        let writing = Writing::new(Arc::clone(&self.router.gateway), deadline);
        let request = self.request.map(|body| Arrival::new(body, None));
        let mut grpc = Grpc::new(Codec::default()).max_decoding_message_size(limits.message_bytes_max);
        self.router
            .foreign(async move { grpc.streaming(writing, request).await })
    }

    /// A watch, which lasts for as long as its client said, if it said so. What it asks for has to arrive as any message.
    fn watch(self) -> Answering {
        let Router { gateway, limits, .. } = self.router;
        let arrives_by = limits.deadlines.deadline(self.request.headers(), self.arrived);
        let watching = Watching::new(Arc::clone(gateway), stream_deadline(self.request.headers()));
        let request = self.request.map(|body| Arrival::new(body, Some(arrives_by)));
        let mut grpc = Grpc::new(Codec::default()).max_decoding_message_size(limits.message_bytes_max);
        self.router
            .foreign(async move { grpc.server_streaming(watching, request).await })
    }
}

impl hyper::service::Service<Request<Incoming>> for Router {
    type Response = Response<AnswerBody>;
    type Error = std::convert::Infallible;
    type Future = CountedCall;

    fn call(&self, request: Request<Incoming>) -> CountedCall {
        let arrived = Instant::now();
        let (method, call) = self.route(request, arrived);
        self.counters.begin(method);
        CountedCall {
            call,
            unread_max: match method {
                // It sees to that itself.
                Method::WriteStream => None,
                Method::Watch => Some(self.limits.watch_unread_max),
                _ => Some(self.limits.stream_unread_max),
            },
            count: Some(Count {
                method,
                arrived,
                counters: Arc::clone(&self.counters),
                answered: false,
            }),
        }
    }
}

/// One call, counted once: by the code of its answer, or as CANCELLED when its client went away first.
struct Count {
    method: Method,
    arrived: Instant,
    counters: Arc<ThreadCounters>,
    answered: bool,
}

impl Count {
    fn answered(&mut self, code: Code) {
        self.answered = true;
        self.counters.call(self.method, code, self.arrived.elapsed());
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
    call: Answering,
    unread_max: Option<Duration>,
    /// Goes with the body of a stream that began, and ends with it.
    count: Option<Count>,
}

impl Future for CountedCall {
    type Output = Result<Response<AnswerBody>, std::convert::Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Poll::Ready(response) = self.call.as_mut().poll(context) else {
            return Poll::Pending;
        };
        // An answer without a status in its headers carries it behind its messages.
        let code = status_code(response.headers());
        let mut count = self.count.take();
        let is_stream = |count: &Count| matches!(count.method, Method::WriteStream | Method::Watch);
        let lasts = code.is_none() && count.as_ref().is_some_and(is_stream);
        if !lasts && let Some(mut count) = count.take() {
            // Without a code a unary call is OK.
            count.answered(code.unwrap_or(Code::Ok));
        }
        let unread_max = self.unread_max;
        Poll::Ready(Ok(response.map(|content| AnswerBody {
            content,
            unread_max,
            count,
        })))
    }
}

/// The most of an answer that is handed to HTTP/2 at a time. What it was handed it keeps without bound in time; the rest is here, and is
/// dropped with a client that takes nothing.
const HANDED_BYTES_MAX: usize = 32 * 1024;

/// What is left of an answer.
pub(crate) enum Content {
    /// A message, and then that all is well.
    Message(Bytes),
    /// What tonic has made, of which the part that was taken last may be left.
    Tonic(Body, Bytes),
    /// Nothing.
    Ended,
}

impl Content {
    fn tonic(body: Body) -> Content {
        Content::Tonic(body, Bytes::new())
    }
}

/// An answer on its way to its client, part by part.
pub(crate) struct AnswerBody {
    content: Content,
    /// How long its client may take nothing of it; a stream of writes sees to that itself.
    unread_max: Option<Duration>,
    /// Of a stream, which is counted at its end.
    count: Option<Count>,
}

impl AnswerBody {
    fn poll_part(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let data = match &mut self.content {
            Content::Ended => return Poll::Ready(None),
            Content::Message(rest) if rest.is_empty() => {
                self.content = Content::Ended;
                return Poll::Ready(Some(Ok(Frame::trailers(unary::ok()))));
            }
            Content::Message(rest) => rest,
            Content::Tonic(body, rest) => {
                if rest.is_empty() {
                    let frame = match Pin::new(body).poll_frame(context) {
                        Poll::Ready(Some(Ok(frame))) => frame,
                        other => return other,
                    };
                    if let Some(code) = frame.trailers_ref().and_then(status_code)
                        && let Some(mut count) = self.count.take()
                    {
                        count.answered(code);
                    }
                    match frame.into_data() {
                        Ok(data) => *rest = data,
                        Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                    }
                }
                rest
            }
        };
        let part = data.split_to(data.len().min(HANDED_BYTES_MAX));
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
        match &self.content {
            Content::Message(_) => false,
            Content::Tonic(body, rest) => rest.is_empty() && body.is_end_stream(),
            Content::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            // hyper asks before the first part is taken.
            Content::Tonic(body, _) => body.size_hint(),
            // A length would be one header more.
            Content::Message(_) | Content::Ended => SizeHint::default(),
        }
    }
}

pub(crate) fn answer<F>(call: F) -> TonicCall
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

pub(crate) fn unimplemented() -> TonicCall {
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
        Code::OutOfRange => Some(unary::too_large(message_bytes_max)),
        Code::Internal | Code::Unknown => Some(unary::no_message()),
        _ => None,
    }
}

fn status_code(headers: &HeaderMap) -> Option<Code> {
    headers
        .get(Status::GRPC_STATUS)
        .map(|value| Code::from_bytes(value.as_bytes()))
}
