//! An API that both layers are put before: `api GATEWAY LISTEN`, as `api http://127.0.0.1:50051 127.0.0.1:8080`.
//!
//! `GET /reports/{name}` takes a while, and its answer may be kept for ten seconds: ask twice, and look at `cache-status`. Each client, told
//! apart by `x-api-key`, has twenty requests a minute.

use std::{env, error::Error, time::Duration};

use axum::{
    Router,
    extract::{Path, Request},
    http::header::CACHE_CONTROL,
    response::IntoResponse,
    routing::get,
};
use tidegate_examples::{connect, http_cache::HttpCache, rate_limit::RateLimit};
use tokio::{net::TcpListener, time::sleep};

async fn report(Path(name): Path<String>) -> impl IntoResponse {
    sleep(Duration::from_secs(1)).await;
    ([(CACHE_CONTROL, "max-age=10")], format!("a report about {name}\n"))
}

fn api_key(request: &Request) -> Option<String> {
    let key = request.headers().get("x-api-key").and_then(|key| key.to_str().ok());
    // Those who name none share one count.
    Some(key.unwrap_or("anonymous").to_owned())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [gateway, listen] = arguments.as_slice() else {
        return Err("usage: api GATEWAY LISTEN".into());
    };
    let channel = connect(gateway)?;
    let limit = RateLimit::new(channel.clone(), "rate-limits", 20, Duration::from_secs(60), api_key);
    let api = Router::new()
        .route("/reports/{name}", get(report))
        .layer(HttpCache::new(channel, "responses"))
        // The last layer is the outermost: what is refused does not reach the cache.
        .layer(limit);
    axum::serve(TcpListener::bind(listen).await?, api).await?;
    Ok(())
}
