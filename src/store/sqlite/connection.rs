//! A session's share of the SQLite file, and the statements.
//!
//! Owns the calls. Does not own the SQL ([`super::statements`]), the meaning of errors ([`super::failure`]) nor how the file is opened
//! ([`super::DatabaseFile`]).
//! Invariants: everything that writes goes through the one writer, in turn; reads have a connection of their own and never wait for it. A
//! connection is kept only after a call that left it in a known state; during a call it belongs to the call's future.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Connection as _, Row, Transaction,
    sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow},
};
use tokio::sync::MutexGuard;

use crate::{
    model::{Answered, Entry, Epoch, Key, KeyedAnswer, RequestId, Timestamp, Version, Write},
    store::{
        Claimant, Committed, Connection, Control, DeadLetter, LOAD_BYTES_MAX, NodeGrant, StoreError, StoreErrorKind,
        letters::{KeptLetter, LetterRange},
        operation::{Decided, Operation, RangeRow},
        requests::of_writes,
        sqlite::{
            DatabaseFile, control, decide,
            failure::Failure,
            keys, letters, requests,
            statements::{
                COLLECT, HORIZON, LEASE_NODE, LOAD, PROBE, RAISE_HORIZON, RELEASE_NODE, REMEMBER, RENEW_NODE, STANDING,
                UPSERT, pieces,
            },
        },
        verdict::{Verdict, no_control_row},
    },
};

/// A session's connection: one for reading, and its turns at the writer.
pub(super) struct SharedConnection {
    file: Arc<DatabaseFile>,
    reader: Option<SqliteConnection>,
}

impl SharedConnection {
    pub(super) fn new(file: Arc<DatabaseFile>) -> SharedConnection {
        SharedConnection { file, reader: None }
    }

    async fn take_reader(&mut self) -> Result<SqliteConnection, StoreError> {
        match self.reader.take() {
            Some(reader) => Ok(reader),
            None => open(&self.file.reading).await,
        }
    }
}

type WriterSlot<'a> = MutexGuard<'a, Option<SqliteConnection>>;

impl DatabaseFile {
    /// Waits for its turn. The slot is empty until [`settle`] fills it.
    async fn take_writer(&self) -> Result<(WriterSlot<'_>, SqliteConnection), StoreError> {
        let mut slot = self.writer.lock().await;
        let writer = match slot.take() {
            Some(writer) => writer,
            None => open(&self.writing).await?,
        };
        Ok((slot, writer))
    }
}

/// Opens a connection. Nothing of a call is sent yet, so every failure is [`StoreErrorKind::Unreachable`].
async fn open(options: &SqliteConnectOptions) -> Result<SqliteConnection, StoreError> {
    SqliteConnection::connect_with(options)
        .await
        .map_err(|error| StoreError {
            kind: StoreErrorKind::Unreachable,
            ..Failure::from(error).error
        })
}

/// Keeps the connection for the next call if it is still good.
fn settle<T>(
    slot: &mut Option<SqliteConnection>,
    connection: SqliteConnection,
    result: Result<T, Failure>,
) -> Result<T, StoreError> {
    match result {
        Ok(answer) => {
            *slot = Some(connection);
            Ok(answer)
        }
        Err(failure) => {
            if !failure.ends_connection {
                *slot = Some(connection);
            }
            Err(failure.error)
        }
    }
}

#[async_trait]
impl Connection for SharedConnection {
    async fn load(&mut self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = load(&mut reader, keys).await;
        settle(&mut self.reader, reader, result)
    }

    async fn commit(&mut self, writes: &[Write]) -> Result<Vec<Committed>, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = commit(&mut writer, writes).await;
        settle(&mut slot, writer, result)
    }

    /// Succeeds if and only if the table takes an empty value under a key of a namespace of its own, triggers included. Its limits are
    /// those of PostgreSQL's.
    async fn probe(&mut self) -> Result<(), StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = probe(&mut writer).await;
        settle(&mut slot, writer, result)
    }

    async fn bury(&mut self, letter: &DeadLetter) -> Result<(), StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = letters::bury(&mut writer, letter).await;
        settle(&mut slot, writer, result)
    }

    /// Reads from the file: its connection's thread alone would always answer.
    async fn ping(&mut self) -> Result<(), StoreError> {
        let mut reader = self.take_reader().await?;
        let result = sqlx::query("select exists (select 1 from tidegate_entries)")
            .fetch_one(&mut reader)
            .await
            .map(drop)
            .map_err(Failure::from);
        settle(&mut self.reader, reader, result)
    }

    async fn lease_node(&mut self, claimant: &Claimant) -> Result<NodeGrant, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = lease_node(&mut writer, claimant).await;
        settle(&mut slot, writer, result)
    }

    async fn renew_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<bool, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = update_node(&mut writer, RENEW_NODE, claimant, (node, high_water)).await;
        settle(&mut slot, writer, result)
    }

    async fn release_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<(), StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = update_node(&mut writer, RELEASE_NODE, claimant, (node, high_water)).await;
        settle(&mut slot, writer, result.map(drop))
    }

    async fn collect(&mut self, retention: Duration, rows_max: u32) -> Result<u64, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = collect(&mut writer, retention, rows_max).await;
        settle(&mut slot, writer, result)
    }

    async fn control(&mut self) -> Result<Control, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = control::control(&mut reader).await;
        settle(&mut self.reader, reader, result)
    }

    async fn move_epoch(&mut self, from: Epoch, to: Epoch, cache_server: Option<&str>) -> Result<bool, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = control::move_epoch(&mut writer, from, to, cache_server).await;
        settle(&mut slot, writer, result)
    }

    async fn move_namespace_epoch(&mut self, namespace: &str, to: Epoch) -> Result<(), StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = control::move_namespace_epoch(&mut writer, namespace, to).await;
        settle(&mut slot, writer, result)
    }

    async fn tagged(
        &mut self,
        namespace: &str,
        tag: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = keys::tagged(&mut reader, (namespace, tag), after, limit).await;
        settle(&mut self.reader, reader, result)
    }

    async fn keys_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = keys::below(&mut reader, (namespace, prefix), after, limit).await;
        settle(&mut self.reader, reader, result)
    }

    async fn newest(&mut self, namespace: &str, limit: u32) -> Result<Vec<Key>, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = keys::newest(&mut reader, namespace, limit).await;
        settle(&mut self.reader, reader, result)
    }

    async fn decide(&mut self, operations: &[Operation], now: Timestamp) -> Result<Vec<Decided>, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = decide::decide(&mut writer, operations, now).await;
        settle(&mut slot, writer, result)
    }

    async fn remember(&mut self, answers: &[KeyedAnswer]) -> Result<(), StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = requests::remember(&mut writer, answers).await;
        settle(&mut slot, writer, result)
    }

    async fn answers(&mut self, requests: &[(&str, &RequestId)]) -> Result<Vec<Option<Answered>>, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = requests::answers(&mut reader, requests).await;
        settle(&mut self.reader, reader, result)
    }

    async fn forget_requests(&mut self, rows_max: u32) -> Result<u64, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = requests::forget(&mut writer, rows_max).await;
        settle(&mut slot, writer, result)
    }

    async fn rows_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<RangeRow>, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = keys::rows_below(&mut reader, (namespace, prefix), after, limit).await;
        settle(&mut self.reader, reader, result)
    }

    async fn are_buried(&mut self, writes: &[(&Key, Version)]) -> Result<Vec<bool>, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = letters::are_buried(&mut reader, writes).await;
        settle(&mut self.reader, reader, result)
    }

    async fn letters(&mut self, range: LetterRange<'_>) -> Result<Vec<KeptLetter>, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = letters::range(&mut reader, range).await;
        settle(&mut self.reader, reader, result)
    }

    async fn last_letter(&mut self) -> Result<i64, StoreError> {
        let mut reader = self.take_reader().await?;
        let result = letters::last(&mut reader).await;
        settle(&mut self.reader, reader, result)
    }

    async fn drop_letters(&mut self, ids: &[i64]) -> Result<u64, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = letters::drop_all(&mut writer, ids).await;
        settle(&mut slot, writer, result)
    }

    async fn refuse_letter(
        &mut self,
        id: i64,
        code: Option<&str>,
        reason: &str,
    ) -> Result<Option<(u32, Timestamp)>, StoreError> {
        let (mut slot, mut writer) = self.file.take_writer().await?;
        let result = letters::refuse(&mut writer, id, code, reason).await;
        settle(&mut slot, writer, result)
    }

    /// Drops the reader. The writer needs none: a call that was cut off has taken it along.
    fn reset(&mut self) {
        self.reader = None;
    }
}

async fn load(reader: &mut SqliteConnection, keys: &[Key]) -> Result<Vec<Option<Entry>>, Failure> {
    let mut entries = vec![None; keys.len()];
    let mut bytes = 0;
    for (offset, piece, statement) in pieces(&LOAD, keys) {
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for key in piece {
            query = query.bind(key.namespace()).bind(key.key());
        }
        // In the order of the keys; dropped, it ends there.
        let mut rows = query.fetch(&mut *reader);
        while let Some(row) = rows.try_next().await? {
            let place = place(&row)?;
            if let Some(slot) = place.and_then(|place| entries.get_mut(offset + place)) {
                let value: Option<Vec<u8>> = row.try_get(2)?;
                let expires_at: Option<i64> = row.try_get(3)?;
                bytes += value.as_ref().map_or(0, Vec::len);
                *slot = Some(Entry {
                    version: version(row.try_get(1)?)?,
                    value: value.map(Into::into),
                    expires_at: expires_at.map(Timestamp),
                });
            }
            if let Some(place) = place
                && bytes > LOAD_BYTES_MAX
            {
                entries.truncate(offset + place + 1);
                return Ok(entries);
            }
        }
    }
    Ok(entries)
}

async fn commit(writer: &mut SqliteConnection, writes: &[Write]) -> Result<Vec<Committed>, Failure> {
    let named = of_writes(writes);
    // A batch of one statement is a transaction by itself.
    if writes.len() <= 1 && named.is_empty() {
        let mut verdict = Verdict::new(writes);
        upsert(writer, writes, &mut verdict).await?;
        return settle_losers(writer, verdict).await.map_err(Failure::after_effect);
    }
    let mut transaction = writer.begin_with("begin immediate").await?;
    let mut verdict = Verdict::new(writes);
    let settled = async {
        upsert(&mut transaction, writes, &mut verdict).await?;
        requests::insert(&mut transaction, &REMEMBER, &named).await?;
        settle_losers(&mut transaction, verdict).await
    };
    let settled = settled.await;
    end(transaction, settled).await
}

/// Commits what went well, and rolls back and waits for it where something did not.
pub(super) async fn end<T>(
    transaction: Transaction<'_, sqlx::Sqlite>,
    result: Result<T, Failure>,
) -> Result<T, Failure> {
    match &result {
        Ok(_) => transaction.commit().await?,
        Err(failure) if failure.ends_connection => {}
        Err(_) => transaction.rollback().await?,
    }
    result
}

/// What the losers lost to.
async fn settle_losers(writer: &mut SqliteConnection, verdict: Verdict<'_>) -> Result<Vec<Committed>, Failure> {
    let standing = standing(writer, &verdict.losers()).await?;
    let horizon = if standing.contains(&None) {
        horizon(writer).await?
    } else {
        None
    };
    Ok(verdict.settle(&standing, horizon))
}

pub(super) async fn horizon(writer: &mut SqliteConnection) -> Result<Option<Version>, Failure> {
    let rows = sqlx::query(HORIZON).fetch_all(writer).await?;
    let row = rows.first().ok_or_else(no_control_row)?;
    Ok(Version::new(row.try_get(0)?))
}

pub(super) async fn upsert(
    writer: &mut SqliteConnection,
    writes: &[Write],
    verdict: &mut Verdict<'_>,
) -> Result<(), Failure> {
    for (_, piece, statement) in pieces(&UPSERT, writes) {
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for Write { key, entry, tags, .. } in piece {
            query = query
                .bind(key.namespace())
                .bind(key.key())
                .bind(entry.version.get())
                .bind(entry.value.as_deref())
                .bind(entry.expires_at.map(|at| at.0))
                .bind(keys::json_array(tags));
        }
        for row in query.fetch_all(&mut *writer).await? {
            verdict.applied(row.try_get(0)?, row.try_get(1)?);
        }
    }
    Ok(())
}

/// What stands on keys.
async fn standing(writer: &mut SqliteConnection, keys: &[&Key]) -> Result<Vec<Option<Version>>, Failure> {
    let mut standing = vec![None; keys.len()];
    for (offset, piece, statement) in pieces(&STANDING, keys) {
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for key in piece {
            query = query.bind(key.namespace()).bind(key.key());
        }
        for row in query.fetch_all(&mut *writer).await? {
            if let Some(slot) = slot(&mut standing[offset..], &row)? {
                *slot = Some(version(row.try_get(1)?)?);
            }
        }
    }
    Ok(standing)
}

async fn probe(writer: &mut SqliteConnection) -> Result<(), Failure> {
    let mut transaction = writer.begin_with("begin immediate").await?;
    let tried = sqlx::query(PROBE).execute(&mut *transaction).await;
    transaction.rollback().await?;
    tried?;
    Ok(())
}

async fn lease_node(writer: &mut SqliteConnection, claimant: &Claimant) -> Result<NodeGrant, Failure> {
    let rows = sqlx::query(LEASE_NODE)
        .bind(&claimant.directory)
        .bind(&claimant.start)
        .fetch_all(writer)
        .await?;
    let high_water: Option<i64> = match rows.first() {
        Some(row) => row.try_get(0)?,
        None => None,
    };
    Ok(NodeGrant {
        node: 0,
        high_water: high_water.and_then(Version::new),
    })
}

/// Runs a statement on the node that the claimant holds. Whether it holds it.
async fn update_node(
    writer: &mut SqliteConnection,
    statement: &'static str,
    claimant: &Claimant,
    (node, high_water): (u16, Option<Version>),
) -> Result<bool, Failure> {
    let done = sqlx::query(statement)
        .bind(i64::from(node))
        .bind(&claimant.directory)
        .bind(&claimant.start)
        .bind(high_water.map(Version::get))
        .execute(writer)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// One transaction: with one writer no commit runs beside it, so none can have begun under the old horizon.
async fn collect(writer: &mut SqliteConnection, retention: Duration, rows_max: u32) -> Result<u64, Failure> {
    let mut transaction = writer.begin_with("begin immediate").await?;
    let collected = raise_and_delete(&mut transaction, Timestamp(0).after(retention).0, rows_max).await;
    end(transaction, collected).await
}

async fn raise_and_delete(writer: &mut SqliteConnection, retention_millis: i64, rows_max: u32) -> Result<u64, Failure> {
    let raised = sqlx::query(RAISE_HORIZON)
        .bind(retention_millis)
        .bind(i64::from(rows_max))
        .fetch_all(&mut *writer)
        .await?;
    let Some(row) = raised.first() else {
        return Ok(0);
    };
    let horizon: i64 = row.try_get(0)?;
    let done = sqlx::query(COLLECT)
        .bind(retention_millis)
        .bind(horizon)
        .bind(i64::from(rows_max))
        .execute(writer)
        .await?;
    Ok(done.rows_affected())
}

/// The place that a row of a query with positions belongs to.
pub(super) fn slot<'a, T>(slots: &'a mut [T], row: &SqliteRow) -> Result<Option<&'a mut T>, Failure> {
    Ok(place(row)?.and_then(|place| slots.get_mut(place)))
}

fn place(row: &SqliteRow) -> Result<Option<usize>, Failure> {
    let position: i64 = row.try_get(0)?;
    Ok(usize::try_from(position).ok())
}

pub(super) fn version(number: i64) -> Result<Version, Failure> {
    Version::new(number).ok_or_else(|| {
        let message = "tidegate_entries holds a version that is not positive: mend the row";
        StoreError::new(StoreErrorKind::Transient, message).into()
    })
}
