//! Proves that the Rust client of this crate tries again what is safe to try again and nothing else, that it honours the delays and the details
//! of a gateway, and that a session reads what it has written.

use std::{num::NonZeroU32, time::Duration};

use tidegate::{
    client::{
        Client, Error, Failure, Options, Reason, Retry,
        proto::{
            AwaitPersistedRequest, BatchGetRequest, BatchWriteRequest, Condition, DeleteRequest, Existence, GetRequest,
            IncrementRequest, PutRequest, ReadConsistency, ScanRequest, TouchRequest, WriteItem, WriteMode,
            batch_get_result, write_item::Operation, write_result,
        },
    },
    rpc::proto::{GetResponse, PutResponse},
};
use tokio::time::Instant;

use crate::harness::{
    Database, Gateway, SOON, Setup, eventually, expect,
    process::free_port,
    proxy::{Passage, Proxy},
    redis,
};

fn patient() -> Options {
    Options {
        deadline: SOON,
        retry: Retry {
            tries_max: 1_000,
            ..Retry::default()
        },
        ..Options::default()
    }
}

fn at(gateway: &Gateway) -> String {
    gateway.address.to_string()
}

fn put(key: &str, value: &str, mode: WriteMode) -> PutRequest {
    PutRequest {
        namespace: "orders".to_owned(),
        key: key.to_owned(),
        value: value.to_owned().into(),
        write_mode: mode as i32,
        ..PutRequest::default()
    }
}

fn get(key: &str) -> GetRequest {
    GetRequest {
        namespace: "orders".to_owned(),
        key: key.to_owned(),
        ..GetRequest::default()
    }
}

fn delete(key: &str) -> DeleteRequest {
    DeleteRequest {
        namespace: "orders".to_owned(),
        key: key.to_owned(),
        ..DeleteRequest::default()
    }
}

fn increment(key: &str) -> IncrementRequest {
    IncrementRequest {
        namespace: "orders".to_owned(),
        key: key.to_owned(),
        ..IncrementRequest::default()
    }
}

fn value(answer: GetResponse) -> Option<String> {
    let entry = answer.entry?;
    Some(String::from_utf8(entry.value.to_vec()).unwrap())
}

fn failure(error: Error) -> Failure {
    error
        .failure()
        .cloned()
        .unwrap_or_else(|| panic!("no gateway said: {error:?}"))
}

#[tokio::test]
async fn every_call_is_made_over_every_channel() {
    let gateway = Setup::new().start().await;
    let options = Options {
        channels: NonZeroU32::new(3).unwrap(),
        ..Options::default()
    };
    let client = Client::with_options(&[at(&gateway)], options).unwrap();
    let written: PutResponse = client.put(put("a", "one", WriteMode::Through)).await.unwrap();
    for _ in 0..6 {
        let answer = client.get(get("a")).await.unwrap();
        assert_eq!(answer.entry.as_ref().unwrap().version, written.version);
    }
    let touched = client.touch(TouchRequest {
        namespace: "orders".to_owned(),
        key: "a".to_owned(),
        ..TouchRequest::default()
    });
    assert!(touched.await.unwrap().version > written.version);
    assert_eq!(client.increment(increment("n")).await.unwrap().value, 1);
    let items = [put("b", "two", WriteMode::Through), put("", "none", WriteMode::Through)];
    let items = items.map(|put| WriteItem {
        operation: Some(Operation::Put(put)),
    });
    let results = client
        .batch_write(BatchWriteRequest { items: items.into() })
        .await
        .unwrap()
        .results;
    assert!(matches!(results[0].outcome, Some(write_result::Outcome::Written(_))));
    let Some(write_result::Outcome::Failure(refused)) = results[1].outcome.clone() else {
        panic!("a key is not empty: {results:?}");
    };
    let refused = Failure::from(refused);
    assert_eq!(
        (&refused.reason, refused.violations[0].field.as_str()),
        (&Reason::Invalid, "key")
    );
    let batch = BatchGetRequest {
        namespace: "orders".to_owned(),
        keys: vec!["a".to_owned(), "nobody".to_owned()],
        ..BatchGetRequest::default()
    };
    let found = client
        .batch_get(batch)
        .await
        .unwrap()
        .results
        .into_iter()
        .map(|result| match result.outcome {
            Some(batch_get_result::Outcome::Found(answer)) => value(answer),
            other => panic!("{other:?}"),
        });
    assert_eq!(found.collect::<Vec<_>>(), [Some("one".to_owned()), None]);
    let scan = ScanRequest {
        namespace: "orders".to_owned(),
        page_size: 1,
        ..ScanRequest::default()
    };
    let mut pages = client.pages(scan);
    let mut keys = Vec::new();
    while let Some(records) = pages.next().await.unwrap() {
        keys.extend(records.into_iter().map(|record| record.key));
    }
    assert_eq!(keys, ["a", "b", "n"]);
    client.await_persisted(AwaitPersistedRequest::default()).await.unwrap();
    client.delete(delete("a")).await.unwrap();
    assert_eq!(value(client.get(get("a")).await.unwrap()), None);
}

#[tokio::test]
async fn a_failure_is_told_with_its_details() {
    let gateway = Setup::new().start().await;
    let client = Client::new(&[at(&gateway)]).unwrap();
    let invalid = failure(client.put(put("", "v", WriteMode::Through)).await.unwrap_err());
    assert_eq!(
        (&invalid.reason, invalid.violations[0].field.as_str()),
        (&Reason::Invalid, "key")
    );
    assert!(!invalid.may_be_applied && invalid.retry_delay.is_none());
    let written = client.put(put("k", "v", WriteMode::Through)).await.unwrap();
    let absent = PutRequest {
        condition: Some(Condition {
            existence: Existence::Absent as i32,
            version: 0,
        }),
        ..put("k", "w", WriteMode::Unspecified)
    };
    let conflict = failure(client.put(absent).await.unwrap_err());
    assert_eq!(
        (conflict.reason, conflict.standing_version),
        (Reason::Conflict, Some(written.version))
    );

    let nobody = Client::with_options(
        &[format!("127.0.0.1:{}", free_port())],
        Options {
            deadline: Duration::from_millis(300),
            ..Options::default()
        },
    );
    let error = nobody
        .unwrap()
        .put(put("k", "v", WriteMode::Through))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Unreachable {
                may_be_applied: false,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(matches!(Client::new(&["nowhere"]), Err(Error::Address { .. })));
    assert!(matches!(Client::new(&[""; 0]), Err(Error::Address { .. })));
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_under_the_same_id_and_counts_once() {
    let gateway = Setup::new().start().await;
    let proxy = Proxy::start(&at(&gateway)).await;
    let client = Client::with_options(&[proxy.address().to_string()], patient()).unwrap();
    assert_eq!(client.increment(increment("n")).await.unwrap().value, 1);
    proxy.set(Passage::AnswersLost);
    let calling = tokio::spawn({
        let client = client.clone();
        async move { client.increment(increment("n")).await }
    });
    // It was counted, and nobody was told.
    eventually("the store has it", SOON, async || {
        let seen = gateway.client.value("n", ReadConsistency::Store).await;
        expect(seen.as_deref() == Some(b"2"), seen)
    })
    .await;
    proxy.set(Passage::Open);
    let answer = calling.await.unwrap().unwrap();
    assert_eq!((answer.value, answer.deduplicated), (2, true));

    // Without an id it is not sent again, and the error says that it may have counted.
    let bare = Client::with_options(
        &[proxy.address().to_string()],
        Options {
            request_ids: false,
            ..patient()
        },
    );
    let bare = bare.unwrap();
    bare.get(get("n")).await.unwrap();
    proxy.set(Passage::AnswersLost);
    let error = bare.increment(increment("n")).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Unreachable {
                may_be_applied: true,
                ..
            }
        ),
        "{error:?}"
    );
    proxy.set(Passage::Open);
    assert_eq!(value(bare.get(get("n")).await.unwrap()).as_deref(), Some("3"));
}

#[tokio::test]
async fn a_call_lasts_through_a_restart_and_goes_to_another_gateway() {
    let listen = format!("127.0.0.1:{}", free_port());
    let mut gateway = Setup::new().argument("--listen").argument(&listen).start().await;
    let client = Client::with_options(&[&listen], patient()).unwrap();
    client.put(put("a", "one", WriteMode::Behind)).await.unwrap();
    gateway.kill().await;
    let calling = tokio::spawn({
        let client = client.clone();
        async move { client.put(put("b", "two", WriteMode::Behind)).await }
    });
    let gateway = gateway.start_again().await;
    calling.await.unwrap().unwrap();
    assert_eq!(value(client.get(get("a")).await.unwrap()).as_deref(), Some("one"));

    // Of two addresses, one of which nobody is at, every call finds the other.
    let nobody = format!("127.0.0.1:{}", free_port());
    let client = Client::with_options(&[nobody, at(&gateway)], Options::default()).unwrap();
    for _ in 0..4 {
        assert_eq!(value(client.get(get("b")).await.unwrap()).as_deref(), Some("two"));
    }
}

#[tokio::test]
async fn an_overloaded_gateway_is_left_alone_for_as_long_as_it_asks() {
    let database = Database::postgres().await;
    let setup = Setup::new()
        .store(database.url())
        .config("[queue]\nentries_max = 4\n\n[namespace_defaults]\nqueue_full = \"reject\"\nwrite_mode = \"behind\"\n");
    let gateway = setup.start().await;
    let hold = database.hold_writes().await;
    let once = Client::with_options(
        &[at(&gateway)],
        Options {
            retry: Retry::NONE,
            ..Options::default()
        },
    );
    let once = once.unwrap();
    let full = eventually("the queue is full", SOON, async || {
        for n in 0..8 {
            if let Err(error) = once.put(put(&n.to_string(), "v", WriteMode::Unspecified)).await {
                return Ok(error);
            }
        }
        Err("it takes them".to_owned())
    })
    .await;
    let full = failure(full);
    let delay = full.retry_delay.expect("it says when to come back");
    assert_eq!((full.reason, full.may_be_applied), (Reason::Overloaded, false));

    let client = Client::with_options(&[at(&gateway)], patient()).unwrap();
    let (asked, before) = (Instant::now(), refused(&gateway).await);
    let calling = tokio::spawn(async move { client.put(put("late", "v", WriteMode::Unspecified)).await });
    eventually("it was refused, and came back", SOON, async || {
        let count = refused(&gateway).await - before;
        expect(count >= 3.0, count)
    })
    .await;
    // Three tries have two delays between them.
    assert!(
        asked.elapsed() >= delay * 2,
        "{:?}, asked for {delay:?}",
        asked.elapsed()
    );
    hold.release().await;
    calling.await.unwrap().expect("there is room again");
    // Where the deadline comes before the delay is over, the failure is told at once.
    let _hold = database.hold_writes().await;
    let hasty = once.deadline(delay / 2);
    let hasty = eventually("the queue is full again", SOON, async || {
        for n in 0..8 {
            if let Err(error) = hasty.put(put(&n.to_string(), "w", WriteMode::Unspecified)).await {
                return Ok(error);
            }
        }
        Err("it takes them".to_owned())
    });
    assert_eq!(failure(hasty.await).reason, Reason::Overloaded);
}

async fn refused(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_queue_full_writes_total", &[]).await
}

#[tokio::test]
async fn a_session_reads_what_it_has_written_on_any_gateway() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url());
    let (one, other) = (setup.clone().start().await, setup.start().await);
    let client = Client::with_options(&[at(&one), at(&other)], patient()).unwrap();
    let session = client.session();
    for round in 0..50 {
        let text = round.to_string();
        let written = session.put(put("k", &text, WriteMode::Behind)).await.unwrap();
        // Both in turn.
        for _ in 0..2 {
            assert_eq!(value(session.get(get("k")).await.unwrap()), Some(text.clone()));
        }
        assert_eq!(session.min_version("orders", "k"), written.version);
    }
    session.delete(delete("k")).await.unwrap();
    assert_eq!(value(session.get(get("k")).await.unwrap()), None);

    // What one session has seen another can be told of.
    let version = session.min_version("orders", "k");
    let heir = client.session();
    heir.saw("orders", "k", version);
    assert_eq!(heir.min_version("orders", "k"), version);
    assert_eq!(value(heir.get(get("k")).await.unwrap()), None);
}
