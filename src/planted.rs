//! Faults that are planted on purpose, to prove that the proofs can fail. Compiled into no build but the one that asks for them.
//!
//! Owns their names and which one is chosen. Each stands where it does harm, in one line of that place. At most one is chosen in a process,
//! before anything runs; a test chooses for its own thread.

#[cfg(test)]
use std::cell::Cell;
use std::sync::OnceLock;

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `ack-before-sync`: the journal tells its callers before fdatasync.
    AckBeforeSync,
    /// `tail-not-cut`: the journal appends behind a torn tail instead of in its place.
    TailNotCut,
}

static CHOSEN: OnceLock<Fault> = OnceLock::new();

#[cfg(test)]
thread_local! {
    static CHOSEN_HERE: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Chooses the fault of this thread.
#[cfg(test)]
pub(crate) fn choose_here(fault: Option<Fault>) {
    CHOSEN_HERE.set(fault);
}

/// Chooses the fault of this process by its name.
///
/// # Errors
/// There is none of that name, or one is chosen already.
pub fn choose(name: &str) -> Result<(), String> {
    let fault = match name {
        "ack-before-sync" => Fault::AckBeforeSync,
        "tail-not-cut" => Fault::TailNotCut,
        _ => return Err(format!("there is no planted fault of the name {name}")),
    };
    CHOSEN
        .set(fault)
        .map_err(|_| "a planted fault is chosen already".to_owned())
}

/// Whether this fault is chosen.
pub(crate) fn is(fault: Fault) -> bool {
    #[cfg(test)]
    if CHOSEN_HERE.get() == Some(fault) {
        return true;
    }
    CHOSEN.get() == Some(&fault)
}
