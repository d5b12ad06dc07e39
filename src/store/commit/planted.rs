//! What the planted faults of the commits do.
//!
//! Owns nothing but harm. Each does nothing unless it is the chosen one.

use super::{Caller, Row};
use crate::{
    planted::{self, Fault},
    store::Committed,
};

/// With [`Fault::RetryUnderNewVersion`] the writes of a statement that may have taken effect are refused, so that their callers stamp them anew.
pub(super) fn refuse(rows: &mut Vec<Row>) {
    if planted::is(Fault::RetryUnderNewVersion) {
        for row in rows.iter_mut() {
            let sent = row.first().map(Caller::version);
            for caller in row.extract_if(.., |caller| Some(caller.version()) == sent) {
                let standing = caller.version();
                caller.succeed(Committed::Superseded { standing });
            }
        }
        rows.retain(|row| !row.is_empty());
    }
}
