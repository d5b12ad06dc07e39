//! What an error of SQLite means.
//!
//! Owns the one table from result codes to [`StoreErrorKind`]. Does not own what happens next. Invariants: an error is called definite
//! (`Transient`, `Rejected`) only if SQLite is known to have rolled back; only what is about the row itself is `Rejected`; damage to the file
//! is no row's fault.

use sqlx::sqlite::SqliteError;

use crate::store::{StoreError, StoreErrorKind};

/// A failed statement.
pub(super) struct Failure {
    pub(super) error: StoreError,
    /// Whether the connection must not be used again.
    pub(super) ends_connection: bool,
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Failure {
        if let sqlx::Error::Database(error) = &error
            && let Some(error) = error.try_downcast_ref::<SqliteError>()
        {
            return Failure::of_database(error);
        }
        // The others may quote what was read or written, and all but this one are faults of the gateway.
        let message = match error {
            sqlx::Error::WorkerCrashed => "the thread of the SQLite connection is gone",
            _ => "the driver could not make sense of the exchange with SQLite",
        };
        Failure {
            error: StoreError::new(StoreErrorKind::Unknown, message),
            ends_connection: true,
        }
    }
}

impl From<StoreError> for Failure {
    /// An error that the connection outlives.
    fn from(error: StoreError) -> Failure {
        Failure {
            error,
            ends_connection: false,
        }
    }
}

impl Failure {
    fn of_database(error: &SqliteError) -> Failure {
        use sqlx::error::DatabaseError as _;

        // The driver gives the extended result code as a decimal number.
        let extended: i32 = error.code().and_then(|code| code.parse().ok()).unwrap_or(1);
        let (name, kind) = meaning(extended);
        Failure {
            error: StoreError {
                kind,
                code: Some(format!("{name} ({extended})")),
                message: error.message().to_owned(),
            },
            // Opening anew takes a millisecond, and leaves no doubt about transactions.
            ends_connection: kind != StoreErrorKind::Rejected,
        }
    }

    /// The same failure, after an earlier statement of the call took effect.
    pub(super) fn after_effect(mut self) -> Failure {
        self.error.kind = StoreErrorKind::Unknown;
        self
    }
}

/// The name of a result code and what it means.
fn meaning(extended: i32) -> (&'static str, StoreErrorKind) {
    use StoreErrorKind::{Rejected, Transient, Unknown, Unreachable};

    // The low byte is the primary code, the rest refines it.
    match extended & 0xff {
        // What the row holds.
        18 => ("SQLITE_TOOBIG", Rejected),
        19 => ("SQLITE_CONSTRAINT", Rejected),
        20 => ("SQLITE_MISMATCH", Rejected),
        // A sync that failed may have left the commit's last page in the log, to be found after a crash.
        10 => ("SQLITE_IOERR", Unknown),
        // Nothing could be opened, so nothing was done.
        14 => ("SQLITE_CANTOPEN", Unreachable),
        // Rolled back, or not begun. A write that found no room is cut short, and so is no valid commit.
        2 => ("SQLITE_INTERNAL", Transient),
        3 => ("SQLITE_PERM", Transient),
        4 => ("SQLITE_ABORT", Transient),
        5 => ("SQLITE_BUSY", Transient),
        6 => ("SQLITE_LOCKED", Transient),
        7 => ("SQLITE_NOMEM", Transient),
        8 => ("SQLITE_READONLY", Transient),
        9 => ("SQLITE_INTERRUPT", Transient),
        11 => ("SQLITE_CORRUPT", Transient),
        13 => ("SQLITE_FULL", Transient),
        15 => ("SQLITE_PROTOCOL", Transient),
        17 => ("SQLITE_SCHEMA", Transient),
        21 => ("SQLITE_MISUSE", Transient),
        22 => ("SQLITE_NOLFS", Transient),
        23 => ("SQLITE_AUTH", Transient),
        25 => ("SQLITE_RANGE", Transient),
        26 => ("SQLITE_NOTADB", Transient),
        // A missing table or column, and codes not listed.
        _ => ("SQLITE_ERROR", Transient),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use StoreErrorKind::{Rejected, Transient, Unknown, Unreachable};

    #[test]
    fn result_codes_mean_what_they_should() {
        let table = [
            (1, Transient),     // ERROR: no such table
            (2, Transient),     // INTERNAL
            (3, Transient),     // PERM
            (4, Transient),     // ABORT
            (5, Transient),     // BUSY
            (261, Transient),   // BUSY_RECOVERY
            (517, Transient),   // BUSY_SNAPSHOT
            (6, Transient),     // LOCKED
            (7, Transient),     // NOMEM
            (8, Transient),     // READONLY
            (1032, Transient),  // READONLY_DBMOVED
            (10, Unknown),      // IOERR
            (778, Unknown),     // IOERR_WRITE
            (1034, Unknown),    // IOERR_FSYNC
            (11, Transient),    // CORRUPT
            (13, Transient),    // FULL
            (14, Unreachable),  // CANTOPEN
            (526, Unreachable), // CANTOPEN_ISDIR
            (15, Transient),    // PROTOCOL
            (17, Transient),    // SCHEMA
            (18, Rejected),     // TOOBIG
            (19, Rejected),     // CONSTRAINT
            (275, Rejected),    // CONSTRAINT_CHECK
            (1811, Rejected),   // CONSTRAINT_TRIGGER: raise(abort, …)
            (2067, Rejected),   // CONSTRAINT_UNIQUE
            (3091, Rejected),   // CONSTRAINT_DATATYPE
            (20, Rejected),     // MISMATCH
            (21, Transient),    // MISUSE
            (23, Transient),    // AUTH
            (25, Transient),    // RANGE
            (26, Transient),    // NOTADB
            (255, Transient),   // of a later SQLite
        ];
        for (extended, kind) in table {
            assert_eq!(meaning(extended).1, kind, "{extended}");
        }
    }
}
