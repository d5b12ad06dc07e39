//! One dedicated connection to PostgreSQL and its statements.
//!
//! Owns the calls. Does not own the SQL ([`super::statements`]), the meaning of errors ([`super::failure`]) nor how a session is opened
//! ([`super::Dialler`]).
//! Invariants: a session is kept only after a call that ended with it in a known state. For the time of a call it belongs to the call's
//! future, so a call that is cut off takes its session along, and the next one dials anew. Statements that change something are read to their end: the server commits after the last row.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use sqlx::{
    Connection as _, Row, Transaction,
    postgres::{PgBindIterExt, PgConnection, PgRow},
};

use crate::{
    model::{Answered, Entry, Epoch, Key, KeyedAnswer, RequestId, Timestamp, Version, Write},
    store::{
        Claimant, Committed, Connection, Control, DeadLetter, LOAD_BYTES_MAX, NODE_LEASE, NodeGrant, StoreError,
        StoreErrorKind,
        letters::{KeptLetter, LetterRange},
        operation::{Decided, Operation, RangeRow},
        postgres::{
            Dialler,
            collect::collect,
            control, decide,
            failure::Failure,
            keys, letters, requests,
            statements::{
                HORIZON, LEASE_NODE, LOAD, PROBE, RELEASE_NODE, RENEW_NODE, STANDING, UPSERT, UPSERT_AND_REMEMBER,
            },
            time::WireTime,
        },
        requests::of_writes,
        verdict::{Verdict, no_control_row},
    },
};

/// A connection: a session, or none until the next call dials.
pub(super) struct PostgresConnection {
    dialler: Arc<Dialler>,
    idle: Option<PgConnection>,
}

impl PostgresConnection {
    pub(super) fn new(dialler: Arc<Dialler>) -> PostgresConnection {
        PostgresConnection { dialler, idle: None }
    }

    /// The session, for the time of one call.
    async fn take(&mut self) -> Result<PgConnection, StoreError> {
        match self.idle.take() {
            Some(session) => Ok(session),
            None => self.dialler.session().await,
        }
    }

    /// Keeps the session for the next call if it is still good.
    fn settle<T>(&mut self, session: PgConnection, result: Result<T, Failure>) -> Result<T, StoreError> {
        match result {
            Ok(answer) => {
                self.idle = Some(session);
                Ok(answer)
            }
            Err(failure) => {
                if !failure.ends_session {
                    self.idle = Some(session);
                }
                Err(failure.error)
            }
        }
    }
}

#[async_trait]
impl Connection for PostgresConnection {
    async fn load(&mut self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let mut session = self.take().await?;
        let result = load(&mut session, keys).await;
        self.settle(session, result)
    }

    async fn commit(&mut self, writes: &[Write]) -> Result<Vec<Committed>, StoreError> {
        let mut session = self.take().await?;
        let result = commit(&mut session, writes).await;
        self.settle(session, result)
    }

    /// Succeeds if and only if the table takes an empty value under a new key of a namespace of its own, triggers and deferred
    /// constraints included. It cannot tell a constraint that every real row breaks but this one does not: such rows are held to be at
    /// fault, one by one. Nor one that only an empty value breaks: nothing is then held to be at fault.
    async fn probe(&mut self) -> Result<(), StoreError> {
        let mut session = self.take().await?;
        let result = probe(&mut session).await;
        self.settle(session, result)
    }

    async fn bury(&mut self, letter: &DeadLetter) -> Result<(), StoreError> {
        let mut session = self.take().await?;
        let result = letters::bury(&mut session, letter).await;
        self.settle(session, result)
    }

    async fn ping(&mut self) -> Result<(), StoreError> {
        let mut session = self.take().await?;
        let result = session.ping().await.map_err(Failure::from);
        self.settle(session, result)
    }

    async fn lease_node(&mut self, claimant: &Claimant) -> Result<NodeGrant, StoreError> {
        let mut session = self.take().await?;
        let result = lease_node(&mut session, claimant).await;
        self.settle(session, result)
    }

    async fn renew_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<bool, StoreError> {
        let mut session = self.take().await?;
        let result = update_node(&mut session, RENEW_NODE, claimant, (node, high_water)).await;
        self.settle(session, result)
    }

    async fn release_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<(), StoreError> {
        let mut session = self.take().await?;
        let result = update_node(&mut session, RELEASE_NODE, claimant, (node, high_water)).await;
        self.settle(session, result.map(drop))
    }

    async fn collect(&mut self, retention: Duration, rows_max: u32) -> Result<u64, StoreError> {
        let mut session = self.take().await?;
        let result = collect(&mut session, (retention, rows_max), self.dialler.writers_wait()).await;
        self.settle(session, result)
    }

    async fn control(&mut self) -> Result<Control, StoreError> {
        let mut session = self.take().await?;
        let result = control::control(&mut session).await;
        self.settle(session, result)
    }

    async fn move_epoch(&mut self, from: Epoch, to: Epoch, cache_server: Option<&str>) -> Result<bool, StoreError> {
        let mut session = self.take().await?;
        let result = control::move_epoch(&mut session, from, to, cache_server).await;
        self.settle(session, result)
    }

    async fn move_namespace_epoch(&mut self, namespace: &str, to: Epoch) -> Result<(), StoreError> {
        let mut session = self.take().await?;
        let result = control::move_namespace_epoch(&mut session, namespace, to).await;
        self.settle(session, result)
    }

    async fn tagged(
        &mut self,
        namespace: &str,
        tag: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError> {
        let mut session = self.take().await?;
        let result = keys::tagged(&mut session, (namespace, tag), after, limit).await;
        self.settle(session, result)
    }

    async fn keys_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError> {
        let mut session = self.take().await?;
        let result = keys::below(&mut session, (namespace, prefix), after, limit).await;
        self.settle(session, result)
    }

    async fn newest(&mut self, namespace: &str, limit: u32) -> Result<Vec<Key>, StoreError> {
        let mut session = self.take().await?;
        let result = keys::newest(&mut session, namespace, limit).await;
        self.settle(session, result)
    }

    /// A session that ended while it waited for this call is no reason to fail it: nothing was applied, so it is dialled anew, once.
    async fn decide(&mut self, operations: &[Operation], now: Timestamp) -> Result<Vec<Decided>, StoreError> {
        let mut session = self.take().await?;
        let lock_wait_max = self.dialler.lock_wait_max();
        let mut result = decide::decide(&mut session, operations, now, lock_wait_max).await;
        if matches!(&result, Err(failure) if failure.ends_session && failure.error.kind == StoreErrorKind::Transient) {
            session = self.dialler.session().await?;
            result = decide::decide(&mut session, operations, now, lock_wait_max).await;
        }
        self.settle(session, result)
    }

    async fn remember(&mut self, answers: &[KeyedAnswer]) -> Result<(), StoreError> {
        let mut session = self.take().await?;
        let result = requests::remember(&mut session, answers).await;
        self.settle(session, result)
    }

    async fn answers(&mut self, requests: &[(&str, &RequestId)]) -> Result<Vec<Option<Answered>>, StoreError> {
        let mut session = self.take().await?;
        let result = requests::answers(&mut session, requests).await;
        self.settle(session, result)
    }

    async fn forget_requests(&mut self, rows_max: u32) -> Result<u64, StoreError> {
        let mut session = self.take().await?;
        let result = requests::forget(&mut session, rows_max).await;
        self.settle(session, result)
    }

    async fn rows_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<RangeRow>, StoreError> {
        let mut session = self.take().await?;
        let result = keys::rows_below(&mut session, (namespace, prefix), after, limit).await;
        self.settle(session, result)
    }

    async fn are_buried(&mut self, writes: &[(&Key, Version)]) -> Result<Vec<bool>, StoreError> {
        let mut session = self.take().await?;
        let result = letters::are_buried(&mut session, writes).await;
        self.settle(session, result)
    }

    async fn letters(&mut self, range: LetterRange<'_>) -> Result<Vec<KeptLetter>, StoreError> {
        let mut session = self.take().await?;
        let result = letters::range(&mut session, range).await;
        self.settle(session, result)
    }

    async fn last_letter(&mut self) -> Result<i64, StoreError> {
        let mut session = self.take().await?;
        let result = letters::last(&mut session).await;
        self.settle(session, result)
    }

    async fn drop_letters(&mut self, ids: &[i64]) -> Result<u64, StoreError> {
        let mut session = self.take().await?;
        let result = letters::drop_all(&mut session, ids).await;
        self.settle(session, result)
    }

    async fn refuse_letter(
        &mut self,
        id: i64,
        code: Option<&str>,
        reason: &str,
    ) -> Result<Option<(u32, Timestamp)>, StoreError> {
        let mut session = self.take().await?;
        let result = letters::refuse(&mut session, id, code, reason).await;
        self.settle(session, result)
    }

    fn reset(&mut self) {
        self.idle = None;
    }
}

async fn load(session: &mut PgConnection, keys: &[Key]) -> Result<Vec<Option<Entry>>, Failure> {
    let mut entries = vec![None; keys.len()];
    if keys.is_empty() {
        return Ok(entries);
    }
    let rows = sqlx::query(LOAD)
        .bind(keys.iter().map(Key::namespace).bind_iter())
        .bind(keys.iter().map(Key::key).bind_iter())
        .bind(LOAD_BYTES_MAX as i64)
        .fetch_all(session)
        .await?;
    // Where the answer ends: rows come in any order.
    let mut end = keys.len();
    for row in rows {
        if row.try_get(4)? {
            let position: i64 = row.try_get(0)?;
            end = end.min(usize::try_from(position - 1).unwrap_or(0));
        } else if let Some(slot) = slot(&mut entries, &row)? {
            let value: Option<&[u8]> = row.try_get(2)?;
            let expires_at: Option<WireTime> = row.try_get(3)?;
            *slot = Some(Entry {
                version: version(row.try_get(1)?)?,
                value: value.map(bytes::Bytes::copy_from_slice),
                expires_at: expires_at.map(|time| time.0),
            });
        }
    }
    entries.truncate(end);
    Ok(entries)
}

async fn commit(session: &mut PgConnection, writes: &[Write]) -> Result<Vec<Committed>, Failure> {
    if writes.is_empty() {
        return Ok(Vec::new());
    }
    let named = of_writes(writes);
    let upsert = if named.is_empty() { UPSERT } else { UPSERT_AND_REMEMBER };
    #[cfg(not(feature = "planted-faults"))]
    let query = sqlx::query(upsert);
    #[cfg(feature = "planted-faults")]
    let query = super::planted::or_unguarded(upsert);
    let query = query
        .bind(writes.iter().map(|write| write.key.namespace()).bind_iter())
        .bind(writes.iter().map(|write| write.key.key()).bind_iter())
        .bind(writes.iter().map(|write| write.entry.version.get()).bind_iter())
        .bind(writes.iter().map(|write| write.entry.value.as_deref()).bind_iter())
        .bind(
            writes
                .iter()
                .map(|write| write.entry.expires_at.map(WireTime))
                .bind_iter(),
        )
        .bind(writes.iter().map(|write| keys::array_text(&write.tags)).bind_iter());
    let query = if named.is_empty() {
        query
    } else {
        requests::bind(query, &named)
    };
    let rows = query.fetch_all(&mut *session).await?;
    #[cfg(feature = "planted-faults")]
    super::planted::forget_tombstones(session, writes).await?;
    if rows.len() == writes.len() {
        return Ok(vec![Committed::Applied; writes.len()]);
    }
    // From here on the upsert is committed: no failure may say that nothing was applied.
    let verdict = settle_losers(session, writes, &rows).await;
    verdict.map_err(Failure::after_effect)
}

/// The versions that the losers lost to. A statement of its own, for a row that was committed while the upsert ran beats a write without
/// being in the upsert's snapshot.
async fn settle_losers(
    session: &mut PgConnection,
    writes: &[Write],
    winners: &[PgRow],
) -> Result<Vec<Committed>, Failure> {
    let mut verdict = Verdict::new(writes);
    for row in winners {
        verdict.applied(row.try_get(0)?, row.try_get(1)?);
    }
    let losers = verdict.losers();
    let mut standing = vec![None; losers.len()];
    let rows = sqlx::query(STANDING)
        .bind(losers.iter().map(|key| key.namespace()).bind_iter())
        .bind(losers.iter().map(|key| key.key()).bind_iter())
        .fetch_all(&mut *session)
        .await?;
    for row in rows {
        if let Some(slot) = slot(&mut standing, &row)? {
            *slot = Some(version(row.try_get(1)?)?);
        }
    }
    let horizon = if standing.contains(&None) {
        horizon(session).await?
    } else {
        None
    };
    Ok(verdict.settle(&standing, horizon))
}

async fn horizon(session: &mut PgConnection) -> Result<Option<Version>, Failure> {
    let rows = sqlx::query(HORIZON).fetch_all(session).await?;
    let row = rows.first().ok_or_else(no_control_row)?;
    Ok(Version::new(row.try_get(0)?))
}

async fn probe(session: &mut PgConnection) -> Result<(), Failure> {
    let mut transaction = session.begin().await?;
    let tried = try_row(&mut transaction).await;
    roll_back(transaction, tried).await
}

async fn try_row(session: &mut PgConnection) -> Result<(), Failure> {
    sqlx::query(PROBE).execute(&mut *session).await?;
    sqlx::query("set constraints all immediate").execute(session).await?;
    Ok(())
}

/// Rolls back and waits for it. Left to its drop, the driver's transaction may spoil the next `begin` of the session.
pub(super) async fn roll_back<T>(
    transaction: Transaction<'_, sqlx::Postgres>,
    result: Result<T, Failure>,
) -> Result<T, Failure> {
    if !matches!(&result, Err(failure) if failure.ends_session) {
        transaction.rollback().await?;
    }
    result
}

async fn lease_node(session: &mut PgConnection, claimant: &Claimant) -> Result<NodeGrant, Failure> {
    let mut transaction = session.begin().await?;
    match choose_node(&mut transaction, claimant).await {
        Ok(grant) => {
            transaction.commit().await?;
            Ok(grant)
        }
        Err(failure) => roll_back(transaction, Err(failure)).await,
    }
}

async fn choose_node(session: &mut PgConnection, claimant: &Claimant) -> Result<NodeGrant, Failure> {
    // One claimant at a time; renewals wait for it too. A statement after the lock sees what the one before it did.
    sqlx::query("lock table tidegate_nodes in share row exclusive mode")
        .execute(&mut *session)
        .await?;
    let rows = sqlx::query(LEASE_NODE)
        .bind(&claimant.directory)
        .bind(&claimant.start)
        .bind(millis(NODE_LEASE))
        .fetch_all(session)
        .await?;
    let row = rows.first().ok_or_else(no_node)?;
    let node: i32 = row.try_get(0)?;
    let high_water: Option<i64> = row.try_get(1)?;
    Ok(NodeGrant {
        node: u16::try_from(node).map_err(|_| no_node())?,
        high_water: high_water.and_then(Version::new),
    })
}

fn no_node() -> StoreError {
    StoreError::new(
        StoreErrorKind::Rejected,
        "no node id is free: each of the 1,023 was leased within a day, see tidegate_nodes",
    )
}

/// Runs a statement on the node that the claimant holds. Whether it holds it.
async fn update_node(
    session: &mut PgConnection,
    statement: &'static str,
    claimant: &Claimant,
    (node, high_water): (u16, Option<Version>),
) -> Result<bool, Failure> {
    let done = sqlx::query(statement)
        .bind(i32::from(node))
        .bind(&claimant.directory)
        .bind(&claimant.start)
        .bind(high_water.map(Version::get))
        .execute(session)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// The place that a row of a query `with ordinality` belongs to. It counts from one.
pub(super) fn slot<'a, T>(slots: &'a mut [T], row: &PgRow) -> Result<Option<&'a mut T>, Failure> {
    let position: i64 = row.try_get(0)?;
    let place = usize::try_from(position - 1).ok();
    Ok(place.and_then(|place| slots.get_mut(place)))
}

pub(super) fn version(number: i64) -> Result<Version, Failure> {
    Version::new(number).ok_or_else(|| {
        let message = "tidegate_entries holds a version that is not positive: mend the row";
        StoreError::new(StoreErrorKind::Transient, message).into()
    })
}

/// A duration for the server, at most a thousand years: it has to be subtracted from its clock.
pub(super) fn millis(duration: Duration) -> i64 {
    let longest = Timestamp(0).after(Duration::from_secs(1_000 * 366 * 86_400));
    Timestamp(0).after(duration).min(longest).0
}
