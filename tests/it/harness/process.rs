//! Processes that cannot outlive the tests, temporary directories that go with them, and free ports.
//!
//! Each process runs below a small shell, its keeper, whose standard input is a pipe from here. A line on the pipe is a signal to pass on;
//! the end of the pipe, which comes however this process ends, means: stop it. (PR_SET_PDEATHSIG would not do: it follows a thread,
//! and is cleared by the change of user that PostgreSQL needs.) One more keeper removes the directory of all of them.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use super::eventually;

/// The keeper of a process. Arguments: the signal that stops it at once, the files of its output and its errors, its command line.
/// Writes the process id; ends with the status of the process. Gives it 10 s to stop: PostgreSQL gives its own children 5 s, and frees its shared memory
/// after that.
const KEEPER: &str = r#"
halt=$1 out=$2 err=$3; shift 3
exec 3<&0 </dev/null
"$@" >>"$out" 2>>"$err" 3<&- &
process=$!
{
    while read -r signal <&3; do kill -s "$signal" "$process"; done
    tries=100
    # Again and again: before a program has set up its handler, the signal is lost.
    while [ $tries -gt 0 ] && kill -s "$halt" "$process"; do tries=$((tries - 1)); sleep 0.1; done
    kill -s KILL "$process"
} >/dev/null 2>&1 &
watcher=$!
echo "$process"
exec >&- 3<&-
wait "$process"
status=$?
kill "$watcher" 2>/dev/null
exit $status
"#;

/// The keeper of the directory: the processes in it may need a moment to stop writing.
const DIRECTORY_KEEPER: &str = r#"
trap '' INT TERM HUP
while read -r _; do :; done
tries=200
while [ $tries -gt 0 ] && ! rm -rf "$1" 2>/dev/null; do tries=$((tries - 1)); sleep 0.1; done
"#;

/// The directory of this test process.
struct Root {
    path: PathBuf,
    /// Ends after this process: its input is what tells it.
    _keeper: Child,
}

static ROOT: LazyLock<Root> = LazyLock::new(|| {
    let path = tempfile::Builder::new()
        .prefix("tidegate-it-")
        .tempdir()
        .expect("a temporary directory can be made")
        .keep();
    // PostgreSQL, as another user, must be able to reach its own directory below.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).expect("the directory is ours");
    let keeper = shell(DIRECTORY_KEEPER)
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sh can be started");
    Root { path, _keeper: keeper }
});

pub fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    // A group of its own: Ctrl-C at a terminal must reach the tests, not the keepers.
    command.args(["-c", script, "keeper"]).process_group(0);
    command
}

/// A new name below the directory of this test process.
pub fn scratch_path(name: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    ROOT.path
        .join(format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// A temporary directory, removed when dropped.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new(name: &str) -> Directory {
        let path = scratch_path(name);
        fs::create_dir(&path).expect("the directory of the tests is ours");
        Directory(path)
    }

    /// Takes over a directory that somebody else made.
    pub fn adopt(path: PathBuf) -> Directory {
        Directory(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left goes with the root.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether we run as root, whom PostgreSQL refuses to serve.
pub fn are_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// A port of 127.0.0.1 that nobody listens on, and that no outgoing connection is given while its server is stopped: they come from
/// higher up. Somebody may still be faster: whoever starts a server there checks that it is theirs.
pub fn free_port() -> u16 {
    loop {
        let port = rand::random_range(10_000..32_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A process that ends with this one. Dropping it stops it at once.
pub struct Process {
    what: String,
    pid: u32,
    keeper: Child,
    stderr: PathBuf,
}

impl Process {
    /// Starts `command`, of which the program, the arguments and the environment count. `halt` is the signal that stops it at once; its
    /// output is appended to `NAME.out` and `NAME.err` in `directory`.
    pub fn start(what: &str, command: &Command, halt: &str, directory: &Path, name: &str) -> Process {
        let stderr = directory.join(format!("{name}.err"));
        let mut keeper = shell(KEEPER);
        // Whatever the environment of the tests sets must not reach the servers.
        keeper
            .env_clear()
            .envs(env::var_os("PATH").map(|path| ("PATH", path)))
            .arg(halt)
            .arg(directory.join(format!("{name}.out")))
            .arg(&stderr)
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        for (variable, value) in command.get_envs() {
            keeper.envs(value.map(|value| (variable, value)));
        }
        if let Some(directory) = command.get_current_dir() {
            keeper.current_dir(directory);
        }
        let mut keeper = keeper.spawn().expect("sh can be started");
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().expect("its output is a pipe"))
            .read_line(&mut line)
            .expect("the keeper says the process id");
        Process {
            what: what.to_owned(),
            pid: line.trim().parse().expect("a process id is a number"),
            keeper,
            stderr,
        }
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What the process wrote to its standard error so far.
    pub fn stderr(&self) -> String {
        let bytes = fs::read(&self.stderr).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sends a signal by its name without SIG. Nothing happens if the process has ended.
    pub fn signal(&self, name: &str) {
        if let Some(mut pipe) = self.keeper.stdin.as_ref() {
            let _ = writeln!(pipe, "{name}");
        }
    }

    /// How it ended, if it has: the exit status, or 128 and the number of the signal.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.keeper.try_wait().expect("the keeper is our child")
    }

    /// Waits for its end.
    pub async fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("{} ends", self.what);
        eventually(&what, deadline, async || {
            self.ended()
                .ok_or_else(|| format!("it runs; it said:\n{}", self.stderr()))
        })
        .await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // Bounded: the keeper kills what does not stop.
        let _ = self.keeper.wait();
    }
}
