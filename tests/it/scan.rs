//! Proves that a scan lists what a reader of its gateway would find, in order, page by page, wherever the pages are asked for.

use std::time::Duration;

use tidegate::rpc::proto::{ReadConsistency, ScanRecord, ScanRequest};
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::{
    Client, Mode, SOON,
    calls::{assert_invalid, delete_item, put_item, written},
    client::assert_come_back,
    eventually, expect,
    stage::{Stage, on_every_stage},
};

/// Writes wait longer than any test for others to join them.
const LONG_DELAYS: &str = "[namespace_defaults]\nwrite_delay = \"1h\"";

on_every_stage! {
    a_scan_lists_what_begins_with_its_prefix_in_order
    a_scan_can_leave_values_out
    pages_are_bounded_by_records
    pages_are_bounded_by_bytes
    a_scan_sees_what_is_pending
    what_drains_meanwhile_is_not_missed
    a_scan_goes_on_after_a_crash
    a_scan_goes_on_at_another_gateway
    a_token_is_good_for_its_own_scan
}

fn keys(records: &[ScanRecord]) -> Vec<&str> {
    records.iter().map(|record| record.key.as_str()).collect()
}

/// All that a scan lists.
async fn scanned(client: &Client, request: ScanRequest) -> Vec<ScanRecord> {
    client.scan_pages(request).await.concat()
}

/// Puts records, each with its key as its value.
async fn put_all(client: &Client, keys: &[String]) {
    for keys in keys.chunks(500) {
        let items = keys
            .iter()
            .map(|key| put_item(client.put_request(key, key.as_bytes(), Mode::Through)));
        for result in client.batch_write(items.collect()).await {
            written(&result);
        }
    }
}

/// Leaves behind what no scan of the namespace lists.
async fn put_hidden(client: &Client) {
    client
        .namespace("other")
        .put("a/other", b"value", Mode::Through)
        .await
        .unwrap();
    client.put("a/deleted", b"value", Mode::Through).await.unwrap();
    client.delete("a/deleted", Mode::Through).await.unwrap();
    let brief = Duration::from_millis(50);
    client
        .put_for("a/expired", b"value", Mode::Through, brief)
        .await
        .unwrap();
    eventually("it expires", SOON, async || {
        let read = client.read("a/expired").await.entry;
        expect(read.is_none(), read)
    })
    .await;
}

async fn a_scan_lists_what_begins_with_its_prefix_in_order(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let long = "x".repeat(1_024);
    let mut all: Vec<String> = [
        "a",
        "a/",
        "a/1",
        "a/10",
        "a/2",
        "a/é",
        "a/\u{7f}",
        "a/🔑",
        "a/%",
        "a/_",
        "a/\\",
        "a0",
        "A/1",
        "b",
        "é",
        "\u{10ffff}",
        "a/\u{10ffff}",
        " ",
        &long,
    ]
    .map(str::to_owned)
    .into();
    put_all(client, &all).await;
    put_hidden(client).await;
    // By their bytes, as Rust orders texts.
    all.sort_unstable();
    for prefix in [
        "",
        "a",
        "a/",
        "a/1",
        "a/%",
        "a/_",
        "a/\\",
        "\u{10ffff}",
        "é",
        "xx",
        "nothing",
    ] {
        for page_size in [0, 1, 3] {
            let request = ScanRequest {
                page_size,
                ..client.scan_request(prefix)
            };
            let records = scanned(client, request).await;
            let expected: Vec<&String> = all.iter().filter(|key| key.starts_with(prefix)).collect();
            assert_eq!(keys(&records), expected, "{prefix:?} by {page_size}");
            for record in &records {
                let read = client.get(&record.key, ReadConsistency::Store).await.unwrap();
                assert_eq!(record.entry, read.entry, "{:?}", record.key);
            }
        }
    }
}

async fn a_scan_can_leave_values_out(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    put_all(client, &["a", "b", "c"].map(str::to_owned)).await;
    client
        .put_for("d", b"some day", Mode::Through, SOON * 100)
        .await
        .unwrap();
    client.put("b", b"pending", Mode::Behind).await.unwrap();
    let request = ScanRequest {
        keys_only: true,
        ..client.scan_request("")
    };
    let records = scanned(client, request).await;
    assert_eq!(keys(&records), ["a", "b", "c", "d"]);
    for record in &records {
        let read = client.get(&record.key, ReadConsistency::Store).await.unwrap();
        let (bare, entry) = (record.entry.as_ref().unwrap(), read.entry.unwrap());
        assert_eq!(bare.value.len(), 0);
        assert_eq!((bare.version, bare.expire_time), (entry.version, entry.expire_time));
    }
}

async fn pages_are_bounded_by_records(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let all: Vec<String> = (0..250).map(|index| format!("key{index:03}")).collect();
    put_all(client, &all).await;
    for (page_size, most) in [(0, 100), (7, 7), (100, 100), (1_000, 1_000)] {
        let request = ScanRequest {
            page_size,
            ..client.scan_request("key")
        };
        let pages = client.scan_pages(request).await;
        assert!(pages.iter().all(|page| page.len() <= most), "{page_size}");
        assert_eq!(keys(&pages.concat()), all, "{page_size}");
    }
    for page_size in [-1, 1_001] {
        let request = ScanRequest {
            page_size,
            ..client.scan_request("key")
        };
        let refused = client.scan(request).await.expect_err("it is no size");
        assert_invalid(&refused, "page_size");
    }
}

async fn pages_are_bounded_by_bytes(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let value = vec![b'x'; 100 << 10];
    for index in 0..12 {
        client
            .put(&format!("key{index:02}"), &value, Mode::Through)
            .await
            .unwrap();
    }
    client.put("key05", &vec![b'x'; 1 << 20], Mode::Through).await.unwrap();
    let bytes = |page: &[ScanRecord]| {
        let sizes = page
            .iter()
            .map(|record| record.key.len() + record.entry.as_ref().unwrap().value.len());
        sizes.sum::<usize>()
    };
    for (page_bytes, most) in [(350 << 10, 350 << 10), (1, 1), (0, 1 << 20), (3 << 20, 3 << 20)] {
        let request = ScanRequest {
            page_bytes,
            ..client.scan_request("key")
        };
        let pages = client.scan_pages(request).await;
        for page in &pages {
            assert!(
                page.len() == 1 || bytes(page) <= most,
                "{} records of {}",
                page.len(),
                bytes(page)
            );
        }
        assert_eq!(keys(&pages.concat()).len(), 12, "{page_bytes}");
    }
    for page_bytes in [-1, (3 << 20) + 1] {
        let request = ScanRequest {
            page_bytes,
            ..client.scan_request("key")
        };
        let refused = client.scan(request).await.expect_err("it is no size");
        assert_invalid(&refused, "page_bytes");
    }
}

async fn a_scan_sees_what_is_pending(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateways = stage.start_all().await;
    let client = &gateways[0].client;
    let all: Vec<String> = (0..40).map(|index| format!("key{index:02}")).collect();
    put_all(client, &all).await;
    let mut expected: Vec<(String, String)> = all.iter().map(|key| (key.clone(), key.clone())).collect();
    for index in (0..40).step_by(4) {
        client.delete(&all[index], Mode::Behind).await.unwrap();
        client.put(&all[index + 1], b"pending", Mode::Behind).await.unwrap();
        expected[index + 1].1 = "pending".to_owned();
        let new = format!("{} new", all[index + 2]);
        client.put(&new, b"new", Mode::Behind).await.unwrap();
        expected.push((new, "new".to_owned()));
    }
    expected.retain(|(key, _)| {
        all.iter()
            .position(|known| known == key)
            .is_none_or(|index| index % 4 != 0)
    });
    expected.sort_unstable();
    let listed = async |client: &Client, page_size| {
        let request = ScanRequest {
            page_size,
            ..client.scan_request("key")
        };
        let records = scanned(client, request).await;
        let pairs = records.into_iter().map(|record| {
            let value = record.entry.unwrap().value;
            (record.key, String::from_utf8(value.to_vec()).unwrap())
        });
        pairs.collect::<Vec<_>>()
    };
    for page_size in [1, 3, 0] {
        assert_eq!(listed(client, page_size).await, expected, "by {page_size}");
    }
    if let Some(other) = gateways.get(1) {
        let unchanged: Vec<_> = all.iter().map(|key| (key.clone(), key.clone())).collect();
        assert_eq!(
            listed(&other.client, 0).await,
            unchanged,
            "another's are not in the store yet"
        );
    }
    client.await_all_persisted().await.expect("the store takes it");
    for gateway in &gateways {
        assert_eq!(listed(&gateway.client, 7).await, expected);
    }
}

async fn what_drains_meanwhile_is_not_missed(stage: Stage) {
    const KEYS: usize = 60;
    let gateway = stage.start().await;
    let client = &gateway.client;
    let all: Vec<String> = (0..KEYS).map(|index| format!("key{index:02}")).collect();
    put_all(client, &all).await;
    // Written behind again and again, and drained at once; every second one is deleted and put again in one batch.
    let mut writers = JoinSet::new();
    for writer in 0..3 {
        let (client, all) = (client.clone(), all.clone());
        writers.spawn(async move {
            for round in 0..400 {
                let key = &all[(round * 7 + writer * 20) % KEYS];
                client.put(key, b"again", Mode::Behind).await.unwrap();
                let other = format!("other{writer} {round}");
                let items = vec![
                    put_item(client.put_request(&other, b"value", Mode::Behind)),
                    delete_item(client.delete_request("absent", Mode::Behind)),
                ];
                client.batch_write(items).await;
            }
        });
    }
    let mut scans = 0;
    while !writers.is_empty() || scans == 0 {
        while writers
            .try_join_next()
            .is_some_and(|writer| writer.map(|()| true).unwrap())
        {}
        let request = ScanRequest {
            page_size: 25,
            ..client.scan_request("key")
        };
        let records = scanned(client, request).await;
        assert_eq!(keys(&records), all, "scan {scans}");
        scans += 1;
    }
}

/// A scan's first page, and what asks for the next one.
async fn first_page(client: &Client) -> (Vec<ScanRecord>, ScanRequest) {
    let request = ScanRequest {
        page_size: 10,
        ..client.scan_request("key")
    };
    let page = client.scan(request.clone()).await.unwrap();
    assert!(!page.next_page_token.is_empty());
    let next = ScanRequest {
        page_token: page.next_page_token,
        ..request
    };
    (page.records, next)
}

async fn a_scan_goes_on_after_a_crash(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let mut gateway = stage.start().await;
    let mut all: Vec<String> = (0..30).map(|index| format!("key{index:02}")).collect();
    put_all(&gateway.client, &all).await;
    let (mut records, next) = first_page(&gateway.client).await;
    gateway.client.put("key99", b"pending", Mode::Behind).await.unwrap();
    all.push("key99".to_owned());
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    records.extend(scanned(&gateway.client, next).await);
    assert_eq!(keys(&records), all);
}

async fn a_scan_goes_on_at_another_gateway(stage: Stage) {
    let gateways = stage.start_all().await;
    let all: Vec<String> = (0..30).map(|index| format!("key{index:02}")).collect();
    put_all(&gateways[0].client, &all).await;
    let (mut records, next) = first_page(&gateways[0].client).await;
    records.extend(scanned(&gateways.last().unwrap().client, next).await);
    assert_eq!(keys(&records), all);
}

async fn a_token_is_good_for_its_own_scan(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let all: Vec<String> = (0..30).map(|index| format!("key{index:02}")).collect();
    put_all(client, &all).await;
    let (_, next) = first_page(client).await;
    let token = next.page_token.clone();
    assert!(!token.contains("key"), "it is opaque");
    let with = |token: &str| ScanRequest {
        page_token: token.to_owned(),
        ..next.clone()
    };
    let mut changed = token.clone().into_bytes();
    let middle = changed.len() / 2;
    changed[middle] = if changed[middle] == b'A' { b'B' } else { b'A' };
    let strange = [
        with("x"),
        with("key05"),
        with(&token[..token.len() - 1]),
        with(&token[..token.len() / 2]),
        with(&format!("{token}A")),
        with(std::str::from_utf8(&changed).unwrap()),
        with(&"A".repeat(100_000)),
        with("ключ"),
        ScanRequest {
            prefix: "ke".to_owned(),
            ..next.clone()
        },
        ScanRequest {
            prefix: String::new(),
            ..next.clone()
        },
        ScanRequest {
            namespace: "carts".to_owned(),
            ..next.clone()
        },
    ];
    for request in strange {
        let refused = client.scan(request).await.expect_err("it is none of this scan's");
        assert_invalid(&refused, "page_token");
    }
    // Sizes may change from page to page.
    let rest = ScanRequest {
        page_size: 3,
        keys_only: true,
        ..next
    };
    assert_eq!(keys(&scanned(client, rest).await), all[10..]);
}

#[tokio::test]
async fn without_its_store_there_is_no_scan() {
    let stage = Stage::postgres_and_redis().await;
    let (gateway, network) = stage.start_far().await;
    let client = &gateway.client;
    client.put("key", b"value", Mode::Through).await.unwrap();
    network.cut();
    let refused = client
        .scan(client.scan_request(""))
        .await
        .expect_err("there is no store");
    assert_come_back(&refused, Code::Unavailable);
    network.restore();
    eventually("the store is found again", SOON, async || {
        let page = client.scan(client.scan_request("")).await;
        let page = page.map_err(|status| format!("{status:?}"))?;
        expect(keys(&page.records) == ["key"], page)
    })
    .await;
}
