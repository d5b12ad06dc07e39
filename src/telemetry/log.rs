//! The log: where it goes, what is in it, and how that is changed while the process runs.
//!
//! Owns the filter. Does not own what is said (whoever says it). Invariants: a filter that was set while the process ran is made of levels and targets
//! from fixed lists; what a build leaves out of the log at compile time is not promised.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal},
    sync::Arc,
};

use parking_lot::Mutex;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing_subscriber::{EnvFilter, Registry, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt};

use crate::error::{Error, ErrorKind, FieldViolation};

/// What can have a level of its own: this crate, its parts that talk to others, and those they use for it.
pub const TARGETS: [&str; 11] = [
    "h2",
    "hyper",
    "redis",
    "rustls",
    "sqlx",
    "tidegate",
    "tidegate::cache",
    "tidegate::gateway",
    "tidegate::queue",
    "tidegate::rpc",
    "tidegate::store",
];

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What failed and needs somebody.
    Error,
    /// And what may.
    Warn,
    /// And what the gateway does.
    Info,
    /// And how.
    Debug,
    /// And every step.
    Trace,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
            Level::Trace => "trace",
        }
    }

    /// The most that this build can log.
    pub fn most() -> Level {
        match STATIC_MAX_LEVEL {
            LevelFilter::OFF | LevelFilter::ERROR => Level::Error,
            LevelFilter::WARN => Level::Warn,
            LevelFilter::INFO => Level::Info,
            LevelFilter::DEBUG => Level::Debug,
            LevelFilter::TRACE => Level::Trace,
        }
    }
}

/// A change of what is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// As it was configured.
    Reset,
    /// Everything at this level.
    All(Level),
    /// One of [`TARGETS`] at this level.
    Target(&'static str, Level),
}

/// The log of this process. Clones share it.
#[derive(Debug, Clone)]
pub struct Log {
    configured: String,
    reload: reload::Handle<EnvFilter, Registry>,
    filter: Arc<Mutex<Filter>>,
}

#[derive(Debug)]
struct Filter {
    base: String,
    targets: BTreeMap<&'static str, Level>,
}

impl Filter {
    fn directives(&self) -> String {
        let mut directives = self.base.clone();
        for (target, level) in &self.targets {
            directives.push_str(&format!(",{target}={}", level.name()));
        }
        directives
    }
}

impl Log {
    /// Starts logging to standard error: for people on a terminal, JSON lines otherwise.
    ///
    /// # Errors
    /// `directives` is not a filter such as `info` or `tidegate=debug,warn`, or logging was started before.
    pub fn start(directives: &str) -> Result<Log, Box<dyn std::error::Error + Send + Sync>> {
        // What passes the filter is remembered for each place that logs, and asked anew only when it changes.
        let (filter, reload) = reload::Layer::new(directives.parse::<EnvFilter>()?);
        let registry = tracing_subscriber::registry().with(filter);
        if io::stderr().is_terminal() {
            registry
                .with(fmt::layer().with_writer(io::stderr).with_target(false))
                .try_init()?;
        } else {
            let json = fmt::layer()
                .json()
                .flatten_event(true)
                .with_target(false)
                .with_writer(io::stderr);
            registry.with(json).try_init()?;
        }
        Ok(Log {
            configured: directives.to_owned(),
            reload,
            filter: Arc::new(Mutex::new(Filter {
                base: directives.to_owned(),
                targets: BTreeMap::new(),
            })),
        })
    }

    /// What is logged, in the words of the setting.
    pub fn filter(&self) -> String {
        self.filter.lock().directives()
    }

    /// Changes what is logged, until the next change: what it is then.
    ///
    /// # Errors
    /// `Invalid`: this build does not have the level. `Internal`: the log is gone.
    pub fn change(&self, change: Change) -> Result<String, Error> {
        if let Change::All(level) | Change::Target(_, level) = change
            && level > Level::most()
        {
            return Err(Error::invalid(vec![FieldViolation {
                field: "level".into(),
                description: format!(
                    "must be at most {}: what says more is not compiled into this build",
                    Level::most().name()
                )
                .into(),
            }]));
        }
        let mut filter = self.filter.lock();
        let changed = match change {
            Change::Reset => Filter {
                base: self.configured.clone(),
                targets: BTreeMap::new(),
            },
            Change::All(level) => Filter {
                base: level.name().to_owned(),
                targets: BTreeMap::new(),
            },
            Change::Target(target, level) => {
                let mut targets = filter.targets.clone();
                targets.insert(target, level);
                Filter {
                    base: filter.base.clone(),
                    targets,
                }
            }
        };
        let directives = changed.directives();
        let broken = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(ErrorKind::Internal, "the log does not take another filter").because(error)
        };
        let parsed = directives.parse::<EnvFilter>().map_err(|error| broken(error.into()))?;
        self.reload.reload(parsed).map_err(|error| broken(error.into()))?;
        *filter = changed;
        drop(filter);
        tracing::info!(filter = directives, "what is logged was changed by an operator");
        Ok(directives)
    }
}

/// Checks a filter for [`Log::start`].
///
/// # Errors
/// It is none, and why.
pub fn check_log(directives: &str) -> Result<(), String> {
    match directives.parse::<EnvFilter>() {
        Ok(_) => Ok(()),
        Err(error) => Err(format!(
            "must be a level or a filter, such as info or tidegate=debug,warn: {error}"
        )),
    }
}
