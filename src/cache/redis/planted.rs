//! What the planted faults of Redis's slots do to the script.
//!
//! Owns nothing but harm. Each does nothing unless it is the chosen one.

use std::borrow::Cow;

use crate::planted::{self, Fault};

/// The script, or with [`Fault::FillByVersionOnly`] one that asks a load for no token, and with [`Fault::FillWithoutToken`] for nothing.
pub(super) fn or_unguarded(script: &str) -> Cow<'_, str> {
    const TOKEN: &str = "if token == NONE or token ~= ARGV[2] then return '0' end";
    const VERSION: &str = "if known and (given == NONE or compare(known, given) > 0) then";
    if planted::is(Fault::FillWithoutToken) {
        Cow::Owned(script.replace(TOKEN, "").replace(VERSION, "if false then"))
    } else if planted::is(Fault::FillByVersionOnly) {
        Cow::Owned(script.replace(TOKEN, ""))
    } else {
        Cow::Borrowed(script)
    }
}
