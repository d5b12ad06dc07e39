//! `tidegate import`: writes the records of a file of JSON Lines.
//!
//! Owns what is sent when, and what is said of each line that was not written. Does not own the lines ([`lines`]), how far it has come
//! ([`place`]), nor the form of a line ([`super::record`]).
//!
//! Invariants: at most so many writes and so many bytes are under way; two lines with one key are written in their order; the place that is kept
//! is behind every line that has no outcome yet, so an import that goes on from there misses none. A line whose outcome cannot be had ends the
//! import; one that is refused is named, and the import goes on.

mod lines;
mod place;

use std::{
    collections::HashSet,
    fs::File,
    io::Write,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use clap::Args;
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::{
    lines::{Input, Line, Text},
    place::{Counts, Place},
};
use crate::{
    client::{
        Client, Error, Reason,
        proto::{Condition, Existence, PutRequest, PutResponse},
    },
    commands::{
        exit::Exit,
        output::{print_last, say},
        progress::{Done, Progress},
        read::to_proto,
        record::{Lifetime, Malformed, Read, json_line},
        records::{Ended, exit_of, namespace},
        state::StateFile,
        table::printable,
        target::Target,
    },
};

/// How long a write may take, unless asked otherwise: as long as a gateway may take to be started again.
const DEADLINE: Duration = Duration::from_secs(60);

/// The most bytes of values under way, unless it is one.
const IN_FLIGHT_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The arguments of `import`.
#[derive(Debug, Clone, Args)]
pub struct Import {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// The file, one JSON object on each line: "key", "value" or "value_base64", and if wanted "ttl" ("10m", or seconds) or "expire_time",
    /// and "tags"; - or nothing is standard input
    file: Option<PathBuf>,
    /// Keep in this file how far it has come; where it is there already, go on from there, if the input begins as it did
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Pass over so many lines
    #[arg(
        long,
        value_name = "LINES",
        default_value_t = 0,
        hide_default_value = true,
        conflicts_with = "state"
    )]
    after: u64,
    /// Write only what is not there: a line whose key has a record is passed over
    #[arg(long)]
    if_absent: bool,
    /// Name the lines that fail in this file too, as JSON Lines
    #[arg(long, value_name = "FILE")]
    errors: Option<PathBuf>,
    /// The most writes under way together
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    in_flight: u16,
    /// What it came to as a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// A write that has ended.
struct Ending {
    number: u64,
    key: String,
    bytes: usize,
    result: Result<PutResponse, Error>,
}

/// An import under way.
struct Importing<'a> {
    options: &'a Import,
    client: Client,
    place: Place,
    state: Option<StateFile>,
    errors: Option<File>,
    progress: Progress,
    writes: FuturesUnordered<BoxFuture<'static, Ending>>,
    /// The keys of what is under way.
    keys: HashSet<String>,
    bytes: usize,
    /// Why no more lines are taken.
    stopped: Option<Ended>,
}

impl Import {
    pub(super) async fn run(&self) -> Result<Exit, Ended> {
        let state = self.state.as_deref().map(StateFile::new);
        let earlier = match &state {
            Some(state) => state.load()?,
            None => None,
        };
        let goes_on = earlier.is_some();
        let place = match earlier {
            Some(kept) => Place::of(kept, &self.namespace, self.if_absent)?,
            None => Place::new(&self.namespace, self.if_absent),
        };
        let input = Input::open(self.file.as_deref())?;
        let errors = self.errors.as_ref().map(|path| {
            // What an earlier run named stays, if this one goes on with it.
            let opened = File::options()
                .create(true)
                .write(true)
                .append(goes_on)
                .truncate(!goes_on)
                .open(path);
            opened.map_err(|error| Ended::of_file(&path.display().to_string(), &error))
        });
        let importing = Importing {
            options: self,
            client: self.target.client(DEADLINE)?,
            place,
            state,
            errors: errors.transpose()?,
            progress: Progress::new("lines"),
            writes: FuturesUnordered::new(),
            keys: HashSet::new(),
            bytes: 0,
            stopped: None,
        };
        importing.run(input).await
    }
}

impl Importing<'_> {
    async fn run(mut self, mut input: Input) -> Result<Exit, Ended> {
        // Until here a signal ends the process at once: nothing is under way.
        self.pass_over(&mut input).await?;
        let mut interrupt = of_signal(SignalKind::interrupt())?;
        let mut terminate = of_signal(SignalKind::terminate())?;
        self.save(true)?;
        let mut waiting: Option<(Line, Read)> = None;
        loop {
            if self.stopped.is_none()
                && let Some((line, read)) = waiting.take_if(|(_, read)| self.has_room(read))
            {
                self.write(&line, read)?;
            }
            let takes_lines = self.stopped.is_none() && waiting.is_none();
            if self.writes.is_empty()
                && (!takes_lines || input.is_at_end())
                && (waiting.is_none() || self.stopped.is_some())
            {
                break;
            }
            tokio::select! {
                Some(ending) = self.writes.next(), if !self.writes.is_empty() => self.ended(ending)?,
                line = input.next(), if takes_lines && !input.is_at_end() => match line? {
                    Some(line) => waiting = self.take(line)?,
                    None => continue,
                },
                _ = interrupt.recv() => self.interrupted()?,
                _ = terminate.recv() => self.interrupted()?,
            }
            self.save(false)?;
            let (counts, part) = (self.place.counts(), input.part());
            self.progress.show(|| Done {
                count: counts.lines,
                part,
            });
        }
        self.finish()
    }

    /// Reads the lines that an earlier run has done, or that the caller wants to pass over.
    async fn pass_over(&mut self, input: &mut Input) -> Result<(), Ended> {
        let lines = self.place.counts().lines.max(self.options.after);
        for passed in 0..lines {
            let Some(line) = input.next().await? else {
                let message =
                    format!("the input has {passed} lines, and {lines} were to be passed over: it is another one");
                return Err(Ended::new(Exit::Data, message));
            };
            self.place.passed(&line);
        }
        self.place.begin(self.options.after)
    }

    /// Takes a line that was read: the write that it asks for, if it does.
    fn take(&mut self, line: Line) -> Result<Option<(Line, Read)>, Ended> {
        self.place.read(&line);
        let text = match &line.text {
            Text::Whole(text) if text.iter().all(u8::is_ascii_whitespace) => {
                self.place.done(line.number, |counts| counts.empty += 1);
                return Ok(None);
            }
            Text::Whole(text) => text,
            Text::TooLong => {
                self.refused(line.number, None, "TOO_LARGE", &lines::too_long())?;
                return Ok(None);
            }
        };
        let malformed = match Read::from_line(text) {
            Ok(read) => return Ok(Some((line, read))),
            Err(malformed) => malformed,
        };
        if !line.is_ended {
            // It may yet be written to its end: the place stays before it.
            let reason = format!(
                "half-written: the input ends within it ({}); nothing was written of it",
                malformed.reason
            );
            self.named(line.number, malformed.key.as_deref(), "INVALID", &reason)?;
            self.place.left_half_written();
            return Ok(None);
        }
        let Malformed { key, reason } = malformed;
        self.refused(line.number, key.as_deref(), "INVALID", &reason)?;
        Ok(None)
    }

    fn has_room(&self, read: &Read) -> bool {
        let bytes = self.bytes + read.value.len();
        self.writes.is_empty()
            || (self.writes.len() < usize::from(self.options.in_flight)
                && bytes <= IN_FLIGHT_BYTES_MAX
                && !self.keys.contains(&read.key))
    }

    /// Begins a write.
    fn write(&mut self, line: &Line, read: Read) -> Result<(), Ended> {
        let number = line.number;
        let (ttl, request_id) = match read.lifetime {
            Lifetime::Endless => (None, self.place.request_id(number)),
            Lifetime::For(ttl) => (Some(ttl), self.place.request_id(number)),
            Lifetime::Until(time) => match time.duration_since(SystemTime::now()) {
                // What is left of it differs with each run, so a repeat would be another request: the client makes up an id for this one.
                Ok(left) if !left.is_zero() => (Some(left), String::new()),
                _ => {
                    self.place.done(number, |counts| counts.expired += 1);
                    return Ok(());
                }
            },
        };
        let bytes = read.value.len();
        let key = read.key;
        self.keys.insert(key.clone());
        self.bytes += bytes;
        let condition = self.options.if_absent.then_some(Condition {
            existence: Existence::Absent as i32,
            version: 0,
        });
        let request = PutRequest {
            namespace: self.options.namespace.clone(),
            key: key.clone(),
            value: read.value,
            tags: read.tags,
            condition,
            request_id,
            ttl: ttl.map(to_proto).transpose()?,
            ..PutRequest::default()
        };
        let client = self.client.clone();
        self.writes.push(Box::pin(async move {
            let result = client.put(request).await;
            Ending {
                number,
                key,
                bytes,
                result,
            }
        }));
        Ok(())
    }

    /// Takes what became of a write.
    fn ended(&mut self, ending: Ending) -> Result<(), Ended> {
        let Ending {
            number,
            key,
            bytes,
            result,
        } = ending;
        self.keys.remove(&key);
        self.bytes -= bytes;
        let error = match result {
            Ok(answer) => {
                self.place.done(number, |counts| {
                    counts.written += 1;
                    counts.deduplicated += u64::from(answer.deduplicated);
                });
                return Ok(());
            }
            Err(error) => error,
        };
        let failure = error
            .failure()
            .filter(|failure| !failure.may_be_applied && failure.retry_delay.is_none());
        match failure {
            Some(failure) if failure.reason == Reason::Conflict && self.options.if_absent => {
                self.place.done(number, |counts| counts.present += 1);
                Ok(())
            }
            // What is wrong with this line alone.
            Some(failure)
                if matches!(
                    failure.reason,
                    Reason::Invalid | Reason::TooLarge | Reason::Rejected | Reason::Absent | Reason::Conflict
                ) =>
            {
                self.refused(number, Some(&key), failure.reason.name(), &failure.message)
            }
            // It may be so with every other line, and none of them is known to be wrong.
            Some(_) | None => {
                self.named(number, Some(&key), "NO_OUTCOME", &error.to_string())?;
                if self.stopped.is_none() {
                    let exit = match exit_of(&error) {
                        // Whoever goes on writes it again, under its id: what is missing is the rest.
                        Exit::Unknown => Exit::Unavailable,
                        exit => exit,
                    };
                    self.stopped = Some(Ended::new(
                        exit,
                        "stopped, for the gateway gives no answer that settles it",
                    ));
                }
                Ok(())
            }
        }
    }

    /// Names a line that is not written, now or ever.
    fn refused(&mut self, number: u64, key: Option<&str>, reason: &str, message: &str) -> Result<(), Ended> {
        self.named(number, key, reason, message)?;
        self.place.done(number, |counts| counts.failed += 1);
        Ok(())
    }

    fn named(&mut self, number: u64, key: Option<&str>, reason: &str, message: &str) -> Result<(), Ended> {
        self.progress.clear();
        let of_key = key.map_or(String::new(), |key| format!(" key \"{}\":", printable(key)));
        say(&format!("line {number}:{of_key} {reason}: {}", printable(message)));
        if let Some(errors) = &mut self.errors {
            let line = json_line(&json!({ "line": number, "key": key, "reason": reason, "message": message }));
            let written = errors.write_all(&line);
            written.map_err(|error| Ended::of_file("the file of errors", &error))?;
        }
        Ok(())
    }

    /// The first signal lets what is under way end; the second one does not.
    fn interrupted(&mut self) -> Result<(), Ended> {
        let again = self.stopped.is_some();
        let ended = Ended::new(Exit::Interrupted, "interrupted");
        if again {
            self.progress.clear();
            return Err(ended);
        }
        self.stopped = Some(ended);
        Ok(())
    }

    fn save(&mut self, now: bool) -> Result<(), Ended> {
        match &mut self.state {
            Some(state) if now || state.is_due() => state.save(self.place.kept()),
            _ => Ok(()),
        }
    }

    fn finish(mut self) -> Result<Exit, Ended> {
        self.progress.clear();
        self.save(true)?;
        let counts = self.place.counts();
        let text = if self.options.json {
            json_line(counts)
        } else {
            format!("{counts}\n").into_bytes()
        };
        let is_whole = counts.failed == 0 && !self.place.is_half_written();
        let exit = if is_whole { Exit::Done } else { Exit::Partly };
        let printed = print_last(&text, exit);
        // Why it stopped matters more than that nobody could be told the counts.
        let Some(mut ended) = self.stopped else { return printed };
        let how = if self.state.is_some() {
            "the same command goes on from there".to_owned()
        } else {
            format!("to go on from there, give --after {}", counts.lines)
        };
        ended.message = ended
            .message
            .map(|message| format!("{message}: {} lines are done; {how}", counts.lines));
        Err(ended)
    }
}

fn of_signal(kind: SignalKind) -> Result<Signal, Ended> {
    signal(kind).map_err(|error| Ended::of_file("signals", &error))
}

impl Counts {
    /// Whether there is nothing to tell but the lines.
    fn others(&self) -> [(u64, &'static str); 5] {
        [
            (self.deduplicated, "of them by an earlier run"),
            (self.present, "passed over, for there is a record"),
            (self.expired, "passed over, for they have expired"),
            (self.empty, "empty"),
            (self.failed, "failed"),
        ]
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} lines: {} written", self.lines, self.written)?;
        for (count, what) in self.others() {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}
