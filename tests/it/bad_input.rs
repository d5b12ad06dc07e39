//! Proves that a request which breaks the contract is refused with the fields at fault, changes nothing, and is never our fault.

use std::collections::BTreeSet;

use bytes::{Bytes, BytesMut};
use prost_types::Duration;
use tidegate::rpc::proto::{
    AwaitPersistedRequest, BatchGetRequest, BatchWriteRequest, Condition, DeleteRequest, GetRequest, IncrementRequest,
    PutRequest, ReadConsistency, ScanRequest, TouchRequest, WriteItem, write_item::Operation,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::harness::{
    Database, Gateway, Mode, Setup,
    client::{EVERY, assert_do_not_come_back, outcome},
    wire::{Answer, Wire, frame, message},
};

const GET: &str = "/tidegate.v1.Gateway/Get";
const PUT: &str = "/tidegate.v1.Gateway/Put";

/// Every method of the service.
const METHODS: [&str; 11] = [
    "Get",
    "Put",
    "Delete",
    "BatchGet",
    "BatchWrite",
    "WriteStream",
    "Scan",
    "Touch",
    "Increment",
    "AwaitPersisted",
    "Watch",
];

/// 36,525 days.
const TTL_SECONDS_MAX: i64 = 36_525 * 86_400;

const VALUE_BYTES_MAX: usize = 1024 * 1024;

fn put() -> PutRequest {
    PutRequest {
        namespace: "orders".into(),
        key: "key".into(),
        value: Bytes::from_static(b"value"),
        write_mode: Mode::Default.number(),
        ttl: None,
        tags: Vec::new(),
        ..PutRequest::default()
    }
}

fn ttl(seconds: i64, nanos: i32) -> PutRequest {
    PutRequest {
        ttl: Some(Duration { seconds, nanos }),
        ..put()
    }
}

fn get() -> GetRequest {
    GetRequest {
        namespace: "orders".into(),
        key: "key".into(),
        consistency: ReadConsistency::Unspecified as i32,
        ..GetRequest::default()
    }
}

fn delete() -> DeleteRequest {
    DeleteRequest {
        namespace: "orders".into(),
        key: "key".into(),
        write_mode: Mode::Default.number(),
        ..DeleteRequest::default()
    }
}

#[track_caller]
fn assert_blames(status: &Status, fields: &[&str]) {
    assert_do_not_come_back(status, Code::InvalidArgument, "INVALID");
    assert_eq!(outcome(status), "not_applied");
    let violations = status
        .get_details_bad_request()
        .unwrap_or_else(|| panic!("no BadRequest in {status:?}"))
        .field_violations;
    let named: BTreeSet<&str> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(named, fields.iter().copied().collect(), "{violations:?}");
    for violation in &violations {
        assert!(!violation.description.is_empty(), "{violations:?}");
        assert!(
            status.message().contains(&violation.field),
            "many clients show nothing but the message: {status:?}"
        );
    }
}

async fn gateway() -> (Gateway, Database) {
    let database = Database::sqlite();
    let gateway = Setup::new().store(database.url()).start().await;
    (gateway, database)
}

async fn assert_nothing_changed(gateway: &Gateway, database: &Database) {
    assert_eq!(gateway.metric("tidegate_queue_accepted_writes_total", &[]).await, 0.0);
    assert_eq!(database.entries().await, 0);
}

/// Keys that are none.
fn bad_keys() -> Vec<String> {
    vec![String::new(), "a\0b".into(), "k".repeat(1025), "é".repeat(513)]
}

/// Namespaces that are none.
fn bad_namespaces() -> Vec<String> {
    let mut bad: Vec<String> = ["", "Orders", "1st", "a b", "é", "a\0", "-"].map(str::to_owned).into();
    bad.push("a".repeat(64));
    bad
}

/// Sends a bad Put in both modes, and expects these fields to be blamed and no others.
async fn assert_put_is_blamed_on(gateway: &Gateway, request: &PutRequest, fields: &[&str]) {
    for mode in [Mode::Through, Mode::Behind] {
        let mut request = request.clone();
        if !fields.contains(&"write_mode") {
            request.write_mode = mode.number();
        }
        let status = gateway
            .client
            .stub()
            .put(request)
            .await
            .expect_err("the request is bad");
        assert_blames(&status, fields);
    }
}

#[tokio::test]
async fn a_bad_key_or_namespace_is_named_by_every_method() {
    let (gateway, database) = gateway().await;
    let keys = bad_keys().into_iter().map(|key| ("orders".to_owned(), key, "key"));
    let namespaces = bad_namespaces()
        .into_iter()
        .map(|namespace| (namespace, "key".to_owned(), "namespace"));
    for (namespace, key, field) in keys.chain(namespaces) {
        let (get, delete, put) = (get(), delete(), put());
        let put = PutRequest {
            namespace: namespace.clone(),
            key: key.clone(),
            ..put
        };
        assert_put_is_blamed_on(&gateway, &put, &[field]).await;
        let get = GetRequest {
            namespace: namespace.clone(),
            key: key.clone(),
            ..get
        };
        assert_blames(&gateway.client.stub().get(get).await.expect_err("bad"), &[field]);
        let delete = DeleteRequest {
            namespace,
            key,
            ..delete
        };
        assert_blames(&gateway.client.stub().delete(delete).await.expect_err("bad"), &[field]);
    }
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn a_bad_ttl_is_named() {
    let (gateway, database) = gateway().await;
    let zero_or_negative = [(0, 0), (-1, 0), (0, -1)];
    let ill_formed = [(1, -1), (-1, 1), (1, 1_000_000_000), (i64::MAX, i32::MAX)];
    let absurd = [
        (TTL_SECONDS_MAX, 1),
        (TTL_SECONDS_MAX + 1, 0),
        (i64::MAX, 999_999_999),
        (i64::MIN, -999_999_999),
    ];
    for (seconds, nanos) in zero_or_negative.into_iter().chain(ill_formed).chain(absurd) {
        assert_put_is_blamed_on(&gateway, &ttl(seconds, nanos), &["ttl"]).await;
    }
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn bad_options_of_a_read_are_named() {
    let (gateway, _database) = gateway().await;
    let bad = [
        (0, 0),
        (-1, 0),
        (1, -1),
        (0, 1_000_000_000),
        (TTL_SECONDS_MAX, 1),
        (i64::MAX, 0),
    ];
    for (seconds, nanos) in bad {
        for consistency in EVERY {
            let request = GetRequest {
                consistency: consistency as i32,
                max_staleness: Some(Duration { seconds, nanos }),
                ..get()
            };
            let status = gateway.client.stub().get(request).await.expect_err("bad");
            assert_blames(&status, &["max_staleness"]);
        }
    }
    for min_version in [-1, i64::MIN] {
        let request = GetRequest { min_version, ..get() };
        let status = gateway.client.stub().get(request).await.expect_err("bad");
        assert_blames(&status, &["min_version"]);
    }
    // The least and the most are taken.
    for (seconds, nanos) in [(0, 1), (TTL_SECONDS_MAX, 0)] {
        let request = GetRequest {
            max_staleness: Some(Duration { seconds, nanos }),
            ..get()
        };
        gateway.client.stub().get(request).await.expect("the request is good");
    }
}

#[tokio::test]
async fn bad_tags_are_named_each() {
    let (gateway, database) = gateway().await;
    let tagged = |tags: &[&str]| PutRequest {
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        ..put()
    };
    assert_put_is_blamed_on(&gateway, &tagged(&["fine", ""]), &["tags[1]"]).await;
    assert_put_is_blamed_on(&gateway, &tagged(&[&"t".repeat(129)]), &["tags[0]"]).await;
    assert_put_is_blamed_on(&gateway, &tagged(&["same"; 17]), &["tags"]).await;
    assert_put_is_blamed_on(&gateway, &tagged(&["", "fine", "a\0b"]), &["tags[0]", "tags[2]"]).await;
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn unknown_numbers_of_enums_are_named() {
    let (gateway, database) = gateway().await;
    for number in [-1, 3, 99, i32::MIN, i32::MAX] {
        let put = PutRequest {
            write_mode: number,
            ..put()
        };
        assert_put_is_blamed_on(&gateway, &put, &["write_mode"]).await;
        let delete = DeleteRequest {
            write_mode: number,
            ..delete()
        };
        assert_blames(
            &gateway.client.stub().delete(delete).await.expect_err("bad"),
            &["write_mode"],
        );
    }
    for number in [-7, 4, i32::MAX] {
        let get = GetRequest {
            consistency: number,
            ..get()
        };
        assert_blames(
            &gateway.client.stub().get(get).await.expect_err("bad"),
            &["consistency"],
        );
    }
    assert_nothing_changed(&gateway, &database).await;
}

/// Conditions that are none, and the field at fault.
fn bad_conditions() -> [(Condition, &'static str); 7] {
    let condition = |existence, version| Condition { existence, version };
    [
        (condition(0, 0), "condition"),
        (condition(1, 1), "condition"),
        (condition(2, i64::MAX), "condition"),
        (condition(0, -1), "condition.version"),
        (condition(0, i64::MIN), "condition.version"),
        (condition(3, 0), "condition.existence"),
        (condition(-1, 7), "condition.existence"),
    ]
}

#[tokio::test]
async fn a_bad_condition_is_named() {
    let (gateway, database) = gateway().await;
    for (condition, field) in bad_conditions() {
        let put = PutRequest {
            condition: Some(condition),
            write_mode: Mode::Through.number(),
            ..put()
        };
        assert_blames(&gateway.client.stub().put(put).await.expect_err("bad"), &[field]);
        let delete = DeleteRequest {
            condition: Some(condition),
            ..delete()
        };
        assert_blames(&gateway.client.stub().delete(delete).await.expect_err("bad"), &[field]);
    }
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn a_condition_is_not_written_behind() {
    let (gateway, database) = gateway().await;
    let conditions = [(1, 0), (2, 0), (0, 7)];
    for (existence, version) in conditions {
        let condition = Some(Condition { existence, version });
        let put = PutRequest {
            condition,
            write_mode: Mode::Behind.number(),
            ..put()
        };
        assert_blames(&gateway.client.stub().put(put).await.expect_err("bad"), &["write_mode"]);
        let delete = DeleteRequest {
            condition,
            write_mode: Mode::Behind.number(),
            ..delete()
        };
        assert_blames(
            &gateway.client.stub().delete(delete).await.expect_err("bad"),
            &["write_mode"],
        );
    }
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn a_bad_request_id_is_named_by_every_method() {
    let (gateway, database) = gateway().await;
    for request_id in ["a\0b".to_owned(), "x".repeat(65), "é".repeat(33)] {
        let put = PutRequest {
            request_id: request_id.clone(),
            ..put()
        };
        assert_put_is_blamed_on(&gateway, &put, &["request_id"]).await;
        let mut stub = gateway.client.stub();
        let delete = DeleteRequest {
            request_id: request_id.clone(),
            ..delete()
        };
        assert_blames(&stub.delete(delete).await.expect_err("bad"), &["request_id"]);
        let touch = TouchRequest {
            request_id: request_id.clone(),
            ..touch()
        };
        assert_blames(&stub.touch(touch).await.expect_err("bad"), &["request_id"]);
        let increment = IncrementRequest {
            request_id,
            ..increment()
        };
        assert_blames(&stub.increment(increment).await.expect_err("bad"), &["request_id"]);
    }
    assert_nothing_changed(&gateway, &database).await;
}

fn touch() -> TouchRequest {
    TouchRequest {
        namespace: "orders".into(),
        key: "key".into(),
        ..TouchRequest::default()
    }
}

fn increment() -> IncrementRequest {
    IncrementRequest {
        namespace: "orders".into(),
        key: "key".into(),
        ..IncrementRequest::default()
    }
}

#[tokio::test]
async fn a_bad_touch_or_increment_is_named() {
    let (gateway, database) = gateway().await;
    let mut stub = gateway.client.stub();
    for (seconds, nanos) in [(0, 0), (-1, 0), (1, -1), (TTL_SECONDS_MAX, 1), (i64::MAX, 0)] {
        let ttl = Some(Duration { seconds, nanos });
        let request = TouchRequest { ttl, ..touch() };
        assert_blames(&stub.touch(request).await.expect_err("bad"), &["ttl"]);
        let request = IncrementRequest { ttl, ..increment() };
        assert_blames(&stub.increment(request).await.expect_err("bad"), &["ttl"]);
    }
    let request = IncrementRequest {
        delta: Some(0),
        ..increment()
    };
    assert_blames(&stub.increment(request).await.expect_err("bad"), &["delta"]);
    let request = IncrementRequest {
        delta: Some(0),
        ..IncrementRequest::default()
    };
    let named = ["namespace", "key", "delta"];
    assert_blames(&stub.increment(request).await.expect_err("bad"), &named);
    let nothing = TouchRequest::default();
    assert_blames(&stub.touch(nothing).await.expect_err("bad"), &["namespace", "key"]);
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn a_wait_for_half_a_write_is_refused() {
    let (gateway, _database) = gateway().await;
    for (namespace, key, version, fields) in [
        ("orders", "", 0, &["key", "version"][..]),
        ("orders", "key", 0, &["version"]),
        ("orders", "key", -1, &["version"]),
        ("", "key", 7, &["namespace"]),
        ("", "", 7, &["namespace", "key"]),
        ("Orders", "a\0b", i64::MIN, &["namespace", "key", "version"]),
    ] {
        let request = AwaitPersistedRequest {
            namespace: namespace.into(),
            key: key.into(),
            version,
        };
        let status = gateway.client.stub().await_persisted(request).await.expect_err("bad");
        assert_blames(&status, fields);
    }
}

#[tokio::test]
async fn bad_keys_of_a_batch_are_named_by_their_places() {
    let (gateway, _database) = gateway().await;
    let request = |keys: Vec<String>| BatchGetRequest {
        namespace: "orders".into(),
        keys,
        ..BatchGetRequest::default()
    };
    let mut stub = gateway.client.stub();
    for count in [0, 1_001] {
        let keys = vec!["key".to_owned(); count];
        assert_blames(&stub.batch_get(request(keys)).await.expect_err("bad"), &["keys"]);
    }
    let mut keys = vec!["key".to_owned(); 20];
    let bad = bad_keys();
    for (index, key) in bad.iter().enumerate() {
        keys[index * 5 + 2].clone_from(key);
    }
    let named = ["keys[2]", "keys[7]", "keys[12]", "keys[17]"];
    assert_blames(&stub.batch_get(request(keys)).await.expect_err("bad"), &named);
    // The status of a thousand mistakes is still one that a client can read.
    let status = stub
        .batch_get(request(vec![String::new(); 1_000]))
        .await
        .expect_err("bad");
    let first: Vec<String> = (0..10).map(|index| format!("keys[{index}]")).collect();
    assert_blames(&status, &first.iter().map(String::as_str).collect::<Vec<_>>());
    let everything = BatchGetRequest {
        namespace: "?".into(),
        keys: vec![String::new()],
        consistency: 9,
        max_staleness: Some(Duration::default()),
    };
    let named = ["namespace", "keys[0]", "consistency", "max_staleness"];
    assert_blames(&stub.batch_get(everything).await.expect_err("bad"), &named);
}

#[tokio::test]
async fn a_bad_page_is_refused() {
    let (gateway, _database) = gateway().await;
    let scan = || ScanRequest {
        namespace: "orders".into(),
        ..ScanRequest::default()
    };
    let mut stub = gateway.client.stub();
    for namespace in bad_namespaces() {
        let request = ScanRequest { namespace, ..scan() };
        assert_blames(&stub.scan(request).await.expect_err("bad"), &["namespace"]);
    }
    for prefix in ["a\0b".to_owned(), "k".repeat(1_025)] {
        let request = ScanRequest { prefix, ..scan() };
        assert_blames(&stub.scan(request).await.expect_err("bad"), &["prefix"]);
    }
    for page_size in [-1, 1_001, i32::MIN, i32::MAX] {
        let request = ScanRequest { page_size, ..scan() };
        assert_blames(&stub.scan(request).await.expect_err("bad"), &["page_size"]);
    }
    for page_bytes in [-1, 3 * 1024 * 1024 + 1, i32::MIN, i32::MAX] {
        let request = ScanRequest { page_bytes, ..scan() };
        assert_blames(&stub.scan(request).await.expect_err("bad"), &["page_bytes"]);
    }
    let request = ScanRequest {
        page_token: "t".repeat(10_000),
        ..scan()
    };
    assert_blames(&stub.scan(request).await.expect_err("bad"), &["page_token"]);
}

#[tokio::test]
async fn all_bad_fields_are_named_at_once() {
    let (gateway, database) = gateway().await;
    assert_put_is_blamed_on(&gateway, &PutRequest::default(), &["namespace", "key"]).await;
    let large = PutRequest {
        value: vec![0; VALUE_BYTES_MAX + 1].into(),
        ..put()
    };
    assert_put_is_blamed_on(&gateway, &large, &["value"]).await;
    let everything = PutRequest {
        namespace: "?".into(),
        key: String::new(),
        write_mode: 99,
        ..large
    };
    let everything = PutRequest {
        ttl: ttl(-5, 5).ttl,
        ..everything
    };
    assert_put_is_blamed_on(
        &gateway,
        &everything,
        &["namespace", "key", "value", "write_mode", "ttl"],
    )
    .await;
    let get = GetRequest {
        consistency: 9,
        max_staleness: ttl(0, 0).ttl,
        min_version: -1,
        ..GetRequest::default()
    };
    let status = gateway.client.stub().get(get).await.expect_err("bad");
    let named = ["namespace", "key", "consistency", "max_staleness", "min_version"];
    assert_blames(&status, &named);
    let delete = DeleteRequest {
        write_mode: 9,
        ..DeleteRequest::default()
    };
    let status = gateway.client.stub().delete(delete).await.expect_err("bad");
    assert_blames(&status, &["namespace", "key", "write_mode"]);
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn what_is_just_within_the_limits_is_taken() {
    let (gateway, database) = gateway().await;
    let requests = [
        PutRequest {
            key: "k".repeat(1024),
            ..put()
        },
        PutRequest {
            namespace: "a".repeat(63),
            ..put()
        },
        PutRequest {
            namespace: "a_.-9".into(),
            ..put()
        },
        PutRequest {
            value: vec![0; VALUE_BYTES_MAX].into(),
            ..put()
        },
        PutRequest {
            value: Bytes::new(),
            ..put()
        },
        PutRequest {
            key: "forever".into(),
            ..ttl(TTL_SECONDS_MAX, 0)
        },
    ];
    for request in requests {
        gateway.client.stub().put(request).await.expect("the request is good");
    }
    // Less than a millisecond is rounded up to one, not down to none.
    let brief = gateway
        .client
        .stub()
        .put(PutRequest {
            key: "brief".into(),
            ..ttl(0, 1)
        })
        .await;
    assert!(brief.is_ok(), "{brief:?}");
    assert_eq!(database.entries().await, 6, "two of the seven write one key");
}

#[tokio::test]
async fn a_limit_of_ones_own_holds() {
    let gateway = Setup::new().config("[rpc]\nvalue_bytes_max = 10").start().await;
    gateway
        .client
        .put("key", b"0123456789", Mode::Through)
        .await
        .expect("ten bytes are taken");
    let status = gateway
        .client
        .put("key", b"0123456789a", Mode::Through)
        .await
        .expect_err("eleven are not");
    assert_blames(&status, &["value"]);
}

/// Whoever sent the bytes is to blame, and is told what to do: anything but "report it", and nothing that means something else.
#[track_caller]
fn assert_sensible(what: &str, answer: &Answer, wanted: &[Code]) {
    let code = answer
        .code()
        .unwrap_or_else(|| panic!("{what}: no status in {answer:?}"));
    assert!(wanted.contains(&code), "{what}: {answer:?}");
    assert!(answer.body.is_empty(), "{what}: {answer:?}");
}

#[tokio::test]
async fn bytes_that_are_no_message_are_invalid() {
    let (gateway, database) = gateway().await;
    let wire = Wire::connect(gateway.address).await;
    // Field 1 with a length beyond the end; field numbers and wire types that do not exist; text that ends amid a varint.
    for bytes in [
        &[0x0a, 0xff][..],
        &[0x00],
        &[0x07],
        &[0xff; 11],
        &[0x0a, 0x03, b'a'],
        &[0x80],
    ] {
        for method in METHODS {
            let path = format!("/tidegate.v1.Gateway/{method}");
            let answer = wire.call(&path, &[], frame(0, bytes.len(), bytes)).await;
            assert_sensible(&format!("{bytes:?} to {path}"), &answer, &[Code::InvalidArgument]);
        }
    }
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn text_that_is_not_utf8_is_blamed_on_its_field() {
    let (gateway, database) = gateway().await;
    let wire = Wire::connect(gateway.address).await;
    let (good, bad) = (b"\x0a\x06orders".as_slice(), b"\x12\x02\xc3\x28".as_slice());
    let answer = wire.call(PUT, &[], frame(0, 12, &[good, bad].concat())).await;
    assert_blames(answer.status.as_ref().expect("a status"), &["key"]);
    let answer = wire.call(GET, &[], frame(0, 5, b"\x0a\x03\xed\xa0\x80")).await;
    assert_blames(answer.status.as_ref().expect("a status"), &["namespace"]);
    // A text of one byte that is none, in other fields of other messages; the last is the key of an item.
    for (method, number, field) in [
        ("Put", 6, "tags"),
        ("Put", 8, "request_id"),
        ("Delete", 5, "request_id"),
        ("Touch", 4, "request_id"),
        ("Increment", 5, "request_id"),
        ("BatchGet", 2, "keys"),
        ("Scan", 2, "prefix"),
        ("Scan", 5, "page_token"),
        ("AwaitPersisted", 2, "key"),
    ] {
        let path = format!("/tidegate.v1.Gateway/{method}");
        let answer = wire.call(&path, &[], frame(0, 3, &[number << 3 | 2, 1, 0xff])).await;
        let status = answer.status.expect("a status");
        assert_blames(&status, &[field]);
        let said = format!("{field} cannot be read: ");
        assert!(status.message().contains(&said), "{status:?}");
    }
    let item = frame(0, 7, b"\x0a\x05\x0a\x03\x12\x01\xff");
    let answer = wire.call("/tidegate.v1.Gateway/BatchWrite", &[], item).await;
    assert_blames(answer.status.as_ref().expect("a status"), &["key"]);
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn a_message_over_the_transport_limit_is_refused_unread() {
    let (gateway, database) = gateway().await;
    let wire = Wire::connect(gateway.address).await;
    let large = PutRequest {
        value: vec![0; 16 * VALUE_BYTES_MAX].into(),
        ..put()
    };
    let answer = wire.call(PUT, &[], message(&large)).await;
    assert_sensible("16 MiB", &answer, &[Code::ResourceExhausted]);
    let batch = BatchWriteRequest {
        items: vec![WriteItem {
            operation: Some(Operation::Put(large)),
        }],
    };
    let of_many = wire.call("/tidegate.v1.Gateway/BatchWrite", &[], message(&batch)).await;
    assert_do_not_come_back(&of_many.status.expect("a status"), Code::ResourceExhausted, "TOO_LARGE");
    assert_do_not_come_back(&answer.status.expect("a status"), Code::ResourceExhausted, "TOO_LARGE");
    // The length alone is enough: nobody waits for 4 GiB, or makes room for them.
    let answer = wire.call(PUT, &[], frame(0, u32::MAX as usize, b"")).await;
    assert_sensible("4 GiB announced", &answer, &[Code::ResourceExhausted]);
    // The code alone would say "come back later".
    let status = answer.status.expect("a status");
    assert_do_not_come_back(&status, Code::ResourceExhausted, "TOO_LARGE");
    assert_eq!(outcome(&status), "not_applied");
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn broken_frames_are_the_callers_fault() {
    let (gateway, database) = gateway().await;
    let wire = Wire::connect(gateway.address).await;
    let whole = message(&get());
    let mut compressed = BytesMut::from(whole.as_ref());
    compressed[0] = 1;
    let mut flag = BytesMut::from(whole.as_ref());
    flag[0] = 0xff;
    let cases = [
        ("no message at all", Bytes::new()),
        ("half a prefix", whole.slice(..3)),
        ("a prefix alone", whole.slice(..5)),
        ("half a message", whole.slice(..whole.len() - 2)),
        ("a message that claims to be compressed", compressed.freeze()),
        ("a flag that does not exist", flag.freeze()),
    ];
    for (what, body) in cases {
        let answer = wire.call(GET, &[], body).await;
        assert_sensible(what, &answer, &[Code::InvalidArgument, Code::Unimplemented]);
    }
    let answer = wire.call(GET, &[("grpc-encoding", "snappy")], whole.clone()).await;
    assert_sensible("an encoding that nobody offered", &answer, &[Code::Unimplemented]);
    assert_nothing_changed(&gateway, &database).await;
}

#[tokio::test]
async fn what_is_not_offered_is_unimplemented() {
    let (gateway, _database) = gateway().await;
    let wire = Wire::connect(gateway.address).await;
    for path in [
        "/tidegate.v1.Gateway/Steal",
        "/tidegate.v9.Gateway/Get",
        "/tidegate.v1.Gateway/",
        "/",
        "/metrics",
    ] {
        let answer = wire.call(path, &[], message(&get())).await;
        assert_sensible(path, &answer, &[Code::Unimplemented]);
    }
}

#[tokio::test]
async fn what_is_no_grpc_is_told_so() {
    let (gateway, _database) = gateway().await;
    let wire = Wire::connect(gateway.address).await;
    for content_type in ["text/html", "application/json", ""] {
        let answer = wire.call(GET, &[("content-type", content_type)], message(&get())).await;
        assert_eq!(answer.http_status, 415, "{content_type:?}: {answer:?}");
    }
    // A timeout that is none is ignored or refused; it is no fault of the gateway.
    for timeout in ["soon", "-1S", "99999999999H", "1"] {
        let answer = wire.call(GET, &[("grpc-timeout", timeout)], message(&get())).await;
        assert!(
            matches!(answer.code(), Some(Code::Ok | Code::InvalidArgument)),
            "{timeout:?}: {answer:?}"
        );
    }
}

#[tokio::test]
async fn a_connection_survives_bad_calls() {
    let (gateway, _database) = gateway().await;
    let wire = Wire::connect(gateway.address).await;
    for body in [
        frame(0, 1, &[0x07]),
        frame(1, 1, &[0x07]),
        frame(0, 99, b""),
        Bytes::new(),
    ] {
        wire.call(GET, &[], body).await;
    }
    let answer = wire.call(GET, &[], message(&get())).await;
    assert_eq!(answer.code(), Some(Code::Ok), "{answer:?}");
}

#[tokio::test]
async fn bytes_that_are_no_http2_do_no_harm() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let (gateway, _database) = gateway().await;
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        &[0; 64],
        &[0xff; 4096],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense",
    ] {
        let mut stream = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // It may be closed in order or cut off; it must be ended.
        let end = tokio::time::timeout(crate::harness::SOON, stream.read_to_end(&mut answer)).await;
        assert!(end.is_ok(), "the connection is held open");
    }
    gateway
        .client
        .put("key", b"value", Mode::Through)
        .await
        .expect("the others are served");
}
