//! How long a journal of 64 MiB takes to come back: `cargo bench --bench recovery [-- directory]`.
//!
//! Owns the shapes of journal that are tried: many keys written several times, one hot key, large values. All records are held, so that each
//! of them counts. Measures opening, each time in a process of its own: with the files in the page cache, and, where the system lets it
//! drop that (as root), without; and what that process holds at the most.
#![expect(clippy::print_stdout, reason = "it prints what it measured")]

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tidegate::{
    model::{Entry, Key, Tags, Version, Write},
    queue::journal::{Config, Journal, Lane, Record, Recovered, fs::DiskFs},
    telemetry::journal::JournalMetrics,
};
use tokio::{task::JoinSet, time::Instant};

const JOURNAL_BYTES: usize = 64 << 20;
/// What a record takes beside its value, roughly.
const FRAME_BYTES: usize = 40;
const TASKS: usize = 2_000;
const ROUNDS: usize = 5;

/// What tells this program that it is the process that is measured.
const OPEN: &str = "open";

struct Shape {
    name: &'static str,
    keys: usize,
    value_bytes: usize,
    /// How many bytes are written and released before, so that every file has had another life.
    released_bytes: usize,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "100 bytes, 100,000 keys",
        keys: 100_000,
        value_bytes: 100,
        released_bytes: 0,
    },
    Shape {
        name: "100 bytes, each key once",
        keys: usize::MAX,
        value_bytes: 100,
        released_bytes: 0,
    },
    Shape {
        name: "100 bytes, one hot key",
        keys: 1,
        value_bytes: 100,
        released_bytes: 0,
    },
    Shape {
        name: "4 KiB, 100,000 keys",
        keys: 100_000,
        value_bytes: 4096,
        released_bytes: 0,
    },
    Shape {
        name: "4 KiB, 100,000 keys, in recycled files",
        keys: 100_000,
        value_bytes: 4096,
        released_bytes: 5 * JOURNAL_BYTES,
    },
];

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [first, directory] = arguments.as_slice()
        && first == OPEN
    {
        return open_once(Path::new(directory)).await;
    }
    let parent = arguments.first().map_or_else(env::temp_dir, PathBuf::from);
    for shape in SHAPES {
        let directory = tempfile::tempdir_in(&parent)?;
        fill(directory.path(), &shape).await?;
        println!("{}", shape.name);
        println!("  warm {}", measure(directory.path(), || true)?);
        let drop_cache = || fs::write("/proc/sys/vm/drop_caches", "3").is_ok();
        println!("  cold {}", measure(directory.path(), drop_cache)?);
    }
    Ok(())
}

/// Writes a journal, of which nothing is released.
async fn fill(path: &Path, shape: &Shape) -> Result<(), Box<dyn Error>> {
    let (journal, _) = open(path)?;
    let lane = journal.lane();
    append(&journal, &lane, shape, shape.released_bytes, false).await?;
    append(&journal, &lane, shape, JOURNAL_BYTES, true).await?;
    journal.close().await?;
    Ok(())
}

/// Appends so many bytes, by many callers at once.
async fn append(
    journal: &Journal,
    lane: &Lane,
    shape: &Shape,
    bytes: usize,
    hold: bool,
) -> Result<Vec<Record>, Box<dyn Error>> {
    let writes = bytes / (shape.value_bytes + FRAME_BYTES);
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (journal, lane, keys, value_bytes) = (journal.clone(), lane.clone(), shape.keys, shape.value_bytes);
        tasks.spawn(async move {
            let mut held = Vec::new();
            for number in (task..writes).step_by(TASKS) {
                let deadline = Instant::now() + Duration::from_secs(60);
                let write = write(number, keys, value_bytes);
                let room = journal.room(write.key.bytes() + value_bytes, deadline).await?;
                let record = journal.append(&lane, room, &write, deadline).await?;
                if hold {
                    held.push(record);
                } else {
                    record.release();
                }
            }
            Ok::<_, tidegate::error::Error>(held)
        });
    }
    let mut held = Vec::new();
    while let Some(done) = tasks.join_next().await {
        held.extend(done??);
    }
    Ok(held)
}

fn write(number: usize, keys: usize, value_bytes: usize) -> Write {
    Write {
        key: Key::new("bench", &format!("key-{:07}", number % keys)).expect("valid"),
        entry: Entry {
            version: Version::new(number as i64 + 1).expect("positive"),
            value: Some(Bytes::from(vec![b'v'; value_bytes])),
            expires_at: None,
        },
        tags: Tags::default(),
        requests: Vec::new(),
    }
}

fn open(path: &Path) -> Result<(Journal, Recovered), Box<dyn Error>> {
    let fs = Arc::new(DiskFs::create(path)?);
    Ok(Journal::open(fs, &Config::default(), JournalMetrics::default())?)
}

/// The process that is measured: prints microseconds, keys, and the most memory that it held, in KiB.
async fn open_once(path: &Path) -> Result<(), Box<dyn Error>> {
    let started = Instant::now();
    let (journal, recovered) = open(path)?;
    let took = started.elapsed();
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|peak| peak.trim().split(' ').next()).unwrap_or("0");
    println!("{} {} {peak}", took.as_micros(), recovered.writes.len());
    // Nothing is released, so that the next one finds the same.
    journal.close().await?;
    Ok(())
}

/// Opens a journal several times, each after `prepare`; says so when that cannot be done.
fn measure(path: &Path, prepare: impl Fn() -> bool) -> Result<String, Box<dyn Error>> {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        if !prepare() {
            return Ok("not measured: the page cache cannot be dropped".to_owned());
        }
        let output = Command::new(env::current_exe()?).arg(OPEN).arg(path).output()?;
        let text = String::from_utf8(output.stdout)?;
        let numbers: Result<Vec<u64>, _> = text.split_whitespace().map(str::parse).collect();
        let [micros, keys, peak] = numbers?[..] else {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        };
        rounds.push((micros, keys, peak));
    }
    rounds.sort_unstable();
    let (micros, keys, peak) = rounds[ROUNDS / 2];
    let (fastest, slowest) = (rounds[0].0 / 1000, rounds[ROUNDS - 1].0 / 1000);
    Ok(format!(
        "{} ms (from {fastest} to {slowest}), {keys} keys, {} MiB of memory",
        micros / 1000,
        peak >> 10
    ))
}
