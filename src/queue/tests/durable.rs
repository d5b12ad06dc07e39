//! What rests on the journal: it is held until the store has it, and comes back where the process ends before. In real time, for the
//! journal has a thread.

use super::{ids::write_as, *};
use crate::queue::journal::sim::{Faults, Loss, SimFs};

/// Longer than anything takes here.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// A rig over a disk, with what lies there, and a store that takes nothing until it is told to.
fn rig_of(disk: &SimFs) -> Rig {
    let (journal, recovered) = sim::open(disk);
    let rig = rig_on(FakeBackend::new(), (journal, recovered.writes), |config| {
        config.retry_backoff_max = Duration::from_millis(50);
    });
    rig.hold();
    rig
}

/// The versions that a start would recover if the power failed now, by key.
fn recovered(disk: &SimFs) -> BTreeMap<String, i64> {
    let crashed = SimFs::new(disk.disk().crashed(&Loss::All), Faults::default());
    let (_, recovered) = sim::open(&crashed);
    let mut newest = BTreeMap::new();
    for (write, _) in &recovered.writes {
        let version = newest.entry(write.key.key().to_owned()).or_default();
        *version = write.entry.version.get().max(*version);
    }
    newest
}

fn only(name: &str, version: i64) -> BTreeMap<String, i64> {
    BTreeMap::from([(name.to_owned(), version)])
}

impl Rig {
    fn hold(&self) {
        let refuse = || Fault::fail(StoreErrorKind::Transient);
        self.backend.script(move |call| (call == Call::Commit).then(refuse));
    }

    fn free(&self) {
        self.backend.script(|_| None);
    }

    async fn claim(&self, name: &str, durability: BehindDurability) -> Claim {
        let write = write(name, 1);
        let admitted = self
            .queue
            .admit(&write.key, write.content_bytes(), durability, QueueFull::Reject, soon());
        match admitted.await.expect("room") {
            Admission::Granted(claim) => claim,
            Admission::WriteThrough => unreachable!("not asked for"),
        }
    }

    async fn append(&self, claim: Claim, name: &str, version: i64) -> Held {
        let (lane, write) = (self.queue.lane(), write(name, version));
        let appended = self.queue.append(&lane, claim, &write, soon()).await;
        appended.expect("the disk works")
    }

    fn accept(&self, held: Held, name: &str, version: i64) -> bool {
        let write = write(name, version);
        let passage = self.queue.enter(&write.key);
        self.queue.accept(write, held, passage, Duration::ZERO)
    }

    /// The whole way of a write; whether it is in the journal.
    async fn write(&self, name: &str, version: i64, durability: BehindDurability) -> bool {
        let claim = self.claim(name, durability).await;
        let held = self.append(claim, name, version).await;
        let journaled = held.is_journaled();
        assert!(self.accept(held, name, version));
        journaled
    }
}

#[tokio::test]
async fn a_write_is_in_the_journal_from_before_it_shows_until_the_store_has_it() {
    let disk = SimFs::default();
    let rig = rig_of(&disk);
    let claim = rig.claim("k", BehindDurability::Journal).await;
    let held = rig.append(claim, "k", 1).await;
    assert_eq!((recovered(&disk), rig.pending("k")), (only("k", 1), None));
    rig.accept(held, "k", 1);
    assert!(rig.write("k", 2, BehindDurability::Journal).await);
    assert_eq!(recovered(&disk), only("k", 2));
    rig.free();
    rig.queue.close();
    assert_eq!(rig.queue.drained(soon()).await.entries, 0);
    rig.queue.close_journal().await.expect("the disk works");
    assert_eq!((rig.standing("k"), recovered(&disk)), (Some(2), BTreeMap::new()));
}

#[tokio::test]
async fn what_is_left_at_the_end_stays_in_the_journal_and_what_is_lost_is_counted() {
    let disk = SimFs::default();
    let rig = rig_of(&disk);
    assert!(rig.write("j", 1, BehindDurability::Journal).await);
    assert!(!rig.write("m", 2, BehindDurability::Memory).await);
    rig.queue.close();
    let left = rig.queue.drained(Instant::now()).await;
    assert_eq!((left.entries, left.lost), (2, 1));
    rig.queue.close_journal().await.expect("the disk works");
    assert_eq!(recovered(&disk), only("j", 1));
}

#[tokio::test]
async fn a_memory_write_over_a_journaled_one_is_journaled() {
    let disk = SimFs::default();
    let rig = rig_of(&disk);
    assert!(!rig.write("k", 1, BehindDurability::Memory).await);
    assert!(rig.write("k", 2, BehindDurability::Journal).await);
    assert!(rig.write("k", 3, BehindDurability::Memory).await);
    assert_eq!(recovered(&disk), only("k", 3));
}

#[tokio::test]
async fn no_write_that_rests_on_memory_uncovers_one_that_does_not() {
    // Both were admitted before either was pending; whichever comes last, and whichever is newer.
    for (memory, journaled, memory_first) in [(2, 1, true), (2, 1, false), (1, 2, true), (1, 2, false)] {
        let disk = SimFs::default();
        let rig = rig_of(&disk);
        let claims = [
            (memory, rig.claim("k", BehindDurability::Memory).await),
            (journaled, rig.claim("k", BehindDurability::Journal).await),
        ];
        let mut held = Vec::new();
        for (version, claim) in claims {
            held.push((version, rig.append(claim, "k", version).await));
        }
        if !memory_first {
            held.reverse();
        }
        for (version, held) in held {
            rig.accept(held, "k", version);
        }
        assert_eq!(rig.pending("k"), Some(2));
        assert_eq!(recovered(&disk), only("k", journaled));
        rig.free();
        rig.empty().await;
        rig.queue.close_journal().await.expect("the disk works");
        assert_eq!(recovered(&disk), BTreeMap::new(), "and it leaves with the newer one");
    }
}

#[tokio::test]
async fn of_those_that_a_memory_write_covers_the_newest_stays_in_the_journal() {
    for (first, second) in [(1, 2), (2, 1)] {
        let disk = SimFs::default();
        let rig = rig_of(&disk);
        let claims = [
            rig.claim("k", BehindDurability::Memory).await,
            rig.claim("k", BehindDurability::Journal).await,
            rig.claim("k", BehindDurability::Journal).await,
        ];
        // The two are appended the other way around than they were stamped.
        let mut held = BTreeMap::new();
        for (version, claim) in [3, 2, 1].into_iter().zip(claims) {
            held.insert(version, rig.append(claim, "k", version).await);
        }
        for version in [3, first, second] {
            let held = held.remove(&version).expect("appended");
            assert_eq!(rig.accept(held, "k", version), version == 3);
        }
        // What is released is told with the next group.
        rig.write("other", 9, BehindDurability::Journal).await;
        assert_eq!(recovered(&disk).get("k"), Some(&2), "accepted {first} before {second}");
        rig.queue.close();
        let left = rig.queue.drained(Instant::now()).await;
        assert_eq!(
            (left.entries, left.lost),
            (2, 1),
            "the covering one is not in the journal"
        );
    }
}

#[tokio::test]
async fn what_is_recovered_is_unconfirmed_until_the_store_has_it_and_pending_until_it_is_published() {
    let disk = SimFs::default();
    let first = rig_of(&disk);
    for (name, version) in [("a", 1), ("b", 2), ("c", 3)] {
        first.write(name, version, BehindDurability::Journal).await;
    }
    let crashed = SimFs::new(disk.disk().crashed(&Loss::All), Faults::default());
    let mut rig = rig_of(&crashed);
    let unconfirmed = |name| rig.queue.pending(&key(name)).map(|pending| pending.unconfirmed);
    assert_eq!([unconfirmed("a"), unconfirmed("b"), unconfirmed("c")], [Some(true); 3]);
    // One has got a newer write here, and one elsewhere.
    rig.write("b", 5, BehindDurability::Journal).await;
    assert_eq!(
        rig.queue.pending(&key("b")).map(|pending| pending.unconfirmed),
        Some(false)
    );
    rig.backend.put(write("c", 9));
    rig.free();
    let mut told = Vec::new();
    for _ in 0..2 {
        told.push(timeout(LONG, rig.notices.recv()).await.expect("told").expect("open"));
    }
    assert!(told.contains(&Notice::Confirmed(write("a", 1))), "{told:?}");
    assert!(
        told.iter()
            .any(|notice| matches!(notice, Notice::Dropped(dropped) if dropped.key == key("c"))),
        "{told:?}"
    );
    assert_eq!(rig.standing("a"), Some(1));
    assert_eq!(rig.pending("a"), Some(1), "until it is published");
    rig.queue.published(&key("a"), version(1));
    rig.empty().await;
    assert_eq!(rig.standing("b"), Some(5));
    rig.queue.close_journal().await.expect("the disk works");
    assert_eq!(recovered(&crashed), BTreeMap::new());
}

#[tokio::test]
async fn a_newer_write_that_comes_while_a_recovered_one_is_published_is_drained_after_it() {
    let disk = SimFs::default();
    rig_of(&disk).write("k", 1, BehindDurability::Journal).await;
    let mut rig = rig_of(&SimFs::new(disk.disk().crashed(&Loss::All), Faults::default()));
    rig.free();
    let told = timeout(LONG, rig.notices.recv()).await.expect("told");
    assert_eq!(told, Some(Notice::Confirmed(write("k", 1))));
    rig.write("k", 2, BehindDurability::Journal).await;
    rig.queue.published(&key("k"), version(1));
    rig.empty().await;
    assert_eq!(rig.history("k"), [1, 2]);
}

#[tokio::test]
async fn more_may_be_recovered_than_is_admitted() {
    let disk = SimFs::default();
    let first = rig_of(&disk);
    for number in 0..20 {
        first
            .write(&format!("k{number}"), 1 + number, BehindDurability::Journal)
            .await;
    }
    let crashed = SimFs::new(disk.disk().crashed(&Loss::All), Faults::default());
    let (journal, recovered) = sim::open(&crashed);
    let mut rig = rig_on(FakeBackend::new(), (journal, recovered.writes), |config| {
        config.entries_max = bound(2)
    });
    rig.hold();
    assert_eq!(rig.queue.stats().entries, 20);
    let new = key("new");
    let refused = (rig.queue).admit(&new, 0, BehindDurability::Journal, QueueFull::Reject, soon());
    assert_eq!(
        refused.await.expect_err("there is no room").kind(),
        ErrorKind::Overloaded
    );
    rig.free();
    for _ in 0..20 {
        let Some(Notice::Confirmed(write)) = timeout(LONG, rig.notices.recv()).await.expect("told") else {
            panic!("each is confirmed");
        };
        rig.queue.published(&write.key, write.entry.version);
    }
    rig.empty().await;
    drop(rig.claim("new", BehindDurability::Journal).await);
}

#[tokio::test]
async fn a_full_journal_is_a_full_queue() {
    let rig = rig_of(&SimFs::default());
    let value = Bytes::from(vec![7; 7 << 10]);
    let lane = rig.queue.lane();
    let mut held = Vec::new();
    let admit = |full, wait| {
        let (queue, key, value) = (rig.queue.clone(), key("k"), value.clone());
        async move {
            let deadline = Instant::now() + wait;
            queue
                .admit(&key, value.len(), BehindDurability::Journal, full, deadline)
                .await
        }
    };
    let refused = loop {
        match admit(QueueFull::Reject, Duration::from_secs(30)).await {
            Ok(Admission::Granted(claim)) => {
                let mut write = write(&format!("k{}", held.len()), 1);
                write.entry.value = Some(value.clone());
                let appended = rig.queue.append(&lane, claim, &write, soon()).await;
                held.push(appended.expect("the disk works"));
            }
            Ok(Admission::WriteThrough) => unreachable!("not asked for"),
            Err(error) => break error,
        }
    };
    assert_eq!(
        (refused.kind(), refused.outcome()),
        (ErrorKind::Overloaded, Outcome::NotApplied)
    );
    assert!(refused.retry_delay().is_some());
    assert_eq!(rig.queue.journal_state(), State::Full);
    let through = admit(QueueFull::WriteThrough, Duration::from_secs(30)).await;
    assert!(matches!(through, Ok(Admission::WriteThrough)));
    let waited = admit(QueueFull::Wait, Duration::from_millis(50))
        .await
        .expect_err("nothing is released");
    assert_eq!(
        (waited.kind(), waited.outcome()),
        (ErrorKind::Timeout, Outcome::NotApplied)
    );
    let waiting = tokio::spawn(admit(QueueFull::Wait, Duration::from_secs(30)));
    held.drain(8..).for_each(Held::release);
    assert!(matches!(waiting.await.expect("no panic"), Ok(Admission::Granted(_))));
    // What rests on memory needs none of it.
    assert!(!rig.write("m", 1, BehindDurability::Memory).await);
}

#[tokio::test]
async fn when_the_journal_has_failed_what_rests_on_memory_goes_on() {
    let disk = SimFs::default();
    let rig = rig_of(&disk);
    let before = rig.claim("j", BehindDurability::Journal).await;
    disk.set_faults(Faults {
        fail_at: Some(1),
        for_ever: true,
        ..Faults::default()
    });
    let (lane, write) = (rig.queue.lane(), write("j", 1));
    let failed = rig.queue.append(&lane, before, &write, soon()).await;
    // Of unknown outcome, unless the journal met the fault before it took the record, making its next file ready.
    assert_eq!(failed.expect_err("the disk fails").kind(), ErrorKind::Unavailable);
    assert_eq!(rig.queue.journal_state(), State::Failed);
    let key = key("j");
    for full in [QueueFull::Wait, QueueFull::Reject, QueueFull::WriteThrough] {
        let refused = rig.queue.admit(&key, 0, BehindDurability::Journal, full, soon()).await;
        let refused = refused.expect_err("it takes nothing more");
        assert_eq!(
            (refused.kind(), refused.outcome()),
            (ErrorKind::Unavailable, Outcome::NotApplied)
        );
    }
    assert!(!rig.write("m", 2, BehindDurability::Memory).await);
    rig.free();
    rig.empty().await;
    assert_eq!((rig.standing("m"), rig.standing("j")), (Some(2), None));
}

#[tokio::test]
async fn the_ids_of_all_accepted_writes_come_back_until_the_store_has_them() {
    let disk = SimFs::default();
    let first = rig_of(&disk);
    let versions = [("a", 1), ("c", 3), ("b", 2)];
    for (request, number) in versions {
        let (lane, write) = (first.queue.lane(), write_as("k", number, request));
        let admitted = (first.queue).admit(
            &write.key,
            write.content_bytes(),
            BehindDurability::Journal,
            QueueFull::Reject,
            soon(),
        );
        let Ok(Admission::Granted(claim)) = admitted.await else {
            panic!("there is room")
        };
        let held = first
            .queue
            .append(&lane, claim, &write, soon())
            .await
            .expect("the disk works");
        let passage = first.queue.enter(&write.key);
        first.queue.accept(write, held, passage, Duration::ZERO);
    }
    // One without an id, which stands for all of them; and one that is superseded in the store.
    first.write("k", 4, BehindDurability::Journal).await;
    let crashed = SimFs::new(disk.disk().crashed(&Loss::All), Faults::default());
    let mut rig = rig_of(&crashed);
    assert_eq!((rig.pending("k"), rig.queue.stats().entries), (Some(4), 4));
    rig.free();
    let told = timeout(LONG, rig.notices.recv()).await.expect("told").expect("open");
    assert!(
        matches!(&told, Notice::Confirmed(confirmed) if confirmed.entry == write("k", 4).entry),
        "{told:?}"
    );
    assert_eq!(rig.queue.stats().entries, 1, "the ids have left");
    rig.queue.published(&key("k"), version(4));
    rig.empty().await;
    for (request, number) in versions {
        assert_eq!(rig.remembered(request).await, Some(number));
    }
    rig.queue.close_journal().await.expect("the disk works");
    assert_eq!(recovered(&crashed), BTreeMap::new());
}

#[tokio::test]
async fn a_memory_write_with_an_older_id_beside_it_uncovers_nothing() {
    let disk = SimFs::default();
    let rig = rig_of(&disk);
    let memory = rig.claim("k", BehindDurability::Memory).await;
    let (lane, older) = (rig.queue.lane(), write_as("k", 1, "a"));
    let room = (rig.queue).admit(
        &older.key,
        older.content_bytes(),
        BehindDurability::Journal,
        QueueFull::Reject,
        soon(),
    );
    let Ok(Admission::Granted(claim)) = room.await else {
        panic!("there is room")
    };
    let held = rig
        .queue
        .append(&lane, claim, &older, soon())
        .await
        .expect("the disk works");
    let passage = rig.queue.enter(&older.key);
    rig.queue.accept(older, held, passage, Duration::ZERO);
    let held = rig.append(memory, "k", 2).await;
    rig.accept(held, "k", 2);
    assert_eq!(recovered(&disk), only("k", 1));
    assert!(
        rig.write("k", 3, BehindDurability::Memory).await,
        "over one that is journaled it is, too"
    );
    // What is released is told with the next group.
    rig.write("other", 9, BehindDurability::Journal).await;
    let left = rig.queue.stats().entries;
    assert_eq!((recovered(&disk).get("k"), left), (Some(&3), 3));
    rig.free();
    rig.empty().await;
    assert_eq!((rig.standing("k"), rig.remembered("a").await), (Some(3), Some(1)));
}
