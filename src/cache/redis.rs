//! L2: copies in Redis, shared by the replicas.
//!
//! Owns the connection of one runtime, its keeper, and the script that changes slots and tells the other replicas; with its parts alone uses
//! the redis crate. Does not own the bytes of a value (`layout` does), nor what a failure means for a call (the gateway takes it for a
//! miss, and remembers a write that was not published). Invariants: a call never dials and never waits for a dial; Redis moves a key only
//! forward, for nothing but the script changes a slot; whatever a call that failed may still do later is harmless, for the script compares;
//! nothing is said to a server other than the one for which the epoch holds.
//!
//! Failures are of two levels. **Connection**: an I/O error, no answer in time, an answer that is no Redis protocol or not what
//! the command answers. The link is held to be down from then on, so that the calls after it do not wait, until the keeper has
//! dialled a new one that answers a ping: this is the breaker, and the keeper's dials are its probes. **Call**: Redis answered with an
//! error, be it about the key (WRONGTYPE), its memory (OOM) or its state (LOADING, READONLY, MISCONF). That costs no waiting, so the link
//! stays up, unless a ping is refused too.

pub mod channel;
mod gather;
mod link;
mod many;
#[cfg(feature = "planted-faults")]
mod planted;
mod questions;
mod server;
mod whole;

pub use self::{
    many::Peeked,
    server::{Config, InvalidUrl, Server},
};

use std::{
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use redis::{Cmd, RedisWrite, Script};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    cache::{
        Copy,
        epochs::{Adopted, Epochs},
        layout,
        message::{Message, Origin},
        redis::{
            gather::Gather,
            link::{Keeper, Link, Standing, ask, tell},
            questions::{Entrance, Look, Publication},
        },
    },
    model::{ChangeKind, Entry, Key, Timestamp, Version, Write},
    telemetry::CacheMetrics,
};

/// How long Redis keeps a tombstone, a record past its expiry, and what is not in the store yet, at least: so long does it refuse an older
/// write that is late.
pub const KEPT_MIN: Duration = Duration::from_secs(60);

/// No copy is kept longer, whatever lifetime is asked: Redis refuses what overflows its clock.
const KEPT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// The one script.
const SCRIPT: &str = include_str!("redis/slot.lua");

/// Why a call to Redis failed. To a read it is a miss; a write may still land, or not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedisFailure {
    /// Redis is held to be down: nothing was sent, and nothing waited for.
    #[error("there is no connection to Redis")]
    Down,
    /// The epoch is not known yet, or holds for another server than the one that answers: nothing was sent.
    #[error("the epoch of the copies does not hold for this Redis")]
    NoEpoch,
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
            RedisFailure::Down | RedisFailure::NoEpoch | RedisFailure::Refused { .. } | RedisFailure::Foreign => false,
        }
    }
}

/// The right to land at a key's slot, for as long as nothing else changes it. Another replica may hold the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotToken([u8; 8]);

impl SlotToken {
    /// One that nobody has.
    pub fn random() -> SlotToken {
        // Zeros stand for none.
        SlotToken(rand::random_range(1..=u64::MAX).to_be_bytes())
    }
}

/// What came of asking for the load of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// The token, if it stands now; `None`: another load is under way, or a write.
    pub token: Option<SlotToken>,
    /// The copy that stands.
    pub copy: Option<Copy>,
}

/// The slot of a key as a write finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entered {
    /// The token to publish with.
    pub token: SlotToken,
    /// The version that stands.
    pub standing: Option<Version>,
}

/// How sure it is that what a write publishes is not older than what stood there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// It is in the store, or the store was asked since this token was left.
    Token(SlotToken),
    /// It may replace what is older, and enter no empty slot.
    Nothing,
    /// It was accepted just now, and is not in the store: into an empty slot, too, while its stamp is at most ten seconds old, and nothing as new
    /// has gone from there.
    Fresh,
}

/// What came of publishing a write. Nothing older stands in any case but `Late`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// This version stands: the write's own, or a higher one; or nothing does, and a higher one has gone.
    Stands(Version),
    /// Nothing stands: the slot was empty, or Redis has no room.
    Nothing,
    /// [`Hold::Fresh`] did not hold any more: nothing was done, and nobody told.
    Late,
}

/// L2, over one connection that belongs to the runtime on which it was started. Dropping it ends its keeper.
pub struct RedisCache {
    slots: Arc<Slots>,
    looks: Gather<Look>,
    entrances: Gather<Entrance>,
    publications: Gather<Publication>,
    /// Where this process hears its own beats.
    beats: String,
    load_wait: Duration,
    _keeper: AbortOnDropHandle<()>,
}

/// The slots, as they are reached over one connection.
#[derive(Debug)]
struct Slots {
    link: Arc<Link>,
    script: Script,
    epochs: Arc<Epochs>,
    /// How long an answer may take.
    timeout: Duration,
    /// The size of the largest answer to a look, of late.
    large_answer_bytes: AtomicUsize,
    /// Where the others hear what was written, and from whom.
    channel: String,
    origin: Origin,
}

impl RedisCache {
    /// Starts the connection's keeper on the current Tokio runtime and returns at once: until the first dial has succeeded, every
    /// call is a miss.
    pub fn start(
        config: &Config,
        server: &Server,
        epochs: Arc<Epochs>,
        origin: Origin,
        metrics: CacheMetrics,
    ) -> RedisCache {
        let link = Arc::new(Link::new(metrics));
        let keeper = Keeper::new(server.client.clone(), config, Arc::clone(&link));
        let script = SCRIPT;
        #[cfg(feature = "planted-faults")]
        let script = &*planted::or_unguarded(script);
        let slots = Slots {
            link,
            script: Script::new(script),
            epochs,
            timeout: config.timeout,
            large_answer_bytes: AtomicUsize::new(0),
            channel: channel::changes(&config.prefix),
            origin,
        };
        RedisCache {
            slots: Arc::new(slots),
            looks: Gather::new(),
            entrances: Gather::new(),
            publications: Gather::new(),
            beats: channel::beats(&config.prefix, origin),
            load_wait: config.load_wait,
            _keeper: AbortOnDropHandle::new(tokio::spawn(keeper.run())),
        }
    }

    /// Whether Redis is held to be up.
    pub fn is_up(&self) -> bool {
        self.slots.link.current().is_some()
    }

    /// The run of the server that answers; it changes with every restart, and with every other server.
    pub fn server(&self) -> Option<Arc<str>> {
        self.slots.link.current().map(|standing| standing.server)
    }

    /// Whether it is the server for which the epoch holds that answers: only then copies are shared.
    pub fn is_usable(&self) -> bool {
        self.slots
            .adopted()
            .and_then(|adopted| self.slots.link_to(&adopted))
            .is_ok()
    }

    /// How long a read waits for another's load.
    pub fn load_wait(&self) -> Duration {
        self.load_wait
    }

    /// The copy of a key; `None` is a miss, as is a value that is not ours. It may be past its lifetime, as a tombstone that is
    /// kept against late writes is: then it may not answer, but still says which version stood.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`RedisFailure`]: to a reader a miss.
    pub async fn get(&self, key: &Key) -> Result<Option<Copy>, RedisFailure> {
        let slot = self.looks.ask(&self.slots, Look(key.clone())).await;
        let slot = slot.inspect_err(|failure| self.slots.link.count(failure))?;
        Ok(slot.and_then(|slot| self.slots.decoded(slot)))
    }

    /// Leaves the token of a load, unless another's stands, and says what does.
    ///
    /// Dropped or failed, it may leave a token, which ends after ten seconds.
    ///
    /// # Errors
    /// [`RedisFailure`]: the load is to land nowhere.
    pub async fn claim(&self, key: &Key, token: SlotToken) -> Result<Claimed, RedisFailure> {
        self.claimed(&self.slots.run(key, "claim", &[&[&token.0]]).await?, token)
    }

    fn claimed(&self, answer: &[u8], token: SlotToken) -> Result<Claimed, RedisFailure> {
        let Some((mine, slot)) = answer.split_first() else {
            return Err(self.slots.foreign());
        };
        let copy = if slot.is_empty() {
            None
        } else {
            self.slots.decoded(slot.to_vec())
        };
        Ok(Claimed {
            token: (*mine == b'1').then_some(token),
            copy,
        })
    }

    /// Leaves the token of a write.
    ///
    /// Dropped or failed, it may leave a token, which ends after ten seconds.
    ///
    /// # Errors
    /// [`RedisFailure`]: what stands is not known.
    pub async fn enter(&self, key: &Key) -> Result<Entered, RedisFailure> {
        let entrance = Entrance(key.clone(), SlotToken::random());
        let entered = self.entrances.ask(&self.slots, entrance).await;
        entered.inspect_err(|failure| self.slots.link.count(failure))
    }

    /// Gives a load's token back. A failure leaves it until it ends.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn release(&self, key: &Key, token: SlotToken) -> Result<(), RedisFailure> {
        self.slots.run(key, "release", &[&[&token.0]]).await.map(drop)
    }

    /// Offers what the store said since `token` was left; a live record is kept for `grace` beyond its lifetime, to answer while the
    /// store cannot. Whether it stands now.
    ///
    /// Dropped or failed, it may land or not, and either is harmless.
    ///
    /// # Errors
    /// [`RedisFailure`]: whether it stands is not known.
    pub async fn land_load(
        &self,
        key: &Key,
        token: SlotToken,
        copy: &Copy,
        grace: Duration,
    ) -> Result<bool, RedisFailure> {
        let kept = millis(kept_for(copy, grace));
        let value = copy.entry.as_ref().and_then(|entry| entry.value.as_deref());
        let value: [&[u8]; 2] = [&layout::header(copy), value.unwrap_or_default()];
        let answer = self
            .slots
            .run(key, "load", &[&[&token.0], &value, &[kept.as_bytes()]])
            .await?;
        Ok(answer == b"1")
    }

    /// Publishes a write, as `copy`, with a grace as that of a load, and tells the other replicas.
    ///
    /// Dropped or failed, it may take effect or not: what is older may still stand.
    ///
    /// # Errors
    /// [`RedisFailure`]: what stands is not known, and whether the others know.
    pub async fn publish(
        &self,
        write: &Write,
        copy: &Copy,
        hold: Hold,
        grace: Duration,
    ) -> Result<Published, RedisFailure> {
        let (key, entry) = (&write.key, &write.entry);
        let (token, stamped_at, least) = match hold {
            Hold::Token(token) => (Some(token), None, Duration::ZERO),
            Hold::Nothing => (None, None, Duration::ZERO),
            Hold::Fresh => (None, Some(entry.version.stamped_at()), KEPT_MIN),
        };
        let publication = Publication {
            key: key.clone(),
            version: entry.version,
            token,
            stamped_at,
            header: layout::header(copy),
            value: entry.value.clone(),
            kept: kept_for(copy, grace).max(least),
        };
        let published = self.publications.ask(&self.slots, publication).await;
        published.inspect_err(|failure| self.slots.link.count(failure))
    }

    /// Removes the copy of a key if exactly `version` stands, and tells the other replicas. Whether it did.
    ///
    /// Dropped or failed, it may take effect or not.
    ///
    /// # Errors
    /// [`RedisFailure`]: the copy may still stand.
    pub async fn drop_version(&self, key: &Key, version: Version) -> Result<bool, RedisFailure> {
        let message = Message::Dropped {
            key: key.clone(),
            version,
        };
        let version = version.get().to_be_bytes();
        Ok(self.slots.tell(key, "drop", &message, &[&[&version]]).await? == b"1")
    }

    /// Removes what is older than `version`, and tells the other replicas: a write whose publishing failed has become known.
    ///
    /// Dropped or failed, it may take effect or not.
    ///
    /// # Errors
    /// [`RedisFailure`]: what is older may still stand.
    pub async fn purge(&self, key: &Key, version: Version) -> Result<(), RedisFailure> {
        let message = Message::Written {
            key: key.clone(),
            version,
            kind: ChangeKind::Invalidate,
        };
        let version = version.get().to_be_bytes();
        self.slots.tell(key, "purge", &message, &[&[&version]]).await.map(drop)
    }

    /// Removes whatever stands of a key, and tells the other replicas. Whether a copy did.
    ///
    /// Dropped or failed, it may take effect or not.
    ///
    /// # Errors
    /// [`RedisFailure`]: copies may still stand.
    pub async fn invalidate(&self, key: &Key) -> Result<bool, RedisFailure> {
        let message = Message::Invalidated { key: key.clone() };
        Ok(self.slots.tell(key, "invalidate", &message, &[]).await? == b"1")
    }
}

impl Slots {
    fn decoded(&self, slot: Vec<u8>) -> Option<Copy> {
        layout::decode(Bytes::from(slot)).unwrap_or_else(|layout::Foreign| {
            self.link.count(&RedisFailure::Foreign);
            None
        })
    }

    fn foreign(&self) -> RedisFailure {
        self.link.count(&RedisFailure::Foreign);
        RedisFailure::Foreign
    }

    async fn tell(
        &self,
        key: &Key,
        act: &str,
        message: &Message,
        arguments: &[&[&[u8]]],
    ) -> Result<Vec<u8>, RedisFailure> {
        let message = message.told(self.origin);
        let channel: [&[u8]; 1] = [self.channel.as_bytes()];
        let message: [&[u8]; 1] = [&message];
        let mut all: Vec<&[&[u8]]> = vec![&channel, &message];
        all.extend(arguments);
        self.run(key, act, &all).await
    }

    /// Runs the script by its hash; where Redis does not know it (at first, after a restart or SCRIPT FLUSH), by its text, which
    /// makes it known. The parts of an argument are sent as one.
    async fn run(&self, key: &Key, act: &str, arguments: &[&[&[u8]]]) -> Result<Vec<u8>, RedisFailure> {
        let argue = |command: &mut Cmd| {
            for parts in arguments {
                write_joined(command, parts);
            }
        };
        let answer = self.run_on(&[key], act, argue).await;
        answer.inspect_err(|failure| self.link.count(failure))
    }

    /// The same on the slots of many keys, with arguments that `argue` writes.
    async fn run_on(&self, keys: &[&Key], act: &str, argue: impl Fn(&mut Cmd)) -> Result<Vec<u8>, RedisFailure> {
        let adopted = self.adopted()?;
        let command = |how: &str, script: &str| {
            let mut command = Cmd::new();
            command.arg(how).arg(script).arg(keys.len());
            for key in keys {
                command.arg(self.epochs.place(&adopted, key));
            }
            argue(command.arg(act));
            command
        };
        let deadline = self.deadline();
        let by_hash = command("EVALSHA", self.script.get_hash());
        let mut answer = self.exchange(&adopted, &by_hash, deadline).await;
        if matches!(&answer, Err(RedisFailure::Refused { code }) if code == "NOSCRIPT") {
            answer = self.exchange(&adopted, &command("EVAL", SCRIPT), deadline).await;
        }
        answer?.ok_or(RedisFailure::Foreign)
    }

    fn adopted(&self) -> Result<Arc<Adopted>, RedisFailure> {
        self.epochs.adopted().ok_or(RedisFailure::NoEpoch)
    }

    /// One command and its answer, over the link that stands, if it leads to the server for which the epoch holds. A failure of the
    /// connection takes the link down.
    async fn exchange(
        &self,
        adopted: &Adopted,
        command: &Cmd,
        deadline: Instant,
    ) -> Result<Option<Vec<u8>>, RedisFailure> {
        let standing = self.link_to(adopted)?;
        self.ask_over(standing, command, deadline).await
    }

    /// The link that stands, if it leads to the server for which the epoch holds.
    fn link_to(&self, adopted: &Adopted) -> Result<Standing, RedisFailure> {
        let standing = self.link.current().ok_or(RedisFailure::Down)?;
        if adopted.server.as_deref() != Some(&*standing.server) {
            return Err(RedisFailure::NoEpoch);
        }
        Ok(standing)
    }

    /// One command that concerns no copies, whatever server answers.
    async fn ask_any(&self, command: &Cmd) -> Result<Option<Vec<u8>>, RedisFailure> {
        let standing = self.link.current().ok_or(RedisFailure::Down)?;
        self.ask_over(standing, command, self.deadline()).await
    }

    async fn ask_over(
        &self,
        mut standing: Standing,
        command: &Cmd,
        deadline: Instant,
    ) -> Result<Option<Vec<u8>>, RedisFailure> {
        let answer = ask(&mut standing.connection, command, deadline).await;
        answer.inspect_err(|failure| self.note(&standing, failure))
    }

    async fn tell_over(&self, mut standing: Standing, command: &Cmd) -> Result<u64, RedisFailure> {
        let told = tell(&mut standing.connection, command, self.deadline()).await;
        told.inspect_err(|failure| self.note(&standing, failure))
    }

    /// Takes the link down, if it is of no use any more.
    fn note(&self, standing: &Standing, failure: &RedisFailure) {
        if failure.is_of_connection() {
            self.link.fall(standing.number, failure);
        }
    }

    /// Notes the largest of the answers to one command; what is not met again fades.
    fn note_answer_bytes(&self, largest: usize) {
        // Of one thread's calls: none is lost between the two.
        let known = self.large_answer_bytes.load(Ordering::Relaxed);
        self.large_answer_bytes
            .store(largest.max(known - known.div_ceil(8)), Ordering::Relaxed);
    }

    /// What is no answer to what was asked: nobody knows any more which answer is whose.
    fn unheard_of(&self, standing: &Standing) -> RedisFailure {
        self.note(standing, &RedisFailure::Lost);
        RedisFailure::Lost
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
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

fn millis(kept: Duration) -> String {
    kept.clamp(Duration::from_millis(1), KEPT_MAX).as_millis().to_string()
}

/// How long Redis keeps a copy. A live record: its lifetime, and `grace`; an absence: its lifetime. An entry that will have expired by then, and
/// a tombstone: until it has refused late writes for [`KEPT_MIN`], for the older record would live again if it landed in the emptied slot.
fn kept_for(copy: &Copy, grace: Duration) -> Duration {
    let (now, lifetime): (Timestamp, Duration) = (copy.loaded_at, copy.lifetime());
    let useful = lifetime.saturating_add(grace);
    match &copy.entry {
        None => lifetime,
        Some(Entry { value: None, .. }) => lifetime.max(KEPT_MIN),
        Some(Entry {
            expires_at: Some(at), ..
        }) if at.since(now) < useful => at.since(now) + KEPT_MIN,
        Some(_) => useful,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn what_refuses_late_writes_is_kept_long_enough() {
        const NOW: Timestamp = Timestamp(1_000_000);
        let kept = |value: Option<&'static [u8]>, expires_in: Option<u64>, lifetime: u64| {
            let entry = Entry {
                version: Version::new(1).expect("positive"),
                value: value.map(Bytes::from_static),
                expires_at: expires_in.map(|secs| NOW.after(Duration::from_secs(secs))),
            };
            kept_for(
                &Copy::new(Some(entry), NOW, Duration::from_secs(lifetime)),
                Duration::ZERO,
            )
            .as_secs()
        };
        let live: Option<&[u8]> = Some(b"v");
        assert_eq!(kept(live, None, 300), 300);
        assert_eq!(kept(live, Some(1_000), 300), 300);
        assert_eq!(kept(live, Some(10), 300), 70);
        assert_eq!(kept(live, Some(0), 5), 60);
        assert_eq!(kept(None, None, 5), 60);
        assert_eq!(kept(None, None, 300), 300);
        assert_eq!(
            kept_for(&Copy::new(None, NOW, Duration::from_secs(5)), LONG).as_secs(),
            5
        );
        assert_eq!(millis(Duration::MAX), KEPT_MAX.as_millis().to_string());
        assert_eq!(millis(Duration::ZERO), "1");
    }

    #[test]
    fn a_grace_lengthens_the_life_of_live_records_alone() {
        const NOW: Timestamp = Timestamp(1_000_000);
        let kept = |value: Option<&'static [u8]>, expires_in: Option<u64>| {
            let entry = Entry {
                version: Version::new(1).expect("positive"),
                value: value.map(Bytes::from_static),
                expires_at: expires_in.map(|secs| NOW.after(Duration::from_secs(secs))),
            };
            kept_for(&Copy::new(Some(entry), NOW, Duration::from_secs(300)), LONG).as_secs()
        };
        assert_eq!(kept(Some(b"v"), None), 3900);
        assert_eq!(kept(Some(b"v"), Some(1_000)), 1_060, "no record outlives itself");
        assert_eq!(kept(None, None), 300);
    }
}
