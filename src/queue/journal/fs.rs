//! The file system as the journal sees it: one flat directory, and files that are written at an offset and synced.
//!
//! Owns the trait and the real directory behind it. Its twin for tests (`sim`) keeps everything in memory and can lose what was
//! not synced. Owns no meaning of any file. Invariants that callers rely on: what was written is durable once [`JournalFile::sync`]
//! has returned, what was made, renamed or removed once [`JournalFs::sync_dir`] has; until then any part of it may be lost.

use std::{
    fmt,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// A directory of the journal's.
pub trait JournalFs: fmt::Debug + Send + Sync + 'static {
    /// How people know it: its path.
    fn name(&self) -> String;

    /// Takes it for this process; `None` if another one has it. It is given back when the lock is dropped, or the process ends.
    ///
    /// # Errors
    /// It cannot be locked, as when it cannot be written.
    fn lock(&self) -> io::Result<Option<Box<dyn Send>>>;

    /// The names of its files.
    ///
    /// # Errors
    /// It cannot be read.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Opens a file that exists.
    ///
    /// # Errors
    /// It does not exist, or cannot be read and written.
    fn open(&self, name: &str) -> io::Result<Box<dyn JournalFile>>;

    /// Makes an empty file.
    ///
    /// # Errors
    /// It exists, or cannot be made.
    fn create(&self, name: &str) -> io::Result<Box<dyn JournalFile>>;

    /// Gives a file another name, which no file has.
    ///
    /// # Errors
    /// It was not renamed.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// It was not removed.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes all that was made, renamed and removed durable.
    ///
    /// # Errors
    /// It may not be durable, and another try would not tell: the caller must give up.
    fn sync_dir(&self) -> io::Result<()>;
}

/// An open file.
pub trait JournalFile: fmt::Debug + Send {
    /// Its length in bytes.
    ///
    /// # Errors
    /// It cannot be told.
    fn length(&self) -> io::Result<u64>;

    /// Reads what fits `buffer` from `offset` on; may be short, is 0 at the end of the file.
    ///
    /// # Errors
    /// It cannot be read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes at `offset`, growing the file where needed; may be short.
    ///
    /// # Errors
    /// Nothing is known to be written.
    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<usize>;

    /// Makes all that was written durable (fdatasync).
    ///
    /// # Errors
    /// Any of it may not be durable, and another try would not tell: the caller must give up on the file.
    fn sync(&mut self) -> io::Result<()>;
}

impl dyn JournalFile {
    /// Writes all of `data` at `offset`.
    pub(super) fn write_all_at(&mut self, mut data: &[u8], mut offset: u64) -> io::Result<()> {
        while !data.is_empty() {
            match self.write_at(data, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    data = &data[written..];
                    offset += written as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Fills `buffer` from `offset` on.
    pub(super) fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read_at(buffer, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    buffer = &mut buffer[read..];
                    offset += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The file that is locked while a process has the directory.
const LOCK: &str = "lock";

/// A directory on disk.
#[derive(Debug)]
pub struct DiskFs {
    path: PathBuf,
    /// Whether files are opened to be written, too.
    writes: bool,
}

impl DiskFs {
    /// The directory at `path`, which is made if there is none.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(path: &Path) -> io::Result<DiskFs> {
        fs::create_dir_all(path)?;
        // Whoever made the directories above may not have synced them, and whatever is synced in one is lost with it.
        for (above, parent) in path.ancestors().skip(1).enumerate() {
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            let synced = File::open(parent).and_then(|parent| parent.sync_all());
            // Of those further up some may not be ours to read, and were there before.
            if above == 0 {
                synced?;
            }
        }
        DiskFs::existing(path)
    }

    /// The directory at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn existing(path: &Path) -> io::Result<DiskFs> {
        if !fs::metadata(path)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(DiskFs {
            path: path.to_owned(),
            writes: true,
        })
    }

    /// The same to look into, where nothing may be writable.
    ///
    /// # Errors
    /// There is none.
    pub fn to_read(path: &Path) -> io::Result<DiskFs> {
        DiskFs::existing(path).map(|fs| DiskFs { writes: false, ..fs })
    }
}

impl JournalFs for DiskFs {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn lock(&self) -> io::Result<Option<Box<dyn Send>>> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path.join(LOCK))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        // A name that is not UTF-8 is none of ours.
        names.filter_map(Result::transpose).collect()
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn JournalFile>> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(self.writes).open(self.path.join(name))?;
        Ok(Box::new(DiskFile(file)))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn JournalFile>> {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create_new(true)
            // What callers store lies in it: no other user may read it, whoever made the directory.
            .mode(0o600)
            .open(self.path.join(name))?;
        Ok(Box::new(DiskFile(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

/// A file on disk.
#[derive(Debug)]
struct DiskFile(File);

impl JournalFile for DiskFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(data, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn no_other_user_can_read_a_file_whoever_made_the_directory() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
        let journal = DiskFs::create(directory.path()).expect("it is there");
        journal.create("segment").expect("it can be made");
        let made = fs::metadata(directory.path().join("segment")).expect("it was made");
        assert_eq!(made.permissions().mode() & 0o777, 0o600);
    }
}
