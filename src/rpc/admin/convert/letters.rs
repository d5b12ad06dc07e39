//! The same of dead letters.

use super::{check_one_namespace, namespace, steer::one_violation};
use crate::{
    error::Error,
    gateway::letters::{Chosen, KeptLetter, Retried},
    rpc::{convert::timestamp, proto},
};

/// How many letters a page has, unless that is said, and at most.
const PAGE_DEFAULT: u32 = 100;
const PAGE_MAX: u32 = 1_000;

/// How many letters a request may name.
const IDS_MAX: usize = 1_000;

/// A page of the list.
pub(in crate::rpc::admin) struct Page<'a> {
    pub(in crate::rpc::admin) namespace: Option<&'a str>,
    pub(in crate::rpc::admin) after: i64,
    pub(in crate::rpc::admin) size: u32,
}

pub(in crate::rpc::admin) fn list(request: &proto::ListDeadLettersRequest) -> Result<Page<'_>, Error> {
    check_after(request.after_id)?;
    if request.page_size > PAGE_MAX {
        return Err(one_violation("page_size", format!("must be at most {PAGE_MAX}")));
    }
    Ok(Page {
        namespace: namespace(&request.namespace)?,
        after: request.after_id,
        size: if request.page_size == 0 {
            PAGE_DEFAULT
        } else {
            request.page_size
        },
    })
}

/// The page, given one letter more where there is one.
pub(in crate::rpc::admin) fn list_response(
    mut letters: Vec<KeptLetter>,
    page: &Page<'_>,
) -> proto::ListDeadLettersResponse {
    let size = page.size as usize;
    let more = letters.len() > size;
    letters.truncate(size);
    proto::ListDeadLettersResponse {
        last_id: letters.last().map_or(page.after, |letter| letter.id),
        letters: letters.into_iter().map(letter).collect(),
        more,
    }
}

pub(in crate::rpc::admin) fn retry(request: proto::RetryDeadLettersRequest) -> Result<Chosen, Error> {
    chosen(request.namespace, request.ids, request.up_to_id)
}

pub(in crate::rpc::admin) fn discard(request: proto::DiscardDeadLettersRequest) -> Result<Chosen, Error> {
    chosen(request.namespace, request.ids, request.up_to_id)
}

pub(in crate::rpc::admin) fn export(request: &proto::ExportDeadLettersRequest) -> Result<(Option<String>, i64), Error> {
    check_after(request.after_id)?;
    Ok((namespace(&request.namespace)?.map(str::to_owned), request.after_id))
}

fn check_after(id: i64) -> Result<(), Error> {
    if id < 0 {
        return Err(one_violation("after_id", "must not be negative"));
    }
    Ok(())
}

fn chosen(namespace: String, mut ids: Vec<i64>, up_to_id: i64) -> Result<Chosen, Error> {
    if up_to_id < 0 {
        return Err(one_violation("up_to_id", "must not be negative"));
    }
    if up_to_id > 0 {
        if !ids.is_empty() {
            return Err(one_violation("up_to_id", "must not be given together with ids"));
        }
        if namespace.is_empty() {
            return Ok(Chosen::UpTo {
                namespace: None,
                id: up_to_id,
            });
        }
        check_one_namespace(&namespace)?;
        return Ok(Chosen::UpTo {
            namespace: Some(namespace),
            id: up_to_id,
        });
    }
    if !namespace.is_empty() {
        return Err(one_violation("namespace", "must be given with up_to_id only"));
    }
    if ids.is_empty() {
        return Err(one_violation("ids", "or up_to_id must be given"));
    }
    if ids.len() > IDS_MAX {
        return Err(one_violation(
            "ids",
            format!("must be at most {IDS_MAX}, are {}", ids.len()),
        ));
    }
    if ids.iter().any(|id| *id <= 0) {
        return Err(one_violation("ids", "must be positive"));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(Chosen::Ids(ids))
}

fn letter(letter: KeptLetter) -> proto::DeadLetter {
    proto::DeadLetter {
        id: letter.id,
        namespace: letter.key.namespace().to_owned(),
        key: letter.key.key().to_owned(),
        version: letter.version.get(),
        deletes: letter.value_bytes.is_none(),
        value_bytes: letter.value_bytes.unwrap_or_default() as u64,
        expire_time: letter.expires_at.map(timestamp),
        tags: letter.tags.iter().map(str::to_owned).collect(),
        code: letter.code.unwrap_or_default(),
        reason: letter.reason,
        attempts: letter.attempts,
        bury_time: Some(timestamp(letter.buried_at)),
        retry_time: letter.retried_at.map(timestamp),
    }
}

pub(in crate::rpc::admin) fn retry_response(retried: Retried) -> proto::RetryDeadLettersResponse {
    let (told, outcome, standing) = match retried {
        Retried::Stored(kept) => (letter(kept), proto::RetryOutcome::Stored, None),
        Retried::Superseded { letter: kept, standing } => (letter(kept), proto::RetryOutcome::Superseded, standing),
        Retried::Refused(kept) => (letter(kept), proto::RetryOutcome::Refused, None),
        Retried::Gone(id) => {
            let gone = proto::DeadLetter {
                id,
                ..proto::DeadLetter::default()
            };
            (gone, proto::RetryOutcome::Gone, None)
        }
    };
    proto::RetryDeadLettersResponse {
        letter: Some(told),
        outcome: outcome.into(),
        standing_version: standing.map_or(0, |version| version.get()),
    }
}

pub(in crate::rpc::admin) fn export_response(mut kept: KeptLetter) -> proto::ExportDeadLettersResponse {
    let value = kept.value.take().unwrap_or_default();
    proto::ExportDeadLettersResponse {
        letter: Some(letter(kept)),
        value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_named_in_exactly_one_way() {
        let ask = |namespace: &str, ids: &[i64], up_to| {
            chosen(namespace.to_owned(), ids.to_vec(), up_to)
                .map_err(|error| error.violations().first().map(|first| first.field.to_string()))
        };
        assert_eq!(ask("", &[3, 1, 3], 0), Ok(Chosen::Ids(vec![1, 3])));
        let all = |namespace: Option<&str>| {
            Ok(Chosen::UpTo {
                namespace: namespace.map(str::to_owned),
                id: 9,
            })
        };
        assert_eq!(ask("", &[], 9), all(None));
        assert_eq!(ask("orders", &[], 9), all(Some("orders")));
        for (namespace, ids, up_to, field) in [
            ("", &[][..], 0, "ids"),
            ("", &[1], 9, "up_to_id"),
            ("", &[], -1, "up_to_id"),
            ("", &[0], 0, "ids"),
            ("", &[1; 1_001], 0, "ids"),
            ("orders", &[1], 0, "namespace"),
            ("Orders", &[], 9, "namespace"),
        ] {
            assert_eq!(ask(namespace, ids, up_to), Err(Some(field.to_owned())));
        }
    }
}
