//! The decision against a model that applies operations one by one, and what follows from it for counters and for absent keys.

use std::collections::BTreeMap;

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;
use crate::model::{Fingerprint, Request};

const IDS: [&str; 4] = ["a", "b", "c", "d"];
const KEYS: [(&str, &str); 3] = [("orders", "one"), ("orders", "two"), ("carts", "one")];

fn version(number: i64) -> Version {
    Version::new(number).expect("positive")
}

fn key((namespace, key): (&str, &str)) -> Key {
    Key::new(namespace, key).expect("valid")
}

fn tags(tags: &[&str]) -> Tags {
    Tags::new(tags).expect("valid")
}

fn answered((id, fingerprint): (&str, u8), ends_at: i64, number: i64) -> Answered {
    Answered {
        request: Request {
            id: RequestId::new(id).expect("valid"),
            fingerprint: Fingerprint([fingerprint; 16]),
            ends_at: Timestamp(ends_at),
        },
        answer: Answer {
            version: version(number),
            counter: Some(number),
            expires_at: None,
        },
    }
}

fn times() -> impl Strategy<Value = Option<Timestamp>> {
    option::of((0..20i64).prop_map(Timestamp))
}

fn values() -> impl Strategy<Value = Bytes> {
    let edges = [
        i64::MAX.to_string(),
        i64::MIN.to_string(),
        "01".to_owned(),
        "text".to_owned(),
    ];
    prop_oneof![(-2..3i64).prop_map(|count| count.to_string()), select(edges.to_vec()),].prop_map(Bytes::from)
}

fn changes() -> impl Strategy<Value = Change> {
    let all_tags = select(vec![tags(&[]), tags(&["red"])]);
    prop_oneof![
        (values(), all_tags, times()).prop_map(|(value, tags, expires_at)| Change::Put {
            value,
            tags,
            expires_at
        }),
        Just(Change::Delete),
        times().prop_map(|expires_at| Change::Touch { expires_at }),
        (-2..3i64, times()).prop_map(|(delta, expires_at)| Change::Add { delta, expires_at }),
    ]
}

fn operations() -> impl Strategy<Value = Operation> {
    let condition = option::of(prop_oneof![
        Just(Condition::Absent),
        Just(Condition::Present),
        (1..10i64).prop_map(|number| Condition::Version(version(number))),
    ]);
    let request = (select(&IDS[..]), 0..2u8, 5..30i64);
    let acknowledged = option::weighted(0.1, 1..10i64);
    (
        select(&KEYS[..]),
        1..10i64,
        condition,
        changes(),
        request,
        0..20i64,
        acknowledged,
    )
        .prop_map(
            |(name, number, condition, change, (id, fingerprint, ends_at), asked_at, acknowledged)| Operation {
                key: key(name),
                version: version(number),
                condition,
                change,
                request: answered((id, fingerprint), ends_at, 1).request,
                asked_at: Timestamp(asked_at),
                acknowledged: acknowledged.map(version),
            },
        )
}

fn rows() -> impl Strategy<Value = Option<Standing>> {
    let row = (1..8i64, option::of(values()), times()).prop_map(|(number, value, expires_at)| Standing {
        entry: Entry {
            version: version(number),
            value,
            expires_at,
        },
        tags: tags(&["old"]),
    });
    option::of(row)
}

/// A store that applies one operation after the other.
#[derive(Debug, Clone, PartialEq)]
struct Model {
    rows: BTreeMap<Key, Standing>,
    known: BTreeMap<(String, String), Answered>,
    horizon: i64,
}

impl Model {
    fn apply(&mut self, operation: &Operation, now: Timestamp) -> Decided {
        let name = (
            operation.key.namespace().to_owned(),
            operation.request.id.as_str().to_owned(),
        );
        if let Some(known) = self.known.get(&name)
            && known.request.ends_at >= operation.asked_at
        {
            if known.request.fingerprint != operation.request.fingerprint {
                return Decided::Reused;
            }
            return Decided::Repeated(known.answer);
        }
        let row = self.rows.get(&operation.key);
        let standing = row.map_or(self.horizon, |row| row.entry.version.get());
        if operation
            .acknowledged
            .is_some_and(|acknowledged| acknowledged.get() > standing)
        {
            return Decided::Behind;
        }
        let live = row.filter(|row| row.entry.value.is_some() && row.entry.expires_at.is_none_or(|at| at > now));
        let conflict = Decided::Refused(Refusal::Conflict {
            standing: live.map(|row| row.entry.version),
        });
        match operation.condition {
            Some(Condition::Absent) if live.is_some() => return conflict,
            Some(Condition::Present) if live.is_none() => return Decided::Refused(Refusal::Absent),
            Some(Condition::Version(wanted)) if live.map(|row| row.entry.version) != Some(wanted) => return conflict,
            _ => {}
        }
        if operation.version.get() <= standing {
            return Decided::Outdated {
                standing: version(standing),
            };
        }
        let (next, counter) = match changed(operation, live) {
            Ok(changed) => changed,
            Err(refusal) => return Decided::Refused(refusal),
        };
        let answer = Answer {
            version: operation.version,
            counter,
            expires_at: next.entry.expires_at,
        };
        let entry = next.entry.clone();
        let request = operation.request.clone();
        self.known.insert(name, Answered { request, answer });
        self.rows.insert(operation.key.clone(), next);
        Decided::Applied { entry, answer }
    }

    /// One transaction, as a backend makes it.
    fn transact(&mut self, operations: &[Operation], now: Timestamp) -> Plan {
        let rows: Vec<Option<Standing>> = wanted(operations)
            .iter()
            .map(|wanted| {
                let mut row = self.rows.get(wanted.key).cloned()?;
                if !wanted.content {
                    row.entry.value = row.entry.value.map(|_| Bytes::new());
                    row.tags = Tags::default();
                }
                Some(row)
            })
            .collect();
        let known: Vec<Option<Answered>> = operations
            .iter()
            .map(|one| {
                let name = (one.key.namespace().to_owned(), one.request.id.as_str().to_owned());
                self.known.get(&name).cloned()
            })
            .collect();
        let plan = decide(operations, &rows, &known, Version::new(self.horizon), now);
        for Changed { write, seen } in &plan.changed {
            let before = self.rows.get(&write.key).map(|row| row.entry.version);
            assert_eq!(*seen, before, "the guard is what was read");
            assert!(before < Some(write.entry.version), "a version rises");
            let row = Standing {
                entry: write.entry.clone(),
                tags: write.tags.clone(),
            };
            self.rows.insert(write.key.clone(), row);
        }
        assert!(plan.changed.is_sorted_by(|a, b| a.write.key < b.write.key));
        for KeyedAnswer { key, answered } in &plan.remembered {
            let name = (key.namespace().to_owned(), answered.request.id.as_str().to_owned());
            self.known.insert(name, answered.clone());
        }
        plan
    }
}

/// What a change makes of what is live.
fn changed(operation: &Operation, live: Option<&Standing>) -> Result<(Standing, Option<i64>), Refusal> {
    let mut next = Standing {
        entry: Entry {
            version: operation.version,
            value: None,
            expires_at: None,
        },
        tags: tags(&[]),
    };
    let mut counter = None;
    match &operation.change {
        Change::Put {
            value,
            tags,
            expires_at,
        } => {
            (next.entry.value, next.entry.expires_at) = (Some(value.clone()), *expires_at);
            next.tags = tags.clone();
        }
        Change::Delete => {}
        Change::Touch { expires_at } => {
            let Some(live) = live else {
                return Err(Refusal::Absent);
            };
            (next.entry.value, next.entry.expires_at) = (live.entry.value.clone(), *expires_at);
            next.tags = live.tags.clone();
        }
        Change::Add { delta, expires_at } => {
            next.entry.expires_at = *expires_at;
            let mut count = 0i128;
            if let Some(live) = live {
                let text = live.entry.value.as_deref().unwrap_or_default();
                let mut numbers = (-99..99).chain(i64::MIN..i64::MIN + 99).chain(i64::MAX - 99..=i64::MAX);
                let Some(number) = numbers.find(|number| number.to_string().as_bytes() == text) else {
                    // So many additions are never in one test.
                    let is_near_an_edge = text.len() >= 19 && text.iter().all(|b| b.is_ascii_digit() || *b == b'-');
                    assert!(!is_near_an_edge, "an edge that the model does not know");
                    return Err(Refusal::NotACounter);
                };
                count = number.into();
                next.entry.expires_at = live.entry.expires_at;
                next.tags = live.tags.clone();
            }
            count += i128::from(*delta);
            let Ok(count) = i64::try_from(count) else {
                return Err(Refusal::OutOfRange);
            };
            next.entry.value = Some(count.to_string().into());
            counter = Some(count);
        }
    }
    Ok((next, counter))
}

fn sorted(mut operations: Vec<Operation>) -> Vec<Operation> {
    operations.sort_by(|a, b| (&a.key, a.version).cmp(&(&b.key, b.version)));
    operations
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn a_transaction_is_its_operations_one_by_one(
        transactions in vec((vec(operations(), 0..8), 0..20i64), 1..5),
        standing in [rows(), rows(), rows()],
        known in vec((select(&IDS[..]), 0..2u8, 0..25i64, 1..10i64), 0..3),
        horizon in 0..6i64,
    ) {
        let rows = KEYS.iter().zip(standing).filter_map(|(name, row)| Some((key(*name), row?))).collect();
        let known = known.into_iter().map(|(id, fingerprint, ends_at, number)| {
            (("orders".to_owned(), id.to_owned()), answered((id, fingerprint), ends_at, number))
        });
        let mut model = Model { rows, known: known.collect(), horizon };
        let mut store = model.clone();
        for (operations, now) in transactions {
            let (operations, now) = (sorted(operations), Timestamp(now));
            let before = model.clone();
            let decided: Vec<Decided> = operations.iter().map(|operation| model.apply(operation, now)).collect();
            let plan = store.transact(&operations, now);
            prop_assert_eq!(&plan.decided, &decided);
            prop_assert_eq!(&store, &model);
            // What is not guarded by a row that is locked or made.
            for (place, operation) in operations.iter().enumerate() {
                let says_no = matches!(
                    decided[place],
                    Decided::Refused(_) | Decided::Behind | Decided::Outdated { .. }
                );
                let has_row = before.rows.contains_key(&operation.key) || model.rows.contains_key(&operation.key);
                prop_assert_eq!(plan.unguarded.contains(&place), says_no && !has_row);
            }
            // The same again changes nothing of what was applied within its window.
            let again = store.transact(&operations, now);
            for ((operation, first), second) in operations.iter().zip(&decided).zip(&again.decided) {
                if let (Decided::Applied { answer, .. }, true) = (first, operation.request.ends_at >= operation.asked_at) {
                    let name = ("", operation.request.id.as_str());
                    let once = operations.iter().filter(|one| one.request.id.as_str() == name.1).count() == 1;
                    prop_assert!(!once || *second == Decided::Repeated(*answer), "{:?}", second);
                }
            }
            store = model.clone();
        }
    }

    #[test]
    fn additions_add_up_however_they_are_cut(deltas in vec(-1_000..1_000i64, 1..60), cuts in vec(1..9usize, 60)) {
        let mut store = Model { rows: BTreeMap::new(), known: BTreeMap::new(), horizon: 0 };
        let additions: Vec<Operation> = (1..).zip(&deltas).map(|(number, delta)| Operation {
            key: key(KEYS[0]),
            version: version(number),
            condition: None,
            change: Change::Add { delta: *delta, expires_at: None },
            request: Request { id: RequestId::new(&format!("id{number}")).expect("valid"), ..answered(("a", 0), 100, 1).request },
            asked_at: Timestamp(0),
            acknowledged: None,
        }).collect();
        let mut left = &additions[..];
        for cut in cuts {
            let (some, rest) = left.split_at(cut.min(left.len()));
            let plan = store.transact(some, Timestamp(0));
            prop_assert!(plan.changed.len() <= 1, "one row, moved once");
            // And whoever tries again counts nothing twice.
            store.transact(some, Timestamp(0));
            left = rest;
        }
        store.transact(left, Timestamp(0));
        let value = store.rows.get(&key(KEYS[0])).and_then(|row| row.entry.value.clone());
        prop_assert_eq!(value, Some(deltas.iter().sum::<i64>().to_string().into()));
    }

    #[test]
    fn one_of_those_who_want_an_absent_key_wins(count in 1..20i64, standing in rows()) {
        let rows = standing.into_iter().map(|row| (key(KEYS[0]), row)).collect();
        let mut store = Model { rows, known: BTreeMap::new(), horizon: 0 };
        let live = store.rows.values().any(|row| row.entry.is_live(Timestamp(10)));
        let puts: Vec<Operation> = (10..10 + count).map(|number| Operation {
            key: key(KEYS[0]),
            version: version(number),
            condition: Some(Condition::Absent),
            change: Change::Put { value: Bytes::new(), tags: tags(&[]), expires_at: None },
            request: Request { id: RequestId::new(&format!("id{number}")).expect("valid"), ..answered(("a", 0), 100, 1).request },
            asked_at: Timestamp(10),
            acknowledged: None,
        }).collect();
        let decided = store.transact(&puts, Timestamp(10)).decided;
        let won = decided.iter().filter(|decided| matches!(decided, Decided::Applied { .. })).count();
        prop_assert_eq!(won, usize::from(!live));
    }
}
