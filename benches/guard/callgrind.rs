//! The gateway under callgrind, and the instructions that it counted.
//!
//! Owns starting it, asking it for counts while it runs (through valgrind's own `vgdb`), and which thread is which: callgrind numbers
//! them, the kernel knows their names.

use std::{
    collections::BTreeMap,
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use tokio::time::{sleep, timeout};

use crate::{
    Failure,
    harness::{
        SOON, eventually,
        gateway::line,
        process::{Directory, Process},
    },
};

/// What a dump's file is named, before the number of the dump and that of the thread.
const DUMP: &str = "callgrind.out";

/// `vgdb` may wake a process that sleeps in the kernel, and miss that it did. What is asked for here may be asked for twice.
const TRIES: usize = 4;
const TRY_WAIT: Duration = Duration::from_secs(15);
const TRY_PAUSE: Duration = Duration::from_secs(1);

/// valgrind counts each byte that `rep movsb` copies as an instruction, which a processor copies by the dozens: libc is to copy in loops.
const TUNABLES: &str = "glibc.cpu.hwcaps=-ERMS";

/// A gateway whose instructions are counted.
pub struct Counted {
    address: SocketAddr,
    process: Process,
    /// The number of each that has a name of its own: those are there as long as the gateway.
    threads: BTreeMap<String, usize>,
    dumps: PathBuf,
    /// How many of those have been looked at.
    taken: usize,
    /// Goes after the process.
    _directory: Directory,
}

impl Counted {
    /// Starts the binary at `gateway` and waits until it serves. What is written behind in `namespace` stays pending.
    pub async fn start(gateway: &Path, namespace: &str) -> Result<Counted, Failure> {
        let dumps = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guard");
        // There may be none yet.
        let _ = fs::remove_dir_all(&dumps);
        fs::create_dir_all(&dumps)?;
        let directory = Directory::new("guard");
        let path = directory.path();
        let config = format!(
            "[rpc]\nthreads = 1\ndeadline_default = \"60s\"\n\n[operations]\nlisten = \"127.0.0.1:0\"\n\n[admin]\nlisten = \"127.0.0.1:0\"\n\n\
             [namespaces.{namespace}]\nwrite_delay = \"1day\"\n"
        );
        fs::write(path.join("tidegate.toml"), config)?;
        let mut command = Command::new("valgrind");
        command
            .args(["--tool=callgrind", "--separate-threads=yes"])
            .arg(format!("--callgrind-out-file={}", dumps.join(DUMP).display()))
            .arg(gateway)
            .args(["serve", "--config", "tidegate.toml"])
            .args(["--listen", "127.0.0.1:0", "--data-dir", "data"])
            .env("GLIBC_TUNABLES", TUNABLES)
            .current_dir(path);
        let process = Process::start("the gateway", &command, "KILL", path, "gateway");
        let serving = eventually("the gateway serves", 4 * SOON, async || {
            let log = process.stderr();
            line(&log, "serving").ok_or(log)
        })
        .await;
        let address = serving["listen"].as_str().unwrap_or_default().parse()?;
        let mut counted = Counted {
            address,
            process,
            threads: BTreeMap::new(),
            dumps,
            taken: 0,
            _directory: directory,
        };
        let threads = counted.tell("v.info scheduler").await?;
        counted.threads = threads.lines().filter_map(|line| counted.thread(line)).collect();
        Ok(counted)
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the dumps are left, for `callgrind_annotate`.
    pub fn dumps(&self) -> &Path {
        &self.dumps
    }

    /// Counts from zero.
    pub async fn forget(&self) -> Result<(), Failure> {
        self.tell("zero").await?;
        Ok(())
    }

    /// How many instructions the threads of these names executed since the counts were forgotten. Counts from zero again.
    pub async fn instructions(&mut self, names: &[&str]) -> Result<u64, Failure> {
        self.tell("dump").await?;
        let mut numbers = Vec::new();
        for &name in names {
            let number = self.threads.get(name);
            numbers.push(*number.ok_or_else(|| format!("no thread is named {name}"))?);
        }
        let mut sum = 0;
        // More than one where it had to be asked for again: the counts of one begin where those of the last end.
        while self.dump(self.taken + 1, 1).exists() {
            self.taken += 1;
            for &number in &numbers {
                sum += total(&self.dump(self.taken, number))?;
            }
        }
        Ok(sum)
    }

    /// The file of a dump, and of a thread in it. The first thread is in each.
    fn dump(&self, dump: usize, thread: usize) -> PathBuf {
        self.dumps.join(format!("{DUMP}.{dump}-{thread:02}"))
    }

    /// Name and number of the thread that a line such as `Thread 8: status = VgTs_WaitSys syscall 232 (lwpid 1702)` is about.
    fn thread(&self, line: &str) -> Option<(String, usize)> {
        let (number, status) = line.strip_prefix("Thread ")?.split_once(": status = ")?;
        let lwpid = status.split_once("(lwpid ")?.1.strip_suffix(')')?;
        // One that has ended has none.
        let name = fs::read_to_string(format!("/proc/{}/task/{lwpid}/comm", self.process.pid())).ok()?;
        Some((name.trim_end().to_owned(), number.parse().ok()?))
    }

    /// Gives valgrind a command. What it says.
    async fn tell(&self, command: &str) -> Result<String, Failure> {
        let mut complaint = String::new();
        for _ in 0..TRIES {
            let mut vgdb = tokio::process::Command::new("vgdb");
            vgdb.arg(format!("--pid={}", self.process.pid()))
                .args(command.split(' '))
                .kill_on_drop(true);
            let Ok(output) = timeout(TRY_WAIT, vgdb.output()).await else {
                "it does not answer".clone_into(&mut complaint);
                continue;
            };
            let Output { status, stdout, stderr } = output?;
            if status.success() {
                return Ok(String::from_utf8_lossy(&stdout).into_owned());
            }
            complaint = String::from_utf8_lossy(&stderr).into_owned();
            // The one before may not have let go yet.
            sleep(TRY_PAUSE).await;
        }
        Err(format!("vgdb {command}: {complaint}").into())
    }
}

/// What a dump counted in all.
fn total(dump: &Path) -> Result<u64, Failure> {
    let text = fs::read_to_string(dump).map_err(|error| format!("{}: {error}", dump.display()))?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
    Ok(total
        .ok_or_else(|| format!("no totals in {}", dump.display()))?
        .trim()
        .parse()?)
}
