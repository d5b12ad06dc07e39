//! Write-behind on the journal, and what a restart brings back: nothing shows before it is on disk, and nothing recovered hides what is
//! newer. In real time, for the journal has a thread.

use std::sync::mpsc;

use super::*;
use crate::{
    model::Version,
    queue::journal::sim::{Faults, Loss, SimFs},
    store::StoreErrorKind,
};

use ReadConsistency::Store as Stored;

const EVERY: [ReadConsistency; 3] = [Cached, Shared, Stored];

/// A gateway whose write-behind rests on a journal on this disk.
fn rig_of(disk: &SimFs) -> Rig {
    let (journal, recovered) = sim::open(disk);
    rig(|setup| {
        setup.namespace.durability = BehindDurability::Journal;
        setup.queue.retry_backoff_max = Duration::from_millis(50);
        setup.journal = journal;
        setup.recovered = recovered.writes;
    })
}

/// A gateway that starts after one has died that had accepted writes and given none to the store. The versions that these got.
async fn after_a_crash(names: &[&str]) -> (Rig, Vec<Version>) {
    let disk = SimFs::default();
    let died = rig_of(&disk);
    died.fake.script(refusing(Call::Commit));
    let mut versions = Vec::new();
    for name in names {
        versions.push(died.put(name, "recovered", Behind).await);
    }
    // Whatever was not synced is gone.
    let crashed = SimFs::new(disk.disk().crashed(&Loss::All), Faults::default());
    (rig_of(&crashed), versions)
}

/// Has every call of these kinds refused for a reason that will pass.
fn refusing(refused: Call) -> impl FnMut(Call) -> Option<Fault> + Send + 'static {
    move |call| (call == refused).then(|| Fault::fail(StoreErrorKind::Transient))
}

impl Rig {
    async fn outcome(&self, name: &str, mode: WriteMode) -> Result<Written, (ErrorKind, Outcome)> {
        let outcome = self.putting(name, "value", mode).await.expect("no panic");
        outcome.map_err(|error| (error.kind(), error.outcome()))
    }

    /// Puts, write-behind, and stops the disk until the sender is dropped: the write is stamped, and not synced.
    async fn putting_slowly(
        &self,
        name: &str,
        value: &str,
        disk: &SimFs,
    ) -> (JoinHandle<Result<Written, Error>>, mpsc::Sender<()>) {
        // The journal needs the disk to begin with.
        self.put("first", "value", Behind).await;
        let (go_on, stopped) = mpsc::channel::<()>();
        let (said, reached) = mpsc::channel();
        disk.set_probe(Box::new(move |_| {
            let _ = said.send(());
            let _ = stopped.recv();
        }));
        let last = self.clock().stamp(None).expect("there is a lease");
        let next = Version::new(last.get() + (1 << NODE_BITS)).expect("positive");
        let writing = self.putting(name, value, Behind);
        eventually(|| self.clock().stamped_since(next)).await;
        tokio::task::spawn_blocking(move || reached.recv())
            .await
            .expect("no panic")
            .expect("the disk is asked");
        (writing, go_on)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_shows_before_it_is_on_disk() {
    let disk = SimFs::default();
    let rig = rig_of(&disk);
    let before = rig.put("k", "before", Behind).await;
    rig.drained().await;
    let (writing, go_on) = rig.putting_slowly("k", "after", &disk).await;
    for consistency in EVERY {
        let found = rig.get("k", consistency).await.expect("a tier answers");
        assert_eq!(found.entry.map(|entry| entry.version), Some(before), "{consistency:?}");
    }
    assert!(!writing.is_finished());
    drop(go_on);
    let after = writing.await.expect("no panic").expect("written");
    assert_eq!(after.durability, Durability::Journal);
    for consistency in EVERY {
        let found = rig.get("k", consistency).await.expect("a tier answers");
        assert_eq!(
            found.entry.map(|entry| entry.version),
            Some(after.version),
            "{consistency:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_behind_does_not_land_after_a_newer_one_that_was_evicted_since() {
    let disk = SimFs::default();
    let rig = rig_of(&disk);
    // So that it stays pending, and nothing takes it out of L1 if it gets there.
    rig.fake.script(refusing(Call::Commit));
    let (writing, go_on) = rig.putting_slowly("k", "ours", &disk).await;
    rig.put_past("k", "theirs", rig.ahead(Duration::from_secs(3600)));
    assert_eq!(rig.read("k", Cached).await.0.as_deref(), Some("theirs"));
    rig.evict("k");
    drop(go_on);
    let ours = writing.await.expect("no panic").expect("written").version;
    let pending = rig.queue().pending(&key("k")).map(|pending| pending.entry.version);
    assert_eq!(pending, Some(ours));
    assert_eq!(rig.parts().memory.version(&key("k")), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_behind_that_is_superseded_on_its_way_leaves_neither_itself_nor_anything_older_in_l1() {
    for landed in [false, true] {
        let disk = SimFs::default();
        let rig = rig_of(&disk);
        let older = rig.put("k", "older", Through).await;
        let (writing, go_on) = rig.putting_slowly("k", "slow", &disk).await;
        let newer = if landed {
            rig.put("k", "newer", Through).await
        } else {
            // A write-through that is committed, and has not told L1.
            let newer = rig.ahead(Duration::from_secs(1));
            rig.queue().overtake(&key("k"), newer);
            newer
        };
        drop(go_on);
        let slow = writing.await.expect("no panic").expect("written").version;
        assert!(older < slow && slow < newer);
        assert_eq!(rig.parts().memory.version(&key("k")), landed.then_some(newer));
    }
}

#[tokio::test]
async fn a_write_whose_sync_fails_is_unknown_and_never_shows_and_all_but_write_behind_goes_on() {
    let disk = SimFs::default();
    let rig = rig_of(&disk);
    rig.fake.script(refusing(Call::Commit));
    let before = rig.put("k", "before", Behind).await;
    disk.set_faults(Faults {
        fail_at: Some(1),
        for_ever: true,
        ..Faults::default()
    });
    assert_eq!(
        rig.outcome("k", Behind).await,
        Err((ErrorKind::Unavailable, Outcome::Unknown))
    );
    assert_eq!(
        rig.outcome("k", Behind).await,
        Err((ErrorKind::Unavailable, Outcome::NotApplied))
    );
    assert_eq!(rig.queue().journal_state(), journal::State::Failed);
    assert_eq!(rig.read("k", Cached).await, (some("before"), Source::L1));
    rig.fake.script(|_| None);
    rig.drained().await;
    assert_eq!(
        rig.fake.history(&key("k")),
        [before],
        "what was accepted before still drains"
    );
    assert!(rig.outcome("k", Through).await.is_ok());
}

#[tokio::test]
async fn what_is_recovered_never_hides_what_is_newer() {
    let (rig, versions) = after_a_crash(&["superseded", "alone"]).await;
    // The store answers reads, and takes no commit yet.
    rig.fake.script(refusing(Call::Commit));
    let newer = rig.ahead(Duration::from_secs(1));
    rig.put_past("superseded", "newer", newer);
    for consistency in EVERY {
        assert_eq!(
            rig.read("superseded", consistency).await.0,
            some("newer"),
            "{consistency:?}"
        );
        let alone = rig.get("alone", consistency).await.expect("a tier answers");
        assert_eq!(
            alone.entry.map(|entry| entry.version),
            Some(versions[1]),
            "{consistency:?}"
        );
        assert!(!alone.stale, "the store was asked");
    }
    rig.fake.script(|_| None);
    rig.drained().await;
    assert_eq!(rig.fake.history(&key("superseded")), [newer]);
    assert_eq!(rig.fake.history(&key("alone")), [versions[1]]);
}

#[tokio::test]
async fn while_the_store_is_down_what_is_recovered_is_served_and_marked() {
    let (rig, versions) = after_a_crash(&["k"]).await;
    rig.fake.down(true);
    for consistency in [Cached, Shared, Cached] {
        let found = rig.get("k", consistency).await.expect("it is known here");
        assert_eq!(found.entry.map(|entry| entry.version), Some(versions[0]));
        assert_eq!((found.source, found.stale), (Source::Pending, true), "{consistency:?}");
    }
    let refused = rig.get("k", Stored).await.expect_err("only the store may answer");
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
    rig.fake.down(false);
    rig.drained().await;
    let found = rig.get("k", Cached).await.expect("a tier answers");
    assert_eq!(
        (found.entry.map(|entry| entry.version), found.stale),
        (Some(versions[0]), false)
    );
}

#[tokio::test]
async fn a_write_after_a_restart_is_above_what_is_recovered() {
    let (rig, versions) = after_a_crash(&["k", "l"]).await;
    for (name, mode, recovered) in [("k", Behind, versions[0]), ("l", Through, versions[1])] {
        assert!(rig.put(name, "after", mode).await > recovered);
        assert_eq!(rig.read(name, Cached).await.0, some("after"));
    }
    rig.drained().await;
    assert_eq!((rig.stored("k"), rig.stored("l")), (some("after"), some("after")));
}
