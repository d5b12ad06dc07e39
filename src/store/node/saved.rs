//! The lease of a node id as it is kept with the data directory: with it a gateway may start while its store cannot be asked.
//!
//! Owns the file: its format, that it is replaced as a whole or not at all, and whether what it says may be used. Does not own the lease
//! ([`super::NodeLease`]), the directory nor the names by which it and the store are known (who opens it gives them). Invariants: what was
//! saved is on disk when the call returns; a file that is damaged, of another format, directory or store is none.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use crate::{
    model::{Timestamp, Version},
    store::node::STAMP_LEASE,
};

/// How the first line begins: what the file is, and in which format. The checksum of all that follows it ends the line.
const FORMAT: &str = "tidegate-lease 1 ";

/// How far in the future a confirmation may seem to lie. Further: the wall clock was set back, and how old it is cannot be known.
const SET_BACK_MAX: Duration = Duration::from_secs(10);

/// A lease as it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedLease {
    /// The node id.
    pub node: u16,
    /// When the store last confirmed the lease, by the wall clock; `None` once it was given back or lost.
    pub confirmed_at: Option<Timestamp>,
    /// What processes on this directory may have stamped is not above it: known to the store, or to this file alone.
    pub reserved: Version,
}

impl SavedLease {
    /// Whether stamps may rest on it at `now`, by the wall clock.
    pub fn is_usable(&self, now: Timestamp) -> bool {
        self.confirmed_at.is_some_and(|confirmed_at| {
            confirmed_at <= now.after(SET_BACK_MAX) && now < confirmed_at.after(STAMP_LEASE)
        })
    }
}

/// What the file holds besides its first line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    directory: String,
    store: String,
    node: u16,
    /// Milliseconds since the Unix epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    confirmed_at: Option<i64>,
    reserved: i64,
}

/// The file.
#[derive(Debug)]
pub struct LeaseFile {
    path: PathBuf,
    directory: String,
    store: String,
    found: Option<SavedLease>,
}

impl LeaseFile {
    /// Reads the file at `path`, if it was written in the directory that is known as `directory` for the store known as `store`. Does
    /// blocking file I/O: to be called at start.
    pub fn open(path: PathBuf, directory: &str, store: &str) -> LeaseFile {
        let found = match fs::read_to_string(&path) {
            Ok(text) => read(&text, directory, store).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
        };
        let found = found.unwrap_or_else(|reason| {
            tracing::warn!(
                reason,
                path = %path.display(),
                "the saved lease of the node id counts as none: without the store this start cannot go on"
            );
            None
        });
        LeaseFile {
            path,
            directory: directory.to_owned(),
            store: store.to_owned(),
            found,
        }
    }

    /// What it held when it was opened.
    pub fn found(&self) -> Option<SavedLease> {
        self.found
    }

    /// Replaces what it holds. Cancel-safe: it is then replaced or not.
    ///
    /// # Errors
    /// It was not replaced, or it is not known whether the disk has it.
    pub async fn save(&self, lease: SavedLease) -> io::Result<()> {
        let contents = Contents {
            directory: self.directory.clone(),
            store: self.store.clone(),
            node: lease.node,
            confirmed_at: lease.confirmed_at.map(|at| at.0),
            reserved: lease.reserved.get(),
        };
        let body = toml::to_string(&contents).map_err(io::Error::other)?;
        let text = format!("{FORMAT}{:08x}\n{body}", crc32c::crc32c(body.as_bytes()));
        let path = self.path.clone();
        spawn_blocking(move || replace(&path, &text))
            .await
            .map_err(io::Error::other)?
    }

    /// Removes it, for what it holds is no longer so.
    ///
    /// # Errors
    /// It is still there, or may come back with a power failure.
    pub async fn remove(&self) -> io::Result<()> {
        let path = self.path.clone();
        let removal = spawn_blocking(move || match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync_directory_of(&path),
        });
        removal.await.map_err(io::Error::other)?
    }
}

/// What a text holds, or why it counts as nothing.
fn read(text: &str, directory: &str, store: &str) -> Result<SavedLease, String> {
    let (checksum, body) = text
        .strip_prefix(FORMAT)
        .and_then(|rest| rest.split_once('\n'))
        .ok_or("it is of another format, or damaged")?;
    if checksum != format!("{:08x}", crc32c::crc32c(body.as_bytes())) {
        return Err("it is damaged".to_owned());
    }
    let contents: Contents = toml::from_str(body).map_err(|_| "it is damaged")?;
    if contents.directory != directory {
        return Err("it was written in another directory, of which this one is a copy".to_owned());
    }
    if contents.store != store {
        return Err("it is of another store than the one that is configured".to_owned());
    }
    Ok(SavedLease {
        node: contents.node,
        confirmed_at: contents.confirmed_at.map(Timestamp),
        reserved: Version::new(contents.reserved).ok_or("it is damaged")?,
    })
}

/// Replaces a file by one that is whole and on disk.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let write = || {
        // Replaced, not continued: a crash may have left one.
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    if let Err(error) = write() {
        // On a full disk even this is room that others need.
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    fs::rename(&new, path)?;
    sync_directory_of(path)
}

fn sync_directory_of(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIRMED_AT: Timestamp = Timestamp(1_700_000_000_123);

    fn saved() -> SavedLease {
        SavedLease {
            node: 7,
            confirmed_at: Some(CONFIRMED_AT),
            reserved: Version::new(1 << 40).expect("positive"),
        }
    }

    fn found(path: &Path, directory: &str, store: &str) -> Option<SavedLease> {
        LeaseFile::open(path.to_owned(), directory, store).found()
    }

    #[tokio::test]
    async fn what_is_saved_is_found_in_its_directory_for_its_store_alone() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("lease");
        let file = LeaseFile::open(path.clone(), "here", "store \"a\"");
        assert_eq!(file.found(), None);
        // What a crash may have left.
        fs::write(path.with_extension("new"), [b'x'; 9_999]).expect("written");
        file.save(saved()).await.expect("saved");
        assert_eq!(found(&path, "here", "store \"a\""), Some(saved()));
        assert_eq!(found(&path, "there", "store \"a\""), None);
        assert_eq!(found(&path, "here", "store b"), None);
        let given_back = SavedLease {
            confirmed_at: None,
            ..saved()
        };
        file.save(given_back).await.expect("saved");
        assert_eq!(found(&path, "here", "store \"a\""), Some(given_back));
        assert_eq!(fs::read_dir(directory.path()).expect("readable").count(), 1);
        for _ in 0..2 {
            file.remove().await.expect("gone");
            assert_eq!(found(&path, "here", "store \"a\""), None);
        }
    }

    #[tokio::test]
    async fn a_damaged_file_is_none_whatever_byte_it_is() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("lease");
        let file = LeaseFile::open(path.clone(), "here", "store");
        file.save(saved()).await.expect("saved");
        let whole = fs::read(&path).expect("readable");
        for place in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[place] ^= 0x08;
            fs::write(&path, &damaged).expect("written");
            assert_eq!(found(&path, "here", "store"), None, "byte {place}");
            fs::write(&path, &whole[..place]).expect("written");
            assert_eq!(found(&path, "here", "store"), None, "cut at {place}");
        }
        fs::write(&path, &whole).expect("written");
        assert_eq!(found(&path, "here", "store"), Some(saved()));
    }

    #[tokio::test]
    async fn a_directory_that_cannot_be_written_is_said() {
        let path = PathBuf::from("/proc/there is no such directory/lease");
        let file = LeaseFile::open(path, "here", "store");
        assert_eq!(file.found(), None);
        assert!(file.save(saved()).await.is_err());
    }

    #[test]
    fn a_saved_lease_lasts_for_half_a_day_of_a_wall_clock_that_was_not_set_back() {
        let until = CONFIRMED_AT.after(STAMP_LEASE);
        assert!(saved().is_usable(CONFIRMED_AT));
        assert!(saved().is_usable(Timestamp(until.0 - 1)));
        assert!(!saved().is_usable(until));
        assert!(saved().is_usable(Timestamp(CONFIRMED_AT.0 - 9_999)));
        assert!(!saved().is_usable(Timestamp(CONFIRMED_AT.0 - 10_001)));
        let given_back = SavedLease {
            confirmed_at: None,
            ..saved()
        };
        assert!(!given_back.is_usable(CONFIRMED_AT));
    }
}
