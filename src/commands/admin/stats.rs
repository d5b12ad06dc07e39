//! `tidegate admin stats`: what a running gateway has counted, as tables or as JSON, once or again and again.
//!
//! Owns the presentation. Does not own the figures (`tidegate.v1.Admin/Stats` says what each means).

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use clap::Args;
use serde_json::{Map, Value, json};
use tokio::time::sleep;

use super::{
    Console, Ended,
    drain::pending_to_json,
    namespace,
    table::{Table, bytes, rate, seconds, time},
    write_out,
};
use crate::{
    commands::exit::Exit,
    rpc::proto::{LatencyStats, NamespaceStats, StatsRequest, StatsResponse, TierStats},
};

/// What `--watch` waits between two looks when it is not told, in seconds.
const WATCH_DEFAULT: &str = "2";

/// The longest wait between two looks.
const WATCH_SECONDS_MAX: u64 = 3600;

/// Clears a terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// How the figures are shown.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Only this namespace
    #[arg(long, value_name = "NAME", value_parser = namespace)]
    namespace: Option<String>,
    /// Again every so many seconds [default: 2], until Ctrl-C
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = WATCH_DEFAULT,
        value_parser = clap::value_parser!(u64).range(1..=WATCH_SECONDS_MAX))]
    watch: Option<u64>,
}

/// Prints what the gateway answers. With `watch` for ever, until it does not answer, or the user or the reader of the output has enough.
pub(super) async fn show(console: &mut Console, options: &Options) -> Result<Exit, Ended> {
    let is_watching = options.watch.is_some();
    let looking = look(console, options);
    if !is_watching {
        return looking.await;
    }
    tokio::select! {
        ended = looking => ended,
        // Without the handler Ctrl-C ends the process, too, but not with 0.
        _ = tokio::signal::ctrl_c() => Ok(Exit::Done),
    }
}

async fn look(console: &mut Console, options: &Options) -> Result<Exit, Ended> {
    let clear = if !console.json && io::stdout().is_terminal() {
        CLEAR
    } else {
        ""
    };
    let mut first = true;
    loop {
        let request = StatsRequest {
            namespace: options.namespace.clone().unwrap_or_default(),
        };
        let stats = console.client.stats(request).await?;
        let text = if console.json {
            format!("{}\n", to_json(&stats))
        } else {
            // Where nothing is cleared, an empty line keeps what is printed apart.
            let apart = if first || !clear.is_empty() { "" } else { "\n" };
            let screen = if options.watch.is_some() { clear } else { "" };
            format!("{screen}{apart}{}", to_tables(&stats))
        };
        first = false;
        write_out(&text)?;
        let Some(seconds) = options.watch else {
            return Ok(Exit::Done);
        };
        sleep(Duration::from_secs(seconds)).await;
    }
}

fn to_tables(stats: &StatsResponse) -> String {
    format!(
        "{}\n{}\n{}\nmemory: {} copies, {}\n",
        reads(stats).render(),
        tiers(stats).render(),
        writes(stats).render(),
        stats.memory_entries,
        bytes(stats.memory_bytes)
    )
}

fn reads(stats: &StatsResponse) -> Table {
    const COUNTS: [&str; 8] = [
        "hits",
        "misses",
        "store reads",
        "absent",
        "failed",
        "loads",
        "refreshes",
        "evicted",
    ];
    let mut table = Table::new(1, &[&["reads", "answered", "hit rate"], &COUNTS[..], &LATENCY].concat());
    for (name, namespace) in rows(stats) {
        let answered = namespace.hits + namespace.misses + namespace.store_reads;
        let counts = [
            namespace.hits,
            namespace.misses,
            namespace.store_reads,
            namespace.negative_hits,
            namespace.read_failures,
            namespace.loads,
            namespace.refreshes,
            namespace.evictions,
        ];
        let mut row = vec![name.to_owned(), answered.to_string(), rate(namespace.hit_rate)];
        row.extend(counts.map(|count| count.to_string()));
        row.extend(latency(namespace.read_latency.as_ref()));
        table.row(row);
    }
    table
}

fn tiers(stats: &StatsResponse) -> Table {
    let mut table = Table::new(2, &["tiers", "tier", "hit rate", "hits", "misses", "absent"]);
    for (name, namespace) in rows(stats) {
        for (tier_name, tier) in tiers_of(namespace) {
            let mut row = vec![name.to_owned(), tier_name.to_owned(), rate(tier.hit_rate)];
            row.extend([tier.hits, tier.misses, tier.negative_hits].map(|count| count.to_string()));
            table.row(row);
        }
    }
    table
}

fn writes(stats: &StatsResponse) -> Table {
    let head = [
        &["writes", "ok", "failed"],
        &LATENCY[..],
        &["pending", "bytes", "oldest", "drain"],
    ]
    .concat();
    let mut table = Table::new(1, &head);
    for (name, namespace) in rows(stats) {
        let mut row = vec![name.to_owned()];
        row.extend([namespace.writes, namespace.write_failures].map(|count| count.to_string()));
        row.extend(latency(namespace.write_latency.as_ref()));
        let pending = namespace.pending_writes.unwrap_or_default();
        row.extend([
            pending.entries.to_string(),
            bytes(pending.bytes),
            time(pending.oldest_age),
            (if pending.paused_since.is_some() {
                "paused"
            } else {
                "running"
            })
            .to_owned(),
        ]);
        table.row(row);
    }
    table
}

/// The names of what [`latency`] tells.
const LATENCY: [&str; 4] = ["average", "p50", "p90", "p99"];

/// The namespaces, then all of them together.
fn rows(stats: &StatsResponse) -> impl Iterator<Item = (&str, &NamespaceStats)> {
    let namespaces = stats
        .namespaces
        .iter()
        .map(|namespace| (namespace.namespace.as_str(), namespace));
    namespaces.chain(stats.total.as_ref().map(|total| ("(total)", total)))
}

/// The tiers that there are.
fn tiers_of(namespace: &NamespaceStats) -> impl Iterator<Item = (&'static str, TierStats)> {
    let tiers = [
        ("l1", namespace.l1),
        ("pending", namespace.pending),
        ("l2", namespace.l2),
        ("store", namespace.store),
    ];
    tiers
        .into_iter()
        .filter_map(|(name, tier)| tier.map(|tier| (name, tier)))
}

fn latency(latency: Option<&LatencyStats>) -> [String; 4] {
    let latency = latency.copied().unwrap_or_default();
    [latency.average, latency.p50, latency.p90, latency.p99].map(time)
}

fn to_json(stats: &StatsResponse) -> Value {
    json!({
        "start_time": stats.start_time.as_ref().map(ToString::to_string),
        "namespaces": stats.namespaces.iter().map(namespace_to_json).collect::<Vec<_>>(),
        "total": stats.total.as_ref().map(namespace_to_json),
        "memory_entries": stats.memory_entries,
        "memory_bytes": stats.memory_bytes,
    })
}

fn namespace_to_json(stats: &NamespaceStats) -> Value {
    let tiers: Map<String, Value> = tiers_of(stats)
        .map(|(name, tier)| (name.to_owned(), tier_to_json(tier)))
        .collect();
    let pending = stats.pending_writes.unwrap_or_default();
    json!({
        "namespace": stats.namespace,
        "tiers": tiers,
        "hits": stats.hits,
        "misses": stats.misses,
        "store_reads": stats.store_reads,
        "read_failures": stats.read_failures,
        "hit_rate": stats.hit_rate,
        "negative_hits": stats.negative_hits,
        "loads": stats.loads,
        "refreshes": stats.refreshes,
        "evictions": stats.evictions,
        "read_latency": stats.read_latency.as_ref().map(latency_to_json),
        "writes": stats.writes,
        "write_failures": stats.write_failures,
        "write_latency": stats.write_latency.as_ref().map(latency_to_json),
        "pending_writes": pending_to_json(&pending),
    })
}

fn tier_to_json(tier: TierStats) -> Value {
    json!({
        "hits": tier.hits,
        "misses": tier.misses,
        "hit_rate": tier.hit_rate,
        "negative_hits": tier.negative_hits,
    })
}

fn latency_to_json(latency: &LatencyStats) -> Value {
    json!({
        "count": latency.count,
        "average_seconds": latency.average.map(seconds),
        "p50_seconds": latency.p50.map(seconds),
        "p90_seconds": latency.p90.map(seconds),
        "p99_seconds": latency.p99.map(seconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_the_total_is_last() {
        let namespace = |name: &str, hits| NamespaceStats {
            namespace: name.to_owned(),
            hits,
            l1: Some(TierStats::default()),
            ..NamespaceStats::default()
        };
        let stats = StatsResponse {
            namespaces: vec![namespace("a", 5), namespace("a-long-one", 1_000_000)],
            total: Some(namespace("", 1_000_005)),
            ..StatsResponse::default()
        };
        let text = to_tables(&stats);
        let reads: Vec<&str> = text.lines().take(4).collect();
        assert!(reads[1].starts_with("a                  5  "), "{text}");
        assert!(reads[2].starts_with("a-long-one   1000000  "), "{text}");
        assert!(reads[3].starts_with("(total)      1000005  "), "{text}");
        assert!(!text.contains(" l2 "), "there is no Redis: {text}");
    }
}
