//! Dead letters in SQLite.
//!
//! Owns the calls. Does not own the SQL ([`super::statements`]) nor what becomes of a letter.

use sqlx::{
    AssertSqlSafe, Row,
    sqlite::{SqliteConnection, SqliteRow},
};

use super::{
    connection::slot,
    decide::tags_of,
    failure::Failure,
    keys::json_array,
    statements::{ARE_BURIED, BURY, DROP_LETTERS, LAST_LETTER, LETTERS, REFUSE_LETTER, pieces},
};
use crate::{
    model::{Key, Timestamp, Version},
    store::{
        DeadLetter, kept_reason,
        letters::{KeptLetter, LetterRange, no_letter},
    },
};

pub(super) async fn bury(writer: &mut SqliteConnection, letter: &DeadLetter) -> Result<(), Failure> {
    let DeadLetter { write, code, .. } = letter;
    sqlx::query(BURY)
        .bind(write.key.namespace())
        .bind(write.key.key())
        .bind(write.entry.version.get())
        .bind(write.entry.value.as_deref())
        .bind(write.entry.expires_at.map(|at| at.0))
        .bind(code.as_deref())
        .bind(letter.kept_reason())
        .bind(json_array(&write.tags))
        .execute(writer)
        .await?;
    Ok(())
}

pub(super) async fn are_buried(
    reader: &mut SqliteConnection,
    writes: &[(&Key, Version)],
) -> Result<Vec<bool>, Failure> {
    let mut buried = vec![false; writes.len()];
    for (offset, piece, statement) in pieces(&ARE_BURIED, writes) {
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for (key, version) in piece {
            query = query.bind(key.namespace()).bind(key.key()).bind(version.get());
        }
        for row in query.fetch_all(&mut *reader).await? {
            if let Some(slot) = slot(&mut buried[offset..], &row)? {
                *slot = row.try_get(1)?;
            }
        }
    }
    Ok(buried)
}

pub(super) async fn range(reader: &mut SqliteConnection, range: LetterRange<'_>) -> Result<Vec<KeptLetter>, Failure> {
    let rows = sqlx::query(LETTERS)
        .bind(range.after)
        .bind(range.up_to)
        .bind(range.namespace)
        .bind(i64::from(range.limit))
        .bind(range.values)
        .fetch_all(reader)
        .await?;
    rows.iter().map(letter).collect()
}

fn letter(row: &SqliteRow) -> Result<KeptLetter, Failure> {
    let value_bytes: Option<i64> = row.try_get(4)?;
    let value: Option<Vec<u8>> = row.try_get(5)?;
    let expires_at: Option<i64> = row.try_get(6)?;
    let tags: Option<&str> = row.try_get(7)?;
    let attempts: i64 = row.try_get(10)?;
    let retried_at: Option<i64> = row.try_get(12)?;
    Ok(KeptLetter {
        id: row.try_get(0)?,
        key: Key::new(row.try_get(1)?, row.try_get(2)?).map_err(|_| no_letter())?,
        version: Version::new(row.try_get(3)?).ok_or_else(no_letter)?,
        value_bytes: value_bytes.and_then(|bytes| usize::try_from(bytes).ok()),
        value: value.map(Into::into),
        expires_at: expires_at.map(Timestamp),
        tags: tags.map(tags_of).transpose()?.unwrap_or_default(),
        code: row.try_get(8)?,
        reason: row.try_get(9)?,
        attempts: u32::try_from(attempts).map_err(|_| no_letter())?,
        buried_at: Timestamp(row.try_get(11)?),
        retried_at: retried_at.map(Timestamp),
    })
}

pub(super) async fn last(reader: &mut SqliteConnection) -> Result<i64, Failure> {
    let row = sqlx::query(LAST_LETTER).fetch_one(reader).await?;
    Ok(row.try_get(0)?)
}

pub(super) async fn drop_all(writer: &mut SqliteConnection, ids: &[i64]) -> Result<u64, Failure> {
    let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
    let done = sqlx::query(DROP_LETTERS)
        .bind(format!("[{}]", ids.join(",")))
        .execute(writer)
        .await?;
    Ok(done.rows_affected())
}

pub(super) async fn refuse(
    writer: &mut SqliteConnection,
    id: i64,
    code: Option<&str>,
    reason: &str,
) -> Result<Option<(u32, Timestamp)>, Failure> {
    let rows = sqlx::query(REFUSE_LETTER)
        .bind(id)
        .bind(code)
        .bind(kept_reason(reason))
        .fetch_all(writer)
        .await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let attempts: i64 = row.try_get(0)?;
    let at = Timestamp(row.try_get(1)?);
    Ok(Some((u32::try_from(attempts).map_err(|_| no_letter())?, at)))
}
