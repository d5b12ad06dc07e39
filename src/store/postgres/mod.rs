//! PostgreSQL as the store.
//!
//! Owns how a session is opened and what it demands of the server, and the migrations. Its parts own the calls, their SQL, what the server's
//! errors mean, and times on the wire. Does not own retries, timeouts of a call or the breaker
//! ([`crate::store::Session`]). Invariants: a connection is dedicated, never pooled; it is to a primary that commits before it
//! answers, or it is refused.
//!
//! **Poolers.** The session's settings travel as the startup parameter `options`, and statements are prepared once per connection. So
//! connect directly, or through a pooler in session mode that passes `options` on. One that drops it is noticed and refused; one in
//! transaction mode cannot be noticed, and breaks migrations.

mod collect;
mod connection;
mod failure;
mod statements;
mod time;

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use sqlx::{
    ConnectOptions, Connection as _, Row,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgConnection},
};
use tokio::time::timeout;

use crate::store::{
    Backend, Connection, StoreError, StoreErrorKind,
    postgres::{connection::PostgresConnection, failure::Failure},
};

/// The oldest major version that is accepted: the oldest that its makers still maintain.
const SERVER_VERSION_MIN: i32 = 14;

/// The table in which sqlx keeps which migrations were applied.
const MIGRATIONS_TABLE: &str = "tidegate_migrations";

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
    pub fn new(url: &str, call_timeout: Duration) -> Result<Postgres, StoreError> {
        check_url(url)?;
        let options: PgConnectOptions = url
            .parse()
            .map_err(|error: sqlx::Error| invalid_url(&format!("cannot be read: {}", configuration_error(&error))))?;
        let options = match options.get_application_name() {
            Some(_) => options,
            None => options.application_name("tidegate"),
        };
        let options = options.disable_statement_logging();
        let call_millis = call_timeout.as_millis();
        let session = options
            .clone()
            .options(settings(call_millis * 4 / 5, call_millis * 2 / 5));
        // A migration may rewrite a table, or wait for another gateway's.
        let migration = options.options(settings(0, 0));
        Ok(Postgres {
            dialler: Arc::new(Dialler {
                session,
                migration,
                dial_timeout: call_timeout / 2,
                writers_wait: call_timeout / 2,
            }),
        })
    }

    /// Brings the tables up to date. Several gateways may do so at once: one does, the others wait for it. Tables that a newer gateway
    /// migrated further are accepted, for migrations only ever add (so that an upgrade can be rolled back).
    ///
    /// May take as long as a migration takes; the caller bounds it. If the future is dropped, the running migration is rolled back.
    ///
    /// # Errors
    /// [`StoreErrorKind::Rejected`] when waiting will not help: the server is too old, is not in UTF-8, is told not to wait for its disk, or
    /// has tables of our names that are not ours. All other kinds may pass: the server is starting, or a standby.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        let mut connection = self.dialler.dial(&self.dialler.migration).await?;
        let mut migrator: Migrator = sqlx::migrate!("migrations/postgres");
        migrator.set_ignore_missing(true);
        migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
        migrator
            .run_direct(None, &mut connection, false)
            .await
            .map_err(migration_error)?;
        // Ends the session politely; everything is committed.
        let _ = connection.close().await;
        self.check().await
    }

    /// Checks that the server and its tables are fit for use: for a start without [`Postgres::migrate`].
    ///
    /// # Errors
    /// As [`Postgres::migrate`]; [`StoreErrorKind::Transient`] when a table or column is missing.
    pub async fn check(&self) -> Result<(), StoreError> {
        let mut connection = self.dialler.dial(&self.dialler.session).await?;
        let looked = sqlx::query(
            "select e.collectable_at, d.reason, n.high_water, c.gc_horizon
               from tidegate_entries e, tidegate_dead_letters d, tidegate_nodes n, tidegate_control c
              limit 0",
        )
        .fetch_all(&mut connection)
        .await;
        let _ = connection.close().await;
        looked.map(drop).map_err(|error| Failure::from(error).error)
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
    session: PgConnectOptions,
    migration: PgConnectOptions,
    dial_timeout: Duration,
    /// How long a collection waits for the commits that began before it.
    writers_wait: Duration,
}

impl Dialler {
    /// A new session for statements.
    ///
    /// # Errors
    /// Always [`StoreErrorKind::Unreachable`]: nothing was sent, whatever the reason.
    async fn session(&self) -> Result<PgConnection, StoreError> {
        self.dial(&self.session).await.map_err(|error| StoreError {
            kind: StoreErrorKind::Unreachable,
            ..error
        })
    }

    /// A new session to a server that is fit for use.
    ///
    /// # Errors
    /// [`StoreErrorKind::Rejected`] from a server that will never be, else [`StoreErrorKind::Unreachable`].
    async fn dial(&self, options: &PgConnectOptions) -> Result<PgConnection, StoreError> {
        self.in_time(async {
            let mut connection = PgConnection::connect_with(options).await.map_err(unreachable)?;
            check_server(&mut connection).await?;
            Ok(connection)
        })
        .await
    }

    async fn in_time<T>(&self, dial: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        timeout(self.dial_timeout, dial).await.unwrap_or_else(|_| {
            Err(StoreError::new(
                StoreErrorKind::Unreachable,
                "no connection to PostgreSQL in time",
            ))
        })
    }
}

/// The settings of a session, that neither the server's nor the role's defaults may change. 0 is no limit.
fn settings(statement_millis: u128, lock_millis: u128) -> [(&'static str, String); 10] {
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
    StoreError {
        kind: StoreErrorKind::Unreachable,
        ..Failure::from(error).error
    }
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

fn invalid_url(what: &str) -> StoreError {
    StoreError::new(StoreErrorKind::Rejected, format!("the store's URL {what}"))
}

/// The parameters that the driver knows. It would ignore others, and log their values.
const PARAMETERS: [&str; 18] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

fn check_url(url: &str) -> Result<(), StoreError> {
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return Err(invalid_url("must begin with postgres:// or postgresql://"));
    }
    let query = url.split_once('?').map_or("", |(_, query)| query);
    for (position, pair) in query.split('&').filter(|pair| !pair.is_empty()).enumerate() {
        let name = pair.split('=').next().unwrap_or_default();
        if !PARAMETERS.contains(&name) && !name.starts_with("options[") && !name.starts_with("options%5B") {
            // A stray `?` in a password makes its rest look like a parameter, so even the name is not shown.
            return Err(invalid_url(&format!(
                "has an unknown parameter, number {} after the `?`",
                position + 1
            )));
        }
    }
    Ok(())
}

/// What is wrong with a URL, without quoting it.
fn configuration_error(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Configuration(source) => match source.to_string() {
            // The driver's own texts quote the value; those of the URL's grammar are fixed sentences.
            text if text.contains(['"', '`', '\'']) => "a parameter has an unknown value".to_owned(),
            text => text,
        },
        _ => "it is malformed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(url: &str) -> String {
        let refused = Postgres::new(url, Duration::from_secs(10)).err();
        refused.expect("the URL is invalid").to_string()
    }

    #[test]
    fn an_invalid_url_is_refused_without_repeating_it() {
        for url in [
            "secret",
            "mysql://user:secret@host/db",
            "postgres://user:secret@host:notaport/db",
            "postgres://user:secret@host:99999/db",
            "postgres://user:secret@[::1/db",
            "postgres://user:%ffsecret@host/db",
            "postgres://user@host/db?sslmode=secret",
            "postgres://user@host/db?port=secret",
            "postgres://user@host/db?pasword=secret",
            "postgres://user:pass?secret@host/db",
        ] {
            let message = refusal(url);
            assert!(message.starts_with("the store's URL "), "{message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn a_valid_url_needs_no_server() {
        for url in [
            "postgres://host/db",
            "postgresql://user:p%40ss@host:5433/db?sslmode=require&options=-csearch_path%3Dtidegate",
            "postgres:///db?host=/var/run/postgresql&options[search_path]=x",
        ] {
            assert!(Postgres::new(url, Duration::from_secs(10)).is_ok(), "{url}");
        }
    }

    #[test]
    fn the_session_limits_lie_below_the_call_timeout() {
        let postgres = Postgres::new("postgres://host/db", Duration::from_secs(10)).expect("valid");
        let options = postgres.dialler.session.get_options().expect("set").to_owned();
        assert!(options.contains("-c statement_timeout=8000"), "{options}");
        assert!(options.contains("-c lock_timeout=4000"), "{options}");
        assert!(
            options.contains(r"-c default_transaction_isolation=read\ committed"),
            "{options}"
        );
    }
}
