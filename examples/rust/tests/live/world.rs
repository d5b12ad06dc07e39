//! What the tests run against: gateways, services, and those who ask them.
//!
//! Owns their starts, and one request at a time over a connection of its own. Owns no expectation.

use std::{net::SocketAddr, sync::LazyLock, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
};
use http::{HeaderMap, Request, StatusCode};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tidegate::{
    config::Config,
    start::{Ending, Running},
    telemetry::log::Log,
};
use tidegate_examples::connect;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::AbortHandle,
    time::{Instant, sleep},
};
use tonic::transport::Channel;

/// How long anything may take that should take a moment: generous, for the machine may be busy with something else.
pub const SOON: Duration = Duration::from_secs(30);

/// A gateway with the embedded store, in a temporary directory.
pub struct Gateway {
    running: Running,
    config: Config,
    _directory: TempDir,
}

/// What the gateways of these tests log, all of them in one process: it can be started once.
fn log() -> Log {
    static LOG: LazyLock<Log> = LazyLock::new(|| Log::start("warn").unwrap());
    LOG.clone()
}

impl Gateway {
    pub async fn start() -> Gateway {
        let directory = tempfile::tempdir().unwrap();
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut config = Config {
            listen: free,
            data_dir: directory.path().join("data"),
            ..Config::default()
        };
        config.operations.listen = free;
        config.admin.listen = free;
        // Smaller files than the default's are made sooner.
        config.journal.segment_bytes = 16 * 1024 * 1024;
        Gateway {
            running: Running::start(&config, log()).await.unwrap(),
            config,
            _directory: directory,
        }
    }

    /// A channel of a replica's own.
    pub fn channel(&self) -> Channel {
        connect(&format!("http://{}", self.running.server.address())).unwrap()
    }

    /// Stops it. Its port stays taken, so that nobody else answers there.
    pub async fn stop(self) -> Nowhere {
        let address = self.running.server.address();
        let ending = self.running.stop(&self.config.shutdown).await;
        assert_eq!(ending, Ending::Clean);
        Nowhere::at(address)
    }
}

/// A port that is taken, and at which nobody listens, for as long as this is held.
pub struct Nowhere {
    address: SocketAddr,
    _socket: TcpSocket,
}

impl Nowhere {
    /// A free port.
    pub fn new() -> Nowhere {
        Nowhere::at(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    fn at(address: SocketAddr) -> Nowhere {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        Nowhere {
            address: socket.local_addr().unwrap(),
            _socket: socket,
        }
    }

    pub fn channel(&self) -> Channel {
        connect(&format!("http://{}", self.address)).unwrap()
    }
}

/// A service that listens. Dropping it ends it.
pub struct Api {
    address: SocketAddr,
    serving: AbortHandle,
}

impl Drop for Api {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    /// A header, or nothing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Api {
    pub async fn serve(router: Router) -> Api {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Api {
            address,
            serving: serving.abort_handle(),
        }
    }

    /// Asks with a method for a path, with headers. The host is the same whatever the address.
    pub async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "api.example");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = sender.send_request(request.body(Body::empty()).unwrap()).await.unwrap();
        let (head, body) = answer.into_parts();
        let body = to_bytes(Body::new(body), 64 * 1024 * 1024).await.unwrap();
        connection.abort();
        Answer {
            status: head.status,
            headers: head.headers,
            body: String::from_utf8(body.into()).unwrap(),
        }
    }

    /// Gets a path.
    pub async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[]).await
    }
}

/// Tries until an attempt succeeds, and gives its result.
///
/// # Panics
/// After [`SOON`], with what was waited for and what was seen last.
pub async fn eventually<T>(what: &str, mut attempt: impl AsyncFnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + SOON;
    loop {
        match attempt().await {
            Ok(result) => return result,
            Err(seen) if Instant::now() >= end => panic!("not within {SOON:?}: {what}; last seen: {seen}"),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}
