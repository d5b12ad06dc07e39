//! Where Redis is, and the settings of L2.
//!
//! Owns what a Redis URL may be. Does not dial it ([`super::link`] does). Invariant: no text made here repeats a URL, which may hold a
//! password.

use std::{fmt, time::Duration};

use redis::{Client, ConnectionAddr, IntoConnectionInfo, RedisError, io::tcp::TcpSettings};
use serde::{Deserialize, Serialize};

use crate::settings::{DAY, Unfit, within};

/// The settings of L2. Where Redis is, is a setting of the gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What every key in Redis begins with. Default: `tidegate:`. Gateways share their copies if this and the Redis are the same,
    /// so two stores must not have the same.
    pub prefix: String,
    /// How long a call waits for Redis before it is a miss and the connection is given up. Default: 250 ms. Less gives up on a
    /// Redis that is only slow; more makes reads wait for one that is gone.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How long connecting may take, TLS and authentication included; no call waits for it. Default: 2 s.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// How long a read that misses waits for another replica that is loading the key already, before it asks the store itself. Default:
    /// 200 ms. More spares a slow store the same query from every replica; less makes reads wait less for a replica that died.
    #[serde(with = "humantime_serde")]
    pub load_wait: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            prefix: "tidegate:".to_owned(),
            timeout: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(2),
            load_wait: Duration::from_millis(200),
        }
    }
}

impl Config {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        within("timeout", self.timeout, DAY)?;
        within("connect_timeout", self.connect_timeout, DAY)?;
        if self.load_wait > DAY {
            return Err(Unfit::new("load_wait", "must be at most a day"));
        }
        Ok(())
    }
}

/// Where Redis is and how to log in. Made from a URL that is valid; whether anybody answers there is another matter.
#[derive(Clone)]
pub struct Server {
    pub(super) client: Client,
}

/// A URL that names no Redis. The text says why, and never repeats the URL, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the Redis URL is not valid: {reason}; it is redis://[[user]:password@]host[:port][/database], rediss:// for TLS, or unix:///path"
)]
pub struct InvalidUrl {
    reason: String,
}

impl Server {
    /// The server that a URL names. `rediss://` asks for TLS; the certificate must be signed by an authority that the system
    /// trusts, and rustls must have its process-wide provider by the time of the first dial.
    ///
    /// # Errors
    /// [`InvalidUrl`] says what is wrong.
    pub fn parse(url: &str) -> Result<Server, InvalidUrl> {
        let invalid = |reason: &str| InvalidUrl {
            reason: reason.to_owned(),
        };
        // The crate's text is a fixed sentence, then " - " and what may quote the URL.
        let because = |error: RedisError| {
            let text = error.to_string();
            invalid(text.split(" - ").next().unwrap_or_default())
        };
        let info = url.into_connection_info().map_err(because)?;
        if matches!(info.addr(), ConnectionAddr::TcpTls { insecure: true, .. }) {
            return Err(invalid("certificates are always verified, so #insecure is refused"));
        }
        let settings = TcpSettings::default().set_nodelay(true);
        let client = Client::open(info.set_tcp_settings(settings)).map_err(because)?;
        Ok(Server { client })
    }
}

impl fmt::Debug for Server {
    /// Shows the address, never the credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.client.get_connection_info().addr())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_a_server_and_its_debug_output_no_credential() {
        for url in [
            "redis://127.0.0.1",
            "redis://127.0.0.1:6380/3",
            "redis://user:s3cret@redis.example:6380/3",
            "rediss://:s3cret@redis.example",
            "unix:///run/redis.sock",
        ] {
            let server = Server::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert!(!format!("{server:?}").contains("s3cret"));
        }
    }

    #[test]
    fn an_invalid_url_is_refused_without_repeating_it() {
        for url in [
            "",
            "127.0.0.1:6379",
            "http://user:s3cret@redis.example",
            "redis://user:s3cret@",
            "redis://user:s3cret@redis.example:port",
            "redis://user:s3cret@redis.example/database",
            "redis://user:s3cret@redis.example/?protocol=s3cret",
            "redis://user:%ff%fes3cret@redis.example",
            "rediss://user:s3cret@redis.example/#s3cret",
            "rediss://user:s3cret@redis.example/#insecure",
            "redis://user:s3cret@0.0.0.0",
        ] {
            let error = Server::parse(url).expect_err(url);
            assert!(!format!("{error} {error:?}").contains("s3cret"), "{url}: {error}");
        }
    }
}
