//! L1 is a max-register per key, and bounded in bytes, whatever lands on it from wherever; and what comes late lands nowhere. The last,
//! under every order of events, is in [`late`].

mod late;

use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use proptest::{collection::vec, prelude::*, sample::subsequence};
use rand::RngExt;

use super::*;
use crate::model::Entry;

const NOW: Timestamp = Timestamp(1_000_000);
const MINUTE: Duration = Duration::from_secs(60);

fn key(name: impl ToString) -> Key {
    Key::new("test", &name.to_string()).unwrap()
}

fn version(number: i64) -> Version {
    Version::new(number).unwrap()
}

fn entry(number: i64, value_bytes: usize) -> Entry {
    Entry {
        version: version(number),
        value: Some(Bytes::from(vec![b'v'; value_bytes])),
        expires_at: None,
    }
}

fn put(number: i64) -> Copy {
    Copy::new(Some(entry(number, 8)), NOW, MINUTE)
}

fn absence() -> Copy {
    Copy::new(None, NOW, MINUTE)
}

fn memory() -> Arc<Memory> {
    memory_of(Config::default().bytes_max)
}

fn memory_of(bytes_max: usize) -> Arc<Memory> {
    Arc::new(Memory::new(&Config { bytes_max }))
}

/// Lands what nothing came in between of.
fn land(memory: &Arc<Memory>, key: &Key, copy: Copy) -> Landing {
    memory.leave_token(key).land_write(copy)
}

/// The same of a load.
fn load(memory: &Arc<Memory>, key: &Key, copy: Copy) -> Landing {
    memory.leave_token(key).land_load(copy)
}

fn refused(standing: Option<Copy>) -> Landing {
    Landing::Refused { standing }
}

fn tokens(memory: &Memory) -> usize {
    memory.tokens.iter().map(|tokens| tokens.lock().len()).sum()
}

/// Lands another key's copy that is used, too, and so takes the place of what is used no more.
fn crowd(memory: &Arc<Memory>, number: usize, value_bytes: usize) {
    let other = key(format!("other {number}"));
    land(memory, &other, Copy::new(Some(entry(1, value_bytes)), NOW, MINUTE));
    standing(memory, &other);
}

/// Crowds an L1 of one shard until a key has lost its place.
fn evict(memory: &Arc<Memory>, victim: &Key) {
    for number in 0.. {
        if memory.version(victim).is_none() {
            return;
        }
        crowd(memory, number, 8);
    }
}

fn standing(memory: &Memory, key: &Key) -> Option<Copy> {
    memory.get(key, Timestamp(i64::MIN))
}

#[test]
fn a_copy_takes_what_it_is_charged() {
    let memory = memory();
    for number in 100_000..200_000 {
        land(&memory, &key(number), put(1));
    }
    let used = memory.copies.memory_used();
    let used = (used.entries + used.map) / memory.len();
    let charged = memory.bytes() as usize / memory.len() - (key(100_000).text().len() + 8);
    // The head, the count of holders and half of the rounding up lie elsewhere.
    assert!(used + 27 + 8 + 8 <= charged, "{used} {charged}");
}

#[test]
fn keys_of_one_place_are_never_taken_for_each_other() {
    let memory = memory();
    let (mine, other) = (key("mine"), key("other"));
    let place = memory.places.of(&mine);
    let token_of_other = || Token {
        memory: Arc::clone(&memory),
        key: other.clone(),
        place,
        number: memory.tokens(place).lock().leave(place, &other),
        spent: false,
    };
    // Whatever lands takes the other's place, whichever version is higher.
    land(&memory, &mine, put(5));
    assert_eq!(token_of_other().land_write(put(3)), Landing::Landed);
    assert_eq!(
        (standing(&memory, &mine), memory.version(&mine), memory.len()),
        (None, None, 1)
    );
    // What is done to one leaves the copy of the other.
    assert!(!memory.invalidate_key(&mine) && !memory.invalidate(&mine, version(9)));
    assert!(!memory.drop_version(&mine, version(3)));
    assert_eq!(memory.len(), 1);
    assert_eq!(memory.invalidate_where(|key| *key == mine), 0);
    assert_eq!(land(&memory, &mine, put(4)), Landing::Landed);
    assert_eq!(standing(&memory, &mine), Some(put(4)));
    assert_eq!(memory.evictions().values().sum::<u64>(), 2);
    // The token of one is not that of the other, and whatever happens to either ends both.
    let first = memory.leave_token(&mine);
    let second = token_of_other();
    assert_eq!(tokens(&memory), 1);
    assert_eq!(first.land_load(put(6)), refused(None));
    assert_eq!(second.land_load(put(7)), refused(None));
    assert_eq!((memory.len(), tokens(&memory)), (0, 0));
}

#[test]
fn a_copy_answers_only_while_fresh() {
    let (memory, key) = (memory(), key("k"));
    let end = NOW.after(MINUTE);
    land(&memory, &key, put(1));
    assert_eq!(memory.get(&key, Timestamp(end.0 - 1)), Some(put(1)));
    assert_eq!(memory.get(&key, end), None);
    // It still refuses what is older.
    assert_eq!(memory.len(), 1);
}

#[test]
fn an_expired_record_and_a_tombstone_come_back_as_they_are() {
    let (memory, key) = (memory(), key("k"));
    let mut expired = entry(1, 8);
    expired.expires_at = Some(NOW);
    let tombstone = Entry {
        version: version(2),
        value: None,
        expires_at: None,
    };
    for dead in [expired, tombstone] {
        assert!(!dead.is_live(NOW));
        land(&memory, &key, Copy::new(Some(dead.clone()), NOW, MINUTE));
        assert_eq!(memory.get(&key, NOW).and_then(|copy| copy.entry), Some(dead));
    }
}

#[test]
fn an_older_version_is_refused_and_a_newer_one_lands_larger_or_smaller() {
    let (memory, key) = (memory(), key("k"));
    let sized = |number, bytes| Copy::new(Some(entry(number, bytes)), NOW, MINUTE);
    for (number, bytes) in [(2, 10), (3, 1_000), (5, 5), (9, 5)] {
        assert_eq!(land(&memory, &key, sized(number, bytes)), Landing::Landed);
        let refused = refused(Some(sized(number, bytes)));
        assert_eq!(land(&memory, &key, sized(number - 1, 77)), refused);
        assert_eq!(load(&memory, &key, sized(number - 1, 77)), refused);
        assert_eq!(standing(&memory, &key), Some(sized(number, bytes)));
    }
}

#[test]
fn the_same_version_renews_the_times_and_only_forward() {
    let (memory, key) = (memory(), key("k"));
    let at = |loaded_at, fresh_until| Copy {
        entry: Some(entry(1, 8)),
        loaded_at: Timestamp(loaded_at),
        fresh_until: Timestamp(fresh_until),
    };
    assert_eq!(land(&memory, &key, at(20, 100)), Landing::Landed);
    assert_eq!(land(&memory, &key, at(10, 90)), Landing::Renewed);
    assert_eq!(standing(&memory, &key), Some(at(20, 100)));
    assert_eq!(land(&memory, &key, at(30, 110)), Landing::Renewed);
    assert_eq!(standing(&memory, &key), Some(at(30, 110)));
}

#[test]
fn an_absence_lands_only_where_its_token_stands_and_gives_way_to_any_entry() {
    let (memory, key) = (memory(), key("k"));
    assert_eq!(load(&memory, &key, absence()), Landing::Landed);
    assert_eq!(load(&memory, &key, absence()), Landing::Landed);
    assert_eq!(load(&memory, &key, put(1)), Landing::Landed);
    assert_eq!(load(&memory, &key, absence()), Landing::Landed, "the store was asked");
    let late = memory.leave_token(&key);
    assert_eq!(land(&memory, &key, put(2)), Landing::Landed);
    assert_eq!(late.land_load(absence()), refused(Some(put(2))));
    assert_eq!(standing(&memory, &key), Some(put(2)));
}

#[test]
fn a_version_is_dropped_only_while_it_stands() {
    let (memory, key) = (memory(), key("k"));
    land(&memory, &key, put(2));
    assert!(!memory.drop_version(&key, version(1)));
    assert!(!memory.drop_version(&key, version(3)));
    assert_eq!(standing(&memory, &key), Some(put(2)));
    assert!(memory.drop_version(&key, version(2)));
    assert!(memory.is_empty());
    load(&memory, &key, absence());
    assert!(!memory.drop_version(&key, version(2)));
    assert_eq!(standing(&memory, &key), Some(absence()));
}

#[test]
fn an_invalidation_removes_what_is_older_and_a_known_absence() {
    let (memory, key) = (memory(), key("k"));
    for (stands, stays) in [(absence(), false), (put(4), false), (put(5), true), (put(6), true)] {
        memory.leave_token(&key).land_load(stands.clone());
        assert_eq!(memory.invalidate(&key, version(5)), !stays, "{stands:?}");
        assert_eq!(standing(&memory, &key), stays.then_some(stands));
        memory.invalidate(&key, version(99));
    }
    assert!(!memory.invalidate(&key, version(1)), "there is nothing");
}

#[test]
fn whatever_changes_the_slot_ends_the_right_of_who_came_before() {
    let changes: [fn(&Arc<Memory>, &Key); 6] = [
        |memory, key| {
            land(memory, key, put(9));
        },
        |memory, key| {
            land(memory, key, put(1));
        },
        |memory, key| {
            memory.invalidate(key, version(9));
        },
        |memory, key| {
            memory.invalidate(key, version(1));
        },
        |memory, key| {
            memory.drop_version(key, version(5));
        },
        evict,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let (memory, key) = (memory_of(10_000), key("k"));
        land(&memory, &key, put(5));
        let tokens = [(); 3].map(|()| memory.leave_token(&key));
        assert_eq!(
            standing(&memory, &key),
            Some(put(5)),
            "it stays readable beside a token"
        );
        change(&memory, &key);
        // Now the slot forgets.
        if memory.version(&key).is_some() {
            evict(&memory, &key);
        }
        let [load, write, asked] = tokens;
        assert_eq!(load.land_load(put(7)), refused(None), "change {number}");
        assert_eq!(write.land_write(put(7)), refused(None), "change {number}");
        assert_eq!(asked.land_load(absence()), refused(None), "change {number}");
        assert_eq!(standing(&memory, &key), None);
    }
}

#[test]
fn late_and_newer_than_what_stands_a_write_lands_and_a_load_removes() {
    let (memory, key) = (memory(), key("k"));
    let tokens = [(); 4].map(|()| memory.leave_token(&key));
    let [first, write, load, over_absence] = tokens;
    assert_eq!(first.land_write(put(1)), Landing::Landed);
    assert_eq!(write.land_write(put(2)), Landing::Landed, "over an older entry");
    assert_eq!(load.land_load(put(3)), refused(None), "it may have been withdrawn");
    assert_eq!(standing(&memory, &key), None, "and may not have been");
    self::load(&memory, &key, absence());
    assert_eq!(over_absence.land_write(put(4)), refused(None));
    assert_eq!(standing(&memory, &key), None, "a write leaves nothing older");
}

#[test]
fn tokens_are_no_answer_take_no_room_and_go_with_their_holders() {
    let memory = memory_of(10_000);
    for number in 0.. {
        land(&memory, &key(format!("copy {number}")), put(1));
        if memory.len() <= number {
            break;
        }
    }
    let (len, bytes) = (memory.len(), memory.bytes());
    let left: Vec<Token> = (0..10_000)
        .map(|number| memory.leave_token(&key(number % 5_000)))
        .collect();
    assert_eq!((memory.len(), memory.bytes()), (len, bytes), "nothing is evicted");
    assert_eq!(memory.get(&key(0), NOW), None);
    assert_eq!(memory.version(&key(0)), None);
    assert_eq!(tokens(&memory), 5_000, "one for all of a key's holders");
    drop(left);
    assert_eq!(tokens(&memory), 0);
}

#[test]
fn a_token_is_given_back_by_its_own_holders_only() {
    let (memory, key) = (memory(), key("k"));
    let (gone, shared) = (memory.leave_token(&key), memory.leave_token(&key));
    drop(gone);
    assert_eq!(shared.land_load(put(1)), Landing::Landed);
    let old = memory.leave_token(&key);
    memory.drop_version(&key, version(1));
    let new = memory.leave_token(&key);
    drop(old);
    assert_eq!(new.land_load(put(1)), Landing::Landed);
    assert_eq!(tokens(&memory), 0);
}

#[test]
fn no_bytes_keep_nothing() {
    let memory = memory_of(0);
    assert_eq!(land(&memory, &key("k"), put(1)), Landing::Landed);
    assert_eq!(standing(&memory, &key("k")), None);
}

#[test]
fn a_copy_too_large_to_keep_still_ends_the_older_one() {
    let (memory, key) = (memory_of(10_000), key("k"));
    land(&memory, &key, put(1));
    land(&memory, &key, Copy::new(Some(entry(2, 20_000)), NOW, MINUTE));
    assert_eq!(standing(&memory, &key), None);
    assert_eq!(memory.bytes(), 0);
}

#[test]
fn the_bytes_hold_as_copies_come_and_grow_in_place() {
    let bytes_max = 1_000_000;
    let memory = memory_of(bytes_max);
    let mut rng = rand::rng();
    for number in 1..30_000 {
        // Few enough keys that most landings replace, and values that grow over time.
        let bytes = rng.random_range(0..=number as usize);
        let key = key(rng.random_range(0..200));
        land(&memory, &key, Copy::new(Some(entry(number, bytes)), NOW, MINUTE));
        assert!(memory.bytes() <= bytes_max as u64);
    }
    let found: usize = (0..200)
        .filter_map(|name| standing(&memory, &key(name)).map(|copy| Kept::new(&key(name), copy).weight()))
        .sum();
    assert_eq!(found as u64, memory.bytes());
    assert!(found > bytes_max / 2, "the room is used: {found}");
}

#[test]
fn concurrent_landings_leave_the_highest_and_a_reader_never_sees_a_step_back() {
    const KEYS: usize = 4;
    const LANDINGS: i64 = 100_000;
    let memory = memory();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut seen = [0; KEYS];
            while !done.load(Ordering::Relaxed) {
                for (name, seen) in seen.iter_mut().enumerate() {
                    if let Some(copy) = memory.get(&key(name), NOW) {
                        let number = copy.version().expect("only entries land").get();
                        assert!(number >= *seen, "{number} after {seen}");
                        *seen = number;
                    }
                }
            }
        });
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let memory = &memory;
                scope.spawn(move || {
                    let mut rng = rand::rng();
                    for round in 0..LANDINGS {
                        // Out of order within a window, so that half of the landings come late; sizes force both ways in.
                        let number = 1 + round * 3 + writer + rng.random_range(0..30);
                        let bytes = rng.random_range(0..64);
                        let copy = Copy::new(Some(entry(number, bytes)), NOW, MINUTE);
                        let key = key(rng.random_range(0..KEYS));
                        land(memory, &key, copy);
                        let stands = memory.version(&key);
                        assert!(stands.is_some_and(|stands| stands >= version(number)));
                    }
                    for name in 0..KEYS {
                        land(memory, &key(name), put(LANDINGS * 3 + 100 + writer));
                    }
                })
            })
            .collect();
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        // First of all, or the reader of a failed test would never end.
        done.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok), "no writer fails");
    });
    for name in 0..KEYS {
        assert_eq!(standing(&memory, &key(name)), Some(put(LANDINGS * 3 + 102)));
    }
}

#[test]
fn whoever_lands_on_an_emptied_slot_at_once_leaves_the_highest() {
    let memory = memory();
    let barrier = Arc::new(Barrier::new(3));
    let threads: Vec<_> = (1..=3)
        .map(|number| {
            let (memory, barrier) = (Arc::clone(&memory), Arc::clone(&barrier));
            thread::spawn(move || {
                for round in 0..5_000 {
                    barrier.wait();
                    land(&memory, &key(round), put(number));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    for round in 0..5_000 {
        assert_eq!(standing(&memory, &key(round)), Some(put(3)), "round {round}");
    }
}

#[test]
fn nothing_is_trusted_before_it_is_said_and_nothing_after_it_ends() {
    let (memory, key) = (memory(), key("k"));
    land(&memory, &key, put(1));
    memory.trust_until(NOW);
    assert!(memory.is_on(Timestamp(i64::MAX - 1)), "it was never gated");
    memory.gate();
    assert_eq!((memory.is_on(NOW), memory.get(&key, NOW)), (false, None));
    assert_eq!(memory.last_known(&key, NOW), None);
    let (until, before) = (NOW.after(MINUTE / 2), Timestamp(NOW.after(MINUTE / 2).0 - 1));
    memory.trust_until(until);
    memory.trust_until(NOW);
    assert_eq!(memory.get(&key, before), Some(put(1)), "trust gets no shorter");
    assert_eq!((memory.is_on(until), memory.get(&key, until)), (false, None));
    assert_eq!(memory.last_known(&key, until), None);
    memory.trust_until(NOW.after(2 * MINUTE));
    let expired = NOW.after(MINUTE);
    assert_eq!(memory.get(&key, expired), None);
    assert_eq!(memory.last_known(&key, expired), Some(put(1)), "however old");
}

#[test]
fn while_it_is_off_nothing_lands_neither_then_nor_later() {
    let (memory, key) = (memory(), key("k"));
    land(&memory, &key, put(1));
    let from_before = [(); 2].map(|()| memory.leave_token(&key));
    memory.gate();
    memory.drop_all();
    assert_eq!((memory.len(), memory.bytes(), tokens(&memory)), (0, 0, 0));
    let from_meanwhile = [(); 2].map(|()| memory.leave_token(&key));
    assert_eq!(tokens(&memory), 0);
    let [before, before_later] = from_before;
    let [meanwhile, meanwhile_later] = from_meanwhile;
    assert_eq!(before.land_load(put(9)), refused(None));
    assert_eq!(meanwhile.land_write(put(9)), refused(None));
    memory.trust_until(NOW.after(MINUTE));
    assert_eq!(before_later.land_load(put(9)), refused(None));
    assert_eq!(meanwhile_later.land_load(put(9)), refused(None));
    assert!(memory.is_empty());
    assert_eq!(load(&memory, &key, put(2)), Landing::Landed);
    assert_eq!(standing(&memory, &key), Some(put(2)));
}

#[test]
fn trust_that_merely_ended_keeps_what_stands_and_what_lands() {
    let (memory, key, other) = (memory(), key("k"), key("other"));
    memory.gate();
    memory.trust_until(NOW);
    land(&memory, &key, put(1));
    let token = memory.leave_token(&other);
    assert!(!memory.is_on(NOW));
    assert_eq!(token.land_load(put(2)), Landing::Landed);
    assert_eq!(memory.version(&key), Some(version(1)), "a floor for what others hold");
    memory.trust_until(NOW.after(MINUTE));
    assert_eq!(memory.get(&key, NOW), Some(put(1)));
    assert_eq!(memory.get(&other, NOW), Some(put(2)));
}

#[test]
fn dropping_everything_ends_every_right_to_land_and_leaves_the_gate_as_it_was() {
    for gated in [false, true] {
        let memory = memory();
        if gated {
            memory.gate();
            memory.trust_until(NOW.after(MINUTE));
        }
        let left: Vec<Token> = (0..1_000).map(|number| memory.leave_token(&key(number))).collect();
        for number in 500..1_500 {
            land(&memory, &key(number), put(1));
        }
        memory.drop_all();
        assert_eq!((memory.len(), memory.bytes(), tokens(&memory)), (0, 0, 0));
        for token in left {
            assert_eq!(token.land_load(put(1)), refused(None));
        }
        assert!(memory.is_empty());
        assert_eq!(load(&memory, &key(0), put(1)), Landing::Landed);
        assert_eq!(standing(&memory, &key(0)), Some(put(1)));
    }
}

#[test]
fn an_invalidation_of_whatever_version_takes_the_key_and_nothing_else() {
    let memory = memory();
    let names = ["a:1", "a:2", "b:1"];
    let stale: Vec<Token> = names
        .iter()
        .map(|name| {
            land(&memory, &key(name), put(9));
            memory.leave_token(&key(name))
        })
        .collect();
    assert!(memory.invalidate_key(&key("a:1")));
    assert!(!memory.invalidate_key(&key("a:1")), "there is nothing");
    let landings: Vec<Landing> = stale.into_iter().map(|token| token.land_load(put(9))).collect();
    assert_eq!(landings, [refused(None), Landing::Renewed, Landing::Renewed]);
    let rights: Vec<Token> = names.iter().map(|name| memory.leave_token(&key(name))).collect();
    assert_eq!(memory.invalidate_where(|key| key.key().starts_with("a:")), 1);
    let landings: Vec<Landing> = rights.into_iter().map(|token| token.land_load(put(9))).collect();
    assert_eq!(landings, [refused(None), refused(None), Landing::Renewed]);
    let standing = names.map(|name| standing(&memory, &key(name)));
    assert_eq!(standing, [None, None, Some(put(9))]);
}

#[test]
fn every_matching_copy_of_every_shard_is_invalidated() {
    let memory = memory();
    for number in 0..50_000 {
        land(&memory, &key(number), put(1));
    }
    let odd = |key: &Key| key.key().ends_with(['1', '3', '5', '7', '9']);
    assert_eq!(memory.invalidate_where(odd), 25_000);
    assert_eq!(memory.len(), 25_000);
    assert!((0..50_000).all(|number| memory.version(&key(number)).is_some() == (number % 2 == 0)));
}

/// Loads that read a store and land, while everything is dropped again and again as when messages were missed: what a load read before
/// the last drop must not stand after it.
#[test]
fn no_load_from_before_everything_was_dropped_lands_after_it() {
    const DROPS: i64 = 5_000;
    const KEYS: i64 = 64;
    let (memory, store) = (memory(), AtomicI64::new(1));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut rng = rand::rng();
                while !done.load(Ordering::Relaxed) {
                    let key = key(rng.random_range(0..KEYS));
                    let token = memory.leave_token(&key);
                    let found = store.load(Ordering::SeqCst);
                    token.land_load(put(found));
                }
            });
        }
        let dropper = scope.spawn(|| {
            for round in 2..DROPS {
                memory.gate();
                // Nobody hears of it.
                store.store(round, Ordering::SeqCst);
                memory.drop_all();
                memory.trust_until(NOW);
                for number in 0..KEYS {
                    let seen = standing(&memory, &key(number)).and_then(|copy| copy.version());
                    assert!(
                        seen.is_none_or(|seen| seen == version(round)),
                        "{seen:?} in round {round}"
                    );
                }
            }
        });
        let ended = dropper.join();
        // First of all, or the threads of a failed test would never end.
        done.store(true, Ordering::Relaxed);
        assert!(ended.is_ok(), "nothing older stands");
    });
}

prop_compose! {
    /// Distinct writes of one key: puts, deletes, records that have expired, and sizes that grow and shrink.
    fn writes()(
        versions in vec(1..=i64::MAX, 1..12),
        kinds in vec((0..3, 0..200_usize), 12),
    ) -> Vec<Entry> {
        let mut versions = versions;
        versions.sort_unstable();
        versions.dedup();
        versions
            .into_iter()
            .zip(kinds)
            .map(|(number, (kind, bytes))| Entry {
                version: version(number),
                value: (kind != 0).then(|| Bytes::from(vec![b'v'; bytes])),
                expires_at: (kind == 2).then_some(NOW),
            })
            .collect()
    }
}

proptest! {
    #[test]
    fn any_order_repetition_and_late_redelivery_end_at_the_highest_version(
        (writes, first, second) in writes().prop_flat_map(|writes| {
            let all: Vec<usize> = (0..writes.len()).collect();
            let some = subsequence(all.clone(), 0..=writes.len()).prop_shuffle();
            // Some are lost at first; then all are delivered, in another order.
            (Just(writes), some, Just(all).prop_shuffle())
        })
    ) {
        let (memory, key) = (memory(), key("k"));
        for index in first.iter().chain(&second) {
            land(&memory, &key, Copy::new(Some(writes[*index].clone()), NOW, MINUTE));
        }
        let highest = writes.iter().max_by_key(|entry| entry.version).cloned();
        prop_assert_eq!(standing(&memory, &key).and_then(|copy| copy.entry), highest);
    }
}
