//! What every store must do, run against the real PostgreSQL and the real SQLite.
//!
//! Owns the contract of `store::Backend` and `store::Connection` as tests: each function under "The contract" proves one sentence of it
//! for both backends. What only one of them has (sessions that are killed, files that are locked) follows below. Does not own the
//! in-memory fake, nor what is built on a store. The parts about the control row and about
//! finding keys are in `store_control.rs` and `store_keys.rs`.

use std::{
    cell::Cell,
    collections::BTreeMap,
    future::{Future, poll_fn},
    path::PathBuf,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use proptest::{
    prelude::{Just, Strategy, any},
    prop_oneof,
    test_runner::{Config, TestRunner},
};
use sqlx::{Connection as _, PgConnection, SqliteConnection};
use tidegate::{
    model::{Entry, Key, Tags, Timestamp, Version, Write},
    store::{
        Backend, Claimant, Committed, Connection, DeadLetter, Store, StoreError, StoreErrorKind,
        postgres::{Postgres, Tables},
        sqlite::Sqlite,
    },
};
use tokio::time::{Instant, sleep, timeout};

use crate::harness::{
    Database,
    postgres::{Server, database},
    until,
};

pub const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// A backend, and a way to its database past it.
pub struct Fixture {
    backend: Arc<dyn Backend>,
    pub database: Database,
}

impl Fixture {
    pub async fn postgres() -> Fixture {
        Fixture::postgres_at(Database::postgres().await).await
    }

    pub async fn postgres_at(database: Database) -> Fixture {
        let backend = Postgres::new(database.url(), CALL_TIMEOUT, Tables::Migrate).expect("a valid URL");
        backend.prepare().await.expect("a new database takes the tables");
        Fixture {
            backend: Arc::new(backend),
            database,
        }
    }

    pub async fn sqlite() -> Fixture {
        Fixture::sqlite_at(Database::sqlite()).await
    }

    pub async fn sqlite_at(database: Database) -> Fixture {
        let backend = Sqlite::open(database.url(), CALL_TIMEOUT).await.expect("its own file");
        Fixture {
            backend: Arc::new(backend),
            database,
        }
    }

    /// It as a gateway has it, with a breaker of its own.
    pub fn store(&self) -> Store {
        Store::new(Arc::clone(&self.backend), Arc::default(), CALL_TIMEOUT)
    }

    pub fn connection(&self) -> Box<dyn Connection> {
        self.backend.connection()
    }

    /// Runs SQL past the backend: one text for PostgreSQL, one for SQLite.
    pub async fn execute(&self, postgres: &str, sqlite: &str) {
        let is_sqlite = self.database.url().starts_with("sqlite:");
        self.database.execute(if is_sqlite { sqlite } else { postgres }).await;
    }

    /// The first column of a query, as text.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        self.database.texts(sql).await
    }

    /// Makes everything that can be collected an hour old.
    pub async fn age(&self) {
        let hour = now() - 3_600_000;
        self.execute(
            &format!(
                "update tidegate_entries set collectable_at = to_timestamp({hour} / 1000.0) where collectable_at is not null"
            ),
            &format!("update tidegate_entries set collectable_at = {hour} where collectable_at is not null"),
        )
        .await;
    }

    async fn horizon(&self) -> i64 {
        let horizon = self
            .texts("select cast(gc_horizon as text) from tidegate_control")
            .await;
        horizon[0].parse().expect("a number")
    }

    /// From now on the table refuses rows whose value is `poison`.
    pub async fn refuse_poison(&self) {
        self.execute(
            "alter table tidegate_entries add constraint no_poison check (value <> 'poison')",
            "create trigger no_poison before insert on tidegate_entries when new.value = cast('poison' as blob)
             begin select raise(abort, 'no poison'); end",
        )
        .await;
    }
}

fn url_of(path: &std::path::Path) -> String {
    format!("sqlite://{}", path.display())
}

pub fn key(namespace: &str, key: &str) -> Key {
    Key::new(namespace, key).expect("a valid key")
}

pub fn version(number: i64) -> Version {
    Version::new(number).expect("a positive version")
}

pub fn entry(number: i64, value: Option<&str>) -> Entry {
    Entry {
        version: version(number),
        value: value.map(|value| Bytes::copy_from_slice(value.as_bytes())),
        expires_at: None,
    }
}

pub fn write(name: &str, number: i64, value: Option<&str>) -> Write {
    Write {
        key: key("orders", name),
        entry: entry(number, value),
        tags: Tags::default(),
        requests: Vec::new(),
    }
}

pub async fn commit(connection: &mut dyn Connection, mut writes: Vec<Write>) -> Vec<Committed> {
    writes.sort_by(|a, b| a.key.cmp(&b.key));
    connection.commit(&writes).await.expect("the store takes the writes")
}

pub async fn load(connection: &mut dyn Connection, key: &Key) -> Option<Entry> {
    let loaded = connection.load(std::slice::from_ref(key)).await.expect("loads");
    loaded.into_iter().next().expect("one answer per key")
}

pub fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.expect_err("the store refuses").kind
}

/// The time, in milliseconds since the Unix epoch.
pub fn now() -> i64 {
    let since = std::time::UNIX_EPOCH.elapsed().expect("after 1970");
    i64::try_from(since.as_millis()).expect("before the end of time")
}

// The contract.

async fn the_newest_write_stands(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let one = key("orders", "one");
    let applied = [Committed::Applied];
    assert_eq!(commit(connection, vec![write("one", 5, Some("five"))]).await, applied);
    assert_eq!(commit(connection, vec![write("one", 9, Some("nine"))]).await, applied);
    let lost = commit(connection, vec![write("one", 7, Some("seven"))]).await;
    assert_eq!(lost, [Committed::Superseded { standing: version(9) }]);
    assert_eq!(load(connection, &one).await, Some(entry(9, Some("nine"))));
    // The same write again is applied already, and changes nothing.
    assert_eq!(commit(connection, vec![write("one", 9, Some("other"))]).await, applied);
    assert_eq!(load(connection, &one).await, Some(entry(9, Some("nine"))));
}

async fn each_write_of_a_batch_is_answered_for_itself(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("b", 10, Some("b")), write("d", 10, None)]).await;
    let batch = vec![
        write("a", 3, Some("a")),
        write("b", 3, Some("late")),
        write("c", 3, None),
        write("d", 10, Some("again")),
        write("e", 30, Some("e")),
    ];
    assert_eq!(
        commit(connection, batch).await,
        [
            Committed::Applied,
            Committed::Superseded { standing: version(10) },
            Committed::Applied,
            Committed::Applied,
            Committed::Applied,
        ]
    );
    assert_eq!(load(connection, &key("orders", "d")).await, Some(entry(10, None)));
}

async fn a_tombstone_is_an_entry_without_a_value(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let one = key("orders", "one");
    for (number, value) in [(1, None), (2, Some("back")), (3, None)] {
        commit(connection, vec![write("one", number, value)]).await;
        assert_eq!(load(connection, &one).await, Some(entry(number, value)));
    }
    let lost = commit(connection, vec![write("one", 2, Some("risen"))]).await;
    assert_eq!(lost, [Committed::Superseded { standing: version(3) }]);
}

async fn an_expiry_is_kept_to_the_millisecond(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let times = [
        0,
        1,
        now(),
        now() + 1,
        1_700_000_000_123,
        253_402_300_799_999,
        9_224_318_015_999_999,
        -1,
        i64::MAX,
    ];
    for (number, millis) in (1..).zip(times) {
        for value in [Some("value"), None] {
            let mut wanted = write(&format!("{number}"), if value.is_some() { 1 } else { 2 }, value);
            wanted.entry.expires_at = Some(Timestamp(millis));
            commit(connection, vec![wanted.clone()]).await;
            assert_eq!(load(connection, &wanted.key).await, Some(wanted.entry));
        }
    }
    // A later write without an expiry takes it away.
    commit(connection, vec![write("1", 3, Some("stays"))]).await;
    assert_eq!(
        load(connection, &key("orders", "1")).await,
        Some(entry(3, Some("stays")))
    );
}

async fn values_come_back_byte_for_byte(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let every_byte: Vec<u8> = (0..=255).cycle().take(1024 * 1024).collect();
    for (name, value) in [("empty", Vec::new()), ("nul", vec![0]), ("mebibyte", every_byte)] {
        let mut wanted = write(name, 1, None);
        wanted.entry.value = Some(value.into());
        commit(connection, vec![wanted.clone()]).await;
        // An empty value is a value.
        assert_eq!(load(connection, &wanted.key).await, Some(wanted.entry), "{name}");
    }
}

async fn every_valid_key_is_itself(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let longest = "é".repeat(512);
    let names = [
        "'",
        "\"",
        "''; drop table tidegate_entries; --",
        "\\",
        "\\000",
        "%",
        "_",
        "a b",
        " a",
        "a ",
        "A",
        "a",
        "ä",
        "a\u{308}",
        "\u{1f980}",
        "{}",
        "{\"a\",NULL}",
        "NULL",
        "\u{1}",
        "\n",
        "\u{7f}",
        "\u{ffff}",
        "$1",
        "?1",
        &longest,
    ];
    let namespace = "n".repeat(63);
    let writes: Vec<Write> = (1..)
        .zip(names)
        .map(|(number, name)| Write {
            key: key(&namespace, name),
            entry: entry(number, Some(name)),
            tags: Tags::default(),
            requests: Vec::new(),
        })
        .collect();
    commit(connection, writes.clone()).await;
    let keys: Vec<Key> = writes.iter().map(|write| write.key.clone()).collect();
    let loaded = connection.load(&keys).await.expect("loads");
    let wanted: Vec<Option<Entry>> = writes.into_iter().map(|write| Some(write.entry)).collect();
    assert_eq!(loaded, wanted);
    // The losers are told apart as well.
    let late = keys.iter().map(|key| Write {
        key: key.clone(),
        entry: entry(100, None),
        tags: Tags::default(),
        requests: Vec::new(),
    });
    commit(connection, late.collect()).await;
    let lost = keys.iter().map(|key| Write {
        key: key.clone(),
        entry: entry(50, None),
        tags: Tags::default(),
        requests: Vec::new(),
    });
    let lost = commit(connection, lost.collect()).await;
    assert!(
        lost.iter()
            .all(|c| *c == Committed::Superseded { standing: version(100) })
    );
}

async fn answers_come_in_the_order_of_the_question(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    assert_eq!(connection.load(&[]).await.expect("nothing to load"), []);
    assert_eq!(connection.commit(&[]).await.expect("nothing to commit"), []);
    let writes: Vec<Write> = (0..600).map(|n| write(&format!("{n}"), n + 1, Some("v"))).collect();
    commit(connection, writes).await;
    // Backwards, and every other key absent.
    let keys: Vec<Key> = (0..1_200)
        .rev()
        .map(|n| key("orders", &format!("{}{}", n / 2, if n % 2 == 0 { "" } else { "x" })))
        .collect();
    let loaded = connection.load(&keys).await.expect("loads");
    for (n, entry) in (0..1_200).rev().zip(loaded) {
        let number = entry.map(|entry| entry.version.get());
        assert_eq!(number, (n % 2 == 0).then_some(n / 2 + 1), "{n}");
    }
}

async fn a_large_batch_of_new_and_known_keys_is_one_commit(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let name = |n: i64| format!("{n:05}");
    commit(
        connection,
        (0..2_500).map(|n| write(&name(n * 2), 10, Some("old"))).collect(),
    )
    .await;
    // Of the known keys every fifth is newer already.
    let batch = (0..5_000).map(|n| write(&name(n), if n % 10 == 0 { 5 } else { 20 }, Some("new")));
    let committed = commit(connection, batch.collect()).await;
    for (n, committed) in (0..5_000).zip(committed) {
        let wanted = if n % 10 == 0 {
            Committed::Superseded { standing: version(10) }
        } else {
            Committed::Applied
        };
        assert_eq!(committed, wanted, "{n}");
    }
    let rows = fixture
        .texts("select cast(count(*) as text) from tidegate_entries")
        .await;
    assert_eq!(rows, ["5000"]);
}

async fn a_rejected_row_takes_its_whole_batch_along_and_nothing_else(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    fixture.refuse_poison().await;
    let mut batch: Vec<Write> = (0..700).map(|n| write(&format!("{n:03}"), 1, Some("fine"))).collect();
    batch[650].entry.value = Some("poison".into());
    let refused = connection.commit(&batch).await.expect_err("one row is poison");
    assert_eq!(refused.kind, StoreErrorKind::Rejected);
    let code = refused.code.expect("the store gives a reason");
    assert!(["23514", "SQLITE_CONSTRAINT (1811)"].contains(&code.as_str()), "{code}");
    let rows = fixture
        .texts("select cast(count(*) as text) from tidegate_entries")
        .await;
    assert_eq!(rows, ["0"]);
    // The table is fine, and so is the connection.
    connection.probe().await.expect("the table takes rows");
    let single = connection.commit(&batch[650..651]).await;
    assert_eq!(kind(single), StoreErrorKind::Rejected);
    batch.remove(650);
    assert_eq!(commit(connection, batch).await, [Committed::Applied; 699]);
    // What a constraint refuses, the dead letters take.
    let poison = write("650", 1, Some("poison"));
    let letter = DeadLetter {
        write: poison,
        code: Some(code),
        reason: "no poison".to_owned(),
    };
    connection.bury(&letter).await.expect("buried");
}

async fn a_probe_tells_a_table_that_refuses_everything_and_leaves_nothing(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    connection.probe().await.expect("the table takes rows");
    fixture
        .execute(
            "create function refuse() returns trigger language plpgsql as $$ begin raise 'closed'; end $$;
             create trigger closed before insert on tidegate_entries for each row execute function refuse()",
            "create trigger closed before insert on tidegate_entries begin select raise(abort, 'closed'); end",
        )
        .await;
    assert_eq!(kind(connection.probe().await), StoreErrorKind::Rejected);
    fixture
        .execute("drop trigger closed on tidegate_entries", "drop trigger closed")
        .await;
    connection.probe().await.expect("the table takes rows again");
    let rows = fixture
        .texts("select cast(count(*) as text) from tidegate_entries")
        .await;
    assert_eq!(rows, ["0"]);
}

async fn a_missing_table_is_no_fault_of_the_row(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let one = [write("one", 1, Some("v"))];
    commit(connection, one.to_vec()).await;
    let rename = |from: &str, to: &str| format!("alter table {from} rename to {to}");
    let (away, back) = (
        rename("tidegate_entries", "elsewhere"),
        rename("elsewhere", "tidegate_entries"),
    );
    fixture
        .execute(&away, &format!("drop view tidegate_records; {away}"))
        .await;
    assert_eq!(kind(connection.commit(&one).await), StoreErrorKind::Transient);
    assert_eq!(
        kind(connection.load(&[key("orders", "one")]).await),
        StoreErrorKind::Transient
    );
    assert_eq!(kind(connection.probe().await), StoreErrorKind::Transient);
    fixture.execute(&back, &back).await;
    assert_eq!(commit(connection, one.to_vec()).await, [Committed::Applied]);
}

async fn concurrent_overlapping_batches_end_at_the_maximum(fixture: Fixture) {
    const KEYS: i64 = 400;
    const ROUNDS: i64 = 12;
    let tasks: Vec<_> = (0..4)
        .map(|task| {
            let mut connection = fixture.connection();
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    // Each task has its own three quarters of the keys, so that new rows and known ones race as well.
                    let batch = (0..KEYS)
                        .filter(|n| n % 4 != task)
                        .map(|n| write(&format!("{n:04}"), 1 + round * 4 + (task + n) % 4, Some("v")));
                    commit(&mut *connection, batch.collect()).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no deadlock, no error");
    }
    let connection = &mut *fixture.connection();
    for n in 0..KEYS {
        let highest = (0..4)
            .filter(|task| n % 4 != *task)
            .map(|task| 1 + (ROUNDS - 1) * 4 + (task + n) % 4)
            .max();
        let standing = load(connection, &key("orders", &format!("{n:04}"))).await;
        assert_eq!(standing.map(|entry| entry.version.get()), highest, "{n}");
    }
}

/// Any order, repetition and division into batches of the same writes ends in the same entries.
fn order_and_repetition_do_not_matter(runtime: &tokio::runtime::Runtime, fixture: &Fixture) {
    let writes = proptest::collection::vec((0..6_u8, 1..12_i64, any::<bool>()), 1..40);
    let deliveries = writes.prop_flat_map(|writes| {
        let places = proptest::collection::vec(0..writes.len(), 0..30);
        let twice = places.prop_map({
            let writes = writes.clone();
            move |places| {
                let mut all = writes.clone();
                all.extend(places.iter().map(|place| writes[*place]));
                all
            }
        });
        (twice.prop_shuffle(), 1..9_usize)
    });
    let case = Cell::new(0);
    let mut runner = TestRunner::new(Config {
        cases: 24,
        failure_persistence: None,
        ..Config::default()
    });
    let outcome = runner.run(&deliveries, |(delivered, batch)| {
        // A namespace of its own instead of a database.
        case.set(case.get() + 1);
        let namespace = format!("case{}", case.get());
        // The same version is the same write: what it holds follows from it.
        let write = |(name, number, _): (u8, i64, bool)| Write {
            key: key(&namespace, &format!("k{name}")),
            entry: entry(number, (number % 3 != 0).then_some("v")),
            tags: Tags::default(),
            requests: Vec::new(),
        };
        runtime.block_on(async {
            let connection = &mut *fixture.connection();
            let mut model: BTreeMap<Key, Entry> = BTreeMap::new();
            for piece in delivered.chunks(batch) {
                let mut distinct: BTreeMap<Key, Entry> = BTreeMap::new();
                for one in piece.iter().copied().map(write) {
                    for map in [&mut model, &mut distinct] {
                        let stands = map
                            .get(&one.key)
                            .is_some_and(|entry| entry.version >= one.entry.version);
                        if !stands {
                            map.insert(one.key.clone(), one.entry.clone());
                        }
                    }
                }
                let batch: Vec<Write> = distinct
                    .into_iter()
                    .map(|(key, entry)| Write {
                        key,
                        entry,
                        tags: Tags::default(),
                        requests: Vec::new(),
                    })
                    .collect();
                connection.commit(&batch).await.expect("commits");
            }
            let keys: Vec<Key> = model.keys().cloned().collect();
            let loaded = connection.load(&keys).await.expect("loads");
            assert_eq!(loaded, model.into_values().map(Some).collect::<Vec<_>>());
        });
        Ok(())
    });
    outcome.expect("holds for every delivery");
}

async fn a_dead_letter_is_kept_once(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let mut poison = write("it's %", 7, Some("poison"));
    poison.entry.expires_at = Some(Timestamp(1_700_000_000_123));
    let letter = |write: &Write| DeadLetter {
        write: write.clone(),
        code: Some("23514".to_owned()),
        reason: format!("no\0{}", "x".repeat(5_000)),
    };
    for _ in 0..2 {
        connection.bury(&letter(&poison)).await.expect("buried");
    }
    poison.entry.version = version(8);
    poison.entry.value = None;
    connection.bury(&letter(&poison)).await.expect("buried");
    let letters = fixture
        .texts(
            "select namespace || ' ' || key || ' ' || cast(version as text) || ' ' || code || ' ' || cast(length(reason) as text)
               from tidegate_dead_letters order by version",
        )
        .await;
    let wanted = [7, 8].map(|number| format!("orders it's % {number} 23514 1000"));
    assert_eq!(letters, wanted);
}

async fn only_what_is_due_is_collected(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let expiring = |name: &str, number, value, at| {
        let mut write = write(name, number, value);
        write.entry.expires_at = Some(Timestamp(at));
        write
    };
    let hour = 3_600_000;
    commit(
        connection,
        vec![
            write("live", 1, Some("v")),
            write("deleted", 1, None),
            write("deleted and back", 1, None),
            expiring("expired", 1, Some("v"), now() - hour),
            expiring("expires", 1, Some("v"), now() + hour),
            expiring("deleted, expires", 1, None, now() + hour),
            expiring("for ever", 1, Some("v"), i64::MAX),
        ],
    )
    .await;
    commit(connection, vec![write("deleted and back", 2, Some("v"))]).await;
    // An expiry in the past is not counted from: the commit was later.
    assert_eq!(
        connection
            .collect(Duration::from_secs(1_800), 100)
            .await
            .expect("collects"),
        0
    );
    assert_eq!(connection.collect(Duration::MAX, 100).await.expect("collects"), 0);
    // The clock has to move on by a millisecond.
    let mut collected = 0;
    let deadline = Instant::now() + Duration::from_secs(10);
    while collected < 2 {
        let step = connection.collect(Duration::ZERO, 1).await.expect("collects");
        assert!(step <= 1, "no more than asked for");
        collected += step;
        assert!(Instant::now() < deadline, "two rows are due");
    }
    assert_eq!(connection.collect(Duration::ZERO, 100).await.expect("collects"), 0);
    let left = fixture
        .texts("select key from tidegate_entries order by version, key")
        .await;
    assert_eq!(
        left,
        ["deleted, expires", "expires", "for ever", "live", "deleted and back"]
    );
}

async fn a_row_that_is_written_again_is_not_collected(fixture: Fixture) {
    let (mut writer, mut collector) = (fixture.connection(), fixture.connection());
    let one = key("orders", "one");
    let collecting = tokio::spawn(async move {
        loop {
            collector.collect(Duration::ZERO, 10).await.expect("collects");
        }
    });
    for number in 1..300 {
        let deleted = write("one", number * 2, None);
        assert_eq!(commit(&mut *writer, vec![deleted]).await, [Committed::Applied]);
        let back = write("one", number * 2 + 1, Some("v"));
        assert_eq!(commit(&mut *writer, vec![back.clone()]).await, [Committed::Applied]);
        assert_eq!(load(&mut *writer, &one).await, Some(back.entry));
    }
    assert!(!collecting.is_finished(), "it went on all the while");
    collecting.abort();
}

const MINUTE: Duration = Duration::from_secs(60);

async fn collect(connection: &mut dyn Connection) -> u64 {
    connection.collect(MINUTE, 1_000).await.expect("collects")
}

async fn what_was_collected_stays_away_from_older_writes(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let mut expired = write("expired", 7, Some("v"));
    expired.entry.expires_at = Some(Timestamp(now() - 1));
    let before = vec![write("deleted", 5, None), write("live", 3, Some("v")), expired];
    commit(connection, before).await;
    assert_eq!(fixture.horizon().await, 0);
    fixture.age().await;
    assert_eq!(collect(connection).await, 2);
    assert_eq!(
        fixture.horizon().await,
        7,
        "the highest version collected, and no higher"
    );

    let below = Committed::BelowHorizon { horizon: version(7) };
    let batch = vec![
        write("deleted", 4, Some("risen")),
        write("expired", 7, Some("risen")),
        write("live", 4, Some("moved")),
        // What never had a row cannot be told from what had one.
        write("new", 7, Some("late")),
        write("newer", 8, Some("fresh")),
    ];
    let applied = Committed::Applied;
    assert_eq!(
        commit(connection, batch.clone()).await,
        [below, below, applied, below, applied]
    );
    for (write, wanted) in batch.into_iter().zip([below, below, applied, below, applied]) {
        assert_eq!(commit(connection, vec![write]).await, [wanted], "one by one");
    }
    let older = commit(connection, vec![write("live", 2, None)]).await;
    assert_eq!(older, [Committed::Superseded { standing: version(4) }]);
    assert_eq!(
        commit(connection, vec![write("deleted", 8, Some("v"))]).await,
        [applied]
    );
    let keys = fixture.texts("select key from tidegate_entries order by key").await;
    assert_eq!(keys, ["deleted", "live", "newer"]);
}

async fn what_was_stamped_ahead_waits(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let stamped = |ago: i64| (now() - ago - 1_704_067_200_000) << 21;
    let (old, young, ahead) = (stamped(300_000), stamped(30_000), stamped(-3_600_000));
    let deletes = [("ahead", ahead), ("old", old), ("young", young)];
    commit(
        connection,
        deletes
            .iter()
            .map(|(name, number)| write(name, *number, None))
            .collect(),
    )
    .await;
    fixture.age().await;
    assert_eq!(collect(connection).await, 1);
    assert_eq!(fixture.horizon().await, old);
    assert_eq!(collect(connection).await, 0);
    // Whatever the horizon is, a fresh stamp is above it.
    let fresh = commit(connection, vec![write("new", stamped(0), Some("v"))]).await;
    assert_eq!(fresh, [Committed::Applied]);
}

async fn an_idle_collection_leaves_the_horizon(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("live", 9, Some("v")), write("young", 9, None)]).await;
    assert_eq!(collect(connection).await, 0);
    assert_eq!(fixture.horizon().await, 0);
    assert_eq!(
        commit(connection, vec![write("late", 1, Some("v"))]).await,
        [Committed::Applied]
    );
}

async fn collections_at_once_share_the_work(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    commit(
        connection,
        (1..=2_000).map(|n| write(&format!("{n:04}"), n, None)).collect(),
    )
    .await;
    fixture.age().await;
    let tasks: Vec<_> = (0..3)
        .map(|_| {
            let mut connection = fixture.connection();
            tokio::spawn(async move {
                let mut collected = 0;
                loop {
                    match connection.collect(MINUTE, 100).await.expect("no deadlock, no error") {
                        0 => return collected,
                        step => collected += step,
                    }
                }
            })
        })
        .collect();
    let mut collected = 0;
    for task in tasks {
        collected += task.await.expect("ran");
    }
    // Who meets only rows that another one has locked ends early.
    collected += collect(connection).await;
    assert_eq!(collected, 2_000, "each row once");
    assert_eq!(fixture.horizon().await, 2_000);
}

/// Late writes race with collections that never rest, on keys that are deleted again and again.
async fn nothing_deleted_comes_back_while_collections_run(fixture: Fixture) {
    let stamps = Arc::new(AtomicI64::new(1));
    let collectors: Vec<_> = (0..2)
        .map(|_| {
            let mut connection = fixture.connection();
            tokio::spawn(async move {
                loop {
                    connection.collect(Duration::ZERO, 20).await.expect("collects");
                }
            })
        })
        .collect();
    let writers: Vec<_> = (0..3)
        .map(|writer| {
            let (mut connection, stamps) = (fixture.connection(), Arc::clone(&stamps));
            tokio::spawn(async move {
                let connection = &mut *connection;
                let names: Vec<String> = (0..40).map(|n| format!("{writer}-{n:02}")).collect();
                for _ in 0..25 {
                    let late = stamps.fetch_add(2, Ordering::Relaxed);
                    let all = |number, value| names.iter().map(|name| write(name, number, value)).collect::<Vec<_>>();
                    commit(connection, all(late + 1, None)).await;
                    for _ in 0..4 {
                        let committed = commit(connection, all(late, Some("risen"))).await;
                        assert!(!committed.contains(&Committed::Applied), "{committed:?}");
                    }
                    let keys: Vec<Key> = names.iter().map(|name| key("orders", name)).collect();
                    let loaded = connection.load(&keys).await.expect("loads");
                    assert!(loaded.iter().flatten().all(|entry| entry.value.is_none()));
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("nothing came back");
    }
    for collector in collectors {
        assert!(!collector.is_finished(), "it went on all the while");
        collector.abort();
    }
    assert!(fixture.horizon().await > 1, "something was collected");
}

async fn without_its_control_row_nothing_new_is_taken(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("known", 1, Some("v"))]).await;
    fixture
        .execute("delete from tidegate_control", "delete from tidegate_control")
        .await;
    let refused = connection
        .commit(&[write("new", 9, Some("v"))])
        .await
        .expect_err("refused");
    assert_ne!(refused.kind, StoreErrorKind::Rejected, "it is no fault of the row");
    assert!(refused.message.contains("tidegate_control"), "{refused}");
    let known = commit(connection, vec![write("known", 2, Some("v"))]).await;
    assert_eq!(known, [Committed::Applied]);
    let restore = "insert into tidegate_control (gc_horizon) values (5)";
    fixture.execute(restore, restore).await;
    assert_eq!(
        commit(connection, vec![write("new", 9, Some("v"))]).await,
        [Committed::Applied]
    );
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A write of one of a few keys arrives, under this version: on time, late, or again.
    Arrive(u8, i64),
    Collect,
}

/// The rule in a few lines. A version that three divides is a delete, and everything deleted is due.
#[derive(Default)]
struct Model {
    rows: BTreeMap<u8, i64>,
    horizon: i64,
    /// The highest delete of each key that was ever applied.
    deleted: BTreeMap<u8, i64>,
}

impl Model {
    fn arrive(&mut self, name: u8, number: i64) -> Committed {
        match self.rows.get(&name) {
            Some(standing) if *standing > number => {
                return Committed::Superseded {
                    standing: version(*standing),
                };
            }
            None if number <= self.horizon => {
                return Committed::BelowHorizon {
                    horizon: version(self.horizon),
                };
            }
            _ => {}
        }
        self.rows.insert(name, number);
        if number % 3 == 0 {
            self.deleted.insert(name, number);
        }
        Committed::Applied
    }

    fn collect(&mut self) -> u64 {
        let due: Vec<i64> = self.rows.values().copied().filter(|number| number % 3 == 0).collect();
        self.rows.retain(|_, number| *number % 3 != 0);
        self.horizon = due.iter().copied().fold(self.horizon, i64::max);
        due.len() as u64
    }
}

/// Whatever arrives in whatever order, with collections in between: each write is answered as the rule says, what was deleted stays away,
/// and nothing fresh is refused.
fn collections_change_no_outcome(runtime: &tokio::runtime::Runtime, fixture: &Fixture) {
    let arrival = (0..4_u8, 1..16_i64).prop_map(|(name, number)| Step::Arrive(name, number));
    let steps = proptest::collection::vec(prop_oneof![5 => arrival, 1 => Just(Step::Collect)], 1..40);
    let mut runner = TestRunner::new(Config {
        cases: 32,
        failure_persistence: None,
        ..Config::default()
    });
    let write = |name: u8, number: i64| write(&format!("k{name}"), number, (number % 3 != 0).then_some("v"));
    let outcome = runner.run(&steps, |steps| {
        runtime.block_on(async {
            // As a new database, but quicker.
            let reset = "delete from tidegate_entries; update tidegate_control set gc_horizon = 0";
            fixture.execute(reset, reset).await;
            let connection = &mut *fixture.connection();
            let mut model = Model::default();
            for step in steps {
                match step {
                    Step::Arrive(name, number) => {
                        let told = commit(connection, vec![write(name, number)]).await;
                        assert_eq!(told, [model.arrive(name, number)], "{name} {number}");
                    }
                    Step::Collect => {
                        fixture.age().await;
                        assert_eq!(collect(connection).await, model.collect());
                    }
                }
                for name in 0..4 {
                    let stands = load(connection, &write(name, 1).key).await;
                    let number = stands.as_ref().map(|entry| entry.version.get());
                    assert_eq!(number, model.rows.get(&name).copied());
                    if stands.is_some_and(|entry| entry.value.is_some()) {
                        assert!(number > model.deleted.get(&name).copied(), "it came back");
                    }
                }
            }
            assert_eq!(fixture.horizon().await, model.horizon);
            for name in 0..4 {
                assert_eq!(commit(connection, vec![write(name, 100)]).await, [Committed::Applied]);
            }
        });
        Ok(())
    });
    outcome.expect("holds for every order");
}

async fn the_view_shows_live_records_only(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let mut expired = write("expired", 1, Some("v"));
    expired.entry.expires_at = Some(Timestamp(now() - 1));
    let mut expires = write("expires", 1, Some("v"));
    expires.entry.expires_at = Some(Timestamp(now() + 3_600_000));
    commit(
        connection,
        vec![write("live", 1, Some("")), write("deleted", 1, None), expired, expires],
    )
    .await;
    let records = fixture
        .texts("select key from tidegate_records where stamped_at is not null order by key")
        .await;
    assert_eq!(records, ["expires", "live"]);
}

/// Lets a call take so many steps at most, and some time more after the last. Whether it ended.
pub async fn take_steps(call: impl Future, steps: usize, pause: Duration) -> bool {
    let (mut call, mut left) = (pin!(call), steps);
    let ended = poll_fn(|context| {
        left -= 1;
        match call.as_mut().poll(context) {
            Poll::Ready(_) => Poll::Ready(true),
            Poll::Pending if left == 0 => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        }
    });
    let ended = ended.await;
    // Meanwhile the server works on.
    sleep(pause).await;
    ended
}

async fn a_call_that_is_cut_off_leaves_nothing_half_done(fixture: Fixture) {
    let mut connection = fixture.connection();
    let (mut cut_off, mut ended) = (0, 0);
    // After its first step, its second, its fourth, and so on, again and again: where the test is slow, the server has answered before the next.
    for round in 0..600 {
        if cut_off >= 10 && ended >= 10 {
            break;
        }
        let (steps, pause) = (1 << (round / 3 % 10), Duration::from_millis([0, 1, 5][round % 3]));
        let number = round as i64 + 1;
        let mut batch: Vec<Write> = (0..300).map(|n| write(&format!("{n:03}"), number, Some("v"))).collect();
        batch.sort_by(|a, b| a.key.cmp(&b.key));
        if take_steps(connection.commit(&batch), steps, pause).await {
            ended += 1;
        } else {
            cut_off += 1;
        }
        connection.reset();
        // All of it or nothing of it, and then the same again goes through.
        let versions = fixture
            .texts("select cast(count(distinct version) as text) from tidegate_entries")
            .await;
        assert!(["0", "1"].contains(&versions[0].as_str()), "{versions:?}");
        assert_eq!(commit(&mut *connection, batch).await, [Committed::Applied; 300]);
    }
    assert!(cut_off >= 10 && ended >= 10, "{cut_off} cut off, {ended} ended");
    connection.ping().await.expect("answers");
}

async fn sessions_see_each_other_s_commits(fixture: Fixture) {
    let (mut writer, mut reader) = (fixture.connection(), fixture.connection());
    let one = key("orders", "one");
    assert_eq!(load(&mut *reader, &one).await, None);
    for number in 1..50 {
        commit(&mut *writer, vec![write("one", number, Some("v"))]).await;
        assert_eq!(load(&mut *reader, &one).await, Some(entry(number, Some("v"))));
    }
}

/// Each sentence of a contract, for both backends.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Fixture::sqlite().await).await;
            })*
        }
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Fixture::postgres().await).await;
            })*
        }
    };
}

pub(crate) use contract;

contract! {
    the_newest_write_stands,
    each_write_of_a_batch_is_answered_for_itself,
    a_tombstone_is_an_entry_without_a_value,
    an_expiry_is_kept_to_the_millisecond,
    values_come_back_byte_for_byte,
    every_valid_key_is_itself,
    answers_come_in_the_order_of_the_question,
    a_large_batch_of_new_and_known_keys_is_one_commit,
    a_rejected_row_takes_its_whole_batch_along_and_nothing_else,
    a_probe_tells_a_table_that_refuses_everything_and_leaves_nothing,
    a_missing_table_is_no_fault_of_the_row,
    concurrent_overlapping_batches_end_at_the_maximum,
    a_dead_letter_is_kept_once,
    only_what_is_due_is_collected,
    a_row_that_is_written_again_is_not_collected,
    what_was_collected_stays_away_from_older_writes,
    what_was_stamped_ahead_waits,
    an_idle_collection_leaves_the_horizon,
    collections_at_once_share_the_work,
    nothing_deleted_comes_back_while_collections_run,
    without_its_control_row_nothing_new_is_taken,
    the_view_shows_live_records_only,
    a_call_that_is_cut_off_leaves_nothing_half_done,
    sessions_see_each_other_s_commits,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

#[test]
fn order_and_repetition_do_not_matter_to_sqlite() {
    let runtime = runtime();
    let fixture = runtime.block_on(Fixture::sqlite());
    order_and_repetition_do_not_matter(&runtime, &fixture);
}

#[test]
fn order_and_repetition_do_not_matter_to_postgres() {
    let runtime = runtime();
    let fixture = runtime.block_on(Fixture::postgres());
    order_and_repetition_do_not_matter(&runtime, &fixture);
}

#[test]
fn collections_change_no_outcome_in_sqlite() {
    let runtime = runtime();
    let fixture = runtime.block_on(Fixture::sqlite());
    collections_change_no_outcome(&runtime, &fixture);
}

#[test]
fn collections_change_no_outcome_in_postgres() {
    let runtime = runtime();
    let fixture = runtime.block_on(Fixture::postgres());
    collections_change_no_outcome(&runtime, &fixture);
}

// PostgreSQL alone.

fn claimant(directory: &str, start: &str) -> Claimant {
    Claimant {
        directory: directory.to_owned(),
        start: start.to_owned(),
    }
}

#[tokio::test]
async fn a_node_stays_with_its_directory() {
    let fixture = Fixture::postgres().await;
    let connection = &mut *fixture.connection();
    let (a, b) = (claimant("a", "a1"), claimant("b", "b1"));
    let first = connection.lease_node(&a).await.expect("a node is free");
    let second = connection.lease_node(&b).await.expect("a node is free");
    assert_eq!((first.node, first.high_water), (1, None));
    assert_eq!(second.node, 2);
    assert!(connection.renew_node(&a, 1, Some(version(50))).await.expect("renews"));
    assert!(connection.renew_node(&a, 1, None).await.expect("renews"));
    assert!(connection.renew_node(&a, 1, Some(version(40))).await.expect("renews"));
    assert!(!connection.renew_node(&a, 2, None).await.expect("another's node"));

    // A later start takes over; the earlier one learns of it, and can neither renew nor give back what it lost.
    let restarted = claimant("a", "a2");
    let again = connection.lease_node(&restarted).await.expect("its own node");
    assert_eq!((again.node, again.high_water), (1, Some(version(50))));
    assert!(!connection.renew_node(&a, 1, Some(version(60))).await.expect("answers"));
    connection
        .release_node(&a, 1, Some(version(60)))
        .await
        .expect("answers");
    assert!(connection.renew_node(&restarted, 1, None).await.expect("renews"));

    // Given back, it keeps its mark, and its directory while others are free.
    connection
        .release_node(&restarted, 1, Some(version(70)))
        .await
        .expect("released");
    assert!(!connection.renew_node(&restarted, 1, None).await.expect("answers"));
    assert_eq!(connection.lease_node(&claimant("c", "c1")).await.expect("free").node, 3);
    let back = connection.lease_node(&claimant("a", "a3")).await.expect("its own");
    assert_eq!((back.node, back.high_water), (1, Some(version(70))));
}

#[tokio::test]
async fn a_node_is_taken_from_others_only_when_given_back_or_lapsed() {
    let fixture = Fixture::postgres().await;
    let connection = &mut *fixture.connection();
    let fill = "insert into tidegate_nodes select n, 'd' || n, 's', now(), n from generate_series(1, 1023) n";
    fixture.execute(fill, "").await;
    assert_eq!(
        kind(connection.lease_node(&claimant("new", "n")).await),
        StoreErrorKind::Rejected
    );
    fixture
        .execute(
            "update tidegate_nodes set renewed_at = now() - interval '23 hours' where node = 7",
            "",
        )
        .await;
    assert_eq!(
        kind(connection.lease_node(&claimant("new", "n")).await),
        StoreErrorKind::Rejected
    );
    fixture
        .execute(
            "update tidegate_nodes set renewed_at = now() - interval '25 hours' where node = 7",
            "",
        )
        .await;
    let lapsed = connection.lease_node(&claimant("new", "n")).await.expect("lapsed");
    assert_eq!((lapsed.node, lapsed.high_water), (7, Some(version(7))));
    assert!(
        !connection
            .renew_node(&claimant("d7", "s"), 7, None)
            .await
            .expect("answers")
    );
    connection
        .release_node(&claimant("d9", "s"), 9, None)
        .await
        .expect("released");
    assert_eq!(
        connection
            .lease_node(&claimant("newer", "n"))
            .await
            .expect("released")
            .node,
        9
    );
}

#[tokio::test]
async fn claimants_at_once_get_nodes_of_their_own() {
    let fixture = Fixture::postgres().await;
    let tasks: Vec<_> = (0..12)
        .map(|n| {
            let mut connection = fixture.connection();
            tokio::spawn(async move {
                loop {
                    match connection.lease_node(&claimant(&format!("{n}"), "s")).await {
                        // On a busy machine the last of them waits too long for the lock, and asks again as a starting gateway does.
                        Err(error) if error.kind == StoreErrorKind::Transient => {}
                        answer => break answer,
                    }
                }
            })
        })
        .collect();
    let mut nodes = Vec::new();
    for task in tasks {
        nodes.push(task.await.expect("ran").expect("a node is free").node);
    }
    nodes.sort_unstable();
    assert_eq!(nodes, (1..=12).collect::<Vec<u16>>());
}

#[tokio::test]
async fn gateways_that_start_at_once_migrate_once() {
    let url = database().await;
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let backend = Postgres::new(&url, CALL_TIMEOUT, Tables::Migrate).expect("valid");
            tokio::spawn(async move { backend.prepare().await })
        })
        .collect();
    for task in tasks {
        task.await.expect("ran").expect("migrated");
    }
}

#[tokio::test]
async fn a_start_without_migrations_checks_that_they_were_run() {
    let url = database().await;
    let backend = Postgres::new(&url, CALL_TIMEOUT, Tables::Check).expect("valid");
    let missing = backend.prepare().await.expect_err("there are no tables");
    assert_eq!(
        (missing.kind, missing.code.as_deref()),
        (StoreErrorKind::Transient, Some("42P01"))
    );
    // Nothing is sent before: not even what would need no table.
    let early = backend.connection().ping().await.expect_err("not fit for use");
    assert_eq!(
        (early.kind, early.code.as_deref()),
        (StoreErrorKind::Unreachable, Some("42P01"))
    );
    let migrated = Postgres::new(&url, CALL_TIMEOUT, Tables::Migrate).expect("valid");
    migrated.prepare().await.expect("migrated");
    backend.prepare().await.expect("fit for use");
    backend.connection().ping().await.expect("it answers");
}

#[tokio::test]
async fn whoever_calls_first_brings_the_tables_up_to_date() {
    let backend = Postgres::new(&database().await, CALL_TIMEOUT, Tables::Migrate).expect("valid");
    let calls: Vec<_> = (0..4)
        .map(|n| {
            let mut connection = backend.connection();
            tokio::spawn(async move { connection.commit(&[write(&format!("{n}"), 1, Some("v"))]).await })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.expect("ran").expect("committed"), [Committed::Applied]);
    }
}

#[tokio::test]
async fn a_call_that_is_cut_off_leaves_the_migration_to_go_on() {
    let database = Database::postgres().await;
    let mut holder = PgConnection::connect(database.url()).await.expect("connects");
    // What a migration waits for, and no check of a server does.
    let mut held = holder.begin().await.expect("begins");
    sqlx::raw_sql("create table tidegate_migrations (held integer)")
        .execute(&mut *held)
        .await
        .expect("made");
    let backend = Postgres::new(database.url(), Duration::from_secs(6), Tables::Migrate).expect("valid");
    let mut connection = backend.connection();
    let cut_off = timeout(Duration::from_millis(1), connection.ping()).await;
    assert!(cut_off.is_err());
    database.await_waiting(1).await;
    // Its own bound is half of a call's: it says what it waits for.
    let waiting = connection.ping().await.expect_err("the migration is held up");
    assert_eq!(waiting.kind, StoreErrorKind::Unreachable);
    assert!(waiting.message.contains("brought up to date"), "{waiting}");
    held.rollback().await.expect("released");
    backend.prepare().await.expect("the migration that was held up");
    connection.ping().await.expect("it answers");
}

#[tokio::test]
async fn a_database_in_another_encoding_is_refused() {
    let url = database().await;
    let (server, name) = url.rsplit_once('/').expect("a path");
    let other = format!("{name}_latin");
    let create = format!("create database {other} encoding 'LATIN1' locale 'C' template template0");
    Database::at(&url).execute(&create).await;
    let url = format!("{server}/{other}");
    let backend = Postgres::new(&url, CALL_TIMEOUT, Tables::Migrate).expect("valid");
    let refused = backend.prepare().await.expect_err("LATIN1 cannot hold every key");
    assert_eq!(refused.kind, StoreErrorKind::Rejected);
    assert!(refused.message.contains("LATIN1"), "{refused}");
    // A call must not take that for the fault of a row.
    let commit = backend.connection().commit(&[write("one", 1, None)]).await;
    assert_eq!(kind(commit), StoreErrorKind::Unreachable);
}

#[tokio::test]
async fn an_unreachable_server_is_told_from_a_broken_connection() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("bound");
    let url = format!("postgres://secret:secret@{address}/db");
    let backend = Postgres::new(&url, Duration::from_millis(200), Tables::Check).expect("valid");
    // Connects, and is never answered.
    let silent = backend.connection().ping().await.expect_err("nobody answers");
    assert_eq!(silent.kind, StoreErrorKind::Unreachable);
    drop(socket);
    let refused = backend
        .connection()
        .commit(&[write("one", 1, None)])
        .await
        .expect_err("refused");
    assert_eq!(refused.kind, StoreErrorKind::Unreachable);
    assert!(!refused.to_string().contains("secret"), "{refused}");
}

#[tokio::test]
async fn a_killed_session_fails_one_call_and_the_next_dials_anew() {
    let fixture = Fixture::postgres().await;
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("one", 1, Some("v"))]).await;
    for _ in 0..3 {
        fixture
            .execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity
                  where application_name = 'tidegate' and datname = current_database()",
                "",
            )
            .await;
        let killed = connection.commit(&[write("one", 2, Some("v"))]).await;
        assert_eq!(kind(killed), StoreErrorKind::Unknown);
        assert_eq!(
            commit(connection, vec![write("one", 2, Some("v"))]).await,
            [Committed::Applied]
        );
    }
}

#[tokio::test]
async fn a_held_lock_ends_as_a_definite_failure_before_the_call_does() {
    let fixture = Fixture::postgres().await;
    let url = fixture.database.url();
    // Long enough for a busy machine to dial in half of it, and to tell of the lock before the end.
    let limit = Duration::from_secs(10);
    let backend = Postgres::new(url, limit, Tables::Check).expect("valid");
    backend.prepare().await.expect("fit for use");
    let mut holder = PgConnection::connect(url).await.expect("connects");
    let mut held = holder.begin().await.expect("begins");
    sqlx::raw_sql("lock table tidegate_entries")
        .execute(&mut *held)
        .await
        .expect("locked");

    let mut connection = backend.connection();
    let one = [write("one", 1, Some("v"))];
    let waited = timeout(limit, connection.commit(&one)).await;
    let refused = waited.expect("in time").expect_err("the table is locked");
    assert_eq!(
        (refused.kind, refused.code.as_deref()),
        (StoreErrorKind::Transient, Some("55P03"))
    );
    held.rollback().await.expect("released");
    assert_eq!(connection.commit(&one).await.expect("free again"), [Committed::Applied]);
}

/// A lock that holds up the insert of a row with the value `held`, in the middle of the statement, until it is released.
struct Gate {
    holder: PgConnection,
}

impl Gate {
    async fn close(fixture: &Fixture) -> Gate {
        let url = fixture.database.url();
        fixture
            .database
            .execute(
                "create function gate() returns trigger language plpgsql as
             $$ begin if new.value = 'held' then perform pg_advisory_xact_lock(1); end if; return new; end $$;
             create trigger gate before insert on tidegate_entries for each row execute function gate()",
            )
            .await;
        let mut holder = PgConnection::connect(url).await.expect("connects");
        sqlx::raw_sql("select pg_advisory_lock(1)")
            .execute(&mut holder)
            .await
            .expect("locked");
        Gate { holder }
    }

    async fn somebody_waits(&self, fixture: &Fixture) {
        until("the statement is held up", || async {
            let waiting = "select count(*)::text from pg_locks l join pg_database d on d.oid = l.database
                            where l.locktype = 'advisory' and not l.granted and d.datname = current_database()";
            fixture.texts(waiting).await == ["1"]
        })
        .await;
    }

    async fn open(mut self) {
        sqlx::raw_sql("select pg_advisory_unlock(1)")
            .execute(&mut self.holder)
            .await
            .expect("unlocked");
    }
}

#[tokio::test]
async fn a_commit_that_began_under_the_old_horizon_is_waited_for() {
    let fixture = Fixture::postgres().await;
    let (mut connection, mut collector) = (fixture.connection(), fixture.connection());
    commit(&mut *connection, vec![write("gone", 5, None)]).await;
    fixture.age().await;
    let gate = Gate::close(&fixture).await;
    // Its snapshot has the old horizon, under which the late write would be taken; it has not come to that key yet.
    let late = tokio::spawn(async move {
        let batch = vec![write("a", 9, Some("held")), write("gone", 4, Some("risen"))];
        commit(&mut *connection, batch).await
    });
    gate.somebody_waits(&fixture).await;
    let collecting = tokio::spawn(async move { collect(&mut *collector).await });
    until("the horizon is raised", || async { fixture.horizon().await == 5 }).await;
    // A collector that does not wait would delete in no time.
    for _ in 0..20 {
        assert_eq!(fixture.texts("select key from tidegate_entries").await, ["gone"]);
        sleep(Duration::from_millis(10)).await;
    }
    // One that begins later is not waited for.
    let fresh = commit(&mut *fixture.connection(), vec![write("fresh", 9, Some("v"))]).await;
    assert_eq!(fresh, [Committed::Applied]);
    gate.open().await;
    let told = late.await.expect("ran");
    let superseded = Committed::Superseded { standing: version(5) };
    // What it lost to may be collected before it asks what that was.
    let below = Committed::BelowHorizon { horizon: version(5) };
    assert!(
        told == [Committed::Applied, superseded] || told == [Committed::Applied, below],
        "{told:?}"
    );
    assert_eq!(collecting.await.expect("ran"), 1);
    let keys = fixture.texts("select key from tidegate_entries order by key").await;
    assert_eq!(keys, ["a", "fresh"]);
}

#[tokio::test]
async fn a_row_that_a_late_write_has_found_stays_until_its_commit() {
    let fixture = Fixture::postgres().await;
    let mut connection = fixture.connection();
    commit(&mut *connection, vec![write("gone", 5, None)]).await;
    fixture.execute("update tidegate_control set gc_horizon = 9", "").await;
    fixture.age().await;
    let gate = Gate::close(&fixture).await;
    // It has found the row, and is held up before it meets it.
    let late = tokio::spawn(async move { commit(&mut *connection, vec![write("gone", 4, Some("held"))]).await });
    gate.somebody_waits(&fixture).await;
    // What a collector does that began under this horizon, and so need not wait for the commit.
    let deleted = fixture
        .texts("with due as (select ctid from tidegate_entries for update skip locked) select count(*)::text from due")
        .await;
    assert_eq!(deleted, ["0"]);
    gate.open().await;
    let superseded = Committed::Superseded { standing: version(5) };
    assert_eq!(late.await.expect("ran"), [superseded]);
    assert_eq!(collect(&mut *fixture.connection()).await, 1);
}

#[tokio::test]
async fn a_transaction_without_end_puts_the_collection_off() {
    let fixture = Fixture::postgres().await;
    let mut connection = fixture.connection();
    commit(
        &mut *connection,
        vec![write("gone", 5, None), write("live", 5, Some("v"))],
    )
    .await;
    fixture.age().await;
    let url = fixture.database.url();
    let mut holder = PgConnection::connect(url).await.expect("connects");
    let mut held = holder.begin().await.expect("begins");
    sqlx::raw_sql("update tidegate_entries set version = 6 where key = 'live'")
        .execute(&mut *held)
        .await
        .expect("written");
    let backend = Postgres::new(url, Duration::from_secs(2), Tables::Check).expect("valid");
    backend.prepare().await.expect("fit for use");
    let mut collector = backend.connection();
    let refused = collector.collect(MINUTE, 100).await.expect_err("it goes on");
    assert_eq!(refused.kind, StoreErrorKind::Transient);
    assert!(refused.message.contains("pg_locks"), "{refused}");
    held.rollback().await.expect("ends");
    assert_eq!(collect(&mut *collector).await, 1);
}

#[tokio::test]
async fn the_collection_waits_for_no_row() {
    let fixture = Fixture::postgres().await;
    let connection = &mut *fixture.connection();
    commit(connection, (0..5).map(|n| write(&format!("{n}"), 1, None)).collect()).await;
    let url = fixture.database.url();
    let mut holder = PgConnection::connect(url).await.expect("connects");
    let mut held = holder.begin().await.expect("begins");
    sqlx::raw_sql("select 1 from tidegate_entries where key = '2' for update")
        .execute(&mut *held)
        .await
        .expect("locked");
    assert_eq!(connection.collect(Duration::ZERO, 100).await.expect("collects"), 4);
    held.rollback().await.expect("released");
    assert_eq!(connection.collect(Duration::ZERO, 100).await.expect("collects"), 1);
}

#[tokio::test]
async fn what_is_refused_at_the_commit_itself_is_refused() {
    let fixture = Fixture::postgres().await;
    fixture
        .execute(
            "create function refuse() returns trigger language plpgsql as
             $$ begin if new.value = 'poison' then raise 'late'; end if; return null; end $$;
             create constraint trigger late after insert or update on tidegate_entries
             deferrable initially deferred for each row execute function refuse()",
            "",
        )
        .await;
    let connection = &mut *fixture.connection();
    let batch = [write("a", 1, Some("fine")), write("b", 1, Some("poison"))];
    // The server reports the rows as written before it runs the deferred trigger.
    let refused = connection.commit(&batch).await.expect_err("refused");
    assert_eq!(
        (refused.kind, refused.code.as_deref()),
        (StoreErrorKind::Rejected, Some("P0001"))
    );
    assert_eq!(load(connection, &key("orders", "a")).await, None);
    connection.probe().await.expect("the table takes rows");
}

#[tokio::test]
async fn a_read_only_server_is_no_fault_of_the_row() {
    let fixture = Fixture::postgres().await;
    let set = |value: &str| {
        format!(
            "do $$ begin execute format('alter database %I set default_transaction_read_only = {value}', current_database()); end $$"
        )
    };
    fixture.execute(&set("on"), "").await;
    let connection = &mut *fixture.connection();
    let one = [write("one", 1, Some("v"))];
    for _ in 0..2 {
        assert_eq!(kind(connection.commit(&one).await), StoreErrorKind::Transient);
    }
    let url = fixture.database.url();
    let writable = format!("{url}?options=-cdefault_transaction_read_only%3Doff");
    Database::at(&writable).execute(&set("off")).await;
    // The refused session was dropped, so the next one has the new setting.
    assert_eq!(
        connection.commit(&one).await.expect("writable again"),
        [Committed::Applied]
    );
}

#[tokio::test]
async fn a_migration_under_running_sessions_is_survived() {
    let fixture = Fixture::postgres().await;
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("one", 1, Some("v"))]).await;
    load(connection, &key("orders", "one")).await;
    fixture
        .execute("alter table tidegate_entries add column later integer", "")
        .await;
    assert_eq!(
        commit(connection, vec![write("one", 2, Some("v"))]).await,
        [Committed::Applied]
    );
    assert_eq!(load(connection, &key("orders", "one")).await, Some(entry(2, Some("v"))));
}

/// How many of 780 overwrites leave the indexes alone, of rows with these tags.
async fn updates_without_index(tags: &Tags) -> u32 {
    // A server of its own: room on a page is made only of rows that are dead to every transaction of the server, and other tests leave some
    // open.
    let server = Server::start().await;
    let fixture = Fixture::postgres_at(Database::at(&server.create_database().await)).await;
    let mut connection = fixture.connection();
    for number in 1..=40 {
        let batch = (0..20).map(|n| Write {
            tags: tags.clone(),
            requests: Vec::new(),
            ..write(&format!("{n:02}"), number, Some("value"))
        });
        commit(&mut *connection, batch.collect()).await;
    }
    // The session reports its statistics when it ends.
    connection.reset();
    until("the statistics arrive", async || {
        let updates = fixture
            .texts("select (n_tup_upd = 780)::text from pg_stat_user_tables where relname = 'tidegate_entries'")
            .await;
        updates == ["true"]
    })
    .await;
    let hot = fixture
        .texts("select n_tup_hot_upd::text from pg_stat_user_tables where relname = 'tidegate_entries'")
        .await;
    hot[0].parse().expect("a number")
}

#[tokio::test]
async fn ordinary_overwrites_touch_no_index() {
    for tags in [Tags::default(), Tags::new(&["red", "blue"]).expect("valid")] {
        let hot = updates_without_index(&tags).await;
        // Some leave their page while somebody's snapshot, as autovacuum's, keeps the dead rows on it; an index would make it none.
        assert!(hot > 390, "{hot} of 780 updates stayed on their page, with {tags:?}");
    }
}

// SQLite alone.

#[tokio::test]
async fn a_file_serves_one_gateway_and_remembers_its_mark() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("new").join("tidegate.db");
    let (first, second) = (claimant("d", "s1"), claimant("d", "s2"));
    {
        let backend = Sqlite::open(&url_of(&path), CALL_TIMEOUT).await.expect("creates it");
        let mut connection = backend.connection();
        let grant = connection.lease_node(&first).await.expect("leased");
        assert_eq!((grant.node, grant.high_water), (0, None));
        assert!(
            connection
                .renew_node(&first, 0, Some(version(9)))
                .await
                .expect("renewed")
        );
        assert!(connection.renew_node(&first, 0, None).await.expect("renewed"));
        assert!(
            connection
                .renew_node(&first, 0, Some(version(8)))
                .await
                .expect("renewed")
        );

        let refused = Sqlite::open(&url_of(&path), CALL_TIMEOUT)
            .await
            .err()
            .expect("it is taken");
        assert_eq!(refused.kind, StoreErrorKind::Unreachable);
        assert!(refused.message.contains("another gateway"), "{refused}");
        commit(&mut *connection, vec![write("one", 1, Some("v"))]).await;
    }
    let backend = Sqlite::open(&url_of(&path), CALL_TIMEOUT).await.expect("free again");
    let mut connection = backend.connection();
    assert_eq!(
        load(&mut *connection, &key("orders", "one")).await,
        Some(entry(1, Some("v")))
    );
    let grant = connection.lease_node(&second).await.expect("leased");
    assert_eq!((grant.node, grant.high_water), (0, Some(version(9))));
    assert!(!connection.renew_node(&first, 0, None).await.expect("answers"));
    connection
        .release_node(&second, 0, Some(version(12)))
        .await
        .expect("released");
    let grant = connection.lease_node(&first).await.expect("leased");
    assert_eq!(grant.high_water, Some(version(12)));
}

#[tokio::test]
async fn a_symbolic_link_is_the_file_it_leads_to() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, link) = (directory.path().join("tidegate.db"), directory.path().join("link.db"));
    let _open = Sqlite::open(&url_of(&path), CALL_TIMEOUT).await.expect("creates it");
    std::os::unix::fs::symlink(&path, &link).expect("linked");
    assert!(Sqlite::open(&url_of(&link), CALL_TIMEOUT).await.is_err());
}

#[tokio::test]
async fn what_is_not_the_gateway_s_own_file_is_refused_in_one_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("text"), "not a database, but long enough to be one").expect("written");
    std::fs::write(at("short"), "x").expect("written");
    let mut other = SqliteConnection::connect(&format!("{}?mode=rwc", url_of(&at("other.db"))))
        .await
        .expect("creates");
    sqlx::raw_sql("create table theirs (x)")
        .execute(&mut other)
        .await
        .expect("created");
    for (path, why) in [
        (at("text"), "not an SQLite database"),
        (at("short"), "not an SQLite database"),
        (at("other.db"), "another program"),
        (directory.path().to_owned(), "a directory"),
        (at("text").join("below"), "cannot be created"),
        (PathBuf::from("/proc/nowhere/tidegate.db"), "cannot be created"),
    ] {
        let refused = Sqlite::open(&url_of(&path), CALL_TIMEOUT).await.err().expect("refused");
        assert_eq!(refused.kind, StoreErrorKind::Rejected);
        assert!(refused.message.contains(why), "{refused}");
        assert!(!refused.message.contains('\n'), "{refused}");
    }
    let text = std::fs::read_to_string(at("text")).expect("still there");
    assert!(text.starts_with("not a database"));
}

#[tokio::test]
async fn the_file_is_its_owner_s_alone() {
    use std::os::unix::fs::PermissionsExt as _;

    let fixture = Fixture::sqlite().await;
    commit(&mut *fixture.connection(), vec![write("one", 1, Some("v"))]).await;
    let path = fixture.database.url().trim_start_matches("sqlite://");
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let file = format!("{path}{suffix}");
        let mode = std::fs::metadata(&file).expect("is there").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{suffix}");
    }
}

#[tokio::test]
async fn another_program_s_lock_is_waited_for_and_then_a_definite_failure() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tidegate.db");
    let backend = Sqlite::open(&url_of(&path), Duration::from_millis(400))
        .await
        .expect("creates it");
    let (mut connection, mut reader) = (backend.connection(), backend.connection());
    let mut shell = SqliteConnection::connect(&url_of(&path)).await.expect("connects");
    let held = shell.begin_with("begin immediate").await.expect("locked");
    for writes in [
        vec![write("one", 1, None)],
        vec![write("one", 1, None), write("two", 1, None)],
    ] {
        assert_eq!(kind(connection.commit(&writes).await), StoreErrorKind::Transient);
    }
    assert_eq!(load(&mut *reader, &key("orders", "one")).await, None);
    held.rollback().await.expect("released");
    assert_eq!(
        commit(&mut *connection, vec![write("one", 1, None)]).await,
        [Committed::Applied]
    );
}
