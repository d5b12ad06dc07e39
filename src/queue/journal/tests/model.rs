//! Model checking of the wake-up protocol: `wake` built over the checker's primitives, every interleaving tried. In each, nobody is told
//! that a group is durable before the sync that covers it, everybody is told in the end (the checker reports a deadlock otherwise),
//! and a wait that is given up disturbs nobody.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::{Context, Poll, Waker},
};

use loom::{future::block_on, model::Builder, thread};

use self::{
    sync::{Arc, AtomicU64, Ordering},
    wake::{Fate, LaneCore, Progress},
};

/// The checker's primitives, under the names of the real ones.
mod sync {
    pub(super) use loom::sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    };
}

#[expect(clippy::duplicate_mod, reason = "over other primitives")]
#[path = "../wake.rs"]
mod wake;

/// The disk, as far as the protocol is concerned: the newest group that is synced. Ordered by nothing but the protocol.
struct Platter(AtomicU64);

impl Platter {
    fn new() -> Arc<Platter> {
        Arc::new(Platter(AtomicU64::new(0)))
    }

    fn sync(&self, sequence: u64) {
        self.0.store(sequence, Ordering::Relaxed);
    }

    fn holds(&self, sequence: u64) -> bool {
        self.0.load(Ordering::Relaxed) >= sequence
    }
}

fn check(preemptions: usize, scenario: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(scenario);
}

/// The journal thread: syncs groups and tells, as `writer` and `shared` do.
fn journal(platter: &Platter, progress: &Progress, lane: &LaneCore, groups: u64) {
    for sequence in 1..=groups {
        platter.sync(sequence);
        progress.sync_to(sequence);
        if lane.is_in(sequence) {
            lane.raise();
        }
    }
}

#[test]
fn nobody_is_told_too_early_and_nobody_is_forgotten() {
    check(2, || {
        let platter = Platter::new();
        let progress = Arc::new(Progress::new(0));
        let lane = Arc::new(LaneCore::new(Arc::clone(&progress)));
        // Appended before the group is taken, as the lock of the gathered group ensures.
        lane.join(2);
        let task = thread::spawn({
            let lane = Arc::clone(&lane);
            move || block_on(lane.run())
        });
        let syncing = thread::spawn({
            let (platter, progress, lane) = (Arc::clone(&platter), Arc::clone(&progress), Arc::clone(&lane));
            move || journal(&platter, &progress, &lane, 2)
        });
        // Two calls at once, the later group's registered first.
        let (mut second, mut first) = (pin!(lane.settled(2)), pin!(lane.settled(1)));
        let (mut second_fate, mut first_fate) = (None, None);
        block_on(poll_fn(|context| {
            for (sequence, wait, fate) in [(2, &mut second, &mut second_fate), (1, &mut first, &mut first_fate)] {
                if fate.is_none()
                    && let Poll::Ready(told) = wait.as_mut().poll(context)
                {
                    assert!(platter.holds(sequence), "told before the sync");
                    *fate = Some(told);
                }
            }
            if first_fate.and(second_fate).is_some() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }));
        assert_eq!((first_fate, second_fate), (Some(Fate::Durable), Some(Fate::Durable)));
        lane.close();
        task.join().expect("no panic");
        syncing.join().expect("no panic");
    });
}

#[test]
fn a_wait_given_up_leaves_the_others_to_be_woken() {
    check(2, || {
        let platter = Platter::new();
        let progress = Arc::new(Progress::new(0));
        let lane = Arc::new(LaneCore::new(Arc::clone(&progress)));
        lane.join(1);
        let task = thread::spawn({
            let lane = Arc::clone(&lane);
            move || block_on(lane.run())
        });
        let syncing = thread::spawn({
            let (platter, progress, lane) = (Arc::clone(&platter), Arc::clone(&progress), Arc::clone(&lane));
            move || journal(&platter, &progress, &lane, 1)
        });
        {
            // Registered, mostly, and then dropped at any moment of the sync.
            let mut given_up = pin!(lane.settled(1));
            if let Poll::Ready(fate) = given_up.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                assert_eq!(fate, Fate::Durable);
            }
        }
        assert_eq!(block_on(lane.settled(1)), Fate::Durable);
        assert!(platter.holds(1));
        lane.close();
        task.join().expect("no panic");
        syncing.join().expect("no panic");
    });
}

#[test]
fn when_the_journal_fails_each_waiter_learns_its_own_fate() {
    check(2, || {
        let platter = Platter::new();
        let progress = Arc::new(Progress::new(0));
        let lane = Arc::new(LaneCore::new(Arc::clone(&progress)));
        lane.join(3);
        let task = thread::spawn({
            let lane = Arc::clone(&lane);
            move || block_on(lane.run())
        });
        let failing = thread::spawn({
            let (platter, progress, lane) = (Arc::clone(&platter), Arc::clone(&progress), Arc::clone(&lane));
            move || {
                journal(&platter, &progress, &lane, 1);
                // The sync of the second group fails; the third was never taken.
                progress.end_at(3);
                lane.raise();
            }
        });
        assert_eq!(block_on(lane.settled(3)), Fate::NotWritten);
        assert_eq!(block_on(lane.settled(2)), Fate::Unknown);
        assert_eq!(block_on(lane.settled(1)), Fate::Durable);
        assert!(platter.holds(1));
        lane.close();
        task.join().expect("no panic");
        failing.join().expect("no panic");
    });
}

/// The checks above can fail: the same protocol with the two steps of the journal thread exchanged does.
#[test]
#[should_panic(expected = "told before the sync")]
fn telling_before_the_sync_is_caught() {
    check(2, || {
        let platter = Platter::new();
        let progress = Arc::new(Progress::new(0));
        let syncing = thread::spawn({
            let (platter, progress) = (Arc::clone(&platter), Arc::clone(&progress));
            move || {
                progress.sync_to(1);
                platter.sync(1);
            }
        });
        if progress.fate(1) == Some(Fate::Durable) {
            assert!(platter.holds(1), "told before the sync");
        }
        syncing.join().expect("no panic");
    });
}
