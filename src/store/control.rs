//! What all gateways of a store share: the control row, followed.
//!
//! Owns the task that reads the row each second, or at once when woken, and passes on what it found; and what the answers say about this
//! machine's clock. Does not own the row (the backends), nor what is done about a moved epoch (the gateway) or a wrong clock
//! ([`Clock::stamp`]). Invariants: a read that fails changes nothing that is known, so a gateway that cannot reach its store goes on with what it
//! knew; what is known is at least as new as its [`Known::asked_at`].

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::{Clock, ClockOffset},
    model::{Epoch, Timestamp, Version},
    store::{Session, Store, StoreError},
};

/// Between two reads, from question to question.
const INTERVAL: Duration = Duration::from_secs(1);
/// From question to question at the least, however often the task is woken: the wake-ups come from outside.
const INTERVAL_WOKEN: Duration = Duration::from_millis(20);
/// How long a read may take, connecting included: shorter than other calls, for it is small, and others wait for what it says.
const READ_TIMEOUT: Duration = Duration::from_secs(4);
/// A read that took longer says nothing about the clocks: when in between the store looked at its own is not known.
const CLOCK_SAMPLE_MAX: Duration = Duration::from_secs(2);

/// What all gateways of a store share, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// The epoch of the shared cache.
    pub epoch: Epoch,
    /// When the epoch was moved last, by the store's clock; `None` while it never was. For some seconds after that not every gateway knows.
    pub moved_at: Option<Timestamp>,
    /// The `run_id` of the Redis for which the epoch holds; `None` until a gateway has seen one.
    pub cache_server: Option<String>,
    /// The namespaces that have been invalidated since the epoch began, and their own epochs. About
    /// [`NAMESPACE_EPOCHS_MAX`](crate::store::NAMESPACE_EPOCHS_MAX) at most.
    pub namespaces: HashMap<String, NamespaceMoved>,
    /// At or above the versions of all rows that were ever collected; `None` while none was.
    pub gc_horizon: Option<Version>,
    /// The store's clock.
    pub now: Timestamp,
}

/// The epoch of one namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceMoved {
    /// Its own epoch.
    pub epoch: Epoch,
    /// When it was moved, by the store's clock.
    pub moved_at: Timestamp,
}

/// What a gateway knows of the control row.
#[derive(Debug, Clone)]
pub struct Known {
    /// What it was told last.
    pub control: Control,
    /// Before it asked: whatever was committed earlier is in the answer.
    pub asked_at: Instant,
}

/// Where to look for what is known: `None` until the store has answered once.
pub type Follower = watch::Receiver<Option<Known>>;

/// Starts following the control row, on the current runtime: reads it each second, and within 20 ms when `wake` is notified. What is known is `None`
/// until a first read succeeds, and then what the last one that did has found. Keeps the clock's offset current. Ends when `stop` is
/// cancelled.
#[must_use = "a task that ends before it was told to has died"]
pub fn follow(
    store: Store,
    clock: Arc<Clock>,
    wake: Arc<Notify>,
    stop: &CancellationToken,
) -> (Follower, JoinHandle<()>) {
    let (known, follower) = watch::channel(None);
    let stop = stop.clone();
    let task = tokio::spawn(async move {
        stop.run_until_cancelled(read_on(&store, &clock, &wake, &known)).await;
    });
    (follower, task)
}

async fn read_on(store: &Store, clock: &Clock, wake: &Notify, known: &watch::Sender<Option<Known>>) {
    let mut session = store.session_within(READ_TIMEOUT);
    let mut failing = false;
    loop {
        let asked_at = Instant::now();
        match read(&mut session, clock).await {
            Ok(control) => {
                if failing {
                    tracing::info!("the control row is read again");
                }
                failing = false;
                known.send_replace(Some(Known { control, asked_at }));
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "the control row cannot be read; going on with what is known");
                }
                failing = true;
            }
        }
        // A failure that came at once leaves the rest of the second, so a store that refuses is not asked again and again. A wake-up that comes
        // while a read runs is kept: it may be about what that read was too early for.
        tokio::select! {
            () = sleep_until(asked_at + INTERVAL) => {}
            () = wake.notified() => sleep_until(asked_at + INTERVAL_WOKEN).await,
        }
    }
}

/// Reads the row, and compares the clocks.
async fn read(session: &mut Session, clock: &Clock) -> Result<Control, StoreError> {
    let (asked, asked_at) = (clock.now(), Instant::now());
    let control = session.control().await?;
    let took = asked_at.elapsed();
    if took <= CLOCK_SAMPLE_MAX {
        let offset = ClockOffset(asked.after(took / 2).0.saturating_sub(control.now.0));
        say_crossed(clock.offset(), offset);
        clock.set_offset(offset);
    }
    Ok(control)
}

/// Says when the clocks have come too far apart, or near again.
fn say_crossed(before: ClockOffset, after: ClockOffset) {
    let ahead_seconds = after.0 as f64 / 1_000.0;
    match (before.is_off(), after.is_off()) {
        (false, true) => {
            let what = "this gateway's clock and the store's are too far apart: writes are refused until the one that is wrong is set right";
            tracing::error!(ahead_seconds, "{what}; if it was this gateway's, start it again");
        }
        (true, false) => tracing::info!(
            ahead_seconds,
            "this gateway's clock and the store's agree again; writes go on"
        ),
        (true, true) | (false, false) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        StoreErrorKind,
        fake::{Call, FakeBackend, Fault, eventually},
    };

    struct Following {
        fake: FakeBackend,
        clock: Arc<Clock>,
        wake: Arc<Notify>,
        known: Follower,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Following {
        fn of(fake: FakeBackend) -> Following {
            let (clock, wake) = (Arc::new(Clock::new(1, None)), Arc::new(Notify::new()));
            let stop = CancellationToken::new();
            let (known, task) = follow(fake.store(), Arc::clone(&clock), Arc::clone(&wake), &stop);
            Following {
                fake,
                clock,
                wake,
                known,
                stop,
                task,
            }
        }

        fn epoch(&self) -> Option<Epoch> {
            self.known.borrow().as_ref().map(|known| known.control.epoch)
        }

        fn asked_at(&self) -> Option<Instant> {
            self.known.borrow().as_ref().map(|known| known.asked_at)
        }

        async fn reads(&self, so_many: usize) {
            eventually(|| self.fake.calls(Call::Control) >= so_many).await;
        }

        async fn end(self) {
            self.stop.cancel();
            self.task.await.expect("no panic");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_moved_epoch_is_known_within_a_second() {
        let follower = Following::of(FakeBackend::new());
        eventually(|| follower.epoch() == Some(Epoch(1))).await;
        follower.fake.set_epoch(Epoch(2));
        let moved = Instant::now();
        eventually(|| follower.epoch() == Some(Epoch(2))).await;
        assert!(
            moved.elapsed() <= INTERVAL + Duration::from_millis(5),
            "{:?}",
            moved.elapsed()
        );
        assert!(
            follower.asked_at() >= Some(moved),
            "the answer holds for when it was asked for"
        );
        follower.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_wake_up_makes_it_known_at_once() {
        let follower = Following::of(FakeBackend::new());
        eventually(|| follower.epoch().is_some()).await;
        follower.fake.set_epoch(Epoch(2));
        let woken = Instant::now();
        follower.wake.notify_one();
        eventually(|| follower.epoch() == Some(Epoch(2))).await;
        assert!(
            woken.elapsed() <= INTERVAL_WOKEN + Duration::from_millis(5),
            "{:?}",
            woken.elapsed()
        );
        follower.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn wake_ups_without_end_ask_the_store_a_few_times() {
        let follower = Following::of(FakeBackend::new());
        eventually(|| follower.epoch().is_some()).await;
        let begun = Instant::now();
        while begun.elapsed() < INTERVAL {
            follower.wake.notify_one();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let reads = follower.fake.calls(Call::Control);
        assert!((20..=52).contains(&reads), "{reads}");
        follower.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_wake_up_during_a_read_is_followed_by_another() {
        let follower = Following::of(FakeBackend::new());
        eventually(|| follower.epoch().is_some()).await;
        let (late, released) = Fault::late_reply();
        follower.fake.inject(Call::Control, late);
        follower.wake.notify_one();
        follower.reads(2).await;
        // The answer that is on its way is of before.
        follower.fake.set_epoch(Epoch(2));
        follower.wake.notify_one();
        let woken = Instant::now();
        released.notify_one();
        eventually(|| follower.epoch() == Some(Epoch(2))).await;
        assert!(
            woken.elapsed() <= INTERVAL_WOKEN + Duration::from_millis(5),
            "{:?}",
            woken.elapsed()
        );
        follower.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_outlasts_an_outage_and_the_store_is_not_pestered() {
        let fake = FakeBackend::new();
        fake.down(true);
        let follower = Following::of(fake);
        follower.reads(3).await;
        assert_eq!(follower.epoch(), None, "nothing is known yet");
        follower.fake.down(false);
        eventually(|| follower.epoch() == Some(Epoch(1))).await;

        follower.fake.down(true);
        let (asked_at, reads) = (follower.asked_at(), follower.fake.calls(Call::Control));
        tokio::time::sleep(INTERVAL * 10).await;
        assert_eq!((follower.epoch(), follower.asked_at()), (Some(Epoch(1)), asked_at));
        assert!(follower.fake.calls(Call::Control) <= reads + 11);
        follower.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_that_hangs_is_given_up_and_says_nothing_about_the_clocks() {
        let fake = FakeBackend::new();
        let follower = Following::of(fake);
        eventually(|| follower.epoch().is_some()).await;
        follower.fake.set_clock_ahead(60_000);
        follower.fake.inject(Call::Control, Fault::late_reply().0);
        follower
            .fake
            .script(|call| (call == Call::Control).then(|| Fault::fail(StoreErrorKind::Transient)));
        follower.reads(3).await;
        assert_eq!(follower.clock.offset(), ClockOffset(0));
        follower.fake.script(|_| None);
        eventually(|| follower.clock.offset() == ClockOffset(-60_000)).await;
        follower.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_offset_counts_from_the_middle_of_the_read() {
        let fake = FakeBackend::new();
        fake.set_clock_ahead(-5_000);
        // The store looks at its clock after half a second; the answer takes another half.
        let (late, released) = Fault::late_reply();
        fake.inject(Call::Control, late.after(Duration::from_millis(500)));
        let follower = Following::of(fake);
        tokio::time::sleep(Duration::from_secs(1)).await;
        released.notify_one();
        eventually(|| follower.epoch().is_some()).await;
        assert!(
            (follower.clock.offset().0 - 5_000).abs() <= 5,
            "{}",
            follower.clock.offset()
        );
        follower.end().await;
    }
}
