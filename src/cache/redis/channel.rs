//! The channel on which replicas tell each other what they wrote, and whether it can be relied upon.
//!
//! Owns the subscription of one process, in a task of its own that dials it anew when it is lost, and the *beats* by which it is known to be
//! whole. Does not own what is done when something is heard (the gateway does), nor who publishes (`redis`). Limits: what was received and not
//! yet taken, at most `BUFFERED_MAX` messages; who takes them more slowly than they come loses the subscription. No loss is kept
//! quiet: whatever was missed was missed between a [`Heard::Lost`] and the next [`Heard::Subscribed`].
//!
//! A beat is a message to this process alone, which it publishes over its connection for commands, and hears on the same subscription as the
//! messages of all: Redis passes on what it is told in the order in which it was told. So whoever has heard a beat has heard every message
//! from before the beat was sent. The number in a beat is when it was sent, so nothing has to be remembered.

use std::{future::poll_fn, pin::Pin, str::FromStr, time::Duration};

use futures_core::Stream;
use redis::{Client, Msg, RedisError, aio::PubSubStream};
use tokio::{
    sync::mpsc,
    task::unconstrained,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    backoff::Backoff,
    cache::{
        message::{Message, Origin},
        redis::{
            Config, RedisFailure, Server,
            link::{Complaints, DIAL_PAUSE_MAX, DIAL_PAUSE_MIN, LINK_PROVED, failure_of, io_cause},
        },
    },
    telemetry::CacheMetrics,
};

/// How many messages may wait to be taken: what comes in a third of a second at the highest rate that was measured. At most 20 MB.
const BUFFERED_MAX: usize = 16_384;

/// A subscription on which no beat was heard for so long is given up: its connection may be half open.
const SILENCE_MAX: Duration = Duration::from_secs(3);

/// The channel of the gateways that share a prefix.
pub(super) fn changes(prefix: &str) -> String {
    format!("{prefix}changes")
}

/// The channel of one process's beats.
pub(super) fn beats(prefix: &str, origin: Origin) -> String {
    format!("{prefix}beat:{origin}")
}

/// What there is to hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// From here on every message is heard, until the subscription is lost.
    Subscribed,
    /// Another replica's message.
    Message(Message),
    /// A beat that was sent at this time: every message from before was heard.
    Beat(Instant),
    /// Messages may have been missed, and may be until the next [`Heard::Subscribed`].
    Lost,
}

/// Makes the numbers of beats, and reads them.
#[derive(Debug, Clone, Copy)]
pub struct Beats {
    started: Instant,
}

impl Beats {
    /// The number of a beat that is sent now.
    pub fn number(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// When the beat of a number was sent; `None`: none was yet.
    fn sent_at(&self, number: u64) -> Option<Instant> {
        let sent_at = self.started.checked_add(Duration::from_micros(number))?;
        (sent_at <= Instant::now()).then_some(sent_at)
    }
}

/// The subscription of one process. Dropping it ends its keeper.
#[derive(Debug)]
pub struct Channel {
    origin: Origin,
    beats: Beats,
    /// A subscription at a time, as what is heard on it until it is lost.
    subscriptions: mpsc::Receiver<mpsc::Receiver<Heard>>,
    current: Option<mpsc::Receiver<Heard>>,
    _keeper: AbortOnDropHandle<()>,
}

impl Channel {
    /// Starts the channel's keeper on the current Tokio runtime and returns at once.
    ///
    /// Whoever starts it must have a beat of `origin` published several times within three seconds.
    pub fn start(config: &Config, server: &Server, origin: Origin, metrics: CacheMetrics) -> Channel {
        let beats = Beats {
            started: Instant::now(),
        };
        let (taken, subscriptions) = mpsc::channel(1);
        let keeper = Keeper {
            client: server.client.clone(),
            connect_timeout: config.connect_timeout,
            changes: changes(&config.prefix),
            beat_channel: self::beats(&config.prefix, origin),
            origin,
            beats,
            subscriptions: taken,
            metrics,
            complaints: Complaints::default(),
        };
        Channel {
            origin,
            beats,
            subscriptions,
            current: None,
            _keeper: AbortOnDropHandle::new(tokio::spawn(keeper.run())),
        }
    }

    /// Whose channel it is.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The numbers of its beats.
    pub fn beats(&self) -> Beats {
        self.beats
    }

    /// Waits for what is heard next. `None`: nothing ever will be, for the keeper failed.
    ///
    /// Cancel-safe: what was not given out is heard by the next call.
    pub async fn next(&mut self) -> Option<Heard> {
        if let Some(current) = &mut self.current {
            let heard = current.recv().await;
            if heard.is_none() {
                self.current = None;
            }
            return Some(heard.unwrap_or(Heard::Lost));
        }
        self.current = Some(self.subscriptions.recv().await?);
        Some(Heard::Subscribed)
    }
}

/// Why a subscription was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Loss {
    #[error("its connection ended")]
    Ended,
    #[error("no beat was heard for {SILENCE_MAX:?}")]
    Silent,
    #[error("messages came faster than they were heeded")]
    TooSlow,
    #[error("somebody else's message, or a newer gateway's, was heard")]
    Foreign,
    #[error("nobody listens any more")]
    Unwanted,
}

/// The task that keeps the process subscribed. It ends when it is aborted.
struct Keeper {
    client: Client,
    connect_timeout: Duration,
    changes: String,
    beat_channel: String,
    origin: Origin,
    beats: Beats,
    subscriptions: mpsc::Sender<mpsc::Receiver<Heard>>,
    metrics: CacheMetrics,
    complaints: Complaints,
}

impl Keeper {
    async fn run(self) {
        let mut backoff = Backoff::new(DIAL_PAUSE_MIN, DIAL_PAUSE_MAX);
        // Before the dial: what nobody has taken a subscription of would gather.
        while let Ok(taken) = self.subscriptions.reserve().await {
            if let Some(stream) = self.subscribe().await {
                let began = Instant::now();
                let (heard, hears) = mpsc::channel(BUFFERED_MAX);
                taken.send(hears);
                let up = Up::new(&self.metrics);
                tracing::info!("subscribed to what other gateways write");
                // Without a budget: the crate's own buffer has no bound, so it is emptied whenever there is something in it.
                let loss = unconstrained(self.listen(stream, &heard)).await;
                drop(up);
                self.metrics.channel_losses.inc();
                if let Some(unsaid) = self.complaints.permit() {
                    tracing::warn!(%loss, unsaid, "the subscription to what other gateways write is lost");
                }
                if began.elapsed() >= LINK_PROVED {
                    backoff.reset();
                }
            }
            sleep(backoff.delay()).await;
        }
    }

    /// A subscription that Redis has confirmed.
    async fn subscribe(&self) -> Option<PubSubStream> {
        let subscribing = async {
            let mut connection = self.client.get_async_pubsub().await?;
            connection.subscribe(&[&self.changes, &self.beat_channel]).await?;
            Ok::<_, RedisError>(connection.into_on_message())
        };
        let (failure, cause) = match timeout(self.connect_timeout, subscribing).await {
            Ok(Ok(stream)) => return Some(stream),
            Ok(Err(error)) => (failure_of(&error), io_cause(&error)),
            Err(_) => (RedisFailure::TimedOut, None),
        };
        if let Some(unsaid) = self.complaints.permit() {
            tracing::warn!(%failure, cause, unsaid, "cannot subscribe to what other gateways write");
        }
        None
    }

    /// Passes on what is heard until the subscription is lost.
    async fn listen(&self, mut stream: PubSubStream, heard: &mpsc::Sender<Heard>) -> Loss {
        let mut silent_at = Instant::now() + SILENCE_MAX;
        loop {
            let received = timeout_at(silent_at, poll_fn(|context| Pin::new(&mut stream).poll_next(context)));
            let message = match received.await {
                Ok(Some(message)) if Instant::now() < silent_at => message,
                Ok(None) => return Loss::Ended,
                Ok(Some(_)) | Err(_) => return Loss::Silent,
            };
            let items = match self.read(&message) {
                Ok(items) => items,
                Err(loss) => {
                    self.metrics.messages_foreign.inc();
                    return loss;
                }
            };
            for item in items {
                if let Heard::Beat(sent_at) = item {
                    silent_at = silent_at.max(sent_at + SILENCE_MAX);
                }
                match heard.try_send(item) {
                    Ok(()) => {}
                    Err(mpsc::error::TrySendError::Full(_)) => return Loss::TooSlow,
                    Err(mpsc::error::TrySendError::Closed(_)) => return Loss::Unwanted,
                }
            }
        }
    }

    /// What is said; nothing, if it is our own.
    fn read(&self, message: &Msg) -> Result<Vec<Heard>, Loss> {
        let payload = message.get_payload_bytes();
        if message.get_channel_name() == self.beat_channel {
            let number = str::from_utf8(payload).ok().and_then(|text| u64::from_str(text).ok());
            let sent_at = number.and_then(|number| self.beats.sent_at(number));
            return sent_at.map(|at| vec![Heard::Beat(at)]).ok_or(Loss::Foreign);
        }
        if Origin::of(payload) == Some(self.origin) {
            return Ok(Vec::new());
        }
        let (_, messages) = Message::decode(payload).map_err(|_| Loss::Foreign)?;
        self.metrics.messages_heard.inc_by(messages.len() as u64);
        Ok(messages.into_iter().map(Heard::Message).collect())
    }
}

/// Counts a subscription while it stands, also when its task is aborted.
struct Up<'a>(&'a CacheMetrics);

impl Up<'_> {
    fn new(metrics: &CacheMetrics) -> Up<'_> {
        metrics.channel_up.inc();
        Up(metrics)
    }
}

impl Drop for Up<'_> {
    fn drop(&mut self) {
        self.0.channel_up.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_beat_says_when_it_was_sent_and_none_is_from_the_future() {
        let beats = Beats {
            started: Instant::now(),
        };
        for _ in 0..3 {
            let (number, now) = (beats.number(), Instant::now());
            assert_eq!(beats.sent_at(number), Some(now));
            assert_eq!(beats.sent_at(number + 1), None);
            assert_eq!(beats.sent_at(u64::MAX), None);
            tokio::time::advance(Duration::from_micros(1_234_567)).await;
            assert_eq!(beats.sent_at(number), Some(now), "however late it is heard");
        }
    }
}
