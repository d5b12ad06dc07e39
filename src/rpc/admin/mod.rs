//! The operators' port: `tidegate.v1.Admin`, health and reflection, on an address of its own.
//!
//! Owns its socket, its bounds, and the way from a path to a service. Runs on the background runtime, never on a serving thread, for its
//! calls may take long and must not delay a read. Does not own a connection's protocol (`rpc/connection.rs`). In the order of a call:
//! this, `service` (the methods), `told` (those that tell one thing after another), `convert` (validation, answers); [`client`] is the other
//! side, for our own commands. Invariant: no more than 16 connections of 16 calls each are open.

pub mod client;
mod convert;
mod service;
mod told;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, codegen::Service};
use tonic_health::{
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};

use self::service::AdminService;
use crate::{
    gateway::Gateway,
    rpc::{
        arrival::Arrival,
        connection,
        proto::admin_server::AdminServer,
        reflection::Reflection,
        router::{TonicCall, answer, not_grpc, own_status, unimplemented},
        serve::{ACCEPT_REST, FLUSH_WAIT, HEALTH_MESSAGE_BYTES_MAX},
        service::Deadlines,
    },
    telemetry::{calls::CallMetrics, log::Log},
};

/// How many connections may be open: operators are few.
const CONNECTIONS_MAX: usize = 16;

/// How many calls may run at a time on one connection.
const STREAMS_MAX: u32 = 16;

/// The largest request: as many of the longest keys as a request may name, twice over.
const MESSAGE_BYTES_MAX: usize = 2 * 1024 * 1024;

/// The deadline of a call that brings none, and the time in which every request has to arrive.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(60);

/// The longest deadline.
const DEADLINE_MAX: Duration = Duration::from_secs(24 * 3600);

/// The `[admin]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where `tidegate.v1.Admin` is served. Default: 127.0.0.1:9465. Port 0 takes a free one. Whoever reaches it may make
    /// every gateway ask the store again, so keep it on loopback or on a network of operators.
    pub listen: SocketAddr,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 9465)),
        }
    }
}

/// Whom operators' questions go to.
#[derive(Clone)]
pub struct Asked {
    gateway: Gateway,
    calls: CallMetrics,
    log: Log,
}

impl Asked {
    /// A gateway of the background runtime, what all threads count, and what is logged.
    pub fn new(gateway: Gateway, calls: CallMetrics, log: Log) -> Asked {
        Asked { gateway, calls, log }
    }
}

/// The port's services.
#[derive(Clone)]
pub struct Admin {
    admin: AdminServer<AdminService>,
    health: HealthServer<HealthService>,
    reflection: Option<Reflection>,
    stop: CancellationToken,
}

impl Admin {
    /// The services, until `stop`.
    ///
    /// # Errors
    /// The descriptors of the contract are broken.
    pub fn new(asked: Asked, health: &HealthReporter, reflection: bool, stop: CancellationToken) -> io::Result<Admin> {
        let reflection = reflection.then(|| Reflection::of("tidegate.v1.Admin")).transpose()?;
        Ok(Admin {
            admin: AdminServer::new(AdminService::new(asked, stop.clone()))
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(usize::MAX),
            health: HealthServer::new(HealthService::from_health_reporter(health.clone()))
                .max_decoding_message_size(HEALTH_MESSAGE_BYTES_MAX),
            reflection,
            stop,
        })
    }

    /// Serves until it is to stop; then the calls under way have a moment to end.
    pub async fn serve(self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            let stream = tokio::select! {
                accepted = accept(&listener) => accepted,
                () = self.stop.cancelled() => break,
            };
            while connections.try_join_next().is_some() {}
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                tracing::warn!(
                    CONNECTIONS_MAX,
                    "refused a connection of an operator: as many are open as may"
                );
                continue;
            };
            let serve = connection::serve(stream, self.clone(), STREAMS_MAX, self.stop.clone());
            connections.spawn(async move {
                serve.await;
                drop(place);
            });
        }
        // Whatever does not end is cut off: nothing of it is lost that cannot be asked for again.
        let _ = timeout(FLUSH_WAIT, async { while connections.join_next().await.is_some() {} }).await;
    }

    fn route(&self, mut request: Request<Incoming>) -> TonicCall {
        if let Some(refusal) = not_grpc(&request) {
            return Box::pin(std::future::ready(refusal));
        }
        let Some((service, _)) = request
            .uri()
            .path()
            .strip_prefix('/')
            .and_then(|path| path.split_once('/'))
        else {
            return unimplemented();
        };
        if let Some(reflection) = self.reflection.as_ref().and_then(|services| services.named(service)) {
            return reflection(request);
        }
        let is_admin = match service {
            "tidegate.v1.Admin" => true,
            "grpc.health.v1.Health" => false,
            _ => return unimplemented(),
        };
        let deadlines = match request.uri().path() {
            "/tidegate.v1.Admin/Warm"
            | "/tidegate.v1.Admin/RetryDeadLetters"
            | "/tidegate.v1.Admin/ExportDeadLetters" => &UNHURRIED,
            _ => &DEADLINES,
        };
        let arrived = Instant::now();
        let deadline = deadlines.deadline(request.headers(), arrived);
        request.extensions_mut().insert(Deadline(deadline));
        let arrives_by = deadline.min(arrived + DEADLINE_DEFAULT);
        let request = request.map(|body| Arrival::new(body, Some(arrives_by)));
        if is_admin {
            answer(self.admin.clone().call(request))
        } else {
            answer(self.health.clone().call(request))
        }
    }
}

/// A call's deadline, which the router leaves with the request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(pub(super) Instant);

const DEADLINES: Deadlines = Deadlines {
    default: DEADLINE_DEFAULT,
    max: DEADLINE_MAX,
};

/// The same of a call that takes as long as it takes.
const UNHURRIED: Deadlines = Deadlines {
    default: DEADLINE_MAX,
    max: DEADLINE_MAX,
};

impl hyper::service::Service<Request<Incoming>> for Admin {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn call(&self, request: Request<Incoming>) -> Answering {
        Answering(self.route(request))
    }
}

/// A call whose failures are put into our own words.
pub struct Answering(TonicCall);

impl Future for Answering {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answered = self.0.as_mut().poll(context);
        answered.map(|response| Ok(own_status(response, MESSAGE_BYTES_MAX)))
    }
}

/// The next connection. Rests after an error that is the machine's.
async fn accept(listener: &TcpListener) -> TcpStream {
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without it answers are late, and no less right.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) => {
                // Once, not for each try.
                if !failing {
                    tracing::warn!(%error, "cannot accept connections of operators");
                }
                failing = true;
                sleep(ACCEPT_REST).await;
            }
        }
    }
}
