//! What happens in a round: who is stopped, when and how. All of it follows from the seed.

use std::{ops::Range, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::{harness::postgres::Stop, load::namespaces};

/// The kill points of the build, each with how often it may be reached before; and whether it is on the way of a stop in order.
pub const KILL_POINTS: [(&str, u64, bool); 15] = [
    ("journal-before-write", 200, false),
    ("journal-before-sync", 200, false),
    ("journal-after-sync", 200, false),
    ("segment-before-rename", 1, false),
    ("segment-renamed", 1, false),
    ("segment-freed", 1, false),
    ("write-appended", 250, false),
    ("write-published", 250, false),
    ("write-pending", 250, false),
    ("decision-committed", 60, false),
    ("drain-before-commit", 40, false),
    ("drain-committed", 40, false),
    ("recovered", 1, false),
    ("stop-before-drain", 1, true),
    ("stop-drained", 1, true),
];

/// A round: the gateway serves, ends, and is started again.
#[derive(Debug)]
pub struct Plan {
    /// Of the choices that the clients make.
    pub seed: u64,
    /// The namespaces that they use.
    pub namespaces: Range<usize>,
    /// How long they are busy before anything happens.
    pub load: Duration,
    pub outage: Option<Outage>,
    pub end: End,
    pub redis: Redis,
    /// Whether a start fails before one succeeds: late, with the journal read and its port taken.
    pub failed_start: bool,
    /// Whether PostgreSQL, if it was stopped, is started after the gateway.
    pub gateway_first: bool,
    /// Whether the store is judged before there are clients again.
    pub check: bool,
}

/// PostgreSQL is stopped before the gateway ends.
#[derive(Debug)]
pub struct Outage {
    pub how: Stop,
    /// How long the clients are busy with PostgreSQL stopped.
    pub lasts: Duration,
}

/// How the gateway ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// By SIGKILL.
    Kill,
    /// By itself, there: `NAME:N`.
    KillPoint {
        name: &'static str,
        point: String,
        stopping: bool,
    },
    /// By SIGTERM.
    Terminate,
    /// By two, the second to an impatient end.
    TerminateTwice,
}

/// What happens to Redis while there is no gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redis {
    Nothing,
    Flushed,
    Restarted,
    /// Stopped, and started when the gateway serves again.
    Away,
}

/// Makes one plan after the other.
#[derive(Debug)]
pub struct Planner {
    rng: StdRng,
    /// The kill points whose turn has not come.
    deck: Vec<(&'static str, u64, bool)>,
}

impl Planner {
    pub fn new(seed: u64) -> Planner {
        Planner {
            rng: StdRng::seed_from_u64(seed),
            deck: Vec::new(),
        }
    }

    pub fn plan(&mut self) -> Plan {
        let end = self.end();
        let rng = &mut self.rng;
        Plan {
            seed: rng.random(),
            namespaces: namespaces(rng.random_range(0..8)),
            load: millis(rng, 50..700),
            // Most ends at kill points come before an outage would: so many make it a third of the kills.
            outage: (rng.random_range(0..9) < 5).then(|| Outage {
                how: if rng.random() { Stop::Fast } else { Stop::Immediate },
                lasts: match rng.random_range(0..8) {
                    // All that was delayed falls due, and is tried in vain.
                    0 => millis(rng, 2_000..3_000),
                    _ => millis(rng, 100..800),
                },
            }),
            end,
            redis: match rng.random_range(0..10) {
                0 => Redis::Flushed,
                1 => Redis::Restarted,
                2 => Redis::Away,
                _ => Redis::Nothing,
            },
            failed_start: rng.random_range(0..8) == 0,
            gateway_first: rng.random(),
            check: rng.random_range(0..5) < 2,
        }
    }

    fn end(&mut self) -> End {
        match self.rng.random_range(0..20) {
            0..9 => End::Kill,
            9..17 => {
                if self.deck.is_empty() {
                    self.deck.extend(KILL_POINTS);
                    self.deck.shuffle(&mut self.rng);
                }
                let (name, times_max, stopping) = self.deck.pop().expect("filled just now");
                let times = self.rng.random_range(1..=times_max);
                End::KillPoint {
                    name,
                    point: format!("{name}:{times}"),
                    stopping,
                }
            }
            17..19 => End::Terminate,
            _ => End::TerminateTwice,
        }
    }
}

fn millis(rng: &mut StdRng, range: Range<u64>) -> Duration {
    Duration::from_millis(rng.random_range(range))
}
