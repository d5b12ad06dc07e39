//! Standard output and standard error of a command.
//!
//! Invariant: a reader of the output that has gone ends the command quietly; any other failure to write is told, and is no success.

use std::io::{self, Write};

use crate::commands::{exit::Exit, records::Ended};

/// Writes to standard output, at once.
pub(super) fn print(bytes: &[u8]) -> Result<(), Ended> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|error| of_output(&error))
}

/// Writes what a command ends with: a reader that has gone changes nothing of how it ended.
pub(super) fn print_last(bytes: &[u8], exit: Exit) -> Result<Exit, Ended> {
    match print(bytes) {
        Err(ended) if ended.message.is_some() => Err(ended),
        Ok(()) | Err(_) => Ok(exit),
    }
}

/// What a failure to write the output means.
pub(super) fn of_output(error: &io::Error) -> Ended {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Ended {
            exit: Exit::Done,
            message: None,
        };
    }
    Ended::of_file("standard output", error)
}

/// Says something on standard error. Nobody is left to tell when that is closed.
pub(super) fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "tidegate: {message}");
}

/// The same without our name before it.
pub(super) fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
