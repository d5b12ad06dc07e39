//! Reads of many keys over the store in memory, in paused time: each key as a read of its own, and each tier asked once.

use std::collections::BTreeSet;

use proptest::{collection::vec, prelude::*};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

const EVERY: [ReadConsistency; 3] = [Cached, Shared, ReadConsistency::Store];

type Answers = Vec<Result<Found, Error>>;

impl Rig {
    fn reading_all(&self, names: &[&str], options: impl Into<ReadOptions>, time: Duration) -> JoinHandle<Answers> {
        let keys: Vec<Key> = names.iter().map(|name| key(name)).collect();
        let (gateway, options, deadline) = (self.gateway.clone(), options.into(), Instant::now() + time);
        tokio::spawn(async move { gateway.get_all(&keys, options, deadline).await })
    }

    async fn get_all(&self, names: &[&str], options: impl Into<ReadOptions>) -> Answers {
        self.reading_all(names, options, PATIENCE).await.expect("no panic")
    }
}

/// What was answered, and by whom; or what went wrong.
fn seen(answers: Answers) -> Vec<Result<(Option<String>, Source), ErrorKind>> {
    let seen = answers.into_iter().map(|answer| {
        let found = answer.map_err(|error| error.kind())?;
        let value = found.entry.and_then(|entry| entry.value);
        Ok((value.map(|value| text(&value)), found.source))
    });
    seen.collect()
}

fn names(many: usize) -> Vec<String> {
    (0..many).map(|number| format!("k{number:04}")).collect()
}

fn refs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

#[tokio::test(start_paused = true)]
async fn all_that_miss_share_one_query_and_what_l1_has_asks_for_none() {
    let rig = rig(|setup| setup.flights_max = 1_000);
    for (number, name) in names(700).iter().enumerate() {
        if !number.is_multiple_of(7) {
            rig.put_past(name, name, rig.ahead(Duration::ZERO));
        }
    }
    let names = names(700);
    let mut asked = refs(&names);
    // The same key again is read once, and answered again.
    asked.extend(["k0001", "k0007", "k0001"]);
    for consistency in EVERY {
        let before = rig.fake.loads().len();
        for (name, answer) in asked.iter().zip(seen(rig.get_all(&asked, consistency).await)) {
            let number: usize = name[1..].parse().expect("a number");
            let value = (!number.is_multiple_of(7)).then(|| (*name).to_owned());
            // Without Redis a shared read has nobody but the store to ask.
            assert_eq!(answer, Ok((value, Source::Store)), "{name} {consistency:?}");
        }
        let loads = &rig.fake.loads()[before..];
        assert_eq!(loads.len(), 1, "{consistency:?}");
        assert_eq!(loads[0].iter().collect::<BTreeSet<_>>().len(), 700);
    }
    let answers = seen(rig.get_all(&asked, Cached).await);
    assert!(answers.iter().all(|answer| matches!(answer, Ok((_, Source::L1)))));
    assert_eq!(rig.fake.loads().len(), 3);
    assert_eq!(rig.parts().flights.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_another_call_is_loading_is_joined_and_others_join_the_batch() {
    let rig = rig(|_| ());
    let version = rig.ahead(Duration::ZERO);
    for name in ["a", "b", "c"] {
        rig.put_past(name, name, version);
    }
    let release = rig.hang(Call::Load);
    let single = rig.reading("a");
    rig.called(Call::Load, 1).await;
    let release_batch = rig.hang(Call::Load);
    let batch = rig.reading_all(&["a", "b"], Cached, PATIENCE);
    rig.called(Call::Load, 2).await;
    let joins = rig.reading("b");
    eventually(|| rig.parts().metrics.loads_joined.get() == 2).await;
    release.notify_one();
    single.await.expect("no panic").expect("found");
    assert!(!batch.is_finished(), "the other key's load goes on");
    // A caller that goes away leaves its loads to those who joined, and to L1.
    batch.abort();
    release_batch.notify_one();
    assert_eq!(joins.await.expect("no panic").expect("found").source, Source::Store);
    assert_eq!(rig.fake.loads(), [vec![key("a")], vec![key("b")]]);
    assert_eq!(
        seen(rig.get_all(&["a", "b"], Cached).await),
        [Ok((some("a"), Source::L1)), Ok((some("b"), Source::L1))]
    );
}

#[tokio::test(start_paused = true)]
async fn a_write_that_comes_between_is_not_covered_by_what_a_batch_found() {
    let rig = rig(|_| ());
    rig.put_past("k", "old", rig.ahead(Duration::ZERO));
    let (fault, release) = Fault::late_reply();
    rig.fake.inject(Call::Load, fault);
    let batch = rig.reading_all(&["k", "other"], Cached, PATIENCE);
    rig.called(Call::Load, 1).await;
    rig.put("k", "new", Through).await;
    release.notify_one();
    let answers = batch.await.expect("no panic");
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(rig.read("k", Cached).await, (some("new"), Source::L1));
}

#[tokio::test(start_paused = true)]
async fn pending_writes_are_seen_with_every_consistency() {
    let rig = rig(|_| ());
    rig.put_past("old", "stored", Version::new(1).expect("positive"));
    rig.fake
        .script(|call| (call == Call::Commit).then(|| Fault::fail(store::StoreErrorKind::Transient)));
    rig.put("old", "pending", Behind).await;
    rig.put("new", "pending", Behind).await;
    for consistency in EVERY {
        for name in ["old", "new"] {
            rig.parts().memory.invalidate_key(&key(name));
        }
        let wanted = [
            Ok((some("pending"), Source::Pending)),
            Ok((some("pending"), Source::Pending)),
            Ok((None, Source::Store)),
        ];
        assert_eq!(
            seen(rig.get_all(&["old", "new", "none"], consistency).await),
            wanted,
            "{consistency:?}"
        );
        rig.parts().memory.invalidate_key(&key("none"));
    }
}

#[tokio::test(start_paused = true)]
async fn while_the_store_is_down_each_key_is_answered_for_itself() {
    let rig = rig(|_| ());
    rig.put("here", "value", Through).await;
    rig.fake.down(true);
    eventually(|| rig.store.breaker().is_open()).await;
    for consistency in EVERY {
        let here = match consistency {
            Cached => Ok((some("value"), Source::L1)),
            Shared | ReadConsistency::Store => Err(ErrorKind::Unavailable),
        };
        let answers = seen(rig.get_all(&["none", "here", "none"], consistency).await);
        assert_eq!(
            answers,
            [Err(ErrorKind::Unavailable), here, Err(ErrorKind::Unavailable)],
            "{consistency:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn during_an_outage_copies_answer_as_the_namespace_allows() {
    let rig = rig(|setup| {
        setup.namespace.cache_lifetime = 10 * SECOND;
        setup.namespace.stale_if_error = 60 * SECOND;
        setup.namespace.refresh_threshold = 0.0;
    });
    rig.put("k", "value", Through).await;
    tokio::time::advance(20 * SECOND).await;
    rig.fake.down(true);
    eventually(|| rig.store.breaker().is_open()).await;
    let mut answers = rig.get_all(&["k", "none"], Cached).await;
    assert_eq!(
        answers.remove(1).expect_err("nobody knows").kind(),
        ErrorKind::Unavailable
    );
    let found = answers.remove(0).expect("a copy is known");
    assert!(found.stale && found.entry.is_some());
    assert_eq!(rig.parts().metrics.stale_answers.get(), 1);
    // Not to who asks for the store, or for an age.
    for options in [
        ReadOptions::from(ReadConsistency::Store),
        ReadOptions {
            consistency: Cached,
            freshness: Freshness {
                max_staleness: Some(SECOND),
                min_version: None,
            },
        },
    ] {
        let answers = seen(rig.get_all(&["k"], options).await);
        assert_eq!(answers, [Err(ErrorKind::Unavailable)]);
    }
}

#[tokio::test(start_paused = true)]
async fn at_the_deadline_what_is_known_is_answered_and_the_rest_has_timed_out() {
    let rig = rig(|_| ());
    rig.put("here", "value", Through).await;
    for consistency in EVERY {
        rig.fake.inject(Call::Load, Fault::hang().0);
        let (begun, reading) = (Instant::now(), rig.reading_all(&["here", "none"], consistency, SECOND));
        let answers = seen(reading.await.expect("no panic"));
        assert_eq!(answers[1], Err(ErrorKind::Timeout), "{consistency:?}");
        if consistency == Cached {
            assert_eq!(answers[0], Ok((some("value"), Source::L1)));
        }
        assert!(
            (SECOND * 9 / 10..SECOND).contains(&begun.elapsed()),
            "shortly before: {:?}",
            begun.elapsed()
        );
        // The load of a cached read goes on for whoever joins it.
        eventually(|| rig.parts().flights.running() == 0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn ages_and_versions_are_asked_for_as_of_one_key() {
    let rig = rig(|_| ());
    let version = rig.put("k", "value", Through).await;
    rig.put("l", "value", Through).await;
    tokio::time::advance(5 * SECOND).await;
    let recent = ReadOptions {
        consistency: Cached,
        freshness: Freshness {
            max_staleness: Some(SECOND),
            min_version: None,
        },
    };
    let loads = rig.fake.loads().len();
    let stored = Ok((some("value"), Source::Store));
    assert_eq!(seen(rig.get_all(&["k", "l"], recent).await), [stored.clone(), stored]);
    assert_eq!(rig.fake.loads().len() - loads, 1, "one query");
    let at_least = ReadOptions {
        consistency: Cached,
        freshness: Freshness {
            max_staleness: None,
            min_version: Some(version),
        },
    };
    let answers = seen(rig.get_all(&["k", "l"], at_least).await);
    assert!(answers.iter().all(|answer| matches!(answer, Ok((Some(_), Source::L1)))));
}

#[tokio::test(start_paused = true)]
async fn more_values_than_an_answer_holds_are_left_for_the_next_call() {
    let rig = rig(|setup| setup.memory_bytes = 0);
    let value = "v".repeat(1 << 20);
    let names = names(30);
    for name in &names {
        rig.put_past(name, &value, rig.ahead(Duration::ZERO));
    }
    for consistency in EVERY {
        let (mut left, mut calls) = (refs(&names), 0);
        while !left.is_empty() {
            let answers = seen(rig.get_all(&left, consistency).await);
            assert!(answers[0].is_ok(), "the first one always is");
            let few = answers.iter().filter(|answer| answer.is_ok()).count();
            assert!(few <= 6, "{few} MiB in one answer");
            let answers = left.iter().zip(answers);
            left = answers
                .filter_map(|(name, answer)| match answer {
                    Ok((found, _)) => {
                        assert_eq!(found.map(|found| found.len()), Some(value.len()));
                        None
                    }
                    Err(kind) => {
                        assert_eq!(kind, ErrorKind::TooLarge);
                        Some(*name)
                    }
                })
                .collect();
            calls += 1;
        }
        assert!(calls < 15, "{calls}");
        assert_eq!(rig.parts().flights.running(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn who_joined_a_key_that_a_batch_leaves_is_answered_all_the_same() {
    let rig = rig(|_| ());
    let (value, names) = ("v".repeat(1 << 20), names(10));
    for name in &names {
        rig.put_past(name, &value, rig.ahead(Duration::ZERO));
    }
    let release = rig.hang(Call::Load);
    let batch = rig.reading_all(&refs(&names), Cached, PATIENCE);
    rig.called(Call::Load, 1).await;
    let joins = rig.reading("k0009");
    eventually(|| rig.parts().metrics.loads_joined.get() == 1).await;
    release.notify_one();
    let last = seen(batch.await.expect("no panic")).pop();
    assert_eq!(last, Some(Err(ErrorKind::TooLarge)));
    let found = joins.await.expect("no panic").expect("found");
    assert_eq!(found.entry.map(|entry| entry.value_bytes()), Some(1 << 20));
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_finds_no_room_for_its_loads_is_told_so_key_by_key() {
    let rig = rig(|setup| setup.flights_max = 2);
    let answers = seen(rig.get_all(&["a", "b", "c"], Cached).await);
    let absent = Ok((None, Source::Store));
    assert_eq!(answers, [absent.clone(), absent, Err(ErrorKind::Overloaded)]);
    assert_eq!(rig.parts().flights.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn each_key_counts_as_a_read() {
    let rig = rig(|_| ());
    rig.put("k", "value", Through).await;
    rig.get_all(&["k", "k", "none", "none"], Cached).await;
    let mut counted = std::collections::BTreeMap::new();
    rig.gateway.inner.counters.namespaces.add_to(&mut counted);
    let stats = stats::NamespaceStats {
        counted: counted.remove("test").expect("counted"),
        ..stats::NamespaceStats::default()
    };
    assert_eq!((stats.hits(), stats.misses(), stats.tier(Source::L1).hits), (2, 2, 2));
}

/// What happens to a key before it is read.
#[derive(Debug, Clone, Copy)]
enum Past {
    Nothing,
    Stored,
    Through,
    Behind,
    Deleted,
    Read,
    Evicted,
}

fn pasts() -> impl Strategy<Value = Vec<(u8, Past)>> {
    use Past::{Behind, Deleted, Evicted, Nothing, Read, Stored, Through};
    let past = prop::sample::select(vec![Nothing, Stored, Through, Behind, Deleted, Read, Evicted]);
    vec((0..12_u8, past), 0..40)
}

async fn lived(pasts: &[(u8, Past)]) -> Rig {
    let rig = rig(|_| ());
    for (step, (number, past)) in pasts.iter().enumerate() {
        let (name, value) = (format!("k{number}"), format!("v{step}"));
        match past {
            Past::Nothing => {}
            Past::Stored => rig.put_past(&name, &value, rig.ahead(Duration::from_millis(step as u64))),
            Past::Through => drop(rig.put(&name, &value, Through).await),
            Past::Behind => drop(rig.put(&name, &value, Behind).await),
            Past::Deleted => {
                let delete = WriteRequest {
                    value: None,
                    ..put(&name, "", Through)
                };
                let deleted = rig.gateway.write(delete, Instant::now() + PATIENCE).await;
                deleted.expect("deleted");
            }
            Past::Read => drop(rig.read(&name, Cached).await),
            Past::Evicted => drop(rig.parts().memory.invalidate_key(&key(&name))),
        }
    }
    rig.drained().await;
    rig
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever came before, a batch answers what single reads answer, from the same tiers.
    #[test]
    fn a_batch_answers_what_single_reads_do(pasts in pasts(), consistency in 0..3_usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let names: Vec<String> = (0..12).map(|number| format!("k{number}")).collect();
            let batch = seen(lived(&pasts).await.get_all(&refs(&names), EVERY[consistency]).await);
            let rig = lived(&pasts).await;
            let mut single = Vec::new();
            for name in &names {
                single.push(rig.get(name, EVERY[consistency]).await);
            }
            assert_eq!(batch, seen(single));
        });
    }
}
