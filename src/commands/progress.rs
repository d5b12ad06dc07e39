//! How far a long command has come, on a terminal.
//!
//! Owns one line of standard error. Invariants: there is none where standard error is no terminal; it is drawn ten times a second at most.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use tokio::time::Instant;

/// How long a line stays as it is, at least.
const REDRAW: Duration = Duration::from_millis(100);

/// The width of the bar, in characters.
const BAR: usize = 24;

/// Goes to the beginning of the line and clears it.
const CLEAR: &str = "\r\x1b[K";

/// The line of one command.
#[derive(Debug)]
pub struct Progress {
    /// What is counted, as "lines".
    unit: &'static str,
    started: Instant,
    /// When it was drawn; `None` while it is not there.
    drawn: Option<Instant>,
    is_on: bool,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    /// How many units, since the command began.
    pub count: u64,
    /// Which part of the whole, from 0 to 1, where that is known.
    pub part: Option<f64>,
}

impl Progress {
    /// A line that counts so-called units, if standard error is a terminal.
    pub fn new(unit: &'static str) -> Progress {
        Progress {
            unit,
            started: Instant::now(),
            drawn: None,
            is_on: io::stderr().is_terminal(),
        }
    }

    /// Draws it, unless it was drawn a moment ago. `done` is asked only then.
    pub fn show(&mut self, done: impl FnOnce() -> Done) {
        let now = Instant::now();
        if !self.is_on || self.drawn.is_some_and(|drawn| now - drawn < REDRAW) {
            return;
        }
        let line = line(self.unit, done(), now - self.started);
        let mut out = io::stderr().lock();
        // A terminal that is gone needs no line.
        self.is_on = write!(out, "{CLEAR}{line}").and_then(|()| out.flush()).is_ok();
        self.drawn = Some(now);
    }

    /// Clears it, to make room for something else, or because it is over.
    pub fn clear(&mut self) {
        if self.drawn.take().is_some() {
            let mut out = io::stderr().lock();
            let _ = write!(out, "{CLEAR}").and_then(|()| out.flush());
        }
    }
}

fn line(unit: &str, done: Done, passed: Duration) -> String {
    let seconds = passed.as_secs_f64().max(0.001);
    let rate = done.count as f64 / seconds;
    let counted = format!("{} {unit}  {rate:.0}/s", done.count);
    let Some(part) = done.part else {
        return format!("{counted}  {}", clock(seconds));
    };
    let part = part.clamp(0.0, 1.0);
    // At most BAR.
    let full = (part * BAR as f64) as usize;
    let left = if part > 0.0 {
        clock(seconds / part - seconds)
    } else {
        "-".to_owned()
    };
    format!(
        "[{}{}] {:3.0} %  {counted}  {left} left",
        "#".repeat(full),
        ".".repeat(BAR - full),
        part * 100.0
    )
}

fn clock(seconds: f64) -> String {
    // Whole seconds are enough, and a time beyond all bounds saturates.
    let seconds = seconds.round() as u64;
    if seconds >= 3600 {
        return format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    }
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_whole_has_a_bar_and_a_time_that_is_left() {
        let done = Done {
            count: 1_000,
            part: Some(0.25),
        };
        assert_eq!(
            line("lines", done, Duration::from_secs(10)),
            "[######..................]  25 %  1000 lines  100/s  0:30 left"
        );
        let all = line(
            "lines",
            Done {
                part: Some(1.0),
                ..done
            },
            Duration::from_secs(10),
        );
        assert!(all.starts_with("[########################] 100 %"), "{all}");
    }

    #[test]
    fn an_unknown_whole_is_counted() {
        let done = Done { count: 50, part: None };
        assert_eq!(
            line("records", done, Duration::from_secs(4_000)),
            "50 records  0/s  1:06:40"
        );
    }
}
