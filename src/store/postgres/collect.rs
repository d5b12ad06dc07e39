//! Collection in PostgreSQL: raise the horizon, wait, delete.
//!
//! Owns the three steps and why nothing deleted can come back. Does not own when it is done ([`crate::store::collect`]) nor the SQL
//! ([`super::statements`]). Invariant: a row is deleted only if no write of its key at or below its version can make a row again, ever.
//!
//! **Why that holds.** Let a row of version `r` be deleted under the horizon `h`, so `r <= h`, and let an upsert bring `v <= r` to its key. An
//! upsert is one statement of a READ COMMITTED transaction: it has one snapshot, takes the table's `RowExclusiveLock` before it takes the
//! snapshot, and keeps it until the commit is over.
//!
//! 1. *Its snapshot has `h`, or a later horizon* (which is higher). Then `v` is not above it, and the upsert makes a row only if it has found
//!    one and locked it with `for key share`. The lock is granted only on a row that is still there, and while it is held no row can be
//!    deleted: the insert meets the row, and the version decides. The lock is only taken by writes this old, so ordinary ones pay nothing.
//! 2. *Its snapshot is older than `h`.* Then it held the table's lock before `h` was committed, so it is among the [`WRITERS`] that are asked
//!    for after that, unless it is over by then. The deletion waits for all of these to end; until then the row is there, and the version
//!    decides. Whoever takes the lock after the question has `h` in its snapshot.
//!
//! The same holds between several collectors: the horizon only rises, each waits after its own update of it, and deletes only up to
//! what that update returned.
//!
//! **What else could have been.** Waiting for a fixed time, longer than any statement: relies on each gateway's timeouts and on the server
//! heeding them at once; the locks are the fact itself, and the wait is mostly a few milliseconds. A shared lock on the control row in each
//! upsert: a write to one hot row for every commit. An advisory lock, shared in each upsert and exclusive in the collector: is granted after
//! the snapshot is taken, so it would prove nothing without a round trip more, and whoever waits for it exclusively halts every commit.

use std::time::Duration;

use sqlx::{Row, postgres::PgConnection};
use tokio::time::{Instant, sleep};

use crate::{
    model::Version,
    store::{
        StoreError, StoreErrorKind,
        postgres::{
            connection::{millis, version},
            failure::Failure,
            statements::{COLLECT, RAISE_HORIZON, WRITERS},
        },
    },
};

/// Between two looks at the commits that are waited for.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// One step of collection: what is past a retention, so many rows at most. Waits no longer than `writers_wait` for commits.
pub(super) async fn collect(
    session: &mut PgConnection,
    (retention, rows_max): (Duration, u32),
    writers_wait: Duration,
) -> Result<u64, Failure> {
    let Some(horizon) = raise_horizon(session, retention, rows_max).await? else {
        return Ok(0);
    };
    await_writers(session, Instant::now() + writers_wait).await?;
    let done = sqlx::query(COLLECT)
        .bind(millis(retention))
        .bind(horizon.get())
        .bind(i64::from(rows_max))
        .execute(session)
        .await?;
    Ok(done.rows_affected())
}

/// Commits a horizon that covers what is due. `None`: nothing is.
async fn raise_horizon(
    session: &mut PgConnection,
    retention: Duration,
    rows_max: u32,
) -> Result<Option<Version>, Failure> {
    let rows = sqlx::query(RAISE_HORIZON)
        .bind(millis(retention))
        .bind(i64::from(rows_max))
        .fetch_all(session)
        .await?;
    rows.first().map(|row| version(row.try_get(0)?)).transpose()
}

/// Waits until every transaction that may be writing to the entries now is over.
async fn await_writers(session: &mut PgConnection, deadline: Instant) -> Result<(), Failure> {
    let mut writers: Option<Vec<String>> = None;
    loop {
        let rows = sqlx::query(WRITERS).bind(writers).fetch_all(&mut *session).await?;
        if rows.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let message = "nothing is collected, for a transaction that writes to tidegate_entries goes on and on: find it in pg_locks";
            return Err(StoreError::new(StoreErrorKind::Transient, message).into());
        }
        writers = Some(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?);
        sleep(LOOK_INTERVAL).await;
    }
}
