//! The table of request ids: turns, ends, windows and bounds.

use bytes::Bytes;

use super::*;
use crate::{
    gateway::WriteRequest,
    model::{Condition, Tags},
};

const NOW: Timestamp = Timestamp(1_000_000);

fn requests(remembered_max: usize) -> Arc<Requests> {
    let config = Config {
        window: Duration::from_secs(10),
        remembered_max: NonZeroUsize::new(remembered_max).expect("not zero"),
    };
    Arc::new(Requests::new(&config, Duration::from_secs(1), NOW))
}

fn key() -> Key {
    Key::new("orders", "k").expect("valid")
}

fn turn(requests: &Arc<Requests>, id: &str, print: u8, now: Timestamp) -> Result<Turn, Error> {
    let id = RequestId::new(id).expect("valid");
    let request = requests.request(id, Fingerprint([print; 16]), now);
    requests.turn(&key(), request, now)
}

fn lead(requests: &Arc<Requests>, id: &str, now: Timestamp) -> Lead {
    match turn(requests, id, 1, now) {
        Ok(Turn::Lead(lead)) => lead,
        other => panic!("nobody else leads: {other:?}"),
    }
}

fn done(version: i64, durability: Durability) -> Done {
    Done {
        answer: Answer {
            version: Version::new(version).expect("positive"),
            counter: None,
            expires_at: None,
        },
        durability,
        deduplicated: false,
    }
}

fn known(requests: &Arc<Requests>, id: &str, now: Timestamp) -> Option<Done> {
    match turn(requests, id, 1, now) {
        Ok(Turn::Known(done)) => Some(done),
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn who_comes_while_one_is_under_way_gets_its_answer_and_who_comes_later_too() {
    let requests = requests(10);
    let first = lead(&requests, "a", NOW);
    let Ok(Turn::Join(outcome)) = turn(&requests, "a", 1, NOW) else {
        panic!("it is under way");
    };
    let soon = Instant::now() + Duration::from_secs(1);
    let joining = tokio::spawn(joined(outcome, soon));
    first.end(&Ok(done(7, Durability::Journal)));
    let told = joining.await.expect("no panic").expect("it ended").expect("well");
    assert!(told.deduplicated && told.answer.version.get() == 7);
    let later = known(&requests, "a", Timestamp(NOW.0 + 9_999)).expect("its window is not over");
    assert_eq!(later, told);
    assert!(known(&requests, "a", Timestamp(NOW.0 + 10_000)).is_none());
    assert!(requests.table.lock().ending.is_empty());
}

#[tokio::test(start_paused = true)]
async fn one_that_was_given_up_or_failed_is_led_anew() {
    let requests = requests(10);
    let first = lead(&requests, "a", NOW);
    let Ok(Turn::Join(outcome)) = turn(&requests, "a", 1, NOW) else {
        panic!("it is under way");
    };
    drop(first);
    let soon = Instant::now() + Duration::from_secs(1);
    assert!(joined(outcome, soon).await.is_none());

    let second = lead(&requests, "a", NOW);
    let Ok(Turn::Join(outcome)) = turn(&requests, "a", 1, NOW) else {
        panic!("it is under way");
    };
    second.end(&Err(Error::new(ErrorKind::Unavailable, "down")));
    let told = joined(outcome, soon).await.expect("it ended");
    assert_eq!(told.expect_err("badly").kind(), ErrorKind::Unavailable);

    let third = lead(&requests, "a", NOW);
    let Ok(Turn::Join(outcome)) = turn(&requests, "a", 1, NOW) else {
        panic!("it is under way");
    };
    let error = joined(outcome, soon).await.expect("it is told").expect_err("too late");
    assert_eq!(error.outcome(), crate::error::Outcome::Unknown);
    drop(third);
    assert!(requests.table.lock().known.is_empty());
}

#[test]
fn an_id_is_of_one_content_and_of_one_namespace() {
    let requests = requests(10);
    let first = lead(&requests, "a", NOW);
    let refused = |print| turn(&requests, "a", print, NOW).expect_err("another content");
    assert_eq!(refused(2).violations()[0].field, "request_id");
    first.end(&Ok(done(7, Durability::Memory)));
    assert_eq!(refused(2).kind(), ErrorKind::Invalid);
    let request = requests.request(RequestId::new("a").expect("valid"), Fingerprint([2; 16]), NOW);
    let elsewhere = Key::new("other", "k").expect("valid");
    assert!(matches!(requests.turn(&elsewhere, request, NOW), Ok(Turn::Lead(_))));
}

#[test]
fn what_the_store_knows_takes_no_room_from_what_it_does_not() {
    let requests = requests(2);
    for id in ["a", "b"] {
        lead(&requests, id, NOW).end(&Ok(done(1, Durability::Journal)));
    }
    assert!(requests.has_room().is_ok(), "the one that asks is not counted yet");
    let third = lead(&requests, "c", NOW);
    assert_eq!(requests.has_room().expect_err("full").kind(), ErrorKind::Overloaded);
    third.end(&Ok(done(2, Durability::Store)));
    lead(&requests, "d", NOW).end(&Ok(done(3, Durability::Store)));
    lead(&requests, "e", NOW).end(&Ok(done(4, Durability::Store)));
    for (id, is_known) in [("a", true), ("b", true), ("c", true), ("d", true), ("e", false)] {
        assert_eq!(known(&requests, id, NOW).is_some(), is_known, "{id}");
    }
    assert!(known(&requests, "a", Timestamp(NOW.0 + 10_000)).is_none() && requests.has_room().is_ok());
    assert_eq!(requests.table.lock().in_store, 0);
}

#[test]
fn what_an_earlier_process_answered_is_known_by_its_last_try() {
    let requests = requests(10);
    let answered = |version| KeyedAnswer {
        key: key(),
        answered: Answered {
            request: Request {
                id: RequestId::new("a").expect("valid"),
                fingerprint: Fingerprint([1; 16]),
                ends_at: Timestamp(NOW.0 + 5_000),
            },
            answer: done(version, Durability::Journal).answer,
        },
    };
    requests.restore([answered(3), answered(5), answered(4)]);
    let done = known(&requests, "a", NOW).expect("restored");
    assert!(done.deduplicated && done.answer.version.get() == 5);
    assert!(known(&requests, "a", Timestamp(NOW.0 + 5_000)).is_none());
}

#[test]
fn two_contents_have_two_fingerprints() {
    let put = |value: &'static str, ttl, tags: &[&str], condition| {
        fingerprint_of_write(&WriteRequest {
            key: key(),
            value: Some(Bytes::from_static(value.as_bytes())),
            tags: Tags::new(tags).expect("valid"),
            ttl,
            mode: None,
            condition,
            request: None,
            await_persisted: false,
        })
    };
    let version = |number| Condition::Version(Version::new(number).expect("positive"));
    let second = Some(Duration::from_secs(1));
    let prints = [
        put("", None, &[], None),
        put("a", None, &[], None),
        put("a", second, &[], None),
        put("a", None, &["a"], None),
        put("", None, &["aa"], None),
        put("", None, &["a", "b"], None),
        put("a", None, &[], Some(Condition::Absent)),
        put("a", None, &[], Some(Condition::Present)),
        put("a", None, &[], Some(version(1))),
        put("a", None, &[], Some(version(2))),
    ];
    for (at, print) in prints.iter().enumerate() {
        assert!(!prints[..at].contains(print), "{at}");
    }
    assert_eq!(put("a", second, &["x"], None), put("a", second, &["x"], None));
}
