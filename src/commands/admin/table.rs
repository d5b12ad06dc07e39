//! Tables for people, and figures, times and names as they stand in them.
//!
//! Owns the form. Does not own what is told. Invariant: nothing that a caller of the gateway chose, such as a key, reaches a terminal as a control
//! sequence.

use prost_types::{Duration, Timestamp};

/// A table: the first columns are text, the others are figures, aligned to the right.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    /// The columns that hold text.
    text_columns: usize,
}

impl Table {
    pub(super) fn new(text_columns: usize, head: &[&str]) -> Table {
        Table {
            rows: vec![head.iter().map(|name| (*name).to_owned()).collect()],
            text_columns,
        }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Whether it has nothing below its head.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.len() <= 1
    }

    pub(super) fn render(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            self.rows
                .iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let gap = if column == 0 { "" } else { "  " };
                if column < self.text_columns {
                    line.push_str(&format!("{gap}{cell:<width$}"));
                } else {
                    line.push_str(&format!("{gap}{cell:>width$}"));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A text of somebody else's: what a terminal would take for a command is shown and not done.
pub(super) fn plain(text: &str) -> String {
    let shown = |character: char| {
        let escaped = character.is_control().then(|| character.escape_default());
        let itself = escaped.is_none().then_some(character);
        escaped.into_iter().flatten().chain(itself)
    };
    text.chars().flat_map(shown).collect()
}

/// When something was.
pub(super) fn moment(time: Option<&Timestamp>) -> String {
    time.map_or("-".to_owned(), ToString::to_string)
}

/// A share of 1.
pub(super) fn rate(rate: Option<f64>) -> String {
    rate.map_or("-".to_owned(), |rate| format!("{:.1} %", rate * 100.0))
}

/// Three digits, in the unit that suits.
pub(super) fn time(time: Option<Duration>) -> String {
    let Some(seconds) = time.map(seconds) else {
        return "-".to_owned();
    };
    let (figure, unit) = match seconds {
        _ if seconds < 1e-6 => (seconds * 1e9, "ns"),
        _ if seconds < 1e-3 => (seconds * 1e6, "µs"),
        _ if seconds < 1.0 => (seconds * 1e3, "ms"),
        _ => (seconds, "s"),
    };
    format!("{} {unit}", three_digits(figure))
}

pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut figure, mut unit) = (bytes as f64, 0);
    while figure >= 1024.0 && unit < UNITS.len() - 1 {
        figure /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        return format!("{bytes} B");
    }
    format!("{} {}", three_digits(figure), UNITS[unit])
}

fn three_digits(figure: f64) -> String {
    let decimals = match figure {
        _ if figure >= 100.0 => 0,
        _ if figure >= 10.0 => 1,
        _ => 2,
    };
    format!("{figure:.decimals$}")
}

pub(super) fn seconds(duration: Duration) -> f64 {
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
}

/// Yes or no.
pub(super) fn yes(yes: bool) -> String {
    (if yes { "yes" } else { "no" }).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_a_unit() {
        let time = |nanos: u64| {
            let duration = std::time::Duration::from_nanos(nanos);
            super::time(duration.try_into().ok())
        };
        assert_eq!(time(128), "128 ns");
        assert_eq!(time(1_500), "1.50 µs");
        assert_eq!(time(23_456_000), "23.5 ms");
        assert_eq!(time(137_000_000_000), "137 s");
        assert_eq!(super::time(None), "-");
        assert_eq!(
            (bytes(0), bytes(1023), bytes(1536)),
            ("0 B".into(), "1023 B".into(), "1.50 KiB".into())
        );
        assert_eq!(bytes(u64::MAX), "16777216 TiB");
        assert_eq!((rate(None), rate(Some(0.9876))), ("-".into(), "98.8 %".into()));
    }

    #[test]
    fn a_key_commands_no_terminal() {
        assert_eq!(plain("ключ a\x1b[2J\n"), "ключ a\\u{1b}[2J\\n");
    }
}
