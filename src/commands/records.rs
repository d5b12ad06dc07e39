//! The commands that read and write records: `get`, `put`, `delete`, `incr`, `scan`, `watch`, `import`, `export`.
//!
//! Owns which there are, and which exit code a failed call is.

use std::io;

use clap::Subcommand;

use crate::{
    client::{Error, Reason},
    commands::{
        exit::{Exit, HELP},
        export, import,
        output::complain,
        read, watch, write,
    },
    model::check_namespace,
};

/// A command that reads or writes records.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Print the value of a record
    #[command(after_help = HELP)]
    Get(read::Get),
    /// Write a record: the value is an argument, a file, or standard input
    #[command(after_help = HELP)]
    Put(write::Put),
    /// Make a key absent
    #[command(after_help = HELP)]
    Delete(write::Delete),
    /// Add to a counter, and print what that made of it
    #[command(after_help = HELP)]
    Incr(write::Incr),
    /// List the records whose keys begin with a prefix
    #[command(after_help = HELP)]
    Scan(read::Scan),
    /// Follow the changes of the records whose keys begin with a prefix
    #[command(after_help = HELP)]
    Watch(watch::Watch),
    /// Write the records of a file of JSON Lines, as `export` writes it
    #[command(after_help = HELP)]
    Import(import::Import),
    /// Write the records whose keys begin with a prefix as JSON Lines
    #[command(after_help = HELP)]
    Export(export::Export),
}

/// Runs a command to its end. What went wrong is said on standard error.
pub fn run(command: &Command) -> Exit {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("cannot start a runtime: {error}"));
            return Exit::Unavailable;
        }
    };
    let done = runtime.block_on(async {
        match command {
            Command::Get(get) => get.run().await,
            Command::Put(put) => put.run().await,
            Command::Delete(delete) => delete.run().await,
            Command::Incr(incr) => incr.run().await,
            Command::Scan(scan) => scan.run().await,
            Command::Watch(watch) => watch.run().await,
            Command::Import(import) => import.run().await,
            Command::Export(export) => export.run().await,
        }
    });
    done.unwrap_or_else(|ended| {
        if let Some(message) = &ended.message {
            complain(message);
        }
        ended.exit
    })
}

/// A command that ended before it was done.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) exit: Exit,
    /// For people; `None` where there is nothing to complain about.
    pub(super) message: Option<String>,
}

impl Ended {
    pub(super) fn new(exit: Exit, message: impl Into<String>) -> Ended {
        Ended {
            exit,
            message: Some(message.into()),
        }
    }

    /// A file or a stream that cannot be read or written.
    pub(super) fn of_file(what: &str, error: &io::Error) -> Ended {
        Ended::new(Exit::Failed, format!("{what}: {error}"))
    }
}

impl From<Error> for Ended {
    fn from(error: Error) -> Ended {
        let mut message = error.to_string();
        if error.may_be_applied() {
            message.push_str("; it may have been applied, or may be yet");
        }
        Ended::new(exit_of(&error), message)
    }
}

/// What a call that failed ends its command with.
pub(super) fn exit_of(error: &Error) -> Exit {
    if error.may_be_applied() {
        return Exit::Unknown;
    }
    let failure = match error {
        Error::Address { .. } => return Exit::Usage,
        Error::Failed(failure) => failure,
        Error::Unreachable { .. } | Error::TimedOut { .. } => return Exit::Unavailable,
    };
    match &failure.reason {
        Reason::Invalid => Exit::Usage,
        Reason::Conflict | Reason::Absent => Exit::ConditionFailed,
        Reason::Overloaded | Reason::Unavailable | Reason::NotPersisted | Reason::NotVisible | Reason::Timeout => {
            Exit::Unavailable
        }
        Reason::TooLarge
        | Reason::Rejected
        | Reason::NotACounter
        | Reason::OutOfRange
        | Reason::Superseded
        | Reason::DeadLettered
        | Reason::TooNew
        | Reason::Internal
        | Reason::Other(_) => Exit::Failed,
    }
}

/// Reads a namespace from the command line.
pub(super) fn namespace(text: &str) -> Result<String, &'static str> {
    check_namespace(text).map(|()| text.to_owned())
}
