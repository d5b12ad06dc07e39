//! What other gateways write ends what this one knows, and while it may not have been heard L1 neither answers nor is filled, and no read
//! shares an older read's load. The subscription itself is tested against a real Redis, in `tests/it/channel.rs`.

use super::*;
use crate::{cache::message::Message, store::StoreErrorKind};

/// A gateway whose L1 is on only while what others write is heard.
fn gated() -> Rig {
    let rig = rig(|_| ());
    rig.parts().memory.gate();
    rig
}

impl Rig {
    /// A beat that was sent just now was heard.
    fn hear_beat(&self) {
        self.look_at_control();
        self.gateway.trust_since(Instant::now());
    }

    /// The control row says what it said before.
    fn look_at_control(&self) {
        self.parts().sharing.asked(self.clock().now());
    }

    async fn hear(&self, message: Message) {
        self.gateway.heed_message(message).await.expect("no panic");
    }

    /// Another gateway writes, and so far nobody told. Its version.
    fn written_elsewhere(&self, name: &str, value: &str) -> Version {
        let version = self.clock().stamp(None).expect("leased");
        self.put_past(name, value, version);
        version
    }

    fn loads(&self) -> usize {
        self.fake.calls(Call::Load)
    }
}

fn written(name: &str, version: Version) -> Message {
    Message::Written {
        key: key(name),
        version,
        kind: ChangeKind::Put,
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_elsewhere_ends_an_older_copy_and_an_absence_and_no_newer_copy() {
    let rig = rig(|_| ());
    rig.put("copy", "before", Through).await;
    assert_eq!(rig.read("absence", Cached).await, (None, Source::Store));
    assert_eq!(rig.read("absence", Cached).await, (None, Source::L1));
    for name in ["copy", "absence"] {
        let version = rig.written_elsewhere(name, "theirs");
        rig.hear(written(name, version)).await;
        assert_eq!(rig.read(name, Cached).await, (some("theirs"), Source::Store), "{name}");
        rig.put(name, "ours", Through).await;
        rig.hear(written(name, version)).await;
        assert_eq!(rig.read(name, Cached).await, (some("ours"), Source::L1), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_written_after_a_message_was_heard_is_above_it() {
    let rig = rig(|_| ());
    let theirs = rig.ahead(Duration::from_secs(5));
    rig.hear(written("k", theirs)).await;
    assert!(rig.put("k", "ours", Behind).await > theirs);
}

#[tokio::test(start_paused = true)]
async fn what_is_withdrawn_or_invalidated_elsewhere_is_asked_for_anew() {
    let rig = rig(|_| ());
    let version = rig.put("k", "value", Through).await;
    rig.put("other", "value", Through).await;
    let prefix = |namespace: &str, prefix: &str| Message::InvalidatedPrefix {
        namespace: namespace.to_owned(),
        prefix: prefix.to_owned(),
    };
    let dropped = |version| Message::Dropped { key: key("k"), version };
    let another = rig.ahead(Duration::ZERO);
    for (message, source) in [
        (dropped(version), Source::Store),
        (dropped(another), Source::L1),
        (Message::Invalidated { key: key("k") }, Source::Store),
        (Message::Invalidated { key: key("other") }, Source::L1),
        (prefix("test", "k"), Source::Store),
        (prefix("test", ""), Source::Store),
        (prefix("test", "kk"), Source::L1),
        (prefix("tes", "k"), Source::L1),
    ] {
        assert_eq!(rig.read("k", Cached).await, (some("value"), Source::L1));
        rig.hear(message.clone()).await;
        assert_eq!(rig.read("k", Cached).await, (some("value"), source), "{message:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_load_from_before_a_message_is_joined_by_nobody_after_it_and_does_not_land() {
    let version = Version::new(1).expect("positive");
    for message in [
        written("k", version),
        Message::Dropped { key: key("k"), version },
        Message::Invalidated { key: key("k") },
        Message::InvalidatedPrefix {
            namespace: "test".to_owned(),
            prefix: String::new(),
        },
    ] {
        let rig = rig(|_| ());
        rig.written_elsewhere("k", "before");
        let (fault, release) = Fault::late_reply();
        rig.fake.inject(Call::Load, fault);
        let first = rig.reading("k");
        rig.called(Call::Load, 1).await;
        rig.written_elsewhere("k", "after");
        rig.hear(message).await;
        assert_eq!(rig.read("k", Cached).await, (some("after"), Source::Store));
        release.notify_one();
        let first = first.await.expect("no panic").expect("the store answers");
        let value = first.entry.and_then(|entry| entry.value);
        assert!(value.is_some(), "whoever asked before is answered");
        assert_eq!(rig.read("k", Cached).await, (some("after"), Source::L1));
    }
}

#[tokio::test(start_paused = true)]
async fn l1_answers_for_a_second_from_when_the_last_beat_was_sent() {
    let rig = gated();
    rig.put("k", "value", Through).await;
    assert_eq!(
        rig.read("k", Cached).await,
        (some("value"), Source::Store),
        "off from the start"
    );
    rig.hear_beat();
    assert_eq!(
        rig.read("k", Cached).await,
        (some("value"), Source::Store),
        "and it was empty"
    );
    assert_eq!(rig.read("k", Cached).await, (some("value"), Source::L1));
    let sent_at = Instant::now();
    for (advanced, heard, source) in [
        (900, false, Source::L1),
        (100, false, Source::Store),
        (0, true, Source::Store),
        (100, true, Source::Store),
    ] {
        tokio::time::advance(Duration::from_millis(advanced)).await;
        if heard {
            rig.look_at_control();
            rig.gateway.trust_since(sent_at);
        }
        let read = rig.read("k", Cached).await;
        assert_eq!(read, (some("value"), source), "{:?} after the beat", sent_at.elapsed());
    }
    rig.hear_beat();
    assert_eq!(
        rig.read("k", Cached).await,
        (some("value"), Source::L1),
        "nothing was missed"
    );
}

#[tokio::test(start_paused = true)]
async fn while_messages_may_be_missed_nothing_is_shared_and_nothing_is_kept() {
    let rig = gated();
    rig.hear_beat();
    rig.written_elsewhere("k", "one");
    let (fault, release_first) = Fault::late_reply();
    rig.fake.inject(Call::Load, fault);
    let from_before = rig.reading("k");
    rig.called(Call::Load, 1).await;

    rig.gateway.distrust().await.expect("no panic");
    rig.written_elsewhere("k", "two");
    let (fault, release_second) = Fault::late_reply();
    rig.fake.inject(Call::Load, fault);
    let from_meanwhile = rig.reading("k");
    rig.called(Call::Load, 2).await;
    rig.written_elsewhere("k", "three");
    assert_eq!(rig.read("k", Cached).await, (some("three"), Source::Store));
    assert_eq!(
        rig.read("k", Cached).await,
        (some("three"), Source::Store),
        "nothing is kept"
    );

    rig.written_elsewhere("k", "four");
    rig.hear_beat();
    assert_eq!(rig.read("k", Cached).await, (some("four"), Source::Store));
    for (reading, release) in [(from_before, release_first), (from_meanwhile, release_second)] {
        release.notify_one();
        let found = reading.await.expect("no panic").expect("the store answers");
        assert!(found.entry.is_some());
    }
    assert_eq!(rig.read("k", Cached).await, (some("four"), Source::L1));
    assert_eq!(rig.parts().metrics.loads_joined.get(), 0, "each read led a load");
}

/// The load that a reader led on the brink: L1 was on when it looked, and off when it led.
#[tokio::test(start_paused = true)]
async fn a_load_that_was_registered_while_it_was_off_is_joined_by_nobody_once_it_is_on() {
    let rig = gated();
    rig.written_elsewhere("k", "before");
    let crate::cache::flight::Ticket::Lead(lead) = rig.parts().flights.join_or_lead(&key("k")) else {
        panic!("nobody leads yet");
    };
    rig.hear_beat();
    assert_eq!(
        rig.read("k", Cached).await,
        (some("before"), Source::Store),
        "it did not wait"
    );
    drop(lead);
}

#[tokio::test(start_paused = true)]
async fn as_many_loads_that_nobody_shares_run_at_once_as_may() {
    let rig = rig(|setup| setup.flights_max = 3);
    rig.parts().memory.gate();
    let releases: Vec<_> = (0..3)
        .map(|_| {
            let (fault, release) = Fault::late_reply();
            rig.fake.inject(Call::Load, fault);
            release
        })
        .collect();
    let mut waiting = Vec::new();
    for _ in 0..3 {
        waiting.push(rig.reading("k"));
        eventually(|| rig.parts().flights.running() == waiting.len()).await;
    }
    let refused = rig.get("k", Cached).await.expect_err("no more may");
    assert_eq!(refused.kind(), ErrorKind::Overloaded);
    for release in releases {
        release.notify_one();
    }
    for reading in waiting {
        assert!(reading.await.expect("no panic").is_ok());
    }
    assert!(rig.loads() <= 3);
    eventually(|| rig.parts().flights.running() == 0).await;
    assert_eq!(rig.read("k", Cached).await, (None, Source::Store));
}

/// Another epoch may hold by then, and with it what others could not tell of.
#[tokio::test(start_paused = true)]
async fn l1_answers_for_no_longer_than_the_epoch_is_known_unless_nobody_can_move_it() {
    let rig = rig(|_| ());
    rig.parts().memory.gate();
    rig.look_at_control();
    for (wait, down, on) in [(10_000, false, true), (2_000, false, false), (0, true, true)] {
        tokio::time::advance(Duration::from_millis(wait)).await;
        if down {
            rig.store.breaker().failed(StoreErrorKind::Unreachable);
        }
        rig.gateway.trust_since(Instant::now());
        assert_eq!(rig.parts().memory.is_on(rig.clock().now()), on, "{wait} ms later");
    }
}

#[tokio::test(start_paused = true)]
async fn a_moved_epoch_has_the_control_row_read() {
    let rig = rig(|_| ());
    let wake = Arc::clone(&rig.parts().sharing.control_changed);
    rig.hear(Message::EpochMoved).await;
    let woken = tokio::time::timeout(Duration::from_secs(1), wake.notified());
    assert!(woken.await.is_ok(), "also who was not waiting yet");
}
