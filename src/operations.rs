//! The operations port: plain HTTP for orchestrators and Prometheus, on loopback unless configured.
//!
//! Owns `/metrics`, `/livez` and `/readyz`. Has no bound on connections of its own, which is a reason to keep it on loopback. Decides nothing: readiness is [`crate::health`]'s. Runs on the background runtime, never on
//! a serving thread.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::health::Health;

/// The `[operations]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where metrics and probes are served. Default: 127.0.0.1:9464. Port 0 takes a free one.
    pub listen: SocketAddr,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 9464)),
        }
    }
}

/// How long a probe waits for the gateway that it asks.
const PROBE_WAIT: Duration = Duration::from_secs(3);

/// Asks the gateway whose operations port is at `address` whether it is ready. Blocks: for a command of its own.
///
/// # Errors
/// Nothing answers there.
pub fn probe(address: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, PROBE_WAIT)?;
    stream.set_read_timeout(Some(PROBE_WAIT))?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: tidegate\r\nconnection: close\r\n\r\n")?;
    let mut status = [0; b"HTTP/1.1 200".len()];
    stream.read_exact(&mut status)?;
    Ok(status.ends_with(b" 200"))
}

#[derive(Clone)]
struct Sources {
    registry: Arc<Registry>,
    health: Health,
}

/// Serves until `stop`, on the current runtime.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    registry: Arc<Registry>,
    health: Health,
    stop: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .with_state(Sources { registry, health });
    axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn metrics(State(sources): State<Sources>) -> impl IntoResponse {
    let mut text = String::new();
    match encode(&mut text, &sources.registry) {
        Ok(()) => {
            let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            Ok(([(CONTENT_TYPE, format)], text))
        }
        Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

async fn ready(State(sources): State<Sources>) -> impl IntoResponse {
    let readiness = sources.health.readiness();
    let status = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, readiness.to_string())
}
