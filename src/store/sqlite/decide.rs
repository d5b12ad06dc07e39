//! Decisions in SQLite: read, decide, write, in one transaction of the one writer.
//!
//! Owns the transaction. Does not own what is decided ([`crate::store::decide`]) nor the SQL ([`super::statements`]). Invariants: what is
//! decided holds when it is written, for nobody else writes meanwhile; an operation that is sent again finds what became of its earlier
//! try, for that was over before this transaction could begin. Nothing is applied before the commit: whatever fails earlier is no unknown outcome.

use sqlx::{AssertSqlSafe, Connection as _, Row, sqlite::SqliteConnection};

use super::{
    connection::{horizon, slot, upsert, version},
    failure::Failure,
    requests::{answers, insert},
    statements::{FOUND, REMEMBER_DECIDED, pieces},
};
use crate::{
    model::{Entry, RequestId, Tags, Timestamp, Write},
    store::{
        StoreErrorKind,
        decide::{Standing, Wanted, decide as plan, wanted},
        operation::{Decided, Operation},
        requests::{no_tags, of_answers, swallowed},
        verdict::Verdict,
    },
};

pub(super) async fn decide(
    writer: &mut SqliteConnection,
    operations: &[Operation],
    now: Timestamp,
) -> Result<Vec<Decided>, Failure> {
    if operations.is_empty() {
        return Ok(Vec::new());
    }
    let mut transaction = writer
        .begin_with("begin immediate")
        .await
        .map_err(|error| before_commit(error.into()))?;
    match attempt(&mut transaction, operations, now).await {
        Ok(decided) => {
            transaction.commit().await?;
            Ok(decided)
        }
        Err(failure) => {
            if !failure.ends_connection {
                transaction
                    .rollback()
                    .await
                    .map_err(|error| before_commit(error.into()))?;
            }
            Err(before_commit(failure))
        }
    }
}

/// Nothing was applied, and nothing will be.
fn before_commit(mut failure: Failure) -> Failure {
    if failure.error.kind == StoreErrorKind::Unknown {
        failure.error.kind = StoreErrorKind::Transient;
    }
    failure
}

async fn attempt(
    writer: &mut SqliteConnection,
    operations: &[Operation],
    now: Timestamp,
) -> Result<Vec<Decided>, Failure> {
    let rows = find(writer, &wanted(operations)).await?;
    let names: Vec<(&str, &RequestId)> = operations
        .iter()
        .map(|operation| (operation.key.namespace(), &operation.request.id))
        .collect();
    let known = answers(writer, &names).await?;
    let horizon = horizon(writer).await?;
    let plan = plan(operations, &rows, &known, horizon, now);

    let writes: Vec<Write> = plan.changed.into_iter().map(|changed| changed.write).collect();
    let mut verdict = Verdict::new(&writes);
    upsert(writer, &writes, &mut verdict).await?;
    if !verdict.losers().is_empty() {
        return Err(swallowed().into());
    }
    insert(writer, &REMEMBER_DECIDED, &of_answers(&plan.remembered)).await?;
    Ok(plan.decided)
}

/// The rows of keys.
async fn find(writer: &mut SqliteConnection, wanted: &[Wanted<'_>]) -> Result<Vec<Option<Standing>>, Failure> {
    let mut standing = vec![None; wanted.len()];
    for (offset, piece, statement) in pieces(&FOUND, wanted) {
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for Wanted { key, content } in piece {
            query = query.bind(key.namespace()).bind(key.key()).bind(*content);
        }
        for row in query.fetch_all(&mut *writer).await? {
            let Some(slot) = slot(&mut standing[offset..], &row)? else {
                continue;
            };
            let (has_value, value): (bool, Option<Vec<u8>>) = (row.try_get(2)?, row.try_get(4)?);
            let expires_at: Option<i64> = row.try_get(3)?;
            let tags: Option<&str> = row.try_get(5)?;
            *slot = Some(Standing {
                entry: Entry {
                    version: version(row.try_get(1)?)?,
                    value: has_value.then(|| value.unwrap_or_default().into()),
                    expires_at: expires_at.map(Timestamp),
                },
                tags: tags.map(tags_of).transpose()?.unwrap_or_default(),
            });
        }
    }
    Ok(standing)
}

/// Tags from a JSON array.
pub(super) fn tags_of(json: &str) -> Result<Tags, Failure> {
    let tags: Vec<String> = serde_json::from_str(json).map_err(|_| no_tags())?;
    Ok(Tags::new(&tags).map_err(|_| no_tags())?)
}
