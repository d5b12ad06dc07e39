//! What breaks, when, and for how long. All of it follows from the seed.
//!
//! Owns the kinds of faults and their order: three lanes, each one fault after the other: one for Redis and what leads there, one for
//! everything else, and one for what leads from one gateway to Redis, which is the victim for a while. By turns the lanes run alone and
//! together; alone, the second leaves Redis in peace for long enough that the bound of calm times can be judged, and gateways be killed; and
//! in the turn of the third the others' writes have to reach the victim within that bound.

use std::{ops::Range, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::{harness::proxy::Passage, stage::REPLICAS};

/// How long Redis must have been well for a gateway before that is killed: one that dies with a publish outstanding leaves what it did not
/// publish stale for the lifetime of a copy, and no bound is promised but that.
const PEACE: Duration = Duration::from_secs(8);

/// How long a lane, or both, have their turn.
const TURN: Duration = Duration::from_secs(18);

/// The names of the lanes; the last one, of what only a new epoch makes good, has no turn but when it is asked for.
const LANES: [&str; 4] = ["redis", "others", "victim", "old"];

/// Which lanes have which turn.
const TURNS: [&[usize]; 4] = [&[2], &[0], &[1], &[0, 1]];

/// Shorter runs have one turn, of the first two lanes.
const SHORT: Duration = Duration::from_secs(40);

/// When the first fault comes, and when the first of Redis: until then the bound of calm times can be judged.
const START: Duration = Duration::from_millis(500);
const REDIS_START: Duration = Duration::from_millis(3000);

/// A server that gateways reach over a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    Redis,
    Postgres,
}

/// What a network does to what goes over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    Passes(Passage),
    Slow { requests: Duration, answers: Duration },
    Reset,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Killed, and started again empty.
    RedisKilled,
    /// Killed, and started again with what it held some time before.
    RedisOld,
    RedisFlushed,
    /// Too little memory: it forgets what was not used for long.
    RedisEvicts,
    /// No memory: it refuses every write.
    RedisFull,
    /// It accepts, and never answers.
    RedisFrozen,
    /// Between one gateway and a server.
    Network {
        gateway: usize,
        server: Server,
        trouble: Trouble,
    },
    PostgresKilled,
    GatewayKilled(usize),
    /// It stands still, and goes on as if nothing had been.
    GatewayPaused(usize),
}

impl Fault {
    /// Its kind, for people.
    pub fn kind(&self) -> &'static str {
        let Fault::Network { server, trouble, .. } = self else {
            return match self {
                Fault::RedisKilled => "redis-killed",
                Fault::RedisOld => "redis-old",
                Fault::RedisFlushed => "redis-flushed",
                Fault::RedisEvicts => "redis-evicts",
                Fault::RedisFull => "redis-full",
                Fault::RedisFrozen => "redis-frozen",
                Fault::PostgresKilled => "postgres-killed",
                Fault::GatewayKilled(_) => "gateway-killed",
                Fault::GatewayPaused(_) | Fault::Network { .. } => "gateway-paused",
            };
        };
        match (server, trouble) {
            (Server::Redis, Trouble::Passes(Passage::Cut)) => "redis-cut",
            (Server::Redis, Trouble::Passes(Passage::Hole)) => "redis-hole",
            (Server::Redis, Trouble::Passes(Passage::Held)) => "redis-held",
            (Server::Redis, Trouble::Passes(Passage::AnswersLost)) => "redis-answers-lost",
            (Server::Redis, Trouble::Slow { .. } | Trouble::Passes(Passage::Open)) => "redis-slow",
            (Server::Redis, Trouble::Reset) => "redis-reset",
            (Server::Postgres, Trouble::Passes(Passage::Cut)) => "postgres-cut",
            (Server::Postgres, Trouble::Passes(Passage::Hole)) => "postgres-hole",
            (Server::Postgres, Trouble::Passes(Passage::Held)) => "postgres-held",
            (Server::Postgres, Trouble::Passes(Passage::AnswersLost)) => "postgres-answers-lost",
            (Server::Postgres, Trouble::Slow { .. } | Trouble::Passes(Passage::Open)) => "postgres-slow",
            (Server::Postgres, Trouble::Reset) => "postgres-reset",
        }
    }

    /// Whether it may keep a replica's writes from Redis.
    pub fn is_between(&self, replica: usize) -> bool {
        match self {
            Fault::RedisKilled
            | Fault::RedisOld
            | Fault::RedisFlushed
            | Fault::RedisEvicts
            | Fault::RedisFull
            | Fault::RedisFrozen => true,
            Fault::Network { gateway, server, .. } => *gateway == replica && *server == Server::Redis,
            Fault::GatewayKilled(gateway) | Fault::GatewayPaused(gateway) => *gateway == replica,
            Fault::PostgresKilled => false,
        }
    }
}

/// A fault, and its time since the run began.
#[derive(Debug, Clone)]
pub struct Scene {
    pub fault: Fault,
    pub time: Range<Duration>,
}

/// The lane of a name.
pub fn lane(name: &str) -> Option<usize> {
    LANES.iter().position(|lane| *lane == name)
}

/// The scenes of a run, in the order in which they begin: with the faults of one lane alone, if one is given.
pub fn plan(seed: u64, length: Duration, only: Option<usize>) -> Vec<Scene> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut lanes = [redis_deck, other_deck, victim_deck, old_deck].map(Lane::new);
    // Later in a short run there is no peace for it.
    lanes[1].deck = vec![Fault::GatewayKilled(rng.random_range(0..REPLICAS))];
    let mut scenes: Vec<Scene> = Vec::new();
    let mut turn = START..length;
    for number in 0.. {
        if length > SHORT && only.is_none() {
            turn.end = (turn.start + TURN).min(length);
        }
        for (place, lane) in lanes.iter_mut().enumerate() {
            let has_turn = match only {
                Some(only) => place == only,
                None if length <= SHORT => place < 2,
                None => TURNS[number % TURNS.len()].contains(&place),
            };
            if has_turn {
                let earliest = [REDIS_START, START, START, REDIS_START][place];
                let turn = turn.start.max(earliest)..turn.end;
                lane.run(&turn, length <= SHORT || place == 2, &mut scenes, &mut rng);
            }
        }
        turn.start = turn.end;
        if turn.start >= length {
            break;
        }
    }
    scenes.sort_by_key(|scene| scene.time.start);
    scenes
}

/// One fault after the other, each kind once before any comes again.
struct Lane {
    fill: fn(&mut StdRng) -> Vec<Fault>,
    deck: Vec<Fault>,
}

impl Lane {
    fn new(fill: fn(&mut StdRng) -> Vec<Fault>) -> Lane {
        Lane { fill, deck: Vec::new() }
    }

    fn run(&mut self, turn: &Range<Duration>, short: bool, scenes: &mut Vec<Scene>, rng: &mut StdRng) {
        let mut now = turn.start;
        loop {
            if self.deck.is_empty() {
                self.deck = (self.fill)(rng);
                self.deck.shuffle(rng);
            }
            let fault = self.deck.pop().expect("filled just now");
            let time = now..now + lasts(&fault, short, rng);
            if time.end > turn.end {
                // Its turn comes.
                self.deck.push(fault);
                return;
            }
            now = time.end;
            if is_fair(&fault, time.start, scenes) {
                scenes.push(Scene { fault, time });
                now += millis(rng, 200..1000);
            } else {
                // Later, if at all: the deck is not held up for it.
                now += millis(rng, 50..100);
            }
        }
    }
}

/// Whether so much is promised. The lane of Redis is planned before the other.
fn is_fair(fault: &Fault, start: Duration, scenes: &[Scene]) -> bool {
    let Fault::GatewayKilled(gateway) = fault else {
        return true;
    };
    !scenes.iter().any(|scene| {
        let Range { start: from, end } = scene.time;
        from <= start && start < end + PEACE && scene.fault.is_between(*gateway)
    })
}

fn lasts(fault: &Fault, short: bool, rng: &mut StdRng) -> Duration {
    match fault {
        Fault::RedisFlushed
        | Fault::Network {
            trouble: Trouble::Reset,
            ..
        } => Duration::from_millis(1),
        Fault::RedisKilled | Fault::PostgresKilled | Fault::GatewayKilled(_) => millis(rng, 10..1200),
        Fault::RedisOld => millis(rng, 300..1500),
        Fault::RedisEvicts
        | Fault::RedisFull
        | Fault::RedisFrozen
        | Fault::GatewayPaused(_)
        | Fault::Network { .. } => {
            match rng.random_range(0..if short { 7 } else { 10 }) {
                0..7 => millis(rng, 200..1200),
                7..9 => millis(rng, 1200..3000),
                // Longer than any bound.
                _ => millis(rng, 5000..7000),
            }
        }
    }
}

fn redis_deck(rng: &mut StdRng) -> Vec<Fault> {
    let mut deck = vec![
        Fault::RedisKilled,
        Fault::RedisOld,
        Fault::RedisFlushed,
        Fault::RedisEvicts,
        Fault::RedisFull,
        Fault::RedisFrozen,
    ];
    deck.extend(networks(Server::Redis, rng));
    deck
}

fn other_deck(rng: &mut StdRng) -> Vec<Fault> {
    let mut deck = vec![
        Fault::PostgresKilled,
        Fault::GatewayKilled(rng.random_range(0..REPLICAS)),
        Fault::GatewayKilled(rng.random_range(0..REPLICAS)),
        Fault::GatewayPaused(rng.random_range(0..REPLICAS)),
    ];
    deck.extend(networks(Server::Postgres, rng));
    deck
}

/// Twice each, and short: for a victim that is cut off for long everybody begins anew.
fn victim_deck(rng: &mut StdRng) -> Vec<Fault> {
    let victim = rng.random_range(0..REPLICAS);
    let mut deck: Vec<Fault> = networks(Server::Redis, rng).into();
    deck.extend(networks(Server::Redis, rng));
    for fault in &mut deck {
        if let Fault::Network { gateway, .. } = fault {
            *gateway = victim;
        }
    }
    deck
}

fn old_deck(_: &mut StdRng) -> Vec<Fault> {
    vec![
        Fault::RedisOld,
        Fault::RedisOld,
        Fault::RedisKilled,
        Fault::RedisFlushed,
    ]
}

fn networks(server: Server, rng: &mut StdRng) -> [Fault; 6] {
    let slow = Trouble::Slow {
        requests: millis(rng, 0..300),
        answers: millis(rng, 0..300),
    };
    let troubles = [
        Trouble::Passes(Passage::Cut),
        Trouble::Passes(Passage::Hole),
        Trouble::Passes(Passage::Held),
        Trouble::Passes(Passage::AnswersLost),
        slow,
        Trouble::Reset,
    ];
    troubles.map(|trouble| Fault::Network {
        gateway: rng.random_range(0..REPLICAS),
        server,
        trouble,
    })
}

fn millis(rng: &mut StdRng, range: Range<u64>) -> Duration {
    Duration::from_millis(rng.random_range(range))
}
