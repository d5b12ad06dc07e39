//! A write that is sent again under its request id, to another gateway than the one that wrote it and could not tell: the answer to it means
//! what every OK means, so that nobody is shown less from then on.

use tidegate::rpc::proto::{PutRequest, ReadConsistency, Source};

use super::World;
use crate::harness::{Mode, SOON, client::seen, eventually, expect, proxy::Passage};

#[tokio::test]
async fn what_is_answered_again_is_seen_from_then_on() {
    let (world, [mut a, b]) = World::pair("").await;
    let key = "told-by-another";
    a.client()
        .put(key, b"old", Mode::Through)
        .await
        .expect("a put succeeds");
    eventually("the other one keeps a copy", SOON, async || {
        let read = b.client().read(key).await;
        expect(seen(&read) == (Some(b"old"), Source::L1), read)
    })
    .await;
    let request = PutRequest {
        request_id: "written-once".to_owned(),
        ..b.client().put_request(key, b"new", Mode::Through)
    };
    a.redis.set(Passage::Hole);
    let written = a.client().stub().put(request.clone()).await;
    let written = written.expect("Redis is not needed for it").into_inner();
    // Before it gives up on Redis, and has everybody begin anew.
    a.gateway.kill().await;
    let read = b.client().read(key).await;
    assert_eq!(seen(&read), (Some(&b"old"[..]), Source::L1), "nobody has told it");

    let again = b.client().stub().put(request).await;
    let again = again.expect("it is answered").into_inner();
    assert!(again.deduplicated, "{again:?}");
    assert_eq!(again.version, written.version);
    b.client().assert_everywhere(key, Some(b"new")).await;
    let c = world.replica().await;
    for consistency in [ReadConsistency::Shared, ReadConsistency::Cached] {
        let read = c.client().get(key, consistency).await.expect("a read succeeds");
        assert_eq!(seen(&read).0, Some(&b"new"[..]), "{read:?}");
    }
}
