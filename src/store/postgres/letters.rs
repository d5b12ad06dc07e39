//! Dead letters in PostgreSQL.
//!
//! Owns the calls. Does not own the SQL ([`super::statements`]) nor what becomes of a letter.

use sqlx::{
    Row,
    postgres::{PgBindIterExt, PgConnection, PgRow},
};

use super::{
    connection::slot,
    failure::Failure,
    keys::array_text,
    statements::{ARE_BURIED, BURY, DROP_LETTERS, LAST_LETTER, LETTERS, REFUSE_LETTER},
    time::WireTime,
};
use crate::{
    model::{Key, Tags, Timestamp, Version},
    store::{
        DeadLetter, kept_reason,
        letters::{KeptLetter, LetterRange, no_letter},
    },
};

pub(super) async fn bury(session: &mut PgConnection, letter: &DeadLetter) -> Result<(), Failure> {
    let DeadLetter { write, code, .. } = letter;
    sqlx::query(BURY)
        .bind(write.key.namespace())
        .bind(write.key.key())
        .bind(write.entry.version.get())
        .bind(write.entry.value.as_deref())
        .bind(write.entry.expires_at.map(WireTime))
        .bind(code.as_deref())
        .bind(letter.kept_reason())
        .bind(array_text(&write.tags))
        .execute(session)
        .await?;
    Ok(())
}

pub(super) async fn are_buried(session: &mut PgConnection, writes: &[(&Key, Version)]) -> Result<Vec<bool>, Failure> {
    let mut buried = vec![false; writes.len()];
    if writes.is_empty() {
        return Ok(buried);
    }
    let rows = sqlx::query(ARE_BURIED)
        .bind(writes.iter().map(|(key, _)| key.namespace()).bind_iter())
        .bind(writes.iter().map(|(key, _)| key.key()).bind_iter())
        .bind(writes.iter().map(|(_, version)| version.get()).bind_iter())
        .fetch_all(session)
        .await?;
    for row in rows {
        if let Some(slot) = slot(&mut buried, &row)? {
            *slot = row.try_get(1)?;
        }
    }
    Ok(buried)
}

pub(super) async fn range(session: &mut PgConnection, range: LetterRange<'_>) -> Result<Vec<KeptLetter>, Failure> {
    let rows = sqlx::query(LETTERS)
        .bind(range.after)
        .bind(range.up_to)
        .bind(range.namespace)
        .bind(i64::from(range.limit))
        .bind(range.values)
        .fetch_all(session)
        .await?;
    rows.iter().map(letter).collect()
}

fn letter(row: &PgRow) -> Result<KeptLetter, Failure> {
    let value_bytes: Option<i32> = row.try_get(4)?;
    let value: Option<Vec<u8>> = row.try_get(5)?;
    let expires_at: Option<WireTime> = row.try_get(6)?;
    let tags: Option<Vec<String>> = row.try_get(7)?;
    let attempts: i32 = row.try_get(10)?;
    let buried_at: WireTime = row.try_get(11)?;
    let retried_at: Option<WireTime> = row.try_get(12)?;
    Ok(KeptLetter {
        id: row.try_get(0)?,
        key: Key::new(row.try_get(1)?, row.try_get(2)?).map_err(|_| no_letter())?,
        version: Version::new(row.try_get(3)?).ok_or_else(no_letter)?,
        value_bytes: value_bytes.and_then(|bytes| usize::try_from(bytes).ok()),
        value: value.map(Into::into),
        expires_at: expires_at.map(|time| time.0),
        tags: Tags::new(&tags.unwrap_or_default()).map_err(|_| no_letter())?,
        code: row.try_get(8)?,
        reason: row.try_get(9)?,
        attempts: u32::try_from(attempts).map_err(|_| no_letter())?,
        buried_at: buried_at.0,
        retried_at: retried_at.map(|time| time.0),
    })
}

pub(super) async fn last(session: &mut PgConnection) -> Result<i64, Failure> {
    let row = sqlx::query(LAST_LETTER).fetch_one(session).await?;
    Ok(row.try_get(0)?)
}

pub(super) async fn drop_all(session: &mut PgConnection, ids: &[i64]) -> Result<u64, Failure> {
    let done = sqlx::query(DROP_LETTERS).bind(ids).execute(session).await?;
    Ok(done.rows_affected())
}

pub(super) async fn refuse(
    session: &mut PgConnection,
    id: i64,
    code: Option<&str>,
    reason: &str,
) -> Result<Option<(u32, Timestamp)>, Failure> {
    let rows = sqlx::query(REFUSE_LETTER)
        .bind(id)
        .bind(code)
        .bind(kept_reason(reason))
        .fetch_all(session)
        .await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let attempts: i32 = row.try_get(0)?;
    let at: WireTime = row.try_get(1)?;
    Ok(Some((u32::try_from(attempts).map_err(|_| no_letter())?, at.0)))
}
