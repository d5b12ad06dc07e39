//! The rules of fields, and the shape of answers.

use bytes::Bytes;

use super::*;
use crate::{
    error::{Error, ErrorKind},
    gateway::{Durability, Found, ReadConsistency, WriteRequest, Written},
    model::{Condition, Entry, Source, Version},
    namespace::WriteMode,
    rpc::proto::{self, batch_get_result},
};

fn put_request() -> proto::PutRequest {
    proto::PutRequest {
        namespace: "orders".into(),
        key: "k".into(),
        value: Bytes::from_static(b"v"),
        ..proto::PutRequest::default()
    }
}

fn fields(error: &Error) -> Vec<&str> {
    error
        .violations()
        .iter()
        .map(|violation| violation.field.as_ref())
        .collect()
}

fn ttl(seconds: i64, nanos: i32) -> Result<WriteRequest, Error> {
    let ttl = Some(prost_types::Duration { seconds, nanos });
    put(proto::PutRequest { ttl, ..put_request() }, 10)
}

#[test]
fn every_field_at_fault_is_named_at_once() {
    let request = proto::PutRequest {
        namespace: "Orders".into(),
        key: "a\0b".into(),
        value: Bytes::from_static(b"12345678901"),
        write_mode: 7,
        ttl: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        tags: vec![String::new(), "fine".into(), "a\0b".into()],
        ..proto::PutRequest::default()
    };
    let error = put(request, 10).expect_err("all wrong");
    let wrong = ["namespace", "key", "value", "write_mode", "ttl", "tags[0]", "tags[2]"];
    assert_eq!(fields(&error), wrong);
}

#[test]
fn tags_are_joined_and_go_with_the_write() {
    let tagged = proto::PutRequest {
        tags: vec!["b".into(), "a".into(), "b".into()],
        ..put_request()
    };
    let write = put(tagged, 10).expect("valid");
    assert_eq!(write.tags.iter().collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn a_ttl_is_positive_well_formed_and_within_a_century() {
    for (seconds, nanos) in [
        (0, 0),
        (-1, 0),
        (0, -1),
        (1, -1),
        (1, 1_000_000_000),
        (i64::MAX, 0),
        (i64::MIN, 0),
    ] {
        assert_eq!(
            fields(&ttl(seconds, nanos).expect_err("bad")),
            ["ttl"],
            "{seconds} {nanos}"
        );
    }
    let max = i64::try_from(DURATION_MAX.as_secs()).expect("fits");
    assert!(ttl(max, 0).is_ok() && ttl(max, 1).is_err());
}

#[test]
fn a_read_s_options_are_positive_and_all_named() {
    let request = |max_staleness: Option<(i64, i32)>, min_version| proto::GetRequest {
        namespace: "orders".into(),
        key: "k".into(),
        max_staleness: max_staleness.map(|(seconds, nanos)| prost_types::Duration { seconds, nanos }),
        min_version,
        ..proto::GetRequest::default()
    };
    let (_, options) = get(&request(None, 0)).expect("valid");
    assert_eq!(options, ReadConsistency::Cached.into());
    let (_, options) = get(&request(Some((0, 1)), 7)).expect("valid");
    assert_eq!(options.freshness.max_staleness, Some(Duration::from_nanos(1)));
    assert_eq!(options.freshness.min_version, Version::new(7));
    let seconds_max = i64::try_from(DURATION_MAX.as_secs()).expect("fits");
    assert!(get(&request(Some((seconds_max, 0)), i64::MAX)).is_ok());
    for (seconds, nanos) in [(0, 0), (-1, 0), (0, -1), (1, -1), (seconds_max, 1), (i64::MAX, 0)] {
        let error = get(&request(Some((seconds, nanos)), 0)).expect_err("bad");
        assert_eq!(fields(&error), ["max_staleness"], "{seconds} {nanos}");
    }
    let error = get(&request(Some((-1, 0)), -1)).expect_err("bad");
    assert_eq!(fields(&error), ["max_staleness", "min_version"]);
}

#[test]
fn a_ttl_is_rounded_up_to_a_millisecond() {
    assert_eq!(ttl(0, 1).expect("valid").ttl, Some(Duration::from_millis(1)));
    assert_eq!(
        ttl(1, 1_000_001).expect("valid").ttl,
        Some(Duration::from_millis(1_002))
    );
}

#[test]
fn an_empty_value_is_a_value_and_a_delete_has_none() {
    let empty = proto::PutRequest {
        value: Bytes::new(),
        ..put_request()
    };
    assert_eq!(put(empty, 10).expect("valid").value, Some(Bytes::new()));
    let request = proto::DeleteRequest {
        namespace: "a".into(),
        key: "b".into(),
        write_mode: 2,
        ..proto::DeleteRequest::default()
    };
    let write = delete(&request).expect("valid");
    assert_eq!((write.value, write.mode), (None, Some(WriteMode::Behind)));
}

#[test]
fn times_before_1970_keep_positive_nanos() {
    assert_eq!(
        timestamp(Timestamp(-1)),
        ProtoTimestamp {
            seconds: -1,
            nanos: 999_000_000
        }
    );
}

#[test]
fn a_condition_has_exactly_one_field_and_is_not_for_write_behind() {
    let conditional = |existence, version, write_mode| {
        let condition = Some(proto::Condition { existence, version });
        put(
            proto::PutRequest {
                condition,
                write_mode,
                ..put_request()
            },
            10,
        )
    };
    for (existence, version, wanted) in [
        (1, 0, Condition::Absent),
        (2, 0, Condition::Present),
        (0, 7, Condition::Version(Version::new(7).expect("positive"))),
    ] {
        for mode in [0, 1] {
            let write = conditional(existence, version, mode).expect("valid");
            assert_eq!(write.condition, Some(wanted));
        }
        let error = conditional(existence, version, 2).expect_err("the store decides");
        assert_eq!(fields(&error), ["write_mode"]);
    }
    for (existence, version, named) in [
        (0, 0, &["condition"][..]),
        (1, 1, &["condition"]),
        (2, i64::MAX, &["condition"]),
        (0, -1, &["condition.version"]),
        (1, -1, &["condition.version"]),
        (3, 0, &["condition.existence"]),
        (-1, i64::MIN, &["condition.existence", "condition.version"]),
    ] {
        let error = conditional(existence, version, 0).expect_err("broken");
        assert_eq!(fields(&error), named, "{existence} {version}");
        let condition = Some(proto::Condition { existence, version });
        let request = proto::DeleteRequest {
            namespace: "a".into(),
            key: "b".into(),
            condition,
            ..proto::DeleteRequest::default()
        };
        assert_eq!(fields(&delete(&request).expect_err("broken")), named);
    }
}

#[test]
fn a_request_id_is_short_text_and_empty_means_none() {
    let named = |request_id: &str| {
        let request_id = request_id.to_owned();
        put(
            proto::PutRequest {
                request_id,
                ..put_request()
            },
            10,
        )
    };
    assert_eq!(named("").expect("valid").request, None);
    let id = named("a").expect("valid").request.expect("it has one");
    assert_eq!(id.as_str(), "a");
    for bad in ["a\0", &"x".repeat(65)] {
        assert_eq!(fields(&named(bad).expect_err("broken")), ["request_id"]);
    }
}

#[test]
fn a_counter_is_changed_by_something() {
    let request = |delta| proto::IncrementRequest {
        namespace: "a".into(),
        key: "b".into(),
        delta,
        ..proto::IncrementRequest::default()
    };
    assert_eq!(increment(&request(None)).expect("valid").delta, 1);
    assert_eq!(increment(&request(Some(i64::MIN))).expect("valid").delta, i64::MIN);
    assert_eq!(fields(&increment(&request(Some(0))).expect_err("nothing")), ["delta"]);
    let all = proto::IncrementRequest {
        delta: Some(0),
        ttl: Some(prost_types::Duration::default()),
        request_id: "\0".into(),
        ..proto::IncrementRequest::default()
    };
    let named = ["namespace", "key", "delta", "ttl", "request_id"];
    assert_eq!(fields(&increment(&all).expect_err("broken")), named);
    let touched = proto::TouchRequest {
        ttl: all.ttl,
        request_id: all.request_id,
        ..proto::TouchRequest::default()
    };
    assert_eq!(
        fields(&touch(&touched).expect_err("broken")),
        ["namespace", "key", "ttl", "request_id"]
    );
}

#[test]
fn what_is_awaited_is_one_write_or_all() {
    let request = |namespace: &str, key: &str, version| proto::AwaitPersistedRequest {
        namespace: namespace.into(),
        key: key.into(),
        version,
    };
    assert_eq!(await_persisted(&request("", "", 0)).expect("valid"), AwaitedWrite::All);
    let one = await_persisted(&request("a", "b", 7)).expect("valid");
    let key = Key::new("a", "b").expect("valid");
    assert_eq!(one, AwaitedWrite::One(key, Version::new(7).expect("positive")));
    for (namespace, key, version, named) in [
        ("a", "", 0, &["key", "version"][..]),
        ("a", "b", 0, &["version"]),
        ("a", "b", -1, &["version"]),
        ("", "b", 7, &["namespace"]),
        ("", "", 7, &["namespace", "key"]),
        ("", "", -7, &["namespace", "key", "version"]),
    ] {
        let error = await_persisted(&request(namespace, key, version)).expect_err("broken");
        assert_eq!(fields(&error), named);
    }
}

#[test]
fn the_keys_of_a_batch_are_counted_and_blamed_by_their_place() {
    let request = |keys: Vec<String>| proto::BatchGetRequest {
        namespace: "a".into(),
        keys,
        ..proto::BatchGetRequest::default()
    };
    let same = |count: usize| vec!["k".to_owned(); count];
    assert_eq!(batch_get(&request(same(1_000))).expect("valid").0.len(), 1_000);
    for count in [0, 1_001] {
        assert_eq!(fields(&batch_get(&request(same(count))).expect_err("broken")), ["keys"]);
    }
    let mut keys = same(20);
    keys[3].clear();
    keys[17] = "a\0b".into();
    let error = batch_get(&request(keys)).expect_err("broken");
    assert_eq!(fields(&error), ["keys[3]", "keys[17]"]);
    let error = batch_get(&request(vec![String::new(); 1_000])).expect_err("broken");
    assert_eq!(error.violations().len(), BLAMED_MAX, "a status has a bound");
    let error = batch_get(&proto::BatchGetRequest {
        keys: vec!["k".into(), String::new()],
        consistency: 9,
        max_staleness: Some(prost_types::Duration::default()),
        ..proto::BatchGetRequest::default()
    });
    let named = ["namespace", "keys[1]", "consistency", "max_staleness"];
    assert_eq!(fields(&error.expect_err("broken")), named);
}

#[test]
fn an_answer_to_many_keys_is_bounded_and_its_first_value_always_there() {
    let found = |bytes: usize| {
        Ok(Found {
            entry: Some(Entry {
                version: Version::new(1).expect("positive"),
                value: Some(Bytes::from(vec![0; bytes])),
                expires_at: None,
            }),
            source: Source::L1,
            age: Duration::ZERO,
            stale: false,
        })
    };
    let sizes = |answers| -> Vec<Option<usize>> {
        let size = |result: proto::BatchGetResult| match result.outcome.expect("there is one") {
            batch_get_result::Outcome::Found(found) => found.entry.map(|entry| entry.value.len()),
            batch_get_result::Outcome::Failure(failure) => {
                assert_eq!(failure.reason, "TOO_LARGE");
                assert!(failure.retry_delay.is_none() && !failure.unknown);
                None
            }
        };
        batch_get_response(answers).results.into_iter().map(size).collect()
    };
    let (half, all) = (ANSWER_BYTES_MAX / 2, ANSWER_BYTES_MAX);
    assert_eq!(
        sizes(vec![found(half), found(half), found(0)]),
        [Some(half), Some(half), Some(0)]
    );
    assert_eq!(
        sizes(vec![found(half + 1), found(half), found(1)]),
        [Some(half + 1), None, Some(1)]
    );
    assert_eq!(
        sizes(vec![found(all + 9), found(1), found(0)]),
        [Some(all + 9), None, Some(0)]
    );
}

#[test]
fn a_page_is_bounded_in_records_and_bytes() {
    let request = proto::ScanRequest {
        namespace: "a".into(),
        ..proto::ScanRequest::default()
    };
    let page = scan(request.clone()).expect("valid");
    assert_eq!((page.records_max, page.bytes_max), (100, 1024 * 1024));
    assert_eq!(page.page_token, None);
    let most = proto::ScanRequest {
        page_size: 1_000,
        page_bytes: 3 * 1024 * 1024,
        prefix: "p".repeat(1_024),
        page_token: "t".into(),
        ..request
    };
    let page = scan(most.clone()).expect("valid");
    assert_eq!((page.records_max, page.bytes_max), (1_000, 3 * 1024 * 1024));
    assert_eq!(page.page_token.as_deref(), Some("t"));
    for (page_size, page_bytes) in [(-1, -1), (1_001, 3 * 1024 * 1024 + 1), (i32::MIN, i32::MAX)] {
        let broken = proto::ScanRequest {
            namespace: String::new(),
            prefix: "p".repeat(1_025),
            page_token: "t".repeat(5_000),
            page_size,
            page_bytes,
            ..most.clone()
        };
        let named = ["namespace", "prefix", "page_size", "page_bytes", "page_token"];
        assert_eq!(fields(&scan(broken).expect_err("broken")), named);
    }
}

#[test]
fn each_item_is_judged_by_itself() {
    let item = |operation| proto::WriteItem { operation };
    let put = |key: &str| {
        let key = key.into();
        item(Some(proto::write_item::Operation::Put(proto::PutRequest {
            key,
            ..put_request()
        })))
    };
    let request = proto::BatchWriteRequest {
        items: vec![put("a"), put(""), item(None)],
    };
    let items = batch_write(request, 10).expect("a batch");
    assert!(items[0].is_ok());
    assert_eq!(fields(items[1].as_ref().expect_err("no key")), ["key"]);
    assert_eq!(fields(items[2].as_ref().expect_err("nothing")), [""]);
    for count in [0, 1_001] {
        let request = proto::BatchWriteRequest {
            items: vec![put("a"); count],
        };
        assert_eq!(fields(&batch_write(request, 10).expect_err("broken")), ["items"]);
    }
}

#[test]
fn a_write_s_result_is_what_a_call_would_say() {
    use proto::write_result::Outcome;

    let version = Version::new(7).expect("positive");
    let written = Written {
        version,
        durability: Durability::Journal,
        deduplicated: true,
    };
    let Some(Outcome::Written(answer)) = write_result(Ok(written)).outcome else {
        panic!("it was written");
    };
    assert_eq!((answer.version, answer.deduplicated), (7, true));
    assert_eq!(answer.durability(), proto::Durability::Journal);
    let conflict = Error::new(ErrorKind::Conflict, "no").standing(Some(version));
    let Some(Outcome::Failure(failure)) = write_result(Err(conflict)).outcome else {
        panic!("it was not");
    };
    assert_eq!((failure.reason.as_str(), failure.standing_version), ("CONFLICT", 7));
}
