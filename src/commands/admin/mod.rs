//! `tidegate admin`: what operators ask of a gateway that runs, over its operators' port.
//!
//! Owns the arguments that all of these commands have, which gateway is asked, and which exit code a failure has. What each prints is in a
//! file of its own: [`stats`], `settings`, `drain`, `letters`, `caches`. Does not own what is told (`proto/tidegate/v1/admin.proto` says that).
//! Invariants: with `--json` each thing that is told is one line with one JSON object; a reader that has gone ends a command
//! quietly, and is no error of what changes nothing or was done by then; any other failure to write is told, and is no success.

mod caches;
mod drain;
mod letters;
mod settings;
pub mod stats;
mod table;

use std::{
    error::Error as _,
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Subcommand};
use serde_json::Value;

use crate::{
    commands::exit::Exit,
    config::{Config, Flags},
    model::check_namespace,
    rpc::admin::client::{Client, ClientError, Meaning},
};

/// What `--help` of each of these commands ends with: the codes are those of [`Exit`].
const HELP: &str = "\
Exit codes: 0 done, 1 failed, 3 no such namespace or dead letter, 4 not while the drain is paused, 5 some of it failed, 6 it is not known \
whether it was done, 64 wrong arguments or configuration, 69 no gateway answers or it cannot now, 130 interrupted.";

/// How long a call may take when that is not said, in seconds.
const TIMEOUT_DEFAULT: &str = "10";

/// The longest that may be said.
const TIMEOUT_SECONDS_MAX: u64 = 24 * 3600;

/// The arguments of `admin`.
#[derive(Debug, Clone, Args)]
#[command(after_help = HELP, subcommand_required = true, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    whom: Whom,
    #[command(subcommand)]
    command: Command,
}

/// Who is asked, and how the answer is shown.
#[derive(Debug, Clone, Args)]
struct Whom {
    /// The configuration file of the gateway, in TOML [env: TIDEGATE_CONFIG]
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// The gateway's operators' port, in place of the configuration's `admin.listen`
    #[arg(long, value_name = "ADDRESS", global = true)]
    address: Option<SocketAddr>,
    /// As JSON, one line for each thing that is told
    #[arg(long, global = true)]
    json: bool,
    /// How long the gateway may take to answer; what tells its progress takes as long as it takes
    #[arg(long, value_name = "SECONDS", global = true, default_value = TIMEOUT_DEFAULT,
        value_parser = clap::value_parser!(u64).range(1..=TIMEOUT_SECONDS_MAX))]
    timeout: u64,
}

#[derive(Debug, Clone, Subcommand)]
enum Command {
    /// Show what the gateway has counted of each namespace, once or again and again
    #[command(after_help = HELP)]
    Stats(stats::Options),
    /// Show the settings of namespaces, and where each comes from
    #[command(after_help = HELP)]
    Namespaces(settings::Namespaces),
    /// Show what is accepted and not yet in the store, and what the drain is doing about it
    #[command(after_help = HELP)]
    Queue(drain::Queue),
    /// Look at the writes that the store refused for good, and deal with them
    #[command(subcommand)]
    DeadLetters(letters::Command),
    /// Load records into the caches
    #[command(after_help = HELP)]
    Warm(caches::Warm),
    /// Drop cached copies, here and at every gateway that shares them
    #[command(after_help = HELP)]
    Invalidate(caches::Invalidate),
    /// Drain what is pending now, and wait until the store has it
    #[command(after_help = HELP)]
    Flush(drain::Flush),
    /// Stop the drain of a namespace until it is resumed, or the gateway stops
    #[command(after_help = HELP)]
    Pause(drain::Pause),
    /// Let the drain of a namespace go on
    #[command(after_help = HELP)]
    Resume(drain::Resume),
    /// Show what the gateway logs, or change it while it runs
    #[command(after_help = HELP)]
    LogLevel(settings::LogLevel),
}

/// Why a command ends before its end.
enum Ended {
    /// The gateway did not do it.
    Failed(ClientError),
    /// Nobody reads what it prints any more.
    Unread,
    /// What it prints cannot be written.
    Unwritten(io::Error),
}

impl From<ClientError> for Ended {
    fn from(error: ClientError) -> Ended {
        Ended::Failed(error)
    }
}

/// A gateway, and how its answers are shown.
struct Console {
    client: Client,
    json: bool,
}

impl Console {
    /// Prints one thing: as JSON, or as text, which ends with a line feed.
    fn show(&self, json: impl FnOnce() -> Value, text: impl FnOnce() -> String) -> Result<(), Ended> {
        let shown = if self.json { format!("{}\n", json()) } else { text() };
        write_out(&shown)
    }
}

fn write_out(text: &str) -> Result<(), Ended> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Ended::Unread,
            _ => Ended::Unwritten(error),
        })
}

/// Says something to whoever watches. Nobody is left to tell where that is closed.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "tidegate: {text}");
}

fn namespace(text: &str) -> Result<String, &'static str> {
    check_namespace(text).map(|()| text.to_owned())
}

/// Runs a command to its end.
pub fn run(arguments: &Arguments) -> Exit {
    let address = match address(&arguments.whom) {
        Ok(address) => address,
        Err(error) => {
            say(&error);
            return Exit::Usage;
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("cannot start a runtime: {error}"));
            return Exit::Failed;
        }
    };
    match runtime.block_on(ask(address, arguments)) {
        Ok(exit) => exit,
        Err(Ended::Unread) => Exit::Done,
        Err(Ended::Unwritten(error)) => {
            say(&format!("cannot write to standard output: {error}"));
            Exit::Failed
        }
        Err(Ended::Failed(error)) => {
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            say(&format!("{error}{cause}"));
            exit_of(&error)
        }
    }
}

fn address(whom: &Whom) -> Result<SocketAddr, String> {
    if let Some(address) = whom.address {
        return Ok(address);
    }
    let flags = Flags {
        config: whom.config.clone(),
        ..Flags::default()
    };
    let config = Config::load(&flags).map_err(|error| error.to_string())?;
    Ok(config.admin.listen)
}

async fn ask(address: SocketAddr, arguments: &Arguments) -> Result<Exit, Ended> {
    let Whom { json, timeout, .. } = arguments.whom;
    let mut console = Console {
        client: Client::connect(address, Duration::from_secs(timeout)).await?,
        json,
    };
    match &arguments.command {
        Command::Stats(options) => stats::show(&mut console, options).await,
        Command::Namespaces(options) => settings::namespaces(&mut console, options).await,
        Command::Queue(options) => drain::queue(&mut console, options).await,
        Command::DeadLetters(command) => letters::run(&mut console, command).await,
        Command::Warm(options) => caches::warm(&mut console, options).await,
        Command::Invalidate(options) => caches::invalidate(&mut console, options).await,
        Command::Flush(options) => drain::flush(&mut console, options).await,
        Command::Pause(options) => drain::pause(&mut console, options).await,
        Command::Resume(options) => drain::resume(&mut console, options).await,
        Command::LogLevel(options) => settings::log_level(&mut console, options).await,
    }
}

fn exit_of(error: &ClientError) -> Exit {
    match error.meaning() {
        Meaning::Invalid => Exit::Usage,
        Meaning::NotFound => Exit::NotFound,
        Meaning::Precondition => Exit::ConditionFailed,
        Meaning::Unavailable => Exit::Unavailable,
        Meaning::Unknown => Exit::Unknown,
        Meaning::Failed => Exit::Failed,
    }
}
