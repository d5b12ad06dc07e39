//! The stream of writes: many under way together, answered in the order in which they came.
//!
//! Owns how much of a stream is read, and when: up to [`UNDER_WAY_MAX`] writes and [`UNDER_WAY_BYTES_MAX`], while its answers are taken; what
//! is not read here the client cannot send, by HTTP/2's own flow control. Owns how a stream ends. Does not own what a write is (`convert`,
//! [`crate::gateway`]).
//!
//! Invariants: of two writes of a key the later begins once the earlier has its outcome; an answer is told after all before it; a stream
//! that sends nothing whole, or takes nothing, ends within a bound, and leaves nothing behind.
//!
//! Cancellation: each stream is a task of its own, which ends when the client is gone. What it then drops are the waits: a write that was
//! admitted goes on, one that was not has changed nothing.

use std::{
    collections::{HashSet, VecDeque},
    convert::Infallible,
    future::{Ready, ready},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::stream::{FuturesUnordered, StreamExt};
use prost::Message;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, Sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, codegen::tokio_stream::Stream, server::StreamingService};

use crate::{
    error::{Error, ErrorKind},
    gateway::{Gateway, WriteRequest, Written},
    model::Key,
    rpc::{
        connection::Cutter,
        convert::{self, violate},
        proto::{WriteResult, WriteStreamRequest, WriteStreamResponse},
        router::unread,
        service::{CallLimits, GatewayService, shutting_down, write_while_running},
        status::to_status,
    },
};

/// Writes of a stream that were read and are not answered yet.
const UNDER_WAY_MAX: usize = 256;

/// The bytes of those that have no outcome yet: nothing more is read once this is reached.
const UNDER_WAY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Answers on their way from the stream's task to its connection.
const ANSWERS_MAX: usize = 64;

/// How long the connection has to take why a stream was lost, which its client may never read.
const LOST_WAIT: Duration = Duration::from_secs(10);

/// The answers of a stream, and then its end.
pub(crate) struct Answers {
    answers: mpsc::Receiver<WriteStreamResponse>,
    end: Option<oneshot::Receiver<Result<(), Status>>>,
    /// Dropped with this, which tells the task that nobody waits any more.
    _heard: oneshot::Sender<Infallible>,
}

impl Stream for Answers {
    type Item = Result<WriteStreamResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let answer = self.answers.poll_recv(context);
        if !matches!(answer, Poll::Ready(None)) {
            return answer.map(|answer| answer.map(Ok));
        }
        let Some(end) = self.end.as_mut() else {
            return Poll::Ready(None);
        };
        Pin::new(end).poll(context).map(|end| {
            self.end = None;
            let end = end.unwrap_or_else(|_| Err(to_status(cut_short())));
            end.err().map(Err)
        })
    }
}

/// The method of the stream: its writes, until its client's deadline.
pub(crate) struct Writing {
    service: Arc<GatewayService>,
    deadline: Option<Instant>,
}

impl Writing {
    pub(crate) fn new(service: Arc<GatewayService>, deadline: Option<Instant>) -> Writing {
        Writing { service, deadline }
    }
}

impl StreamingService<WriteStreamRequest> for Writing {
    type Response = WriteStreamResponse;
    type ResponseStream = Answers;
    type Future = Ready<Result<Response<Answers>, Status>>;

    fn call(&mut self, request: Request<Streaming<WriteStreamRequest>>) -> Self::Future {
        let GatewayService { gateway, limits, stop } = &*self.service;
        let writes = Writes::new(gateway.clone(), *limits, self.deadline, stop.clone());
        ready(Ok(Response::new(writes.start(request.into_inner()))))
    }
}

type Outcome = Pin<Box<dyn Future<Output = (u64, Result<Written, Error>)> + Send>>;

/// The writes of one stream.
struct Writes {
    gateway: Gateway,
    limits: CallLimits,
    /// Tells that the gateway shuts down.
    stop: CancellationToken,
    /// Until when the stream may last.
    deadline: Option<Instant>,
    /// What was read and not answered, in order.
    places: VecDeque<Place>,
    /// The number of the first of them.
    first: u64,
    running: FuturesUnordered<Outcome>,
    /// The keys of what runs.
    keys: HashSet<Key>,
    /// How many wait for another write of their key.
    waiting: usize,
    /// The bytes of those without an outcome.
    bytes: usize,
}

/// A write that was read.
struct Place {
    /// Its key, until its outcome is known.
    key: Option<Key>,
    bytes: usize,
    state: PlaceState,
}

enum PlaceState {
    /// For the outcome of an earlier write of its key; with its own deadline.
    Waits(WriteRequest, Instant),
    Runs,
    /// And waits for those before it.
    Done(WriteResult),
}

/// Why a stream ended.
enum End {
    /// In order, or for a reason that its client is told behind all answers.
    Told(Result<(), Status>),
    /// Its client does not take its answers.
    Unread,
    /// Its client is gone.
    Gone,
}

impl Writes {
    fn new(gateway: Gateway, limits: CallLimits, deadline: Option<Instant>, stop: CancellationToken) -> Writes {
        Writes {
            gateway,
            limits,
            stop,
            deadline,
            places: VecDeque::new(),
            first: 1,
            running: FuturesUnordered::new(),
            keys: HashSet::new(),
            waiting: 0,
            bytes: 0,
        }
    }

    /// Starts the stream's task. It ends with the stream, or once nobody hears its answers.
    fn start(mut self, requests: Streaming<WriteStreamRequest>) -> Answers {
        let (sender, answers) = mpsc::channel(ANSWERS_MAX);
        let (end_sender, end) = oneshot::channel();
        let (heard, unheard) = oneshot::channel::<Infallible>();
        let cutter = Cutter::of_this_call();
        tokio::spawn(async move {
            let ended = self.run(requests, &sender).await;
            let unread_max = self.limits.stream_unread_max;
            // The permits and the values of what is under way, before the wait for a client that takes its time.
            drop(self);
            let (told, wait) = match ended {
                End::Told(told) => (told, unread_max),
                End::Unread => {
                    tracing::info!("ended a stream of writes: its client reads no answers");
                    (Err(to_status(not_read(unread_max))), LOST_WAIT)
                }
                End::Gone => return,
            };
            // Nobody hears it if the client has just gone.
            let _ = end_sender.send(told);
            drop(sender);
            if timeout(wait, unheard).await.is_err() {
                cutter.cut();
            }
        });
        Answers {
            answers,
            end: Some(end),
            _heard: heard,
        }
    }

    /// Reads, writes and answers, until the end.
    async fn run(
        &mut self,
        mut requests: Streaming<WriteStreamRequest>,
        answers: &mpsc::Sender<WriteStreamResponse>,
    ) -> End {
        let stop = self.stop.clone();
        let (mut gone, mut stopped) = (pin!(answers.closed()), pin!(stop.cancelled()));
        let mut pace = Pace::new(&self.limits, self.deadline);
        let mut alarm = pin!(sleep_until(pace.next()));
        // Why nothing more is read.
        let mut end = None;
        loop {
            pace.reads(end.is_none() && self.has_room());
            pace.tells(self.is_next_done());
            if self.places.is_empty()
                && let Some(end) = end
            {
                return End::Told(end);
            }
            pace.arm(alarm.as_mut());
            tokio::select! {
                biased;
                () = &mut gone => return End::Gone,
                () = &mut alarm => match pace.passed() {
                    Some(Passed::Deadline) => return End::Told(Err(to_status(out_of_time()))),
                    Some(Passed::Unread) => return End::Unread,
                    Some(Passed::Idle) => end = Some(Err(to_status(idle(self.limits.stream_idle_max)))),
                    None => alarm.as_mut().reset(pace.next()),
                },
                () = &mut stopped, if end.is_none() => {
                    end = Some(Err(to_status(shutting_down())));
                }
                permit = answers.reserve(), if self.is_next_done() => match permit {
                    Ok(permit) => {
                        pace.told();
                        if let Some(answer) = self.next_answer() {
                            permit.send(answer);
                        }
                    }
                    Err(_) => return End::Gone,
                },
                Some((number, outcome)) = self.running.next() => self.settle(number, outcome),
                message = requests.message(), if end.is_none() && self.has_room() => match message {
                    Ok(Some(message)) => {
                        pace.heard();
                        self.begin(message);
                    }
                    Ok(None) => end = Some(Ok(())),
                    Err(status) => end = Some(Err(broken(status, self.limits.message_bytes_max))),
                },
            }
        }
    }

    fn has_room(&self) -> bool {
        self.places.len() < UNDER_WAY_MAX && self.bytes < UNDER_WAY_BYTES_MAX
    }

    fn is_next_done(&self) -> bool {
        matches!(
            self.places.front(),
            Some(Place {
                state: PlaceState::Done(_),
                ..
            })
        )
    }

    /// The answer to the first write that has none, if its outcome is known.
    fn next_answer(&mut self) -> Option<WriteStreamResponse> {
        if !self.is_next_done() {
            return None;
        }
        let Some(Place {
            state: PlaceState::Done(result),
            ..
        }) = self.places.pop_front()
        else {
            return None;
        };
        let number = self.first;
        self.first += 1;
        Some(WriteStreamResponse {
            number,
            result: Some(result),
        })
    }

    /// Gives the next write of the stream a place, and begins it if no earlier one of its key is under way.
    fn begin(&mut self, message: WriteStreamRequest) {
        let bytes = message.encoded_len();
        let request = match message.item {
            Some(item) => convert::item(item, self.limits.value_bytes_max),
            None => Err(no_item()),
        };
        let number = self.first + self.places.len() as u64;
        let place = match request {
            Err(invalid) => Place {
                key: None,
                bytes: 0,
                state: PlaceState::Done(convert::write_result(Err(invalid))),
            },
            Ok(request) => {
                let key = request.key.clone();
                let deadline = Instant::now() + self.limits.deadlines.default;
                let deadline = self.deadline.map_or(deadline, |end| end.min(deadline));
                self.bytes += bytes;
                let state = if self.keys.insert(key.clone()) {
                    self.write(number, request, deadline);
                    PlaceState::Runs
                } else {
                    self.waiting += 1;
                    PlaceState::Waits(request, deadline)
                };
                Place {
                    key: Some(key),
                    bytes,
                    state,
                }
            }
        };
        self.places.push_back(place);
    }

    fn write(&self, number: u64, request: WriteRequest, deadline: Instant) {
        let (gateway, stop) = (self.gateway.clone(), self.stop.clone());
        self.running.push(Box::pin(async move {
            if Instant::now() >= deadline {
                let message = "the deadline passed while an earlier write of this key was under way";
                return (number, Err(Error::new(ErrorKind::Timeout, message)));
            }
            (number, write_while_running(&gateway, &stop, request, deadline).await)
        }));
    }

    /// Notes an outcome, and begins the next write of its key.
    fn settle(&mut self, number: u64, outcome: Result<Written, Error>) {
        // Below the bound of what is under way.
        let place = self.places.get_mut((number - self.first) as usize);
        let Some(Place { key, bytes, state }) = place else {
            return;
        };
        self.bytes -= *bytes;
        *state = PlaceState::Done(convert::write_result(outcome));
        let Some(key) = key.take() else {
            return;
        };
        if self.waiting == 0 || !self.begin_next_of(&key) {
            self.keys.remove(&key);
        }
    }

    /// Begins the first write that waits for this key. Whether there is one.
    fn begin_next_of(&mut self, key: &Key) -> bool {
        let waits = |place: &Place| matches!(place.state, PlaceState::Waits(..)) && place.key.as_ref() == Some(key);
        let Some(index) = self.places.iter().position(waits) else {
            return false;
        };
        let state = std::mem::replace(&mut self.places[index].state, PlaceState::Runs);
        if let PlaceState::Waits(request, deadline) = state {
            self.waiting -= 1;
            self.write(self.first + index as u64, request, deadline);
        }
        true
    }
}

/// What a stream may take its time for, and how long.
struct Pace {
    deadline: Option<Instant>,
    idle_max: Duration,
    unread_max: Duration,
    /// Since when the next whole message is waited for, while it is.
    reading: Option<Instant>,
    /// Since when the client could have taken an answer, while there are any.
    telling: Option<Instant>,
}

/// Which of the times has passed.
#[derive(Debug, PartialEq, Eq)]
enum Passed {
    Deadline,
    Idle,
    Unread,
}

impl Pace {
    fn new(limits: &CallLimits, deadline: Option<Instant>) -> Pace {
        Pace {
            deadline,
            idle_max: limits.stream_idle_max,
            unread_max: limits.stream_unread_max,
            reading: None,
            telling: None,
        }
    }

    fn reads(&mut self, now: bool) {
        self.reading = now.then(|| self.reading.unwrap_or_else(Instant::now));
    }

    fn tells(&mut self, now: bool) {
        self.telling = now.then(|| self.telling.unwrap_or_else(Instant::now));
    }

    /// A whole message came.
    fn heard(&mut self) {
        self.reading = None;
    }

    /// An answer was taken.
    fn told(&mut self) {
        self.telling = None;
    }

    /// When the first of the times has passed; far ahead where there is none.
    fn next(&self) -> Instant {
        let far = || Instant::now() + Duration::from_secs(24 * 3600);
        self.times().map(|(_, end)| end).min().unwrap_or_else(far)
    }

    fn passed(&self) -> Option<Passed> {
        let now = Instant::now();
        self.times().find(|(_, end)| *end <= now).map(|(passed, _)| passed)
    }

    fn times(&self) -> impl Iterator<Item = (Passed, Instant)> {
        let deadline = self.deadline.map(|end| (Passed::Deadline, end));
        let unread = self.telling.map(|since| (Passed::Unread, since + self.unread_max));
        let idle = self.reading.map(|since| (Passed::Idle, since + self.idle_max));
        [deadline, unread, idle].into_iter().flatten()
    }

    /// Sets the alarm to the first of the times, where it is set later: set too early it is set anew when it goes off.
    fn arm(&self, alarm: Pin<&mut Sleep>) {
        let next = self.next();
        if next < alarm.deadline() {
            alarm.reset(next);
        }
    }
}

/// What came is no message, or did not come whole. Nothing of it was written; all before it is answered.
fn broken(status: Status, message_bytes_max: usize) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    unread(status.code(), message_bytes_max).map_or(status, to_status)
}

/// Of a task that did not say how the stream ended.
fn cut_short() -> Error {
    let message = "the gateway was stopped in the middle of the stream";
    Error::new(ErrorKind::Unavailable, message).unknown()
}

fn no_item() -> Error {
    let mut violations = Vec::new();
    violate(&mut violations, "item", "must be given");
    Error::invalid(violations)
}

fn out_of_time() -> Error {
    Error::new(ErrorKind::Timeout, "the deadline passed before the stream ended").unknown()
}

fn idle(idle_max: Duration) -> Error {
    let message =
        format!("no whole write came for {idle_max:?}: end a stream that is not needed, and begin another when it is");
    Error::new(ErrorKind::Timeout, message)
}

fn not_read(unread_max: Duration) -> Error {
    let message = format!("no answer was read for {unread_max:?}, while there were any: read them while you write");
    Error::new(ErrorKind::Overloaded, message).unknown()
}
