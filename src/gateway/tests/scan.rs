//! Scans over the store in memory, in paused time: what is pending over what is stored, bounds, and page tokens.

use super::*;
use crate::gateway::scan::{Page, ScanRequest};

const SECOND: Duration = Duration::from_secs(1);

fn scan(prefix: &str, records_max: usize) -> ScanRequest {
    ScanRequest {
        namespace: "test".to_owned(),
        prefix: prefix.to_owned(),
        records_max,
        bytes_max: 3 << 20,
        page_token: None,
        keys_only: false,
        with_tags: false,
    }
}

impl Rig {
    async fn page(&self, request: ScanRequest) -> Page {
        let page = self.gateway.scan(request, Instant::now() + PATIENCE).await;
        page.expect("a page")
    }

    /// All pages of a scan: each record as its key and value, and how many records each page had.
    async fn scanned(&self, request: impl Fn() -> ScanRequest) -> (Vec<(String, String)>, Vec<usize>) {
        let (mut records, mut sizes, mut page_token) = (Vec::new(), Vec::new(), None);
        loop {
            let page = self
                .page(ScanRequest {
                    page_token,
                    ..request()
                })
                .await;
            sizes.push(page.records.len());
            records.extend(page.records.into_iter().map(|(key, entry)| {
                let value = entry.value.expect("a live record");
                (key.key().to_owned(), text(&value))
            }));
            page_token = page.next_page_token;
            if page_token.is_none() {
                return (records, sizes);
            }
        }
    }

    /// Has no commit succeed, so that what is accepted stays pending.
    fn hold_commits(&self) {
        let fault = |call| (call == Call::Commit).then(|| Fault::fail(store::StoreErrorKind::Transient));
        self.fake.script(fault);
    }

    async fn delete(&self, name: &str, mode: WriteMode) {
        let delete = WriteRequest {
            value: None,
            ..put(name, "", mode)
        };
        let deleted = self.gateway.write(delete, Instant::now() + PATIENCE).await;
        deleted.expect("deleted");
    }
}

fn pairs(wanted: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    wanted.iter().map(owned).collect()
}

#[tokio::test(start_paused = true)]
async fn what_is_pending_covers_what_is_stored_and_what_is_dead_hides() {
    let rig = rig(|_| ());
    for name in ["a", "b", "c", "d"] {
        rig.put(name, "stored", Through).await;
    }
    rig.delete("d", Through).await;
    let request = WriteRequest {
        ttl: Some(SECOND),
        ..put("expired", "value", Through)
    };
    let written = rig.gateway.write(request, Instant::now() + PATIENCE).await;
    written.expect("written");
    tokio::time::advance(2 * SECOND).await;
    rig.hold_commits();
    rig.put("b", "pending", Behind).await;
    rig.put("bb", "pending", Behind).await;
    rig.delete("c", Behind).await;
    rig.put("d", "again", Behind).await;
    // Past this gateway, above what is pending here.
    rig.put_past("a", "past", rig.ahead(SECOND));
    rig.put_past("bb", "past", rig.ahead(SECOND));
    rig.evict("a");
    let wanted = pairs(&[("a", "past"), ("b", "pending"), ("bb", "past"), ("d", "again")]);
    for records_max in 1..6 {
        assert_eq!(rig.scanned(|| scan("", records_max)).await.0, wanted, "{records_max}");
    }
    assert_eq!(
        rig.scanned(|| scan("b", 10)).await,
        (pairs(&[("b", "pending"), ("bb", "past")]), vec![2])
    );
    let keys_only = || ScanRequest {
        keys_only: true,
        ..scan("", 3)
    };
    let (keys, sizes) = rig.scanned(keys_only).await;
    assert_eq!(sizes, [3, 1]);
    assert_eq!(keys, pairs(&[("a", ""), ("b", ""), ("bb", ""), ("d", "")]));
    assert_eq!(rig.parts().memory.version(&key("a")), None, "a scan fills no cache");
}

#[tokio::test(start_paused = true)]
async fn a_page_ends_at_either_bound_and_holds_one_record_at_least() {
    let rig = rig(|_| ());
    for (name, size) in [("a", 10), ("b", 100), ("c", 1_000), ("d", 10), ("e", 10), ("f", 10)] {
        rig.put(name, &"v".repeat(size), Through).await;
    }
    for (bytes_max, wanted) in [
        (1, vec![1; 6]),
        (112, vec![2, 1, 3]),
        (111, vec![1, 1, 1, 3]),
        (1 << 20, vec![6]),
    ] {
        let request = || ScanRequest {
            bytes_max,
            ..scan("", 100)
        };
        assert_eq!(rig.scanned(request).await.1, wanted, "{bytes_max}");
    }
    assert_eq!(rig.scanned(|| scan("", 3)).await.1, [3, 3], "no empty page at the end");
    let keys = || ScanRequest {
        bytes_max: 2,
        keys_only: true,
        ..scan("", 100)
    };
    assert_eq!(
        rig.scanned(keys).await.1,
        [2, 2, 2],
        "values that are left out weigh nothing"
    );
}

/// A value that has grown between the look at the rows and the load of the values does not burst the page.
#[tokio::test(start_paused = true)]
async fn values_that_grow_meanwhile_find_room_in_the_next_page() {
    let rig = rig(|_| ());
    for name in ["a", "b", "c"] {
        rig.put(name, "small", Through).await;
    }
    let release = rig.hang(Call::Load);
    let gateway = rig.gateway.clone();
    let scanning = tokio::spawn(async move {
        let request = ScanRequest {
            bytes_max: 1_000,
            ..scan("", 100)
        };
        gateway.scan(request, Instant::now() + PATIENCE).await
    });
    rig.called(Call::Load, 1).await;
    rig.put_past("b", &"v".repeat(1_000), rig.ahead(SECOND));
    release.notify_one();
    let page = scanning.await.expect("no panic").expect("a page");
    assert_eq!(page.records.len(), 1);
    let next = ScanRequest {
        page_token: page.next_page_token,
        ..scan("", 100)
    };
    let page = rig.page(next).await;
    assert_eq!(
        page.records.iter().map(|(key, _)| key.key()).collect::<Vec<_>>(),
        ["b", "c"]
    );
}

#[tokio::test(start_paused = true)]
async fn what_drains_between_the_two_looks_is_in_the_page() {
    let rig = rig(|_| ());
    rig.put("a", "old", Through).await;
    rig.hold_commits();
    rig.put("a", "new", Behind).await;
    rig.put("b", "new", Behind).await;
    let release = rig.hang(Call::RowsBelow);
    let gateway = rig.gateway.clone();
    let scanning = tokio::spawn(async move { gateway.scan(scan("", 100), Instant::now() + PATIENCE).await });
    rig.called(Call::RowsBelow, 1).await;
    rig.fake.script(|_| None);
    rig.drained().await;
    release.notify_one();
    let page = scanning.await.expect("no panic").expect("a page");
    let values = page
        .records
        .into_iter()
        .map(|(_, entry)| text(&entry.value.expect("live")));
    assert_eq!(values.collect::<Vec<_>>(), ["new", "new"]);
}

#[tokio::test(start_paused = true)]
async fn a_page_looks_at_only_so_many_keys_and_says_where_to_go_on() {
    let rig = rig(|_| ());
    let tombstone = |number: usize| Write {
        key: key(&format!("k{number:05}")),
        entry: Entry {
            version: rig.ahead(Duration::ZERO),
            value: None,
            expires_at: None,
        },
        tags: Tags::default(),
        requests: Vec::new(),
    };
    for number in 0..12_000 {
        rig.fake.put(tombstone(number));
    }
    rig.put("last", "value", Through).await;
    let (records, sizes) = rig.scanned(|| scan("", 100)).await;
    assert_eq!(records, pairs(&[("last", "value")]));
    assert_eq!(sizes, [0, 0, 1], "three pages of about 5,000 keys");
}

#[tokio::test(start_paused = true)]
async fn a_token_is_for_its_own_scan() {
    let rig = rig(|_| ());
    for name in ["a1", "a2", "b1"] {
        rig.put(name, "value", Through).await;
    }
    let token = rig.page(scan("a", 1)).await.next_page_token.expect("there is more");
    let of = |namespace: &str, prefix: &str, token: &str| ScanRequest {
        namespace: namespace.to_owned(),
        page_token: Some(token.to_owned()),
        ..scan(prefix, 1)
    };
    let page = rig.page(of("test", "a", &token)).await;
    assert_eq!(page.records[0].0, key("a2"));
    assert!(page.next_page_token.is_none());
    for request in [
        of("tests", "a", &token),
        of("test", "", &token),
        of("test", "a", &token[1..]),
        of("test", "a", ""),
    ] {
        let refused = rig.gateway.scan(request, Instant::now() + PATIENCE).await;
        assert_eq!(refused.expect_err("foreign").kind(), ErrorKind::Invalid);
    }
}

#[tokio::test(start_paused = true)]
async fn a_scan_is_told_at_once_that_the_store_is_down_and_waits_for_a_slow_one_until_its_deadline() {
    let rig = rig(|_| ());
    rig.put("k", "value", Through).await;
    rig.fake
        .inject(Call::RowsBelow, Fault::fail(store::StoreErrorKind::Transient));
    rig.fake.inject(Call::RowsBelow, Fault::lose_reply());
    assert_eq!(
        rig.page(scan("", 10)).await.records.len(),
        1,
        "a failure that passes is tried again"
    );

    rig.fake.inject(Call::RowsBelow, Fault::hang().0);
    let (begun, deadline) = (Instant::now(), Instant::now() + SECOND);
    let late = rig.gateway.scan(scan("", 10), deadline).await;
    assert_eq!(late.expect_err("late").kind(), ErrorKind::Timeout);
    assert_eq!(begun.elapsed(), SECOND);

    rig.fake.down(true);
    eventually(|| rig.store.breaker().is_open()).await;
    let begun = Instant::now();
    let down = rig.gateway.scan(scan("", 10), begun + PATIENCE).await;
    assert_eq!(down.expect_err("down").kind(), ErrorKind::Unavailable);
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn scans_that_wait_are_bounded() {
    let rig = rig(|_| ());
    rig.fake
        .script(|call| (call == Call::RowsBelow).then(|| Fault::hang().0));
    let mut scans = tokio::task::JoinSet::new();
    for _ in 0..300 {
        let gateway = rig.gateway.clone();
        scans.spawn(async move { gateway.scan(scan("", 10), Instant::now() + SECOND).await });
    }
    let (mut refused, mut late) = (0, 0);
    while let Some(ended) = scans.join_next().await {
        match ended.expect("no panic").expect_err("the store hangs").kind() {
            ErrorKind::Overloaded => refused += 1,
            ErrorKind::Timeout => late += 1,
            other => panic!("{other:?}"),
        }
    }
    // Four are under way, and 256 wait.
    assert!(refused >= 300 - 260 && late >= 256, "{refused} {late}");
}
