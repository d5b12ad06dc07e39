//! The lines of the input of an import.
//!
//! Owns the thread that reads them, for a read of a file or a pipe blocks. Invariants: a line is bounded, and a longer one is passed over without
//! being held; what was read and not yet taken is bounded, too.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::commands::records::Ended;

/// The longest line: room for the largest value that a gateway can be told to take, as base64.
const LINE_BYTES_MAX: usize = 96 * 1024 * 1024;

/// Lines that were read and not yet taken.
const AHEAD_MAX: usize = 16;

/// A line as it was read.
#[derive(Debug)]
pub(super) struct Line {
    /// Its number, from 1.
    pub(super) number: u64,
    pub(super) text: Text,
    /// Whether its end was there, or only that of the input.
    pub(super) is_ended: bool,
}

#[derive(Debug)]
pub(super) enum Text {
    /// Without its end.
    Whole(Vec<u8>),
    TooLong,
}

/// The lines, one after the other.
pub(super) struct Input {
    lines: Receiver<io::Result<Line>>,
    name: String,
    is_at_end: bool,
    bytes_read: Arc<AtomicU64>,
    /// The size of the file, where it is one.
    bytes: Option<u64>,
}

impl Input {
    /// Opens a file, or takes standard input. The thread that reads ends with the input, or when this is dropped; or with the process, while it
    /// waits for somebody to write into a pipe.
    pub(super) fn open(path: Option<&Path>) -> Result<Input, Ended> {
        let path = path.filter(|path| path.as_os_str() != "-");
        let name = path.map_or("standard input".to_owned(), |path| path.display().to_string());
        let bytes_read = Arc::new(AtomicU64::new(0));
        let (sender, lines) = channel(AHEAD_MAX);
        let mut bytes = None;
        let from: Box<dyn io::Read + Send> = match path {
            Some(path) => {
                let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
                let (metadata, file) = opened.map_err(|error| Ended::of_file(&name, &error))?;
                bytes = Some(metadata.len()).filter(|_| metadata.is_file());
                Box::new(file)
            }
            None => Box::new(io::stdin()),
        };
        let counter = Arc::clone(&bytes_read);
        let reading = thread::Builder::new().name("lines".to_owned());
        let started = reading.spawn(move || read_all(BufReader::new(from), &sender, &counter));
        started.map_err(|error| Ended::of_file("a thread to read", &error))?;
        Ok(Input {
            lines,
            name,
            is_at_end: false,
            bytes_read,
            bytes,
        })
    }

    /// The next line; `None` at the end. Safe to drop: no line is lost.
    pub(super) async fn next(&mut self) -> Result<Option<Line>, Ended> {
        match self.lines.recv().await {
            Some(Ok(line)) => Ok(Some(line)),
            Some(Err(error)) => Err(Ended::of_file(&self.name, &error)),
            None => {
                self.is_at_end = true;
                Ok(None)
            }
        }
    }

    /// Whether it is known that there are no more.
    pub(super) fn is_at_end(&self) -> bool {
        self.is_at_end
    }

    /// Which part of it was read, where that can be known.
    pub(super) fn part(&self) -> Option<f64> {
        let bytes = self.bytes.filter(|bytes| *bytes > 0)?;
        Some(self.bytes_read.load(Ordering::Relaxed) as f64 / bytes as f64)
    }
}

pub(super) fn too_long() -> String {
    format!("the line is longer than {LINE_BYTES_MAX} bytes")
}

fn read_all(mut from: impl BufRead, lines: &Sender<io::Result<Line>>, bytes: &AtomicU64) {
    for number in 1.. {
        let read = read_line(&mut from, LINE_BYTES_MAX, bytes);
        let line = match read {
            Ok(None) => return,
            Ok(Some((text, is_ended))) => Ok(Line { number, text, is_ended }),
            Err(error) => Err(error),
        };
        let failed = line.is_err();
        if lines.blocking_send(line).is_err() || failed {
            return;
        }
    }
}

fn read_line(from: &mut impl BufRead, bytes_max: usize, bytes: &AtomicU64) -> io::Result<Option<(Text, bool)>> {
    let mut text = Vec::new();
    let (mut is_too_long, mut is_empty) = (false, true);
    loop {
        let part = match from.fill_buf() {
            Ok(part) => part,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if part.is_empty() {
            let text = if is_too_long { Text::TooLong } else { Text::Whole(text) };
            return Ok((!is_empty).then_some((text, false)));
        }
        is_empty = false;
        let end = part.iter().position(|byte| *byte == b'\n');
        let line = &part[..end.unwrap_or(part.len())];
        is_too_long |= text.len() + line.len() > bytes_max;
        if is_too_long {
            text = Vec::new();
        } else {
            text.extend_from_slice(line);
        }
        let used = end.map_or(part.len(), |end| end + 1);
        from.consume(used);
        bytes.fetch_add(used as u64, Ordering::Relaxed);
        if end.is_some() {
            let text = if is_too_long { Text::TooLong } else { Text::Whole(text) };
            return Ok(Some((text, true)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(input: &[u8], buffer: usize, bytes_max: usize) -> Vec<(Option<String>, bool)> {
        let mut from = BufReader::with_capacity(buffer, input);
        let bytes = AtomicU64::new(0);
        let mut lines = Vec::new();
        while let Some((text, is_ended)) = read_line(&mut from, bytes_max, &bytes).expect("memory can be read") {
            let text = match text {
                Text::Whole(text) => Some(String::from_utf8(text).expect("ASCII")),
                Text::TooLong => None,
            };
            lines.push((text, is_ended));
        }
        assert_eq!(bytes.into_inner(), input.len() as u64);
        lines
    }

    #[test]
    fn lines_are_whole_whatever_the_buffer_and_the_last_says_whether_it_is_ended() {
        for buffer in [1, 2, 3, 64] {
            let found = lines(b"ab\n\nabcde\nabcd", buffer, 4);
            let whole = |text: &str, is_ended| (Some(text.to_owned()), is_ended);
            assert_eq!(
                found,
                [whole("ab", true), whole("", true), (None, true), whole("abcd", false)]
            );
            assert_eq!(lines(b"a\n", buffer, 4), [whole("a", true)]);
            assert_eq!(lines(b"", buffer, 4), []);
        }
    }
}
