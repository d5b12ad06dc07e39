//! The integration tests: the real binary against real servers, as a caller and an operator see it.
//!
//! One binary, for every further one would link the world again. Each file proves one promise and opens with it; [`harness`] owns
//! the servers. Nothing here looks inside the crate, except for the two suites that are a contract of its traits.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    unreachable_pub,
    missing_docs,
    reason = "a test binary: it may fail loudly, and nobody is outside to reach or read it"
)]

mod harness;

// The checker of another target: it is proved here, and used there.
#[allow(dead_code, reason = "the other target uses more of it")]
#[path = "../consistency/check/mod.rs"]
mod check;
#[allow(dead_code, reason = "the other target uses more of it")]
#[path = "../crash/counters.rs"]
mod crash_counters;
#[path = "../consistency/history.rs"]
mod history;
#[allow(dead_code, reason = "the other target uses more of it")]
#[path = "../crash/ledger.rs"]
mod ledger;

mod admin;
mod anomalies;
mod bad_input;
mod batch;
mod batch_get_tiers;
mod batch_write;
mod cache_redis;
mod channel;
mod client;
mod clock;
mod coherence;
mod commands;
mod commands_import;
mod commands_watch;
mod conditions;
mod config;
mod counters;
mod counts;
mod deadlines;
mod flow;
mod freshness;
mod health;
mod histories;
mod horizon;
mod invalidate;
mod journal;
mod journal_directory;
mod journal_disk;
mod journal_full;
mod limits;
mod network;
mod offline;
mod outage;
mod page;
mod persisted;
mod poison;
mod queue_full;
mod read_write;
mod recovery;
mod refresh;
mod replicas;
mod request_ids;
mod scan;
mod scan_race;
mod servers;
mod shutdown;
mod slots;
mod stampede;
mod stats;
mod store_contract;
mod store_control;
mod store_decide;
mod store_decide_cut;
mod store_keys;
mod store_letters;
mod stream;
mod switches;
mod tags;
mod touch;
mod unconfirmed;
mod warm;
mod watch;
mod watch_replicas;
