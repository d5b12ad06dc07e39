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
use tonic::{Status, body::Body, codegen::Service};

use crate::rpc::{
    connection::SameRuntime,
    proto::{StatsRequest, StatsResponse, admin_client::AdminClient},
};

/// How long the gateway may take to accept a connection.
const CONNECT_WAIT: Duration = Duration::from_secs(3);

/// How long a call may take.
const CALL_WAIT: Duration = Duration::from_secs(10);

/// The largest answer: a thousand namespaces take a third of a megabyte.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

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
    #[error("the gateway did not answer in {} seconds", CALL_WAIT.as_secs())]
    Late,
}

/// A connection to a gateway's operators' port.
#[derive(Debug)]
pub struct Client {
    stub: AdminClient<Connection>,
}

impl Client {
    /// Connects, on the current runtime.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub async fn connect(address: SocketAddr) -> Result<Client, ClientError> {
        let failed = |source| ClientError::Connect { address, source };
        let connecting = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let builder = http2::Builder::new(SameRuntime).timer(TokioTimer::new()).clone();
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
        })
    }

    /// What the gateway counts, of one namespace or (empty) of all.
    ///
    /// # Errors
    /// [`ClientError::Failed`], [`ClientError::Late`].
    pub async fn stats(&mut self, namespace: &str) -> Result<StatsResponse, ClientError> {
        let request = StatsRequest {
            namespace: namespace.to_owned(),
        };
        let answer = timeout(CALL_WAIT, self.stub.stats(request)).await;
        let answer = answer.map_err(|_| ClientError::Late)?.map_err(ClientError::Failed)?;
        Ok(answer.into_inner())
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
