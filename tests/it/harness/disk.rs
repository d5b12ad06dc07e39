//! Disks that fail: one that is small, one that cannot be written, one whose syncs fail or take long.
//!
//! Owns the mounts and the tracers that make them so, and their end, which comes however the test ends. They need the rights of root, or
//! `sudo` without a password. Owns no expectation.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::{
    SOON, eventually,
    process::{Directory, Process, are_root, shell},
};

/// The keeper of a mount. Arguments: the directory, the options, then what goes before a command that needs root. Says when it is mounted;
/// unmounts when its input ends. Lazily: a process in it may need a moment to end.
const MOUNT_KEEPER: &str = r#"
trap '' INT TERM HUP
directory=$1 options=$2; shift 2
"$@" mount -t tmpfs -o "$options" tidegate "$directory" || exit 1
echo mounted
while read -r _; do :; done
"$@" umount -l "$directory"
"#;

/// What goes before a command that needs the rights of root.
fn as_root() -> &'static [&'static str] {
    if are_root() { &[] } else { &["sudo", "-n"] }
}

/// A disk of its own at a directory. Dropping it unmounts it, and what it holds is gone.
pub struct Disk {
    path: PathBuf,
    keeper: Child,
}

impl Disk {
    /// Mounts an empty disk of so many bytes at an empty directory.
    pub fn mount(path: &Path, bytes: u64) -> Disk {
        let mut keeper = shell(MOUNT_KEEPER)
            .arg(path)
            .arg(format!("size={bytes},mode=0777"))
            .args(as_root())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh can be started");
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().expect("its output is a pipe"))
            .read_line(&mut line)
            .expect("the keeper says how it went");
        assert_eq!(line, "mounted\n", "a tmpfs can be mounted: be root, or allow sudo");
        Disk {
            path: path.to_owned(),
            keeper,
        }
    }

    /// Makes it one that cannot be written.
    pub fn make_read_only(&self) {
        let mut words = as_root().to_vec();
        words.extend(["mount", "-o", "remount,ro"]);
        let mounted = Command::new(words[0])
            .args(&words[1..])
            .arg(&self.path)
            .status()
            .expect("mount can be run");
        assert!(mounted.success(), "{mounted}");
    }

    /// Takes so many bytes of it, until [`Disk::give_back`].
    pub fn take(&self, bytes: usize) {
        fs::write(self.path.join("ballast"), vec![1; bytes]).expect("there is room for the ballast");
    }

    pub fn give_back(&self) {
        fs::remove_file(self.path.join("ballast")).expect("the ballast is there");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// The syncs of a process, tampered with until this is dropped.
pub struct Syncs {
    _tracer: Process,
    directory: Directory,
}

impl Syncs {
    /// Makes every fdatasync of a process fail from now on, as on a disk that has lost what was written.
    pub async fn fail(pid: u32) -> Syncs {
        Syncs::inject(pid, "error=EIO").await
    }

    /// Makes every fdatasync of a process take at least so long from now on, before it does anything.
    pub async fn delay(pid: u32, delay: std::time::Duration) -> Syncs {
        Syncs::inject(pid, &format!("delay_enter={}", delay.as_micros())).await
    }

    async fn inject(pid: u32, how: &str) -> Syncs {
        let directory = Directory::new("strace");
        let words = [as_root(), &["strace", "-f", "-p"]].concat();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .arg(pid.to_string())
            .args(["-e", "trace=fdatasync", "-e", &format!("inject=fdatasync:{how}"), "-o"])
            .arg(directory.path().join("calls"));
        let mut tracer = Process::start("strace", &command, "TERM", directory.path(), "strace");
        eventually("strace is attached", SOON, async || {
            let said = tracer.stderr();
            assert!(tracer.ended().is_none(), "strace ended; it said:\n{said}");
            if said.contains("attached") { Ok(()) } else { Err(said) }
        })
        .await;
        Syncs {
            _tracer: tracer,
            directory,
        }
    }

    /// How many syncs have been tampered with.
    pub fn count(&self) -> usize {
        let calls = fs::read_to_string(self.directory.path().join("calls")).unwrap_or_default();
        // One that another thread's call interrupts in the log has a second line.
        calls.lines().filter(|line| line.contains("fdatasync(")).count()
    }
}
