//! What an error of PostgreSQL means.
//!
//! Owns the one table from SQLSTATE to [`StoreErrorKind`], and whether the session is still good for another statement. Does not own
//! what happens next. Invariants: an error is called definite (`Transient`, `Rejected`) only if the server is known to have rolled the
//! statement back; only `Rejected` may lead to a dead letter, so whatever is not surely about the row itself is not `Rejected`.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::store::{StoreError, StoreErrorKind};

/// A failed statement.
pub(super) struct Failure {
    pub(super) error: StoreError,
    /// Whether the connection must not be used again.
    pub(super) ends_session: bool,
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Failure {
        let error = match error {
            sqlx::Error::Database(error) => match error.try_downcast::<PgDatabaseError>() {
                Ok(error) => return Failure::of_server(&error),
                Err(other) => sqlx::Error::Database(other),
            },
            error => error,
        };
        // The statement may have been sent, and how far it came cannot be known.
        let message = match error {
            sqlx::Error::Io(error) => format!("the connection to PostgreSQL broke: {error}"),
            sqlx::Error::Tls(error) => format!("no TLS session with PostgreSQL: {error}"),
            sqlx::Error::Protocol(message) => format!("PostgreSQL answered out of turn: {message}"),
            // The others may quote what was sent or received.
            _ => "the driver could not make sense of the exchange with PostgreSQL".to_owned(),
        };
        Failure {
            error: StoreError::new(StoreErrorKind::Unknown, message),
            ends_session: true,
        }
    }
}

impl From<StoreError> for Failure {
    /// An error that the session outlives.
    fn from(error: StoreError) -> Failure {
        Failure {
            error,
            ends_session: false,
        }
    }
}

impl Failure {
    fn of_server(error: &PgDatabaseError) -> Failure {
        let fatal = matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic);
        let (kind, ends_session) = if fatal {
            (StoreErrorKind::Unknown, true)
        } else {
            meaning(error.code())
        };
        Failure {
            error: StoreError {
                kind,
                code: Some(error.code().to_owned()),
                // The primary message alone: detail, hint and context quote rows.
                message: error.message().to_owned(),
            },
            ends_session,
        }
    }

    /// The same failure, of a transaction whose commit was not sent: the server rolls it back, if it has not.
    pub(super) fn before_effect(mut self) -> Failure {
        if self.error.kind == StoreErrorKind::Unknown {
            self.error.kind = StoreErrorKind::Transient;
        }
        self
    }

    /// The same failure, after an earlier statement of the call took effect.
    pub(super) fn after_effect(mut self) -> Failure {
        self.error.kind = StoreErrorKind::Unknown;
        self
    }
}

/// What a SQLSTATE means, and whether it ends the session.
fn meaning(sqlstate: &str) -> (StoreErrorKind, bool) {
    use StoreErrorKind::{Rejected, Transient, Unknown};
    const KEEP: bool = false;
    const END: bool = true;

    match sqlstate {
        // statement_too_complex: the server's stack, not the row.
        "54001" => (Transient, KEEP),
        // statement_completion_unknown, transaction_resolution_unknown.
        "40003" | "08007" => (Unknown, END),
        // The backend was told to go, or the server is going. PostgreSQL itself has then rolled back, but a pooler says the same of a
        // connection that it lost in the middle of a commit, and a backend that dies with the server may have committed.
        "57P01" | "57P02" | "57P03" | "57P04" | "57P05" => (Unknown, END),
        // idle_in_transaction_session_timeout.
        "25P03" => (Unknown, END),
        // read_only_sql_transaction: perhaps no longer the primary. Dialling anew finds the one that is.
        "25006" => (Transient, END),
        // A prepared statement that is gone or there twice (a pooler), or whose result changed (a migration): a new session has none.
        "42P05" => (Transient, END),
        _ => match sqlstate.get(..2).unwrap_or_default() {
            // Broken connections.
            "08" => (Unknown, END),
            // Our idea of the session is wrong: transaction state, statement names, cursors, authorization; `cached plan must not
            // change result type` is 0A000.
            "0A" | "24" | "25" | "26" | "28" | "2D" | "34" => (Transient, END),
            // What the row holds: data exceptions, integrity constraints, limits, check options; a row that the table's triggers or
            // functions refuse in whatever language (P0 is PL/pgSQL's `raise`); a trigger that leads two rows to one key.
            "22" | "23" | "54" | "44" | "P0" | "09" | "21" | "27" | "2F" | "38" | "39" => (Rejected, KEEP),
            // Rolled back for reasons that pass or that people mend: deadlock and serialization (40), resources (53), locks (55),
            // cancellation and timeouts (57), the system (58), a missing table or right (42), bugs (XX), and codes not listed.
            _ => (Transient, KEEP),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use StoreErrorKind::{Rejected, Transient, Unknown};

    /// (SQLSTATE, meaning, ends the session)
    const TABLE: &[(&str, StoreErrorKind, bool)] = &[
        ("01000", Transient, false), // warning
        ("08000", Unknown, true),    // connection_exception
        ("08003", Unknown, true),    // connection_does_not_exist
        ("08006", Unknown, true),    // connection_failure
        ("08007", Unknown, true),    // transaction_resolution_unknown
        ("08P01", Unknown, true),    // protocol_violation, also what poolers say
        ("09000", Rejected, false),  // triggered_action_exception
        ("0A000", Transient, true),  // feature_not_supported, cached plan must not change result type
        ("21000", Rejected, false),  // cardinality_violation
        ("22000", Rejected, false),  // data_exception
        ("22001", Rejected, false),  // string_data_right_truncation
        ("22003", Rejected, false),  // numeric_value_out_of_range
        ("22008", Rejected, false),  // datetime_field_overflow
        ("22021", Rejected, false),  // character_not_in_repertoire
        ("22P02", Rejected, false),  // invalid_text_representation
        ("22P05", Rejected, false),  // untranslatable_character
        ("23502", Rejected, false),  // not_null_violation
        ("23503", Rejected, false),  // foreign_key_violation
        ("23505", Rejected, false),  // unique_violation
        ("23514", Rejected, false),  // check_violation
        ("23P01", Rejected, false),  // exclusion_violation
        ("24000", Transient, true),  // invalid_cursor_state
        ("25001", Transient, true),  // active_sql_transaction
        ("25006", Transient, true),  // read_only_sql_transaction
        ("25P02", Transient, true),  // in_failed_sql_transaction
        ("25P03", Unknown, true),    // idle_in_transaction_session_timeout
        ("26000", Transient, true),  // invalid_sql_statement_name
        ("27000", Rejected, false),  // triggered_data_change_violation
        ("28000", Transient, true),  // invalid_authorization_specification
        ("28P01", Transient, true),  // invalid_password
        ("2F000", Rejected, false),  // sql_routine_exception
        ("34000", Transient, true),  // invalid_cursor_name
        ("38000", Rejected, false),  // external_routine_exception
        ("39P01", Rejected, false),  // trigger_protocol_violated
        ("3D000", Transient, false), // invalid_catalog_name
        ("3F000", Transient, false), // invalid_schema_name
        ("40001", Transient, false), // serialization_failure
        ("40002", Transient, false), // transaction_integrity_constraint_violation
        ("40003", Unknown, true),    // statement_completion_unknown
        ("40P01", Transient, false), // deadlock_detected
        ("42501", Transient, false), // insufficient_privilege
        ("42703", Transient, false), // undefined_column
        ("42804", Transient, false), // datatype_mismatch
        ("42P01", Transient, false), // undefined_table
        ("42P05", Transient, true),  // duplicate_prepared_statement
        ("44000", Rejected, false),  // with_check_option_violation
        ("53000", Transient, false), // insufficient_resources
        ("53100", Transient, false), // disk_full
        ("53200", Transient, false), // out_of_memory
        ("53300", Transient, false), // too_many_connections
        ("54000", Rejected, false),  // program_limit_exceeded, an index row too large
        ("54001", Transient, false), // statement_too_complex
        ("55000", Transient, false), // object_not_in_prerequisite_state
        ("55006", Transient, false), // object_in_use
        ("55P03", Transient, false), // lock_not_available
        ("57000", Transient, false), // operator_intervention
        ("57014", Transient, false), // query_canceled, statement_timeout
        ("57P01", Unknown, true),    // admin_shutdown
        ("57P02", Unknown, true),    // crash_shutdown
        ("57P03", Unknown, true),    // cannot_connect_now
        ("57P04", Unknown, true),    // database_dropped
        ("57P05", Unknown, true),    // idle_session_timeout
        ("58000", Transient, false), // system_error
        ("58030", Transient, false), // io_error
        ("72000", Transient, false), // snapshot_too_old
        ("F0000", Transient, false), // config_file_error
        ("HV000", Transient, false), // fdw_error
        ("P0001", Rejected, false),  // raise_exception
        ("P0002", Rejected, false),  // no_data_found
        ("P0004", Rejected, false),  // assert_failure
        ("XX000", Transient, false), // internal_error
        ("XX001", Transient, false), // data_corrupted
        ("XX002", Transient, false), // index_corrupted
        ("ZZ999", Transient, false), // somebody's own
        ("", Transient, false),
    ];

    #[test]
    fn sqlstates_mean_what_they_should() {
        for (sqlstate, kind, ends_session) in TABLE {
            assert_eq!(meaning(sqlstate), (*kind, *ends_session), "{sqlstate}");
        }
    }

    #[test]
    fn a_broken_connection_leaves_the_outcome_open() {
        let broken = Failure::from(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into()));
        assert!(broken.ends_session);
        assert_eq!(broken.error.kind, Unknown);
    }

    #[test]
    fn the_driver_s_errors_quote_nothing() {
        let error = sqlx::Error::ColumnDecode {
            index: "0".to_owned(),
            source: "secret".into(),
        };
        assert!(!Failure::from(error).error.message.contains("secret"));
    }
}
