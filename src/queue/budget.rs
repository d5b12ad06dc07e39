//! How much the queue may hold: entries and bytes, over all shards.
//!
//! Owns the counting and who waits for room. Does not own what a full queue means for a caller (the handle's policies) nor what
//! is counted (the pending tables). Invariants: a permit is claimed by who submits a write, before the write is accepted, rides with
//! it and is given back when dropped, so the bounds hold at every moment, but for what an earlier process had accepted; the drain never claims, so a full queue always drains;
//! who waits is served first come first served, and a newcomer cannot pass.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::{Notify, Semaphore, TryAcquireError};

/// Why no permit was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoPermit {
    /// There is no room.
    Full,
    /// Nothing is admitted any more.
    Closed,
}

/// The bounds of one queue. Two semaphores, always claimed in the order entries, bytes: so claims cannot block each other, and
/// without contention each costs one compare-and-swap.
#[derive(Debug)]
pub(super) struct Budget {
    entries: Semaphore,
    bytes: Semaphore,
    entries_max: usize,
    bytes_max: usize,
    /// At or below this much room the queue is under pressure.
    entries_pressed: usize,
    bytes_pressed: usize,
    /// What is claimed beyond the bounds, by writes that an earlier process had accepted: what is given back pays this off first.
    entries_owed: AtomicUsize,
    bytes_owed: AtomicUsize,
    /// How many wait for room.
    waiting: AtomicUsize,
    /// Told of every permit that is given back once the budget is closed.
    freed: Notify,
}

/// Room for one write. Given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    budget: Arc<Budget>,
    bytes: u32,
}

impl Budget {
    /// The most that either bound may be.
    pub(super) const BOUND_MAX: usize = Semaphore::MAX_PERMITS;

    /// A budget under pressure from `pressure` on: a share of either bound, above 0, up to 1.
    pub(super) fn new(entries_max: usize, bytes_max: usize, pressure: f64) -> Budget {
        // Rounding a bound of more than 2^53 is harmless in a threshold.
        let pressed = |max: usize| max - ((max as f64 * pressure).ceil() as usize).clamp(1, max);
        Budget {
            entries: Semaphore::new(entries_max),
            bytes: Semaphore::new(bytes_max),
            entries_max,
            bytes_max,
            entries_pressed: pressed(entries_max),
            bytes_pressed: pressed(bytes_max),
            entries_owed: AtomicUsize::new(0),
            bytes_owed: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
        }
    }

    /// Room for a write of `weight` bytes, if there is any now and nobody waits for it.
    pub(super) fn try_admit(self: &Arc<Budget>, weight: usize) -> Result<Permit, NoPermit> {
        self.entries.try_acquire().map_err(no_permit)?.forget();
        let mut permit = self.permit();
        let bytes = self.charge(weight);
        self.bytes.try_acquire_many(bytes).map_err(no_permit)?.forget();
        permit.bytes = bytes;
        Ok(permit)
    }

    /// Room for a write that an earlier process had accepted: beyond the bounds where it must be.
    pub(super) fn overdraw(self: &Arc<Budget>, weight: usize) -> Permit {
        self.entries_owed
            .fetch_add(1 - self.entries.forget_permits(1), Ordering::Relaxed);
        let mut permit = self.permit();
        permit.bytes = self.charge(weight);
        let owed = permit.bytes as usize - self.bytes.forget_permits(permit.bytes as usize);
        self.bytes_owed.fetch_add(owed, Ordering::Relaxed);
        permit
    }

    /// A place among those who wait for room. Presses the queue from now on, until it is dropped.
    pub(super) fn line_up(self: &Arc<Budget>) -> Waiting {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting {
            budget: Arc::clone(self),
        }
    }

    /// How many entries and bytes there may be.
    pub(super) fn bounds(&self) -> (usize, usize) {
        (self.entries_max, self.bytes_max)
    }

    /// Whether draining should not wait for anything: somebody waits for room, or little is left.
    pub(super) fn is_pressed(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
            || self.entries.available_permits() <= self.entries_pressed
            || self.bytes.available_permits() <= self.bytes_pressed
    }

    /// Ends admission, also for those who wait. Permits that were given stay good.
    pub(super) fn close(&self) {
        self.entries.close();
        self.bytes.close();
        // Whoever waits for the last permit may have come when none was out.
        self.freed.notify_waiters();
    }

    /// Whether admission has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.bytes.is_closed()
    }

    /// Entries and bytes claimed: of pending writes, and of those admitted but not yet accepted.
    pub(super) fn claimed(&self) -> (usize, usize) {
        (
            self.entries_max - self.entries.available_permits() + self.entries_owed.load(Ordering::Relaxed),
            self.bytes_max - self.bytes.available_permits() + self.bytes_owed.load(Ordering::Relaxed),
        )
    }

    /// Waits until the budget is closed and every permit is back. Cancel-safe.
    pub(super) async fn emptied(&self) {
        loop {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            if self.is_closed() && self.claimed().0 == 0 {
                return;
            }
            freed.await;
        }
    }

    /// What a write is charged. One heavier than the whole bound passes when it has the queue to itself, instead of never.
    fn charge(&self, weight: usize) -> u32 {
        u32::try_from(weight.min(self.bytes_max)).unwrap_or(u32::MAX)
    }

    /// A permit for the entry that was just claimed, and for no byte yet: whatever ends the claim early gives the entry back.
    fn permit(self: &Arc<Budget>) -> Permit {
        Permit {
            budget: Arc::clone(self),
            bytes: 0,
        }
    }
}

/// Somebody who waits for room.
#[derive(Debug)]
pub(super) struct Waiting {
    budget: Arc<Budget>,
}

impl Waiting {
    /// Room for a write of `weight` bytes, as soon as there is any. Cancel-safe: who stops waiting loses only the place in line.
    ///
    /// # Errors
    /// [`NoPermit::Closed`].
    pub(super) async fn admit(&self, weight: usize) -> Result<Permit, NoPermit> {
        let budget = &self.budget;
        budget.entries.acquire().await.map_err(|_| NoPermit::Closed)?.forget();
        let mut permit = budget.permit();
        let bytes = budget.charge(weight);
        let claimed = budget.bytes.acquire_many(bytes).await;
        claimed.map_err(|_| NoPermit::Closed)?.forget();
        permit.bytes = bytes;
        Ok(permit)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.budget.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        // Bytes first, so that no entry counted means nothing counted.
        give_back(&self.budget.bytes, &self.budget.bytes_owed, self.bytes as usize);
        give_back(&self.budget.entries, &self.budget.entries_owed, 1);
        if self.budget.is_closed() {
            self.budget.freed.notify_waiters();
        }
    }
}

/// Gives permits back, after what is owed.
fn give_back(permits: &Semaphore, owed: &AtomicUsize, count: usize) {
    let mut paid = 0;
    // Nearly always nothing is owed.
    if owed.load(Ordering::Relaxed) > 0 {
        let before = owed.update(Ordering::Relaxed, Ordering::Relaxed, |owed| owed.saturating_sub(count));
        paid = before.min(count);
    }
    permits.add_permits(count - paid);
}

fn no_permit(error: TryAcquireError) -> NoPermit {
    match error {
        TryAcquireError::NoPermits => NoPermit::Full,
        TryAcquireError::Closed => NoPermit::Closed,
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::yield_now;

    use super::*;

    fn budget(entries_max: usize, bytes_max: usize) -> Arc<Budget> {
        Arc::new(Budget::new(entries_max, bytes_max, 0.5))
    }

    #[test]
    fn either_bound_refuses_and_a_drop_makes_room() {
        let budget = budget(2, 100);
        let first = budget.try_admit(60).expect("room");
        assert_eq!(budget.try_admit(60).expect_err("bytes"), NoPermit::Full);
        assert_eq!(budget.claimed(), (1, 60), "a refusal claims nothing");
        let second = budget.try_admit(40).expect("room");
        assert_eq!(budget.try_admit(0).expect_err("entries"), NoPermit::Full);
        drop(first);
        drop(second);
        assert_eq!(budget.claimed(), (0, 0));
    }

    #[test]
    fn what_an_earlier_process_accepted_is_held_beyond_the_bounds_and_paid_off_first() {
        let budget = budget(2, 100);
        let recovered: Vec<Permit> = (0..4).map(|_| budget.overdraw(40)).collect();
        assert_eq!(budget.claimed(), (4, 160));
        assert!(budget.is_pressed());
        for (permit, claimed) in recovered.into_iter().zip([(3, 120), (2, 80), (1, 40), (0, 0)]) {
            assert_eq!(
                budget.try_admit(1).is_ok(),
                claimed.0 == 0,
                "nothing is admitted while more is held"
            );
            drop(permit);
            assert_eq!(budget.claimed(), claimed);
        }
        assert_eq!(
            budget.try_admit(100).map(|permit| permit.bytes).ok(),
            Some(100),
            "all of the bounds is there"
        );
    }

    #[test]
    fn a_write_heavier_than_the_bound_has_the_queue_to_itself() {
        let budget = budget(2, 100);
        let light = budget.try_admit(1).expect("room");
        assert!(budget.try_admit(1000).is_err());
        drop(light);
        let _heavy = budget.try_admit(1000).expect("room");
        assert!(budget.try_admit(1).is_err());
    }

    #[test]
    fn pressure_begins_at_its_share_of_either_bound() {
        for (weight, steps) in [(0, 5), (20, 3)] {
            let budget = budget(10, 100);
            let mut permits = Vec::new();
            while !budget.is_pressed() {
                permits.push(budget.try_admit(weight).expect("room"));
            }
            assert_eq!(permits.len(), steps, "of weight {weight}");
        }
        assert!(!Budget::new(1, 1, 0.5).is_pressed(), "not when empty, however small");
    }

    #[test]
    fn whoever_lines_up_presses_at_once_and_no_longer_than_waiting() {
        let budget = budget(10, 100);
        let waiting = budget.line_up();
        assert!(budget.is_pressed());
        drop(waiting);
        assert!(!budget.is_pressed());
    }

    #[tokio::test]
    async fn waiters_are_served_in_their_order_and_not_passed() {
        let budget = budget(10, 100);
        let held = budget.try_admit(90).expect("room");
        let heavy = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.line_up().admit(50).await }
        });
        yield_now().await;
        assert!(budget.is_pressed());
        assert_eq!(budget.try_admit(5).expect_err("somebody waits"), NoPermit::Full);
        drop(held);
        let permit = heavy.await.expect("no panic").expect("open");
        assert_eq!(budget.claimed(), (1, 50));
        drop(permit);
        assert!(!budget.is_pressed());
    }

    #[tokio::test]
    async fn a_wait_given_up_leaves_nothing_claimed() {
        let budget = budget(10, 100);
        let held = budget.try_admit(90).expect("room");
        let waiting = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.line_up().admit(50).await }
        });
        yield_now().await;
        waiting.abort();
        assert!(waiting.await.is_err());
        assert_eq!(budget.claimed(), (1, 90));
        drop(held);
    }

    #[tokio::test]
    async fn closing_fails_waiters_and_newcomers_and_waits_for_what_is_out() {
        let budget = budget(1, 100);
        let held = budget.try_admit(1).expect("room");
        let waiting = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.line_up().admit(1).await }
        });
        let emptied = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.emptied().await }
        });
        yield_now().await;
        budget.close();
        assert_eq!(waiting.await.expect("no panic").expect_err("closed"), NoPermit::Closed);
        assert_eq!(budget.try_admit(1).expect_err("closed"), NoPermit::Closed);
        assert!(!emptied.is_finished());
        drop(held);
        emptied.await.expect("no panic");
    }
}
