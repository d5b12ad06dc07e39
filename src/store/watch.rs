//! Whether the store answers, found out without traffic.
//!
//! Owns the task that pings the store on a session of its own, so that the breaker opens on an idle gateway and closes again while callers
//! fail at once. Does not own the breaker's rule (`breaker.rs`) nor who acts on it.

use std::time::Duration;

use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::store::Store;

/// Between two pings while the store answers.
const INTERVAL_UP: Duration = Duration::from_secs(2);
/// Between two pings after one that failed, or while the store is held to be down.
const INTERVAL_DOWN: Duration = Duration::from_millis(500);
/// How long a ping may take, connecting included: shorter than other calls, for it asks for nothing.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Starts the watch, on the current runtime. Ends when `stop` is cancelled.
#[must_use = "a task that ends before it was told to has died"]
pub fn start(store: Store, stop: &CancellationToken) -> JoinHandle<()> {
    let stop = stop.clone();
    tokio::spawn(async move {
        stop.run_until_cancelled(watch(&store)).await;
    })
}

async fn watch(store: &Store) {
    let mut session = store.session_within(PING_TIMEOUT);
    loop {
        // The session tells the breaker.
        let answered = session.ping().await.is_ok();
        let up = answered && !store.breaker().is_open();
        sleep(if up { INTERVAL_UP } else { INTERVAL_DOWN }).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::store::fake::{Call, FakeBackend, Fault, eventually};

    async fn after(what: impl Fn() -> bool) -> Duration {
        let begun = Instant::now();
        eventually(what).await;
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_gateway_notices_an_outage_and_its_end() {
        let fake = FakeBackend::new();
        let store = fake.store();
        let stop = CancellationToken::new();
        let task = start(store.clone(), &stop);
        after(|| fake.calls(Call::Ping) > 0).await;

        fake.down(true);
        let noticed = after(|| store.breaker().is_open()).await;
        assert!(noticed <= INTERVAL_UP + Duration::from_millis(20), "{noticed:?}");

        fake.down(false);
        let noticed = after(|| !store.breaker().is_open()).await;
        assert!(noticed <= INTERVAL_DOWN + Duration::from_millis(20), "{noticed:?}");

        stop.cancel();
        task.await.expect("no panic");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_hangs_is_held_to_be_down() {
        let fake = FakeBackend::new();
        fake.script(|_| Some(Fault::hang().0));
        let store = fake.store();
        let stop = CancellationToken::new();
        let task = start(store.clone(), &stop);
        let noticed = after(|| store.breaker().is_open()).await;
        assert!(noticed < Duration::from_secs(15), "{noticed:?}");

        fake.script(|_| None);
        after(|| !store.breaker().is_open()).await;
        stop.cancel();
        task.await.expect("no panic");
    }
}
