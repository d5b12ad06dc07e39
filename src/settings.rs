//! What the sections of the configuration share: how a setting is refused, and bounds that types cannot say.
//!
//! Owns no setting. Each section is declared, with its defaults, in the module that it governs.

use std::{num::NonZeroUsize, time::Duration};

/// A wait longer than this is a mistake of units.
pub const DAY: Duration = Duration::from_secs(24 * 3600);

/// A setting that is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// The field, as the section names it.
    pub field: &'static str,
    /// What it must be.
    pub reason: String,
}

impl Unfit {
    /// A refusal of a field.
    pub fn new(field: &'static str, reason: impl Into<String>) -> Unfit {
        Unfit {
            field,
            reason: reason.into(),
        }
    }
}

/// Checks that a duration is more than zero and at most `max`.
///
/// # Errors
/// It is not.
pub fn within(field: &'static str, duration: Duration, max: Duration) -> Result<(), Unfit> {
    if duration.is_zero() || duration > max {
        let max = max.as_secs();
        return Err(Unfit::new(
            field,
            format!("must be more than zero, and at most {max} seconds"),
        ));
    }
    Ok(())
}

/// A count that is known not to be zero when the program is compiled.
pub const fn count<const N: usize>() -> NonZeroUsize {
    const { NonZeroUsize::new(N).expect("a default is not zero") }
}
