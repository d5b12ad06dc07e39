//! Request ids in SQLite.
//!
//! Owns the calls. Does not own the SQL ([`super::statements`]) nor what is remembered. Invariant: a statement names each request once.

use sqlx::{
    AssertSqlSafe, Connection as _, Row,
    sqlite::{SqliteConnection, SqliteRow},
};

use super::{
    connection::{end, slot, version},
    failure::Failure,
    statements::{ANSWERS, FORGET_REQUESTS, REMEMBER, Sized, pieces},
};
use crate::{
    model::{Answer, Answered, Fingerprint, KeyedAnswer, Request, RequestId, Timestamp},
    store::requests::{Named, no_request, of_answers},
};

/// Remembers requests in the transaction that runs.
pub(super) async fn insert(
    writer: &mut SqliteConnection,
    statements: &'static Sized,
    named: &[Named<'_>],
) -> Result<(), Failure> {
    for (_, piece, statement) in pieces(statements, named) {
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for (namespace, Answered { request, answer }) in piece {
            query = query
                .bind(*namespace)
                .bind(request.id.as_str())
                .bind(&request.fingerprint.0[..])
                .bind(answer.version.get())
                .bind(answer.counter)
                .bind(answer.expires_at.map(|at| at.0))
                .bind(request.ends_at.0);
        }
        query.execute(&mut *writer).await?;
    }
    Ok(())
}

pub(super) async fn remember(writer: &mut SqliteConnection, answers: &[KeyedAnswer]) -> Result<(), Failure> {
    let mut transaction = writer.begin_with("begin immediate").await?;
    let remembered = insert(&mut transaction, &REMEMBER, &of_answers(answers)).await;
    end(transaction, remembered).await
}

/// What is remembered of requests, in their order.
pub(super) async fn answers(
    connection: &mut SqliteConnection,
    requests: &[(&str, &RequestId)],
) -> Result<Vec<Option<Answered>>, Failure> {
    let mut answers = vec![None; requests.len()];
    for (offset, piece, statement) in pieces(&ANSWERS, requests) {
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for (namespace, id) in piece {
            query = query.bind(*namespace).bind(id.as_str());
        }
        for row in query.fetch_all(&mut *connection).await? {
            let place: i64 = row.try_get(0)?;
            let asked = usize::try_from(place).ok().and_then(|place| piece.get(place));
            if let (Some((_, id)), Some(slot)) = (asked, slot(&mut answers[offset..], &row)?) {
                *slot = Some(answered(id, &row)?);
            }
        }
    }
    Ok(answers)
}

fn answered(id: &RequestId, row: &SqliteRow) -> Result<Answered, Failure> {
    let fingerprint: &[u8] = row.try_get(1)?;
    let expires_at: Option<i64> = row.try_get(4)?;
    Ok(Answered {
        request: Request {
            id: id.clone(),
            fingerprint: Fingerprint(fingerprint.try_into().map_err(|_| no_request())?),
            ends_at: Timestamp(row.try_get(5)?),
        },
        answer: Answer {
            version: version(row.try_get(2)?)?,
            counter: row.try_get(3)?,
            expires_at: expires_at.map(Timestamp),
        },
    })
}

pub(super) async fn forget(writer: &mut SqliteConnection, rows_max: u32) -> Result<u64, Failure> {
    let done = sqlx::query(FORGET_REQUESTS)
        .bind(i64::from(rows_max))
        .execute(writer)
        .await?;
    Ok(done.rows_affected())
}
