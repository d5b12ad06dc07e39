//! The epochs under which copies are shared: part of every Redis key, so that moving one leaves all older copies behind.
//!
//! Owns which epochs this process goes by, and where its copies lie in Redis. Does not own where epochs come from (the store's control
//! row) nor what their moving means for the tiers (the gateway). Invariant: until the epochs are known, and on a server other than the
//! one for which the epoch holds, Redis is not used.

use std::{collections::HashMap, io::Write, sync::Arc};

use foldhash::fast::RandomState;
use parking_lot::RwLock;

use crate::model::{Epoch, Key, Timestamp};

/// What this process goes by; all of its connections to Redis share it.
#[derive(Debug)]
pub struct Epochs {
    /// What every key in Redis begins with.
    prefix: String,
    adopted: RwLock<Option<Arc<Adopted>>>,
}

/// The epochs that hold, as of one look at the control row.
#[derive(Debug, PartialEq, Eq)]
pub struct Adopted {
    /// The epoch of all copies.
    pub epoch: Epoch,
    /// The run of the Redis server for which the epoch holds; `None` as long as none was ever met.
    pub server: Option<String>,
    /// From when on copies may be read and filled: everybody has adopted the epoch by then.
    pub readable_from: Timestamp,
    /// The namespaces that have an epoch of their own.
    pub namespaces: HashMap<String, NamespaceEpoch, RandomState>,
}

/// The epoch of one namespace, within the epoch of all copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceEpoch {
    /// The epoch.
    pub epoch: Epoch,
    /// As of all copies.
    pub readable_from: Timestamp,
}

impl Epochs {
    /// None known yet.
    pub fn new(prefix: &str) -> Epochs {
        Epochs {
            prefix: prefix.to_owned(),
            adopted: RwLock::new(None),
        }
    }

    /// What holds; `None` before the first look at the control row.
    pub fn adopted(&self) -> Option<Arc<Adopted>> {
        self.adopted.read().clone()
    }

    /// Goes by other epochs from now on.
    pub fn adopt(&self, adopted: Adopted) {
        *self.adopted.write() = Some(Arc::new(adopted));
    }

    /// The same, unless some were adopted already. Whether it did.
    pub fn adopt_first(&self, adopted: Adopted) -> bool {
        let mut standing = self.adopted.write();
        let first = standing.is_none();
        if first {
            *standing = Some(Arc::new(adopted));
        }
        first
    }

    /// Where the copy of a key lies. A namespace holds neither `:` nor `+`, so no two keys become the same.
    pub(super) fn place(&self, adopted: &Adopted, key: &Key) -> Vec<u8> {
        let mut place = self.namespace_place(adopted, key.namespace(), key.key().len());
        place.extend_from_slice(key.key().as_bytes());
        place
    }

    /// What the places of a namespace's copies begin with.
    pub(super) fn namespace_place(&self, adopted: &Adopted, namespace: &str, key_bytes: usize) -> Vec<u8> {
        let mut place = Vec::with_capacity(self.prefix.len() + 16 + 1 + namespace.len() + 17 + 1 + key_bytes);
        let epoch = adopted.epoch.0;
        #[cfg(feature = "planted-faults")]
        let epoch = if crate::planted::is(crate::planted::Fault::EpochNotChecked) {
            0
        } else {
            epoch
        };
        let written = match adopted.namespaces.get(namespace) {
            None => write!(place, "{}{epoch:016x}:{namespace}:", self.prefix),
            Some(own) => write!(place, "{}{epoch:016x}:{namespace}+{:016x}:", self.prefix, own.epoch.0),
        };
        written.expect("a vector takes every write");
        place
    }

    /// The key under which Redis itself is told which epochs hold, for a gateway that starts while the store is down.
    pub(super) fn noticeboard(&self) -> String {
        format!("{}epochs", self.prefix)
    }

    /// The key that tells a flushed Redis from one that is merely empty. No namespace begins with `~`.
    pub(super) fn sentinel(&self, epoch: Epoch) -> String {
        format!("{}{:016x}:~", self.prefix, epoch.0)
    }
}

impl Adopted {
    /// Whether copies of a namespace may be read and filled at `now`.
    pub fn is_readable(&self, namespace: &str, now: Timestamp) -> bool {
        let own = self.namespaces.get(namespace).map(|own| own.readable_from);
        now >= own.map_or(self.readable_from, |own| own.max(self.readable_from))
    }

    /// What the noticeboard says of these: a line with the run of the server and the epoch, then one for each namespace with its own. `None`
    /// before any server was met.
    pub(super) fn notice(&self) -> Option<String> {
        let mut notice = format!("{} {:016x}\n", self.server.as_deref()?, self.epoch.0);
        for (namespace, own) in &self.namespaces {
            notice.push_str(&format!("{namespace} {:016x}\n", own.epoch.0));
        }
        Some(notice)
    }

    /// The epochs that a notice says, readable at once; `None` for what [`Adopted::notice`] does not make.
    pub(super) fn from_notice(notice: &str, now: Timestamp) -> Option<Adopted> {
        let mut lines = notice.strip_suffix('\n')?.split('\n').map(|line| {
            let (name, epoch) = line.split_once(' ')?;
            let epoch = i64::from_str_radix(epoch, 16).ok().filter(|epoch| *epoch > 0)?;
            Some((name.to_owned(), Epoch(epoch)))
        });
        let (server, epoch) = lines.next()??;
        let own = |line: Option<(String, Epoch)>| {
            let (namespace, epoch) = line?;
            let own = NamespaceEpoch {
                epoch,
                readable_from: now,
            };
            Some((namespace, own))
        };
        Some(Adopted {
            epoch,
            server: Some(server),
            readable_from: now,
            namespaces: lines.map(own).collect::<Option<_>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adopted(namespaces: &[(&str, i64)]) -> Adopted {
        let epoch = |(name, epoch): &(&str, i64)| {
            let epoch = NamespaceEpoch {
                epoch: Epoch(*epoch),
                readable_from: Timestamp(20),
            };
            ((*name).to_owned(), epoch)
        };
        Adopted {
            epoch: Epoch(7),
            server: None,
            readable_from: Timestamp(10),
            namespaces: namespaces.iter().map(epoch).collect(),
        }
    }

    #[test]
    fn a_place_names_the_epochs_that_hold_for_its_namespace() {
        let epochs = Epochs::new("p:");
        let place = |adopted: &Adopted, namespace: &str| {
            let place = epochs.place(adopted, &Key::new(namespace, "k:1").expect("valid"));
            String::from_utf8(place).expect("text")
        };
        assert_eq!(place(&adopted(&[]), "orders"), "p:0000000000000007:orders:k:1");
        let moved = adopted(&[("orders", 255)]);
        assert_eq!(
            place(&moved, "orders"),
            "p:0000000000000007:orders+00000000000000ff:k:1"
        );
        assert_eq!(place(&moved, "others"), "p:0000000000000007:others:k:1");
        assert_eq!(epochs.sentinel(Epoch(7)), "p:0000000000000007:~");
    }

    #[test]
    fn a_notice_says_all_that_a_start_without_the_store_needs() {
        let now = Timestamp(20);
        let told = Adopted {
            server: Some("run".to_owned()),
            readable_from: now,
            ..adopted(&[("orders", 255), ("others", i64::MAX)])
        };
        let notice = told.notice().expect("a server was met");
        assert_eq!(Adopted::from_notice(&notice, now), Some(told));
        assert_eq!(adopted(&[]).notice(), None);
        let cut = (0..notice.len()).filter_map(|end| Adopted::from_notice(&notice[..end], now));
        assert!(cut.count() < 3, "at a line's end at most");
        for foreign in [
            "",
            "\n",
            "run\n",
            "run 0\n",
            "run -1\n",
            "run x\n",
            "run 1\n\n",
            "run 1\norders\n",
        ] {
            assert_eq!(Adopted::from_notice(foreign, now), None, "{foreign:?}");
        }
    }

    #[test]
    fn copies_are_readable_once_everybody_has_adopted_both_epochs() {
        let moved = adopted(&[("orders", 255)]);
        for (namespace, at, readable) in [
            ("orders", 10, false),
            ("orders", 20, true),
            ("others", 9, false),
            ("others", 10, true),
        ] {
            assert_eq!(
                moved.is_readable(namespace, Timestamp(at)),
                readable,
                "{namespace} {at}"
            );
        }
    }
}
