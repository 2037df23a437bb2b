//! The report: one row per measurement, with its limit or its peer in the same run, and its goal.

use std::fmt;

/// Measurements of one quantity, in any unit, in ascending order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

/// A table of measurements, printed as Markdown.
#[derive(Debug)]
pub(crate) struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// The goal of a measurement.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Samples {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        Self(values)
    }

    /// Returns the sample of a single measurement.
    pub(crate) fn one(value: f64) -> Self {
        Self(vec![value])
    }

    /// Returns the quantile at `share`, from 0 to 1, by the nearest rank; NaN if there are no values.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        let index = (self.0.len() as f64 * share).ceil() as usize;
        self.0.get(index.saturating_sub(1).min(last)).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub(crate) fn p99(&self) -> f64 {
        self.quantile(0.99)
    }

    /// Returns the number of values that are at most `limit`.
    pub(crate) fn count_within(&self, limit: f64) -> usize {
        self.0.iter().filter(|value| **value <= limit).count()
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}

/// The median and the range.
impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({} to {})",
            figure(self.median()),
            figure(self.quantile(0.0)),
            figure(self.quantile(1.0))
        )
    }
}

impl Goal {
    /// Returns whether a value reaches the goal, as worded in the tables.
    pub(crate) fn judge(self, value: f64) -> String {
        let reached = match self {
            Self::AtLeast(goal) => value >= goal,
            Self::AtMost(goal) => value <= goal,
        };
        if reached { "yes".to_owned() } else { "**no**".to_owned() }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(goal) => write!(f, ">= {}", figure(*goal)),
            Self::AtMost(goal) => write!(f, "<= {}", figure(*goal)),
        }
    }
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self { header: header.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    /// Returns a table with the columns of a comparison with goals.
    pub(crate) fn of_goals() -> Self {
        Self::new(&["what", "measured", "limit or peer", "figure", "to reach", "reached"])
    }

    /// Adds a row that compares the median of `figure` with the goal.
    pub(crate) fn compare(
        &mut self,
        what: impl Into<String>,
        measured: impl Into<String>,
        peer: impl Into<String>,
        figure: &Samples,
        goal: Goal,
    ) {
        let reached = goal.judge(figure.median());
        self.row(&[what.into(), measured.into(), peer.into(), figure.to_string(), goal.to_string(), reached]);
    }

    pub(crate) fn row(&mut self, cells: &[String]) {
        eprintln!("    {}", cells.join(" | "));
        self.rows.push(cells.to_vec());
    }

    pub(crate) fn print(&self, title: &str) {
        let width = |column: usize| {
            let cells = self.rows.iter().chain([&self.header]).filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let line = |row: &[String]| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!(" {cell:<width$} |"));
            println!("|{}", cells.collect::<String>());
        };
        println!("\n### {title}\n");
        line(&self.header);
        println!("|{}", widths.iter().map(|width| format!("{}|", "-".repeat(width + 2))).collect::<String>());
        self.rows.iter().for_each(|row| line(row));
    }
}

/// Formats a value with three significant digits.
pub(crate) fn figure(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude >= 10_000.0 {
        format!("{:.0} k", value / 1_000.0)
    } else if magnitude >= 100.0 {
        format!("{value:.0}")
    } else if magnitude >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}
