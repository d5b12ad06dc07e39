//! The store as an SQL user sees it: for looking at what the gateway wrote, and for writing past it.
//!
//! Both kinds of store have the same tables, so a test says once what it expects of either.

use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};

use super::{SOON, eventually, expect, postgres, process::Directory};

/// A row of the table of entries.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Row {
    pub version: i64,
    /// `None` is a tombstone.
    pub value: Option<Vec<u8>>,
}

/// A row of the table of dead letters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, sqlx::FromRow)]
pub struct DeadLetter {
    pub key: String,
    pub code: Option<String>,
    pub value: Option<Vec<u8>>,
}

/// A database, by its URL.
pub struct Database {
    url: String,
    _directory: Option<Directory>,
}

/// Runs `$query` on a new connection to whichever database it is.
macro_rules! on {
    ($database:expr, $connection:ident => $query:expr) => {
        if $database.url.starts_with("sqlite:") {
            let mut connection = SqliteConnection::connect(&$database.url).await.expect("SQLite opens");
            let $connection = &mut connection;
            $query.await
        } else {
            let mut connection = PgConnection::connect(&$database.url).await.expect("PostgreSQL answers");
            let $connection = &mut connection;
            $query.await
        }
    };
}

impl Database {
    /// A new SQLite file in a directory of its own; the gateway makes it.
    pub fn sqlite() -> Database {
        let directory = Directory::new("sqlite");
        Database {
            url: format!("sqlite://{}", directory.path().join("records.db").display()),
            _directory: Some(directory),
        }
    }

    /// A fresh database on the shared PostgreSQL.
    pub async fn postgres() -> Database {
        Database::at(&postgres::database().await)
    }

    /// The database at a URL.
    pub fn at(url: &str) -> Database {
        Database {
            url: url.to_owned(),
            _directory: None,
        }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// The row of a key.
    pub async fn row(&self, namespace: &str, key: &str) -> Option<Row> {
        const SQL: &str = "select version, value from tidegate_entries where namespace = $1 and key = $2";
        on!(self, connection => sqlx::query_as(SQL).bind(namespace).bind(key).fetch_optional(connection))
            .expect("the table of entries can be read")
    }

    /// The value of a key's row; `None` for a tombstone and for no row.
    pub async fn value(&self, namespace: &str, key: &str) -> Option<Vec<u8>> {
        self.row(namespace, key).await.and_then(|row| row.value)
    }

    /// The keys of a namespace that a reader of the view sees, in order.
    pub async fn records(&self, namespace: &str) -> Vec<String> {
        const SQL: &str = "select key from tidegate_records where namespace = $1 order by key";
        on!(self, connection => sqlx::query_scalar(SQL).bind(namespace).fetch_all(connection))
            .expect("the view of records can be read")
    }

    /// Where Redis holds the copy of a key of `orders`, under the epoch that holds now and the default prefix.
    pub async fn place(&self, key: &str) -> String {
        const SQL: &str = "select epoch from tidegate_control";
        let epoch: i64 = on!(self, connection => sqlx::query_scalar(SQL).fetch_one(connection))
            .expect("the control row can be read");
        format!("tidegate:{epoch:016x}:orders:{key}")
    }

    /// How many rows the table of entries has.
    pub async fn entries(&self) -> i64 {
        const SQL: &str = "select count(*) from tidegate_entries";
        on!(self, connection => sqlx::query_scalar(SQL).fetch_one(connection))
            .expect("the table of entries can be read")
    }

    /// The dead letters, by key.
    pub async fn dead_letters(&self) -> Vec<DeadLetter> {
        const SQL: &str = "select key, code, value from tidegate_dead_letters order by key";
        on!(self, connection => sqlx::query_as(SQL).fetch_all(connection))
            .expect("the table of dead letters can be read")
    }

    /// Writes a row past the gateway, as a newer version than the one that stands.
    pub async fn write_past(&self, namespace: &str, key: &str, value: &[u8]) {
        const SQL: &str = "insert into tidegate_entries (namespace, key, version, value) values ($1, $2, 1, $3) \
             on conflict (namespace, key) do update set version = tidegate_entries.version + 1, value = excluded.value";
        on!(self, connection => async {
            sqlx::query(SQL).bind(namespace).bind(key).bind(value).execute(connection).await.map(drop)
        })
        .expect("the table of entries can be written");
    }

    /// Runs statements.
    pub async fn execute(&self, sql: &str) {
        let sql = sql.to_owned();
        on!(self, connection => async { sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop) })
            .expect("the statements are right");
    }

    /// The first column of a query, as text.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        let sql = sql.to_owned();
        on!(self, connection => sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(connection))
            .expect("the query is right")
    }

    /// Holds every write to the table of entries, as a long transaction of somebody else would, until dropped. PostgreSQL only.
    pub async fn hold_writes(&self) -> Hold {
        self.hold("share").await
    }

    /// The same, and every read of it.
    pub async fn hold_all(&self) -> Hold {
        self.hold("access exclusive").await
    }

    /// Holds every look at the epochs, until dropped. PostgreSQL only.
    pub async fn hold_epochs(&self) -> Hold {
        self.locked("begin; lock table tidegate_namespace_epochs in access exclusive mode")
            .await
    }

    async fn hold(&self, mode: &str) -> Hold {
        self.locked(&format!("begin; lock table tidegate_entries in {mode} mode"))
            .await
    }

    /// Holds every write of one namespace, until dropped; those of others go on. PostgreSQL only.
    pub async fn hold_namespace(&self, namespace: &str) -> Hold {
        self.execute(&format!(
            "create or replace function wait_for_test() returns trigger language plpgsql as \
                 'begin perform pg_advisory_xact_lock_shared(hashtext(new.namespace)); return new; end'; \
             drop trigger if exists wait_for_test on tidegate_entries; \
             create trigger wait_for_test before insert or update on tidegate_entries \
                 for each row when (new.namespace = '{namespace}') execute function wait_for_test()"
        ))
        .await;
        self.locked(&format!("select pg_advisory_lock(hashtext('{namespace}'))"))
            .await
    }

    async fn locked(&self, lock: &str) -> Hold {
        let mut connection = postgres::connect(&self.url).await;
        sqlx::raw_sql(AssertSqlSafe(lock.to_owned()))
            .execute(&mut connection)
            .await
            .expect("it can be locked");
        Hold { connection }
    }

    /// How many sessions of this database wait for a lock. PostgreSQL only.
    async fn sessions_waiting_for_locks(&self) -> i64 {
        const SQL: &str = "select count(*) from pg_stat_activity \
             where datname = current_database() and wait_event_type = 'Lock'";
        let mut connection = postgres::connect(&self.url).await;
        sqlx::query_scalar(SQL)
            .fetch_one(&mut connection)
            .await
            .expect("a superuser sees every session")
    }

    /// Waits until so many sessions of this database wait for a lock. PostgreSQL only.
    pub async fn await_waiting(&self, sessions: i64) {
        eventually("calls wait for the lock", SOON, async || {
            let waiting = self.sessions_waiting_for_locks().await;
            expect(waiting >= sessions, format!("{waiting} of {sessions}"))
        })
        .await;
    }

    /// Waits until a key's row holds `value`.
    pub async fn await_value(&self, namespace: &str, key: &str, value: &[u8]) {
        eventually(&format!("the row of {key} holds the value"), SOON, async || {
            let row = self.row(namespace, key).await;
            if row.as_ref().and_then(|row| row.value.as_deref()) == Some(value) {
                Ok(())
            } else {
                Err(format!("{row:?}"))
            }
        })
        .await;
    }
}

/// A lock of a session of its own on what the gateway writes to.
pub struct Hold {
    connection: PgConnection,
}

impl Hold {
    /// Lets the writes go on.
    pub async fn release(self) {
        self.connection.close().await.expect("the session ends");
    }
}
