//! Proves that the judge of the crash test accepts what counters can come to, and complains of every way in which they can be wrong.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    crash_counters::{Answer, Counters, NAMED_MAX, NAMESPACE, ONCE},
    ledger::Change,
};

const SEEDS: u64 = 40;
const COUNTERS: u32 = 2;

/// What a caller of the counters may be told, and what the store does.
#[derive(Default)]
struct Register {
    value: i64,
    version: i64,
    rows: Vec<Answer>,
}

impl Register {
    fn add(&mut self, delta: i64) -> Answer {
        self.value += delta;
        self.version += 3;
        let answer = Answer {
            value: self.value,
            version: self.version,
        };
        self.rows.push(answer);
        answer
    }
}

/// How the counting goes wrong, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    CountedTwice,
    NotCounted,
    AnsweredAnew,
    OneVersionTwice,
    OutOfOrder,
    RowLost,
    RowBack,
    FoundAtOnce,
    CountedOfNobody,
}

const WRONGS: [Wrong; 9] = [
    Wrong::CountedTwice,
    Wrong::NotCounted,
    Wrong::AnsweredAnew,
    Wrong::OneVersionTwice,
    Wrong::OutOfOrder,
    Wrong::RowLost,
    Wrong::RowBack,
    Wrong::FoundAtOnce,
    Wrong::CountedOfNobody,
];

#[test]
fn sums_that_can_be_are_accepted() {
    for seed in 0..SEEDS {
        let counters = count(seed, None);
        assert!(
            counters.complaints.is_empty(),
            "seed {seed}: {:#?}",
            counters.complaints
        );
        assert!(counters.counted > 100 && counters.doubted > 10 && counters.found > 5);
    }
}

#[test]
fn every_way_to_count_wrong_is_noticed() {
    for wrong in WRONGS {
        for seed in 0..SEEDS {
            let counters = count(seed, Some(wrong));
            assert!(!counters.complaints.is_empty(), "{wrong:?}, seed {seed}");
        }
    }
}

/// Adds by chance, with something wrong in the midst.
fn count(seed: u64, wrong: Option<Wrong>) -> Counters {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut counters = Counters::new(7);
    let mut registers: Vec<Register> = (0..COUNTERS).map(|_| Register::default()).collect();
    for number in 0..200 {
        let wrong = wrong.filter(|_| number == 150);
        let counter = rng.random_range(0..COUNTERS);
        let register = &mut registers[counter as usize];
        let named = wrong.is_some() || rng.random_range(0..5) > 0;
        let delta = if named { rng.random_range(1..=NAMED_MAX) } else { ONCE };
        let sent = counters.send(0, counter, delta, named);
        match wrong {
            Some(Wrong::CountedTwice) => {
                register.add(delta);
                counters.doubt(sent.number);
                counters.send_again(sent.number);
            }
            Some(Wrong::NotCounted) => {
                let answer = Answer {
                    value: register.value + delta,
                    version: register.version + 1,
                };
                counters.answer(sent.number, answer, false);
                continue;
            }
            Some(Wrong::CountedOfNobody) => {
                register.add(ONCE * 100);
            }
            _ => {}
        }
        match rng.random_range(0..10) {
            // Nobody was told: it may have been counted.
            0..3 if wrong.is_none() => {
                counters.doubt(sent.number);
                let counted = rng.random::<bool>().then(|| register.add(delta));
                if named {
                    let again = counters.send_again(sent.number);
                    let answer = counted.unwrap_or_else(|| register.add(delta));
                    counters.answer(again.number, answer, counted.is_some());
                }
            }
            _ => {
                let answer = register.add(delta);
                counters.answer(sent.number, answer, wrong == Some(Wrong::FoundAtOnce));
                let told = Told {
                    number: sent.number,
                    counter,
                    delta,
                    answer,
                };
                go_wrong(wrong, &mut counters, register, told);
            }
        }
    }
    counters.audit(&changes(&registers));
    counters.settle();
    counters
}

/// An add that was answered.
struct Told {
    number: usize,
    counter: u32,
    delta: i64,
    answer: Answer,
}

/// What goes wrong once an add was answered.
fn go_wrong(wrong: Option<Wrong>, counters: &mut Counters, register: &mut Register, told: Told) {
    let Told {
        number,
        counter,
        delta,
        answer,
    } = told;
    match wrong {
        Some(Wrong::AnsweredAnew) => {
            counters.send_again(number);
            let again = register.add(delta);
            counters.answer(number, again, false);
        }
        Some(Wrong::OneVersionTwice) => {
            let other = counters.send(0, counter, delta, true);
            counters.answer(other.number, answer, false);
        }
        Some(Wrong::OutOfOrder) => {
            let (first, second) = (register.add(1), register.add(1));
            let swapped = [
                Answer {
                    version: second.version,
                    ..first
                },
                Answer {
                    version: first.version,
                    ..second
                },
            ];
            for answer in swapped {
                let sent = counters.send(0, counter, 1, true);
                counters.answer(sent.number, answer, false);
            }
        }
        Some(Wrong::RowLost) => {
            register.rows.pop();
            register.value -= delta;
        }
        Some(Wrong::RowBack) => {
            let last = register.rows.len() - 1;
            register.rows.swap(last - 1, last);
        }
        _ => {}
    }
}

/// The audit of the rows that the registers became.
fn changes(registers: &[Register]) -> Vec<Change> {
    let of_register = |(counter, register): (usize, &Register)| {
        let mut before = None;
        let change = |row: &Answer| Change {
            seq: 0,
            namespace: NAMESPACE.to_owned(),
            key: format!("c{counter:03}"),
            before: before.replace(row.version),
            version: Some(row.version),
            value: Some(row.value.to_string().into_bytes()),
            expires_millis: None,
        };
        register.rows.iter().map(change).collect::<Vec<Change>>()
    };
    registers.iter().enumerate().flat_map(of_register).collect()
}
