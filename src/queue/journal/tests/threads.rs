//! The journal with its thread, on a real directory and on a failing one: many callers, deadlines, closing, dropping, locking.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};

use super::{key, small, write};
use crate::{
    error::{Error, ErrorKind, Outcome},
    model::Write,
    queue::journal::{
        Config, Journal, JournalError, Lane, Record, Recovered, Stall, State,
        fs::{DiskFs, JournalFs},
        inspect::inspect,
        sim::{Disk, Faults, SimFs},
    },
    telemetry::journal::JournalMetrics,
};

/// Long enough for anything that happens at all.
const PLENTY: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + PLENTY
}

impl Journal {
    /// Claims room and appends.
    async fn put(&self, lane: &Lane, write: &Write, deadline: Instant) -> Result<Record, Error> {
        let bytes = write.key.bytes() + write.entry.value_bytes();
        let room = self.room(bytes, deadline).await?;
        self.append(lane, room, write, deadline).await
    }
}

fn open_at(path: &Path, config: &Config) -> Result<(Journal, Recovered), JournalError> {
    let fs: Arc<dyn JournalFs> = Arc::new(DiskFs::create(path).expect("made"));
    Journal::open(fs, config, JournalMetrics::default())
}

/// Opens a directory whose journal was dropped, and ends by itself.
async fn reopened(path: &Path, config: &Config) -> (Journal, Recovered) {
    let deadline = soon();
    loop {
        match open_at(path, config) {
            Ok(opened) => return opened,
            Err(JournalError::InUse(_)) if Instant::now() < deadline => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

fn open_sim(fs: &SimFs) -> (Journal, Recovered) {
    Journal::open(Arc::new(fs.clone()), &small(), JournalMetrics::default()).expect("in order")
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = soon();
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::task::yield_now().await;
    }
}

fn writes_of(recovered: &Recovered) -> Vec<&Write> {
    let mut writes: Vec<&Write> = recovered.writes.iter().map(|(write, _)| write).collect();
    writes.sort_by(|a, b| a.key.cmp(&b.key));
    writes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_share_syncs_and_a_restart_brings_back_what_is_held() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let config = Config {
        segment_bytes: 1 << 20,
        bytes_max: 8 << 20,
        ..Config::default()
    };
    let metrics = JournalMetrics::default();
    let fs: Arc<dyn JournalFs> = Arc::new(DiskFs::create(&directory.path().join("journal")).expect("made"));
    let (journal, recovered) = Journal::open(Arc::clone(&fs), &config, metrics.clone()).expect("an empty directory");
    assert!(recovered.writes.is_empty() && recovered.high_water.is_none());
    let lane = journal.lane();
    let mut tasks = JoinSet::new();
    for task in 0..32 {
        let (journal, lane) = (journal.clone(), lane.clone());
        tasks.spawn(async move {
            let mut held = Vec::new();
            for round in 1..=50 {
                // The last one of each key is held, the others are released as a newer one is durable.
                let record = journal
                    .put(&lane, &write(task, round, 100), soon())
                    .await
                    .expect("room");
                held.push(record);
                held.drain(..held.len() - 1).for_each(Record::release);
            }
            held
        });
    }
    let held: Vec<Record> = tasks.join_all().await.into_iter().flatten().collect();
    assert_eq!(held.len(), 32);
    // How many share one depends on how long the disk takes; where it takes no time, few do.
    let syncs = metrics.syncs.get();
    assert!(syncs < 1600, "{syncs} syncs for 1600 writes");
    journal.close().await.expect("not poisoned");
    assert!(journal.put(&lane, &write(1, 60, 1), soon()).await.is_err());
    held.into_iter().for_each(Record::release);

    let (journal, recovered) = open_at(&directory.path().join("journal"), &config).expect("in order");
    let expected: Vec<Write> = (0..32).map(|task| write(task, 50, 100)).collect();
    let mut expected: Vec<&Write> = expected.iter().collect();
    expected.sort_by(|a, b| a.key.cmp(&b.key));
    assert_eq!(
        writes_of(&recovered),
        expected,
        "a release after the close changes nothing"
    );
    assert_eq!(recovered.high_water.map(|version| version.get()), Some(50));
    // As by a start that fails later on.
    drop((recovered, journal));

    let (journal, recovered) = reopened(&directory.path().join("journal"), &config).await;
    assert_eq!(writes_of(&recovered), expected, "what is dropped is not released");
    recovered.writes.into_iter().for_each(|(_, record)| record.release());
    journal.close().await.expect("not poisoned");

    let (_, recovered) = open_at(&directory.path().join("journal"), &config).expect("in order");
    assert!(recovered.writes.is_empty(), "all was released before the close");
    assert_eq!(
        recovered.high_water.map(|version| version.get()),
        Some(50),
        "the clock still learns of it"
    );
}

#[tokio::test]
async fn a_directory_serves_one_journal_and_is_free_once_it_is_closed() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let config = Config {
        segment_bytes: 1 << 20,
        bytes_max: 5 << 20,
        ..Config::default()
    };
    let (journal, _) = open_at(directory.path(), &config).expect("free");
    let error = open_at(directory.path(), &config).expect_err("in use");
    assert!(matches!(error, JournalError::InUse(_)), "{error}");
    journal.close().await.expect("not poisoned");
    let (journal, _) = open_at(directory.path(), &config).expect("free again");
    let journal = { journal };
    // Dropped without a close, it ends by itself.
    drop(journal);
    reopened(directory.path(), &config).await;
}

#[tokio::test]
async fn an_append_whose_caller_is_gone_is_written() {
    let fs = SimFs::default();
    let (journal, _) = open_sim(&fs);
    let lane = journal.lane();
    let held = journal.put(&lane, &write(1, 1, 50), soon()).await.expect("room");
    // Polled once, so that it is gathered, and dropped.
    let gone = write(2, 2, 50);
    tokio::select! {
        biased;
        _ = journal.put(&lane, &gone, soon()) => {}
        () = std::future::ready(()) => {}
    }
    let next = journal.put(&lane, &write(3, 3, 50), soon()).await.expect("room");
    journal.close().await.expect("not poisoned");
    let (_, recovered) = open_sim(&fs);
    assert!(recovered.high_water.is_some_and(|version| version.get() == 3));
    let keys: Vec<_> = writes_of(&recovered)
        .into_iter()
        .map(|write| write.key.clone())
        .collect();
    assert_eq!(keys, [key(1), key(2), key(3)]);
    drop((held, next));
}

#[tokio::test]
async fn a_full_journal_makes_appends_wait_until_their_deadline_and_goes_on_when_something_is_released() {
    let fs = SimFs::default();
    let (journal, _) = open_sim(&fs);
    let lane = journal.lane();
    let mut held = Vec::new();
    let refusal = loop {
        let deadline = Instant::now() + Duration::from_millis(200);
        let number = held.len() + 1;
        match journal.put(&lane, &write(number, number as i64, 300), deadline).await {
            Ok(record) => held.push(record),
            Err(error) => break error,
        }
        assert!(held.len() < 1000, "bounded");
    };
    assert_eq!(
        (refusal.kind(), refusal.outcome()),
        (ErrorKind::Timeout, Outcome::NotApplied)
    );
    assert!(held.len() > 15, "{} records", held.len());
    assert!(journal.stats().bytes <= small().bytes_max);
    // Any record makes room, not only the oldest.
    held.swap_remove(held.len() / 2).release();
    held.push(
        journal
            .put(&lane, &write(5000, 5000, 300), soon())
            .await
            .expect("room again"),
    );
    journal.close().await.expect("not poisoned");
    let (_, recovered) = open_sim(&fs);
    assert!(recovered.writes.len() >= held.len());
}

#[tokio::test]
async fn a_full_disk_is_waited_for_and_is_no_failure() {
    let fs = SimFs::new(Disk::default(), Faults::default());
    let (journal, _) = open_sim(&fs);
    let lane = journal.lane();
    let mut held = vec![journal.put(&lane, &write(1, 1, 300), soon()).await.expect("room")];
    until("the next segment is prepared", || journal.handle.shared.is_asleep()).await;
    let full = Faults {
        capacity: Some(2 * 4096),
        ..Faults::default()
    };
    fs.set_faults(full);
    let refusal = loop {
        let number = held.len() + 1;
        let deadline = Instant::now() + Duration::from_millis(200);
        match journal.put(&lane, &write(number, number as i64, 300), deadline).await {
            Ok(record) => held.push(record),
            Err(error) => break error,
        }
    };
    assert_eq!(
        (refusal.kind(), refusal.outcome()),
        (ErrorKind::Timeout, Outcome::NotApplied)
    );
    assert_ne!(journal.state(), State::Failed);
    assert_eq!(journal.stats().stall, Some(Stall::DiskFull));
    fs.set_faults(Faults::default());
    let number = held.len() + 1;
    held.push(
        journal
            .put(&lane, &write(number, number as i64, 300), soon())
            .await
            .expect("room again"),
    );
    assert_eq!(journal.stats().stall, None);
    journal.close().await.expect("not poisoned");
    assert_eq!(open_sim(&fs).1.writes.len(), held.len());
}

#[tokio::test]
async fn on_a_full_disk_what_is_released_makes_room_by_itself() {
    let fs = SimFs::new(Disk::default(), Faults::default());
    let (journal, _) = open_sim(&fs);
    let lane = journal.lane();
    let first = journal.put(&lane, &write(1, 1, 300), soon()).await.expect("room");
    until("the next segment is prepared", || journal.handle.shared.is_asleep()).await;
    fs.set_faults(Faults {
        capacity: Some(2 * 4096),
        ..Faults::default()
    });
    let mut held = vec![first];
    while journal.stats().stall.is_none() {
        let number = held.len() + 1;
        let deadline = Instant::now() + Duration::from_millis(200);
        if let Ok(record) = journal.put(&lane, &write(number, number as i64, 300), deadline).await {
            held.push(record);
        }
    }
    held.drain(..).for_each(Record::release);
    for number in 1000..1100 {
        // The disk stays full: the freed segment is used again.
        let appended = journal.put(&lane, &write(number, number as i64, 300), soon()).await;
        appended.expect("room again").release();
    }
    assert_ne!(journal.state(), State::Failed);
}

#[tokio::test]
async fn a_failing_sync_poisons_for_good_and_says_what_is_not_known() {
    let fs = SimFs::default();
    let (journal, _) = open_sim(&fs);
    let lane = journal.lane();
    let held = journal.put(&lane, &write(1, 1, 50), soon()).await.expect("room");
    until("the journal sleeps", || journal.handle.shared.is_asleep()).await;
    fs.set_faults(Faults {
        fail_at: Some(2),
        ..Faults::default()
    });
    let error = journal
        .put(&lane, &write(2, 2, 50), soon())
        .await
        .expect_err("the sync fails");
    assert_eq!(
        (error.kind(), error.outcome()),
        (ErrorKind::Unavailable, Outcome::Unknown)
    );
    journal.ended().await;
    assert_eq!(journal.state(), State::Failed);
    let error = journal
        .put(&lane, &write(3, 3, 50), soon())
        .await
        .expect_err("poisoned");
    assert_eq!(
        (error.kind(), error.outcome()),
        (ErrorKind::Unavailable, Outcome::NotApplied)
    );
    assert!(journal.close().await.is_err());
    assert_eq!((fs.failed(), fs.syncs_after_failure()), (1, 0));
    // The same machine goes on: what it still reads of the group that was not synced is made durable, or is not there.
    let (journal, recovered) = open_sim(&fs);
    let survivors = recovered.writes.len();
    let crashed = fs.disk().crashed(&crate::queue::journal::sim::Loss::All);
    let (_, after_crash) = open_sim(&SimFs::new(crashed, Faults::default()));
    assert_eq!(after_crash.writes.len(), survivors);
    drop((held, journal));
}

#[tokio::test]
async fn a_record_that_is_too_long_is_refused() {
    let (journal, _) = open_sim(&SimFs::default());
    let lane: Lane = journal.lane();
    let longest = small().write_bytes_max();
    let fits = write(1, 1, longest - write(1, 1, 0).key.bytes());
    let fitting = journal.put(&lane, &fits, soon()).await;
    fitting.expect("the longest fits").release();
    let error = journal
        .put(&lane, &write(1, 2, longest + 64), soon())
        .await
        .expect_err("too long");
    assert_eq!(
        (error.kind(), error.outcome()),
        (ErrorKind::Rejected, Outcome::NotApplied)
    );
}

#[tokio::test]
async fn a_lull_tells_what_was_released() {
    let fs = SimFs::default();
    let config = Config {
        idle_sync: Duration::from_millis(1),
        ..small()
    };
    let (journal, _) =
        Journal::open(Arc::new(fs.clone()), &config, JournalMetrics::default()).expect("an empty directory");
    let lane = journal.lane();
    let appended = journal.put(&lane, &write(1, 1, 50), soon()).await;
    appended.expect("room").release();
    let recovered = || {
        let crashed = SimFs::new(
            fs.disk().crashed(&crate::queue::journal::sim::Loss::All),
            Faults::default(),
        );
        open_sim(&crashed).1.writes.len()
    };
    until("told on disk", || recovered() == 0).await;
    drop(journal);
}

#[test]
fn what_is_no_directory_is_refused() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    assert!(DiskFs::create(file.path()).is_err());
    let error = DiskFs::existing(file.path()).expect_err("a file");
    assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inspecting_a_running_journal_finds_no_damage() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let config = Config {
        segment_bytes: 64 << 10,
        bytes_max: 1 << 20,
        ..Config::default()
    };
    let (journal, _) = open_at(directory.path(), &config).expect("an empty directory");
    let fs = DiskFs::existing(directory.path()).expect("there");
    let looks = Arc::new(AtomicUsize::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let looking = tokio::task::spawn_blocking({
        let (looks, over) = (Arc::clone(&looks), Arc::clone(&over));
        move || {
            while !over.load(Ordering::Relaxed) {
                let look = looks.fetch_add(1, Ordering::Relaxed);
                let inspection = inspect(&fs).expect("readable");
                assert!(inspection.refusal.is_none(), "at look {look}: {inspection}");
            }
        }
    });
    let lane = journal.lane();
    let mut held = None;
    let mut number = 0;
    // Segments turn over while it looks.
    while !looking.is_finished() && (number < 200 || looks.load(Ordering::Relaxed) < 100) {
        number += 1;
        let record = journal
            .put(&lane, &write(1, number, 2_000), soon())
            .await
            .expect("room");
        held.replace(record).into_iter().for_each(Record::release);
    }
    over.store(true, Ordering::Relaxed);
    looking.await.expect("in order at every look");
}
