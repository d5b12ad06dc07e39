//! While everything is whole: what one gateway is told it wrote, the others show within a second, from copies that would have lived for
//! minutes.

use std::time::Duration;

use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::time::Instant;

use super::{
    World,
    ledger::{Figures, key, read},
};
use crate::harness::{Client, Mode};

const BOUND: Duration = Duration::from_secs(1);

/// Reads until a number that was acknowledged at `since` is seen. How old the last answer without it was.
async fn seen_after(client: &Client, number: usize, wanted: u64, since: Instant) -> Duration {
    let mut age = Duration::ZERO;
    loop {
        let read = read(client, number, ReadConsistency::Cached).await;
        if read.number == wanted {
            return age;
        }
        age = read.sent - since;
        assert!(
            age <= BOUND,
            "an answer is {age:?} old, and {BOUND:?} is allowed: {read:?}"
        );
    }
}

#[tokio::test]
async fn a_write_is_seen_on_the_other_gateway_within_a_second() {
    const ROUNDS: u64 = 300;
    let (_world, [a, b]) = World::pair("").await;
    let (mut ages, mut from_l1) = (Vec::new(), 0);
    for round in 1..=ROUNDS {
        let mode = if round % 2 == 0 { Mode::Through } else { Mode::Behind };
        let written = a.client().put(&key(0), round.to_string().as_bytes(), mode).await;
        written.expect("a write succeeds");
        ages.push(seen_after(b.client(), 0, round, Instant::now()).await);
        let again = read(b.client(), 0, ReadConsistency::Cached).await;
        assert_eq!(again.number, round);
        from_l1 += u64::from(again.source == Source::L1);
    }
    let seen_at_once = ages.iter().filter(|age| age.is_zero()).count();
    let ages = Figures::of(ages.into_iter());
    eprintln!("age on the other gateway: {ages}; {seen_at_once} seen at once; {from_l1} rounds with a copy in L1");
    // Otherwise there was nothing to be invalidated.
    assert!(from_l1 > ROUNDS * 3 / 4, "{from_l1}");
}

#[tokio::test]
async fn an_absence_that_is_cached_for_an_hour_ends_within_a_second_of_a_write() {
    const KEYS_OF_A_MODE: usize = 20;
    let (_world, [a, b]) = World::pair("[namespace_defaults]\nabsence_lifetime = \"1h\"").await;
    let mut ages = Vec::new();
    for number in 0..2 * KEYS_OF_A_MODE {
        let mode = if number % 2 == 0 { Mode::Through } else { Mode::Behind };
        for (consistency, from) in [
            (ReadConsistency::Cached, Source::Store),
            (ReadConsistency::Cached, Source::L1),
        ] {
            let read = read(b.client(), number, consistency).await;
            assert_eq!((read.number, read.source), (0, from));
        }
        crate::harness::eventually("Redis knows of the absence", crate::harness::SOON, async || {
            let read = read(a.client(), number, ReadConsistency::Shared).await;
            crate::harness::expect((read.number, read.source) == (0, Source::L2), read)
        })
        .await;
        a.client()
            .put(&key(number), b"1", mode)
            .await
            .expect("a write succeeds");
        ages.push(seen_after(b.client(), number, 1, Instant::now()).await);
        let shared = read(b.client(), number, ReadConsistency::Shared).await;
        assert_eq!((shared.number, shared.source), (1, Source::L2));
    }
    eprintln!("absent on the other gateway: {}", Figures::of(ages.into_iter()));
}
