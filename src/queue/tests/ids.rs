//! Request ids: whatever becomes of a write's slot, its id is in the store before the queue lets go of what it holds.

use super::*;
use crate::{
    model::{Answer, Answered, Fingerprint, Request, RequestId},
    store::DeadLetter,
};

pub(super) fn id(name: &str) -> RequestId {
    RequestId::new(name).expect("valid")
}

/// A write with an id.
pub(super) fn write_as(name: &str, number: i64, request: &str) -> Write {
    let write = write(name, number);
    let answered = Answered {
        request: Request {
            id: id(request),
            fingerprint: Fingerprint([number as u8; 16]),
            ends_at: Timestamp(i64::MAX),
        },
        answer: Answer {
            version: write.entry.version,
            counter: None,
            expires_at: None,
        },
    };
    Write {
        requests: vec![answered],
        ..write
    }
}

impl Rig {
    fn put_as(&self, name: &str, version: i64, request: &str) {
        let write = write_as(name, version, request);
        let (passage, held) = (self.queue.enter(&write.key), self.held(&write));
        self.queue.accept(write, held, passage, Duration::ZERO);
    }

    /// The version that the store remembers for an id.
    pub(super) async fn remembered(&self, request: &str) -> Option<i64> {
        let mut session = self.backend.store().session();
        let answers = session.answers(&[("test", &id(request))]).await.expect("it answers");
        answers[0].as_ref().map(|answered| answered.answer.version.get())
    }
}

#[tokio::test(start_paused = true)]
async fn the_ids_of_older_writes_go_with_the_newest_and_hold_their_room_until_then() {
    let rig = rig(|_| ());
    let release = rig.hang_commit().await;
    rig.put_as("k", 1, "first");
    rig.put_as("k", 3, "third");
    rig.put_as("k", 2, "late");
    rig.put("k", 4);
    assert_eq!((rig.pending("k"), rig.queue.stats().entries), (Some(4), 1 + 4));
    assert_eq!(rig.queue.shared.budget.claimed().0, 1 + 4);
    release.notify_one();
    rig.empty().await;
    assert_eq!(rig.history("k"), [4]);
    let known = [
        rig.remembered("first").await,
        rig.remembered("third").await,
        rig.remembered("late").await,
    ];
    assert_eq!(known, [Some(1), Some(3), Some(2)]);
    assert_eq!(rig.backend.calls(Call::Remember), 0, "they went with the write");
}

#[tokio::test(start_paused = true)]
async fn an_id_that_a_failed_batch_had_goes_with_the_next_one() {
    let rig = rig(|_| ());
    rig.backend.inject(Call::Commit, Fault::fail(StoreErrorKind::Transient));
    rig.put_as("k", 1, "a");
    eventually(|| rig.backend.calls(Call::Commit) == 1).await;
    rig.put_as("k", 2, "b");
    rig.empty().await;
    assert_eq!(rig.history("k"), [2]);
    assert_eq!(
        (rig.remembered("a").await, rig.remembered("b").await),
        (Some(1), Some(2))
    );
}

#[tokio::test(start_paused = true)]
async fn what_comes_while_a_batch_is_under_way_is_not_let_go_of_with_it() {
    let rig = rig(|_| ());
    let (fault, release) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    rig.put_as("k", 2, "b");
    eventually(|| rig.backend.calls(Call::Commit) == 1).await;
    let (fault, again) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    rig.put_as("k", 1, "a");
    rig.put_as("k", 3, "c");
    release.notify_one();
    eventually(|| rig.backend.calls(Call::Commit) == 2).await;
    assert_eq!(rig.queue.shared.budget.claimed().0, 2, "those of the second batch");
    assert_eq!((rig.remembered("b").await, rig.remembered("a").await), (Some(2), None));
    again.notify_one();
    rig.empty().await;
    assert_eq!(
        (rig.remembered("a").await, rig.remembered("c").await),
        (Some(1), Some(3))
    );
}

#[tokio::test(start_paused = true)]
async fn the_ids_of_what_was_overtaken_are_remembered_by_themselves() {
    let rig = rig(|_| ());
    let release = rig.hang_commit().await;
    rig.put_as("k", 1, "a");
    rig.put_as("k", 2, "b");
    rig.queue.overtake(&key("k"), version(5));
    // One that was on its way then.
    let late = write_as("k", 4, "late");
    let passage = rig.queue.enter(&late.key);
    rig.queue.overtake(&key("k"), version(5));
    let held = rig.held(&late);
    assert!(!rig.queue.accept(late, held, passage, Duration::ZERO));
    assert_eq!((rig.pending("k"), rig.queue.stats().entries), (None, 1 + 3));
    rig.backend
        .inject(Call::Remember, Fault::fail(StoreErrorKind::Transient));
    rig.backend.inject(Call::Remember, Fault::lose_reply());
    release.notify_one();
    rig.empty().await;
    let known = [
        rig.remembered("a").await,
        rig.remembered("b").await,
        rig.remembered("late").await,
    ];
    assert_eq!(known, [Some(1), Some(2), Some(4)]);
    assert_eq!((rig.backend.calls(Call::Remember), rig.history("k").len()), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn an_id_whose_slot_is_gone_while_a_batch_has_it_is_remembered_once_that_fails() {
    let rig = rig(|_| ());
    let (fault, release) = Fault::hang();
    rig.backend.inject(Call::Commit, fault.clone());
    rig.put_as("k", 1, "a");
    eventually(|| rig.backend.calls(Call::Commit) == 1).await;
    rig.queue.overtake(&key("k"), version(5));
    sleep(Duration::from_secs(1)).await;
    assert_eq!((rig.backend.calls(Call::Remember), rig.queue.stats().entries), (0, 1));
    // Nobody releases it: the call is cut off, and its outcome is unknown.
    drop(release);
    rig.empty().await;
    assert_eq!((rig.remembered("a").await, rig.history("k").len()), (Some(1), 0));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_takes_no_ids_holds_up_no_writes() {
    let rig = rig(|_| ());
    let broken = Arc::new(AtomicBool::new(true));
    let refuses = Arc::clone(&broken);
    rig.backend.script(move |call| {
        let fails = call == Call::Remember && refuses.load(Ordering::Relaxed);
        fails.then(|| Fault::fail(StoreErrorKind::Rejected))
    });
    let release = rig.hang_commit().await;
    rig.put_as("k", 1, "a");
    rig.queue.overtake(&key("k"), version(5));
    release.notify_one();
    eventually(|| rig.backend.calls(Call::Remember) > 0).await;
    let started = Instant::now();
    rig.put("good", 1);
    eventually(|| rig.standing("good") == Some(1)).await;
    assert!(started.elapsed() < Duration::from_millis(50));
    sleep(Duration::from_secs(600)).await;
    let tries = rig.backend.calls(Call::Remember);
    assert!((60..140).contains(&tries), "{tries} tries in ten minutes");
    broken.store(false, Ordering::Relaxed);
    rig.empty().await;
    assert_eq!(rig.remembered("a").await, Some(1));
}

#[tokio::test(start_paused = true)]
async fn the_ids_of_a_dead_letter_are_let_go_of_for_it_was_not_written() {
    let rig = rig(|_| ());
    rig.backend.reject(|write| write.key.key() == "poison");
    rig.backend.inject(Call::Bury, Fault::fail(StoreErrorKind::Transient));
    let release = rig.hang_commit().await;
    rig.put_as("poison", 1, "a");
    rig.put_as("poison", 2, "b");
    release.notify_one();
    rig.empty().await;
    assert_eq!(rig.dead(), BTreeSet::from(["poison".to_owned()]));
    assert_eq!((rig.remembered("a").await, rig.remembered("b").await), (None, None));
}

#[tokio::test(start_paused = true)]
async fn more_ids_than_a_batch_may_have_go_before_their_write_in_pieces() {
    let rig = rig(|config| config.drain_batch_writes_max = bound(10));
    let release = rig.hang_commit().await;
    for number in 1..=35 {
        rig.put_as("k", number, &format!("r{number}"));
    }
    rig.backend.inject(Call::Remember, Fault::default());
    rig.backend.inject(Call::Remember, Fault::fail(StoreErrorKind::Unknown));
    release.notify_one();
    eventually(|| rig.backend.calls(Call::Remember) == 2).await;
    assert_eq!(rig.history("k").len(), 0, "not before its ids");
    rig.empty().await;
    assert_eq!((rig.history("k"), rig.backend.calls(Call::Remember)), (vec![35], 2 + 4));
    for number in 1..=35 {
        assert_eq!(rig.remembered(&format!("r{number}")).await, Some(number));
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_counts_ids_as_it_counts_writes() {
    let rig = rig(|config| config.drain_batch_writes_max = bound(10));
    let release = rig.hang_commit().await;
    for number in 0..12 {
        rig.put_as(&format!("k{number:02}"), 1, &format!("r{number}"));
    }
    release.notify_one();
    rig.empty().await;
    let sizes: Vec<usize> = rig.backend.commits().iter().map(|batch| batch.writes.len()).collect();
    assert_eq!(sizes, [1, 5, 5, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_closing_queue_waits_for_ids_too() {
    let rig = rig(|_| ());
    rig.backend.down(true);
    rig.put_as("k", 1, "a");
    rig.put_as("k", 2, "b");
    rig.queue.overtake(&key("k"), version(5));
    rig.queue.close();
    let left = rig.queue.drained(Instant::now() + Duration::from_secs(5)).await;
    assert_eq!((left.entries, left.lost), (2, 2));
    rig.backend.down(false);
    let left = rig.queue.drained(Instant::now() + Duration::from_millis(1_100)).await;
    assert_eq!((left.entries, rig.remembered("a").await), (0, Some(1)));
}

/// Seeded: writes with and without ids, few keys, overtaken now and then, over a store that fails in every way. In the end the store remembers
/// each id that was accepted, with its own version, and nothing is held.
#[tokio::test(start_paused = true)]
async fn every_accepted_id_ends_in_the_store_or_with_a_dead_letter_in_a_storm() {
    for seed in 0..20 {
        let rig = rig(|config| {
            config.drain_workers = bound(3);
            config.drain_batch_writes_max = bound(6);
        });
        rig.backend.script(faults(seed));
        rig.backend
            .reject(|write| write.key.key() == "k3" && write.entry.version.get() % 5 == 0);
        let mut random = StdRng::seed_from_u64(seed);
        let mut accepted = Vec::new();
        for number in 1..=400_i64 {
            let name = format!("k{}", random.random_range(0..5));
            // Now and then one that was stamped before, and comes late.
            let number = number * 10 - random.random_range(0..3) * 15;
            match random.random_range(0..10) {
                0 => {
                    rig.backend.put(write(&name, number.max(1)));
                    rig.queue.overtake(&key(&name), version(number.max(1)));
                }
                1..4 => rig.put(&name, number.max(1)),
                _ => {
                    let request = format!("r{}", accepted.len());
                    rig.put_as(&name, number.max(1), &request);
                    accepted.push((name, request, number.max(1)));
                }
            }
            if random.random_range(0..4) == 0 {
                sleep(Duration::from_millis(random.random_range(0..30))).await;
            }
        }
        rig.queue.close();
        let left = rig.queue.drained(Instant::now() + LONG).await;
        assert_eq!(left.entries, 0, "seed {seed}");
        rig.backend.script(|_| None);
        assert!(accepted.len() > 100, "seed {seed}");
        let letters = rig.backend.dead_letters();
        let is_covered = |name: &str, number: i64| {
            let covers =
                |letter: &DeadLetter| letter.write.key == key(name) && letter.write.entry.version >= version(number);
            letters.iter().any(covers)
        };
        for (name, request, number) in accepted {
            let remembered = rig.remembered(&request).await;
            let was_let_go = remembered.is_none() && is_covered(&name, number);
            assert!(
                was_let_go || remembered == Some(number),
                "seed {seed}: {request} {remembered:?}"
            );
        }
    }
}
