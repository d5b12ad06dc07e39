//! Proves what an operator sees of a journal at work: its metrics, and its size, which follows what is live in it and not what was written.

use crate::harness::{Database, Gateway, Mode, SOON, Setup, eventually, expect};

const SMALL: &str =
    "[rpc]\nvalue_bytes_max = 100000\n[journal]\nsegment_bytes = 1048576\nbytes_max = 16777216\nidle_sync = \"100ms\"";

async fn journal(gateway: &Gateway, metric: &str) -> f64 {
    gateway.metric(&format!("tidegate_journal_{metric}"), &[]).await
}

#[tokio::test]
async fn the_metrics_tell_what_the_journal_does() {
    const WRITES: usize = 30;
    let database = Database::postgres().await;
    let mut gateway = Setup::new().store(database.url()).config(SMALL).start().await;
    for (metric, expected) in [
        ("segments", 1.0),
        ("syncs_total", 0.0),
        ("sync_duration_seconds_count", 0.0),
        ("group_records_sum", 0.0),
        ("group_bytes_sum", 0.0),
        ("moved_records_total", 0.0),
        ("live_bytes", 0.0),
        ("stalled", 0.0),
        ("poisoned", 0.0),
    ] {
        assert_eq!(
            journal(&gateway, metric).await,
            expected,
            "{metric} of an empty journal"
        );
    }
    eventually("the next segment is ready", SOON, async || {
        let bytes = journal(&gateway, "files_bytes").await;
        expect(bytes == 2_097_152.0, bytes)
    })
    .await;
    gateway.client.put("through", b"value", Mode::Through).await.unwrap();
    assert_eq!(
        journal(&gateway, "group_records_sum").await,
        0.0,
        "what is written through needs no journal"
    );

    let hold = database.hold_writes().await;
    for index in 0..WRITES {
        gateway
            .client
            .put(&index.to_string(), &[b'x'; 1_000], Mode::Behind)
            .await
            .unwrap();
    }
    let syncs = journal(&gateway, "syncs_total").await;
    assert!((1.0..=WRITES as f64).contains(&syncs), "{syncs} syncs");
    assert!(journal(&gateway, "sync_duration_seconds_count").await >= syncs);
    assert!(journal(&gateway, "sync_duration_seconds_sum").await > 0.0);
    assert_eq!(journal(&gateway, "group_records_sum").await, WRITES as f64);
    assert!(journal(&gateway, "group_bytes_sum").await > 1_000.0 * WRITES as f64);
    eventually("what is live is told", SOON, async || {
        let live = journal(&gateway, "live_bytes").await;
        expect(live > 1_000.0 * WRITES as f64, live)
    })
    .await;

    gateway.kill().await;
    let gateway = gateway.start_again().await;
    assert!(journal(&gateway, "recovery_duration_seconds").await > 0.0);
    eventually("what was recovered is live", SOON, async || {
        let live = journal(&gateway, "live_bytes").await;
        expect(live > 1_000.0 * WRITES as f64, live)
    })
    .await;
    hold.release().await;
    gateway.drained().await;
    eventually("what is drained is not live", SOON, async || {
        let live = journal(&gateway, "live_bytes").await;
        expect(live == 0.0, live)
    })
    .await;
}

/// Much is written to one key while a write of another waits in the oldest segment.
#[tokio::test]
async fn the_journal_grows_with_what_is_live_and_not_with_what_is_written() {
    const WRITES: usize = 300;
    let gateway = Setup::new()
        .config(SMALL)
        .config("[namespaces.slow]\nwrite_delay = \"1h\"")
        .start()
        .await;
    let straggler = gateway.client.namespace("slow");
    straggler.put("straggler", b"value", Mode::Behind).await.unwrap();
    let mut largest = 0.0_f64;
    for round in 0..WRITES {
        let mut value = vec![b'x'; 80_000];
        value[..4].copy_from_slice(&(round as u32).to_be_bytes());
        gateway.client.put("hot", &value, Mode::Behind).await.unwrap();
        if round % 10 == 0 {
            largest = largest.max(journal(&gateway, "files_bytes").await);
        }
    }
    let written = journal(&gateway, "group_bytes_sum").await;
    assert!(written > 80_000.0 * WRITES as f64, "{written}");
    assert!(
        largest <= 8_388_608.0,
        "{written} bytes were written, and the files had {largest}"
    );
    assert!(
        journal(&gateway, "moved_records_total").await >= 1.0,
        "the straggler was moved"
    );

    let mut gateway = gateway;
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    gateway
        .client
        .namespace("slow")
        .assert_everywhere("straggler", Some(b"value"))
        .await;
    let hot = gateway.client.read("hot").await.entry.expect("it was written");
    assert_eq!(hot.value[..4], (WRITES as u32 - 1).to_be_bytes());
}
