//! The operations port: plain HTTP for orchestrators, Prometheus and people, on loopback unless configured.
//!
//! Owns `/metrics`, `/livez` and `/readyz`, and where the live page (`page`) and its numbers (`figures`) stand. Answers GET and HEAD
//! alone. Has no bound on connections of its own, which is a reason to keep it on loopback. Decides nothing: readiness is
//! [`crate::health`]'s. Runs on the background runtime, never on a serving thread.

pub mod figures;
mod page;

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::{FromRef, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::operations::figures::Figures;

/// The `[operations]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where metrics, probes and the live page are served. Default: 127.0.0.1:9464. Port 0 takes a free one.
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
    figures: Arc<Figures>,
}

impl FromRef<Sources> for Arc<Figures> {
    fn from_ref(sources: &Sources) -> Arc<Figures> {
        Arc::clone(&sources.figures)
    }
}

/// Serves until `stop`, on the current runtime.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    registry: Arc<Registry>,
    figures: Figures,
    stop: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route("/", get(page::page))
        .route("/page.js", get(page::script))
        .route("/page.css", get(page::style))
        .route("/figures", get(page::figures))
        .with_state(Sources {
            registry,
            figures: Arc::new(figures),
        });
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
    let readiness = sources.figures.health().readiness();
    let status = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, readiness.to_string())
}
