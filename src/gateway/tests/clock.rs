//! A gateway whose clock and the store's are too far apart: it writes nothing, and reads.

use super::*;
use crate::{clock::ClockOffset, error::Outcome};

#[tokio::test(start_paused = true)]
async fn with_a_clock_that_is_off_nothing_is_written_and_all_is_read() {
    let rig = rig(|_| ());
    rig.put("known", "value", WriteMode::Through).await;
    for millis in [10_001, -10_001] {
        rig.clock().set_offset(ClockOffset(millis));
        let commits = rig.fake.calls(Call::Commit);
        for mode in [WriteMode::Through, WriteMode::Behind] {
            let refused = rig.putting("known", "other", mode).await.expect("no panic");
            let refused = refused.expect_err("no version can be stamped");
            assert_eq!(
                (refused.kind(), refused.outcome()),
                (ErrorKind::Unavailable, Outcome::NotApplied)
            );
            assert!(refused.message().contains("the store's"), "{refused}");
        }
        assert_eq!(rig.fake.calls(Call::Commit), commits, "nothing was sent");
        for consistency in [Cached, Shared, ReadConsistency::Store] {
            assert_eq!(rig.read("known", consistency).await.0, some("value"));
        }
    }
    rig.clock().set_offset(ClockOffset(10_000));
    rig.put("known", "other", WriteMode::Behind).await;
    assert_eq!(rig.read("known", Cached).await.0, some("other"));
}

#[tokio::test(start_paused = true)]
async fn a_write_behind_without_a_stamp_is_refused_before_it_waits_for_room() {
    let (rig, _stuck) = full(QueueFull::Wait).await;
    rig.clock().set_offset(ClockOffset(60_000));
    let begun = Instant::now();
    let refused = rig.putting("more", "value", WriteMode::Behind).await.expect("no panic");
    assert_eq!(
        refused.expect_err("no version can be stamped").kind(),
        ErrorKind::Unavailable
    );
    assert_eq!(begun.elapsed(), Duration::ZERO);
}
