//! Tables for people.
//!
//! Owns their layout: the first columns are text, the others figures, aligned to the right. Invariant: what a cell holds cannot steer the
//! terminal, nor break its line.

use std::fmt::Write;

/// Rows below a head.
#[derive(Debug, Clone)]
pub struct Table {
    rows: Vec<Vec<String>>,
    /// The columns that hold text.
    text_columns: usize,
}

impl Table {
    /// A table without rows, whose first columns are text.
    pub fn new(text_columns: usize, head: &[&str]) -> Table {
        Table {
            rows: vec![head.iter().map(|name| (*name).to_owned()).collect()],
            text_columns,
        }
    }

    /// Adds a row. What it has too few of is empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    /// The lines, the head first.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let mut widths = vec![0; columns];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let gap = if column == 0 { "" } else { "  " };
                // Writing to a String cannot fail.
                let _ = if column < self.text_columns {
                    write!(line, "{gap}{cell:<width$}")
                } else {
                    write!(line, "{gap}{cell:>width$}")
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// The text with everything that is no visible character escaped.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control()
                || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            let whole = (!escaped).then_some(c);
            escaped.then(|| c.escape_default()).into_iter().flatten().chain(whole)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_aligned_to_the_left_and_figures_to_the_right() {
        let mut table = Table::new(1, &["key", "bytes"]);
        table.row(["a".to_owned(), "12345678".to_owned()]);
        table.row(["longer".to_owned(), "1".to_owned()]);
        assert_eq!(table.render(), "key        bytes\na       12345678\nlonger         1\n");
    }

    #[test]
    fn no_cell_steers_the_terminal() {
        assert_eq!(printable("a\x1b[2J\nb\u{202e}é"), "a\\u{1b}[2J\\nb\\u{202e}é");
    }
}
