//! `tidegate export`: the records whose keys begin with a prefix, as JSON Lines.
//!
//! Owns the file and where it stands. Does not own the form of a line ([`super::record`]) nor the pages. Invariants: of a file that is exported
//! into with a state file, what the state says is there is there, synced; whatever lies behind that is cut off when the export goes on.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::{
    client::{
        Pages,
        proto::{ScanRecord, ScanRequest},
    },
    commands::{
        exit::Exit,
        output::{print, say},
        progress::{Done, Progress},
        record::Written,
        records::{Ended, namespace},
        state::StateFile,
        target::Target,
    },
};

/// How long a page may take unless asked otherwise.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the contract allows.
const PAGE_RECORDS_MAX: i32 = 1_000;

/// The arguments of `export`.
#[derive(Debug, Clone, Args)]
pub struct Export {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// What the keys begin with; all of them where it is left out
    #[arg(default_value = "")]
    prefix: String,
    /// Write into this file, which must not be there yet, instead of standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Keep in this file how far it has come; where it is there already, go on from there
    #[arg(long, value_name = "FILE", requires = "output")]
    state: Option<PathBuf>,
    #[command(flatten)]
    target: Target,
}

/// What is in a state file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Which namespace and which keys, for a state goes with no other.
    export_of: (String, String),
    /// Into which file, by its whole path, for what lies behind the state is cut off, and must be of no other. What is no ASCII is escaped.
    output: String,
    /// Where the next page begins.
    page_token: String,
    records: u64,
    /// The length of the output, as far as it counts.
    bytes: u64,
    is_complete: bool,
}

/// Where the lines go.
enum Output {
    Standard,
    File(File, PathBuf),
}

impl Export {
    pub(super) async fn run(&self) -> Result<Exit, Ended> {
        let mut file = self.state.as_deref().map(StateFile::new);
        let earlier = match &file {
            Some(file) => file.load::<State>()?,
            None => None,
        };
        let goes_on = earlier.is_some();
        let mut state = earlier.unwrap_or_else(|| State {
            export_of: (self.namespace.clone(), self.prefix.clone()),
            output: String::new(),
            page_token: String::new(),
            records: 0,
            bytes: 0,
            is_complete: false,
        });
        if (state.export_of.0.as_str(), state.export_of.1.as_str()) != (&self.namespace, &self.prefix) {
            let (namespace, prefix) = &state.export_of;
            let message = format!("the state file is of another export: namespace {namespace}, prefix {prefix:?}");
            return Err(Ended::new(Exit::Data, message));
        }
        if let Some(path) = self.output.as_deref().filter(|_| goes_on) {
            check_output(path, &state)?;
        }
        if state.is_complete {
            say(&format!(
                "the export is complete: {} records; remove the state file to begin anew",
                state.records
            ));
            return Ok(Exit::Done);
        }
        let pages = self.target.client(DEADLINE)?.pages(ScanRequest {
            namespace: self.namespace.clone(),
            prefix: self.prefix.clone(),
            page_size: PAGE_RECORDS_MAX,
            page_token: state.page_token.clone(),
            with_tags: true,
            ..ScanRequest::default()
        });
        let mut output = Output::open(self.output.as_deref(), goes_on.then_some(state.bytes))?;
        if let Some(file) = &mut file {
            if let Some(path) = &self.output {
                state.output = whole_path(path)?;
            }
            file.save(&state)?;
        }
        let ended = tokio::select! {
            ended = self.copy(pages, &mut output, &mut state, file.as_mut()) => ended,
            _ = tokio::signal::ctrl_c() => {
                // Between two pages: the state is of what the file has.
                if let Some(file) = &mut file {
                    output.sync()?;
                    file.save(&state)?;
                }
                Err(Ended::new(Exit::Interrupted, self.interrupted(&state)))
            }
        };
        ended?;
        say(&format!("{} records", state.records));
        Ok(Exit::Done)
    }

    fn interrupted(&self, state: &State) -> String {
        match self.state {
            Some(_) => format!(
                "interrupted after {} records; the same command goes on from there",
                state.records
            ),
            None => "interrupted".to_owned(),
        }
    }

    async fn copy(
        &self,
        mut pages: Pages,
        output: &mut Output,
        state: &mut State,
        mut file: Option<&mut StateFile>,
    ) -> Result<(), Ended> {
        let mut progress = Progress::new("records");
        loop {
            let page = pages.next().await.inspect_err(|_| progress.clear())?;
            let Some(records) = page else { break };
            let lines = lines(&records);
            output.write(&lines).inspect_err(|_| progress.clear())?;
            state.records += records.len() as u64;
            state.bytes += lines.len() as u64;
            state.page_token = pages.token().to_owned();
            state.is_complete = pages.is_at_end();
            if let Some(file) = &mut file
                && (state.is_complete || file.is_due())
            {
                output.sync()?;
                file.save(state)?;
            }
            progress.show(|| Done {
                count: state.records,
                part: None,
            });
        }
        output.sync()?;
        progress.clear();
        Ok(())
    }
}

/// Refuses a file that is not the one that the state is about, before anything is cut off or said to be complete.
fn check_output(path: &Path, state: &State) -> Result<(), Ended> {
    let what = path.display();
    let refused = |why: String| Err(Ended::new(Exit::Data, why));
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return refused(format!(
                "{what} is gone, and the state file goes on with it: remove that to begin anew"
            ));
        }
        Err(error) => return Err(Ended::of_file(&what.to_string(), &error)),
    };
    if whole_path(path)? != state.output {
        return refused(format!(
            "the state file is of an export into {}: name that, or another state file",
            state.output
        ));
    }
    let (length, kept) = (metadata.len(), state.bytes);
    if length < kept || (state.is_complete && length != kept) {
        return refused(format!(
            "{what} has {length} bytes, and the state file says {kept}: it is not what was exported"
        ));
    }
    Ok(())
}

fn whole_path(path: &Path) -> Result<String, Ended> {
    let whole = fs::canonicalize(path).map_err(|error| Ended::of_file(&path.display().to_string(), &error))?;
    Ok(whole.as_os_str().as_encoded_bytes().escape_ascii().to_string())
}

fn lines(records: &[ScanRecord]) -> Vec<u8> {
    records
        .iter()
        .filter_map(|record| Some(Written::of(record, true)?.line()))
        .flatten()
        .collect()
}

impl Output {
    /// `kept`: the length of what an earlier run has written, and is to be gone on with; it was checked that the file has that.
    fn open(path: Option<&Path>, kept: Option<u64>) -> Result<Output, Ended> {
        let Some(path) = path else {
            return Ok(Output::Standard);
        };
        let what = path.display().to_string();
        let opened = match kept {
            None => OpenOptions::new().write(true).create_new(true).open(path),
            Some(_) => OpenOptions::new().write(true).open(path),
        };
        let mut file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                let message = format!("{what} is there already: remove it, or name another file");
                Ended::new(Exit::Usage, message)
            }
            _ => Ended::of_file(&what, &error),
        })?;
        if let Some(kept) = kept {
            let cut = file.set_len(kept).and_then(|()| file.seek(SeekFrom::Start(kept)));
            cut.map_err(|error| Ended::of_file(&what, &error))?;
        }
        Ok(Output::File(file, path.to_owned()))
    }

    fn write(&mut self, lines: &[u8]) -> Result<(), Ended> {
        match self {
            Output::Standard => print(lines),
            Output::File(file, path) => {
                let written = file.write_all(lines);
                written.map_err(|error| Ended::of_file(&path.display().to_string(), &error))
            }
        }
    }

    fn sync(&self) -> Result<(), Ended> {
        match self {
            Output::Standard => Ok(()),
            Output::File(file, path) => {
                let synced = file.sync_data();
                synced.map_err(|error| Ended::of_file(&path.display().to_string(), &error))
            }
        }
    }
}
