//! The peers: other servers that take single reads and writes, each as its own users run and measure it.
//!
//! Owns starting or filling them, their own load programs where they bring one, and the check that those programs told the truth. Does not
//! own turns (`race`), nor what a figure is compared with. Invariant: a figure is only given where the server's own counters agree with it.

pub mod etcd;
pub mod postgres;
pub mod redis;

use std::{env, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

use crate::Failure;

/// What a load program may take beyond its measurement: connecting, ending, a busy machine.
const SLACK: Duration = Duration::from_secs(60);

/// Runs a load program that measures for about so long, and gives its standard output. Ends it with the wait for it.
async fn output(command: &mut Command, how_long: Duration) -> Result<String, Failure> {
    command
        // What the environment sets, as PGOPTIONS, must not reach the program.
        .env_clear()
        .envs(env::var_os("PATH").map(|path| ("PATH", path)))
        .current_dir("/")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let what = command.as_std().get_program().to_string_lossy().into_owned();
    let ended = timeout(how_long + SLACK, command.output())
        .await
        .map_err(|_| format!("{what} does not end"))?
        .map_err(|error| format!("{what} cannot be run: {error}"))?;
    let [said, complained] = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    if !ended.status.success() {
        return Err(format!("{what} ended with {}: {complained}{said}", ended.status).into());
    }
    Ok(said)
}
