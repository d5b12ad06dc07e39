//! What the planted faults of this backend do to a commit, and to a decision.
//!
//! Owns nothing but harm. Each does nothing unless it is the chosen one.

use sqlx::{
    AssertSqlSafe, Postgres,
    postgres::{PgArguments, PgBindIterExt, PgConnection},
    query::Query,
};

use super::failure::Failure;
use crate::{
    model::{Answered, Write},
    planted::{self, Fault},
    store::decide::Plan,
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

/// A statement of a decision, or with [`Fault::DecidedUnlocked`] one that neither locks what stands nor cares that it still does.
pub(super) fn or_unlocked(statement: &'static str) -> Query<'static, Postgres, PgArguments> {
    if planted::is(Fault::DecidedUnlocked) {
        let unlocked = statement.replace("for update of e", "");
        let unguarded = unlocked.replace("stored.version = batch.seen", "stored.version < batch.version");
        sqlx::query(AssertSqlSafe(unguarded))
    } else {
        sqlx::query(statement)
    }
}

/// What is known of requests, or with [`Fault::RequestNotLookedUp`] nothing.
pub(super) fn or_unknown(known: Vec<Option<Answered>>) -> Vec<Option<Answered>> {
    if planted::is(Fault::RequestNotLookedUp) {
        vec![None; known.len()]
    } else {
        known
    }
}

/// What is to be written, with [`Fault::RequestNotLookedUp`] without what is to be remembered.
pub(super) fn or_forgotten(mut plan: Plan) -> Plan {
    if planted::is(Fault::RequestNotLookedUp) {
        plan.remembered.clear();
    }
    plan
}
