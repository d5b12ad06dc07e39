//! One client connection: HTTP/2 with bounds on everything a peer can make us hold.
//!
//! Owns the connection's protocol settings and its end, and that of a call whose client takes nothing of its answer any more. Does not own
//! accepting (`rpc/serve.rs`, `rpc/admin`) or calls (`rpc/router.rs`). Invariant: a connection that says nothing, or stops answering pings, is closed within a bound.

use std::{
    cell::Cell,
    convert::Infallible,
    error::Error,
    future::poll_fn,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use hyper::{
    body::{Body, Incoming},
    rt::Executor,
    server::conn::http2,
    service::Service,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpStream,
    sync::oneshot,
    task_local,
    time::{Sleep, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// What an HTTP/2 client says first.
const PREFACE_BYTES: usize = 24;
/// How long it may take to say it.
const PREFACE_WAIT: Duration = Duration::from_secs(10);
/// Between looks at a preface that came in part, which no honest client sends.
const PREFACE_POLL: Duration = Duration::from_millis(50);
/// Flow control: what a client may send on one stream ahead of what was read of it. So much of each stream, and no more, is all of a
/// connection's bodies that waits unread.
///
/// It has to stop a client before h2 does. h2 closes the whole connection with ENHANCE_YOUR_CALM ("too_many_data_frames") when small frames
/// wait unread: one of `n` bytes below 256 takes `256 - n` from an account, which gets them back when the frame is read, or more when large
/// ones come; the account holds half of the connection's window, and only that can be set from here. A client that sends each message in a
/// frame of its own, as many do, is no attacker: whatever fits into the windows of all streams in the smallest writes has to fit the account.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// The smallest write in its frame: gRPC's prefix, and a deletion whose namespace and key have one character each.
const SMALLEST_WRITE_BYTES: u32 = 15;
/// Below which h2 takes a frame for a small one.
const SMALL_FRAME_BYTES: u32 = 256;
/// The largest window that HTTP/2 knows.
const WINDOW_BYTES_CEILING: u32 = (1 << 31) - 1;
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
        tokio::spawn(CALL.scope(Handle::default(), until_cut(task)));
    }
}

task_local! {
    /// What the call of this task has left.
    static CALL: Handle;
}

/// What a call tells the task that serves it.
#[derive(Default)]
struct Handle {
    /// To be cut off by.
    cut: Cell<Option<oneshot::Receiver<()>>>,
    /// Whom its answer waits for, where that is new.
    waits: Cell<Option<Waits>>,
}

/// Whom an answer waits for.
#[derive(Clone, Copy)]
pub(crate) enum Waits {
    /// For its client to take what there is, and no longer than this; then it is cut off.
    ForClient(Duration),
    /// For more of it to be made.
    ForUs,
}

impl Waits {
    /// Notes it for the call that this task serves: each time a part of its answer is handed out.
    pub(crate) fn note(self) {
        // Outside of a call nobody waits.
        let _ = CALL.try_with(|call| call.waits.set(Some(self)));
    }
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
        let _ = CALL.try_with(|call| call.cut.set(Some(cut)));
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
    // Made only for an answer that its client does not take at once.
    let mut unread: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|context| {
        if task.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        // Left by the call while it was polled.
        cut = CALL.with(|call| call.cut.take()).or_else(|| cut.take());
        let asked = cut.as_mut().map(|cut| Pin::new(cut).poll(context));
        match asked {
            Some(Poll::Ready(Ok(()))) => return Poll::Ready(()),
            // Nobody will.
            Some(Poll::Ready(Err(_))) => cut = None,
            Some(Poll::Pending) | None => {}
        }
        match CALL.with(|call| call.waits.take()) {
            Some(Waits::ForClient(max)) => unread = Some(Box::pin(sleep(max))),
            Some(Waits::ForUs) => unread = None,
            None => {}
        }
        match unread.as_mut().map(|unread| unread.as_mut().poll(context)) {
            Some(Poll::Ready(())) => {
                tracing::info!("cut off an answer: its client takes nothing of it");
                Poll::Ready(())
            }
            Some(Poll::Pending) | None => Poll::Pending,
        }
    })
    .await;
}

/// Serves a connection until it ends, or, once `stop` is cancelled, until its calls have been answered.
pub(crate) async fn serve<R, B>(stream: TcpStream, router: R, streams_max: u32, stop: CancellationToken)
where
    R: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    R::Future: Send + 'static,
    B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    tokio::select! {
        opened = opened(&stream) => if !opened { return },
        () = stop.cancelled() => return,
    }
    let connection = http2::Builder::new(SameRuntime)
        .timer(TokioTimer::new())
        .max_concurrent_streams(streams_max)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(connection_window(streams_max))
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_WAIT)
        // gRPC wants none, and one that changes each second fills the tables of header compression.
        .auto_date_header(false)
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

/// The window of a connection, for the sake of h2's account: what waits unread is bounded by its streams' windows, far below this. So many
/// streams that this is more than HTTP/2 allows, over 900, are safe unless most of them pour the smallest writes at once.
fn connection_window(streams_max: u32) -> u32 {
    let frames = STREAM_WINDOW_BYTES.div_ceil(SMALLEST_WRITE_BYTES);
    let account = streams_max
        .saturating_mul(frames)
        .saturating_mul(SMALL_FRAME_BYTES - SMALLEST_WRITE_BYTES);
    account.saturating_mul(2).min(WINDOW_BYTES_CEILING)
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
