//! The link to Redis of one runtime, and the keeper that dials it.
//!
//! Owns whether Redis is held to be up, and the count of failed calls. Does not own what is said over the link. Invariants: taking
//! the link never waits; a failure takes down only the very link that it was met on; only the keeper dials.

use std::{sync::Arc, time::Duration};

use parking_lot::{Mutex, RwLock};
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, RedisError, Value, aio::MultiplexedConnection};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout_at},
};

use crate::{
    backoff::Backoff,
    cache::redis::{Config, RedisFailure},
    telemetry::CacheMetrics,
};

/// How often the keeper asks whether Redis answers.
const PING_INTERVAL: Duration = Duration::from_secs(1);

/// The pause before the first dial after a failure. It doubles with each further one, up to the longest.
pub(super) const DIAL_PAUSE_MIN: Duration = Duration::from_millis(100);
pub(super) const DIAL_PAUSE_MAX: Duration = Duration::from_secs(2);

/// A link that stood this long has proved itself: the pauses before dials begin small again.
pub(super) const LINK_PROVED: Duration = Duration::from_secs(10);

/// Commands that may queue for the socket, and the bytes that are joined into one write. The crate's own figures are for few calls.
const QUEUED_COMMANDS_MAX: usize = 4096;
const WRITE_BYTES: usize = 256 * 1024;

/// At most one line about failed calls, and one about failed dials, is logged in this time.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// The connection that stands, if one does.
#[derive(Debug)]
pub(super) struct Link {
    standing: RwLock<Option<Standing>>,
    fell: Notify,
    metrics: CacheMetrics,
    complaints: Complaints,
    /// Lines about a link that falls, and one that stands again: a Redis that comes and goes is said now and then.
    falls: Complaints,
    rises: Complaints,
}

/// A connection that answers.
#[derive(Debug, Clone)]
pub(super) struct Standing {
    pub(super) connection: MultiplexedConnection,
    /// Which dial made it.
    pub(super) number: u64,
    /// The run of the server that it leads to.
    pub(super) server: Arc<str>,
}

impl Link {
    pub(super) fn new(metrics: CacheMetrics) -> Link {
        metrics.redis_down.inc();
        Link {
            standing: RwLock::new(None),
            fell: Notify::new(),
            metrics,
            complaints: Complaints::default(),
            falls: Complaints::default(),
            rises: Complaints::default(),
        }
    }

    /// The connection that stands.
    pub(super) fn current(&self) -> Option<Standing> {
        self.standing.read().clone()
    }

    /// Takes the link down, if it is still the one of this number.
    pub(super) fn fall(&self, number: u64, failure: &RedisFailure) {
        let fallen = {
            let mut standing = self.standing.write();
            standing.take_if(|s| s.number == number)
        };
        if fallen.is_some() {
            self.metrics.redis_down.inc();
            self.fell.notify_one();
            if let Some(unsaid) = self.falls.permit() {
                tracing::warn!(%failure, unsaid, "Redis is held to be down");
            }
        }
    }

    /// Counts a failed call, and says so now and then. The link's fall was said already, and its absence is no news.
    pub(super) fn count(&self, failure: &RedisFailure) {
        self.metrics.redis_errors.inc();
        if failure.is_of_connection() || *failure == RedisFailure::Down {
            return;
        }
        if let Some(unsaid) = self.complaints.permit() {
            tracing::warn!(%failure, unsaid, "a call to Redis failed");
        }
    }

    fn rise(&self, standing: Standing) {
        *self.standing.write() = Some(standing);
        self.metrics.redis_down.dec();
        if let Some(unsaid) = self.rises.permit() {
            tracing::info!(unsaid, "Redis answers");
        }
    }

    fn stands(&self, number: u64) -> bool {
        self.standing.read().as_ref().is_some_and(|s| s.number == number)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // A connection that is not wanted any more is not down.
        if self.standing.get_mut().is_none() {
            self.metrics.redis_down.dec();
        }
    }
}

/// The task that makes the link stand. It ends when it is aborted.
pub(super) struct Keeper {
    client: Client,
    connect_timeout: Duration,
    ping_timeout: Duration,
    link: Arc<Link>,
    complaints: Complaints,
}

impl Keeper {
    pub(super) fn new(client: Client, config: &Config, link: Arc<Link>) -> Keeper {
        Keeper {
            client,
            connect_timeout: config.connect_timeout,
            ping_timeout: config.timeout,
            link,
            complaints: Complaints::default(),
        }
    }

    pub(super) async fn run(self) {
        // Failures since the last link that proved itself: one that falls at once, again and again, must not have every call
        // wait for it in turn.
        let mut backoff = Backoff::new(DIAL_PAUSE_MIN, DIAL_PAUSE_MAX);
        for number in 0.. {
            if let Some((connection, server)) = self.dial().await {
                let risen = Instant::now();
                self.link.rise(Standing {
                    connection: connection.clone(),
                    number,
                    server,
                });
                self.watch(connection, number).await;
                if risen.elapsed() >= LINK_PROVED {
                    backoff.reset();
                }
            }
            sleep(backoff.delay()).await;
        }
    }

    /// A connection that answers, and the run of its server.
    async fn dial(&self) -> Option<(MultiplexedConnection, Arc<str>)> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            // Each call has its own deadline.
            .set_response_timeout(None)
            .set_pipeline_buffer_size(QUEUED_COMMANDS_MAX)
            .set_write_backpressure_boundary(WRITE_BYTES);
        let dialled = self.client.get_multiplexed_async_connection_with_config(&config).await;
        let (failure, cause) = match dialled {
            Ok(mut connection) => match self.meet(&mut connection).await {
                Ok(server) => return Some((connection, server)),
                Err(failure) => (failure, None),
            },
            Err(error) => (failure_of(&error), io_cause(&error)),
        };
        if let Some(unsaid) = self.complaints.permit() {
            tracing::warn!(%failure, cause, unsaid, "Redis cannot be reached");
        }
        None
    }

    /// Pings until the link has fallen.
    async fn watch(&self, mut connection: MultiplexedConnection, number: u64) {
        while self.link.stands(number) {
            tokio::select! {
                // May be left over from an earlier link: the loop looks.
                () = self.link.fell.notified() => {}
                () = sleep(PING_INTERVAL) => {
                    if let Err(failure) = self.ping(&mut connection).await {
                        self.link.fall(number, &failure);
                    }
                }
            }
        }
    }

    /// The run of the server: a random name that it gives itself whenever it starts.
    async fn meet(&self, connection: &mut MultiplexedConnection) -> Result<Arc<str>, RedisFailure> {
        // One that is still loading its file answers the other question.
        self.ping(connection).await?;
        let mut info = Cmd::new();
        info.arg("INFO").arg("server");
        let told = ask(connection, &info, Instant::now() + self.ping_timeout).await?;
        let told = told.and_then(|told| String::from_utf8(told).ok()).unwrap_or_default();
        let run = told.lines().find_map(|line| line.strip_prefix("run_id:"));
        run.map(|run| run.trim().into()).ok_or(RedisFailure::Lost)
    }

    async fn ping(&self, connection: &mut MultiplexedConnection) -> Result<(), RedisFailure> {
        let mut ping = Cmd::new();
        // With an argument the answer is a bulk string, as of every other command here.
        ping.arg("PING").arg("tidegate");
        ask(connection, &ping, Instant::now() + self.ping_timeout).await?;
        Ok(())
    }
}

/// One command and its answer, a bulk string or nothing.
///
/// Cancel-safe for the connection: an answer that comes later is thrown away.
pub(super) async fn ask(
    connection: &mut MultiplexedConnection,
    command: &Cmd,
    deadline: Instant,
) -> Result<Option<Vec<u8>>, RedisFailure> {
    match ask_value(connection, command, deadline).await? {
        Value::BulkString(bytes) => Ok(Some(bytes)),
        Value::Nil => Ok(None),
        _ => Err(RedisFailure::Lost),
    }
}

/// One command and its answer, whatever that is.
///
/// Cancel-safe, as [`ask`] is.
pub(super) async fn ask_value(
    connection: &mut MultiplexedConnection,
    command: &Cmd,
    deadline: Instant,
) -> Result<Value, RedisFailure> {
    match timeout_at(deadline, command.query_async(connection)).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(failure_of(&error)),
        Err(_) => Err(RedisFailure::TimedOut),
    }
}

/// One command whose answer is a number, of which it tells how many.
///
/// Cancel-safe, as [`ask`] is.
pub(super) async fn tell(
    connection: &mut MultiplexedConnection,
    command: &Cmd,
    deadline: Instant,
) -> Result<u64, RedisFailure> {
    match timeout_at(deadline, command.query_async(connection)).await {
        Ok(Ok(Value::Int(number))) => Ok(u64::try_from(number).unwrap_or(0)),
        Ok(Ok(_)) => Err(RedisFailure::Lost),
        Ok(Err(error)) => Err(failure_of(&error)),
        Err(_) => Err(RedisFailure::TimedOut),
    }
}

pub(super) fn failure_of(error: &RedisError) -> RedisFailure {
    match error.kind() {
        ErrorKind::Server(_) | ErrorKind::Extension => RedisFailure::Refused {
            code: error.code().unwrap_or("ERR").to_owned(),
        },
        ErrorKind::AuthenticationFailed => RedisFailure::Refused {
            code: "WRONGPASS".to_owned(),
        },
        _ => RedisFailure::Lost,
    }
}

/// What the system says of a failed dial, as "connection refused"; it holds no credential.
pub(super) fn io_cause(error: &RedisError) -> Option<String> {
    error.is_io_error().then(|| error.to_string())
}

/// Lets one line through per [`COMPLAINT_INTERVAL`].
#[derive(Debug, Default)]
pub(super) struct Complaints {
    /// When the last one was let through, and how many were not since.
    last: Mutex<(Option<Instant>, u64)>,
}

impl Complaints {
    /// Whether a line may be logged: how many could not be since the last one.
    pub(super) fn permit(&self) -> Option<u64> {
        let mut last = self.last.lock();
        if last.0.is_some_and(|at| at.elapsed() < COMPLAINT_INTERVAL) {
            last.1 += 1;
            return None;
        }
        Some(std::mem::replace(&mut *last, (Some(Instant::now()), 0)).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn complaints_are_rare_and_say_how_many_were_not_made() {
        let complaints = Complaints::default();
        assert_eq!(complaints.permit(), Some(0));
        assert_eq!((0..5).filter_map(|_| complaints.permit()).count(), 0);
        tokio::time::advance(COMPLAINT_INTERVAL).await;
        assert_eq!(complaints.permit(), Some(5));
    }
}
