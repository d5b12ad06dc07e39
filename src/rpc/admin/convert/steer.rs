//! The same of the queue, of settings and of the log.

use super::{duration, namespace, pending_stats};
use crate::{
    error::{Error, FieldViolation},
    gateway::{
        JournalState,
        steer::{Doing, NamespaceQueue, NamespaceView, PendingKey, QueueView, WorkerReport},
    },
    model::Timestamp,
    namespace::{Setting, SettingSource},
    rpc::{
        convert::{timestamp, violate},
        proto,
    },
    telemetry::log::{Change, Level, TARGETS},
};

/// How many keys are told at most.
const OLDEST_MAX: u32 = 100;

pub(in crate::rpc::admin) fn queue(request: &proto::QueueRequest) -> Result<(Option<&str>, usize), Error> {
    let namespace = namespace(&request.namespace)?;
    if request.oldest > OLDEST_MAX {
        return Err(one_violation("oldest", format!("must be at most {OLDEST_MAX}")));
    }
    Ok((namespace, request.oldest as usize))
}

pub(in crate::rpc::admin) fn queue_response(
    view: QueueView,
    journal: JournalState,
    now: Timestamp,
    namespaces_max: usize,
) -> proto::QueueResponse {
    let mut namespaces: Vec<(String, NamespaceQueue)> = view.namespaces.into_iter().collect();
    if namespaces.len() > namespaces_max {
        namespaces.sort_by_key(|(_, queue)| std::cmp::Reverse(queue.pending.entries));
        namespaces.truncate(namespaces_max);
        namespaces.sort_by(|(a, _), (b, _)| a.cmp(b));
    }
    let journal = match journal {
        JournalState::Up => proto::JournalState::Up,
        JournalState::Full => proto::JournalState::Full,
        JournalState::DiskFull => proto::JournalState::DiskFull,
        JournalState::Failed => proto::JournalState::Failed,
    };
    let namespace = |(namespace, queue): (String, NamespaceQueue)| proto::NamespaceQueue {
        namespace,
        pending: Some(pending_of(&queue)),
    };
    proto::QueueResponse {
        pending: Some(pending_of(&view.all)),
        entries_max: view.report.entries_max as u64,
        bytes_max: view.report.bytes_max as u64,
        journal: journal.into(),
        dead_lettered: view.dead_lettered,
        namespaces: namespaces.into_iter().map(namespace).collect(),
        workers: (0..).zip(view.report.workers).map(worker).collect(),
        oldest: view.report.oldest.iter().map(|key| pending_key(key, now)).collect(),
    }
}

pub(in crate::rpc::admin) fn pending_of(queue: &NamespaceQueue) -> proto::PendingStats {
    pending_stats(queue.pending, queue.paused_since)
}

fn worker((number, worker): (u32, WorkerReport)) -> proto::DrainWorker {
    let state = match worker.doing {
        Doing::Idle => proto::DrainState::Idle,
        Doing::Gathering => proto::DrainState::Gathering,
        Doing::Writing => proto::DrainState::Writing,
        Doing::BackingOff => proto::DrainState::BackingOff,
    };
    proto::DrainWorker {
        number,
        state: state.into(),
        since: Some(timestamp(worker.since)),
        entries: worker.entries as u64,
        bytes: worker.bytes as u64,
        failures: worker.failures,
        last_failure: worker.last_failure.map(|failure| proto::DrainFailure {
            time: Some(timestamp(failure.at)),
            code: failure.code.unwrap_or_default(),
            message: failure.message,
        }),
    }
}

fn pending_key(pending: &PendingKey, now: Timestamp) -> proto::PendingKey {
    proto::PendingKey {
        namespace: pending.key.namespace().to_owned(),
        key: pending.key.key().to_owned(),
        version: pending.version.get(),
        age: duration(now.since(pending.accepted_at)),
        bytes: pending.bytes as u64,
        deletes: pending.deletes,
        in_flight: pending.in_flight,
    }
}

pub(in crate::rpc::admin) fn namespaces_response(
    views: Vec<NamespaceView>,
    more: bool,
    defaults: Vec<Setting>,
) -> proto::NamespacesResponse {
    let view = |view: NamespaceView| proto::NamespaceSettings {
        namespace: view.namespace,
        configured: view.configured,
        used: view.used,
        paused_since: view.paused_since.map(timestamp),
        settings: view.settings.into_iter().map(setting).collect(),
    };
    proto::NamespacesResponse {
        namespaces: views.into_iter().map(view).collect(),
        more,
        defaults: defaults.into_iter().map(setting).collect(),
    }
}

fn setting(setting: Setting) -> proto::Setting {
    let source = match setting.source {
        SettingSource::BuiltIn => proto::SettingSource::BuiltIn,
        SettingSource::Defaults => proto::SettingSource::NamespaceDefaults,
        SettingSource::Namespace => proto::SettingSource::Namespace,
    };
    proto::Setting {
        name: setting.name,
        value: setting.value,
        source: source.into(),
        place: setting.place,
    }
}

/// What is to be changed of the log; `None`: nothing.
pub(in crate::rpc::admin) fn log_level(request: &proto::LogLevelRequest) -> Result<Option<Change>, Error> {
    let mut violations: Vec<FieldViolation> = Vec::new();
    let level = match proto::LogLevel::try_from(request.level) {
        Ok(proto::LogLevel::Unspecified) => None,
        Ok(proto::LogLevel::Error) => Some(Level::Error),
        Ok(proto::LogLevel::Warn) => Some(Level::Warn),
        Ok(proto::LogLevel::Info) => Some(Level::Info),
        Ok(proto::LogLevel::Debug) => Some(Level::Debug),
        Ok(proto::LogLevel::Trace) => Some(Level::Trace),
        Err(_) => {
            violate(&mut violations, "level", "must be a value of LogLevel");
            None
        }
    };
    let target = TARGETS.into_iter().find(|target| *target == request.target);
    if !request.target.is_empty() && target.is_none() {
        let targets = TARGETS.join(", ");
        violate(&mut violations, "target", format!("must be one of {targets}"));
    }
    if request.reset && (level.is_some() || target.is_some()) {
        violate(
            &mut violations,
            "reset",
            "must not be given together with level or target",
        );
    }
    if target.is_some() && level.is_none() && violations.is_empty() {
        violate(&mut violations, "level", "must be given with a target");
    }
    if !violations.is_empty() {
        return Err(Error::invalid(violations));
    }
    Ok(match (level, target) {
        (Some(level), Some(target)) => Some(Change::Target(target, level)),
        (Some(level), None) => Some(Change::All(level)),
        (None, _) => request.reset.then_some(Change::Reset),
    })
}

pub(in crate::rpc::admin) fn log_level_response(filter: String) -> proto::LogLevelResponse {
    let most = match Level::most() {
        Level::Error => proto::LogLevel::Error,
        Level::Warn => proto::LogLevel::Warn,
        Level::Info => proto::LogLevel::Info,
        Level::Debug => proto::LogLevel::Debug,
        Level::Trace => proto::LogLevel::Trace,
    };
    proto::LogLevelResponse {
        filter,
        most: most.into(),
        targets: TARGETS.map(str::to_owned).into(),
    }
}

pub(super) fn one_violation(field: &'static str, description: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    let mut violations = Vec::new();
    violate(&mut violations, field, description);
    Error::invalid(violations)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_the_log_is_a_known_level_of_a_known_target() {
        let ask = |level: i32, target: &str, reset| {
            let request = proto::LogLevelRequest {
                level,
                target: target.to_owned(),
                reset,
            };
            log_level(&request).map_err(|error| {
                let fields = error.violations().iter().map(|violation| violation.field.to_string());
                fields.collect::<Vec<_>>()
            })
        };
        let warn = proto::LogLevel::Warn as i32;
        assert_eq!(ask(0, "", false), Ok(None));
        assert_eq!(ask(0, "", true), Ok(Some(Change::Reset)));
        assert_eq!(ask(warn, "", false), Ok(Some(Change::All(Level::Warn))));
        assert_eq!(ask(warn, "sqlx", false), Ok(Some(Change::Target("sqlx", Level::Warn))));
        assert_eq!(
            ask(99, "nothing", false),
            Err(vec!["level".to_owned(), "target".to_owned()])
        );
        assert_eq!(ask(0, "sqlx", false), Err(vec!["level".to_owned()]));
        assert_eq!(ask(warn, "", true), Err(vec!["reset".to_owned()]));
    }
}
