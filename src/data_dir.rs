//! The data directory: files that belong to one gateway.
//!
//! Owns the directory itself, the lock that keeps it to one process, and the mark by which a restart gets its node id back. What else lies
//! here is others': the saved lease (`store::node`), and by default the embedded database (the store).

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use rand::RngExt;

/// The file that is locked while a gateway runs.
const LOCK: &str = "lock";
/// The file that holds the directory's mark.
const MARK: &str = "mark";
/// The file in which the lease of the node id is saved.
const LEASE: &str = "lease";

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another process has it.
    #[error("the data directory {0} is in use by another gateway: give each its own --data-dir")]
    InUse(PathBuf),
    /// It cannot be read or written.
    #[error("the data directory {path} cannot be used")]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A data directory, held until dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    mark: String,
    identity: String,
    /// The lock ends with the file's descriptor, however the process ends.
    _lock: File,
}

impl DataDir {
    /// Takes a directory, which is made if there is none.
    ///
    /// # Errors
    /// Another process has it, or it cannot be written.
    pub fn open(path: &Path) -> Result<DataDir, DataDirError> {
        let unusable = |source| DataDirError::Unusable {
            path: path.to_owned(),
            source,
        };
        // What callers store lies here: no other user may read it.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(unusable)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join(LOCK))
            .map_err(unusable)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => DataDirError::InUse(path.to_owned()),
            TryLockError::Error(source) => unusable(source),
        })?;
        let mark = read_or_make_mark(&path.join(MARK)).map_err(unusable)?;
        // The lock file is made once and never replaced, so its number changes only where the directory is copied.
        let number = lock.metadata().map_err(unusable)?.ino();
        Ok(DataDir {
            path: path.to_owned(),
            identity: format!("{mark}.{number:x}"),
            mark,
            _lock: lock,
        })
    }

    /// The random mark by which the store knows this directory.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// Which directory this is. A copy of it has the same mark and another identity, as far as the file system tells: one whose blocks
    /// were copied has the same.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Where the lease of the node id is saved.
    pub fn lease_path(&self) -> PathBuf {
        self.path.join(LEASE)
    }
}

/// A random mark of 128 bits, in hexadecimal digits.
pub fn random_mark() -> String {
    format!("{:032x}", rand::rng().random::<u128>())
}

/// A mark that is not whole, as after a full disk, is made anew: the node id that it stood for is free again after its lease.
fn read_or_make_mark(path: &Path) -> io::Result<String> {
    let stored = match fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes).unwrap_or_default(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    if stored.len() == 32 && stored.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(stored);
    }
    let mark = random_mark();
    let mut file = File::create(path)?;
    file.write_all(mark.as_bytes())?;
    file.sync_all()?;
    Ok(mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_serves_one_process_and_keeps_its_mark() {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let path = parent.path().join("new/data");
        let first = DataDir::open(&path).expect("made");
        assert!(matches!(DataDir::open(&path), Err(DataDirError::InUse(_))));
        let mark = first.mark().to_owned();
        drop(first);
        assert_eq!(DataDir::open(&path).expect("free again").mark(), mark);
    }

    #[test]
    fn a_copy_has_the_mark_and_not_the_identity() {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let (path, copy) = (parent.path().join("data"), parent.path().join("copy"));
        let (mark, identity) = {
            let made = DataDir::open(&path).expect("made");
            (made.mark().to_owned(), made.identity().to_owned())
        };
        fs::create_dir(&copy).expect("made");
        for file in [LOCK, MARK] {
            fs::copy(path.join(file), copy.join(file)).expect("copied");
        }
        let copy = DataDir::open(&copy).expect("usable");
        assert_eq!(copy.mark(), mark);
        assert_ne!(copy.identity(), identity);
        assert_eq!(DataDir::open(&path).expect("free again").identity(), identity);
    }

    #[test]
    fn a_broken_mark_is_made_anew() {
        let path = tempfile::tempdir().expect("a temporary directory");
        for broken in [&b"cut o"[..], b"", b"\xff\xfe"] {
            fs::write(path.path().join(MARK), broken).expect("written");
            assert_eq!(DataDir::open(path.path()).expect("usable").mark().len(), 32);
        }
    }

    #[test]
    fn a_file_is_no_directory() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        assert!(matches!(DataDir::open(file.path()), Err(DataDirError::Unusable { .. })));
    }
}
