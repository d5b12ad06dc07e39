//! `tidegate stats`: what a running gateway has counted, as tables or as JSON, once or again and again.
//!
//! Owns the presentation. Does not own the figures (`tidegate.v1.Admin/Stats` says what each means). Invariant: a standard output that
//! nobody reads any more ends the command, and is no error.

use std::{
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    time::Duration,
};

use clap::Args;
use serde_json::{Map, Value, json};
use tokio::time::sleep;

use crate::{
    model::check_namespace,
    rpc::{
        admin::client::{Client, ClientError},
        proto::{LatencyStats, NamespaceStats, StatsResponse, TierStats},
    },
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
    /// The gateway's operators' port, in place of the configuration's `admin.listen`
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<SocketAddr>,
    /// Only this namespace
    #[arg(long, value_name = "NAME", value_parser = namespace)]
    pub namespace: Option<String>,
    /// Again every so many seconds [default: 2], until Ctrl-C
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = WATCH_DEFAULT,
        value_parser = clap::value_parser!(u64).range(1..=WATCH_SECONDS_MAX))]
    pub watch: Option<u64>,
    /// As JSON, one line each time
    #[arg(long)]
    pub json: bool,
}

fn namespace(text: &str) -> Result<String, &'static str> {
    check_namespace(text).map(|()| text.to_owned())
}

/// Asks the gateway whose operators' port is at `address`, unless the options name another, and prints what it answers. With `watch` for
/// ever, until the gateway does not answer, or the user or the reader of the output has enough.
///
/// # Errors
/// The gateway does not answer.
pub async fn show(address: SocketAddr, options: &Options) -> Result<(), ClientError> {
    let looking = look(options.address.unwrap_or(address), options);
    if options.watch.is_none() {
        return looking.await;
    }
    tokio::select! {
        ended = looking => ended,
        // Without the handler Ctrl-C ends the process, too, but not with 0.
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn look(address: SocketAddr, options: &Options) -> Result<(), ClientError> {
    let mut client = Client::connect(address).await?;
    let clear = if !options.json && io::stdout().is_terminal() {
        CLEAR
    } else {
        ""
    };
    let mut first = true;
    loop {
        let stats = client.stats(options.namespace.as_deref().unwrap_or_default()).await?;
        let text = if options.json {
            format!("{}\n", to_json(&stats))
        } else {
            // Where nothing is cleared, an empty line keeps what is printed apart.
            let apart = if first || !clear.is_empty() { "" } else { "\n" };
            let screen = if options.watch.is_some() { clear } else { "" };
            format!("{screen}{apart}{}", to_tables(&stats))
        };
        first = false;
        let mut out = io::stdout().lock();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            // Nobody reads any more.
            return Ok(());
        }
        drop(out);
        let Some(seconds) = options.watch else { return Ok(()) };
        sleep(Duration::from_secs(seconds)).await;
    }
}

/// A table for people: the first column is text, the others are figures, aligned to the right.
struct Table {
    rows: Vec<Vec<String>>,
    /// The columns that hold text.
    text_columns: usize,
}

impl Table {
    fn new(text_columns: usize, head: &[&str]) -> Table {
        Table {
            rows: vec![head.iter().map(|name| (*name).to_owned()).collect()],
            text_columns,
        }
    }

    fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn render(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            self.rows
                .iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let gap = if column == 0 { "" } else { "  " };
                if column < self.text_columns {
                    line.push_str(&format!("{gap}{cell:<width$}"));
                } else {
                    line.push_str(&format!("{gap}{cell:>width$}"));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
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
        &["pending", "bytes", "oldest"],
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

fn rate(rate: Option<f64>) -> String {
    rate.map_or("-".to_owned(), |rate| format!("{:.1} %", rate * 100.0))
}

fn latency(latency: Option<&LatencyStats>) -> [String; 4] {
    let latency = latency.copied().unwrap_or_default();
    [latency.average, latency.p50, latency.p90, latency.p99].map(time)
}

/// Three digits, in the unit that suits.
fn time(time: Option<prost_types::Duration>) -> String {
    let Some(seconds) = time.map(seconds) else {
        return "-".to_owned();
    };
    let (figure, unit) = match seconds {
        _ if seconds < 1e-6 => (seconds * 1e9, "ns"),
        _ if seconds < 1e-3 => (seconds * 1e6, "µs"),
        _ if seconds < 1.0 => (seconds * 1e3, "ms"),
        _ => (seconds, "s"),
    };
    format!("{} {unit}", three_digits(figure))
}

fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut figure, mut unit) = (bytes as f64, 0);
    while figure >= 1024.0 && unit < UNITS.len() - 1 {
        figure /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        return format!("{bytes} B");
    }
    format!("{} {}", three_digits(figure), UNITS[unit])
}

fn three_digits(figure: f64) -> String {
    let decimals = match figure {
        _ if figure >= 100.0 => 0,
        _ if figure >= 10.0 => 1,
        _ => 2,
    };
    format!("{figure:.decimals$}")
}

fn seconds(duration: prost_types::Duration) -> f64 {
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
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
        "pending_writes": {
            "entries": pending.entries,
            "bytes": pending.bytes,
            "oldest_age_seconds": pending.oldest_age.map(seconds),
        },
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
    fn figures_have_three_digits_and_a_unit() {
        let time = |nanos: i64| {
            let duration = Duration::from_nanos(nanos.unsigned_abs());
            super::time(duration.try_into().ok())
        };
        assert_eq!(time(128), "128 ns");
        assert_eq!(time(1_500), "1.50 µs");
        assert_eq!(time(23_456_000), "23.5 ms");
        assert_eq!(time(137_000_000_000), "137 s");
        assert_eq!(super::time(None), "-");
        assert_eq!(
            (bytes(0), bytes(1023), bytes(1536)),
            ("0 B".into(), "1023 B".into(), "1.50 KiB".into())
        );
        assert_eq!(bytes(u64::MAX), "16777216 TiB");
        assert_eq!((rate(None), rate(Some(0.9876))), ("-".into(), "98.8 %".into()));
    }

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
