//! Proves that a batch asks each tier once for all of its keys, shares loads with other gateways and is no more than its answers when a tier
//! is away; as far as single reads show it, what it answers is proved elsewhere.

use std::time::Duration;

use redis::cmd;
use tidegate::rpc::proto::{BatchGetRequest, GetResponse, ReadConsistency, Source, batch_get_result::Outcome};
use tokio::time::Instant;
use tonic::Code;

use crate::harness::{
    Client, Database, Gateway, Mode, SOON, Setup, client::seen, eventually, expect, proxy::Proxy, redis as redis_server,
};

/// Longer than any test holds the store; and no renewals, which would ask tiers, too.
const PATIENT: &str =
    "[rpc]\ndeadline_default = \"1m\"\n[store]\ncall_timeout = \"2m\"\n[namespace_defaults]\nrefresh_threshold = 0.0\n";

/// Far from each other, as in another town.
const AWAY: Duration = Duration::from_millis(50);

type Answers = Vec<Result<GetResponse, Code>>;

async fn batch_get(client: &Client, keys: &[String], consistency: ReadConsistency) -> Answers {
    let request = BatchGetRequest {
        namespace: "orders".to_owned(),
        keys: keys.to_vec(),
        consistency: consistency as i32,
        ..BatchGetRequest::default()
    };
    let answer = client.stub().batch_get(request).await.expect("a batch is answered");
    let results = answer
        .into_inner()
        .results
        .into_iter()
        .map(|result| match result.outcome {
            Some(Outcome::Found(found)) => Ok(found),
            Some(Outcome::Failure(failure)) => Err(Code::from(failure.code)),
            None => panic!("a key without an answer"),
        });
    results.collect()
}

/// Keys of the rows that [`fill`] makes: `k00001` and so on, each with its own name as its value.
fn keys(many: usize) -> Vec<String> {
    (1..=many).map(|number| format!("k{number:05}")).collect()
}

/// Makes rows past the gateway.
async fn fill(database: &Database, many: usize) {
    let rows = if database.url().starts_with("sqlite:") {
        format!(
            "insert into tidegate_entries (namespace, key, version, value)
             with recursive n (i) as (select 1 union all select i + 1 from n where i < {many})
             select 'orders', printf('k%05d', i), 1, cast(printf('k%05d', i) as blob) from n"
        )
    } else {
        format!(
            "insert into tidegate_entries (namespace, key, version, value)
             select 'orders', 'k' || lpad(i::text, 5, '0'), 1, convert_to('k' || lpad(i::text, 5, '0'), 'UTF8')
               from generate_series(1, {many}) i"
        )
    };
    database.execute(&rows).await;
}

fn assert_all(keys: &[String], answers: &Answers, source: Source) {
    assert_eq!(keys.len(), answers.len());
    for (key, answer) in keys.iter().zip(answers) {
        let answer = answer.as_ref().expect("a key is answered");
        assert_eq!(seen(answer), (Some(key.as_bytes()), source), "{key}");
    }
}

/// Load queries so far, and the keys that they asked for.
async fn loads(gateway: &Gateway) -> (f64, f64) {
    (
        gateway.metric("tidegate_store_load_batch_keys_count", &[]).await,
        gateway.metric("tidegate_store_load_batch_keys_sum", &[]).await,
    )
}

#[tokio::test]
async fn five_hundred_misses_are_one_query_and_a_few_trips_to_redis() {
    let (database, redis) = (Database::postgres().await, redis_server::start().await);
    let (network, redis_url) = Proxy::before(&redis.url()).await;
    // Patient with a network that the test makes slow, on a machine that is.
    let sections = format!("{PATIENT}[redis]\ntimeout = \"20s\"\n");
    let setup = Setup::new().store(database.url()).redis(&redis_url).config(&sections);
    let gateway = setup.start().await;
    fill(&database, 500).await;
    let keys = keys(500);
    gateway.client.put("probe", b"value", Mode::Through).await.unwrap();
    eventually("copies in Redis are read", SOON, async || {
        let read = gateway.client.get("probe", ReadConsistency::Shared).await.unwrap();
        expect(read.source() == Source::L2, read)
    })
    .await;
    let before = loads(&gateway).await;
    // So that the script is not known: the batch makes it known.
    let mut direct = redis.connect().await;
    cmd("SCRIPT")
        .arg("FLUSH")
        .exec_async(&mut direct)
        .await
        .expect("SCRIPT FLUSH");
    network.delay(AWAY, AWAY);
    let begun = Instant::now();
    let answers = batch_get(&gateway.client, &keys, ReadConsistency::Cached).await;
    let took = begun.elapsed();
    assert_all(&keys, &answers, Source::Store);
    let after = loads(&gateway).await;
    assert_eq!(
        (after.0 - before.0, after.1 - before.1),
        (1.0, 500.0),
        "queries and keys"
    );
    // A look, a claim, the script and the claim again: single reads one after the other would take a hundred times as long.
    assert!(took < 40 * AWAY, "{took:?}");
    // Their copies land in Redis, too, in the background.
    eventually("the copies have landed", SOON, async || {
        let begun = Instant::now();
        let answers = batch_get(&gateway.client, &keys, ReadConsistency::Shared).await;
        let took = begun.elapsed();
        let landed = answers
            .iter()
            .flatten()
            .filter(|found| found.source() == Source::L2)
            .count();
        expect(landed == 500 && took < 20 * AWAY, (landed, took))
    })
    .await;
    // And in L1, which asks nobody.
    network.cut();
    let answers = batch_get(&gateway.client, &keys[..100], ReadConsistency::Cached).await;
    let from_memory = answers
        .iter()
        .flatten()
        .filter(|found| found.source() == Source::L1)
        .count();
    // Without Redis it answers only for as long as it is known that nobody wrote.
    assert!(from_memory == 100 || from_memory == 0, "{from_memory}");
}

#[tokio::test]
async fn without_redis_a_batch_is_one_query_with_any_store_and_consistency() {
    for database in [Database::postgres().await, Database::sqlite()] {
        let gateway = Setup::new().store(database.url()).config(PATIENT).start().await;
        fill(&database, 1_000).await;
        let keys = keys(1_000);
        for consistency in [ReadConsistency::Cached, ReadConsistency::Shared, ReadConsistency::Store] {
            let before = loads(&gateway).await;
            let answers = batch_get(&gateway.client, &keys, consistency).await;
            assert_all(&keys, &answers, Source::Store);
            let after = loads(&gateway).await;
            assert_eq!(
                (after.0 - before.0, after.1 - before.1),
                (1.0, 1_000.0),
                "{consistency:?}"
            );
        }
        let answers = batch_get(&gateway.client, &keys, ReadConsistency::Cached).await;
        assert_all(&keys, &answers, Source::L1);
    }
}

/// Two gateways on one Redis and one PostgreSQL, which both read what lies in Redis.
async fn pair(sections: &str) -> (Database, redis_server::Server, [Gateway; 2]) {
    let (database, redis) = (Database::postgres().await, redis_server::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url()).config(sections);
    let gateways = [setup.clone().start().await, setup.start().await];
    gateways[0].client.put("probe", b"value", Mode::Through).await.unwrap();
    for gateway in &gateways {
        eventually("copies in Redis are read", SOON, async || {
            let read = gateway.client.get("probe", ReadConsistency::Shared).await.unwrap();
            expect(read.source() == Source::L2, read)
        })
        .await;
    }
    (database, redis, gateways)
}

#[tokio::test]
async fn of_batches_through_two_gateways_one_asks_the_store_for_each_key() {
    let (database, _redis, gateways) = pair(&format!("{PATIENT}[redis]\nload_wait = \"20s\"\n")).await;
    fill(&database, 300).await;
    let keys = keys(300);
    let asked = async || loads(&gateways[0]).await.1 + loads(&gateways[1]).await.1;
    let before = asked().await;
    let hold = database.hold_all().await;
    // They overlap: what both want one of them loads.
    let readers: Vec<_> = [(0, 0..200), (1, 100..300), (0, 0..300)]
        .into_iter()
        .map(|(gateway, part)| {
            let (client, keys) = (gateways[gateway].client.clone(), keys[part].to_vec());
            tokio::spawn(async move {
                let answers = batch_get(&client, &keys, ReadConsistency::Cached).await;
                (keys, answers)
            })
        })
        .collect();
    eventually("all of them are under way", SOON, async || {
        let mut running = 0.0;
        for gateway in &gateways {
            running += gateway.metric("tidegate_calls_running", &[]).await;
        }
        expect(running >= 3.0, running)
    })
    .await;
    database.await_waiting(1).await;
    hold.release().await;
    for reader in readers {
        let (keys, answers) = reader.await.expect("no reader fails");
        for (key, answer) in keys.iter().zip(&answers) {
            assert_eq!(
                seen(answer.as_ref().expect("answered")).0,
                Some(key.as_bytes()),
                "{key}"
            );
        }
    }
    assert_eq!(asked().await - before, 300.0, "the store was asked once for each");
}

#[tokio::test]
async fn while_the_store_is_away_what_is_cached_is_answered_and_the_rest_is_unavailable() {
    let (database, redis) = (Database::postgres().await, redis_server::start().await);
    let (network, store_url) = Proxy::before(database.url()).await;
    let gateway = Setup::new()
        .store(&store_url)
        .redis(&redis.url())
        .config(PATIENT)
        .start()
        .await;
    gateway.client.put("probe", b"value", Mode::Through).await.unwrap();
    eventually("copies in Redis are read", SOON, async || {
        let read = gateway.client.get("probe", ReadConsistency::Shared).await.unwrap();
        expect(read.source() == Source::L2, read)
    })
    .await;
    fill(&database, 20).await;
    let (cached, unknown) = (keys(10), keys(20).split_off(10));
    batch_get(&gateway.client, &cached, ReadConsistency::Cached).await;
    eventually("the copies have landed", SOON, async || {
        let answers = batch_get(&gateway.client, &cached, ReadConsistency::Shared).await;
        expect(
            answers.iter().flatten().all(|found| found.source() == Source::L2),
            answers,
        )
    })
    .await;
    network.cut();
    let all: Vec<String> = cached.iter().chain(&unknown).cloned().collect();
    eventually("the store is held to be down", SOON, async || {
        let answers = batch_get(&gateway.client, &unknown, ReadConsistency::Store).await;
        expect(answers.iter().all(|answer| *answer == Err(Code::Unavailable)), answers)
    })
    .await;
    for (consistency, source) in [
        (ReadConsistency::Cached, Source::L1),
        (ReadConsistency::Shared, Source::L2),
    ] {
        let answers = batch_get(&gateway.client, &all, consistency).await;
        assert_all(&cached, &answers[..10].to_vec(), source);
        assert!(
            answers[10..].iter().all(|answer| *answer == Err(Code::Unavailable)),
            "{answers:?}"
        );
    }
    network.restore();
    eventually("the store is back", SOON, async || {
        let answers = batch_get(&gateway.client, &all, ReadConsistency::Store).await;
        expect(answers.iter().all(Result::is_ok), answers)
    })
    .await;
}

/// Larger than is had from Redis with others, and more than an answer holds.
#[tokio::test]
async fn large_values_are_answered_some_at_a_time_from_each_tier() {
    let (_database, _redis, gateways) = pair(PATIENT).await;
    let keys = keys(12);
    for (number, key) in keys.iter().enumerate() {
        let value = vec![b'a' + number as u8; 600_000];
        gateways[0].client.put(key, &value, Mode::Through).await.unwrap();
    }
    for (consistency, source) in [
        (ReadConsistency::Shared, Source::L2),
        (ReadConsistency::Store, Source::Store),
    ] {
        let (mut left, mut calls) = (keys.clone(), 0);
        while !left.is_empty() {
            let answers = batch_get(&gateways[1].client, &left, consistency).await;
            assert!(
                answers[0].is_ok(),
                "the first one always is: {:?}",
                answers[0].as_ref().err()
            );
            let mut later = Vec::new();
            for (key, answer) in left.iter().zip(answers) {
                match answer {
                    Ok(found) => {
                        let number = keys.iter().position(|known| known == key).expect("asked for");
                        assert_eq!(found.source(), source, "{key}");
                        let value = found.entry.expect("it is there").value;
                        assert!(value.len() == 600_000 && value[0] == b'a' + number as u8, "{key}");
                    }
                    Err(code) => {
                        assert_eq!(code, Code::ResourceExhausted);
                        later.push(key.clone());
                    }
                }
            }
            left = later;
            calls += 1;
        }
        assert!((2..=6).contains(&calls), "{calls}");
    }
}
