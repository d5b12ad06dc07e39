//! L2: copies in Redis, shared by the replicas.
//!
//! Owns the connection of one runtime, its keeper, and the script that compares versions; alone uses the redis crate. Does not own
//! the bytes of a value (`layout` does), nor what a failure means for a call (the gateway takes it for a miss). Invariants: a call
//! never dials and never waits for a dial; Redis moves a key only forward, for nothing but the script writes; whatever a call that
//! failed may still do later is harmless, for the script compares.
//!
//! Failures are of two levels. **Connection**: an I/O error, no answer in time, an answer that is no Redis protocol or not what
//! the command answers. The link is held to be down from then on, so that the calls after it do not wait, until the keeper has
//! dialled a new one that answers a ping. **Call**: Redis answered with an error, be it about the key (WRONGTYPE), its memory
//! (OOM) or its state (LOADING, READONLY, MISCONF). That costs no waiting, so the link stays up, unless a ping is refused too.

mod link;

use std::{fmt, io::Write, sync::Arc, time::Duration};

use bytes::Bytes;
use redis::{Client, Cmd, ConnectionAddr, IntoConnectionInfo, RedisError, RedisWrite, Script, io::tcp::TcpSettings};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    cache::{
        Copy, layout,
        redis::link::{Keeper, Link, ask},
    },
    model::{Entry, Key, Timestamp, Version},
    settings::{DAY, Unfit, within},
    telemetry::CacheMetrics,
};

/// How long Redis keeps a tombstone, and a record past its expiry, at least: so long does it refuse an older write that is late.
pub const TOMBSTONE_KEPT_MIN: Duration = Duration::from_secs(60);

/// No copy is kept longer, whatever lifetime is asked: Redis refuses what overflows its clock.
const KEPT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// The one script. Versions are compared as two unsigned halves: Lua's numbers are doubles, and the order of its strings depends
/// on the locale. A value without our mark, or with a negative version, is not ours, and makes room.
///
/// `KEYS[1]`; `ARGV[1]` is `land` with a value and its lifetime in milliseconds, and answers with the version that stands then;
/// or `drop` with a version, which removes the key where exactly that stands, and answers with it, or with nothing.
const SCRIPT: &str = r"
local head = redis.call('GETRANGE', KEYS[1], 0, 8)
local given = string.sub(ARGV[2], 1, 8)
local standing = false
if #head == 9 and string.byte(head, 1) < 128 and math.floor(string.byte(head, 9) / 16) == 13 then
  standing = string.sub(head, 1, 8)
end
if ARGV[1] == 'drop' then
  if standing == given then
    redis.call('UNLINK', KEYS[1])
    return given
  end
  return ''
end
if standing then
  local standing_high, standing_low = struct.unpack('>I4I4', standing)
  local given_high, given_low = struct.unpack('>I4I4', given)
  if standing_high > given_high or (standing_high == given_high and standing_low > given_low) then
    return standing
  end
end
local set = redis.pcall('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if set.err then
  -- As for want of memory: what is older must not go on answering.
  redis.call('UNLINK', KEYS[1])
  return set
end
return given
";

/// The settings of L2. Where Redis is, is a setting of the gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What every key in Redis begins with. Default: `tidegate:`. Gateways share their copies if this and the Redis are the same,
    /// so two stores must not have the same.
    pub prefix: String,
    /// How long a call waits for Redis before it is a miss and the connection is given up. Default: 250 ms. Less gives up on a
    /// Redis that is only slow; more makes reads wait for one that is gone.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How long connecting may take, TLS and authentication included; no call waits for it. Default: 2 s.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            prefix: "tidegate:".to_owned(),
            timeout: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(2),
        }
    }
}

impl Config {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        within("timeout", self.timeout, DAY)?;
        within("connect_timeout", self.connect_timeout, DAY)
    }
}

/// Where Redis is and how to log in. Made from a URL that is valid; whether anybody answers there is another matter.
#[derive(Clone)]
pub struct Server {
    client: Client,
}

/// A URL that names no Redis. The text says why, and never repeats the URL, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the Redis URL is not valid: {reason}; it is redis://[[user]:password@]host[:port][/database], rediss:// for TLS, or unix:///path"
)]
pub struct InvalidUrl {
    reason: String,
}

impl Server {
    /// The server that a URL names. `rediss://` asks for TLS; the certificate must be signed by an authority that the system
    /// trusts, and rustls must have its process-wide provider by the time of the first dial.
    ///
    /// # Errors
    /// [`InvalidUrl`] says what is wrong.
    pub fn parse(url: &str) -> Result<Server, InvalidUrl> {
        let invalid = |reason: &str| InvalidUrl {
            reason: reason.to_owned(),
        };
        // The crate's text is a fixed sentence, then " - " and what may quote the URL.
        let because = |error: RedisError| {
            let text = error.to_string();
            invalid(text.split(" - ").next().unwrap_or_default())
        };
        let info = url.into_connection_info().map_err(because)?;
        if matches!(info.addr(), ConnectionAddr::TcpTls { insecure: true, .. }) {
            return Err(invalid("certificates are always verified, so #insecure is refused"));
        }
        let settings = TcpSettings::default().set_nodelay(true);
        let client = Client::open(info.set_tcp_settings(settings)).map_err(because)?;
        Ok(Server { client })
    }
}

impl fmt::Debug for Server {
    /// Shows the address, never the credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.client.get_connection_info().addr())
    }
}

/// Why a call to Redis failed. To a read it is a miss; a write may still land, or not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedisFailure {
    /// Redis is held to be down: nothing was sent, and nothing waited for.
    #[error("there is no connection to Redis")]
    Down,
    /// The connection broke, or carried what is no answer.
    #[error("the connection to Redis failed")]
    Lost,
    /// Redis did not answer in time; the connection was given up.
    #[error("Redis did not answer in time")]
    TimedOut,
    /// Redis answered with an error.
    #[error("Redis refused the call code={code}")]
    Refused {
        /// The first word of its answer.
        code: String,
    },
    /// What stands at the key, or the script's answer, is not ours.
    #[error("Redis holds something else at this key")]
    Foreign,
}

impl RedisFailure {
    /// Whether the connection is of no use any more.
    fn is_of_connection(&self) -> bool {
        match self {
            RedisFailure::Lost | RedisFailure::TimedOut => true,
            RedisFailure::Down | RedisFailure::Refused { .. } | RedisFailure::Foreign => false,
        }
    }
}

/// L2, over one connection that belongs to the runtime on which it was started. Dropping it ends its keeper.
#[derive(Debug)]
pub struct RedisCache {
    link: Arc<Link>,
    script: Script,
    config: Config,
    _keeper: AbortOnDropHandle<()>,
}

impl RedisCache {
    /// Starts the connection's keeper on the current Tokio runtime and returns at once: until the first dial has succeeded, every
    /// call is a miss.
    pub fn start(config: &Config, server: &Server, metrics: CacheMetrics) -> RedisCache {
        let link = Arc::new(Link::new(metrics));
        let keeper = Keeper::new(server.client.clone(), config, Arc::clone(&link));
        RedisCache {
            link,
            script: Script::new(SCRIPT),
            config: config.clone(),
            _keeper: AbortOnDropHandle::new(tokio::spawn(keeper.run())),
        }
    }

    /// Whether Redis is held to be up.
    pub fn is_up(&self) -> bool {
        self.link.current().is_some()
    }

    /// The copy of a key; `None` is a miss, as is a value that is not ours. It may be past its lifetime, as a tombstone that is
    /// kept against late writes is: then it may not answer, but still says which version stood.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`RedisFailure`]: to a reader a miss.
    pub async fn get(&self, key: &Key) -> Result<Option<Copy>, RedisFailure> {
        let mut command = Cmd::with_capacity(2, 3 + self.key_bytes(key));
        command.arg("GET");
        self.write_key(&mut command, key);
        let value = self
            .exchange(&command, self.deadline())
            .await
            .inspect_err(|failure| self.link.count(failure))?;
        let copy = value.map(|value| layout::decode(Bytes::from(value))).transpose();
        Ok(copy.unwrap_or_else(|layout::Foreign| {
            self.link.count(&RedisFailure::Foreign);
            None
        }))
    }

    /// Offers an entry, current at `loaded_at`, that may answer for `lifetime`. The version that stands afterwards: the entry's
    /// own, or a higher one that was left. Where the same version stands, its times become the given ones.
    ///
    /// Dropped or failed, it may land or not, and either is harmless.
    ///
    /// # Errors
    /// [`RedisFailure`]: what stands is not known.
    pub async fn land(
        &self,
        key: &Key,
        entry: &Entry,
        loaded_at: Timestamp,
        lifetime: Duration,
    ) -> Result<Version, RedisFailure> {
        let header = layout::header(entry, loaded_at, loaded_at.after(lifetime));
        let value = entry.value.as_deref().unwrap_or_default();
        let kept = kept_for(entry, loaded_at, lifetime);
        let answer = self.run_script("land", key, [&header, value], kept).await?;
        layout::version(&answer)
            .map_err(|layout::Foreign| RedisFailure::Foreign)
            .inspect_err(|failure| self.link.count(failure))
    }

    /// Removes the copy of a key if exactly `version` stands. Whether it did.
    ///
    /// Dropped or failed, it may take effect or not, and either is harmless.
    ///
    /// # Errors
    /// [`RedisFailure`]: the copy may still stand.
    pub async fn drop_version(&self, key: &Key, version: Version) -> Result<bool, RedisFailure> {
        let bytes = version.get().to_be_bytes();
        let answer = self.run_script("drop", key, [&bytes, &[]], Duration::ZERO).await?;
        Ok(!answer.is_empty())
    }

    /// Runs the script by its hash; where Redis does not know it (at first, after a restart or SCRIPT FLUSH), by its text, which
    /// makes it known. The two parts of the value are sent as one.
    async fn run_script(
        &self,
        mode: &str,
        key: &Key,
        value: [&[u8]; 2],
        kept: Duration,
    ) -> Result<Vec<u8>, RedisFailure> {
        let command = |how: &str, script: &str| {
            let bytes = script.len() + self.key_bytes(key) + value[0].len() + value[1].len() + 48;
            let mut command = Cmd::with_capacity(7, bytes);
            command.arg(how).arg(script).arg(1);
            self.write_key(&mut command, key);
            command.arg(mode);
            write_joined(&mut command, &value);
            command.arg(u64::try_from(kept.as_millis()).unwrap_or(u64::MAX));
            command
        };
        let deadline = self.deadline();
        let mut answer = self
            .exchange(&command("EVALSHA", self.script.get_hash()), deadline)
            .await;
        if matches!(&answer, Err(RedisFailure::Refused { code }) if code == "NOSCRIPT") {
            answer = self.exchange(&command("EVAL", SCRIPT), deadline).await;
        }
        answer
            .and_then(|answer| answer.ok_or(RedisFailure::Foreign))
            .inspect_err(|failure| self.link.count(failure))
    }

    /// One command and its answer, over the link that stands. A failure of the connection takes the link down.
    async fn exchange(&self, command: &Cmd, deadline: Instant) -> Result<Option<Vec<u8>>, RedisFailure> {
        let (mut connection, number) = self.link.current().ok_or(RedisFailure::Down)?;
        ask(&mut connection, command, deadline).await.inspect_err(|failure| {
            if failure.is_of_connection() {
                self.link.fall(number, failure);
            }
        })
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.config.timeout
    }

    fn key_bytes(&self, key: &Key) -> usize {
        self.config.prefix.len() + key.bytes() + 1
    }

    /// A namespace cannot hold ':', so no two keys become the same.
    fn write_key(&self, command: &mut Cmd, key: &Key) {
        write_joined(
            command,
            &[
                self.config.prefix.as_bytes(),
                key.namespace().as_bytes(),
                b":",
                key.key().as_bytes(),
            ],
        );
    }
}

/// Writes one argument from its parts.
fn write_joined(command: &mut Cmd, parts: &[&[u8]]) {
    let mut argument = command.writer_for_next_arg();
    for part in parts {
        argument
            .write_all(part)
            .expect("a command is a vector in memory, which takes every write");
    }
}

/// How long Redis keeps an entry. A live record: its lifetime. One that will have expired by then, and a tombstone: until it has
/// refused late writes for [`TOMBSTONE_KEPT_MIN`], for the older record would live again if it landed in the emptied slot.
fn kept_for(entry: &Entry, now: Timestamp, lifetime: Duration) -> Duration {
    let kept = match (&entry.value, entry.expires_at) {
        (None, _) => lifetime.max(TOMBSTONE_KEPT_MIN),
        (Some(_), Some(at)) if at.since(now) < lifetime => at.since(now) + TOMBSTONE_KEPT_MIN,
        (Some(_), _) => lifetime,
    };
    kept.clamp(Duration::from_millis(1), KEPT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_a_server_and_its_debug_output_no_credential() {
        for url in [
            "redis://127.0.0.1",
            "redis://127.0.0.1:6380/3",
            "redis://user:s3cret@redis.example:6380/3",
            "rediss://:s3cret@redis.example",
            "unix:///run/redis.sock",
        ] {
            let server = Server::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert!(!format!("{server:?}").contains("s3cret"));
        }
    }

    #[test]
    fn an_invalid_url_is_refused_without_repeating_it() {
        for url in [
            "",
            "127.0.0.1:6379",
            "http://user:s3cret@redis.example",
            "redis://user:s3cret@",
            "redis://user:s3cret@redis.example:port",
            "redis://user:s3cret@redis.example/database",
            "redis://user:s3cret@redis.example/?protocol=s3cret",
            "redis://user:%ff%fes3cret@redis.example",
            "rediss://user:s3cret@redis.example/#s3cret",
            "rediss://user:s3cret@redis.example/#insecure",
            "redis://user:s3cret@0.0.0.0",
        ] {
            let error = Server::parse(url).expect_err(url);
            assert!(!format!("{error} {error:?}").contains("s3cret"), "{url}: {error}");
        }
    }

    #[test]
    fn what_refuses_late_writes_is_kept_long_enough() {
        const NOW: Timestamp = Timestamp(1_000_000);
        let kept = |value: Option<&'static [u8]>, expires_in: Option<u64>, lifetime: u64| {
            let entry = Entry {
                version: Version::new(1).expect("positive"),
                value: value.map(Bytes::from_static),
                expires_at: expires_in.map(|secs| NOW.after(Duration::from_secs(secs))),
            };
            kept_for(&entry, NOW, Duration::from_secs(lifetime)).as_secs()
        };
        let live: Option<&[u8]> = Some(b"v");
        assert_eq!(kept(live, None, 300), 300);
        assert_eq!(kept(live, Some(1_000), 300), 300);
        assert_eq!(kept(live, Some(10), 300), 70);
        assert_eq!(kept(live, Some(0), 5), 60);
        assert_eq!(kept(None, None, 5), 60);
        assert_eq!(kept(None, None, 300), 300);
        assert_eq!(kept(live, None, u64::MAX), KEPT_MAX.as_secs());
    }
}
