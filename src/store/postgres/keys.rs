//! Keys of PostgreSQL's entries, found by something else than themselves, and the tags by which they are.
//!
//! Owns the calls, and how a commit sends tags. Does not own the SQL ([`super::statements`]) nor what the keys are good for.

use sqlx::{
    Row,
    postgres::{PgConnection, PgRow},
};

use super::{
    failure::Failure,
    statements::{KEYS_FROM, KEYS_WITHIN, NEWEST, TAGGED},
};
use crate::{
    model::{Key, Tags},
    store::{no_key, prefix},
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
    (namespace, prefix): (&str, &str),
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<Key>, Failure> {
    let (end, after) = (prefix::end(prefix), after.unwrap_or_default());
    let query = sqlx::query(if end.is_some() { KEYS_WITHIN } else { KEYS_FROM })
        .bind(namespace)
        .bind(prefix.max(after))
        .bind(after)
        .bind(i64::from(limit));
    let query = match end {
        Some(end) => query.bind(end),
        None => query,
    };
    keys(namespace, &query.fetch_all(session).await?)
}

pub(super) async fn newest(session: &mut PgConnection, namespace: &str, limit: u32) -> Result<Vec<Key>, Failure> {
    let rows = sqlx::query(NEWEST)
        .bind(namespace)
        .bind(i64::from(limit))
        .fetch_all(session)
        .await?;
    keys(namespace, &rows)
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
