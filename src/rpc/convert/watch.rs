//! Watch: what it asks for, and what it is told.

use crate::{
    error::Error,
    gateway::watch::{Event, RescanReason, Scope, Told, WatchRequest},
    model::{ChangeKind, Version},
    rpc::proto::{self, watch_response},
};

use super::{namespace, prefix, read::entry};

/// A request to watch. What its token says the gateway judges: it alone makes them.
pub(crate) fn watch(request: proto::WatchRequest) -> Result<WatchRequest, Error> {
    let mut violations = Vec::new();
    namespace(&request.namespace, &mut violations);
    prefix(&request.prefix, &mut violations);
    if !violations.is_empty() {
        return Err(Error::invalid(violations));
    }
    Ok(WatchRequest {
        namespace: request.namespace,
        prefix: request.prefix,
        resume_token: Some(request.resume_token).filter(|token| !token.is_empty()),
        with_values: request.with_values,
    })
}

pub(crate) fn watch_response(told: Told) -> proto::WatchResponse {
    let event = match told.event {
        Event::Started { scope, resumed } => watch_response::Event::Started(proto::WatchStarted {
            scope: scope_of(scope).into(),
            resumed,
        }),
        Event::Changed {
            key,
            version,
            kind,
            entry: record,
        } => watch_response::Event::Change(proto::WatchChange {
            key: key.key().to_owned(),
            version: version.map_or(0, Version::get),
            kind: match kind {
                ChangeKind::Put => proto::ChangeKind::Put,
                ChangeKind::Delete => proto::ChangeKind::Delete,
                ChangeKind::Invalidate => proto::ChangeKind::Invalidate,
            }
            .into(),
            entry: record.map(entry),
        }),
        Event::Rescan { reason, scope } => watch_response::Event::Rescan(proto::WatchRescan {
            reason: match reason {
                RescanReason::FellBehind => proto::RescanReason::FellBehind,
                RescanReason::TokenExpired => proto::RescanReason::TokenExpired,
                RescanReason::RedisLost => proto::RescanReason::RedisLost,
                RescanReason::RedisBack => proto::RescanReason::RedisBack,
                RescanReason::EpochMoved => proto::RescanReason::EpochMoved,
                RescanReason::Invalidated => proto::RescanReason::Invalidated,
            }
            .into(),
            scope: scope_of(scope).into(),
        }),
        Event::Progress => watch_response::Event::Progress(proto::WatchProgress {}),
    };
    proto::WatchResponse {
        resume_token: told.resume_token,
        event: Some(event),
    }
}

fn scope_of(scope: Scope) -> proto::WatchScope {
    match scope {
        Scope::AllGateways => proto::WatchScope::AllGateways,
        Scope::ThisGateway => proto::WatchScope::ThisGateway,
    }
}
