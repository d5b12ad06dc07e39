//! One client connection: HTTP/2 with bounds on everything a peer can make us hold.
//!
//! Owns the connection's protocol settings and its end, and that of a call whose client takes nothing of its answer any more. Does not own
//! accepting (`rpc/serve.rs`, `rpc/admin`) or calls (`rpc/router.rs`). Invariant: a connection that says nothing, or stops answering pings, is closed within a bound.

use std::{
    cell::Cell,
    convert::Infallible,
    future::poll_fn,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use http::{Request, Response};
use hyper::{body::Incoming, rt::Executor, server::conn::http2, service::Service};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpStream,
    sync::oneshot,
    task_local,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;

/// What an HTTP/2 client says first.
const PREFACE_BYTES: usize = 24;
/// How long it may take to say it.
const PREFACE_WAIT: Duration = Duration::from_secs(10);
/// Between looks at a preface that came in part, which no honest client sends.
const PREFACE_POLL: Duration = Duration::from_millis(50);
/// Flow control: one value of the default limit may be under way on a stream, and several on a connection.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
/// A gRPC request has a dozen short headers.
const HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;
/// After which silence a connection is asked whether it lives, and how long it has to answer.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_WAIT: Duration = Duration::from_secs(10);

/// Runs a connection's tasks where the connection runs: on its own runtime.
#[derive(Clone, Copy)]
pub(crate) struct SameRuntime;

impl<F> Executor<F> for SameRuntime
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        tokio::spawn(CUT.scope(Cell::new(None), until_cut(task)));
    }
}

task_local! {
    /// What the call of this task has left, to be cut off by.
    static CUT: Cell<Option<oneshot::Receiver<()>>>;
}

/// Cuts a call off: what is left of its answer is dropped, and its stream is reset. hyper asks an answer for no more while the client gives
/// no room for it, and so the answer itself cannot end.
#[derive(Debug)]
pub(crate) struct Cutter(oneshot::Sender<()>);

impl Cutter {
    /// The one of the call that this task serves, before its answer has begun.
    pub(crate) fn of_this_call() -> Cutter {
        let (cutter, cut) = oneshot::channel();
        // Outside of a call there is nothing to be cut off.
        let _ = CUT.try_with(|slot| slot.set(Some(cut)));
        Cutter(cutter)
    }

    /// Cuts it off, if it has not ended.
    pub(crate) fn cut(self) {
        let _ = self.0.send(());
    }
}

/// Runs a task of a connection to its end, or until it is cut off.
async fn until_cut(task: impl Future<Output: Send>) {
    let mut task = pin!(task);
    let mut cut = None;
    poll_fn(|context| {
        if task.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        // Left by the call while it was polled.
        cut = CUT.with(Cell::take).or_else(|| cut.take());
        let asked = cut.as_mut().map(|cut| Pin::new(cut).poll(context));
        match asked {
            Some(Poll::Ready(Ok(()))) => return Poll::Ready(()),
            // Nobody will.
            Some(Poll::Ready(Err(_))) => cut = None,
            Some(Poll::Pending) | None => {}
        }
        Poll::Pending
    })
    .await;
}

/// Serves a connection until it ends, or, once `stop` is cancelled, until its calls have been answered.
pub(crate) async fn serve<R>(stream: TcpStream, router: R, streams_max: u32, stop: CancellationToken)
where
    R: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible>,
    R::Future: Send + 'static,
{
    tokio::select! {
        opened = opened(&stream) => if !opened { return },
        () = stop.cancelled() => return,
    }
    let connection = http2::Builder::new(SameRuntime)
        .timer(TokioTimer::new())
        .max_concurrent_streams(streams_max)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_WAIT)
        .serve_connection(TokioIo::new(stream), router);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

/// Whether the client's preface arrived in time: hyper itself waits for it without end.
async fn opened(stream: &TcpStream) -> bool {
    let mut preface = [0; PREFACE_BYTES];
    let arrival = async {
        loop {
            match stream.peek(&mut preface).await {
                Ok(0) | Err(_) => return false,
                Ok(PREFACE_BYTES) => return true,
                Ok(_) => sleep(PREFACE_POLL).await,
            }
        }
    };
    timeout(PREFACE_WAIT, arrival).await.unwrap_or(false)
}
