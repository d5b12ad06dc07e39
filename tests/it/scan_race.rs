//! Proves that a scan misses nothing while writers write and the queue drains under it, in both stores: the pages of a hostile run against what
//! was acknowledged before it began.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tidegate::rpc::proto::{ScanRequest, ScanResponse};
use tokio::{task::JoinSet, time::Instant};

use crate::harness::{Client, Database, Mode, Setup};

/// How many keys are written again and again, by how many.
const KEYS: usize = 120;
const WRITERS: usize = 4;

/// For how long.
const LONG_ENOUGH: Duration = Duration::from_secs(4);

async fn page(client: &Client, page_size: i32, page_token: String) -> ScanResponse {
    let request = ScanRequest {
        namespace: "orders".to_owned(),
        prefix: "k".to_owned(),
        page_size,
        page_token,
        ..ScanRequest::default()
    };
    client.stub().scan(request).await.expect("a page").into_inner()
}

/// A whole scan: the value of each key.
async fn scanned(client: &Client, page_size: i32) -> BTreeMap<String, Vec<u8>> {
    let (mut all, mut token, mut last) = (BTreeMap::new(), String::new(), String::new());
    loop {
        let page = page(client, page_size, token).await;
        for record in page.records {
            assert!(
                record.key > last,
                "{} after {last}: in order, and none twice",
                record.key
            );
            last = record.key.clone();
            let entry = record.entry.expect("a record has an entry");
            all.insert(record.key, entry.value.to_vec());
        }
        token = page.next_page_token;
        if token.is_empty() {
            return all;
        }
    }
}

/// Asserts that a page has what was acknowledged before it was asked for, of the keys that it covers.
fn assert_holds(page: &BTreeMap<String, Vec<u8>>, acknowledged: &[u64], covers: impl Fn(&String) -> bool) {
    for (number, before) in acknowledged.iter().enumerate().filter(|(_, before)| **before > 0) {
        let key = format!("k{number:04}");
        if !covers(&key) {
            continue;
        }
        let Some(value) = page.get(&key) else {
            panic!("{key} was written {before} times, never deleted, and is not in its page");
        };
        let round: u64 = String::from_utf8_lossy(value).parse().expect("a number");
        assert!(
            round >= *before,
            "{key}: {round} is older than what was acknowledged, {before}"
        );
    }
}

async fn nothing_is_missed(database: Database) {
    // Short batches, so that there is always something on its way; a moment late, so that much of it is pending when a page is asked for.
    let sections = "[queue]\ndrain_batch_writes_max = 7\n[namespace_defaults]\nwrite_delay = \"5ms\"\n";
    let gateway = Setup::new().store(database.url()).config(sections).start().await;
    let client = gateway.client.clone();
    // Each key is written again and again, with a number that only rises; some come and go.
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged: Arc<Vec<AtomicU64>> = Arc::new((0..KEYS).map(|_| AtomicU64::new(0)).collect());
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (client, stop, acknowledged) = (client.clone(), Arc::clone(&stop), Arc::clone(&acknowledged));
        writers.spawn(async move {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for number in (writer..KEYS).step_by(WRITERS) {
                    let mode = match (number as u64 + round).is_multiple_of(9) {
                        true => Mode::Through,
                        false => Mode::Behind,
                    };
                    let (key, value) = (format!("k{number:04}"), round.to_string());
                    client.put(&key, value.as_bytes(), mode).await.expect("written");
                    acknowledged[number].store(round, Ordering::SeqCst);
                    let passing = format!("k{number:04}x");
                    if round.is_multiple_of(2) {
                        client.put(&passing, b"0", Mode::Behind).await.expect("written");
                    } else {
                        client.delete(&passing, Mode::Behind).await.expect("deleted");
                    }
                }
            }
        });
    }
    let rounds = || -> Vec<u64> { acknowledged.iter().map(|round| round.load(Ordering::SeqCst)).collect() };
    let begun = Instant::now();
    // Mostly a page that holds all, which takes the longest between its two looks.
    for page_size in [1_000, 1_000, 1_000, 50].into_iter().cycle() {
        let (mut from, mut token) = (String::new(), String::new());
        while from.is_empty() || !token.is_empty() {
            let before = rounds();
            let page = page(&client, page_size, token).await;
            token = page.next_page_token;
            let mut seen: BTreeMap<String, Vec<u8>> = BTreeMap::new();
            let mut to = from.clone();
            for record in page.records {
                assert!(record.key > to, "{} after {to}: in order, and none twice", record.key);
                to.clone_from(&record.key);
                seen.insert(record.key, record.entry.expect("a record has an entry").value.to_vec());
            }
            let is_last = token.is_empty();
            assert_holds(&seen, &before, |key| key > &from && (is_last || key <= &to));
            from = if to.is_empty() { "k".to_owned() } else { to };
        }
        if begun.elapsed() > LONG_ENOUGH {
            break;
        }
    }
    assert!(
        rounds().iter().all(|round| *round > 2),
        "they were written again and again"
    );
    stop.store(true, Ordering::Relaxed);
    while let Some(writer) = writers.join_next().await {
        writer.expect("no writer fails");
    }
}

#[tokio::test]
async fn no_key_is_missed_while_the_queue_drains_into_postgres() {
    nothing_is_missed(Database::postgres().await).await;
}

#[tokio::test]
async fn no_key_is_missed_while_the_queue_drains_into_sqlite() {
    nothing_is_missed(Database::sqlite()).await;
}

/// Pages over many records, by their number and by their bytes, with pending puts and deletes over them; and a token that a restart survives.
async fn pages_of_many(database: Database) {
    // What is pending stays so.
    let sections = "[namespaces.orders]\nwrite_delay = \"1h\"\n[shutdown]\ndrain_wait = \"60s\"\n";
    let mut gateway = Setup::new().store(database.url()).config(sections).start().await;
    let rows = if database.url().starts_with("sqlite:") {
        "insert into tidegate_entries (namespace, key, version, value)
         with recursive n (i) as (select 1 union all select i + 1 from n where i < 5000)
         select 'orders', printf('k%05d', i), 1, cast('stored' as blob) from n"
    } else {
        "insert into tidegate_entries (namespace, key, version, value)
         select 'orders', 'k' || lpad(i::text, 5, '0'), 1, convert_to('stored', 'UTF8') from generate_series(1, 5000) i"
    };
    database.execute(rows).await;
    let mut wanted: BTreeMap<String, Vec<u8>> = (1..=5_000)
        .map(|number| (format!("k{number:05}"), b"stored".to_vec()))
        .collect();
    let client = gateway.client.clone();
    for number in (1..=5_000).step_by(61) {
        let (over, between) = (format!("k{number:05}"), format!("k{number:05}\u{e9}"));
        client.put(&over, b"pending", Mode::Behind).await.unwrap();
        client.put(&between, b"pending", Mode::Behind).await.unwrap();
        let gone = format!("k{:05}", number + 7);
        client.delete(&gone, Mode::Behind).await.unwrap();
        wanted.insert(over, b"pending".to_vec());
        wanted.insert(between, b"pending".to_vec());
        wanted.remove(&gone);
    }
    for extreme in ["k\u{7f}", "k\u{1}", "k\u{10ffff}", &format!("k{}", "z".repeat(1_023))] {
        client.put(extreme, b"pending", Mode::Behind).await.unwrap();
        wanted.insert(extreme.to_owned(), b"pending".to_vec());
    }
    client.put("l", b"beyond the prefix", Mode::Behind).await.unwrap();
    client.put("j", b"before the prefix", Mode::Behind).await.unwrap();
    for page_size in [97, 1_000] {
        assert!(scanned(&client, page_size).await == wanted, "{page_size}");
    }
    let first = page(&client, 1_000, String::new()).await;
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    let mut seen: Vec<String> = first.records.into_iter().map(|record| record.key).collect();
    let mut token = first.next_page_token;
    while !token.is_empty() {
        let page = page(&gateway.client, 1_000, token).await;
        seen.extend(page.records.into_iter().map(|record| record.key));
        token = page.next_page_token;
    }
    assert!(seen.iter().eq(wanted.keys()), "{} records", seen.len());
}

#[tokio::test]
async fn pages_of_postgres_are_those_of_the_model() {
    pages_of_many(Database::postgres().await).await;
}

#[tokio::test]
async fn pages_of_sqlite_are_those_of_the_model() {
    pages_of_many(Database::sqlite()).await;
}
