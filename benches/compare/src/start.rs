//! How long a gateway takes from its exec to serving: embedded, on an empty directory.
//!
//! Owns one such start, as often as it is asked for. Serving means that a health check over gRPC says so. Does not own what the start does.

use std::{
    fs,
    process::{Child, Stdio},
    time::Duration,
};

use serde_json::Value;
use tokio::time::{Instant, sleep};
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    Failure,
    harness::{
        SOON,
        gateway::{command, line},
        process::Directory,
    },
};

/// Between two looks: an error of this much is in the result.
const LOOK: Duration = Duration::from_micros(500);

/// A process that ends with the value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How long one start takes, with the settings of a default configuration but free ports.
pub async fn start_to_serving() -> Result<Duration, Failure> {
    let directory = Directory::new("start");
    let (file, log) = (directory.path().join("tidegate.toml"), directory.path().join("log"));
    fs::write(
        &file,
        "[operations]\nlisten = \"127.0.0.1:0\"\n[admin]\nlisten = \"127.0.0.1:0\"\n",
    )?;
    let mut command = command();
    command.arg("serve").arg("--config").arg(&file);
    command.arg("--data-dir").arg(directory.path().join("data"));
    command.args(["--listen", "127.0.0.1:0"]);
    command
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log)?);
    let begun = Instant::now();
    let mut process = Killed(command.spawn()?);
    let address = loop {
        let said = fs::read_to_string(&log)?;
        if let Some(Value::String(address)) = line(&said, "serving").map(|mut fields| fields["listen"].take()) {
            break address;
        }
        if let Some(status) = process.0.try_wait()? {
            return Err(format!("the gateway ended with {status} instead of serving; it said:\n{said}").into());
        }
        if begun.elapsed() > SOON {
            return Err(format!("the gateway does not serve; it said:\n{said}").into());
        }
        sleep(LOOK).await;
    };
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
    let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await?;
    let took = begun.elapsed();
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(took),
        other => Err(format!("the gateway serves, but is {other:?}").into()),
    }
}
