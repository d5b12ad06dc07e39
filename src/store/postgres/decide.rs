//! Decisions in PostgreSQL: lock, read, decide, write, commit.
//!
//! Owns the transaction. Does not own what is decided ([`crate::store::decide`]) nor the SQL ([`super::statements`]). Invariants: what is decided
//! holds when it is written; an operation that is sent again, after its commit ended without a word, is applied once.
//!
//! **Why what is decided holds.** The rows that are there are locked, in the order of their keys, before they are read, and nobody else moves a
//! locked row. A row that is not there cannot be locked: it is inserted only if there still is none, and its request ids only if they
//! are not taken, and where anything came in between all is rolled back and done anew. What is written is written by one statement, whose insert
//! refuses what is not above the horizon in its own snapshot: so it is as safe from collection as the upsert is ([`super::collect`]).
//!
//! **Why what is sent again is applied once.** Let an earlier try have sent its commit. Either that is over when this one reads the ids,
//! and then it finds what is remembered, or nothing ever will be. For an earlier try that is still under way holds the lock of each row that it
//! changed, and this one waits for it before it reads. Where it made a row, this one does not see that: but it waits for it at its own insert,
//! and then finds the key taken. Where this one would insert nothing, and say so ("there is no such record"), it first inserts its ids as if it
//! did, for their index makes it wait all the same, and takes that back.
//!
//! Nothing is applied before the commit is sent: whatever fails earlier is no unknown outcome.
//!
//! A wait for a lock is short: whoever holds one longer must not stop what wants other rows ([`crate::store::aside`]). Nothing is applied then.
//!
//! Two transactions that each make a row that the other one has to move, or wait for each other's new rows, deadlock: the one whose wait is over
//! first is rolled back, and tried again.

use std::time::Duration;

use sqlx::{
    AssertSqlSafe, Connection as _, Row,
    postgres::{PgBindIterExt, PgConnection},
};

#[cfg(feature = "planted-faults")]
use super::planted;
use super::{
    connection::{roll_back, slot, version},
    failure::Failure,
    keys,
    requests::{answers_and_horizon, bind},
    statements::{CLAIM, LOCK, WRITE_DECIDED},
    time::WireTime,
};
use crate::{
    model::{Answer, Answered, Entry, KeyedAnswer, RequestId, Tags, Timestamp, Version},
    store::{
        decide::{Plan, Standing, Wanted, decide as plan, wanted},
        operation::{Decided, Operation},
        requests::{no_tags, of_answers, swallowed},
    },
};

/// How often all is done anew because something came in between. For one operation it can three times at most (a row, a request id, the
/// horizon), unless what it writes is swallowed.
const TRANSACTIONS_MAX: u32 = 8;

/// How long one operation waits for a lock that another session holds: time for the decisions of several gateways, one after the other.
const LOCK_WAIT: Duration = Duration::from_millis(300);
/// The same for several, which are then tried in halves: finding the one that has to wait takes a wait for each.
const LOCK_WAIT_SHARED: Duration = Duration::from_millis(100);

/// What a transaction came to.
enum Attempt {
    /// All is written, to be committed.
    Written(Vec<Decided>),
    /// There is nothing to write.
    Idle(Vec<Decided>),
    /// Something came in between.
    Overtaken,
}

/// `lock_wait_max`: the session's own bound on each wait for a lock. It holds for the commit, where only what the tables' owner added to them
/// waits; what comes before waits less.
pub(super) async fn decide(
    session: &mut PgConnection,
    operations: &[Operation],
    now: Timestamp,
    lock_wait_max: Duration,
) -> Result<Vec<Decided>, Failure> {
    if operations.is_empty() {
        return Ok(Vec::new());
    }
    let wait = if is_one_record(operations) {
        LOCK_WAIT
    } else {
        LOCK_WAIT_SHARED
    };
    let begin = format!(
        "begin; set local lock_timeout = {}",
        wait.min(lock_wait_max).as_millis().max(1)
    );
    for _ in 0..TRANSACTIONS_MAX {
        // It is made of a number alone.
        let begun = session.begin_with(AssertSqlSafe(begin.clone())).await;
        let mut transaction = begun.map_err(before_commit)?;
        let attempt = attempt(&mut transaction, operations, now, lock_wait_max).await;
        match attempt.map_err(Failure::before_effect) {
            Ok(Attempt::Written(decided)) => {
                transaction.commit().await.map_err(at_commit)?;
                return Ok(decided);
            }
            Ok(Attempt::Idle(decided)) => {
                transaction.rollback().await.map_err(before_commit)?;
                return Ok(decided);
            }
            Ok(Attempt::Overtaken) => transaction.rollback().await.map_err(before_commit)?,
            Err(failure) => {
                return roll_back(transaction, Err(failure))
                    .await
                    .map_err(Failure::before_effect);
            }
        }
    }
    Err(swallowed().into())
}

fn before_commit(error: sqlx::Error) -> Failure {
    Failure::from(error).before_effect()
}

/// The driver counts on a commit that succeeds: a session whose commit was refused is given up.
fn at_commit(error: sqlx::Error) -> Failure {
    Failure {
        ends_session: true,
        ..Failure::from(error)
    }
}

fn is_one_record(operations: &[Operation]) -> bool {
    operations
        .windows(2)
        .all(|two| matches!(two, [one, other] if one.key == other.key))
}

async fn attempt(
    session: &mut PgConnection,
    operations: &[Operation],
    now: Timestamp,
    lock_wait_max: Duration,
) -> Result<Attempt, Failure> {
    let rows = lock(session, &wanted(operations)).await?;
    // A statement of its own, after the locks: it sees whatever they were waited for.
    let names: Vec<(&str, &RequestId)> = operations
        .iter()
        .map(|operation| (operation.key.namespace(), &operation.request.id))
        .collect();
    let (known, horizon) = answers_and_horizon(session, &names).await?;
    #[cfg(feature = "planted-faults")]
    let known = planted::or_unknown(known);
    let plan = plan(operations, &rows, &known, horizon, now);
    #[cfg(feature = "planted-faults")]
    let plan = planted::or_forgotten(plan);

    let ended_before = latest(operations);
    if !claim(session, operations, &plan, ended_before).await? {
        return Ok(Attempt::Overtaken);
    }
    if plan.changed.is_empty() {
        return Ok(Attempt::Idle(plan.decided));
    }
    Ok(if write(session, &plan, ended_before, lock_wait_max).await? {
        Attempt::Written(plan.decided)
    } else {
        Attempt::Overtaken
    })
}

/// The rows of keys, locked.
async fn lock(session: &mut PgConnection, wanted: &[Wanted<'_>]) -> Result<Vec<Option<Standing>>, Failure> {
    let mut standing = vec![None; wanted.len()];
    #[cfg(not(feature = "planted-faults"))]
    let query = sqlx::query(LOCK);
    #[cfg(feature = "planted-faults")]
    let query = planted::or_unlocked(LOCK);
    let rows = query
        .bind(wanted.iter().map(|wanted| wanted.key.namespace()).bind_iter())
        .bind(wanted.iter().map(|wanted| wanted.key.key()).bind_iter())
        .bind(wanted.iter().map(|wanted| wanted.content).bind_iter())
        .fetch_all(session)
        .await?;
    for row in rows {
        let Some(slot) = slot(&mut standing, &row)? else {
            continue;
        };
        let (has_value, value): (bool, Option<&[u8]>) = (row.try_get(2)?, row.try_get(4)?);
        let expires_at: Option<WireTime> = row.try_get(3)?;
        let tags: Option<Vec<String>> = row.try_get(5)?;
        *slot = Some(Standing {
            entry: Entry {
                version: version(row.try_get(1)?)?,
                value: has_value.then(|| bytes::Bytes::copy_from_slice(value.unwrap_or_default())),
                expires_at: expires_at.map(|time| time.0),
            },
            tags: Tags::new(&tags.unwrap_or_default()).map_err(|_| no_tags())?,
        });
    }
    Ok(standing)
}

/// Waits for earlier tries of the operations that change nothing where no row is. `false`: there was one.
async fn claim(
    session: &mut PgConnection,
    operations: &[Operation],
    plan: &Plan,
    ended_before: Timestamp,
) -> Result<bool, Failure> {
    let unguarded = plan.unguarded.iter().filter_map(|place| operations.get(*place));
    let claims: Vec<KeyedAnswer> = unguarded.map(claim_of).collect();
    if claims.is_empty() {
        return Ok(true);
    }
    let claims = of_answers(&claims);
    let mut part = session.begin().await?;
    let rows = bind(sqlx::query(CLAIM), &claims).bind(WireTime(ended_before));
    let rows = rows.fetch_all(&mut *part).await;
    let rows = roll_back(part, rows.map_err(Failure::from)).await?;
    let claimed: i64 = match rows.first() {
        Some(row) => row.try_get(0)?,
        None => 0,
    };
    Ok(is_all(claimed, claims.len()))
}

/// What an operation would leave if it were applied, as far as it takes to meet others with its name.
fn claim_of(operation: &Operation) -> KeyedAnswer {
    KeyedAnswer {
        key: operation.key.clone(),
        answered: Answered {
            request: operation.request.clone(),
            answer: Answer {
                version: operation.version,
                counter: None,
                expires_at: None,
            },
        },
    }
}

/// Writes what was decided. `false`: not all of it could be.
async fn write(
    session: &mut PgConnection,
    plan: &Plan,
    ended_before: Timestamp,
    lock_wait_max: Duration,
) -> Result<bool, Failure> {
    let changed = &plan.changed;
    let entries = || changed.iter().map(|changed| &changed.write.entry);
    let named = of_answers(&plan.remembered);
    #[cfg(not(feature = "planted-faults"))]
    let query = sqlx::query(WRITE_DECIDED);
    #[cfg(feature = "planted-faults")]
    let query = planted::or_unlocked(WRITE_DECIDED);
    let query = query
        .bind(changed.iter().map(|changed| changed.write.key.namespace()).bind_iter())
        .bind(changed.iter().map(|changed| changed.write.key.key()).bind_iter())
        .bind(entries().map(|entry| entry.version.get()).bind_iter())
        .bind(entries().map(|entry| entry.value.as_deref()).bind_iter())
        .bind(entries().map(|entry| entry.expires_at.map(WireTime)).bind_iter())
        .bind(
            changed
                .iter()
                .map(|changed| keys::array_text(&changed.write.tags))
                .bind_iter(),
        )
        .bind(changed.iter().map(|changed| changed.seen.map(Version::get)).bind_iter());
    let query = bind(query, &named)
        .bind(WireTime(ended_before))
        .bind(lock_wait_max.as_millis().to_string());
    let rows = query.fetch_all(session).await?;
    let row = rows.first().ok_or_else(swallowed)?;
    let [updated, inserted, remembered]: [i64; 3] = [row.try_get(0)?, row.try_get(1)?, row.try_get(2)?];
    let seen = changed.iter().filter(|changed| changed.seen.is_some()).count();
    // A locked row is moved, unless something of the table's own prevents it.
    if !is_all(updated, seen) {
        return Err(swallowed().into());
    }
    Ok(is_all(inserted, changed.len() - seen) && is_all(remembered, named.len()))
}

fn is_all(written: i64, wanted: usize) -> bool {
    usize::try_from(written).is_ok_and(|written| written == wanted)
}

/// By which a window is over, for ids that were read as unknown: one that is over for an operation is over by then.
fn latest(operations: &[Operation]) -> Timestamp {
    let asked_at = operations.iter().map(|operation| operation.asked_at).max();
    asked_at.unwrap_or(Timestamp(i64::MIN))
}
