//! Keys of SQLite's entries, found by something else than themselves, and the tags by which they are.
//!
//! Owns the calls, and how a commit sends tags. Does not own the SQL ([`super::statements`]) nor what the keys are good for.

use sqlx::{
    Row,
    sqlite::{SqliteConnection, SqliteRow},
};

use super::{
    connection::version,
    decide::tags_of,
    failure::Failure,
    statements::{KEYS_FROM, KEYS_WITHIN, NEWEST, ROWS_FROM, ROWS_WITHIN, TAGGED},
};
use crate::{
    model::{Key, Tags, Timestamp},
    store::{no_key, operation::RangeRow, prefix},
};

pub(super) async fn tagged(
    reader: &mut SqliteConnection,
    (namespace, tag): (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<Key>, Failure> {
    let rows = sqlx::query(TAGGED)
        .bind(namespace)
        .bind(tag)
        .bind(after.unwrap_or_default())
        .bind(i64::from(limit))
        .fetch_all(reader)
        .await?;
    keys(namespace, &rows)
}

pub(super) async fn below(
    reader: &mut SqliteConnection,
    range: (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<Key>, Failure> {
    let rows = range_rows(reader, (KEYS_WITHIN, KEYS_FROM), range, after, limit).await?;
    keys(range.0, &rows)
}

pub(super) async fn rows_below(
    reader: &mut SqliteConnection,
    range: (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<RangeRow>, Failure> {
    let rows = range_rows(reader, (ROWS_WITHIN, ROWS_FROM), range, after, limit).await?;
    rows.iter().map(|row| range_row(range.0, row)).collect()
}

/// The rows of a range, by a statement for one with an end, or for one without.
async fn range_rows(
    reader: &mut SqliteConnection,
    (within, from): (&'static str, &'static str),
    (namespace, prefix): (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<SqliteRow>, Failure> {
    let (end, after) = (prefix::end(prefix), after.unwrap_or_default());
    let query = sqlx::query(if end.is_some() { within } else { from })
        .bind(namespace)
        .bind(prefix.max(after))
        .bind(after)
        .bind(i64::from(limit));
    let query = match end {
        Some(end) => query.bind(end),
        None => query,
    };
    Ok(query.fetch_all(reader).await?)
}

pub(super) async fn newest(reader: &mut SqliteConnection, namespace: &str, limit: u32) -> Result<Vec<Key>, Failure> {
    let rows = sqlx::query(NEWEST)
        .bind(namespace)
        .bind(i64::from(limit))
        .fetch_all(reader)
        .await?;
    keys(namespace, &rows)
}

fn range_row(namespace: &str, row: &SqliteRow) -> Result<RangeRow, Failure> {
    let expires_at: Option<i64> = row.try_get(2)?;
    let value_bytes: Option<i64> = row.try_get(3)?;
    let tags: Option<&str> = row.try_get(4)?;
    Ok(RangeRow {
        key: Key::new(namespace, row.try_get(0)?).map_err(|_| no_key())?,
        version: version(row.try_get(1)?)?,
        expires_at: expires_at.map(Timestamp),
        value_bytes: value_bytes.and_then(|bytes| usize::try_from(bytes).ok()),
        tags: tags.map(tags_of).transpose()?.unwrap_or_default(),
    })
}

fn keys(namespace: &str, rows: &[SqliteRow]) -> Result<Vec<Key>, Failure> {
    let key = |row: &SqliteRow| Ok(Key::new(namespace, row.try_get(0)?).map_err(|_| no_key())?);
    rows.iter().map(key).collect()
}

/// Tags as SQLite reads them: a JSON array. `None` where there are none.
pub(super) fn json_array(tags: &Tags) -> Option<String> {
    if tags.is_empty() {
        return None;
    }
    let mut json = String::with_capacity(tags.bytes());
    for tag in tags.iter() {
        json.push_str(if json.is_empty() { "[\"" } else { "\",\"" });
        for character in tag.chars() {
            match character {
                '"' | '\\' => json.extend(['\\', character]),
                '\0'..='\u{1f}' => json.push_str(&format!("\\u{:04x}", u32::from(character))),
                _ => json.push(character),
            }
        }
    }
    json.push_str("\"]");
    Some(json)
}
