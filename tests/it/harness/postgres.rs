//! PostgreSQL for the tests: one server shared by all, a fresh database for each; and servers of a test's own, to stop and start.
//!
//! Owns finding the binaries, the cluster (made once, copied for each further server) and the drop to an unprivileged user where the tests
//! run as root. Invariants: commits are synchronous as in production; `fsync` is off, for no test here cuts the power, unless a server is
//! asked for that is as durable as in production, as benchmarks do.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::sync::OnceCell;

use super::{
    SOON, eventually,
    process::{Directory, Process, are_root, free_port, scratch_path},
};

/// The superuser of every cluster here, without a password: the servers listen on loopback only.
const SUPERUSER: &str = "tidegate";

/// Whom PostgreSQL runs as when we are root.
const UNPRIVILEGED: &str = "postgres";

/// What every server here is run with.
const SETTINGS: &[&str] = &[
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "synchronous_commit=on",
    "max_connections=300",
    "log_min_messages=warning",
];

/// Whether what a server has committed outlives a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durability {
    /// Only the end of the server: nothing waits for the disk.
    Process,
    /// As in production.
    Disk,
}

impl Durability {
    fn settings(self) -> &'static [&'static str] {
        match self {
            Durability::Process => &["fsync=off", "full_page_writes=off", "shared_buffers=64MB"],
            Durability::Disk => &["fsync=on", "full_page_writes=on", "shared_buffers=256MB"],
        }
    }
}

/// The URL of a fresh, empty database on the shared server.
pub async fn database() -> String {
    static SHARED: OnceCell<Server> = OnceCell::const_new();
    let server = SHARED.get_or_init(Server::start).await;
    server.create_database().await
}

/// The same, owned by a role of its own that is no superuser; with the URL of the superuser in it.
pub async fn database_of_plain_role() -> (String, String) {
    let superuser = database().await;
    let name = superuser
        .rsplit('/')
        .next()
        .expect("the URL ends with the name")
        .to_owned();
    let mut connection = connect(&superuser).await;
    for statement in [
        format!("create role {name} login"),
        format!("alter database {name} owner to {name}"),
        format!("alter schema public owner to {name}"),
    ] {
        connection
            .execute(AssertSqlSafe(statement))
            .await
            .expect("a superuser may");
    }
    (
        superuser.replace(&format!("{SUPERUSER}@"), &format!("{name}@")),
        superuser,
    )
}

/// A connection for looking and meddling.
pub async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.expect("the database can be reached")
}

/// How to stop a server.
#[derive(Debug, Clone, Copy)]
pub enum Stop {
    /// Ends sessions and shuts down in order.
    Fast,
    /// Aborts: the next start recovers.
    Immediate,
}

/// A server of one's own. Dropping it stops it and removes its files.
pub struct Server {
    process: Option<Process>,
    port: u16,
    directory: Directory,
    durability: Durability,
}

impl Server {
    /// Starts a server with an empty cluster.
    pub async fn start() -> Server {
        let directory = Directory::adopt(copy_of_cluster().await);
        Server::start_in(directory, Durability::Process).await
    }

    /// Starts a server with an empty cluster, whose commits are on the disk when they are answered.
    pub async fn start_durable() -> Server {
        let directory = Directory::adopt(copy_of_cluster().await);
        // Else the first commits would share the disk with what the copy has left to write.
        let mut sync = unprivileged(&binary("initdb"));
        checked(sync.arg("--sync-only").arg("-D").arg(directory.path()));
        Server::start_in(directory, Durability::Disk).await
    }

    async fn start_in(directory: Directory, durability: Durability) -> Server {
        for _ in 0..20 {
            let port = free_port();
            if let Some(process) = run(&directory, port, durability).await {
                return Server {
                    process: Some(process),
                    port,
                    directory,
                    durability,
                };
            }
        }
        panic!("PostgreSQL finds no free port; its log:\n{}", log(&directory));
    }

    /// The URL of a fresh, empty database.
    pub async fn create_database(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut connection = connect(&self.url("postgres")).await;
        connection
            .execute(AssertSqlSafe(format!("create database {name}")))
            .await
            .expect("a superuser may create a database");
        self.url(&name)
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://{SUPERUSER}@127.0.0.1:{}/{database}", self.port)
    }

    /// Stops the server and waits for its end. Its files and its port stay.
    pub async fn stop(&mut self, how: Stop) {
        let mut process = self.process.take().expect("the server runs");
        process.signal(match how {
            Stop::Fast => "INT",
            Stop::Immediate => "QUIT",
        });
        process.wait(SOON).await;
    }

    /// Starts the stopped server on its files and its port, and waits until it answers.
    pub async fn start_again(&mut self) {
        assert!(self.process.is_none(), "the server runs already");
        self.process = run(&self.directory, self.port, self.durability).await;
        assert!(
            self.process.is_some(),
            "PostgreSQL does not start again; its log:\n{}",
            log(&self.directory)
        );
    }
}

/// Runs a server and waits until it answers. `None` if it ends first, as when the port is taken, or if another one answers.
async fn run(directory: &Directory, port: u16, durability: Durability) -> Option<Process> {
    let mut command = unprivileged(&binary("postgres"));
    command.arg("-D").arg(directory.path()).arg("-p").arg(port.to_string());
    for setting in SETTINGS.iter().chain(durability.settings()) {
        command.args(["-c", setting]);
    }
    let mut process = Process::start("PostgreSQL", &command, "QUIT", directory.path(), "postgres");
    let url = format!("postgres://{SUPERUSER}@127.0.0.1:{port}/postgres");
    let ours = eventually("PostgreSQL answers", SOON, async || {
        if process.ended().is_some() {
            return Ok(false);
        }
        let mut connection = PgConnection::connect(&url).await.map_err(|error| error.to_string())?;
        let files: String = sqlx::query_scalar("show data_directory")
            .fetch_one(&mut connection)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Path::new(&files) == directory.path())
    })
    .await;
    ours.then_some(process)
}

fn log(directory: &Directory) -> String {
    fs::read_to_string(directory.path().join("postgres.err")).unwrap_or_default()
}

/// The files of an empty cluster, copied from one that is made once.
async fn copy_of_cluster() -> PathBuf {
    static CLUSTER: OnceCell<PathBuf> = OnceCell::const_new();
    let cluster = CLUSTER
        .get_or_init(async || {
            let path = scratch_path("cluster");
            fs::create_dir(&path).expect("the directory of the tests is ours");
            if are_root() {
                checked(Command::new("chown").arg(UNPRIVILEGED).arg(&path));
            }
            let mut initdb = unprivileged(&binary("initdb"));
            initdb.arg("-D").arg(&path).args(["-U", SUPERUSER]);
            checked(initdb.args(["-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]));
            path
        })
        .await;
    let copy = scratch_path("postgres");
    checked(Command::new("cp").arg("-a").arg(cluster).arg(&copy));
    copy
}

fn checked(command: &mut Command) -> Output {
    let output = command
        .current_dir("/")
        .output()
        .unwrap_or_else(|error| panic!("{command:?} cannot be run: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A command as a user whom PostgreSQL serves.
fn unprivileged(program: &Path) -> Command {
    if !are_root() {
        return Command::new(program);
    }
    // setpriv becomes the program; runuser and su stay beside it and would get the signals.
    let mut command = Command::new("setpriv");
    command
        .arg(format!("--reuid={UNPRIVILEGED}"))
        .arg(format!("--regid={UNPRIVILEGED}"))
        .arg("--clear-groups")
        .arg(program);
    command
}

/// A program of PostgreSQL: on the path, or where Debian keeps its versions, the newest first.
pub fn binary(name: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .collect();
    versions.sort_by_key(|bin| {
        let version = bin.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        std::cmp::Reverse(version.and_then(|version| version.parse::<u32>().ok()))
    });
    env::split_paths(&path)
        .chain(versions)
        .map(|directory| directory.join(name))
        .find(|program| program.is_file())
        .unwrap_or_else(|| panic!("{name} is neither on the PATH nor below /usr/lib/postgresql: run ci/deps"))
}
