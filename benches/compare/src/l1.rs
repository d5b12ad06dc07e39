//! L1 by itself: what an entry takes, how often it has what is asked for, and how a gateway comes to have millions.
//!
//! Owns the traces and the filling. Does not own the load on a gateway that was filled (`load`). What an entry takes is measured in a process of
//! its own, by the resident memory that the system tells, so that whatever the entries cost is in it: tables, allocations, what reads leave.
//! The hit rate is that of one trace that L1 and moka (TinyLFU) see in turn, key by key, with the same bound and the same weights.

use std::{env, fs, process::Command, sync::Arc, time::Duration};

use bytes::Bytes;
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Zipf};
use sqlx::{Connection as _, sqlite::SqliteConnection};
use tidegate::{
    cache::{
        Copy,
        memory::{Config, Memory},
    },
    model::{Entry, Key, Timestamp, Version},
    rpc::proto::WarmRequest,
};
use tokio::task::JoinSet;

use crate::{
    Failure,
    harness::{Gateway, SOON, Setup, gateway::data_dir},
};

/// The role of the process that is measured.
pub const MEMORY_ROLE: &str = "l1-memory";

const NAMESPACE: &str = "bench";
const VALUE_BYTES: usize = 100;
const ENTRIES: usize = 1_000_000;
/// What a gateway with filled caches is given: more than any of the rows needs.
const ROOM_BYTES: usize = 4 << 30;
const ZIPF_EXPONENT: f64 = 0.99;
/// Half of what a gateway allows, for it may take one that has ended to be under way a moment longer.
const WARMINGS_AT_A_TIME: usize = 2;
const NOW: Timestamp = Timestamp(1_800_000_000_000);
const LIFETIME: Duration = Duration::from_secs(300);

/// What an entry takes in L1 beyond its key and its value, in bytes, in a process of its own.
pub fn overhead_bytes() -> Result<f64, Failure> {
    let mut command = Command::new(env::current_exe()?);
    // Memory that was given back is not the process's any more, and at once, so that what was resident for a moment is not counted.
    command
        .arg(MEMORY_ROLE)
        .env("_RJEM_MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0");
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("{MEMORY_ROLE}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// The same in this process, which must have done nothing else.
pub fn overhead_bytes_here() -> Result<f64, Failure> {
    let memory = memory(1 << 30);
    let before = resident_bytes()?;
    let mut content_bytes = 0;
    for number in 0..ENTRIES {
        let key = key(number)?;
        content_bytes += key.bytes() + VALUE_BYTES;
        land(&memory, &key, number)?;
    }
    // What a first read leaves behind belongs to the entry.
    for number in 0..ENTRIES {
        drop(memory.get(&key(number)?, NOW));
    }
    let taken = resident_bytes()?.saturating_sub(before);
    if memory.len() != ENTRIES {
        return Err(format!("{} of {ENTRIES} entries are in L1", memory.len()).into());
    }
    let charged = memory.bytes() as f64 / ENTRIES as f64;
    let (taken, content) = (taken as f64 / ENTRIES as f64, content_bytes as f64 / ENTRIES as f64);
    if charged < 0.95 * taken {
        return Err(format!("an entry takes {taken} bytes, and L1 charges {charged}").into());
    }
    Ok(taken - content)
}

/// How many of the reads of one trace were hits, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HitRates {
    pub l1: f64,
    pub moka: f64,
}

/// The hit rates of L1 and of moka, each with room for a tenth of `keys` keys, over the second half of a trace of ten reads for each key.
pub fn hit_rates(keys: usize, seed: u64) -> Result<HitRates, Failure> {
    let one = memory(1 << 20);
    land(&one, &key(0)?, 0)?;
    // All keys and values have one length, so all weigh this.
    let weight = one.bytes() as usize;
    let room = weight * keys / 10;
    let l1 = memory(room);
    let moka = moka::sync::Cache::builder()
        .max_capacity(room as u64)
        .weigher(move |_: &Key, _: &Bytes| weight as u32)
        .build();
    let names: Vec<Key> = (0..keys).map(key).collect::<Result<_, _>>()?;
    let zipf = Zipf::new(keys as f64, ZIPF_EXPONENT)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut l1_hits, mut moka_hits) = (0, 0);
    let reads = keys * 10;
    for read in 0..reads {
        // From 1 to the number of keys.
        let number = zipf.sample(&mut rng) as usize - 1;
        let name = &names[number];
        let counts = usize::from(read >= reads / 2);
        match l1.get(name, NOW) {
            Some(_) => l1_hits += counts,
            None => land(&l1, name, number)?,
        }
        match moka.get(name) {
            Some(_) => moka_hits += counts,
            None => moka.insert(name.clone(), value(number)),
        }
    }
    let rate = |hits: usize| hits as f64 / (reads - reads / 2) as f64;
    Ok(HitRates {
        l1: rate(l1_hits),
        moka: rate(moka_hits),
    })
}

/// An embedded gateway that has this many entries in L1: the keys `key:00000000` and on of the namespace `bench`.
pub async fn gateway_with(entries: usize) -> Result<Gateway, Failure> {
    // Nothing ends, nor is renewed, while the rows run.
    let setup = Setup::new().config(&format!(
        "[memory]\nbytes_max = {ROOM_BYTES}\n[namespaces.{NAMESPACE}]\ncache_lifetime = \"24h\""
    ));
    let mut gateway = setup.start().await;
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    if exit.code != Some(0) {
        return Err(format!("the gateway did not stop: {exit:?}").into());
    }
    fill_store(&gateway, entries).await?;
    let gateway = gateway.start_again().await;
    warm(&gateway, entries).await?;
    let in_memory = gateway.metric("tidegate_memory_cache_entries", &[]).await;
    if in_memory != entries as f64 {
        return Err(format!("{in_memory} of {entries} entries are in L1").into());
    }
    Ok(gateway)
}

/// Puts rows into the tables of a gateway that is down, as it would have written them.
async fn fill_store(gateway: &Gateway, entries: usize) -> Result<(), Failure> {
    let file = data_dir(gateway.directory()).join("tidegate.db");
    let mut store = SqliteConnection::connect(&format!("sqlite://{}", file.display())).await?;
    // Below every version that the gateway will stamp.
    let rows = "with recursive series(number) as (select 0 union all select number + 1 from series where number + 1 < ?1) \
                insert into tidegate_entries (namespace, key, version, value) \
                select ?2, printf('key:%08d', number), number + 1, randomblob(?3) from series";
    let done = sqlx::query(rows)
        .bind(entries as i64)
        .bind(NAMESPACE)
        .bind(VALUE_BYTES as i64)
        .execute(&mut store)
        .await?;
    store.close().await?;
    if done.rows_affected() != entries as u64 {
        return Err(format!("{} of {entries} rows are in the store", done.rows_affected()).into());
    }
    Ok(())
}

/// Has a gateway load all of them.
async fn warm(gateway: &Gateway, entries: usize) -> Result<(), Failure> {
    // A prefix of four digits has ten thousand keys.
    let mut prefixes = (0..entries.div_ceil(10_000)).map(|block| format!("key:{block:04}"));
    let mut warmings = JoinSet::new();
    let admin = gateway.admin().await;
    loop {
        while warmings.len() < WARMINGS_AT_A_TIME
            && let Some(prefix) = prefixes.next()
        {
            let mut admin = admin.clone();
            warmings.spawn(async move {
                let request = WarmRequest {
                    namespace: NAMESPACE.to_owned(),
                    prefix,
                    ..WarmRequest::default()
                };
                let mut progress = admin.warm(request).await?.into_inner();
                let mut failed = 0;
                while let Some(message) = progress.message().await? {
                    failed = message.failed;
                }
                if failed > 0 {
                    return Err(format!("{failed} keys could not be loaded").into());
                }
                Ok::<(), Failure>(())
            });
        }
        match warmings.join_next().await {
            Some(ended) => ended??,
            None => return Ok(()),
        }
    }
}

fn memory(bytes_max: usize) -> Arc<Memory> {
    Arc::new(Memory::new(&Config { bytes_max }))
}

/// As a write lands, from a value that owns its bytes.
fn land(memory: &Arc<Memory>, key: &Key, number: usize) -> Result<(), Failure> {
    let entry = Entry {
        version: Version::new(number as i64 + 1).ok_or("no version")?,
        value: Some(value(number)),
        expires_at: None,
    };
    memory
        .leave_token(key)
        .land_write(Copy::new(Some(entry), NOW, LIFETIME));
    Ok(())
}

fn key(number: usize) -> Result<Key, Failure> {
    Key::new(NAMESPACE, &format!("key:{number:08}")).map_err(|invalid| format!("{invalid:?}").into())
}

fn value(number: usize) -> Bytes {
    Bytes::copy_from_slice(&[number as u8; VALUE_BYTES])
}

/// What of this process is in memory.
fn resident_bytes() -> Result<usize, Failure> {
    const PAGE_BYTES: usize = 4096;
    let statm = fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).ok_or("no resident pages in statm")?;
    Ok(pages.parse::<usize>()? * PAGE_BYTES)
}
