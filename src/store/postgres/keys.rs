//! Keys of PostgreSQL's entries, found by something else than themselves, and the tags by which they are.
//!
//! Owns the calls, and how a commit sends tags. Does not own the SQL ([`super::statements`]) nor what the keys are good for.

use sqlx::{
    Row,
    postgres::{PgConnection, PgRow},
};

use super::{
    connection::version,
    failure::Failure,
    statements::{KEYS_FROM, KEYS_WITHIN, NEWEST, ROWS_FROM, ROWS_WITHIN, TAGGED},
    time::WireTime,
};
use crate::{
    model::{Key, Tags},
    store::{no_key, operation::RangeRow, prefix, requests::no_tags},
};

pub(super) async fn tagged(
    session: &mut PgConnection,
    (namespace, tag): (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<Key>, Failure> {
    let rows = sqlx::query(TAGGED)
        .bind(namespace)
        .bind(tag)
        .bind(after.unwrap_or_default())
        .bind(i64::from(limit))
        .fetch_all(session)
        .await?;
    keys(namespace, &rows)
}

pub(super) async fn below(
    session: &mut PgConnection,
    range: (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<Key>, Failure> {
    let rows = range_rows(session, (KEYS_WITHIN, KEYS_FROM), range, after, limit).await?;
    keys(range.0, &rows)
}

pub(super) async fn rows_below(
    session: &mut PgConnection,
    range: (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<RangeRow>, Failure> {
    let rows = range_rows(session, (ROWS_WITHIN, ROWS_FROM), range, after, limit).await?;
    rows.iter().map(|row| range_row(range.0, row)).collect()
}

/// The rows of a range, by a statement for one with an end, or for one without.
async fn range_rows(
    session: &mut PgConnection,
    (within, from): (&'static str, &'static str),
    (namespace, prefix): (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<PgRow>, Failure> {
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
    Ok(query.fetch_all(session).await?)
}

pub(super) async fn newest(session: &mut PgConnection, namespace: &str, limit: u32) -> Result<Vec<Key>, Failure> {
    let rows = sqlx::query(NEWEST)
        .bind(namespace)
        .bind(i64::from(limit))
        .fetch_all(session)
        .await?;
    keys(namespace, &rows)
}

fn range_row(namespace: &str, row: &PgRow) -> Result<RangeRow, Failure> {
    let expires_at: Option<WireTime> = row.try_get(2)?;
    let value_bytes: Option<i32> = row.try_get(3)?;
    let tags: Option<Vec<String>> = row.try_get(4)?;
    Ok(RangeRow {
        key: Key::new(namespace, row.try_get(0)?).map_err(|_| no_key())?,
        version: version(row.try_get(1)?)?,
        expires_at: expires_at.map(|time| time.0),
        value_bytes: value_bytes.and_then(|bytes| usize::try_from(bytes).ok()),
        tags: Tags::new(&tags.unwrap_or_default()).map_err(|_| no_tags())?,
    })
}

fn keys(namespace: &str, rows: &[PgRow]) -> Result<Vec<Key>, Failure> {
    let key = |row: &PgRow| Ok(Key::new(namespace, row.try_get(0)?).map_err(|_| no_key())?);
    rows.iter().map(key).collect()
}

/// Tags as the text of an array, as the server reads it. `None` where there are none.
pub(super) fn array_text(tags: &Tags) -> Option<String> {
    if tags.is_empty() {
        return None;
    }
    let mut text = String::with_capacity(tags.bytes());
    for tag in tags.iter() {
        text.push_str(if text.is_empty() { "{\"" } else { "\",\"" });
        for character in tag.chars() {
            if matches!(character, '"' | '\\') {
                text.push('\\');
            }
            text.push(character);
        }
    }
    text.push_str("\"}");
    Some(text)
}
