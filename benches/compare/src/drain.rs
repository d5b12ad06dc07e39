//! The drain alone, and its ceiling: how many rows a second a backlog of the queue becomes in PostgreSQL, and how many one statement makes of
//! the same rows, taken from a table beside it.
//!
//! Owns the gateway, the database of each, the backlog and the time. Does not own what the ratio has to be. Both databases are of one server, whose
//! commits are on its disk; both tables are made by the migrations and begin each turn empty. Invariants: the backlog is whole before the first of
//! it is let go, for until then each write waits out a delay that no turn lasts; a turn counts only with every row in the table, under a version
//! of that turn.

use std::{path::Path, sync::Arc, time::Duration};

use sqlx::{Executor, PgConnection, migrate::Migrator};
use tidegate::rpc::proto::{AwaitPersistedRequest, WriteMode, gateway_client::GatewayClient};
use tokio::{sync::Mutex, time::Instant};

use crate::{
    Failure,
    calls::{self, Calls},
    harness::{Gateway, Setup, eventually, expect, postgres},
    load::{self, Shape},
};

/// The rows of a turn, of as many keys: enough to take some seconds, and three times the writes that a queue holds by default.
pub const ROWS: usize = 300_000;
const VALUE_BYTES: usize = 100;
const BATCH: usize = 100;
const SHAPE: Shape = Shape {
    connections: 8,
    streams: 4,
};
/// No turn takes longer.
const DRAIN_WAIT: Duration = Duration::from_secs(60);

/// Room for the whole backlog, without pressure, and a delay that only whoever awaits the writes ends.
const CONFIG: &str = r#"
[queue]
entries_max = 1_000_000
bytes_max = 1_073_741_824
pressure = 1.0

[namespaces.bench]
write_delay = "1h"
"#;

/// The rows as the gateway gets them, in the same order: of each batch the keys lie far from each other.
const STAGE: &str = "
    create unlogged table staged as
    select 'bench'::text as namespace, 'key:' || lpad((item * (rows / batch) + number)::text, 8, '0') as key,
           (number * batch + item + 1)::bigint as version, value
      from (select $1::bigint as rows, $2::bigint as batch, $3::bytea as value) as given,
           generate_series(0, rows / batch - 1) as number, generate_series(0, batch - 1) as item";

/// The ceiling: the columns and the rule of the drain's own statement, and nothing of what it does for single rows.
const INSERT_SELECT: &str = "
    insert into tidegate_entries as stored (namespace, key, version, value)
    select namespace, key, version + $1, value from staged
        on conflict (namespace, key) do update
       set version = excluded.version, value = excluded.value,
           expires_at = excluded.expires_at, tags = excluded.tags, collectable_at = excluded.collectable_at
     where stored.version < excluded.version";

/// Rows per second.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Into an empty table.
    pub new: f64,
    /// Over all of these rows.
    pub updates: f64,
}

/// Both, ready to take turns.
pub struct Drain {
    gateway: Gateway,
    /// Of the gateway's database, for looking and emptying.
    drained: Mutex<PgConnection>,
    /// Of the ceiling's.
    staged: Mutex<PgConnection>,
    writes: Arc<Calls>,
    _server: postgres::Server,
}

impl Drain {
    /// Starts a server, and a gateway before one of its databases.
    pub async fn start() -> Result<Drain, Failure> {
        let server = postgres::Server::start_durable().await;
        let database = server.create_database().await;
        let gateway = Setup::new().store(&database).config(CONFIG).start().await;
        let mut staged = postgres::connect(&server.create_database().await).await;
        let migrations = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations/postgres");
        Migrator::new(migrations).await?.run(&mut staged).await?;
        sqlx::query(STAGE)
            .bind(i64::try_from(ROWS)?)
            .bind(i64::try_from(BATCH)?)
            .bind(&calls::value(VALUE_BYTES)[..])
            .execute(&mut staged)
            .await?;
        staged.execute("vacuum analyze staged").await?;
        Ok(Drain {
            gateway,
            drained: Mutex::new(postgres::connect(&database).await),
            staged: Mutex::new(staged),
            writes: calls::batch_writes(ROWS, BATCH, VALUE_BYTES, WriteMode::Behind)?,
            _server: server,
        })
    }

    /// One turn of the gateway: its queue, filled and let go, twice.
    pub async fn drain(&self) -> Result<Rates, Failure> {
        let mut connection = self.drained.lock().await;
        empty(&mut connection).await?;
        let new = self.let_go(&mut connection).await?;
        settle(&mut connection).await?;
        let updates = self.let_go(&mut connection).await?;
        Ok(Rates { new, updates })
    }

    /// One turn of the ceiling: its statement, twice.
    pub async fn ceiling(&self) -> Result<Rates, Failure> {
        let mut connection = self.staged.lock().await;
        empty(&mut connection).await?;
        let new = insert_select(&mut connection, 0).await?;
        settle(&mut connection).await?;
        let updates = insert_select(&mut connection, ROWS).await?;
        Ok(Rates { new, updates })
    }

    /// Fills the queue, and measures how long it takes to empty.
    async fn let_go(&self, connection: &mut PgConnection) -> Result<f64, Failure> {
        let newest = newest(connection).await?;
        load::each_once(self.gateway.address, &self.writes, SHAPE).await?;
        eventually("the backlog is whole", DRAIN_WAIT, async || {
            let pending = self.gateway.metric("tidegate_queue_pending_entries", &[]).await;
            expect(pending == ROWS as f64, pending)
        })
        .await;
        let mut everything = tonic::Request::new(AwaitPersistedRequest::default());
        everything.set_timeout(DRAIN_WAIT);
        let begun = Instant::now();
        let mut client = GatewayClient::new(self.gateway.channel());
        client.await_persisted(everything).await?;
        let elapsed = begun.elapsed();
        check(connection, newest).await?;
        Ok(ROWS as f64 / elapsed.as_secs_f64())
    }
}

async fn insert_select(connection: &mut PgConnection, add: usize) -> Result<f64, Failure> {
    let newest = newest(connection).await?;
    let begun = Instant::now();
    sqlx::query(INSERT_SELECT)
        .bind(i64::try_from(add)?)
        .execute(&mut *connection)
        .await?;
    let elapsed = begun.elapsed();
    check(connection, newest).await?;
    Ok(ROWS as f64 / elapsed.as_secs_f64())
}

/// The highest version in the table; 0 in an empty one.
async fn newest(connection: &mut PgConnection) -> Result<i64, Failure> {
    let newest = sqlx::query_scalar("select coalesce(max(version), 0) from tidegate_entries");
    Ok(newest.fetch_one(connection).await?)
}

/// Every row is there, and has moved.
async fn check(connection: &mut PgConnection, before: i64) -> Result<(), Failure> {
    let rows: i64 = sqlx::query_scalar("select count(*) from tidegate_entries where version > $1")
        .bind(before)
        .fetch_one(connection)
        .await?;
    if rows != i64::try_from(ROWS)? {
        return Err(format!("{rows} rows have moved, where {ROWS} were to").into());
    }
    Ok(())
}

async fn empty(connection: &mut PgConnection) -> Result<(), Failure> {
    connection.execute("truncate tidegate_entries").await?;
    settle(connection).await
}

/// What the turn before has left to the server is done now, and not in the next one.
async fn settle(connection: &mut PgConnection) -> Result<(), Failure> {
    for statement in ["vacuum analyze tidegate_entries", "checkpoint"] {
        connection.execute(statement).await?;
    }
    Ok(())
}
