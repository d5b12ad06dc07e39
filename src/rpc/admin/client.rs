//! A client of the operators' port, for the commands of this binary.
//!
//! Owns one connection and the time that it may take. Speaks HTTP/2 by hyper directly, as the server does: one connection to one address
//! needs no channel that balances, buffers and dials anew.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response, Uri};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpStream, time::timeout};
use tonic::{Code, Request as TonicRequest, Status, Streaming, body::Body, codegen::Service};

use crate::rpc::{
    connection::SameRuntime,
    proto::{
        DiscardDeadLettersRequest, DiscardDeadLettersResponse, ExportDeadLettersRequest, ExportDeadLettersResponse,
        FlushRequest, FlushResponse, InvalidateRequest, InvalidateResponse, ListDeadLettersRequest,
        ListDeadLettersResponse, LogLevelRequest, LogLevelResponse, NamespacesRequest, NamespacesResponse,
        PauseRequest, PauseResponse, QueueRequest, QueueResponse, ResumeRequest, ResumeResponse,
        RetryDeadLettersRequest, RetryDeadLettersResponse, StatsRequest, StatsResponse, WarmRequest, WarmResponse,
        admin_client::AdminClient,
    },
};

/// How long the gateway may take to accept a connection.
const CONNECT_WAIT: Duration = Duration::from_secs(3);

/// How often a gateway with a call under way is asked whether it is there, and how long it may take to say so.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_WAIT: Duration = Duration::from_secs(20);

/// How much longer than its deadline a call is waited for: the gateway has the last word on what came of it.
const LAST_WORD_WAIT: Duration = Duration::from_secs(1);

/// The largest answer: a thousand namespaces take a megabyte; a dead letter has a value of up to 64 MiB.
const ANSWER_BYTES_MAX: usize = 80 * 1024 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody accepts connections there, or no gateway does.
    #[error("no gateway answers at {address}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// It answered with a failure, or broke off.
    #[error("the gateway answered {code:?}: {message}", code = .0.code(), message = .0.message())]
    Failed(Status),
    /// It took too long.
    #[error("the gateway did not answer in {} seconds", .0.as_secs())]
    Late(Duration),
}

/// What a failure means to whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// What was asked for is wrong.
    Invalid,
    /// Something that is named is not known.
    NotFound,
    /// Something else has to be so first.
    Precondition,
    /// No gateway answers, or it cannot now.
    Unavailable,
    /// There was no answer in time: it may have been done.
    Unknown,
    /// Anything else.
    Failed,
}

impl ClientError {
    /// What it means.
    pub fn meaning(&self) -> Meaning {
        let status = match self {
            ClientError::Connect { .. } => return Meaning::Unavailable,
            ClientError::Late(_) => return Meaning::Unknown,
            ClientError::Failed(status) => status,
        };
        match status.code() {
            Code::InvalidArgument => Meaning::Invalid,
            Code::NotFound => Meaning::NotFound,
            Code::FailedPrecondition => Meaning::Precondition,
            Code::Unavailable | Code::ResourceExhausted => Meaning::Unavailable,
            Code::DeadlineExceeded | Code::Cancelled => Meaning::Unknown,
            _ => Meaning::Failed,
        }
    }
}

/// A connection to a gateway's operators' port.
#[derive(Debug)]
pub struct Client {
    stub: AdminClient<Connection>,
    wait: Duration,
}

/// One call with one answer.
macro_rules! call {
    ($(#[$doc:meta])* $name:ident, $request:ty, $response:ty) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// [`ClientError::Failed`], [`ClientError::Late`].
        pub async fn $name(&mut self, request: $request) -> Result<$response, ClientError> {
            let wait = self.wait;
            let answer = timeout(wait + LAST_WORD_WAIT, self.stub.$name(within(request, wait))).await;
            let answer = answer.map_err(|_| ClientError::Late(wait))?.map_err(ClientError::Failed)?;
            Ok(answer.into_inner())
        }
    };
}

/// One call with many answers, which takes as long as it takes once it has begun: then a gateway that hangs is found out by the connection.
macro_rules! stream {
    ($(#[$doc:meta])* $name:ident, $request:ty, $response:ty) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// [`ClientError::Failed`], [`ClientError::Late`].
        pub async fn $name(&mut self, request: $request) -> Result<Answers<$response>, ClientError> {
            let wait = self.wait;
            let answers = timeout(wait + LAST_WORD_WAIT, self.stub.$name(request)).await;
            let answers = answers.map_err(|_| ClientError::Late(wait))?.map_err(ClientError::Failed)?;
            Ok(Answers(answers.into_inner()))
        }
    };
}

impl Client {
    /// Connects, on the current runtime. `wait` is the deadline of each call that has one answer.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub async fn connect(address: SocketAddr, wait: Duration) -> Result<Client, ClientError> {
        let failed = |source| ClientError::Connect { address, source };
        let connecting = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let mut builder = http2::Builder::new(SameRuntime);
            builder.timer(TokioTimer::new());
            builder.keep_alive_interval(KEEP_ALIVE_INTERVAL);
            builder.keep_alive_timeout(KEEP_ALIVE_WAIT);
            builder.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)
        };
        let connected = timeout(CONNECT_WAIT, connecting).await;
        let (requests, connection) = connected
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed)?;
        // Its end is told to the calls; it ends when the last handle on it is dropped.
        tokio::spawn(connection);
        let origin = Uri::builder()
            .scheme("http")
            .authority(address.to_string())
            .path_and_query("/");
        let origin = origin.build().map_err(|error| failed(io::Error::other(error)))?;
        let stub = AdminClient::with_origin(Connection { requests }, origin);
        Ok(Client {
            stub: stub.max_decoding_message_size(ANSWER_BYTES_MAX),
            wait,
        })
    }

    call!(
        /// What the gateway counts.
        stats, StatsRequest, StatsResponse
    );
    call!(
        /// Drops cached copies.
        invalidate, InvalidateRequest, InvalidateResponse
    );
    stream!(
        /// Loads records into the caches.
        warm, WarmRequest, WarmResponse
    );
    call!(
        /// The settings of namespaces.
        namespaces, NamespacesRequest, NamespacesResponse
    );
    call!(
        /// What is pending, and what the drain does.
        queue, QueueRequest, QueueResponse
    );
    call!(
        /// Stops the drain of a namespace.
        pause, PauseRequest, PauseResponse
    );
    call!(
        /// Lets it go on.
        resume, ResumeRequest, ResumeResponse
    );
    call!(
        /// Drains at once.
        flush, FlushRequest, FlushResponse
    );
    call!(
        /// A page of the dead letters.
        list_dead_letters, ListDeadLettersRequest, ListDeadLettersResponse
    );
    stream!(
        /// Offers dead letters to the store again.
        retry_dead_letters, RetryDeadLettersRequest, RetryDeadLettersResponse
    );
    call!(
        /// Deletes dead letters for good.
        discard_dead_letters, DiscardDeadLettersRequest, DiscardDeadLettersResponse
    );
    stream!(
        /// Dead letters with their values.
        export_dead_letters, ExportDeadLettersRequest, ExportDeadLettersResponse
    );
    call!(
        /// What is logged, after a change.
        log_level, LogLevelRequest, LogLevelResponse
    );
}

/// A request with its deadline.
fn within<T>(request: T, wait: Duration) -> TonicRequest<T> {
    let mut request = TonicRequest::new(request);
    request.set_timeout(wait);
    request
}

/// The answers of a call that has many. Dropping them ends the call.
#[derive(Debug)]
pub struct Answers<T>(Streaming<T>);

impl<T> Answers<T> {
    /// The next one; `None`: that was all.
    ///
    /// # Errors
    /// [`ClientError::Failed`].
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        self.0.message().await.map_err(ClientError::Failed)
    }
}

/// hyper's connection as tonic's clients want it.
#[derive(Debug, Clone)]
struct Connection {
    requests: http2::SendRequest<Body>,
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.requests.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.requests.send_request(request))
    }
}
