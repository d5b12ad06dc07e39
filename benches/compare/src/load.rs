//! The load generator: calls encoded beforehand, sent over HTTP/2 by the `h2` crate, each answer checked.
//!
//! Owns connections, streams and pace: as many calls under way as there are streams (closed), or a fixed rate whatever the server does
//! (open), where a call's latency counts from the moment it was due, not from when it was sent. Does not own what the calls say (`calls`).
//! Every gRPC contestant and the floor are driven by this one, on the same threads, so that its own cost is the same part of each figure.
//! Invariants: an answer counts only with `grpc-status` 0 and as many bytes as are expected at least; any other ends the measurement.

use std::{net::SocketAddr, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use h2::client::{self, SendRequest};
use hdrhistogram::Histogram;
use http::{HeaderMap, HeaderValue, Request, header};
use tokio::{
    net::TcpStream,
    runtime,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    Failure,
    calls::{Calls, Picks},
};

/// The generator's threads, each a `current_thread` runtime: as many as the machine of the bars has cores.
const THREADS: usize = 2;
/// What is due is sent once in so long, all at once: the finest step of the runtime's clock.
const TICK: Duration = Duration::from_millis(1);
/// No answer takes longer, nor does a connection.
const ANSWER_WAIT: Duration = Duration::from_secs(30);
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// How many connections, and how many calls at a time on each.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub connections: usize,
    pub streams: usize,
}

impl Shape {
    pub fn concurrency(self) -> usize {
        self.connections * self.streams
    }
}

/// What a closed loop measured.
#[derive(Debug, Clone, Copy)]
pub struct Throughput {
    pub calls: u64,
    pub elapsed: Duration,
}

impl Throughput {
    pub fn per_second(self) -> f64 {
        self.calls as f64 / self.elapsed.as_secs_f64()
    }
}

/// Keeps every stream busy for as long as `how_long`.
pub async fn closed(
    server: SocketAddr,
    calls: &Arc<Calls>,
    shape: Shape,
    how_long: Duration,
) -> Result<Throughput, Failure> {
    let begun = Instant::now();
    let counts = on_threads(calls, shape, move |calls, share| async move {
        let mut streams = JoinSet::new();
        let mut place = share.thread;
        for _ in 0..share.connections {
            let connection = connect(server).await?;
            for _ in 0..shape.streams {
                let picks = calls.picks(place);
                place += THREADS;
                streams.spawn(one_after_the_other(
                    connection.clone(),
                    Arc::clone(&calls),
                    picks,
                    begun + how_long,
                ));
            }
        }
        let mut count = 0;
        while let Some(answered) = streams.join_next().await {
            count += answered??;
        }
        Ok(count)
    })
    .await?;
    Ok(Throughput {
        calls: counts.into_iter().sum(),
        elapsed: begun.elapsed(),
    })
}

/// Sends each of the calls once, and waits for all answers.
pub async fn each_once(server: SocketAddr, calls: &Arc<Calls>, shape: Shape) -> Result<(), Failure> {
    let count = calls.len();
    on_threads(calls, shape, move |calls, share| async move {
        let mut streams = JoinSet::new();
        let stride = THREADS * share.connections * shape.streams;
        let mut place = share.thread;
        for _ in 0..share.connections {
            let connection = connect(server).await?;
            for _ in 0..shape.streams {
                let (connection, calls, first) = (connection.clone(), Arc::clone(&calls), place);
                place += THREADS;
                streams.spawn(async move {
                    for index in (first..count).step_by(stride) {
                        call(&connection, &calls, index).await?;
                    }
                    Ok::<_, Failure>(())
                });
            }
        }
        while let Some(sent) = streams.join_next().await {
            sent??;
        }
        Ok(())
    })
    .await?;
    Ok(())
}

/// Sends `rate` calls a second, due evenly, and gives their latencies in microseconds.
pub async fn open(
    server: SocketAddr,
    calls: &Arc<Calls>,
    shape: Shape,
    rate: f64,
    how_long: Duration,
) -> Result<Histogram<u64>, Failure> {
    let histograms = on_threads(calls, shape, move |calls, share| async move {
        let mut connections = Vec::new();
        for _ in 0..share.connections {
            connections.push(connect(server).await?);
        }
        at_a_rate(&connections, &calls, share.thread, rate / THREADS as f64, how_long).await
    })
    .await?;
    let mut all = Histogram::new(3)?;
    for histogram in histograms {
        all.add(histogram)?;
    }
    Ok(all)
}

/// Opens connections that say nothing any more, and keeps them for as long as the result lives.
pub async fn idle(server: SocketAddr, connections: usize) -> Result<Vec<Connection>, Failure> {
    let mut open = Vec::with_capacity(connections);
    for _ in 0..connections {
        open.push(connect(server).await?);
    }
    Ok(open)
}

/// The part of a shape that one thread has.
#[derive(Clone, Copy)]
struct Share {
    thread: usize,
    connections: usize,
}

/// Runs `work` on each of the generator's threads, with its share of the connections and calls of its own: their bytes are counted by
/// reference, and threads that share a count slow each other.
async fn on_threads<T, F, W>(calls: &Arc<Calls>, shape: Shape, work: W) -> Result<Vec<T>, Failure>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Failure>>,
    W: Fn(Arc<Calls>, Share) -> F + Clone + Send + 'static,
{
    let mut threads = Vec::new();
    for thread in 0..THREADS {
        let share = Share {
            thread,
            connections: (shape.connections + THREADS - 1 - thread) / THREADS,
        };
        let (calls, work) = (calls.on_thread(thread), work.clone());
        threads.push(thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(work(calls, share))
        }));
    }
    // Whoever waits here is no thread of the generator.
    tokio::task::spawn_blocking(move || {
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a thread of the generator panicked")?);
        joined.collect()
    })
    .await?
}

/// A connection, and the task that drives it: gone with its last clone.
pub type Connection = SendRequest<Bytes>;

async fn connect(server: SocketAddr) -> Result<Connection, Failure> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = client::Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .handshake(stream)
        .await?;
    tokio::spawn(async move {
        // Its calls say so too.
        let _ = connection.await;
    });
    Ok(sender)
}

/// How many calls were answered before `end`.
async fn one_after_the_other(
    connection: Connection,
    calls: Arc<Calls>,
    mut picks: Picks,
    end: Instant,
) -> Result<u64, Failure> {
    let mut answered = 0;
    while Instant::now() < end {
        call(&connection, &calls, picks.pick()).await?;
        answered += 1;
    }
    Ok(answered)
}

async fn at_a_rate(
    connections: &[Connection],
    calls: &Arc<Calls>,
    place: usize,
    rate: f64,
    how_long: Duration,
) -> Result<Histogram<u64>, Failure> {
    let mut latencies = Histogram::new(3)?;
    let mut under_way = JoinSet::new();
    let mut picks = calls.picks(place);
    let mut ticks = interval(TICK);
    // A tick that comes late is still due when it was.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let begun = ticks.tick().await;
    let mut sent = 0;
    loop {
        let due = ticks.tick().await;
        if due - begun > how_long {
            break;
        }
        let owed = ((due - begun).as_secs_f64() * rate) as usize;
        while sent < owed {
            let connection = connections[sent % connections.len()].clone();
            let (calls, index) = (Arc::clone(calls), picks.pick());
            under_way.spawn(async move {
                call(&connection, &calls, index).await?;
                Ok::<_, Failure>(due.elapsed())
            });
            sent += 1;
        }
        while let Some(answered) = under_way.try_join_next() {
            latencies.record(answered??.as_micros() as u64)?;
        }
    }
    while let Some(answered) = under_way.join_next().await {
        latencies.record(answered??.as_micros() as u64)?;
    }
    Ok(latencies)
}

/// One call: sent, awaited and checked.
async fn call(connection: &Connection, calls: &Calls, index: usize) -> Result<(), Failure> {
    let mut connection = connection.clone().ready().await?;
    let mut request = Request::post(calls.uri.clone()).body(())?;
    let headers = request.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    let (answer, mut body) = connection.send_request(request, false)?;
    body.send_data(calls.body(index), true)?;
    let (head, mut body) = answer.await?.into_parts();
    if head.status != http::StatusCode::OK {
        return Err(format!("HTTP status {}", head.status).into());
    }
    let mut bytes = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        bytes += data.len();
        body.flow_control().release_capacity(data.len())?;
    }
    let trailers = body.trailers().await?;
    check_status(trailers.as_ref().unwrap_or(&head.headers))?;
    if bytes < calls.answer_bytes_min {
        return Err(format!(
            "an answer of {bytes} bytes, where at least {} are due",
            calls.answer_bytes_min
        )
        .into());
    }
    Ok(())
}

fn check_status(headers: &HeaderMap) -> Result<(), Failure> {
    let text = |name: &str| headers.get(name).map_or("none", |value| value.to_str().unwrap_or("?"));
    match text("grpc-status") {
        "0" => Ok(()),
        other => Err(format!("grpc-status {other}: {}", text("grpc-message")).into()),
    }
}

/// Waits until a server answers one call.
pub async fn answers(server: SocketAddr, calls: &Arc<Calls>) -> Result<(), Failure> {
    let one = async { call(&connect(server).await?, calls, 0).await };
    timeout(ANSWER_WAIT, one).await?
}
