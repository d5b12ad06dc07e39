//! The floor: a server of the same contract, on the same kind of threads, whose handlers do nothing.
//!
//! Owns nothing but what any server on these libraries has to pay: HTTP/2 (hyper over `h2`), the generated service of tonic with our codec, one
//! `current_thread` runtime for each core, connections dealt in turn. No deadlines, no counting, no bounds, no records. A Get is answered
//! with a value that was made at the start, a Put with a version. A role of the benchmark's binary: `floor VALUE_BYTES`.

use std::{
    net::{Ipv4Addr, TcpListener},
    pin::Pin,
    thread,
};

use futures_core::Stream;
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::TokioIo;
use tidegate::rpc::proto::{
    AwaitPersistedRequest, AwaitPersistedResponse, BatchGetRequest, BatchGetResponse, BatchWriteRequest,
    BatchWriteResponse, DeleteRequest, DeleteResponse, Durability, Entry, GetRequest, GetResponse, IncrementRequest,
    IncrementResponse, PutRequest, PutResponse, ScanRequest, ScanResponse, Source, TouchRequest, TouchResponse,
    WatchRequest, WatchResponse, WriteStreamRequest, WriteStreamResponse,
    gateway_server::{Gateway, GatewayServer},
};
use tokio::{net::TcpStream, runtime, sync::mpsc};
use tonic::{Request, Response, Status, Streaming, codegen::Service};

use crate::{Failure, calls};

/// What a version looks like today, so that answers have the length of the gateway's.
const VERSION: i64 = 1 << 57;
/// Connections on their way to one thread.
const HANDOVER_CONNECTIONS_MAX: usize = 128;
/// As the gateway's.
const STREAMS_MAX: u32 = 100;

/// Serves until it is killed; says on standard error where.
pub fn serve(value_bytes: usize) -> Result<(), Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    eprintln!("serving {}", listener.local_addr()?);
    let mut threads = Vec::new();
    for _ in 0..thread::available_parallelism()?.get() {
        let (sender, mut connections) = mpsc::channel::<std::net::TcpStream>(HANDOVER_CONNECTIONS_MAX);
        threads.push(sender);
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        thread::spawn(move || {
            runtime.block_on(async {
                let floor = GatewayServer::new(Floor::new(value_bytes));
                while let Some(stream) = connections.recv().await {
                    let Ok(stream) = TcpStream::from_std(stream) else {
                        continue;
                    };
                    let floor = floor.clone();
                    let connection = http2::Builder::new(SameRuntime)
                        .max_concurrent_streams(STREAMS_MAX)
                        .serve_connection(TokioIo::new(stream), service_fn(move |call| floor.clone().call(call)));
                    tokio::spawn(connection);
                }
            });
        });
    }
    for next in (0..threads.len()).cycle() {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        threads[next].blocking_send(stream)?;
    }
    Ok(())
}

/// Runs a connection's tasks on its own thread.
#[derive(Clone)]
struct SameRuntime;

impl<F> hyper::rt::Executor<F> for SameRuntime
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        tokio::spawn(task);
    }
}

/// The handlers that do nothing.
struct Floor {
    found: GetResponse,
}

impl Floor {
    fn new(value_bytes: usize) -> Floor {
        Floor {
            found: GetResponse {
                entry: Some(Entry {
                    value: calls::value(value_bytes),
                    version: VERSION,
                    ..Entry::default()
                }),
                source: Source::L1.into(),
                ..GetResponse::default()
            },
        }
    }
}

fn no_floor<T>() -> Result<T, Status> {
    Err(Status::unimplemented("the floor has no such method"))
}

#[tonic::async_trait]
impl Gateway for Floor {
    async fn get(&self, _: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        Ok(Response::new(self.found.clone()))
    }

    async fn put(&self, _: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        Ok(Response::new(PutResponse {
            version: VERSION,
            durability: Durability::Journal.into(),
            ..PutResponse::default()
        }))
    }

    async fn delete(&self, _: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        no_floor()
    }

    async fn batch_get(&self, _: Request<BatchGetRequest>) -> Result<Response<BatchGetResponse>, Status> {
        no_floor()
    }

    async fn batch_write(&self, _: Request<BatchWriteRequest>) -> Result<Response<BatchWriteResponse>, Status> {
        no_floor()
    }

    type WriteStreamStream = Pin<Box<dyn Stream<Item = Result<WriteStreamResponse, Status>> + Send>>;

    async fn write_stream(
        &self,
        _: Request<Streaming<WriteStreamRequest>>,
    ) -> Result<Response<Self::WriteStreamStream>, Status> {
        no_floor()
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        no_floor()
    }

    async fn scan(&self, _: Request<ScanRequest>) -> Result<Response<ScanResponse>, Status> {
        no_floor()
    }

    async fn touch(&self, _: Request<TouchRequest>) -> Result<Response<TouchResponse>, Status> {
        no_floor()
    }

    async fn increment(&self, _: Request<IncrementRequest>) -> Result<Response<IncrementResponse>, Status> {
        no_floor()
    }

    async fn await_persisted(
        &self,
        _: Request<AwaitPersistedRequest>,
    ) -> Result<Response<AwaitPersistedResponse>, Status> {
        no_floor()
    }
}
