//! How long to wait before the next try of something that failed.
//!
//! Owns the rule: twice as long each time, up to a bound, and spread at random, so that many who failed together do not come back
//! together. Does not own what is tried, nor when to give up.

use std::time::Duration;

/// The delays between the tries of one thing.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    next: Duration,
    max: Duration,
}

impl Backoff {
    /// Delays from `first` up to `max`.
    pub fn new(first: Duration, max: Duration) -> Backoff {
        let first = first.min(max);
        Backoff {
            first,
            next: first,
            max,
        }
    }

    /// A try succeeded: the next delay is the first one again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }

    /// The next delay: between half of its bound and all of it.
    pub fn delay(&mut self) -> Duration {
        let bound = self.next;
        self.next = bound.saturating_mul(2).min(self.max);
        bound.mul_f64(rand::random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_bound_and_never_fall_below_half_of_it() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(35));
        for bound in [10, 20, 35, 35] {
            let delay = backoff.delay();
            let bound = Duration::from_millis(bound);
            assert!(delay >= bound / 2 && delay <= bound, "{delay:?} of {bound:?}");
        }
        backoff.reset();
        assert!(backoff.delay() <= Duration::from_millis(10));
    }
}
