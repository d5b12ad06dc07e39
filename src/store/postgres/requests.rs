//! Request ids in PostgreSQL.
//!
//! Owns the calls, and how answered requests are sent along with what they wrote. Does not own the SQL ([`super::statements`]) nor what
//! is remembered. Invariant: a statement names each request once, in order.

use sqlx::{
    Postgres, Row,
    postgres::{PgArguments, PgBindIterExt, PgConnection, PgRow},
    query::Query,
};

use super::{
    connection::{slot, version},
    failure::Failure,
    statements::{ANSWERS, FORGET_REQUESTS, REMEMBER},
    time::WireTime,
};
use crate::{
    model::{Answer, Answered, Fingerprint, KeyedAnswer, Request, RequestId, Version},
    store::{
        requests::{Named, no_request, of_answers},
        verdict::no_control_row,
    },
};

/// The parameters of the requests to remember: the next seven.
pub(super) fn bind<'q>(
    query: Query<'q, Postgres, PgArguments>,
    named: &[Named<'_>],
) -> Query<'q, Postgres, PgArguments> {
    let requests = || named.iter().map(|(_, answered)| &answered.request);
    let answers = || named.iter().map(|(_, answered)| answered.answer);
    query
        .bind(named.iter().map(|(namespace, _)| *namespace).bind_iter())
        .bind(requests().map(|request| request.id.as_str()).bind_iter())
        .bind(requests().map(|request| &request.fingerprint.0[..]).bind_iter())
        .bind(answers().map(|answer| answer.version.get()).bind_iter())
        .bind(answers().map(|answer| answer.counter).bind_iter())
        .bind(answers().map(|answer| answer.expires_at.map(WireTime)).bind_iter())
        .bind(requests().map(|request| WireTime(request.ends_at)).bind_iter())
}

pub(super) async fn remember(session: &mut PgConnection, answers: &[KeyedAnswer]) -> Result<(), Failure> {
    if answers.is_empty() {
        return Ok(());
    }
    let query = bind(sqlx::query(REMEMBER), &of_answers(answers));
    query.fetch_all(session).await?;
    Ok(())
}

/// What is remembered of requests, in their order.
pub(super) async fn answers(
    session: &mut PgConnection,
    requests: &[(&str, &RequestId)],
) -> Result<Vec<Option<Answered>>, Failure> {
    Ok(read(session, requests).await?.0)
}

/// The same, and the horizon.
pub(super) async fn answers_and_horizon(
    session: &mut PgConnection,
    requests: &[(&str, &RequestId)],
) -> Result<(Vec<Option<Answered>>, Option<Version>), Failure> {
    let (answers, horizon) = read(session, requests).await?;
    Ok((answers, Version::new(horizon.ok_or_else(no_control_row)?)))
}

async fn read(
    session: &mut PgConnection,
    requests: &[(&str, &RequestId)],
) -> Result<(Vec<Option<Answered>>, Option<i64>), Failure> {
    let mut answers = vec![None; requests.len()];
    let mut horizon = None;
    if requests.is_empty() {
        return Ok((answers, horizon));
    }
    let rows = sqlx::query(ANSWERS)
        .bind(requests.iter().map(|(namespace, _)| *namespace).bind_iter())
        .bind(requests.iter().map(|(_, id)| id.as_str()).bind_iter())
        .fetch_all(session)
        .await?;
    for row in rows {
        horizon = row.try_get(1)?;
        let place: i64 = row.try_get(0)?;
        let asked = usize::try_from(place - 1).ok().and_then(|place| requests.get(place));
        if let (Some((_, id)), Some(slot)) = (asked, slot(&mut answers, &row)?) {
            *slot = answered(id, &row)?;
        }
    }
    Ok((answers, horizon))
}

fn answered(id: &RequestId, row: &PgRow) -> Result<Option<Answered>, Failure> {
    let Some(fingerprint) = row.try_get::<Option<&[u8]>, _>(2)? else {
        return Ok(None);
    };
    let fingerprint = fingerprint.try_into().map_err(|_| no_request())?;
    let expires_at: Option<WireTime> = row.try_get(5)?;
    let ends_at: WireTime = row.try_get(6)?;
    Ok(Some(Answered {
        request: Request {
            id: id.clone(),
            fingerprint: Fingerprint(fingerprint),
            ends_at: ends_at.0,
        },
        answer: Answer {
            version: version(row.try_get(3)?)?,
            counter: row.try_get(4)?,
            expires_at: expires_at.map(|time| time.0),
        },
    }))
}

pub(super) async fn forget(session: &mut PgConnection, rows_max: u32) -> Result<u64, Failure> {
    let done = sqlx::query(FORGET_REQUESTS)
        .bind(i64::from(rows_max))
        .execute(session)
        .await?;
    Ok(done.rows_affected())
}
