//! Proves that dead letters can be looked at, tried again, thrown away and taken out, and that the one rule holds for them.

use tidegate::rpc::proto::{
    DeadLetter, DiscardDeadLettersRequest, ExportDeadLettersRequest, ListDeadLettersRequest, PauseRequest, PutRequest,
    ReadConsistency, RetryDeadLettersRequest, RetryDeadLettersResponse, RetryOutcome,
};
use tonic::{Code, Status};

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{assert_come_back, assert_do_not_come_back},
    eventually, expect, redis,
};

const POISON: &[u8] = b"poison";

const REFUSE: &str =
    "alter table tidegate_entries add constraint no_poison check (value is distinct from 'poison'::bytea)";
const ALLOW: &str = "alter table tidegate_entries drop constraint no_poison";

/// A gateway over a table that refuses poison, with so many dead letters: `0`, `1`, …
async fn with_letters(count: usize) -> (Gateway, Database) {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    database.execute(REFUSE).await;
    bury(&gateway, &database, count).await;
    (gateway, database)
}

async fn bury(gateway: &Gateway, database: &Database, count: usize) {
    for number in 0..count {
        let put = PutRequest {
            tags: vec!["red".to_owned()],
            ..gateway.client.put_request(&number.to_string(), POISON, Mode::Behind)
        };
        gateway.client.stub().put(put).await.expect("accepted");
        // One after the other, so that their ids are in this order.
        eventually("it is a dead letter", SOON, async || {
            let letters = database.dead_letters().await.len();
            expect(letters == number + 1, letters)
        })
        .await;
    }
    gateway.drained().await;
}

async fn list(gateway: &Gateway) -> Vec<DeadLetter> {
    let request = ListDeadLettersRequest::default();
    let answer = gateway.admin().await.list_dead_letters(request).await;
    answer.expect("they are listed").into_inner().letters
}

async fn retry(gateway: &Gateway, request: RetryDeadLettersRequest) -> Result<Vec<RetryDeadLettersResponse>, Status> {
    let mut stream = gateway.admin().await.retry_dead_letters(request).await?.into_inner();
    let mut told = Vec::new();
    while let Some(message) = stream.message().await? {
        told.push(message);
    }
    Ok(told)
}

fn all() -> RetryDeadLettersRequest {
    RetryDeadLettersRequest {
        up_to_id: i64::MAX,
        ..RetryDeadLettersRequest::default()
    }
}

fn ids(ids: &[i64]) -> RetryDeadLettersRequest {
    RetryDeadLettersRequest {
        ids: ids.to_vec(),
        ..RetryDeadLettersRequest::default()
    }
}

fn outcomes(told: &[RetryDeadLettersResponse]) -> Vec<(String, RetryOutcome)> {
    let outcome = |told: &RetryDeadLettersResponse| {
        let key = told.letter.as_ref().expect("there is always one").key.clone();
        (key, told.outcome())
    };
    told.iter().map(outcome).collect()
}

#[tokio::test]
async fn letters_are_listed_in_pages_with_all_that_is_known_and_no_value() {
    let (gateway, _database) = with_letters(3).await;
    let letters = list(&gateway).await;
    let keys: Vec<&str> = letters.iter().map(|letter| letter.key.as_str()).collect();
    assert_eq!(keys, ["0", "1", "2"]);
    let first = &letters[0];
    assert_eq!(
        (first.namespace.as_str(), first.value_bytes, first.deletes),
        ("orders", 6, false)
    );
    assert_eq!((first.code.as_str(), first.attempts), ("23514", 1));
    assert_eq!(first.tags, ["red"]);
    assert!(first.reason.contains("no_poison") && first.version > 0, "{first:?}");
    assert!(first.bury_time.is_some() && first.retry_time.is_none(), "{first:?}");

    let mut admin = gateway.admin().await;
    let mut page = async |after_id| {
        let request = ListDeadLettersRequest {
            page_size: 2,
            after_id,
            ..ListDeadLettersRequest::default()
        };
        let page = admin.list_dead_letters(request).await.unwrap().into_inner();
        (page.letters.len(), page.last_id, page.more)
    };
    assert_eq!(page(0).await, (2, letters[1].id, true));
    assert_eq!(page(letters[1].id).await, (1, letters[2].id, false));
    assert_eq!(page(letters[2].id).await, (0, letters[2].id, false));
    let elsewhere = ListDeadLettersRequest {
        namespace: "sessions".to_owned(),
        ..ListDeadLettersRequest::default()
    };
    let elsewhere = gateway.admin().await.list_dead_letters(elsewhere).await.unwrap();
    assert!(elsewhere.into_inner().letters.is_empty());
}

#[tokio::test]
async fn what_is_refused_again_stays_and_says_so() {
    let (gateway, database) = with_letters(1).await;
    for attempts in 2..=3 {
        let told = retry(&gateway, all()).await.expect("it is tried");
        assert_eq!(outcomes(&told), [("0".to_owned(), RetryOutcome::Refused)]);
        let [letter] = &list(&gateway).await[..] else {
            panic!("it is one")
        };
        assert_eq!(told[0].letter.as_ref(), Some(letter), "as it is now");
        assert_eq!((letter.attempts, letter.code.as_str()), (attempts, "23514"));
        assert!(letter.retry_time.is_some());
    }
    // Refused for another reason, it has that.
    database.execute(ALLOW).await;
    database
        .execute("alter table tidegate_entries add constraint short check (length(value) < 3)")
        .await;
    retry(&gateway, all()).await.expect("it is tried");
    let letters = list(&gateway).await;
    assert!(letters[0].reason.contains("short"), "{letters:?}");
    // Later than the retention allows, it is not even then taken.
    database
        .execute("alter table tidegate_entries drop constraint short; update tidegate_control set gc_horizon = 9000000000000000000")
        .await;
    let told = retry(&gateway, all()).await.expect("it is tried");
    assert_eq!(outcomes(&told), [("0".to_owned(), RetryOutcome::Refused)]);
    assert_eq!(list(&gateway).await[0].code, "TG001");
}

#[tokio::test]
async fn what_the_store_takes_now_is_read_everywhere_under_its_own_version() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url());
    let [gateway, other] = [setup.clone().start().await, setup.start().await];
    gateway.client.put("0", b"before", Mode::Through).await.unwrap();
    database.execute(REFUSE).await;
    bury(&gateway, &database, 1).await;
    let letter = list(&gateway).await.remove(0);
    for gateway in [&gateway, &other] {
        eventually("what was before is read, and cached", SOON, async || {
            let value = gateway.client.value("0", ReadConsistency::Cached).await;
            expect(value.as_deref() == Some(&b"before"[..]), value)
        })
        .await;
    }
    database.execute(ALLOW).await;
    // Any gateway of the store will do.
    let told = retry(&other, ids(&[letter.id])).await.expect("it is tried");
    assert_eq!(outcomes(&told), [("0".to_owned(), RetryOutcome::Stored)]);
    assert_eq!(list(&gateway).await, []);
    let row = database.row("orders", "0").await.expect("there is a row");
    assert_eq!((row.version, row.value.as_deref()), (letter.version, Some(POISON)));
    let tags = database
        .texts("select array_to_string(tags, ' ') from tidegate_entries where tags is not null")
        .await;
    assert_eq!(tags, ["red"]);
    other.client.assert_everywhere("0", Some(POISON)).await;
    eventually("the other gateways hear of it", SOON, async || {
        let value = gateway.client.value("0", ReadConsistency::Cached).await;
        expect(value.as_deref() == Some(POISON), value)
    })
    .await;
    gateway.client.assert_everywhere("0", Some(POISON)).await;
    let told = retry(&gateway, ids(&[letter.id])).await.expect("it is tried");
    assert_eq!(told[0].outcome(), RetryOutcome::Gone);
}

#[tokio::test]
async fn a_newer_write_of_the_key_stands() {
    let (gateway, database) = with_letters(2).await;
    let newer = gateway.client.put("0", b"newer", Mode::Through).await.unwrap();
    database.execute(ALLOW).await;
    let told = retry(&gateway, all()).await.expect("they are tried");
    assert_eq!(
        outcomes(&told),
        [
            ("0".to_owned(), RetryOutcome::Superseded),
            ("1".to_owned(), RetryOutcome::Stored)
        ]
    );
    assert_eq!(told[0].standing_version, newer.version);
    assert_eq!(list(&gateway).await, []);
    gateway.client.assert_everywhere("0", Some(b"newer")).await;
    gateway.client.assert_everywhere("1", Some(POISON)).await;
}

#[tokio::test]
async fn only_what_is_named_or_was_seen_is_discarded() {
    let (gateway, database) = with_letters(4).await;
    let letters = list(&gateway).await;
    let discard = async |ids: &[i64], up_to_id, namespace: &str| {
        let request = DiscardDeadLettersRequest {
            ids: ids.to_vec(),
            up_to_id,
            namespace: namespace.to_owned(),
        };
        let answer = gateway.admin().await.discard_dead_letters(request).await;
        answer.expect("they are discarded").into_inner().discarded
    };
    assert_eq!(discard(&[letters[1].id, letters[1].id, 1 << 40], 0, "").await, 1);
    assert_eq!(discard(&[], letters[2].id, "sessions").await, 0);
    assert_eq!(discard(&[], letters[2].id, "orders").await, 2);
    let left: Vec<String> = list(&gateway).await.into_iter().map(|letter| letter.key).collect();
    assert_eq!(left, ["3"]);
    assert_eq!(database.row("orders", "0").await, None, "their writes are lost");
}

#[tokio::test]
async fn an_export_has_the_values() {
    let (gateway, database) = with_letters(0).await;
    // More than are had together, in two namespaces, one of them a delete.
    database
        .execute(
            "insert into tidegate_dead_letters (namespace, key, version, value, reason) \
             select 'orders', g::text, g, decode(repeat(lpad(to_hex(g % 256), 2, '0'), 500000), 'hex'), 'no' from generate_series(1, 80) g; \
             insert into tidegate_dead_letters (namespace, key, version, reason) values ('sessions', 'gone', 1, 'no')",
        )
        .await;
    let export = async |namespace: &str, after_id| {
        let request = ExportDeadLettersRequest {
            namespace: namespace.to_owned(),
            after_id,
        };
        let mut stream = gateway
            .admin()
            .await
            .export_dead_letters(request)
            .await
            .unwrap()
            .into_inner();
        let mut told = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            told.push((message.letter.unwrap(), message.value));
        }
        told
    };
    let all = export("", 0).await;
    assert_eq!(all.len(), 81);
    for (number, (letter, value)) in (1..=80u8).zip(&all) {
        assert_eq!(letter.key, number.to_string());
        assert!(
            value.len() == 500_000 && value.iter().all(|byte| *byte == number),
            "{number}"
        );
    }
    let (last, value) = &all[80];
    assert!(last.deletes && value.is_empty(), "{last:?}");
    assert_eq!(export("sessions", 0).await.len(), 1);
    assert_eq!(export("orders", all[77].0.id).await.len(), 2);
}

#[tokio::test]
async fn bad_requests_and_a_store_that_is_away_are_answered_clearly() {
    let (gateway, database) = with_letters(1).await;
    let invalid = |status: Status, field: &str| {
        assert_do_not_come_back(&status, Code::InvalidArgument, "INVALID");
        assert!(status.message().contains(field), "{status:?}");
    };
    invalid(retry(&gateway, ids(&[])).await.expect_err("names none"), "ids");
    invalid(retry(&gateway, ids(&[-1])).await.expect_err("is none"), "ids");
    let request = ListDeadLettersRequest {
        page_size: 1_001,
        ..ListDeadLettersRequest::default()
    };
    let refused = gateway.admin().await.list_dead_letters(request).await;
    invalid(refused.expect_err("too large"), "page_size");

    // The table of entries is away: nothing is lost, and no attempt is counted.
    database
        .execute("alter table tidegate_entries rename to elsewhere")
        .await;
    let failed = retry(&gateway, all()).await.expect_err("the store takes nothing");
    assert_eq!(failed.code(), Code::Unavailable, "{failed:?}");
    database
        .execute("alter table elsewhere rename to tidegate_entries")
        .await;
    assert_eq!(list(&gateway).await[0].attempts, 1);
    database
        .execute("alter table tidegate_dead_letters rename to elsewhere")
        .await;
    let request = ListDeadLettersRequest::default();
    let failed = gateway.admin().await.list_dead_letters(request).await;
    assert_come_back(&failed.expect_err("it is away"), Code::Unavailable);
}

#[tokio::test]
async fn a_retry_leaves_a_newer_write_that_is_pending_elsewhere() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url());
    let [gateway, other] = [setup.clone().start().await, setup.start().await];
    database.execute(REFUSE).await;
    bury(&gateway, &database, 1).await;
    let pause = PauseRequest {
        namespace: "orders".to_owned(),
        unused: true,
    };
    other.admin().await.pause(pause).await.expect("it is paused");
    other.client.put("0", b"newer", Mode::Behind).await.expect("accepted");
    database.execute(ALLOW).await;
    let told = retry(&gateway, all()).await.expect("it is tried");
    assert_eq!(outcomes(&told), [("0".to_owned(), RetryOutcome::Stored)]);
    // What was acknowledged is in Redis and in the other's memory, and not in the store.
    assert_eq!(database.value("orders", "0").await.as_deref(), Some(POISON));
    for consistency in [ReadConsistency::Cached, ReadConsistency::Shared] {
        let value = gateway.client.value("0", consistency).await;
        assert_eq!(value.as_deref(), Some(&b"newer"[..]), "{consistency:?}");
    }
}
