//! State files: where an import or an export stood, so that it can be gone on with after an interruption.
//!
//! Owns how they are kept. Invariants: a state file is whole, whatever happens while it is written; one of another command, or that cannot be
//! read, is refused and left as it is.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::time::Instant;

use crate::commands::{exit::Exit, records::Ended};

/// How long a state may be behind what was done.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// The largest state file.
const STATE_BYTES_MAX: u64 = 64 * 1024;

/// A state file.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    saved: Instant,
}

impl StateFile {
    pub(super) fn new(path: &Path) -> StateFile {
        StateFile {
            path: path.to_owned(),
            saved: Instant::now(),
        }
    }

    /// What an earlier run has left; `None` if there was none.
    pub(super) fn load<S: DeserializeOwned>(&self) -> Result<Option<S>, Ended> {
        let what = self.path.display();
        let size = match fs::metadata(&self.path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Ended::of_file(&what.to_string(), &error)),
        };
        if size > STATE_BYTES_MAX {
            return Err(Ended::new(
                Exit::Data,
                format!("{what} is no state file of this command"),
            ));
        }
        let text = fs::read(&self.path).map_err(|error| Ended::of_file(&what.to_string(), &error))?;
        let state = serde_json::from_slice(&text);
        state.map(Some).map_err(|error| {
            let message =
                format!("{what} is no state file of this command: {error}; name another, or remove it to begin anew");
            Ended::new(Exit::Data, message)
        })
    }

    /// Whether it is time to save.
    pub(super) fn is_due(&self) -> bool {
        self.saved.elapsed() >= SAVE_INTERVAL
    }

    /// Puts a state in the place of the one before.
    pub(super) fn save(&mut self, state: &impl Serialize) -> Result<(), Ended> {
        self.saved = Instant::now();
        self.replace(state)
            .map_err(|error| Ended::of_file(&self.path.display().to_string(), &error))
    }

    fn replace(&self, state: &impl Serialize) -> io::Result<()> {
        let mut new = OsString::from(&self.path);
        new.push(".new");
        let mut text = serde_json::to_vec(state).map_err(io::Error::other)?;
        text.push(b'\n');
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }
}
