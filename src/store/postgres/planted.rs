//! What the planted faults of this backend do to a commit.
//!
//! Owns nothing but harm. Each does nothing unless it is the chosen one.

use sqlx::{
    AssertSqlSafe, Postgres,
    postgres::{PgArguments, PgBindIterExt, PgConnection},
    query::Query,
};

use super::failure::Failure;
use crate::{
    model::Write,
    planted::{self, Fault},
};

/// The upsert, or with [`Fault::NoVersionGuard`] one that lets the last to come win.
pub(super) fn or_unguarded(upsert: &'static str) -> Query<'static, Postgres, PgArguments> {
    const GUARD: &str = "where stored.version < excluded.version";
    if planted::is(Fault::NoVersionGuard) {
        sqlx::query(AssertSqlSafe(upsert.replace(GUARD, "")))
    } else {
        sqlx::query(upsert)
    }
}

/// With [`Fault::DeleteWithoutTombstone`] a delete takes its row along.
pub(super) async fn forget_tombstones(session: &mut PgConnection, writes: &[Write]) -> Result<(), Failure> {
    if planted::is(Fault::DeleteWithoutTombstone) {
        let deleted = writes.iter().filter(|write| write.entry.value.is_none());
        sqlx::query("delete from tidegate_entries where value is null and key = any ($1)")
            .bind(deleted.map(|write| write.key.key()).bind_iter())
            .execute(session)
            .await?;
    }
    Ok(())
}
