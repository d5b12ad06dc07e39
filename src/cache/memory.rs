//! L1: copies in this process, shared by all of its serving threads, and the tokens of those who will land there.
//!
//! Owns the bound in bytes, and what may land. A slot holds a copy, a token, or both. Whoever will land leaves a token first: **before** a
//! load looks at the slower tiers, before a write is stamped. Any landing, removal or invalidation clears the slot's token, and eviction
//! takes it along with the copy; so a token that still stands proves that nothing came in between, and who comes late fails closed. Does
//! not own lifetimes (the gateway sets them), nor who loads (`flight`).
//!
//! Invariants: no landing puts a lower version over a higher one that stands, or that stood since the landing's token was left; all
//! changes of a shard are made under its lock, which does not live across an await; reads take no lock of ours. A token costs no bytes
//! and no copy its place, for it stands beside the cache in `tokens`, and it is never an answer. While the `gate` is off nothing stands and
//! nothing lands, neither then nor later by a token that was left then.

mod gate;
mod kept;
mod place;
mod tokens;

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter, sync::Cache};
use serde::{Deserialize, Serialize};

use self::{
    gate::Gate,
    kept::Kept,
    place::{AsItIs, Place, Places},
    tokens::{Number, Tokens},
};
use crate::{
    cache::Copy,
    model::{Key, Timestamp, Version},
    telemetry::namespaces::Tally,
};

/// What a copy is taken to weigh when room is planned for the traces of evicted keys, which make a returning key stay. Far
/// smaller copies get fewer traces than would serve them best, and far larger ones leave room unused.
const TYPICAL_BYTES: usize = 1024;

/// The least share of the bytes that a shard gets: several copies of the largest usual value.
const SHARD_BYTES_MIN: usize = 8 * 1024 * 1024;

/// The settings of L1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How many bytes the copies may take together: keys, values, and what it takes to keep them. Default: 268435456 (256 MiB).
    /// 0 turns L1 off. More answers more reads from memory; the traces of evicted keys take up to a sixteenth on top.
    pub bytes_max: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            bytes_max: 256 * 1024 * 1024,
        }
    }
}

/// What became of a copy that was offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Landing {
    /// It stands now, unless it is larger than a shard keeps: then nothing stands.
    Landed,
    /// The same version stood: its lifetime was renewed, if the offered one ends later.
    Renewed,
    /// It came too late.
    Refused {
        /// What stands: something newer, or, where an absence was offered, whatever stood. What is older was removed.
        standing: Option<Copy>,
    },
}

/// L1.
#[derive(Debug)]
pub struct Memory {
    places: Places,
    copies: Cache<Place, Kept, Weigh, AsItIs, Evictions>,
    /// The lock of every shard of `copies`, around its tokens. No shard of `copies` is changed without it.
    tokens: Box<[Mutex<Tokens>]>,
    evictions: Tally,
    gate: Gate,
}

impl Memory {
    /// An empty L1, on for ever unless it is gated.
    pub fn new(config: &Config) -> Memory {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let shards = (config.bytes_max / SHARD_BYTES_MIN).clamp(1, threads * 8);
        // Rounded down to a power of two, for it is rounded up below here.
        let shards = 1 << shards.ilog2();
        let options = OptionsBuilder::new()
            .shards(shards)
            .estimated_items_capacity(config.bytes_max / TYPICAL_BYTES)
            .weight_capacity(config.bytes_max as u64)
            .build()
            .expect("both capacities are set");
        let copies = Cache::with_options(options, Weigh, AsItIs::default(), Evictions);
        // There may be fewer than were asked for.
        let tokens = (0..copies.num_shards()).map(|_| Mutex::default()).collect();
        Memory {
            places: Places::default(),
            copies,
            tokens,
            evictions: Tally::default(),
            gate: Gate::new(),
        }
    }

    /// Turns L1 off until it is trusted: where others write too, it is of use only as long as they are heard. What stands has to be dropped
    /// then.
    pub fn gate(&self) {
        self.gate.shut();
    }

    /// Turns a gated L1 on, or leaves it on, until `until`: all that others did up to a moment ago was heard. Trust never gets shorter, nor
    /// does it begin while everything is being dropped.
    pub fn trust_until(&self, until: Timestamp) {
        self.gate.trust_until(until);
    }

    /// Whether L1 may answer at `now`.
    pub fn is_on(&self, now: Timestamp) -> bool {
        self.gate.is_open(now)
    }

    /// The copy of a key, while it may answer at `now`. A record past its own expiry comes back as what it is: it means absent.
    pub fn get(&self, key: &Key, now: Timestamp) -> Option<Copy> {
        self.last_known(key, now).filter(|copy| copy.is_fresh(now))
    }

    /// The copy of a key however old, while L1 is on: what is served while the store cannot answer, as far as the gateway lets it. A use of it,
    /// so that what is read during an outage stays.
    pub fn last_known(&self, key: &Key, now: Timestamp) -> Option<Copy> {
        if !self.is_on(now) {
            return None;
        }
        let kept = self.copies.get(&self.places.of(key))?;
        kept.is_of(key).then(|| kept.into_copy())
    }

    /// The version that stands on a key, however old the copy. Does not count as a use of it.
    pub fn version(&self, key: &Key) -> Option<Version> {
        self.kept(self.places.of(key), key).and_then(|kept| kept.version())
    }

    /// Leaves a token at a key, for a landing. A copy that stands there stays readable.
    ///
    /// While L1 is off none is left: who began then may have read what nobody told of, and lands nowhere.
    pub fn leave_token(self: &Arc<Self>, key: &Key) -> Token {
        let place = self.places.of(key);
        let number = {
            let mut tokens = self.tokens(place).lock();
            if self.gate.is_off() {
                Number::NONE
            } else {
                tokens.leave(place, key)
            }
        };
        Token {
            memory: Arc::clone(self),
            key: key.clone(),
            place,
            number,
            spent: false,
        }
    }

    /// Tells that something else wrote `version`: an older copy and a known absence are removed, a copy at or above it stays. Whether
    /// one was removed.
    ///
    /// The token goes even beside a newer copy: a load under way may have found an absence, which no version would refuse.
    pub fn invalidate(&self, key: &Key, version: Version) -> bool {
        self.remove_if(key, |stands| stands < Some(version))
    }

    /// Removes the copy of a key if exactly `version` stands, and the token: who holds it may have found that version. Whether a copy
    /// was removed.
    pub fn drop_version(&self, key: &Key, version: Version) -> bool {
        self.remove_if(key, |stands| stands == Some(version))
    }

    /// Removes the copy of a key whatever its version, and the token. Whether a copy was removed.
    pub fn invalidate_key(&self, key: &Key) -> bool {
        self.remove_if(key, |_| true)
    }

    /// The same of every key that matches. How many copies were removed. Looks at each copy, which takes up to a second for millions of
    /// them; nobody waits for it meanwhile.
    pub fn invalidate_where(&self, matches: impl Fn(&Key) -> bool) -> usize {
        // Tokens first: what lands at a matching key from now on began after this did, or is a write, which lands over an older one only.
        for tokens in &self.tokens {
            tokens.lock().clear_where(&matches);
        }
        let keys = self.copies.iter().map(|(_, kept)| kept.key());
        keys.filter(|key| matches(key) && self.invalidate_key(key)).count()
    }

    /// Removes every copy and every token, and is off meanwhile. It takes up to a second for millions of copies; nobody waits for it.
    pub fn drop_all(&self) {
        let _off = self.gate.interval();
        // Who still lands saw L1 on under its shard's lock, and has landed once the lock was taken here.
        for tokens in &self.tokens {
            tokens.lock().clear_where(|_| true);
        }
        // So none of our locks is needed: nothing lands, and nobody reads.
        self.copies.clear();
    }

    /// How many copies there are.
    pub fn len(&self) -> usize {
        self.copies.len()
    }

    /// Whether there is no copy.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// How many copies of each namespace have left to make room.
    pub fn evictions(&self) -> BTreeMap<String, u64> {
        self.evictions.counts()
    }

    /// What the copies weigh, in bytes.
    pub fn bytes(&self) -> u64 {
        self.copies.weight()
    }

    /// The copy of a key, without a use of it.
    fn kept(&self, place: Place, key: &Key) -> Option<Kept> {
        self.copies.peek(&place).filter(|kept| kept.is_of(key))
    }

    fn remove_if(&self, key: &Key, remove: impl FnOnce(Option<Version>) -> bool) -> bool {
        let place = self.places.of(key);
        let mut tokens = self.tokens(place).lock();
        tokens.clear(place);
        let removed = self
            .copies
            .remove_if(&place, |kept| kept.is_of(key) && remove(kept.version()));
        removed.is_some()
    }

    /// Where the token `number` does not stand, what is older is removed and nothing lands, but that an entry may replace an older entry
    /// if `over_older`.
    fn land(&self, token: &Token, copy: Copy, over_older: bool) -> Landing {
        let (place, key) = (token.place, &token.key);
        let mut tokens = self.tokens(place).lock();
        let may_land = tokens.clear(place) == Some(token.number);
        if self.gate.is_off() {
            return Landing::Refused { standing: None };
        }
        #[cfg(feature = "planted-faults")]
        if !over_older && crate::planted::is(crate::planted::Fault::FillWithoutToken) {
            self.insert(&mut tokens, place, key, copy);
            return Landing::Landed;
        }
        #[cfg(feature = "planted-faults")]
        let may_land = may_land || !over_older && crate::planted::is(crate::planted::Fault::FillByVersionOnly);
        let standing = self.kept(place, key).map(Kept::into_copy);
        let stands = standing.as_ref().and_then(Copy::version);
        match (copy.version(), standing) {
            (Some(offered), Some(standing)) if stands == Some(offered) => {
                let renewed = Copy {
                    loaded_at: standing.loaded_at.max(copy.loaded_at),
                    fresh_until: standing.fresh_until.max(copy.fresh_until),
                    ..standing
                };
                self.insert(&mut tokens, place, key, renewed);
                Landing::Renewed
            }
            (Some(offered), standing) if stands > Some(offered) => Landing::Refused { standing },
            (offered, _) if may_land || (over_older && offered.is_some() && stands.is_some()) => {
                self.insert(&mut tokens, place, key, copy);
                Landing::Landed
            }
            // Whatever came in between may be newer than this, but what stands is older.
            (Some(_), _) => {
                self.copies.remove_if(&place, |kept| kept.is_of(key));
                Landing::Refused { standing: None }
            }
            (None, standing) => Landing::Refused { standing },
        }
    }

    fn insert(&self, tokens: &mut Tokens, place: Place, key: &Key, copy: Copy) {
        let mut evicted = Vec::new();
        self.copies
            .insert_with_lifecycle(place, Kept::new(key, copy), &mut evicted);
        // All of the same shard.
        for (place, gone) in &evicted {
            tokens.clear(*place);
            // Its own key's is the copy that it replaced, or itself where it is too large to be kept.
            if !gone.is_of(key) {
                self.evictions.count(gone.namespace());
            }
        }
    }

    fn tokens(&self, place: Place) -> &Mutex<Tokens> {
        &self.tokens[self.copies.shard_index(&place)]
    }
}

/// The right to land at a key, for as long as nothing else changes its slot. Given back when dropped.
#[derive(Debug)]
pub struct Token {
    memory: Arc<Memory>,
    key: Key,
    place: Place,
    number: Number,
    /// Whether a landing has cleared it.
    spent: bool,
}

impl Token {
    /// Offers what a load found: an entry, or a known absence, which lands over an entry too, for the store was asked after the token
    /// was left. Lands only where the token stands, not even over an older entry elsewhere: what was found may have been withdrawn since,
    /// as a write that the store refuses is.
    ///
    /// A large value should own its bytes: a slice of a larger buffer keeps all of that alive, beyond the bound. A small one is copied.
    pub fn land_load(self, copy: Copy) -> Landing {
        self.land(copy, false)
    }

    /// Offers the copy of a write that was visible in the slower tiers **before**: lands where the token stands, and over an older entry.
    /// Nothing older stands afterwards, and no load lands that began before. A large value should own its bytes, as that of a load.
    pub fn land_write(self, copy: Copy) -> Landing {
        self.land(copy, true)
    }

    fn land(mut self, copy: Copy, over_older: bool) -> Landing {
        self.spent = true;
        self.memory.land(&self, copy, over_older)
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if !self.spent {
            self.memory.tokens(self.place).lock().give_back(self.place, self.number);
        }
    }
}

/// Tells which copies an insertion replaced or evicted.
#[derive(Debug, Clone)]
struct Evictions;

impl Lifecycle<Place, Kept> for Evictions {
    type RequestState = Vec<(Place, Kept)>;

    fn on_evict(&self, evicted: &mut Vec<(Place, Kept)>, place: Place, kept: Kept) {
        evicted.push((place, kept));
    }
}

#[derive(Debug, Clone)]
struct Weigh;

impl Weighter<Place, Kept> for Weigh {
    fn weight(&self, _: &Place, kept: &Kept) -> u64 {
        kept.weight() as u64
    }
}

#[cfg(test)]
mod tests;
