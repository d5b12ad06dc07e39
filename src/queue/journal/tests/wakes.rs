//! Counts wake-ups: each serving thread is woken at most once per sync, however many calls of it are in the group, and the journal thread
//! wakes nobody else.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use tokio::{runtime::Builder, task::JoinSet, time::Instant};

use super::write;
use crate::{
    queue::journal::{Config, Journal, Lane, LaneCore, OpenLane, fs::DiskFs},
    telemetry::journal::JournalMetrics,
};

const LANES: usize = 3;
const CALLERS: usize = 100;
const APPENDS: usize = 20;

/// Wake-ups, and those of them that the journal thread did.
#[derive(Debug, Default)]
struct Count {
    all: AtomicU64,
    by_journal: AtomicU64,
}

/// A waker that counts, and passes on.
struct Counting {
    count: Arc<Count>,
    waker: Waker,
}

impl Wake for Counting {
    fn wake(self: Arc<Self>) {
        self.count.all.fetch_add(1, Ordering::Relaxed);
        if thread::current().name() == Some("journal") {
            self.count.by_journal.fetch_add(1, Ordering::Relaxed);
        }
        self.waker.wake_by_ref();
    }
}

/// A future that counts how often it is woken.
async fn counted<F: Future>(future: F, count: &Arc<Count>) -> F::Output {
    let mut future = pin!(future);
    poll_fn(|context| {
        let counting = Counting {
            count: Arc::clone(count),
            waker: context.waker().clone(),
        };
        poll_with(future.as_mut(), counting)
    })
    .await
}

fn poll_with<F: Future>(future: Pin<&mut F>, counting: Counting) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(&Waker::from(Arc::new(counting))))
}

/// A lane whose task counts how often it is woken.
fn counted_lane(journal: &Journal, count: &Arc<Count>) -> Lane {
    let shared = &journal.handle.shared;
    let core = Arc::new(LaneCore::new(Arc::clone(&shared.progress)));
    shared.register(&core);
    tokio::spawn({
        let (core, count) = (Arc::clone(&core), Arc::clone(count));
        async move { counted(core.run(), &count).await }
    });
    Lane {
        core: Arc::new(OpenLane(core)),
    }
}

/// What one serving thread does: many callers, each of which appends again and again.
async fn serve(journal: &Journal, lane: Lane, callers: &Arc<Count>, thread: usize) {
    let mut tasks = JoinSet::new();
    for caller in 0..CALLERS {
        let (journal, lane, callers) = (journal.clone(), lane.clone(), Arc::clone(callers));
        tasks.spawn(async move {
            for number in 1..=APPENDS {
                let write = write(thread * CALLERS + caller, number as i64, 100);
                let deadline = Instant::now() + Duration::from_secs(60);
                let room = journal.room(write.key.bytes() + 100, deadline).await.expect("room");
                let appended = counted(journal.append(&lane, room, &write, deadline), &callers).await;
                appended.expect("no fault").release();
            }
        });
    }
    tasks.join_all().await;
}

#[test]
fn a_sync_wakes_each_serving_thread_once_at_the_most() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let config = Config {
        segment_bytes: 1 << 20,
        bytes_max: 8 << 20,
        ..Config::default()
    };
    let metrics = JournalMetrics::default();
    let fs = Arc::new(DiskFs::create(directory.path()).expect("made"));
    let (journal, _) = Journal::open(fs, &config, metrics.clone()).expect("an empty directory");
    let (lanes, callers) = (Arc::new(Count::default()), Arc::new(Count::default()));
    thread::scope(|scope| {
        for thread in 0..LANES {
            let (journal, lanes, callers) = (&journal, &lanes, &callers);
            scope.spawn(move || {
                let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
                let lane = async || counted_lane(journal, lanes);
                runtime.block_on(async { serve(journal, lane().await, callers, thread).await });
            });
        }
    });
    let appends = (LANES * CALLERS * APPENDS) as u64;
    let wakes = lanes.by_journal.load(Ordering::Relaxed);
    let syncs = metrics.syncs.get();
    println!("{appends} appends, {syncs} syncs, {wakes} wake-ups by the journal thread on {LANES} lanes");
    assert!(wakes <= syncs * LANES as u64, "{wakes} wake-ups for {syncs} syncs");
    assert!(
        wakes > 0 && wakes * 4 <= appends,
        "{wakes} wake-ups for {appends} appends"
    );
    // Each caller is woken by its own thread, which is awake.
    assert_eq!(callers.by_journal.load(Ordering::Relaxed), 0);
    assert!(
        callers.all.load(Ordering::Relaxed) <= appends,
        "and once for each append"
    );
}
