//! PostgreSQL as the store.
//!
//! Owns how a session is opened and what it demands of the server, and the migrations. Its parts own the calls, their SQL, what the server's
//! errors mean, when the tables are prepared, and times on the wire. Does not own retries, timeouts of a call or the breaker
//! ([`crate::store::Session`]). Invariants: a connection is dedicated, never pooled; it is to a primary that commits before it
//! answers, or it is refused; no call is sent before the tables were found, or brought, up to date in this process.
//!
//! **Poolers.** The session's settings travel as the startup parameter `options`, and statements are prepared once per connection. So
//! connect directly, or through a pooler in session mode that passes `options` on. One that drops it is noticed and refused; one in
//! transaction mode cannot be noticed, and breaks migrations.

mod collect;
mod connection;
mod control;
mod decide;
mod failure;
mod keys;
mod letters;
#[cfg(feature = "planted-faults")]
mod planted;
mod preparation;
mod requests;
mod statements;
mod time;
mod url;

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::Mutex;
use sqlx::{
    Connection as _, Row,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgConnection},
};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use crate::store::{
    Backend, Connection, StoreError, StoreErrorKind,
    postgres::{
        connection::PostgresConnection,
        failure::Failure,
        preparation::{Preparation, Progress},
    },
};

/// The oldest major version that is accepted: the oldest that its makers still maintain.
const SERVER_VERSION_MIN: i32 = 14;

/// The table in which sqlx keeps which migrations were applied.
const MIGRATIONS_TABLE: &str = "tidegate_migrations";

/// How long migrations may take: so long that only one whose connection died without a word is given up.
const MIGRATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// What is done about the tables before they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tables {
    /// They are brought up to date. Several gateways may do so at once: one does, the others wait for it. Tables that a newer gateway
    /// migrated further are accepted, for migrations only ever add (so that an upgrade can be rolled back).
    Migrate,
    /// They are looked at: somebody else has brought them up to date, and the role needs no right to do so.
    Check,
}

/// A PostgreSQL database.
pub struct Postgres {
    dialler: Arc<Dialler>,
}

impl Postgres {
    /// A database by its URL: `postgres://user:password@host:port/database`, with libpq's parameters (`sslmode`, `options`, ...). What
    /// the URL leaves out comes from the `PG…` environment variables and `~/.pgpass`, as with libpq. Does no I/O but to read that
    /// file. The tables are in the first schema of the search path: `?options=-csearch_path=…` chooses another.
    ///
    /// `call_timeout` is the bound that callers put on each call: the server gives up a little earlier, so that a slow statement
    /// ends as a definite failure, and a connection is dialled in half of it.
    ///
    /// # Errors
    /// [`StoreErrorKind::Rejected`] for an invalid URL, naming what is wrong and no part of the URL's values.
    pub fn new(url: &str, call_timeout: Duration, tables: Tables) -> Result<Postgres, StoreError> {
        url::options(url)?;
        Ok(Postgres {
            dialler: Arc::new(Dialler {
                url: url.to_owned(),
                call_timeout,
                tables,
                preparation: Preparation::default(),
                refused: Mutex::default(),
            }),
        })
    }

    /// Which database this is, as far as its URL says and the environment for what the URL leaves out: the same for two URLs that lead to the
    /// same tables in the same way. Holds no secret.
    pub fn identity(&self) -> String {
        url::identity(&self.dialler.url)
    }

    /// Waits until the server is fit for use and its tables are up to date. What first uses the database would do so too; a start that waits
    /// for it hears the reason when it is not. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// [`StoreErrorKind::Rejected`] when waiting will not help: the server is too old, is not in UTF-8, is told not to wait for its disk, or
    /// has tables of our names that are not ours. [`StoreErrorKind::Transient`] when somebody has to do something: a table is missing, the role
    /// is not let in. [`StoreErrorKind::Unreachable`] or [`StoreErrorKind::Unknown`] when the server is away, starting, or a standby.
    pub async fn prepare(&self) -> Result<(), StoreError> {
        self.dialler.prepared().await
    }
}

#[async_trait]
impl Backend for Postgres {
    /// Bounded by the server's `max_connections`, not by its design.
    fn writers_max(&self) -> usize {
        usize::MAX
    }

    fn connection(&self) -> Box<dyn Connection> {
        Box::new(PostgresConnection::new(Arc::clone(&self.dialler)))
    }
}

/// How to open a session.
struct Dialler {
    /// Read anew for each session: where the server is by default, and its password, may have changed since.
    url: String,
    call_timeout: Duration,
    tables: Tables,
    preparation: Preparation,
    /// Why the server was refused last: said once.
    refused: Mutex<String>,
}

impl Dialler {
    /// A new session for statements.
    ///
    /// # Errors
    /// Always [`StoreErrorKind::Unreachable`]: nothing was sent, whatever the reason.
    async fn session(self: &Arc<Dialler>) -> Result<PgConnection, StoreError> {
        let opening = self.in_time(async {
            self.prepared().await?;
            self.dial(self.session_options()?).await
        });
        opening.await.map_err(|error| {
            if error.kind == StoreErrorKind::Rejected {
                self.say_refused(&error);
            }
            StoreError {
                kind: StoreErrorKind::Unreachable,
                ..error
            }
        })
    }

    /// Waits until the tables are up to date.
    async fn prepared(self: &Arc<Dialler>) -> Result<(), StoreError> {
        let dialler = Arc::clone(self);
        let begin = async move |progress: watch::Sender<Progress>| {
            let result = dialler.try_to_prepare(&progress).await;
            progress.send_replace(Progress::Ended(result, Instant::now()));
        };
        self.preparation.ended(begin).await
    }

    async fn try_to_prepare(&self, progress: &watch::Sender<Progress>) -> Result<(), StoreError> {
        if self.tables == Tables::Migrate {
            let connection = self.in_time(self.dial(self.migration_options()?)).await?;
            progress.send_replace(Progress::Migrating);
            let migrated = timeout(MIGRATION_MAX, migrate(connection)).await;
            migrated.unwrap_or_else(|_| {
                let message = "the tables were not brought up to date within a day";
                Err(StoreError::new(StoreErrorKind::Transient, message))
            })?;
        }
        let connection = self.in_time(self.dial(self.session_options()?)).await?;
        timeout(self.call_timeout, check_tables(connection))
            .await
            .unwrap_or_else(|_| {
                let message = "PostgreSQL did not say in time whether the tables are there";
                Err(StoreError::new(StoreErrorKind::Unreachable, message))
            })
    }

    /// A new session to a server that is fit for use.
    ///
    /// # Errors
    /// [`StoreErrorKind::Rejected`] from a server that will never be, [`StoreErrorKind::Transient`] from one that does not let us in, else
    /// [`StoreErrorKind::Unreachable`].
    async fn dial(&self, options: PgConnectOptions) -> Result<PgConnection, StoreError> {
        let mut connection = PgConnection::connect_with(&options).await.map_err(unreachable)?;
        check_server(&mut connection).await?;
        Ok(connection)
    }

    async fn in_time<T>(&self, opening: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        timeout(self.call_timeout / 2, opening).await.unwrap_or_else(|_| {
            let message = if self.preparation.is_migrating() {
                "the tables are being brought up to date"
            } else {
                "no connection to PostgreSQL in time"
            };
            Err(StoreError::new(StoreErrorKind::Unreachable, message))
        })
    }

    /// The server gives up a little before its caller does.
    fn session_options(&self) -> Result<PgConnectOptions, StoreError> {
        let call_millis = self.call_timeout.as_millis();
        let settings = settings(call_millis * 4 / 5, self.lock_wait_max().as_millis());
        Ok(url::options(&self.url)?.options(settings))
    }

    /// How long a session waits for one lock, if it is not told to wait less.
    fn lock_wait_max(&self) -> Duration {
        self.call_timeout * 2 / 5
    }

    /// A migration may rewrite a table, or wait for another gateway's.
    fn migration_options(&self) -> Result<PgConnectOptions, StoreError> {
        Ok(url::options(&self.url)?.options(settings(0, 0)))
    }

    /// How long a collection waits for the commits that began before it.
    fn writers_wait(&self) -> Duration {
        self.call_timeout / 2
    }

    /// A start is told by its own error; this is for a gateway that runs.
    fn say_refused(&self, error: &StoreError) {
        let reason = error.to_string();
        let mut refused = self.refused.lock();
        if *refused != reason {
            tracing::error!(
                reason,
                "what answers in the store's place is not fit for use: nothing is sent to it, and what is accepted is kept; put the right \
                 store there, or restart with its URL"
            );
            *refused = reason;
        }
    }
}

/// Brings the tables up to date. If the future is dropped, the migration that runs is rolled back.
async fn migrate(mut connection: PgConnection) -> Result<(), StoreError> {
    let mut migrator: Migrator = sqlx::migrate!("migrations/postgres");
    migrator.set_ignore_missing(true);
    migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
    migrator
        .run_direct(None, &mut connection, false)
        .await
        .map_err(migration_error)?;
    // Ends the session politely; everything is committed.
    let _ = connection.close().await;
    Ok(())
}

/// Checks that the tables have every column that is used.
async fn check_tables(mut connection: PgConnection) -> Result<(), StoreError> {
    let looked = sqlx::query(
        "select e.collectable_at, e.tags, d.reason, d.attempts, n.high_water, c.gc_horizon, c.epoch, c.moved_at, c.cache_server, s.epoch, s.moved_at,
                r.ends_at
           from tidegate_entries e, tidegate_dead_letters d, tidegate_nodes n, tidegate_control c, tidegate_namespace_epochs s,
                tidegate_requests r
          where false",
    )
    .fetch_all(&mut connection)
    .await;
    let _ = connection.close().await;
    looked.map(drop).map_err(|error| Failure::from(error).error)
}

/// The settings of a session, that neither the server's nor the role's defaults may change. 0 is no limit.
fn settings(statement_millis: u128, lock_millis: u128) -> [(&'static str, String); 11] {
    [
        ("statement_timeout", statement_millis.to_string()),
        ("lock_timeout", lock_millis.to_string()),
        // A transaction of several statements whose gateway vanished holds its locks no longer than this.
        ("idle_in_transaction_session_timeout", statement_millis.to_string()),
        ("synchronous_commit", "on".to_owned()),
        ("default_transaction_isolation", "read committed".to_owned()),
        // Notices of triggers may quote rows, and the driver would log them.
        ("client_min_messages", "error".to_owned()),
        // Rows are only ever reached by their primary key. A plan cached while a table was small must not scan it when it is large.
        ("plan_cache_mode", "force_generic_plan".to_owned()),
        ("enable_seqscan", "off".to_owned()),
        ("enable_hashjoin", "off".to_owned()),
        ("enable_mergejoin", "off".to_owned()),
        // Every statement here is short; and one that must scan after all looks so dear by the above that the server would compile it first.
        ("jit", "off".to_owned()),
    ]
}

/// Refuses a server that would break what an OK means.
async fn check_server(connection: &mut PgConnection) -> Result<(), StoreError> {
    // One round trip: nothing is prepared.
    let row = sqlx::raw_sql(
        "select current_setting('server_version_num')::integer,
                current_setting('server_encoding'),
                current_setting('synchronous_commit'),
                pg_is_in_recovery()",
    )
    .fetch_one(connection)
    .await
    .map_err(unreachable)?;
    let version: i32 = row.try_get(0).map_err(unreachable)?;
    let encoding: String = row.try_get(1).map_err(unreachable)?;
    let synchronous_commit: String = row.try_get(2).map_err(unreachable)?;
    let standby: bool = row.try_get(3).map_err(unreachable)?;

    let unfit = |message: String| Err(StoreError::new(StoreErrorKind::Rejected, message));
    if version / 10_000 < SERVER_VERSION_MIN {
        return unfit(format!(
            "PostgreSQL {} is too old: {SERVER_VERSION_MIN} or later is needed",
            version / 10_000
        ));
    }
    if encoding != "UTF8" {
        return unfit(format!(
            "the database's encoding must be UTF8, for keys are UTF-8: it is {encoding}"
        ));
    }
    if synchronous_commit != "on" {
        return unfit(format!(
            "synchronous_commit is {synchronous_commit} although the session asked for on: a pooler drops the startup parameter `options`"
        ));
    }
    if standby {
        // Its reads lag behind and it takes no writes. It may be promoted.
        return Err(StoreError::new(
            StoreErrorKind::Unreachable,
            "the server is a standby: the URL must lead to the primary",
        ));
    }
    Ok(())
}

/// An error of dialling: whatever it is, nothing of a call was sent.
fn unreachable(error: sqlx::Error) -> StoreError {
    let error = Failure::from(error).error;
    let kind = match error.code.as_deref().and_then(|code| code.get(..2)) {
        // It is there, and refuses the role, or has no such database: what somebody has to mend is no outage.
        Some("28" | "3D") => StoreErrorKind::Transient,
        _ => StoreErrorKind::Unreachable,
    };
    StoreError { kind, ..error }
}

fn migration_error(error: MigrateError) -> StoreError {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
            let error = Failure::from(error).error;
            // A table of our name that is not ours, a type that exists: the same again next time.
            let kind = match error.code.as_deref() {
                Some("42P07" | "42710" | "42723" | "42P06" | "42501") => StoreErrorKind::Rejected,
                _ => error.kind,
            };
            StoreError { kind, ..error }
        }
        error => StoreError::new(
            StoreErrorKind::Rejected,
            format!("the tables cannot be brought up to date: {error}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_session_limits_lie_below_the_call_timeout() {
        let postgres = Postgres::new("postgres://host/db", Duration::from_secs(10), Tables::Check).expect("valid");
        let options = postgres.dialler.session_options().expect("valid");
        let options = options.get_options().expect("set");
        assert!(options.contains("-c statement_timeout=8000"), "{options}");
        assert!(options.contains("-c lock_timeout=4000"), "{options}");
        assert!(
            options.contains(r"-c default_transaction_isolation=read\ committed"),
            "{options}"
        );
    }
}
