//! The pattern that services use without a gateway: a plain tonic service that reads cache-aside from Redis and writes each record by itself.
//!
//! Owns the service as a competent engineer writes it in an afternoon: tonic's own server on Tokio's default runtime, one shared connection to
//! Redis, a pool of ten to PostgreSQL with the defaults of sqlx, prepared statements. A role of the benchmark's binary: `plain REDIS_URL
//! POSTGRES_URL`. Its table is its own. What it does not promise, it does not pay for: a write that fails between the store and the
//! cache, or that a slow reader overtakes, leaves a stale copy for up to five minutes.

use std::{net::Ipv4Addr, pin::Pin};

use bytes::Bytes;
use futures_core::Stream;
use prost::Message;
use redis::{AsyncCommands, aio::MultiplexedConnection};
use sqlx::{PgPool, postgres::PgPoolOptions, query, query_as, query_scalar};
use tidegate::rpc::proto::{
    AwaitPersistedRequest, AwaitPersistedResponse, BatchGetRequest, BatchGetResponse, BatchWriteRequest,
    BatchWriteResponse, DeleteRequest, DeleteResponse, Durability, Entry, GetRequest, GetResponse, IncrementRequest,
    IncrementResponse, PutRequest, PutResponse, ScanRequest, ScanResponse, Source, TouchRequest, TouchResponse,
    WatchRequest, WatchResponse, WriteStreamRequest, WriteStreamResponse,
    gateway_server::{Gateway, GatewayServer},
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

use crate::Failure;

/// The default of sqlx.
const STORE_CONNECTIONS: u32 = 10;

const CACHE_SECONDS: u64 = 300;

const TABLE: &str = "
    create table if not exists plain_records (
        namespace text not null,
        key       text not null,
        value     bytea not null,
        version   bigint not null default 1,
        primary key (namespace, key)
    )";

const SELECT: &str = "select value, version from plain_records where namespace = $1 and key = $2";

const UPSERT: &str = "
    insert into plain_records as stored (namespace, key, value) values ($1, $2, $3)
    on conflict (namespace, key) do update set value = excluded.value, version = stored.version + 1
    returning version";

/// Serves until it is killed; says on standard error where. To be run on Tokio's multi-threaded runtime.
pub async fn serve(redis_url: &str, postgres_url: &str) -> Result<(), Failure> {
    let cache = redis::Client::open(redis_url)?
        .get_multiplexed_async_connection()
        .await?;
    let store = PgPoolOptions::new()
        .max_connections(STORE_CONNECTIONS)
        .connect(postgres_url)
        .await?;
    query(TABLE).execute(&store).await?;
    // As tonic's own `serve` binds; only that here the port is told.
    let incoming = TcpIncoming::bind((Ipv4Addr::LOCALHOST, 0).into())?.with_nodelay(Some(true));
    eprintln!("serving {}", incoming.local_addr()?);
    Server::builder()
        .add_service(GatewayServer::new(Plain { cache, store }))
        .serve_with_incoming(incoming)
        .await?;
    Ok(())
}

struct Plain {
    cache: MultiplexedConnection,
    store: PgPool,
}

fn slot(namespace: &str, key: &str) -> String {
    format!("plain:{namespace}:{key}")
}

fn cache_failed(error: redis::RedisError) -> Status {
    Status::unavailable(format!("the cache: {error}"))
}

fn store_failed(error: sqlx::Error) -> Status {
    Status::unavailable(format!("the store: {error}"))
}

fn found(entry: Entry, source: Source) -> GetResponse {
    GetResponse {
        entry: Some(entry),
        source: source.into(),
        ..GetResponse::default()
    }
}

fn not_written<T>() -> Result<T, Status> {
    Err(Status::unimplemented("the afternoon was over"))
}

#[tonic::async_trait]
impl Gateway for Plain {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let GetRequest { namespace, key, .. } = request.into_inner();
        let (mut cache, slot) = (self.cache.clone(), slot(&namespace, &key));
        let copy: Option<Vec<u8>> = cache.get(&slot).await.map_err(cache_failed)?;
        if let Some(copy) = copy {
            let entry = Entry::decode(Bytes::from(copy)).map_err(|error| Status::internal(error.to_string()))?;
            return Ok(Response::new(found(entry, Source::L2)));
        }
        let row: Option<(Vec<u8>, i64)> = query_as(SELECT)
            .bind(&namespace)
            .bind(&key)
            .fetch_optional(&self.store)
            .await
            .map_err(store_failed)?;
        let Some((value, version)) = row else {
            return Ok(Response::new(GetResponse {
                source: Source::Store.into(),
                ..GetResponse::default()
            }));
        };
        let entry = Entry {
            value: value.into(),
            version,
            expire_time: None,
        };
        let copied = cache.set_ex(&slot, entry.encode_to_vec(), CACHE_SECONDS).await;
        let () = copied.map_err(cache_failed)?;
        Ok(Response::new(found(entry, Source::Store)))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let PutRequest {
            namespace, key, value, ..
        } = request.into_inner();
        let version = query_scalar(UPSERT)
            .bind(&namespace)
            .bind(&key)
            .bind(value.as_ref())
            .fetch_one(&self.store)
            .await
            .map_err(store_failed)?;
        let dropped = self.cache.clone().del(slot(&namespace, &key)).await;
        let () = dropped.map_err(cache_failed)?;
        Ok(Response::new(PutResponse {
            version,
            durability: Durability::Store.into(),
            ..PutResponse::default()
        }))
    }

    async fn delete(&self, _: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        not_written()
    }

    async fn batch_get(&self, _: Request<BatchGetRequest>) -> Result<Response<BatchGetResponse>, Status> {
        not_written()
    }

    async fn batch_write(&self, _: Request<BatchWriteRequest>) -> Result<Response<BatchWriteResponse>, Status> {
        not_written()
    }

    type WriteStreamStream = Pin<Box<dyn Stream<Item = Result<WriteStreamResponse, Status>> + Send>>;

    async fn write_stream(
        &self,
        _: Request<Streaming<WriteStreamRequest>>,
    ) -> Result<Response<Self::WriteStreamStream>, Status> {
        not_written()
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        not_written()
    }

    async fn scan(&self, _: Request<ScanRequest>) -> Result<Response<ScanResponse>, Status> {
        not_written()
    }

    async fn touch(&self, _: Request<TouchRequest>) -> Result<Response<TouchResponse>, Status> {
        not_written()
    }

    async fn increment(&self, _: Request<IncrementRequest>) -> Result<Response<IncrementResponse>, Status> {
        not_written()
    }

    async fn await_persisted(
        &self,
        _: Request<AwaitPersistedRequest>,
    ) -> Result<Response<AwaitPersistedResponse>, Status> {
        not_written()
    }
}
