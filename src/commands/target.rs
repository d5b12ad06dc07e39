//! Which gateway a command asks, and how long it may take.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::Args;

use crate::{
    client::{Client, Options, Retry},
    commands::{exit::Exit, records::Ended},
    config::{Config, Flags},
};

/// Where the gateway is.
#[derive(Debug, Clone, Args)]
pub(super) struct Target {
    /// The gateway's address, as HOST:PORT; may be given several times, for gateways of one store [default: the configuration's `listen`]
    #[arg(long, value_name = "ADDRESS")]
    address: Vec<String>,
    /// The configuration file of the gateway, read where no --address is given [env: TIDEGATE_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How long a call may take, all its tries together, as 500ms or 1m [default: 10s; of an import 1m]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    deadline: Option<Duration>,
}

/// Tries of one call: the deadline is what bounds them.
const TRIES_MAX: u32 = 1_000;

impl Target {
    /// A client of the gateway. `deadline` is what holds unless another was asked for.
    pub(super) fn client(&self, deadline: Duration) -> Result<Client, Ended> {
        let options = Options {
            deadline: self.deadline.unwrap_or(deadline),
            retry: Retry {
                tries_max: TRIES_MAX,
                ..Retry::default()
            },
            ..Options::default()
        };
        let addresses = if self.address.is_empty() {
            vec![self.configured()?]
        } else {
            self.address.clone()
        };
        Ok(Client::with_options(&addresses, options)?)
    }

    fn configured(&self) -> Result<String, Ended> {
        let flags = Flags {
            config: self.config.clone(),
            ..Flags::default()
        };
        let config = Config::load(&flags).map_err(|error| Ended::new(Exit::Usage, error.to_string()))?;
        if config.listen.port() == 0 {
            let message = "the configuration has the gateway take a free port: say which, by --address";
            return Err(Ended::new(Exit::Usage, message));
        }
        Ok(reachable(config.listen).to_string())
    }
}

/// Where to connect to what listens there: "any address" is none to connect to.
fn reachable(mut listen: SocketAddr) -> SocketAddr {
    if listen.ip().is_unspecified() {
        listen.set_ip(match listen.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    listen
}

/// Reads a time from the command line: more than none.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if duration.is_zero() {
        return Err("must be more than zero".to_owned());
    }
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_listens_everywhere_is_asked_here() {
        let asked = |text: &str| reachable(text.parse().expect("an address")).to_string();
        assert_eq!(asked("0.0.0.0:50051"), "127.0.0.1:50051");
        assert_eq!(asked("[::]:50051"), "[::1]:50051");
        assert_eq!(asked("10.1.2.3:50051"), "10.1.2.3:50051");
    }

    #[test]
    fn a_time_is_more_than_none() {
        assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
        assert!(duration("0s").is_err() && duration("soon").is_err() && duration("-1s").is_err());
    }
}
