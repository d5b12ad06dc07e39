//! The control row in PostgreSQL: read, and its epochs moved.
//!
//! Owns the calls. Does not own the SQL ([`super::statements`]) nor when they are made ([`crate::store::control`]). Invariant: a move is one
//! statement, so that no gateway sees half of it.

use sqlx::{Row, postgres::PgConnection};

use super::{
    failure::Failure,
    statements::{CONTROL, MOVE_ALL_EPOCHS, MOVE_EPOCH, MOVE_NAMESPACE_EPOCH},
    time::WireTime,
};
use crate::{
    model::{Epoch, Version},
    store::{Control, NAMESPACE_EPOCHS_MAX, NamespaceMoved, verdict::no_control_row},
};

pub(super) async fn control(session: &mut PgConnection) -> Result<Control, Failure> {
    let rows = sqlx::query(CONTROL).fetch_all(session).await?;
    let row = rows.first().ok_or_else(no_control_row)?;
    let WireTime(now) = row.try_get(3)?;
    let namespaces: Vec<String> = row.try_get(4)?;
    let epochs: Vec<i64> = row.try_get(5)?;
    let moved: Vec<WireTime> = row.try_get(6)?;
    let moved_at: Option<WireTime> = row.try_get(7)?;
    let epochs = epochs
        .into_iter()
        .zip(moved)
        .map(|(epoch, WireTime(moved_at))| NamespaceMoved {
            epoch: Epoch(epoch),
            moved_at,
        });
    Ok(Control {
        epoch: Epoch(row.try_get(0)?),
        cache_server: row.try_get(1)?,
        moved_at: moved_at.map(|WireTime(at)| at),
        namespaces: namespaces.into_iter().zip(epochs).collect(),
        gc_horizon: Version::new(row.try_get(2)?),
        now,
    })
}

pub(super) async fn move_epoch(
    session: &mut PgConnection,
    from: Epoch,
    to: Epoch,
    cache_server: Option<&str>,
) -> Result<bool, Failure> {
    let rows = sqlx::query(MOVE_EPOCH)
        .bind(from.0)
        .bind(to.0)
        .bind(cache_server)
        .fetch_all(session)
        .await?;
    let moved: i64 = rows.first().map_or(Ok(0), |row| row.try_get(0))?;
    Ok(moved == 1)
}

pub(super) async fn move_namespace_epoch(
    session: &mut PgConnection,
    namespace: &str,
    to: Epoch,
) -> Result<(), Failure> {
    let done = sqlx::query(MOVE_NAMESPACE_EPOCH)
        .bind(namespace)
        .bind(to.0)
        .bind(i64::from(NAMESPACE_EPOCHS_MAX))
        .execute(&mut *session)
        .await?;
    if done.rows_affected() == 0 {
        let rows = sqlx::query(MOVE_ALL_EPOCHS).bind(to.0).fetch_all(session).await?;
        let moved: i64 = rows.first().map_or(Ok(0), |row| row.try_get(0))?;
        if moved == 0 {
            return Err(no_control_row().into());
        }
    }
    Ok(())
}
