//! URLs that may hold a password.
//!
//! Owns that no password is ever shown: only [`Url::reveal`] gives it, to whoever connects.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A URL that may hold a password: shown and serialized without it.
#[derive(Clone, PartialEq, Eq)]
pub struct Url(String);

impl Url {
    /// A URL as text; its meaning is checked by whoever connects.
    pub fn new(url: impl Into<String>) -> Url {
        Url(url.into())
    }

    /// The URL with its password.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The URL with everything masked that can be a secret: the password, and every parameter behind the question mark.
    pub fn masked(&self) -> String {
        let (base, parameters) = self.0.split_once('?').unwrap_or((&self.0, ""));
        if parameters.contains('@') {
            // A question mark within a password: where the host begins cannot be told.
            let scheme = base.split_once("://").map_or("", |(scheme, _)| scheme);
            return format!("{scheme}://***");
        }
        let masked = match base.split_once("://") {
            Some((scheme, rest)) => match rest.rsplit_once('@') {
                Some((user, host)) => {
                    let user = user
                        .split_once(':')
                        .map_or(user.to_owned(), |(user, _)| format!("{user}:***"));
                    format!("{scheme}://{user}@{host}")
                }
                None => base.to_owned(),
            },
            None => "***".to_owned(),
        };
        if parameters.is_empty() { masked } else { masked + "?***" }
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

impl Serialize for Url {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.masked())
    }
}

impl<'de> Deserialize<'de> for Url {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Url, D::Error> {
        String::deserialize(deserializer).map(Url)
    }
}
