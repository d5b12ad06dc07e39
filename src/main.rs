//! The `tidegate` command: arguments, configuration, log, start, wait, exit code.

use std::{
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, anyhow};
use clap::{CommandFactory, Parser, Subcommand};
#[cfg(feature = "client")]
use tidegate::commands;
use tidegate::{
    commands::admin,
    config::{Config, Flags},
    operations,
    queue::journal::{JournalError, fs::DiskFs, inspect},
    shutdown::StopSignals,
    start::{Ending, Running, StartError},
    telemetry::log::Log,
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The arguments or the configuration are wrong (EX_USAGE).
const EXIT_USAGE: u8 = 64;
/// The journal's directory holds what cannot be trusted (EX_DATAERR).
const EXIT_DATA: u8 = 65;
/// Something that the gateway needs is not there (EX_UNAVAILABLE).
const EXIT_UNAVAILABLE: u8 = 69;
/// A task of the gateway died (EX_SOFTWARE).
const EXIT_SOFTWARE: u8 = 70;
/// Stopped with accepted writes that are not in the store, or calls unanswered (EX_TEMPFAIL).
const EXIT_LEFT_BEHIND: u8 = 75;
/// Stopped at once, by a second signal.
const EXIT_AT_ONCE: u8 = 130;

/// A write-behind caching persistence gateway over gRPC.
#[derive(Parser)]
#[command(version, about, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Subcommand)]
enum Command {
    /// Serve (what happens without a command, too)
    Serve(Serving),
    /// Print the effective configuration, secrets masked
    Config(Flags),
    /// Exit 0 if the gateway with this configuration is ready
    Health(Flags),
    /// Look into a gateway that runs, and steer it
    Admin(Box<admin::Arguments>),
    /// Look into the journal of this configuration, or mend it
    #[command(subcommand)]
    Journal(JournalCommand),
    /// Print what makes a shell complete these commands, to be put where that shell looks for it
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    #[cfg(feature = "client")]
    #[command(flatten)]
    Records(commands::Command),
}

#[derive(Subcommand)]
enum JournalCommand {
    /// Say what lies in it; exit as a start would, 65 if it would refuse that
    Inspect(Flags),
    /// Make one that a start refuses fit again: keep what can be read, set the old files aside; no gateway may run on it
    Repair(Flags),
}

/// The arguments of `serve`.
#[derive(clap::Args)]
struct Serving {
    #[command(flatten)]
    flags: Flags,
    /// A bug to serve with, by its name
    #[cfg(feature = "planted-faults")]
    #[arg(long, value_name = "NAME", hide = true)]
    planted_fault: Option<String>,
    /// Where to be killed: a point by its name, and at which time of reaching it
    #[cfg(feature = "planted-faults")]
    #[arg(long, value_name = "NAME[:N]", hide = true)]
    kill_point: Option<String>,
    /// How far the machine's clock is taken to be ahead, or (negative) behind, in milliseconds
    #[cfg(feature = "planted-faults")]
    #[arg(
        long,
        value_name = "MS",
        hide = true,
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    planted_clock_offset: i64,
}

impl Serving {
    /// Chooses what is planted, before anything runs.
    #[cfg(feature = "planted-faults")]
    fn plant(&self) -> Result<(), String> {
        tidegate::planted::set_clock_offset(self.planted_clock_offset);
        if let Some(fault) = &self.planted_fault {
            tidegate::planted::choose(fault)?;
        }
        self.kill_point
            .as_deref()
            .map_or(Ok(()), tidegate::planted::choose_kill_point)
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are no errors, and go to standard output. A closed one is nothing to act on.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(EXIT_USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    #[cfg(feature = "planted-faults")]
    if let Some(Command::Serve(serving)) = &arguments.command
        && let Err(error) = serving.plant()
    {
        say(&mut io::stderr(), &format!("tidegate: {error}"));
        return ExitCode::from(EXIT_USAGE);
    }
    let done = match arguments.command {
        None => configured(&arguments.flags, serve),
        Some(Command::Serve(serving)) => configured(&serving.flags, serve),
        Some(Command::Config(flags)) => configured(&flags, print),
        Some(Command::Health(flags)) => configured(&flags, health),
        Some(Command::Admin(arguments)) => Ok(admin::run(&arguments).into()),
        Some(Command::Journal(JournalCommand::Inspect(flags))) => configured(&flags, inspect),
        Some(Command::Journal(JournalCommand::Repair(flags))) => configured(&flags, repair),
        Some(Command::Completions { shell }) => Ok(complete(shell)),
        #[cfg(feature = "client")]
        Some(Command::Records(command)) => Ok(commands::run(&command).into()),
    };
    done.unwrap_or_else(|error| {
        say(&mut io::stderr(), &format!("tidegate: {error:#}"));
        ExitCode::from(code(&error))
    })
}

/// The exit code of what ended the process.
fn code(error: &anyhow::Error) -> u8 {
    let started = error.downcast_ref::<StartError>().map(|error| match error {
        StartError::Journal(error) => Some(error),
        _ => None,
    });
    let journal = started.unwrap_or_else(|| error.downcast_ref::<JournalError>());
    journal.map_or(EXIT_UNAVAILABLE, journal_code)
}

fn journal_code(error: &JournalError) -> u8 {
    if error.is_of_content() {
        EXIT_DATA
    } else {
        EXIT_UNAVAILABLE
    }
}

fn configured(flags: &Flags, run: impl FnOnce(&Config) -> anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    match Config::load(flags) {
        Ok(config) => run(&config),
        Err(error) => {
            say(&mut io::stderr(), &format!("tidegate: {error}"));
            Ok(ExitCode::from(EXIT_USAGE))
        }
    }
}

fn print(config: &Config) -> anyhow::Result<ExitCode> {
    let text = toml::to_string(config).context("the configuration cannot be shown")?;
    say(&mut io::stdout(), text.trim_end());
    Ok(ExitCode::SUCCESS)
}

fn health(config: &Config) -> anyhow::Result<ExitCode> {
    let address = config.operations.listen;
    let ready = operations::probe(address).with_context(|| format!("no answer from {address}"))?;
    if ready {
        Ok(ExitCode::SUCCESS)
    } else {
        Err(anyhow!("the gateway at {address} is not ready"))
    }
}

/// Prints the completions of a shell. A reader that is gone is nothing to act on.
fn complete(shell: clap_complete::Shell) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "tidegate", &mut text);
    let _ = io::stdout().write_all(&text);
    ExitCode::SUCCESS
}

fn inspect(config: &Config) -> anyhow::Result<ExitCode> {
    let path = config.journal_dir();
    let fs = DiskFs::to_read(&path).map_err(|why| JournalError::Unusable {
        path: path.display().to_string(),
        why,
    })?;
    let inspection = inspect::inspect(&fs)?;
    say(&mut io::stdout(), &inspection.to_string());
    Ok(match &inspection.refusal {
        None => ExitCode::SUCCESS,
        Some(refusal) => ExitCode::from(journal_code(refusal)),
    })
}

fn repair(config: &Config) -> anyhow::Result<ExitCode> {
    let path = config.journal_dir();
    let fs = DiskFs::existing(&path).map_err(|why| JournalError::Unusable {
        path: path.display().to_string(),
        why,
    })?;
    let repair = inspect::repair(Arc::new(fs), &config.journal)?;
    say(&mut io::stdout(), &repair.to_string());
    Ok(ExitCode::SUCCESS)
}

fn serve(config: &Config) -> anyhow::Result<ExitCode> {
    let log = match Log::start(&config.log) {
        Ok(log) => log,
        Err(error) => {
            say(&mut io::stderr(), &format!("tidegate: log: {error}"));
            return Ok(ExitCode::from(EXIT_USAGE));
        }
    };
    // Redis and PostgreSQL over TLS take the process's provider. An error says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let background = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("background")
        .enable_all()
        .build()
        .context("cannot start the background runtime")?;
    let code = background.block_on(run(config, log));
    // A task that hangs must not keep a process that has said how it ended.
    background.shutdown_background();
    code
}

async fn run(config: &Config, log: Log) -> anyhow::Result<ExitCode> {
    let mut signals = StopSignals::listen().context("cannot listen for signals")?;
    let mut running = tokio::select! {
        started = Running::start(config, log) => started?,
        () = signals.next() => {
            return Ok(stopped_early(config));
        }
    };
    let died = tokio::select! {
        () = signals.next() => false,
        () = running.background.died() => true,
    };
    tokio::select! {
        ending = running.stop(&config.shutdown) => Ok(ExitCode::from(match ending {
            _ if died => EXIT_SOFTWARE,
            Ending::Clean => 0,
            Ending::LeftBehind => EXIT_LEFT_BEHIND,
        })),
        () = signals.next() => {
            tracing::error!("stopped at once by a second signal, with whatever was under way or rested on memory alone");
            Ok(ExitCode::from(EXIT_AT_ONCE))
        }
    }
}

/// How a start ended that was told to stop.
fn stopped_early(config: &Config) -> ExitCode {
    let journal = DiskFs::to_read(&config.journal_dir()).and_then(|fs| inspect::inspect(&fs).map_err(io::Error::other));
    let nothing_left = match &journal {
        Ok(inspection) => inspection.refusal.is_none() && inspection.live_writes == 0,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    if nothing_left {
        tracing::info!("stopped before it served");
        return ExitCode::SUCCESS;
    }
    // Not known where it cannot be read.
    let writes = journal.ok().map(|inspection| inspection.live_writes);
    tracing::error!(
        writes,
        "stopped before it served; what is in the journal comes back with the next start"
    );
    ExitCode::from(EXIT_LEFT_BEHIND)
}

fn say(out: &mut impl Write, line: &str) {
    // Nobody is left to tell when standard output or error is closed.
    let _ = writeln!(out, "{line}");
}
