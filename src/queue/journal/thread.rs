//! The journal thread: takes turns, sleeps when there is nothing to do.
//!
//! Owns the loop and its two ends: closed, or poisoned. Does not own what a turn does (`writer`). Invariants: however it ends, even by a
//! panic, nobody is left waiting for it; the directory is free again before anybody is told that it ended.

use std::{io, thread};

use super::{
    shared::Shared,
    sync::Arc,
    writer::{Turn, Writer},
};

/// Starts the thread. It ends when the journal is closed or fails, and holds `lock` until then.
///
/// # Errors
/// There can be no more threads.
pub(super) fn start(writer: Writer, lock: Box<dyn Send>) -> io::Result<()> {
    let run = move || {
        let _guard = PoisonOnPanic(Arc::clone(writer.shared()));
        run(writer, lock);
    };
    thread::Builder::new().name("journal".to_owned()).spawn(run)?;
    Ok(())
}

fn run(mut writer: Writer, lock: Box<dyn Send>) {
    let shared = Arc::clone(writer.shared());
    let ended = take_turns(&mut writer);
    drop(writer);
    drop(lock);
    match ended {
        Ok(()) => shared.finished(),
        Err(error) => {
            tracing::error!(
                %error,
                "the journal has failed: write-behind writes are refused until a restart, and those under way have an unknown outcome"
            );
            shared.poison();
        }
    }
}

fn take_turns(writer: &mut Writer) -> io::Result<()> {
    let mut idle = false;
    loop {
        match writer.turn(idle)? {
            Turn::Done => return Ok(()),
            Turn::Again => idle = false,
            Turn::Sleep { seen, wake_at, timeout } => idle = writer.shared().sleep(seen, wake_at, timeout),
        }
    }
}

struct PoisonOnPanic(Arc<Shared>);

impl Drop for PoisonOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.poison();
        }
    }
}
