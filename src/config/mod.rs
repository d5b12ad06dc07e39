//! The configuration: the modules' own sections, read from a file, then the environment, then flags.
//!
//! Owns the order of the sources (`sources`), the top-level settings, and what is refused. Does not own the sections, which are declared where
//! they are used. Reads and opens nothing else, and corrects nothing: a bad setting is refused with its place and the reason.
//! The only reader of the environment.

mod sources;
mod url;

use std::{collections::BTreeMap, env, ffi::OsString, net::SocketAddr, path::PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};
use toml::Table;

use self::sources::{File, assemble, namespace_paths, overlay};
pub use self::url::Url;

use crate::{
    cache::{memory, redis},
    gateway::{requests, watch},
    model::{KEY_BYTES_MAX, NAMESPACE_BYTES_MAX, Request, Tags, check_namespace},
    namespace::{NamespaceSettings, Namespaces},
    operations,
    queue::{self, journal},
    rpc,
    settings::Unfit,
    shutdown, store, telemetry,
};

/// What every setting's name in the environment begins with; the path within the file follows, its parts joined by `__`.
const ENVIRONMENT_PREFIX: &str = "TIDEGATE_";

/// The flags that override the file and the environment.
#[derive(Debug, Clone, Default, Args)]
pub struct Flags {
    /// The configuration file, in TOML [env: TIDEGATE_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where gRPC is served [env: TIDEGATE_LISTEN] [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Where the gateway keeps files of its own [env: TIDEGATE_DATA_DIR] [default: data]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
    /// The store: postgres://… or sqlite://… [env: TIDEGATE_STORE_URL] [default: SQLite in the data directory]
    #[arg(long, value_name = "URL")]
    pub store_url: Option<String>,
    /// Redis, shared by replicas: redis://… or rediss://… [env: TIDEGATE_REDIS_URL] [default: none]
    #[arg(long, value_name = "URL")]
    pub redis_url: Option<String>,
    /// Serve without TLS on an address that other machines reach [env: TIDEGATE_INSECURE]
    #[arg(long)]
    pub insecure: bool,
}

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where gRPC is served. Default: 127.0.0.1:50051. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where the gateway keeps files of its own: its mark, its lease, its journal, and the embedded database. Default: `data`. One process at a time.
    pub data_dir: PathBuf,
    /// The store, `postgres://…` or `sqlite://…`. Default: `tidegate.db` in the data directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_url: Option<Url>,
    /// Redis, `redis://…` or `rediss://…`. Default: none, so that L1 is the only cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redis_url: Option<Url>,
    /// Whether to serve in the clear on an address that other machines reach. Default: false.
    pub insecure: bool,
    /// What is logged: a level or a filter such as `info,tidegate=debug`. Default: `info`.
    pub log: String,
    /// gRPC: threads, bounds, deadlines.
    pub rpc: rpc::serve::Config,
    /// The operations HTTP port.
    pub operations: operations::Config,
    /// The operators' gRPC port.
    pub admin: rpc::admin::Config,
    /// L1, the cache in memory.
    pub memory: memory::Config,
    /// L2, the cache in Redis.
    pub redis: redis::Config,
    /// The queue of write-behind writes and its drain.
    pub queue: queue::Config,
    /// The journal of write-behind writes, in the data directory.
    pub journal: journal::Config,
    /// What is remembered of requests with an id.
    pub requests: requests::Config,
    /// Watches of changes, and the log that they read.
    pub watch: watch::Config,
    /// The store's connections and bounds.
    pub store: store::Config,
    /// How the process stops.
    pub shutdown: shutdown::Config,
    /// What namespaces inherit.
    pub namespace_defaults: NamespaceSettings,
    /// Namespaces that differ from the defaults, by name.
    pub namespaces: BTreeMap<String, NamespaceSettings>,
    /// Where each setting of a namespace, or of their defaults, was configured, by its path. No setting itself.
    #[serde(skip)]
    pub namespace_places: BTreeMap<String, String>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            data_dir: PathBuf::from("data"),
            store_url: None,
            redis_url: None,
            insecure: false,
            log: "info".to_owned(),
            rpc: rpc::serve::Config::default(),
            operations: operations::Config::default(),
            admin: rpc::admin::Config::default(),
            memory: memory::Config::default(),
            redis: redis::Config::default(),
            queue: queue::Config::default(),
            journal: journal::Config::default(),
            requests: requests::Config::default(),
            watch: watch::Config::default(),
            store: store::Config::default(),
            shutdown: shutdown::Config::default(),
            namespace_defaults: NamespaceSettings::default(),
            namespaces: BTreeMap::new(),
            namespace_places: BTreeMap::new(),
        }
    }
}

/// A configuration that is refused: where, and why.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct ConfigError {
    /// `FILE:LINE:COLUMN`, an environment variable, or a flag.
    pub place: String,
    /// Why, in a sentence without secrets.
    pub reason: String,
}

impl Config {
    /// Reads the configuration: the file, then the environment, then the flags, each over the one before.
    ///
    /// # Errors
    /// The first source that does not hold, or a combination that does not.
    pub fn load(flags: &Flags) -> Result<Config, ConfigError> {
        Config::from_sources(flags, env::vars_os())
    }

    fn from_sources(
        flags: &Flags,
        environment: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Config, ConfigError> {
        let mut variables = BTreeMap::new();
        for (name, value) in environment {
            // A name that is no text cannot be one of ours.
            let Ok(name) = name.into_string() else { continue };
            let Some(setting) = name.strip_prefix(ENVIRONMENT_PREFIX) else {
                continue;
            };
            if is_service_link(setting) {
                continue;
            }
            let value = value.into_string().map_err(|_| ConfigError {
                place: name.clone(),
                reason: "the value is not UTF-8".to_owned(),
            })?;
            variables.insert(setting.to_owned(), value);
        }
        let from_environment = variables.remove("CONFIG").map(PathBuf::from);
        let path = flags.config.clone().or(from_environment);
        let file = path.as_deref().map(File::read).transpose()?;
        let mut settings = match &file {
            Some(file) => file.parse()?,
            None => Table::new(),
        };
        // Where each setting that did not come from the file came from.
        let mut origins = BTreeMap::new();
        for (name, value) in variables {
            let place = format!("{ENVIRONMENT_PREFIX}{name}");
            let path = name.to_lowercase().replace("__", ".");
            overlay(&mut settings, &place, &name.to_lowercase(), &value)?;
            origins.insert(path, place);
        }
        for (name, value) in flags.settings() {
            let place = format!("--{}", name.replace('_', "-"));
            overlay(&mut settings, &place, name, &value)?;
            origins.insert(name.to_owned(), place);
        }
        let mut config = assemble(&settings).map_err(|reason| ConfigError {
            place: "configuration".to_owned(),
            reason,
        })?;
        let place = |path: &String| {
            let in_file = || file.as_ref().and_then(|file| file.position(path));
            origins.get(path).cloned().or_else(in_file)
        };
        let places = namespace_paths(&settings).into_iter();
        let places = places.filter_map(|path| Some((path.clone(), place(&path)?)));
        config.namespace_places = places.collect();
        config.validate().map_err(|(path, reason)| ConfigError {
            place: origins
                .remove(&path)
                .or_else(|| file.and_then(|file| file.place(&path)))
                .unwrap_or(path),
            reason,
        })?;
        config.store_url = Some(config.store_url());
        Ok(config)
    }

    /// The settings of every namespace.
    pub fn namespaces(&self) -> Namespaces {
        let namespaces = Namespaces::new(self.namespace_defaults.clone(), self.namespaces.clone());
        namespaces.with_places(self.namespace_places.clone())
    }

    /// Where the journal is.
    pub fn journal_dir(&self) -> PathBuf {
        self.data_dir.join("journal")
    }

    /// The store's URL, said or default.
    pub fn store_url(&self) -> Url {
        self.store_url.clone().unwrap_or_else(|| {
            let path = self.data_dir.join("tidegate.db");
            Url::new(format!("sqlite://{}", path.display()))
        })
    }

    /// What types cannot refuse: the path of the first setting that does not hold, its parts joined by dots, and why.
    fn validate(&self) -> Result<(), (String, String)> {
        let in_section = |section: &str, checked: Result<(), Unfit>| {
            checked.map_err(|Unfit { field, reason }| (format!("{section}.{field}"), format!("{field} {reason}")))
        };
        self.validate_addresses()?;
        in_section("rpc", self.rpc.validate())?;
        in_section("redis", self.redis.validate())?;
        in_section("queue", self.queue.validate())?;
        in_section("journal", self.journal.validate())?;
        in_section("requests", self.requests.validate())?;
        in_section("watch", self.watch.validate())?;
        in_section("store", self.store.validate())?;
        in_section("shutdown", self.shutdown.validate())?;
        in_section("namespace_defaults", self.namespace_defaults.validate())?;
        for (name, settings) in &self.namespaces {
            let path = format!("namespaces.{name}");
            check_namespace(name).map_err(|reason| (path.clone(), format!("the name {name:?} {reason}")))?;
            in_section(&path, settings.validate())?;
        }
        if self.rpc.value_bytes_max.saturating_mul(2) > self.queue.bytes_max.get() {
            let reason = "must be at least twice rpc.value_bytes_max, or one value could fill the queue";
            return in_section("queue", Err(Unfit::new("bytes_max", reason)));
        }
        let longest = self
            .rpc
            .value_bytes_max
            .saturating_add(NAMESPACE_BYTES_MAX + KEY_BYTES_MAX + Tags::BYTES_MAX + Request::BYTES_MAX);
        if longest > self.journal.write_bytes_max() {
            let reason = format!(
                "is too small for rpc.value_bytes_max: the longest write has {longest} bytes, and a segment takes writes of up to {}",
                self.journal.write_bytes_max()
            );
            return in_section("journal", Err(Unfit::new("segment_bytes", reason)));
        }
        if self.requests.window < self.rpc.deadline_max {
            let reason =
                "must not be shorter than rpc.deadline_max, or an id could be forgotten while its call is under way";
            return in_section("requests", Err(Unfit::new("window", reason)));
        }
        let delays = self.namespaces.values().chain([&self.namespace_defaults]);
        let longest = delays.map(|settings| settings.write_delay).max().unwrap_or_default();
        if self.store.tombstone_retention <= longest {
            let reason = "must be longer than every write_delay, or delayed writes would come too late";
            return in_section("store", Err(Unfit::new("tombstone_retention", reason)));
        }
        Ok(())
    }

    fn validate_addresses(&self) -> Result<(), (String, String)> {
        let addresses = [
            ("listen", self.listen),
            ("operations.listen", self.operations.listen),
            ("admin.listen", self.admin.listen),
        ];
        for (index, (path, address)) in addresses.into_iter().enumerate() {
            if !self.insecure && !address.ip().is_loopback() {
                let reason = format!(
                    "{address} is reachable from other machines, and there is no TLS yet: \
                     say insecure = true (--insecure) to serve it in the clear"
                );
                return Err((path.to_owned(), reason));
            }
            let same = addresses[..index]
                .iter()
                .find(|(_, other)| *other == address && address.port() != 0);
            if let Some((other, _)) = same {
                let reason = format!("{path} must differ from {other}: two ports cannot be one");
                return Err((path.to_owned(), reason));
            }
        }
        store::check_url(self.store_url().reveal()).map_err(|error| ("store_url".to_owned(), error.message))?;
        if let Some(url) = &self.redis_url {
            redis::Server::parse(url.reveal()).map_err(|error| ("redis_url".to_owned(), error.to_string()))?;
        }
        telemetry::log::check_log(&self.log).map_err(|reason| ("log".to_owned(), reason))
    }
}

/// Whether a variable is one that Kubernetes sets in every container beside a Service named `tidegate`: TIDEGATE_PORT and the like.
fn is_service_link(setting: &str) -> bool {
    ["PORT", "SERVICE_HOST", "SERVICE_PORT"].contains(&setting)
        || ["PORT_", "SERVICE_PORT_"]
            .iter()
            .any(|prefix| setting.starts_with(prefix))
}

impl Flags {
    fn settings(&self) -> Vec<(&'static str, String)> {
        let mut settings = Vec::new();
        for (name, text) in [
            ("listen", &self.listen),
            ("data_dir", &self.data_dir),
            ("store_url", &self.store_url),
            ("redis_url", &self.redis_url),
        ] {
            settings.extend(text.clone().map(|text| (name, text)));
        }
        settings.extend(self.insecure.then(|| ("insecure", true.to_string())));
        settings
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::ffi::OsStringExt, time::Duration};

    use super::*;
    use crate::namespace::WriteMode;

    fn load(text: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, ConfigError> {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("written");
        let flags = Flags {
            config: Some(file.path().to_owned()),
            ..flags
        };
        let environment = environment
            .iter()
            .map(|(name, value)| (OsString::from(name), OsString::from(value)));
        Config::from_sources(&flags, environment)
    }

    fn refused(text: &str) -> String {
        load(text, &[], Flags::default()).expect_err("refused").to_string()
    }

    #[test]
    fn flags_override_the_environment_which_overrides_the_file() {
        let text = "listen = '127.0.0.1:1'\ndata_dir = 'file'\nlog = 'warn'";
        let environment = [
            ("TIDEGATE_LISTEN", "127.0.0.1:2"),
            ("TIDEGATE_DATA_DIR", "environment"),
            ("OTHER", "x"),
        ];
        let flags = Flags {
            listen: Some("127.0.0.1:3".into()),
            ..Flags::default()
        };
        let config = load(text, &environment, flags).expect("valid");
        assert_eq!(config.listen.port(), 3);
        assert_eq!(config.data_dir, PathBuf::from("environment"));
        assert_eq!(config.log, "warn");
    }

    #[test]
    fn every_setting_can_come_from_the_environment() {
        let environment = [
            ("TIDEGATE_RPC__STREAMS_MAX", "7"),
            ("TIDEGATE_NAMESPACES__ORDERS__WRITE_MODE", "behind"),
            ("TIDEGATE_NAMESPACE_DEFAULTS__CACHE_LIFETIME", "7s"),
        ];
        let config = load("", &environment, Flags::default()).expect("valid");
        assert_eq!(config.rpc.streams_max.get(), 7);
        let namespaces = config.namespaces();
        assert_eq!(namespaces.get("orders").write_mode, WriteMode::Behind);
        assert_eq!(namespaces.get("orders").cache_lifetime, Duration::from_secs(7));
    }

    #[test]
    fn each_setting_of_a_namespace_knows_its_place() {
        let text = "[namespace_defaults]\nwrite_mode = 'behind'\n[namespaces.'a.b']\n\nwrite_delay = '1s'";
        let environment = [("TIDEGATE_NAMESPACES__ORDERS__WRITE_MODE", "through")];
        let config = load(text, &environment, Flags::default()).expect("valid");
        let place = |path: &str| config.namespace_places.get(path).map(String::as_str);
        let ends = |path: &str, end: &str| place(path).is_some_and(|place| place.ends_with(end));
        assert!(
            ends("namespace_defaults.write_mode", ":2:1"),
            "{:?}",
            config.namespace_places
        );
        assert!(
            ends("namespaces.a.b.write_delay", ":5:1"),
            "{:?}",
            config.namespace_places
        );
        assert_eq!(
            place("namespaces.orders.write_mode"),
            Some("TIDEGATE_NAMESPACES__ORDERS__WRITE_MODE")
        );
        assert_eq!(place("namespaces.orders.write_delay"), None);
    }

    #[test]
    fn no_two_ports_are_one() {
        for (text, said) in [
            (
                "[operations]\nlisten = '127.0.0.1:50051'",
                "operations.listen must differ from listen",
            ),
            (
                "[admin]\nlisten = '127.0.0.1:50051'",
                "admin.listen must differ from listen",
            ),
            (
                "[admin]\nlisten = '127.0.0.1:9464'",
                "admin.listen must differ from operations.listen",
            ),
            ("[admin]\nlisten = '0.0.0.0:9465'", "reachable from other machines"),
        ] {
            let refusal = refused(text);
            assert!(refusal.contains(said), "{refusal}");
        }
        let free = "listen = '127.0.0.1:0'\n[operations]\nlisten = '127.0.0.1:0'\n[admin]\nlisten = '127.0.0.1:0'";
        assert!(load(free, &[], Flags::default()).is_ok());
    }

    #[test]
    fn namespaces_inherit_the_defaults() {
        let text = "[namespace_defaults]\ncache_lifetime = '1m'\nwrite_mode = 'behind'\n\
                    [namespaces.orders]\ncache_lifetime = '2s'";
        let namespaces = load(text, &[], Flags::default()).expect("valid").namespaces();
        assert_eq!(namespaces.get("orders").cache_lifetime, Duration::from_secs(2));
        assert_eq!(namespaces.get("orders").write_mode, WriteMode::Behind);
        assert_eq!(namespaces.get("others").cache_lifetime, Duration::from_secs(60));
    }

    #[test]
    fn a_bad_file_is_refused_with_its_line() {
        assert!(
            refused("log = 'info'\nlisten = 5").contains(":2:"),
            "{}",
            refused("log = 'info'\nlisten = 5")
        );
        assert!(refused("\n\n[queue]\nnonsense = 1").contains(":4:"));
        assert!(refused("\n[rpc]\nstreams_max = 0").contains(":3:"));
        assert!(refused("\n[rpc\n").contains(":2:"));
        assert!(refused("[namespaces.Orders]\nwrite_mode = 'behind'").contains("Orders"));
        assert!(refused("[namespaces.orders]\nwrite_mode = 'sideways'").contains(":2:"));
    }

    #[test]
    fn a_delay_beyond_the_retention_is_refused() {
        let text = "[store]\ntombstone_retention = '1m'\n[namespaces.orders]\nwrite_delay = ";
        assert!(load(&format!("{text}'59s'"), &[], Flags::default()).is_ok());
        let refused = refused(&format!("{text}'1m'"));
        assert!(refused.contains(":2:") && refused.contains("write_delay"), "{refused}");
    }

    #[test]
    fn a_bad_variable_and_a_bad_flag_are_named() {
        let error = load("", &[("TIDEGATE_QUEUE__NONSENSE", "1")], Flags::default()).expect_err("refused");
        assert_eq!(error.place, "TIDEGATE_QUEUE__NONSENSE");
        let flags = Flags {
            listen: Some("nowhere".into()),
            ..Flags::default()
        };
        assert_eq!(load("", &[], flags).expect_err("refused").place, "--listen");
    }

    #[test]
    fn a_variable_that_is_no_text_is_named() {
        let variable = (OsString::from("TIDEGATE_LOG"), OsString::from_vec(vec![0xff]));
        let error = Config::from_sources(&Flags::default(), [variable].into_iter()).expect_err("refused");
        assert_eq!(error.place, "TIDEGATE_LOG");
    }

    #[test]
    fn the_variables_of_a_service_of_our_name_are_not_ours() {
        let environment = [
            ("TIDEGATE_PORT", "tcp://10.0.0.1:50051"),
            ("TIDEGATE_SERVICE_HOST", "10.0.0.1"),
            ("TIDEGATE_SERVICE_PORT", "50051"),
            ("TIDEGATE_SERVICE_PORT_GRPC", "50051"),
            ("TIDEGATE_PORT_50051_TCP_ADDR", "10.0.0.1"),
        ];
        let config = load("", &environment, Flags::default()).expect("valid");
        assert_eq!(config, load("", &[], Flags::default()).expect("valid"));
    }

    #[test]
    fn a_secret_in_the_wrong_place_is_not_repeated() {
        for (name, value) in [
            ("TIDEGATE_REDIS", "redis://:s3cret@h"),
            ("TIDEGATE_STORE", "postgres://u:s3cret@h/x"),
            ("TIDEGATE_STORE", "postgres://u:a\"b`s3cret@h/x"),
            ("TIDEGATE_REDIS__TIMEOUT", "redis://:s3cret@h"),
            ("TIDEGATE_INSECURE", "postgres://u:s3cret@h/x"),
            ("TIDEGATE_NAMESPACE_DEFAULTS__WRITE_MODE", "redis://:s3cret@h"),
            ("TIDEGATE_STORE_URL", "postgres://u:s3cret@h:port/x"),
            ("TIDEGATE_REDIS_URL", "redis://:s3cret@h:99999999"),
        ] {
            let error = load("", &[(name, value)], Flags::default()).expect_err(name);
            assert_eq!(error.place, name);
            assert!(!error.reason.contains("s3cret"), "{error}");
        }
        assert!(!refused("store = 'postgres://u:s3cret@h'").contains("s3cret"));
    }

    #[test]
    fn what_serving_would_refuse_is_refused_at_once() {
        assert!(refused("log = 'a=b=c'").contains(":1:"));
        assert!(refused("\nstore_url = 'postgres://h/x?bogus=1'").contains(":2:"));
        assert!(refused("store_url = 'sqlite:'").contains(":1:"));
        assert!(refused("listen = '127.0.0.1:7'\n[operations]\nlisten = '127.0.0.1:7'").contains(":3:"));
    }

    #[test]
    fn a_text_may_look_like_a_number() {
        let config = load("", &[("TIDEGATE_DATA_DIR", "5")], Flags::default()).expect("valid");
        assert_eq!(config.data_dir, PathBuf::from("5"));
    }

    #[test]
    fn absurd_waits_are_refused_where_they_stand() {
        assert!(refused("\n[rpc]\ndeadline_max = '900000days'").contains(":3:"));
        assert!(refused("[redis]\ntimeout = '0s'").contains(":2:"));
        assert!(refused("[namespaces.'a.b']\nrefresh_threshold = 2").contains(":2:"));
        assert!(refused("[namespace_defaults]\nstale_if_error = '31days'").contains(":2:"));
        assert!(refused("[namespaces.a]\nstale_if_error = '31days'").contains("30 days"));
    }

    #[test]
    fn a_grace_is_off_unless_set_and_is_inherited() {
        let days = |days: u64| Duration::from_secs(days * 24 * 3600);
        let grace = |text: &str| {
            let config = load(text, &[], Flags::default()).expect("valid");
            config.namespaces().get("orders").stale_if_error
        };
        assert_eq!(grace(""), Duration::ZERO);
        assert_eq!(grace("[namespace_defaults]\nstale_if_error = '30days'"), days(30));
        let text = "[namespace_defaults]\nstale_if_error = '1h'\n[namespaces.orders]\nstale_if_error = '1day'";
        assert_eq!(grace(text), days(1));
    }

    #[test]
    fn other_machines_are_served_in_the_clear_only_when_told() {
        assert!(refused("listen = '0.0.0.0:50051'").contains("insecure"));
        assert!(refused("[operations]\nlisten = '0.0.0.0:9000'").contains(":2:"));
        let flags = Flags {
            insecure: true,
            ..Flags::default()
        };
        assert!(load("listen = '0.0.0.0:50051'", &[], flags).is_ok());
    }

    #[test]
    fn passwords_are_shown_nowhere() {
        let text = "store_url = 'postgres://app:s3cret@db/x?password=s3cret'\nredis_url = 'redis://:s3cret@cache'";
        let config = load(text, &[], Flags::default()).expect("valid");
        let shown = format!("{config:?}{}", toml::to_string(&config).expect("serializes"));
        assert!(!shown.contains("s3cret"), "{shown}");
        assert!(shown.contains("postgres://app:***@db/x?***"));
        assert_eq!(Url::new("postgres://app:s3?cret@db/x").masked(), "postgres://***");
        assert!(!refused("store_url = 'mysql://app:s3cret@db'").contains("s3cret"));
    }

    #[test]
    fn the_effective_configuration_can_be_read_back() {
        let config = load("[namespaces.orders]\nwrite_delay = '1s'", &[], Flags::default()).expect("valid");
        let text = toml::to_string(&config).expect("serializes");
        let again = load(&text, &[], Flags::default()).expect("valid");
        // It stands elsewhere.
        let namespace_places = config.namespace_places.clone();
        assert_eq!(
            Config {
                namespace_places,
                ..again
            },
            config
        );
    }
}
