//! SQLite as the store: one file, one gateway.
//!
//! Owns how the file is opened, created and kept to one process, and the migrations. Its parts own the calls, their SQL, and what SQLite's
//! errors mean. Does not own retries, timeouts of a call or the breaker ([`crate::store::Session`]). Invariants: one
//! connection writes, for all sessions; each commit is synced to disk before it is answered (WAL, `synchronous=FULL`); a file that
//! another process holds, or that is not the gateway's own, is refused.
//!
//! While it is open, the file is `NAME` with `NAME-wal` and `NAME-shm`: copy it with SQLite's `.backup`, not file by file. `NAME.lock` keeps
//! other gateways out; it stays, empty, and means nothing once its process is gone. Reading with the `sqlite3` shell at the same time is fine.

mod connection;
mod control;
mod decide;
mod failure;
mod keys;
mod letters;
mod requests;
mod statements;

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read},
    path::{self, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use sqlx::{
    ConnectOptions, Connection as _,
    migrate::{MigrateError, Migrator},
    sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous},
};
use tokio::sync::Mutex;

use crate::store::{
    Backend, Connection, StoreError, StoreErrorKind,
    sqlite::{connection::SharedConnection, failure::Failure},
};

/// The table in which sqlx keeps which migrations were applied.
const MIGRATIONS_TABLE: &str = "tidegate_migrations";

/// What the first migration marks the file with: 'TdGt'.
const APPLICATION_ID: i32 = 0x5464_4774;

/// How every SQLite file begins.
const FILE_HEADER: &[u8; 16] = b"SQLite format 3\0";

/// An SQLite database, held by this process for as long as this or a connection of it lives.
pub struct Sqlite {
    file: Arc<DatabaseFile>,
}

/// The file and what all connections share of it.
struct DatabaseFile {
    /// The one connection that writes; `None` until a call opens it. Whoever uses it takes it out, so that a call that is cut off
    /// takes it along: what it left in the middle is rolled back when it is dropped.
    writer: Mutex<Option<SqliteConnection>>,
    writing: SqliteConnectOptions,
    reading: SqliteConnectOptions,
    /// Locked: no other gateway uses the file.
    _lock: File,
}

impl Sqlite {
    /// Opens the database of a URL, `sqlite://PATH` or `sqlite:PATH` (the rest is the path as it is, relative to the working directory), or
    /// of a plain path. Creates the directory and the file, readable by this user alone, and brings the tables up to date.
    ///
    /// `call_timeout` is the bound that callers put on each call: a writer waits half of it for a lock that another program holds. Does
    /// blocking file I/O: to be called at start.
    ///
    /// # Errors
    /// [`StoreErrorKind::Rejected`], with one line that names the path, for what waiting does not help: not a database, not ours, a
    /// directory, not writable. [`StoreErrorKind::Unreachable`] while another gateway holds the file.
    pub async fn open(url: &str, call_timeout: Duration) -> Result<Sqlite, StoreError> {
        let path = path_of(url)?;
        let (path, lock) = claim(&path)?;
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .busy_timeout(call_timeout / 2)
            .pragma("temp_store", "memory")
            .disable_statement_logging();
        let writing = options
            .clone()
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            // After a burst the write-ahead log gives its space back.
            .pragma("journal_size_limit", "67108864");
        let reading = options.read_only(true);

        let mut connection = SqliteConnection::connect_with(&writing)
            .await
            .map_err(|error| unusable(&path, &Failure::from(error).error.to_string()))?;
        check_owner(&mut connection, &path).await?;
        migrate(&mut connection, &path).await?;
        Ok(Sqlite {
            file: Arc::new(DatabaseFile {
                writer: Mutex::new(Some(connection)),
                writing,
                reading,
                _lock: lock,
            }),
        })
    }
}

#[async_trait]
impl Backend for Sqlite {
    fn writers_max(&self) -> usize {
        1
    }

    fn connection(&self) -> Box<dyn Connection> {
        Box::new(SharedConnection::new(Arc::clone(&self.file)))
    }
}

/// Checks that a URL names a file.
pub(super) fn check_url(url: &str) -> Result<(), StoreError> {
    path_of(url).map(drop)
}

fn path_of(url: &str) -> Result<PathBuf, StoreError> {
    let invalid = |what: &str| {
        Err(StoreError::new(
            StoreErrorKind::Rejected,
            format!("the store's URL {what}"),
        ))
    };
    let text = url
        .strip_prefix("sqlite://")
        .or_else(|| url.strip_prefix("sqlite:"))
        .unwrap_or(url);
    if text.is_empty() {
        return invalid("names no file: sqlite://PATH");
    }
    if text.contains(['?', '#', '\0']) {
        return invalid("takes no parameters: sqlite://PATH, and the path may not hold '?' or '#'");
    }
    if text == ":memory:" {
        return invalid("must name a file: a database in memory would not survive the process");
    }
    // Absolute, or SQLite would read a name like `file:x` as a URI of its own.
    path::absolute(text).or_else(|_| invalid("is not a usable path"))
}

/// Makes the file this process's own, and creates it if it is not there. Its real path, and the lock.
fn claim(path: &Path) -> Result<(PathBuf, File), StoreError> {
    let refuse = |what: &'static str| move |error: io::Error| unusable(path, &format!("{what}: {error}"));
    if path.is_dir() {
        return Err(unusable(path, "it is a directory, not a file"));
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(unusable(path, "it names no file"));
    };
    create_directory(directory).map_err(refuse("its directory cannot be created"))?;
    // One lock for all names of the file.
    let real = fs::canonicalize(path)
        .or_else(|_| fs::canonicalize(directory).map(|directory| directory.join(name)))
        .map_err(refuse("its real path cannot be found"))?;
    let mut lock_path = real.clone().into_os_string();
    lock_path.push(".lock");
    let lock = open_private(Path::new(&lock_path)).map_err(refuse("the lock file beside it cannot be opened"))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(StoreError::new(
                StoreErrorKind::Unreachable,
                format!(
                    "another gateway is using the database {}: each needs a file of its own, or all of them PostgreSQL",
                    path.display()
                ),
            ));
        }
        Err(TryLockError::Error(error)) => return Err(refuse("the lock file beside it cannot be locked")(error)),
    }
    // Only under the lock: closing the file would drop the record locks that another connection of this process holds on it.
    let mut header = Vec::with_capacity(FILE_HEADER.len());
    open_private(&real)
        .map_err(refuse("it cannot be opened for writing"))?
        .take(FILE_HEADER.len() as u64)
        .read_to_end(&mut header)
        .map_err(refuse("it cannot be read"))?;
    if !header.is_empty() && header != FILE_HEADER {
        return Err(unusable(path, "it is not an SQLite database"));
    }
    Ok((real, lock))
}

#[cfg(unix)]
fn open_private(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path)
}

#[cfg(not(unix))]
fn open_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path)
}

#[cfg(unix)]
fn create_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;

    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(not(unix))]
fn create_directory(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// Refuses a database that another program made. An empty one is welcome, and so is one of which only the table of migrations was made.
async fn check_owner(connection: &mut SqliteConnection, path: &Path) -> Result<(), StoreError> {
    let (application_id, tables): (i32, i32) = sqlx::query_as(
        "select (select application_id from pragma_application_id),
                (select count(*) from sqlite_schema where name not like 'sqlite_%' and name <> 'tidegate_migrations')",
    )
    .fetch_one(connection)
    .await
    .map_err(|error| unusable(path, &Failure::from(error).error.to_string()))?;
    if application_id == APPLICATION_ID || (application_id == 0 && tables == 0) {
        return Ok(());
    }
    Err(unusable(path, "it is the database of another program"))
}

/// Brings the tables up to date. Tables that a newer gateway migrated further are accepted, for migrations only ever add.
async fn migrate(connection: &mut SqliteConnection, path: &Path) -> Result<(), StoreError> {
    let mut migrator: Migrator = sqlx::migrate!("migrations/sqlite");
    migrator.set_ignore_missing(true);
    migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
    migrator
        .run_direct(None, connection, false)
        .await
        .map_err(|error| match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
                unusable(path, &Failure::from(error).error.to_string())
            }
            error => unusable(path, &format!("the tables cannot be brought up to date: {error}")),
        })
}

fn unusable(path: &Path, why: &str) -> StoreError {
    StoreError::new(
        StoreErrorKind::Rejected,
        format!("the database {} cannot be used: {why}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_a_prefix_and_a_path() {
        for url in [
            "sqlite:///var/lib/x%20.db",
            "sqlite:/var/lib/x%20.db",
            "/var/lib/x%20.db",
        ] {
            assert_eq!(path_of(url).expect("valid"), Path::new("/var/lib/x%20.db"), "{url}");
        }
        assert!(path_of("sqlite://data/x.db").expect("valid").ends_with("data/x.db"));
        for url in ["", "sqlite:", "sqlite://", "sqlite://x.db?mode=rwc", "sqlite::memory:"] {
            assert!(path_of(url).is_err(), "{url}");
        }
    }
}
