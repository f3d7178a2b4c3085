// SPDX-License-Identifier: Apache-2.0
//! The rows, and how they are shown.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde::Serialize;

/// Whether more is better.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// A rate.
    Higher,
    /// A time or a size.
    Lower,
}

/// One figure.
#[derive(Serialize)]
struct Row {
    name: String,
    unit: &'static str,
    better: Better,
    /// One column for each program that was measured, with its median.
    medians: Vec<(&'static str, f64)>,
    /// Each program's figures in the order in which they were taken.
    samples: Vec<Vec<f64>>,
}

impl Row {
    fn of(&self, program: &str) -> Option<f64> {
        self.medians
            .iter()
            .find(|(name, _)| *name == program)
            .map(|&(_, median)| median)
    }

    /// brume's median over the other's.
    fn ratio(&self, program: &str) -> Option<f64> {
        Some(self.of("brume")? / self.of(program)?)
    }
}

/// All figures.
pub(crate) struct Table {
    rounds: usize,
    only: String,
    rows: Vec<Row>,
}

/// The programs that can stand beside brume.
const OTHERS: [&str; 2] = ["firecracker", "bare C"];

impl Table {
    /// An empty table; figures are taken `rounds` times, and only those whose name has `only`.
    pub(crate) fn new(rounds: usize, only: &str) -> Self {
        Self {
            rounds: rounds.max(1),
            only: only.into(),
            rows: Vec::new(),
        }
    }

    /// Takes the figure `name` of each program in turn, round by round.
    ///
    /// # Errors
    ///
    /// A measurement fails.
    pub(crate) fn take(
        &mut self,
        name: &str,
        unit: &'static str,
        better: Better,
        programs: &[&'static str],
        mut measure: impl FnMut(&'static str) -> io::Result<f64>,
    ) -> io::Result<()> {
        if !name.contains(&self.only) {
            return Ok(());
        }
        let mut samples = vec![Vec::new(); programs.len()];
        for round in 1..=self.rounds {
            progress(&format!("{name}, round {round} of {}", self.rounds));
            for (program, samples) in programs.iter().zip(&mut samples) {
                samples.push(measure(program)?);
            }
        }
        progress("");
        let medians = programs
            .iter()
            .zip(&samples)
            .map(|(&p, s)| (p, median(s)))
            .collect();
        self.rows.push(Row {
            name: name.into(),
            unit,
            better,
            medians,
            samples,
        });
        Ok(())
    }

    /// Prints the table for a person. A ratio over 1 means that brume has more of it.
    pub(crate) fn print(&self) {
        let others: Vec<_> = OTHERS
            .into_iter()
            .filter(|name| self.rows.iter().any(|r| r.of(name).is_some()))
            .collect();
        let mut out = io::stdout().lock();
        let mut header = format!("{:38} {:>7} {:>12}", "", "unit", "brume");
        for other in &others {
            header += &format!(" {other:>12} {:>7}", "ratio");
        }
        // A reader that has gone needs no table.
        let _ = writeln!(out, "{header}  better");
        for row in &self.rows {
            let mut line = format!(
                "{:38} {:>7} {}",
                row.name,
                row.unit,
                figure(row.of("brume"))
            );
            for other in &others {
                line += &format!(" {} {}", figure(row.of(other)), ratio(row.ratio(other)));
            }
            let better = match row.better {
                Better::Higher => "more",
                Better::Lower => "less",
            };
            let _ = writeln!(out, "{line}  {better}");
        }
    }

    /// Writes the table for programs.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(crate) fn write_json(&self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(path, serde_json::to_string_pretty(&self.rows)?)
    }
}

fn figure(value: Option<f64>) -> String {
    match value {
        None => format!("{:>12}", "-"),
        Some(value) if value < 100.0 => format!("{value:>12.2}"),
        Some(value) => format!("{value:>12.0}"),
    }
}

fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| format!("{:>7}", "-"), |value| format!("{value:>7.2}"))
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What is being measured, on a terminal.
fn progress(text: &str) {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
    }
}
