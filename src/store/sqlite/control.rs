//! The control row in SQLite: read, and its epochs moved.
//!
//! Owns the calls. Does not own the SQL ([`super::statements`]) nor when they are made ([`crate::store::control`]). Invariant: what one call
//! reads or changes, it reads or changes in one transaction.

use sqlx::{Connection as _, Row, sqlite::SqliteConnection};

use super::{
    connection::end,
    failure::Failure,
    statements::{CONTROL, END_NAMESPACE_EPOCHS, MOVE_ALL_EPOCHS, MOVE_EPOCH, MOVE_NAMESPACE_EPOCH, NAMESPACE_EPOCHS},
};
use crate::{
    model::{Epoch, Timestamp, Version},
    store::{Control, NAMESPACE_EPOCHS_MAX, NamespaceMoved, verdict::no_control_row},
};

pub(super) async fn control(reader: &mut SqliteConnection) -> Result<Control, Failure> {
    let mut transaction = reader.begin().await?;
    let read = read(&mut transaction).await;
    end(transaction, read).await
}

async fn read(reader: &mut SqliteConnection) -> Result<Control, Failure> {
    let rows = sqlx::query(CONTROL).fetch_all(&mut *reader).await?;
    let row = rows.first().ok_or_else(no_control_row)?;
    let namespaces = sqlx::query(NAMESPACE_EPOCHS).fetch_all(reader).await?;
    let namespaces = namespaces
        .iter()
        .map(|row| {
            let moved = NamespaceMoved {
                epoch: Epoch(row.try_get(1)?),
                moved_at: Timestamp(row.try_get(2)?),
            };
            Ok((row.try_get(0)?, moved))
        })
        .collect::<Result<_, sqlx::Error>>()?;
    Ok(Control {
        epoch: Epoch(row.try_get(0)?),
        cache_server: row.try_get(1)?,
        moved_at: row.try_get::<Option<i64>, _>(4)?.map(Timestamp),
        namespaces,
        gc_horizon: Version::new(row.try_get(2)?),
        now: Timestamp(row.try_get(3)?),
    })
}

pub(super) async fn move_epoch(
    writer: &mut SqliteConnection,
    from: Epoch,
    to: Epoch,
    cache_server: Option<&str>,
) -> Result<bool, Failure> {
    let mut transaction = writer.begin_with("begin immediate").await?;
    let moved = try_to_move(&mut transaction, from, to, cache_server).await;
    end(transaction, moved).await
}

async fn try_to_move(
    writer: &mut SqliteConnection,
    from: Epoch,
    to: Epoch,
    cache_server: Option<&str>,
) -> Result<bool, Failure> {
    let done = sqlx::query(MOVE_EPOCH)
        .bind(from.0)
        .bind(to.0)
        .bind(cache_server)
        .execute(&mut *writer)
        .await?;
    let moved = done.rows_affected() == 1;
    if moved {
        sqlx::query(END_NAMESPACE_EPOCHS).execute(writer).await?;
    }
    Ok(moved)
}

pub(super) async fn move_namespace_epoch(
    writer: &mut SqliteConnection,
    namespace: &str,
    to: Epoch,
) -> Result<(), Failure> {
    let mut transaction = writer.begin_with("begin immediate").await?;
    let moved = move_one_or_all(&mut transaction, namespace, to).await;
    end(transaction, moved).await
}

async fn move_one_or_all(writer: &mut SqliteConnection, namespace: &str, to: Epoch) -> Result<(), Failure> {
    let done = sqlx::query(MOVE_NAMESPACE_EPOCH)
        .bind(namespace)
        .bind(to.0)
        .bind(i64::from(NAMESPACE_EPOCHS_MAX))
        .execute(&mut *writer)
        .await?;
    if done.rows_affected() == 0 {
        let done = sqlx::query(MOVE_ALL_EPOCHS).bind(to.0).execute(&mut *writer).await?;
        if done.rows_affected() == 0 {
            return Err(no_control_row().into());
        }
        sqlx::query(END_NAMESPACE_EPOCHS).execute(writer).await?;
    }
    Ok(())
}
