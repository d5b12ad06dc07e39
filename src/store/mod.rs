//! The store: where records live for good.
//!
//! Owns the seam to a database: the [`Backend`] and [`Connection`] traits and what their errors mean; [`Session`] is the guarded
//! connection that everything else uses. Does not own caching, queueing or retrying a write (its callers do). Invariants: a
//! store is a max-register per key, so a commit may be repeated; an error of a commit says whether it may have taken effect; a
//! key whose row was collected stays absent for every version at or below the horizon, so what was deleted never comes back.
//!
//! In reading order: this file, [`commit`] (write-through shares commits), [`operation`] and [`decisions`] (what only the
//! store can decide), [`load`] (misses share queries), [`ranges`] (scans), [`letters`] (what operators ask of dead letters), [`watch`] (whether the
//! store answers), [`control`] (what all gateways of a store share), [`node`] (the lease of a node id), [`collect`] (old tombstones), then the backends.

mod aside;
pub mod breaker;
pub mod collect;
pub mod commit;
mod config;
pub mod control;
mod decide;
pub mod decisions;
#[cfg(test)]
pub mod fake;
mod gather;
pub mod letters;
pub mod load;
mod lookups;
pub mod node;
pub mod operation;
pub mod postgres;
mod prefix;
pub mod ranges;
mod requests;
mod session;
pub mod sqlite;
mod tries;
mod verdict;
pub mod watch;

pub use config::Config;
pub use control::{Control, NamespaceMoved};
pub use session::{Session, Store};

use std::{error, fmt, time::Duration};

use async_trait::async_trait;

use crate::model::{Answered, Entry, Epoch, Key, KeyedAnswer, RequestId, Timestamp, Version, Write};

use self::{
    letters::{KeptLetter, LetterRange},
    operation::{Decided, Operation, RangeRow},
};

/// What the store did with one write of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    /// The store holds the write: now, or already from an earlier try (the same version stands).
    Applied,
    /// The store neither wrote it nor holds anything of its key that explains why: a trigger or a rule swallowed the row, or somebody
    /// deleted what it lost to.
    Skipped,
    /// The store holds something newer, and left it.
    Superseded {
        /// The version that stands.
        standing: Version,
    },
    /// The store has no row for the key, and what once stood there may have been newer: the write is not taken, now or ever. Any
    /// version above the horizon is.
    BelowHorizon {
        /// At or above the versions of all rows that were ever collected.
        horizon: Version,
    },
}

/// What a failure of the store means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// Nothing was sent: no connection could be made, or the breaker is open.
    Unreachable,
    /// The store refused or rolled back, for a reason that will pass: a deadlock, a full disk, a read-only standby, a missing
    /// table. Nothing was applied. The same call may succeed later.
    Transient,
    /// The connection was lost, or time ran out, after something was sent: a commit may have taken effect.
    Unknown,
    /// A row is refused for what it holds: it will be refused again. Nothing of the statement was applied.
    Rejected,
}

/// The SQLSTATE of a wait for a lock that took too long.
pub(crate) const LOCK_NOT_AVAILABLE: &str = "55P03";

/// A failure of the store. Its text holds no row and no credential.
#[derive(Debug, Clone)]
pub struct StoreError {
    /// What it means.
    pub kind: StoreErrorKind,
    /// The SQLSTATE, or SQLite's result code as text.
    pub code: Option<String>,
    /// The store's primary message: no detail, no hint, for those quote rows.
    pub message: String,
}

impl StoreError {
    /// A failure without a code of the store.
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> StoreError {
        StoreError {
            kind,
            code: None,
            message: message.into(),
        }
    }
}

impl StoreError {
    /// Whether another session held what the call needed for longer than the call may wait: PostgreSQL's `lock_not_available`. Nothing was applied.
    pub(crate) fn is_held(&self) -> bool {
        self.kind == StoreErrorKind::Transient && self.code.as_deref() == Some(LOCK_NOT_AVAILABLE)
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.code {
            Some(code) => write!(f, "{} code={code}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl error::Error for StoreError {}

/// A write that the store refuses for good, as the dead-letter table keeps it.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// The refused write, under its own version.
    pub write: Write,
    /// The store's code for the refusal, or [`DeadLetter::BELOW_HORIZON`].
    pub code: Option<String>,
    /// The store's message.
    pub reason: String,
}

/// The longest reason that the dead-letter table keeps, in characters.
const REASON_CHARS_MAX: usize = 1_000;

impl DeadLetter {
    /// The code of a write that came too late. Like a SQLSTATE, of a class that no server uses.
    pub const BELOW_HORIZON: &str = "TG001";

    /// A write that the store answered with [`Committed::BelowHorizon`].
    pub fn below_horizon(write: Write, horizon: Version) -> DeadLetter {
        DeadLetter {
            write,
            code: Some(DeadLetter::BELOW_HORIZON.to_owned()),
            reason: format!(
                "the write came later than the retention of deleted records allows: its key has no row, and its version is not above \
                 the horizon {}, so it might bring back what was deleted after it",
                horizon.get()
            ),
        }
    }

    /// The reason as the table can keep it: bounded, and without NUL, the one character that PostgreSQL's text does not hold.
    fn kept_reason(&self) -> String {
        kept_reason(&self.reason)
    }
}

fn kept_reason(reason: &str) -> String {
    let characters = reason.chars().filter(|c| *c != '\0');
    characters.take(REASON_CHARS_MAX).collect()
}

/// Who asks for a node id.
#[derive(Debug, Clone)]
pub struct Claimant {
    /// A random mark kept with the data directory: a restart gets its node back.
    pub directory: String,
    /// A random mark of this start: an earlier process that still lives loses the lease to a later one.
    pub start: String,
}

/// A node id, leased to one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeGrant {
    /// The id: 0 where the store serves a single gateway, else 1 to 1,023.
    pub node: u16,
    /// The highest version that this id's earlier holders reported. The clock must start above it.
    pub high_water: Option<Version>,
}

/// How long a lease of a node id lasts beyond its last renewal, before another gateway may take it.
pub const NODE_LEASE: Duration = Duration::from_secs(24 * 3600);

/// How many bytes of values one call of [`Connection::load`] brings up, and one value more: so much is in memory twice for a moment.
pub const LOAD_BYTES_MAX: usize = 16 << 20;

/// How many namespaces have an epoch of their own at a time, give or take those that get theirs at once: every gateway reads all of them each
/// second.
pub const NAMESPACE_EPOCHS_MAX: u32 = 1_000;

/// Checks a store's URL, without I/O but for `~/.pgpass`.
///
/// # Errors
/// [`StoreErrorKind::Rejected`], saying what is wrong and nothing that the URL holds.
pub fn check_url(url: &str) -> Result<(), StoreError> {
    if url.starts_with("sqlite:") {
        sqlite::check_url(url)
    } else if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        let tables = postgres::Tables::Check;
        postgres::Postgres::new(url, Duration::from_secs(1), tables).map(drop)
    } else {
        let message = "the store's URL must begin with postgres:// or sqlite://";
        Err(StoreError::new(StoreErrorKind::Rejected, message))
    }
}

/// A kind of database.
pub trait Backend: Send + Sync + 'static {
    /// How many connections can commit at once with profit: one where the database has a single writer.
    fn writers_max(&self) -> usize;

    /// A connection of its own. Does no I/O: the first call connects, and so does the first call after the connection broke.
    fn connection(&self) -> Box<dyn Connection>;
}

/// One connection to the database. Calls are not cancel-safe: a call whose future was dropped leaves the connection unusable
/// until [`Connection::reset`].
#[async_trait]
pub trait Connection: Send {
    /// The entries of keys, tombstones included, in the order of `keys`; `None` for a key without a row. Keys are distinct.
    /// Sees every commit that was answered before the call. Ends after the first value with which all of them are more than [`LOAD_BYTES_MAX`]
    /// together: then the answer is shorter than `keys`, and never empty where those are not.
    async fn load(&mut self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError>;

    /// Applies writes in one transaction: all of them, each unless the store holds something newer or may have collected it, or (on an
    /// error) none. Keys are distinct and sorted. What happened to each, in the order of `writes`. In the same transaction it remembers
    /// the answered requests of all of them, whether the store takes the write or not; one that is known stays as it is.
    async fn commit(&mut self, writes: &[Write]) -> Result<Vec<Committed>, StoreError>;

    /// Decides operations in one transaction, and applies those that can be: all of these, or (on an error) none. Sorted by key, then by
    /// version: of one key each sees what the one before it left, and what the last one left is written. A record that has expired at `now`, by the
    /// gateway's clock, is not there. What became of each, in their order.
    async fn decide(&mut self, operations: &[Operation], now: Timestamp) -> Result<Vec<Decided>, StoreError>;

    /// Remembers how requests were answered whose writes are not written by [`Connection::commit`]. One that is known stays as it is.
    async fn remember(&mut self, answers: &[KeyedAnswer]) -> Result<(), StoreError>;

    /// What is remembered of requests, each named by its namespace and its id, in their order. One whose window is over may be answered or not.
    async fn answers(&mut self, requests: &[(&str, &RequestId)]) -> Result<Vec<Option<Answered>>, StoreError>;

    /// Forgets up to `rows_max` requests whose window is over for a minute by the store's clock, for no gateway's clock is further behind: how many.
    async fn forget_requests(&mut self, rows_max: u32) -> Result<u64, StoreError>;

    /// The rows of a namespace whose keys begin with `prefix`, live or not, in order, from the first one after `after`; at most `limit`. If they
    /// are fewer there are no more. A prefix holds no NUL.
    ///
    /// # Errors
    /// As of [`Connection::tagged`].
    async fn rows_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<RangeRow>, StoreError>;

    /// Of each key, whether the dead-letter table holds this version of it or a higher one, in the order of `writes`: a write that was coalesced
    /// goes there under the version of the one that covers it.
    async fn are_buried(&mut self, writes: &[(&Key, Version)]) -> Result<Vec<bool>, StoreError>;

    /// Writes a harmless row to the table of entries and takes it back: an error means that the table refuses every row.
    async fn probe(&mut self) -> Result<(), StoreError>;

    /// Keeps a refused write in the dead-letter table. Repeating it keeps it once. Its requests are not remembered: it was not written.
    async fn bury(&mut self, letter: &DeadLetter) -> Result<(), StoreError>;

    /// Dead letters, in the order of their ids.
    ///
    /// # Errors
    /// [`StoreErrorKind::Transient`], too, when a row is one that no gateway wrote.
    async fn letters(&mut self, range: LetterRange<'_>) -> Result<Vec<KeptLetter>, StoreError>;

    /// The highest id of a dead letter; 0: there is none.
    async fn last_letter(&mut self) -> Result<i64, StoreError>;

    /// Deletes dead letters by their ids: how many there were.
    async fn drop_letters(&mut self, ids: &[i64]) -> Result<u64, StoreError>;

    /// Notes that a dead letter was refused once more, and why. How often it was, and when, from now on; `None`: there is no such letter.
    async fn refuse_letter(
        &mut self,
        id: i64,
        code: Option<&str>,
        reason: &str,
    ) -> Result<Option<(u32, Timestamp)>, StoreError>;

    /// Asks whether the database answers.
    async fn ping(&mut self) -> Result<(), StoreError>;

    /// Leases a node id: the one that the claimant's directory had, else a free one.
    ///
    /// # Errors
    /// [`StoreErrorKind::Rejected`] when none is free.
    async fn lease_node(&mut self, claimant: &Claimant) -> Result<NodeGrant, StoreError>;

    /// Renews the lease and reports the clock's high-water mark. `false`: the lease is lost, somebody else has the node.
    async fn renew_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<bool, StoreError>;

    /// Gives the lease back, with the final high-water mark.
    async fn release_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<(), StoreError>;

    /// Deletes up to `rows_max` tombstones and expired rows of which all is before `now - retention` by the store's clock: expiry, commit
    /// and stamp. How many it deleted. First it raises the horizon to their highest version, and waits until no commit runs that may
    /// have begun without seeing that. Two that collect at once do not disturb each other.
    ///
    /// Cut off or failed, it may leave the horizon raised and rows in place, which the next one finds.
    ///
    /// # Errors
    /// [`StoreErrorKind::Transient`], too, when a commit from before goes on for longer than the wait's bound.
    async fn collect(&mut self, retention: Duration, rows_max: u32) -> Result<u64, StoreError>;

    /// What all gateways of the store share, and the store's clock, all of one moment: a small query.
    ///
    /// # Errors
    /// [`StoreErrorKind::Transient`], too, when the row is gone.
    async fn control(&mut self) -> Result<Control, StoreError>;

    /// Moves the epoch of the shared cache, if `from` still stands: the namespaces' own epochs end with it. `cache_server` is the one for which the
    /// new epoch holds; `None` keeps it. `false`: another epoch stands, perhaps the one that an earlier try of this call has set.
    async fn move_epoch(&mut self, from: Epoch, to: Epoch, cache_server: Option<&str>) -> Result<bool, StoreError>;

    /// Sets the epoch of a namespace; of two that do so at once the last one wins. At most [`NAMESPACE_EPOCHS_MAX`] namespaces have one of their
    /// own: for one more, `to` becomes the epoch of the whole shared cache, which invalidates this namespace with all others.
    async fn move_namespace_epoch(&mut self, namespace: &str, to: Epoch) -> Result<(), StoreError>;

    /// The keys of a namespace whose records have a tag, live or not, in order, from the first one after `after`; at most `limit`. If they are
    /// fewer there are no more. Goes through all records of any namespace that have the tag, each time.
    ///
    /// # Errors
    /// [`StoreErrorKind::Transient`], too, when a row has a key that no gateway wrote.
    async fn tagged(
        &mut self,
        namespace: &str,
        tag: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError>;

    /// The keys of a namespace that begin with `prefix` (the empty one is every key's) and have a row, live or not, in order, from the first one
    /// after `after`; at most `limit`. If they are fewer there are no more. A prefix holds no NUL.
    ///
    /// # Errors
    /// As of [`Connection::tagged`].
    async fn keys_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError>;

    /// The keys of a namespace's live records, those written last first; at most `limit`. Goes through all rows of the namespace, for an index
    /// by version would cost every overwrite more: with some millions of them it may not end within the time of a call.
    ///
    /// # Errors
    /// As of [`Connection::tagged`].
    async fn newest(&mut self, namespace: &str, limit: u32) -> Result<Vec<Key>, StoreError>;

    /// Drops the connection: the next call connects anew.
    fn reset(&mut self);
}

/// A row whose key is none: somebody wrote it past the gateway.
fn no_key() -> StoreError {
    let message = "tidegate_entries holds a key that is empty, too long or has a NUL character: mend the row";
    StoreError::new(StoreErrorKind::Transient, message)
}
