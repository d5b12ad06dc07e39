//! Answered requests, as a statement takes them.
//!
//! Owns their order: sorted by name, so that transactions at once lock them in one order, and each name once. Owns no SQL.

use crate::{
    model::{Answered, KeyedAnswer, RequestId, Write},
    store::{StoreError, StoreErrorKind},
};

/// A request with the namespace in which it is named.
pub(super) type Named<'a> = (&'a str, &'a Answered);

/// What writes answer, in order. Of one name the answer of the highest version: the others' windows were over when that one was taken.
pub(super) fn of_writes(writes: &[Write]) -> Vec<Named<'_>> {
    let answered = writes.iter().flat_map(|write| {
        let namespace = write.key.namespace();
        write.requests.iter().map(move |answered| (namespace, answered))
    });
    distinct(answered.collect())
}

/// The same of answers with their keys.
pub(super) fn of_answers(answers: &[KeyedAnswer]) -> Vec<Named<'_>> {
    let answered = answers.iter().map(|keyed| (keyed.key.namespace(), &keyed.answered));
    distinct(answered.collect())
}

fn distinct(mut answered: Vec<Named<'_>>) -> Vec<Named<'_>> {
    fn name<'a>((namespace, answered): &Named<'a>) -> (&'a str, &'a RequestId) {
        (namespace, &answered.request.id)
    }
    answered.sort_by(|a, b| (name(a), b.1.answer.version).cmp(&(name(b), a.1.answer.version)));
    answered.dedup_by(|later, kept| name(later) == name(kept));
    answered
}

/// A row that no gateway wrote.
pub(super) fn no_request() -> StoreError {
    let message = "tidegate_requests holds a row that no gateway wrote: delete it";
    StoreError::new(StoreErrorKind::Transient, message)
}

/// Tags that no gateway wrote.
pub(super) fn no_tags() -> StoreError {
    let message = "tidegate_entries holds tags that are empty, too long or too many: mend the row";
    StoreError::new(StoreErrorKind::Transient, message)
}

/// What was decided was not written, although nobody stood in its way.
pub(super) fn swallowed() -> StoreError {
    let message = "the store does not write what was decided: a trigger or a rule of the table swallows it";
    StoreError::new(StoreErrorKind::Rejected, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Answer, Fingerprint, Key, Request, Timestamp, Version};

    #[test]
    fn each_name_is_there_once_with_its_latest_answer() {
        let keyed = |namespace, id, version| KeyedAnswer {
            key: Key::new(namespace, "key").expect("valid"),
            answered: Answered {
                request: Request {
                    id: RequestId::new(id).expect("valid"),
                    fingerprint: Fingerprint([0; 16]),
                    ends_at: Timestamp(0),
                },
                answer: Answer {
                    version: Version::new(version).expect("positive"),
                    counter: None,
                    expires_at: None,
                },
            },
        };
        let answers = [
            keyed("b", "x", 1),
            keyed("a", "y", 2),
            keyed("a", "x", 3),
            keyed("a", "x", 5),
            keyed("a", "x", 4),
        ];
        let named: Vec<(&str, &str, i64)> = of_answers(&answers)
            .into_iter()
            .map(|(namespace, answered)| (namespace, answered.request.id.as_str(), answered.answer.version.get()))
            .collect();
        assert_eq!(named, [("a", "x", 5), ("a", "y", 2), ("b", "x", 1)]);
    }
}
