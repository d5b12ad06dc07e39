//! What the exit code of a command says.
//!
//! Owns the numbers, which are a contract with scripts: `docs/cli.md` and `--help` list them. Does not own which failure is which.

use std::process::ExitCode;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Exit {
    /// It did what was asked.
    Done,
    /// The gateway refused it, or something else went wrong that no other code says. Nothing was changed by what failed.
    Failed,
    /// There is no such record.
    NotFound,
    /// The condition of a write does not hold; nothing was changed.
    ConditionFailed,
    /// Some of it was done, and some was not: each part that was not is named on standard error.
    Partly,
    /// There was no answer, and it may have been done, or may be yet: look, or repeat it with the same request id.
    Unknown,
    /// The arguments, the configuration or the request are wrong (EX_USAGE).
    Usage,
    /// What is to be read is not what it should be: a journal, a state file, an input that has changed (EX_DATAERR).
    Data,
    /// Something that is needed is not there: no gateway answers, or it says that it cannot now. Another try makes sense (EX_UNAVAILABLE).
    Unavailable,
    /// A task of the gateway died (EX_SOFTWARE).
    Software,
    /// The gateway stopped with accepted writes that are not in the store, or calls unanswered (EX_TEMPFAIL).
    LeftBehind,
    /// Stopped by a signal before the end.
    Interrupted,
}

impl Exit {
    /// The number that the process exits with.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::NotFound => 3,
            Exit::ConditionFailed => 4,
            Exit::Partly => 5,
            Exit::Unknown => 6,
            Exit::Usage => 64,
            Exit::Data => 65,
            Exit::Unavailable => 69,
            Exit::Software => 70,
            Exit::LeftBehind => 75,
            Exit::Interrupted => 130,
        }
    }
}

/// What `--help` of each command that asks a gateway ends with.
pub const HELP: &str = "\
Exit codes: 0 done, 1 failed, 3 no such record, 4 the condition does not hold, 5 some of it failed, 6 it is not known whether it was done, \
64 wrong arguments or configuration, 65 wrong input data, 69 no gateway answers or it cannot now, 130 interrupted.";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}
