//! The URL of a PostgreSQL database.
//!
//! Owns what it may say, and which database it leads to. Does not own the settings of a session ([`super`]). Invariant: nothing that the URL
//! holds is repeated in an error, and its password nowhere.

use sqlx::{ConnectOptions, postgres::PgConnectOptions};

use crate::store::{StoreError, StoreErrorKind};

/// Where the driver looks for a server when it is told no host: a socket if it is there now, else the loopback.
const HOSTS_BY_DEFAULT: [&str; 4] = ["/var/run/postgresql", "/private/tmp", "/tmp", "localhost"];

/// The parameters of a session but for its settings. What the URL leaves out comes from the environment and `~/.pgpass`.
///
/// # Errors
/// [`StoreErrorKind::Rejected`] for an invalid URL.
pub(super) fn options(url: &str) -> Result<PgConnectOptions, StoreError> {
    check(url)?;
    let options: PgConnectOptions = url
        .parse()
        .map_err(|error: sqlx::Error| invalid_url(&format!("cannot be read: {}", configuration_error(&error))))?;
    let options = match options.get_application_name() {
        Some(_) => options,
        None => options.application_name("tidegate"),
    };
    Ok(options.disable_statement_logging())
}

/// Which database a URL leads to, and to which tables of it.
pub(super) fn identity(url: &str) -> String {
    // Whoever asks has read it before.
    let Ok(options) = options(url) else {
        return String::new();
    };
    let host = match options.get_socket() {
        Some(directory) => directory.display().to_string(),
        // Which of them it is depends on whether the server runs.
        None if HOSTS_BY_DEFAULT.contains(&options.get_host()) => "local".to_owned(),
        None => options.get_host().to_owned(),
    };
    let (user, port) = (options.get_username(), options.get_port());
    let database = options.get_database().unwrap_or(user);
    // They choose the schema, and may hold anything.
    let settings = crc32c::crc32c(options.get_options().unwrap_or_default().as_bytes());
    format!("{user}@{host}:{port}/{database} {settings:08x}")
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

fn check(url: &str) -> Result<(), StoreError> {
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
        options(url).expect_err("the URL is invalid").to_string()
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
            assert!(options(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn a_store_is_known_by_where_its_tables_are_and_not_by_its_secrets() {
        let one = identity("postgres://user:secret@host:5433/db?sslmode=require");
        assert!(
            one.starts_with("user@host:5433/db ") && !one.contains("secret"),
            "{one}"
        );
        assert_eq!(identity("postgresql://user:other@host:5433/db"), one);
        for other in [
            "postgres://user@elsewhere:5433/db",
            "postgres://user@host:5434/db",
            "postgres://user@host:5433/other",
            "postgres://other@host:5433/db",
            "postgres://user@host:5433/db?options=-csearch_path%3Dtidegate",
            "postgres://user@host:5433/db?host=/run/sockets",
        ] {
            assert_ne!(identity(other), one, "{other}");
        }
        // Whether the socket is there now says whether the server runs, and not which one it is.
        let sockets = identity("postgres://user@%2Fvar%2Frun%2Fpostgresql:5433/db");
        assert_eq!(
            identity("postgres://user@localhost:5433/db"),
            sockets.replace("/var/run/postgresql", "local")
        );
    }
}
