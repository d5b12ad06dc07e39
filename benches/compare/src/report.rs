//! What was measured, for people and for programs.
//!
//! Owns medians and spreads, the Markdown tables and the JSON. Does not own what is measured. A row is a ratio of two figures of one round: of one run,
//! on one machine, at nearly one time; its median and its spread are those over the rounds.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::{Failure, race::Raced};

/// What a row has to reach.
#[derive(Debug, Clone, Copy)]
pub enum Bar {
    AtLeast(f64),
    AtMost(f64),
    /// None: it is there to be known.
    Open,
}

impl Bar {
    fn is_reached(self, value: f64) -> Option<bool> {
        match self {
            Bar::AtLeast(bar) => Some(value >= bar),
            Bar::AtMost(bar) => Some(value <= bar),
            Bar::Open => None,
        }
    }

    fn text(self) -> String {
        match self {
            Bar::AtLeast(bar) => format!("≥ {bar}"),
            Bar::AtMost(bar) => format!("≤ {bar}"),
            Bar::Open => String::new(),
        }
    }
}

struct Row {
    name: String,
    values: Vec<f64>,
    bar: Bar,
}

/// The report of one run.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
    figures: Vec<Value>,
    table: String,
}

impl Report {
    /// A row, of a value for each round.
    pub fn row(&mut self, name: impl Into<String>, bar: Bar, values: Vec<f64>) {
        let name = name.into();
        eprintln!("{name}: {:.2} {}", median(&values), bar.text());
        self.rows.push(Row { name, values, bar });
    }

    /// What the contestants of a race did, as it was.
    pub fn raced(&mut self, raced: &Raced) {
        for (name, figures) in raced.names.iter().zip(&raced.figures) {
            let rates: Vec<f64> = figures.iter().map(|figure| figure.per_second).collect();
            let us: Vec<f64> = figures.iter().filter_map(|figure| figure.server_us).collect();
            let server_us = (!us.is_empty()).then(|| median(&us));
            let shown = server_us.map_or_else(String::new, |us| format!("{us:.1}"));
            let (least, most) = spread(&rates);
            self.table.push_str(&format!(
                "| {name} | {:.0} | {least:.0} to {most:.0} | {shown} |\n",
                median(&rates)
            ));
            self.figures
                .push(json!({"name": name, "per_second": rates, "server_us": us}));
        }
    }

    /// Writes `results.json` and `results.md` into a directory. The Markdown.
    pub fn write(&self, directory: &Path, about: &Value) -> Result<String, Failure> {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let middle = median(&row.values);
                json!({
                    "row": row.name, "bar": row.bar.text(), "median": middle, "values": row.values,
                    "reached": row.bar.is_reached(middle),
                })
            })
            .collect();
        fs::create_dir_all(directory)?;
        let results = json!({"about": about, "rows": rows, "figures": self.figures});
        fs::write(directory.join("results.json"), serde_json::to_string_pretty(&results)?)?;
        let markdown = self.markdown();
        fs::write(directory.join("results.md"), &markdown)?;
        Ok(markdown)
    }

    fn markdown(&self) -> String {
        let mut text = String::from("| row | median | spread | bar | |\n|---|---|---|---|---|\n");
        for Row { name, values, bar } in &self.rows {
            let (middle, (least, most)) = (median(values), spread(values));
            let verdict = match bar.is_reached(middle) {
                Some(true) => "reached",
                Some(false) => "**not reached**",
                None => "",
            };
            text.push_str(&format!(
                "| {name} | {} | {} to {} | {} | {verdict} |\n",
                short(middle),
                short(least),
                short(most),
                bar.text()
            ));
        }
        text.push_str("\n| contestant | median per second | spread | server's µs each |\n|---|---|---|---|\n");
        text.push_str(&self.table);
        text
    }
}

fn short(value: f64) -> String {
    if value.abs() >= 20.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

/// The middle one, or the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

fn spread(values: &[f64]) -> (f64, f64) {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    (least, values.iter().copied().fold(f64::NEG_INFINITY, f64::max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), (1.0, 3.0));
    }

    #[test]
    fn a_bar_itself_is_reached() {
        assert_eq!(Bar::AtLeast(0.85).is_reached(0.85), Some(true));
        assert_eq!(Bar::AtMost(1.5).is_reached(1.51), Some(false));
        assert_eq!(Bar::Open.is_reached(1.0), None);
    }
}
