//! What can be set for each namespace, and the table that finds a namespace's settings.
//!
//! Owns the settings' meaning and defaults, and what is told of where each comes from. A namespace needs no declaration: one that is not configured has the defaults.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::settings::{DAY, Unfit};

/// How many of the records written last may be loaded into the caches in one go: their keys are in memory meanwhile.
pub const WARM_RECORDS_MAX: u32 = 100_000;
/// The longest grace of a copy: no longer does Redis keep one.
const STALE_IF_ERROR_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// When a write of unspecified mode is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteMode {
    /// Once committed in the store.
    Through,
    /// Once accepted; the store is written afterwards.
    Behind,
}

/// What OK to a write-behind write rests on until the store has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BehindDurability {
    /// The journal: it survives this process, and a loss of power.
    Journal,
    /// This process's memory: it is lost with the process.
    Memory,
}

/// What a write-behind write does when the queue, or the journal, is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QueueFull {
    /// Waits for room until the call's deadline.
    Wait,
    /// Is refused at once, with the time after which to come back.
    Reject,
    /// Is written through: answered once committed in the store.
    WriteThrough,
}

/// The settings of one namespace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NamespaceSettings {
    /// The mode of writes that do not name one. Default: `through`. `behind` answers sooner, and rests on what `durability` says until
    /// the store has the write.
    pub write_mode: WriteMode,
    /// What OK to a write-behind write rests on. Default: `journal`, on this machine's disk. `memory` answers a sync of the disk sooner
    /// and loses what the store does not have yet when the process dies; where a write of the key that rests on the journal is
    /// pending, it rests on the journal all the same.
    pub durability: BehindDurability,
    /// How long a write-behind write waits for later writes of its key to join it, before the store is written; not under
    /// pressure. Default: 0. Longer saves store writes on hot keys, and leaves more to the journal, or to lose with the process.
    #[serde(with = "humantime_serde")]
    pub write_delay: Duration,
    /// What a write-behind write does when the queue, or the journal, is full. Default: `wait`.
    pub queue_full: QueueFull,
    /// How long a copy in L1 or Redis may answer before the store is asked again, give or take a tenth. Default: 5 minutes.
    /// Bounds how stale a cached read can be when another replica, or somebody past Tidegate, wrote.
    #[serde(with = "humantime_serde")]
    pub cache_lifetime: Duration,
    /// How long an absence is cached. Default: 5 s. 0 asks the store at every read of an absent key.
    #[serde(with = "humantime_serde")]
    pub absence_lifetime: Duration,
    /// The share of `cache_lifetime` that, when less of it is left, makes a read renew the copy in the background. Default: 0.2;
    /// 0 turns it off. Higher loads the store more and makes a waiting read rarer.
    pub refresh_threshold: f64,
    /// How many of the records written last are loaded into the caches after the start. Default: 0. Of namespaces that are configured by
    /// name alone: no other is known at the start. More makes fewer first reads wait for the store, and loads that more when a gateway
    /// starts.
    pub warm_at_start: u32,
    /// For how long after its lifetime a copy of a live record may still answer a read, marked stale, while the store cannot answer.
    /// Default: 0, never; at most 30 days. Longer lets reads outlive a longer outage, and Redis keeps copies for so much longer, 30 days
    /// at most.
    #[serde(with = "humantime_serde")]
    pub stale_if_error: Duration,
}

impl NamespaceSettings {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        if !(0.0..=0.9).contains(&self.refresh_threshold) {
            return Err(Unfit::new("refresh_threshold", "must be from 0 to 0.9"));
        }
        if self.write_delay > DAY {
            return Err(Unfit::new("write_delay", "must be at most a day"));
        }
        if self.warm_at_start > WARM_RECORDS_MAX {
            return Err(Unfit::new(
                "warm_at_start",
                format!("must be at most {WARM_RECORDS_MAX}"),
            ));
        }
        if self.stale_if_error > STALE_IF_ERROR_MAX {
            return Err(Unfit::new("stale_if_error", "must be at most 30 days"));
        }
        Ok(())
    }

    /// How long a copy may answer, before chance is added: shorter where it says that there is no live record.
    pub fn lifetime_of(&self, live: bool) -> Duration {
        if live {
            self.cache_lifetime
        } else {
            self.absence_lifetime
        }
    }
}

impl Default for NamespaceSettings {
    fn default() -> NamespaceSettings {
        NamespaceSettings {
            write_mode: WriteMode::Through,
            durability: BehindDurability::Journal,
            write_delay: Duration::ZERO,
            queue_full: QueueFull::Wait,
            cache_lifetime: Duration::from_secs(300),
            absence_lifetime: Duration::from_secs(5),
            refresh_threshold: 0.2,
            warm_at_start: 0,
            stale_if_error: Duration::ZERO,
        }
    }
}

/// Where a setting of a namespace comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettingSource {
    /// Nobody configured it.
    BuiltIn,
    /// It is configured for all namespaces.
    Defaults,
    /// It is configured for this one.
    Namespace,
}

/// A setting, as people read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its name in the configuration.
    pub name: String,
    /// Its value, as the configuration has it.
    pub value: String,
    /// Where it comes from.
    pub source: SettingSource,
    /// The place of that; empty for what is built in.
    pub place: String,
}

/// The settings of every namespace.
#[derive(Debug, Clone, Default)]
pub struct Namespaces {
    defaults: Arc<NamespaceSettings>,
    configured: HashMap<String, Arc<NamespaceSettings>, foldhash::fast::RandomState>,
    /// The place of each setting that was configured, by its path in the configuration.
    places: BTreeMap<String, String>,
}

impl Namespaces {
    /// A table of the defaults and the namespaces that differ from them.
    pub fn new(
        defaults: NamespaceSettings,
        configured: impl IntoIterator<Item = (String, NamespaceSettings)>,
    ) -> Namespaces {
        Namespaces {
            defaults: Arc::new(defaults),
            configured: configured
                .into_iter()
                .map(|(name, settings)| (name, Arc::new(settings)))
                .collect(),
            places: BTreeMap::new(),
        }
    }

    /// The same, knowing where each setting was configured: by paths such as `namespaces.orders.write_mode`.
    #[must_use]
    pub fn with_places(mut self, places: BTreeMap<String, String>) -> Namespaces {
        self.places = places;
        self
    }

    /// The settings that hold for a namespace, by name, and where each comes from.
    pub fn settings(&self, namespace: &str) -> Vec<Setting> {
        self.told(self.get(namespace), Some(namespace))
    }

    /// The same of those that are not configured by name.
    pub fn default_settings(&self) -> Vec<Setting> {
        self.told(&self.defaults, None)
    }

    fn told(&self, settings: &NamespaceSettings, namespace: Option<&str>) -> Vec<Setting> {
        // Settings are a section of plain values: they are written so in the configuration, too.
        let Ok(serde_json::Value::Object(values)) = serde_json::to_value(settings) else {
            return Vec::new();
        };
        let place = |section: String, name: &str| self.places.get(&format!("{section}.{name}"));
        let setting = |(name, value): (String, serde_json::Value)| {
            let own = namespace.and_then(|namespace| place(format!("namespaces.{namespace}"), &name));
            let (source, place) = match (own, place("namespace_defaults".to_owned(), &name)) {
                (Some(place), _) => (SettingSource::Namespace, place.clone()),
                (None, Some(place)) => (SettingSource::Defaults, place.clone()),
                (None, None) => (SettingSource::BuiltIn, String::new()),
            };
            let value = match value {
                serde_json::Value::String(text) => text,
                other => other.to_string(),
            };
            Setting {
                name,
                value,
                source,
                place,
            }
        };
        values.into_iter().map(setting).collect()
    }

    /// The namespaces that are configured by name.
    pub fn configured(&self) -> impl Iterator<Item = (&str, &NamespaceSettings)> {
        self.configured
            .iter()
            .map(|(name, settings)| (name.as_str(), &**settings))
    }

    /// The settings of a namespace.
    pub fn get(&self, namespace: &str) -> &NamespaceSettings {
        self.configured.get(namespace).unwrap_or(&self.defaults)
    }
}
