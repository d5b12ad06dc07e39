//! Time: a wall clock that never steps back within a process, and the hybrid logical clock that stamps versions.
//!
//! Owns the rule that a stamp rises above every stamp of this process and every version that it observed. Does not own the
//! node id (leased from the store, `store/node.rs`), the comparison with the store's clock (`store/control.rs`) nor what stands on a key (the
//! tiers). Invariants: [`Clock::now`] never decreases; two calls of [`Clock::stamp`] never return the same version; stamping ends when the
//! node lease does, and while the store's clock is known to show another time.

use std::{
    fmt,
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{sync::Notify, time::Instant};

use crate::model::{COUNTER_BITS, NODE_BITS, Timestamp, VERSION_EPOCH_MILLIS, Version};

/// How far ahead of this clock a version may be and still move it at once: what two gateways may differ by that are each within ten seconds of
/// the store's clock. One further ahead, as from a gateway that started where its crash had left its reservation, moves it once that is
/// reserved too. One that is far ahead ([`is_far_ahead`]), as from a machine whose clock is wrong, raises only the stamps of its own key.
const OBSERVE_AHEAD_MAX: Duration = Duration::from_secs(20);

/// What is kept free of a reservation for stamps that follow an observation at its end: a million, until
/// the wall clock has caught up.
const STAMPS_SLACK: i64 = 1_000 << COUNTER_BITS;

/// How far ahead of the wall clock a version may be and still be told from a clock that was right: more than the stamps of two gateways
/// and their reservations ever differ by while both clocks are within ten seconds of the store's.
const FAR_AHEAD: Duration = Duration::from_secs(60);

/// How far this clock and the store's may be apart for versions to be stamped. All that compares versions of several gateways rests on it:
/// [`OBSERVE_AHEAD_MAX`] is twice as much.
const OFFSET_MAX: Duration = Duration::from_secs(10);

/// Whether a version is so far ahead of `now` by the wall clock (more than a minute) that some clock must have been wrong: the one that
/// stamped it, or the one that stamped what stood on its key before; or the wall clock has been set back since. Such a version must
/// be passed on its own key, and should not become the floor of a whole clock.
pub fn is_far_ahead(version: Version, now: Timestamp) -> bool {
    version.stamped_at() > now.after(FAR_AHEAD)
}

/// The wall clock, as the system shows it now. For the start of a process; it may step, and all else goes by [`Clock::now`].
pub fn wall_time() -> Timestamp {
    let wall = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis();
    let wall = Timestamp(i64::try_from(wall).unwrap_or(i64::MAX));
    #[cfg(feature = "planted-faults")]
    let wall = Timestamp(wall.0.saturating_add(crate::planted::clock_offset()));
    wall
}

/// Why no version can be stamped now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoStamp {
    /// The node lease ran out: a version stamped now could collide with another gateway's.
    #[error("the node lease has not been renewed in time, so no version can be stamped")]
    LeaseLapsed,
    /// A version stamped now could stand above later ones of other gateways, or below earlier ones.
    #[error(
        "this gateway's clock is {0} the store's, and no version is stamped while they are more than 10 s apart: set right the one that is \
         wrong, and start the gateway again if it was its own"
    )]
    ClockOff(ClockOffset),
}

/// How far a gateway's clock is from the store's, in milliseconds: positive ahead of it, negative behind. Reads "12 s ahead of".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockOffset(pub i64);

impl ClockOffset {
    /// Whether it is too far for versions to be stamped: by more than ten seconds.
    pub fn is_off(self) -> bool {
        u128::from(self.0.unsigned_abs()) > OFFSET_MAX.as_millis()
    }
}

impl fmt::Display for ClockOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = if self.0 < 0 { "behind" } else { "ahead of" };
        write!(f, "{} s {side}", self.0.unsigned_abs() / 1_000)
    }
}

/// The clock of one gateway process, shared by all of its threads.
///
/// The logical part is the one of "Logical Physical Clocks" (Kulkarni et al., 2014), with the counter in the version.
#[derive(Debug)]
pub struct Clock {
    /// The wall clock when the process started; all later readings are this plus monotonic time, so a wall clock that steps
    /// neither revives an expired record nor repeats a stamp.
    started_at: Timestamp,
    started: Instant,
    node: u16,
    /// Milliseconds since [`VERSION_EPOCH_MILLIS`] and counter of the highest stamp or observation: a version without its node. The stamps that
    /// it gives are even.
    last: AtomicI64,
    /// The same of the highest stamp on a key that stood too far ahead to move the clock. Such keys are few (a machine's clock was
    /// wrong), and may raise one another. The stamps that it gives are odd: `last` may come to where they are, and gives none of them again.
    last_ahead: AtomicI64,
    /// Where `last` began: what is at or below it, an earlier process may have stamped.
    floor: i64,
    /// Up to where the store knows that this process may stamp ahead of its wall clock. A later process of this node starts there, so
    /// that no version is stamped twice, whenever this one dies.
    reserved: AtomicI64,
    /// The highest that was observed and not reserved, though it is not far ahead.
    wanted: AtomicI64,
    /// Tells whoever reserves that there is such a one.
    wanting: Notify,
    /// When stamping ends unless the lease is renewed, in milliseconds since the Unix epoch.
    leased_until: AtomicI64,
    /// How far this clock was ahead of the store's when they were last compared, in milliseconds.
    offset: AtomicI64,
}

impl Clock {
    /// A clock of a node, above `floor`: what an earlier process of this node reserved, or stamped last.
    pub fn new(node: u16, floor: Option<Version>) -> Clock {
        let started_at = wall_time();
        let reported = floor.map_or(0, |version| version.get() >> NODE_BITS);
        let floor = reported.max(logical(started_at));
        Clock {
            started_at,
            started: Instant::now(),
            node,
            last: AtomicI64::new(floor),
            last_ahead: AtomicI64::new(0),
            floor,
            reserved: AtomicI64::new(floor),
            wanted: AtomicI64::new(0),
            wanting: Notify::new(),
            leased_until: AtomicI64::new(i64::MAX),
            offset: AtomicI64::new(0),
        }
    }

    /// The time, in the wall clock of the process's start.
    pub fn now(&self) -> Timestamp {
        self.started_at.after(self.started.elapsed())
    }

    /// This gateway's node.
    pub fn node(&self) -> u16 {
        self.node
    }

    /// Stamps a write: a version above every earlier stamp, every observed version, and `standing`, what is known to stand on the
    /// write's key.
    ///
    /// # Errors
    /// Those of [`Clock::can_stamp`].
    pub fn stamp(&self, standing: Option<Version>) -> Result<Version, NoStamp> {
        let now = self.now();
        self.can_stamp_at(now)?;
        if let Some(standing) = standing {
            self.observe_at(standing, now);
        }
        let next = rise(&self.last, logical(now), 0);
        // A version that was too far ahead to move the clock still has to be passed, on its own key.
        let above = standing.map_or(0, |version| (version.get() >> NODE_BITS) + 1);
        if next >= above {
            return Ok(self.version(next));
        }
        let passing = self.version(rise(&self.last_ahead, above, 1));
        // So that the next stamp of the key passes this one too, whatever is known by then.
        self.observe_at(passing, now);
        Ok(passing)
    }

    /// Whether a version that stands above a stamp of this clock was stamped by it afterwards, and so by a concurrent write. One of an
    /// earlier process was not; of one that is too far ahead to have moved the clock it cannot be told.
    pub fn stamped_since(&self, version: Version) -> bool {
        let logical = version.get() >> NODE_BITS;
        version.node() == self.node && logical > self.floor && logical <= self.last.load(Ordering::Relaxed)
    }

    /// Learns of a version that another gateway stamped, or that an earlier process of this one did.
    pub fn observe(&self, version: Version) {
        self.observe_at(version, self.now());
    }

    /// A version to reserve: far enough ahead for what may be observed until the next reservation, and for what was in vain.
    pub fn reservation(&self) -> Version {
        let known = [&self.last, &self.wanted].map(|register| register.load(Ordering::Relaxed));
        let ahead = known
            .into_iter()
            .fold(logical(self.now().after(OBSERVE_AHEAD_MAX)), i64::max);
        self.version(ahead + STAMPS_SLACK)
    }

    /// The store knows of a reservation: versions up to it may move the clock, and the one that was observed too soon does.
    pub fn reserve(&self, reservation: Version) {
        let reserved = reservation.get() >> NODE_BITS;
        self.reserved.fetch_max(reserved, Ordering::Relaxed);
        let wanted = self.wanted.load(Ordering::Relaxed);
        if wanted <= reserved - STAMPS_SLACK {
            self.last.fetch_max(wanted, Ordering::Relaxed);
        }
    }

    /// Waits until a version was observed that only a new reservation lets move this clock. Until then a later write of its key could be
    /// stamped below it, by this very gateway, where no tier tells that it stands. Dropped, it loses nothing.
    pub async fn reservation_wanted(&self) {
        self.wanting.notified().await;
    }

    /// The highest version that was stamped or observed: what must survive a restart.
    pub fn high_water(&self) -> Option<Version> {
        let last = self.last.load(Ordering::Relaxed);
        (last > 0).then(|| self.version(last))
    }

    /// Whether the lease holds, so that versions can be stamped.
    pub fn is_leased(&self) -> bool {
        self.now().0 < self.leased_until.load(Ordering::Relaxed)
    }

    /// Whether versions can be stamped now: a write that cannot be is refused before it takes anybody's room.
    ///
    /// # Errors
    /// [`NoStamp::LeaseLapsed`] once the lease has run out, [`NoStamp::ClockOff`] while this clock was more than ten seconds from the store's when
    /// they were last compared.
    pub fn can_stamp(&self) -> Result<(), NoStamp> {
        self.can_stamp_at(self.now())
    }

    fn can_stamp_at(&self, now: Timestamp) -> Result<(), NoStamp> {
        if now.0 >= self.leased_until.load(Ordering::Relaxed) {
            return Err(NoStamp::LeaseLapsed);
        }
        let offset = self.offset();
        if offset.is_off() {
            return Err(NoStamp::ClockOff(offset));
        }
        Ok(())
    }

    /// Lets stamping go on until `until`.
    pub fn lease_until(&self, until: Timestamp) {
        self.leased_until.store(until.0, Ordering::Relaxed);
    }

    /// How far this clock was from the store's when they were last compared; none until then. It stays where the store is away.
    pub fn offset(&self) -> ClockOffset {
        ClockOffset(self.offset.load(Ordering::Relaxed))
    }

    /// This clock and the store's have been compared.
    pub fn set_offset(&self, offset: ClockOffset) {
        self.offset.store(offset.0, Ordering::Relaxed);
    }

    fn observe_at(&self, version: Version, now: Timestamp) {
        let observed = version.get() >> NODE_BITS;
        let reserved = self.reserved.load(Ordering::Relaxed) - STAMPS_SLACK;
        if observed <= reserved.max(logical(now)) {
            self.last.fetch_max(observed, Ordering::Relaxed);
        } else if !is_far_ahead(version, now) && self.wanted.fetch_max(observed, Ordering::Relaxed) < observed {
            self.wanting.notify_one();
        }
    }

    fn version(&self, logical: i64) -> Version {
        // 63 bits hold until 2163; a clock beyond that stamps the highest version for ever, which every tier refuses.
        let number = (logical.min(i64::MAX >> NODE_BITS) << NODE_BITS) | i64::from(self.node);
        Version::new(number.max(1)).expect("it is at least one")
    }
}

/// Raises a register to `least`, or above what it is, whichever is more, and to the next number of this parity. What it is then, which no
/// other call gets.
fn rise(register: &AtomicI64, least: i64, parity: i64) -> i64 {
    let mut last = register.load(Ordering::Relaxed);
    loop {
        let next = least.max(last + 1);
        let next = next + ((next ^ parity) & 1);
        match register.compare_exchange_weak(last, next, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return next,
            Err(seen) => last = seen,
        }
    }
}

/// A time as the upper 53 bits of a version.
fn logical(time: Timestamp) -> i64 {
    (time.0 - VERSION_EPOCH_MILLIS).max(0) << COUNTER_BITS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead(clock: &Clock, by: Duration) -> Version {
        Version::new((logical(clock.now().after(by)) << NODE_BITS) | 7).expect("positive")
    }

    #[test]
    fn stamps_rise_and_carry_the_node() {
        let clock = Clock::new(3, None);
        let stamps: Vec<Version> = (0..10_000).map(|_| clock.stamp(None).expect("leased")).collect();
        assert!(stamps.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(stamps.iter().all(|version| version.node() == 3));
    }

    #[test]
    fn stamps_of_many_threads_are_distinct() {
        let clock = Clock::new(0, None);
        let mut stamps: Vec<Version> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (0..20_000)
                            .map(|_| clock.stamp(None).expect("leased"))
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        stamps.sort_unstable();
        assert!(stamps.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn a_restart_stamps_above_its_high_water_mark() {
        let clock = Clock::new(1, None);
        let mark = ahead(&clock, Duration::from_secs(3600));
        let restarted = Clock::new(1, Some(mark));
        assert!(restarted.stamp(None).expect("leased") > mark);
    }

    #[test]
    fn a_version_within_the_reservation_moves_the_clock() {
        let clock = Clock::new(1, None);
        let seen = ahead(&clock, OBSERVE_AHEAD_MAX / 2);
        clock.observe(seen);
        assert!(clock.stamp(None).expect("leased") < seen, "nothing is reserved yet");
        clock.reserve(clock.reservation());
        clock.observe(seen);
        assert!(clock.stamp(None).expect("leased") > seen);
    }

    #[test]
    fn a_version_beyond_the_reservation_moves_the_clock_once_that_is_reserved_too() {
        let clock = Clock::new(1, None);
        clock.reserve(clock.reservation());
        let seen = ahead(&clock, OBSERVE_AHEAD_MAX + Duration::from_secs(5));
        let passed = clock.stamp(Some(seen)).expect("leased");
        assert!(passed > seen && clock.stamp(None).expect("leased") < seen);
        clock.reserve(clock.reservation());
        assert!(clock.stamp(None).expect("leased") > passed);
        // Nothing is reserved for one that is far ahead.
        clock.observe(ahead(&clock, FAR_AHEAD * 2));
        assert!(!is_far_ahead(clock.reservation(), clock.now()));
    }

    #[test]
    fn a_stamp_that_passed_what_is_not_reserved_is_not_given_again_once_it_is() {
        let clock = Clock::new(1, None);
        clock.reserve(clock.reservation());
        let seen = ahead(&clock, OBSERVE_AHEAD_MAX + Duration::from_secs(5));
        // A write that is stamped before the reservation, and heard of only after it.
        let passed = rise(&clock.last_ahead, (seen.get() >> NODE_BITS) + 1, 1);
        clock.observe(seen);
        clock.reserve(clock.reservation());
        let later = (0..1_000).map(|_| clock.stamp(None).expect("leased"));
        assert!(later.into_iter().all(|stamp| stamp.get() >> NODE_BITS != passed));
    }

    #[tokio::test]
    async fn who_reserves_is_told_of_a_version_beyond_the_reservation() {
        let clock = Clock::new(1, None);
        clock.reserve(clock.reservation());
        let told = async || {
            tokio::time::timeout(Duration::ZERO, clock.reservation_wanted())
                .await
                .is_ok()
        };
        clock.observe(ahead(&clock, OBSERVE_AHEAD_MAX / 2));
        clock.observe(ahead(&clock, FAR_AHEAD * 2));
        assert!(!told().await, "nothing that a reservation would change");
        let seen = ahead(&clock, OBSERVE_AHEAD_MAX + Duration::from_secs(5));
        clock.observe(seen);
        assert!(told().await);
        clock.observe(seen);
        assert!(!told().await, "once is enough");
    }

    #[test]
    fn a_process_that_died_never_stamped_beyond_what_the_next_one_starts_at() {
        let clock = Clock::new(1, None);
        let reservation = clock.reservation();
        clock.reserve(reservation);
        for seconds in 0..60 {
            clock.observe(ahead(&clock, Duration::from_secs(seconds)));
        }
        let unreported = clock.stamp(None).expect("leased");
        assert!(unreported < reservation);
        let restarted = Clock::new(1, Some(reservation));
        assert!(restarted.stamp(None).expect("leased") > unreported);
        assert!(
            !restarted.stamped_since(unreported),
            "not a concurrent write, but one of an earlier process"
        );
    }

    #[test]
    fn a_clock_knows_its_own_stamps() {
        let clock = Clock::new(1, None);
        let own = clock.stamp(None).expect("leased");
        assert!(clock.stamped_since(own));
        let far = ahead(&clock, Duration::from_secs(3600));
        let passed = clock.stamp(Some(far)).expect("leased");
        assert!(!clock.stamped_since(passed) && !clock.stamped_since(far));
        assert!(!Clock::new(2, None).stamped_since(own));
    }

    #[test]
    fn a_version_far_ahead_raises_only_its_own_keys_stamp() {
        let clock = Clock::new(1, None);
        let seen = ahead(&clock, Duration::from_secs(3600));
        let first = clock.stamp(Some(seen)).expect("leased");
        let second = clock.stamp(Some(seen)).expect("leased");
        assert!(first > seen && second > first, "two writes, two versions");
        assert!(clock.stamp(None).expect("leased") < seen);
    }

    #[test]
    fn what_gateways_in_order_stamp_is_never_far_ahead() {
        let clock = Clock::new(1, None);
        assert!(
            !is_far_ahead(clock.reservation(), clock.now()),
            "of a clock that is right"
        );
        let other = clock.now().after(Duration::from_secs(10));
        let behind = clock.now().0 - 10_000;
        let reserved = Version::new((logical(other.after(OBSERVE_AHEAD_MAX)) + STAMPS_SLACK) << NODE_BITS);
        assert!(
            !is_far_ahead(reserved.expect("positive"), Timestamp(behind)),
            "of one ahead, by one behind"
        );
        assert!(is_far_ahead(ahead(&clock, Duration::from_secs(3600)), clock.now()));
    }

    #[test]
    fn a_lapsed_lease_ends_stamping() {
        let clock = Clock::new(1, None);
        clock.lease_until(clock.now());
        assert_eq!(clock.stamp(None), Err(NoStamp::LeaseLapsed));
        clock.lease_until(clock.now().after(Duration::from_secs(1)));
        assert!(clock.stamp(None).is_ok());
    }

    #[test]
    fn a_clock_far_from_the_store_s_stamps_nothing_until_it_is_near_again() {
        let clock = Clock::new(1, None);
        for (millis, said) in [
            (10_001, "10 s ahead of"),
            (-12_900, "12 s behind"),
            (i64::MIN, " s behind"),
        ] {
            let offset = ClockOffset(millis);
            clock.set_offset(offset);
            let refused = clock.stamp(None).expect_err("too far apart");
            assert_eq!((refused, clock.can_stamp()), (NoStamp::ClockOff(offset), Err(refused)));
            assert!(
                refused.to_string().contains(&format!("{said} the store's")),
                "{refused}"
            );
        }
        for millis in [10_000, 0, -10_000] {
            clock.set_offset(ClockOffset(millis));
            assert!(clock.stamp(None).is_ok() && clock.can_stamp().is_ok());
        }
    }
}
