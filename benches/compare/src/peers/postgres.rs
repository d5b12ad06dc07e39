//! PostgreSQL itself, measured by `pgbench`: each write a transaction of its own that upserts one row, synced when it is answered.
//!
//! Owns the table, which is the gateway's with all its indexes, the script, and what the program says. Does not own the server. Invariant: the rows were
//! overwritten as often as the program says that it did.

use std::{fs, path::PathBuf, time::Duration};

use sqlx::{PgConnection, query, query_scalar};
use tokio::process::Command;

use super::output;
use crate::{
    Failure, calls,
    harness::{postgres, process::Directory},
};

/// The processes of these wait for the disk more than they compute: so many threads drive any number of clients.
const THREADS: usize = 2;

/// One upsert. Its parameters travel as text, which for the value are its bytes as they are: it has no backslash.
fn script(keys: usize) -> String {
    let last = keys - 1;
    let namespace = calls::NAMESPACE;
    format!(
        "\\set index random(0, {last})\n\
         insert into tidegate_entries as stored (namespace, key, version, value) \
         values ('{namespace}', 'key:' || lpad(:index::text, 8, '0'), 1, :value) \
         on conflict (namespace, key) do update set version = stored.version + 1, value = excluded.value;\n"
    )
}

/// A database with the gateway's tables and its records, and the program that overwrites them.
pub struct Pgbench {
    program: PathBuf,
    url: String,
    directory: Directory,
    value_bytes: usize,
}

impl Pgbench {
    /// Makes a database on a server, which should be a durable one, and fills it with so many records.
    pub async fn prepare(server: &postgres::Server, keys: usize, value_bytes: usize) -> Result<Pgbench, Failure> {
        let url = server.create_database().await;
        let mut connection = postgres::connect(&url).await;
        sqlx::migrate!("../../migrations/postgres").run(&mut connection).await?;
        let fill = query(
            "insert into tidegate_entries (namespace, key, version, value) \
             select $1, 'key:' || lpad(index::text, 8, '0'), 1, convert_to($2, 'UTF8') \
             from generate_series(0, $3 - 1) as index",
        );
        fill.bind(calls::NAMESPACE)
            .bind("v".repeat(value_bytes))
            .bind(i64::try_from(keys)?)
            .execute(&mut connection)
            .await?;
        // Else the first turn would pay for the filling.
        for statement in ["vacuum analyze tidegate_entries", "checkpoint"] {
            query(statement).execute(&mut connection).await?;
        }
        let directory = Directory::new("pgbench");
        fs::write(directory.path().join("upsert.sql"), script(keys))?;
        Ok(Pgbench {
            program: program(),
            url,
            directory,
            value_bytes,
        })
    }

    /// Upserts per second of so many clients, each of which waits for its answer, over so long: whole seconds, at least one.
    pub async fn measure(&self, clients: usize, how_long: Duration) -> Result<f64, Failure> {
        let mut connection = postgres::connect(&self.url).await;
        let before = overwrites(&mut connection).await?;
        let mut command = Command::new(&self.program);
        command
            .args(["--no-vacuum", "--protocol=prepared", "--file"])
            .arg(self.directory.path().join("upsert.sql"))
            .arg(format!("--define=value={}", "v".repeat(self.value_bytes)))
            .args([
                "--client",
                &clients.to_string(),
                "--jobs",
                &THREADS.min(clients).to_string(),
            ])
            .args(["--time", &how_long.as_secs().max(1).to_string()])
            .arg(&self.url);
        let said = output(&mut command, how_long).await?;
        let told = Told::read(&said).ok_or_else(|| format!("pgbench does not tell its rate: {said}"))?;
        let overwritten = overwrites(&mut connection).await? - before;
        if told.failed > 0 || told.processed == 0 || overwritten != told.processed {
            return Err(format!("pgbench overwrote {overwritten} rows and says: {said}").into());
        }
        Ok(told.per_second)
    }
}

/// The pgbench beside the server that runs, so that both are of one version; else any.
fn program() -> PathBuf {
    let beside = postgres::binary("postgres").with_file_name("pgbench");
    if beside.is_file() {
        beside
    } else {
        postgres::binary("pgbench")
    }
}

/// How often the rows were written: each overwrite raises a version by one.
async fn overwrites(connection: &mut PgConnection) -> Result<i64, Failure> {
    let sum = query_scalar("select coalesce(sum(version), 0)::bigint from tidegate_entries");
    Ok(sum.fetch_one(connection).await?)
}

/// What the program says of a run.
struct Told {
    per_second: f64,
    processed: i64,
    failed: i64,
}

impl Told {
    /// The lines `number of transactions actually processed: N`, `number of failed transactions: N (0.000%)`, which came with version 15, and
    /// `tps = RATE (without initial connection time)`.
    fn read(said: &str) -> Option<Told> {
        let line = |start: &str| {
            said.lines()
                .find_map(|line| line.strip_prefix(start))?
                .split(' ')
                .next()
        };
        Some(Told {
            per_second: line("tps = ")?.parse().ok()?,
            processed: line("number of transactions actually processed: ")?.parse().ok()?,
            failed: line("number of failed transactions: ").map_or(Ok(0), str::parse).ok()?,
        })
    }
}
