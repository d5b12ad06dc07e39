//! What a watcher is told of what happens on this gateway, in which order, and where it goes on. What other gateways write is tested against a
//! real Redis, in `tests/it/watch.rs`.

use super::*;
use crate::{
    cache::message::Message,
    gateway::watch::{Event, RescanReason, Scope, Told, WatchRequest, Watcher},
};

fn request(prefix: &str) -> WatchRequest {
    WatchRequest {
        namespace: "test".to_owned(),
        prefix: prefix.to_owned(),
        resume_token: None,
        with_values: false,
    }
}

fn after(token: &str) -> WatchRequest {
    WatchRequest {
        resume_token: Some(token.to_owned()),
        ..request("")
    }
}

const STARTED: Event = Event::Started {
    scope: Scope::ThisGateway,
    resumed: false,
};

const RESUMED: Event = Event::Started {
    scope: Scope::ThisGateway,
    resumed: true,
};

fn changed(name: &str, version: impl Into<Option<Version>>, kind: ChangeKind) -> Event {
    Event::Changed {
        key: key(name),
        version: version.into(),
        kind,
        entry: None,
    }
}

fn rescan(reason: RescanReason) -> Event {
    Event::Rescan {
        reason,
        scope: Scope::ThisGateway,
    }
}

impl Rig {
    /// A watch that has begun.
    async fn watch(&self, request: WatchRequest) -> Watcher {
        let mut watcher = self.gateway.watch(request).expect("valid");
        assert_eq!(watcher.next().await.event, STARTED);
        watcher
    }

    /// One that goes on where the token says.
    async fn resume(&self, token: &str) -> Watcher {
        let mut watcher = self.gateway.watch(after(token)).expect("valid");
        assert_eq!(watcher.next().await.event, RESUMED);
        watcher
    }

    async fn remove(&self, name: &str, mode: WriteMode) -> Version {
        let request = WriteRequest {
            value: None,
            ..put(name, "", mode)
        };
        let written = self.gateway.write(request, Instant::now() + PATIENCE).await;
        written.expect("it is written").version
    }
}

/// What is told next, which is there already.
async fn now(watcher: &mut Watcher) -> Told {
    let began = Instant::now();
    let told = watcher.next().await;
    assert_eq!(Instant::now(), began, "{told:?} was waited for");
    told
}

async fn events(watcher: &mut Watcher, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    for _ in 0..count {
        events.push(now(watcher).await.event);
    }
    events
}

/// Nothing but that time passes.
async fn assert_quiet(watcher: &mut Watcher) {
    assert_eq!(watcher.next().await.event, Event::Progress);
}

#[tokio::test(start_paused = true)]
async fn each_write_is_told_once_it_is_answered_in_its_order() {
    let rig = rig(|_| ());
    rig.put("before", "v", Through).await;
    let mut watcher = rig.watch(request("k")).await;
    let through = rig.put("k1", "v", Through).await;
    let behind = rig.put("k2", "v", Behind).await;
    rig.put("another", "v", Behind).await;
    let deleted = rig.remove("k1", Through).await;
    let pending = rig.remove("k3", Behind).await;
    let increment = IncrementRequest {
        key: key("k4"),
        delta: 1,
        ttl: None,
        request: None,
    };
    let counted = rig.gateway.increment(increment, Instant::now() + PATIENCE).await;
    let counted = counted.expect("it is written").version;
    let told = events(&mut watcher, 5).await;
    let expected = [
        changed("k1", through, ChangeKind::Put),
        changed("k2", behind, ChangeKind::Put),
        changed("k1", deleted, ChangeKind::Delete),
        changed("k3", pending, ChangeKind::Delete),
        changed("k4", counted, ChangeKind::Put),
    ];
    assert_eq!(told, expected);
    rig.drained().await;
    assert_quiet(&mut watcher).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_behind_the_message_of_its_token() {
    let rig = rig(|_| ());
    let mut watcher = rig.gateway.watch(request("")).expect("valid");
    let mut tokens = vec![watcher.next().await.resume_token];
    let mut versions = Vec::new();
    for round in 0..5 {
        versions.push(rig.put(&format!("k{round}"), "v", Behind).await);
        tokens.push(now(&mut watcher).await.resume_token);
    }
    drop(watcher);
    versions.push(rig.put("k5", "v", Through).await);
    for (round, token) in tokens.iter().enumerate() {
        let mut watcher = rig.resume(token).await;
        for (number, version) in versions.iter().enumerate().skip(round) {
            let told = now(&mut watcher).await;
            assert_eq!(told.event, changed(&format!("k{number}"), *version, ChangeKind::Put));
            assert_eq!(tokens.get(number + 1).unwrap_or(&told.resume_token), &told.resume_token);
        }
        assert_quiet(&mut watcher).await;
    }
}

#[tokio::test(start_paused = true)]
async fn progress_brings_a_younger_token_though_others_alone_write() {
    let rig = rig(|setup| setup.watch.log_entries_max = NonZeroUsize::new(10).expect("more than none"));
    let mut watcher = rig.watch(request("k")).await;
    for round in 0..5 {
        let began = Instant::now();
        for number in 0..8 {
            rig.put(&format!("another{round}{number}"), "v", Behind).await;
        }
        let told = watcher.next().await;
        assert_eq!(
            (told.event, began.elapsed()),
            (Event::Progress, Duration::from_secs(10))
        );
        drop(watcher);
        let mut request = request("k");
        request.resume_token = Some(told.resume_token);
        watcher = rig.gateway.watch(request).expect("valid");
        assert_eq!(watcher.next().await.event, RESUMED, "what came since is kept");
    }
}

#[tokio::test(start_paused = true)]
async fn a_busy_watch_of_others_writes_has_its_progress_all_the_same() {
    let rig = rig(|_| ());
    let mut watcher = rig.watch(request("k")).await;
    let gateway = rig.gateway.clone();
    let busy = tokio::spawn(async move {
        for round in 0.. {
            let request = put(&format!("another{}", round % 10), "v", Behind);
            gateway
                .write(request, Instant::now() + PATIENCE)
                .await
                .expect("written");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    });
    let began = Instant::now();
    assert_eq!(watcher.next().await.event, Event::Progress);
    assert!(began.elapsed() <= Duration::from_secs(11), "{:?}", began.elapsed());
    busy.abort();
}

#[tokio::test(start_paused = true)]
async fn who_reads_too_slowly_is_told_so_and_goes_on() {
    let rig = rig(|setup| setup.watch.log_entries_max = NonZeroUsize::new(10).expect("more than none"));
    let mut watcher = rig.watch(request("")).await;
    for number in 0..11 {
        rig.put(&format!("k{number}"), "v", Behind).await;
    }
    let told = now(&mut watcher).await;
    assert_eq!(told.event, rescan(RescanReason::FellBehind));
    let version = rig.put("k", "v", Behind).await;
    assert_eq!(events(&mut watcher, 1).await, [changed("k", version, ChangeKind::Put)]);
    drop(watcher);
    let mut watcher = rig.resume(&told.resume_token).await;
    assert_eq!(events(&mut watcher, 1).await, [changed("k", version, ChangeKind::Put)]);
}

#[tokio::test(start_paused = true)]
async fn a_token_from_elsewhere_or_of_the_discarded_past_begins_anew_and_says_so() {
    let (here, elsewhere) = (rig(|_| ()), rig(|_| ()));
    let assert_expired = async |token: &str| {
        let mut watcher = here.gateway.watch(after(token)).expect("well made");
        assert_eq!(watcher.next().await.event, STARTED);
        assert_eq!(now(&mut watcher).await.event, rescan(RescanReason::TokenExpired));
        let version = here.put("k", "v", Behind).await;
        let told = now(&mut watcher).await;
        assert_eq!(told.event, changed("k", version, ChangeKind::Put));
        told.resume_token
    };
    let theirs = elsewhere.gateway.watch(request("")).expect("valid").next().await;
    let ours = assert_expired(&theirs.resume_token).await;
    // Within the window it is resumed, however often.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(299)).await;
        here.put("meanwhile", "v", Behind).await;
        drop(here.resume(&ours).await);
    }
    tokio::time::sleep(Duration::from_secs(300)).await;
    here.put("after the window", "v", Behind).await;
    assert_expired(&ours).await;
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_none_of_this_watch_is_invalid() {
    let rig = rig(|_| ());
    let token = rig
        .gateway
        .watch(request("k"))
        .expect("valid")
        .next()
        .await
        .resume_token;
    for token in ["nonsense", &token] {
        let refused = rig.gateway.watch(after(token)).err().expect("not of this prefix");
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        assert_eq!(refused.violations()[0].field, "resume_token");
    }
    assert_eq!(rig.parts().watches.watching(), 0, "who was refused does not watch");
}

#[tokio::test(start_paused = true)]
async fn no_more_may_watch_than_the_bound_and_who_leaves_makes_room() {
    let rig = rig(|setup| setup.watch.watchers_max = NonZeroUsize::new(2).expect("more than none"));
    let first = rig.watch(request("")).await;
    let _second = rig.watch(request("")).await;
    let refused = rig.gateway.watch(request("")).err().expect("as many as may");
    assert_eq!(refused.kind(), ErrorKind::Overloaded);
    drop(first);
    rig.watch(request("")).await;
}

#[tokio::test(start_paused = true)]
async fn values_are_those_that_stand_when_they_are_told() {
    let rig = rig(|_| ());
    let mut watcher = rig.gateway.watch(WatchRequest {
        with_values: true,
        ..request("")
    });
    let watcher = watcher.as_mut().expect("valid");
    assert_eq!(watcher.next().await.event, STARTED);
    rig.put("k", "old", Through).await;
    let newer = rig.put("k", "new", Behind).await;
    let gone = rig.put("gone", "v", Through).await;
    let deleted = rig.remove("gone", Through).await;
    let told = events(watcher, 4).await;
    for told in &told[..2] {
        let Event::Changed {
            version, kind, entry, ..
        } = told
        else {
            panic!("{told:?} is no change");
        };
        let entry = entry.clone().expect("it was asked for");
        assert_eq!((*version, *kind), (Some(newer), ChangeKind::Put));
        assert_eq!((entry.version, entry.value.as_deref()), (newer, Some(&b"new"[..])));
    }
    assert_eq!(
        told[2..],
        [
            changed("gone", gone, ChangeKind::Delete),
            changed("gone", deleted, ChangeKind::Delete)
        ]
    );
    // A record that cannot be had is to be read by the client.
    rig.drained().await;
    let theirs = rig.clock().stamp(None).expect("leased");
    let message = Message::Written {
        key: key("theirs"),
        version: theirs,
        kind: ChangeKind::Put,
    };
    rig.fake.down(true);
    rig.gateway.heed_message(message).await.expect("no panic");
    assert_eq!(
        watcher.next().await.event,
        changed("theirs", theirs, ChangeKind::Invalidate)
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_heard_is_told_and_what_may_have_been_missed_is_a_gap() {
    let rig = rig(|_| ());
    let mut watcher = rig.watch(request("k")).await;
    let version = rig.clock().stamp(None).expect("leased");
    let written = |name: &str, kind| Message::Written {
        key: key(name),
        version,
        kind,
    };
    let prefix = |namespace: &str, prefix: &str| Message::InvalidatedPrefix {
        namespace: namespace.to_owned(),
        prefix: prefix.to_owned(),
    };
    for message in [
        written("k1", ChangeKind::Put),
        written("k2", ChangeKind::Delete),
        written("k3", ChangeKind::Invalidate),
        written("another", ChangeKind::Put),
        Message::Dropped {
            key: key("k4"),
            version,
        },
        Message::Invalidated { key: key("k5") },
        prefix("test", "k9"),
        prefix("test", ""),
        prefix("test", "other"),
        prefix("others", ""),
        Message::EpochMoved,
        Message::Recalled { number: 7 },
    ] {
        rig.gateway.heed_message(message).await.expect("no panic");
    }
    let told = events(&mut watcher, 7).await;
    let expected = [
        changed("k1", version, ChangeKind::Put),
        changed("k2", version, ChangeKind::Delete),
        changed("k3", version, ChangeKind::Invalidate),
        changed("k4", version, ChangeKind::Invalidate),
        changed("k5", None, ChangeKind::Invalidate),
        rescan(RescanReason::Invalidated),
        rescan(RescanReason::Invalidated),
    ];
    assert_eq!(told, expected);
    let watches = &rig.parts().watches;
    watches.hear_all(true);
    watches.hear_all(false);
    let told = events(&mut watcher, 2).await;
    let back = Event::Rescan {
        reason: RescanReason::RedisBack,
        scope: Scope::AllGateways,
    };
    assert_eq!(told, [back, rescan(RescanReason::RedisLost)]);
    assert_quiet(&mut watcher).await;
}

#[tokio::test(start_paused = true)]
async fn the_scope_is_that_of_the_moment_though_nobody_watched_when_it_changed() {
    let rig = rig(|_| ());
    for (all, scope) in [(true, Scope::AllGateways), (false, Scope::ThisGateway)] {
        rig.parts().watches.hear_all(all);
        let told = rig.gateway.watch(request("")).expect("valid").next().await;
        assert_eq!(told.event, Event::Started { scope, resumed: false });
    }
}

#[tokio::test(start_paused = true)]
async fn what_does_not_hold_any_more_is_told() {
    use crate::gateway::invalidate::Target;

    let rig = rig(|_| ());
    let mut watcher = rig.watch(request("")).await;
    rig.fake.reject(|_| true);
    let version = rig.put("k", "v", Behind).await;
    rig.drained().await;
    eventually(|| rig.parts().memory.version(&key("k")).is_none()).await;
    let keys = Target::Keys(vec![key("k")]);
    rig.gateway.invalidate(keys).await.expect("no Redis");
    let prefix = Target::Prefix {
        namespace: "test".to_owned(),
        prefix: "x".to_owned(),
    };
    rig.gateway.invalidate(prefix).await.expect("no Redis");
    let told = events(&mut watcher, 4).await;
    let expected = [
        changed("k", version, ChangeKind::Put),
        changed("k", version, ChangeKind::Invalidate),
        changed("k", None, ChangeKind::Invalidate),
        rescan(RescanReason::Invalidated),
    ];
    assert_eq!(told, expected);
}
