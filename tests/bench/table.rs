// SPDX-License-Identifier: Apache-2.0
//! The rows, and how they are shown.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde::Serialize;

use crate::program::{CLOUD_HYPERVISOR, QEMU};

/// Whether more is better.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// A rate.
    Higher,
    /// A time or a size.
    Lower,
}

/// What a row says.
#[derive(Clone, Serialize)]
pub(crate) struct Head {
    name: String,
    unit: &'static str,
    better: Better,
}

impl Head {
    /// A row called `name`.
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, better: Better) -> Self {
        Self {
            name: name.into(),
            unit,
            better,
        }
    }
}

/// One figure.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    head: Head,
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
const OTHERS: [&str; 4] = ["firecracker", "bare C", CLOUD_HYPERVISOR, QEMU];

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
        let head = Head::new(name, unit, better);
        self.take_all(&[head], self.rounds, programs, |program| {
            Ok(vec![measure(program)?])
        })
    }

    /// Takes several figures of each program in one measurement, `rounds` times at most. A figure
    /// that is not a number says that the program refused.
    ///
    /// # Errors
    ///
    /// A measurement fails.
    pub(crate) fn take_all(
        &mut self,
        heads: &[Head],
        rounds: usize,
        programs: &[&'static str],
        mut measure: impl FnMut(&'static str) -> io::Result<Vec<f64>>,
    ) -> io::Result<()> {
        if !heads.iter().any(|head| head.name.contains(&self.only)) {
            return Ok(());
        }
        let rounds = rounds.min(self.rounds);
        let mut samples = vec![vec![Vec::new(); programs.len()]; heads.len()];
        for round in 1..=rounds {
            let name = heads.first().map_or("", |head| &head.name);
            progress(&format!("{name}, round {round} of {rounds}"));
            for (at, program) in programs.iter().enumerate() {
                for (row, figure) in samples.iter_mut().zip(measure(program)?) {
                    row[at].push(figure);
                }
            }
        }
        progress("");
        for (head, samples) in heads.iter().zip(samples) {
            if head.name.contains(&self.only) {
                let medians = programs.iter().zip(&samples);
                let medians = medians.map(|(&p, s)| (p, median(s))).collect();
                self.rows.push(Row {
                    head: head.clone(),
                    medians,
                    samples,
                });
            }
        }
        Ok(())
    }

    /// Prints the table for a person. A ratio over 1 means that brume has more of it.
    pub(crate) fn print(&self) {
        let others: Vec<_> = OTHERS
            .into_iter()
            .filter(|name| self.rows.iter().any(|r| r.of(name).is_some()))
            .collect();
        let mut out = io::stdout().lock();
        let names = self.rows.iter().map(|row| row.head.name.len());
        let width = names.max().unwrap_or(0).max(48);
        let mut header = format!("{:width$} {:>7} {:>12}", "", "unit", "brume");
        for other in &others {
            header += &format!(" {other:>16} {:>7}", "ratio");
        }
        // A reader that has gone needs no table.
        let _ = writeln!(out, "{header}  better");
        for row in &self.rows {
            let mut line = format!(
                "{:width$} {:>7} {}",
                row.head.name,
                row.head.unit,
                figure(row.of("brume"))
            );
            for other in &others {
                let (figure, ratio) = (figure(row.of(other)), ratio(row.ratio(other)));
                line += &format!(" {figure:>16} {ratio}");
            }
            let better = match row.head.better {
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
        Some(value) if value.is_nan() => format!("{:>12}", "refused"),
        Some(value) if value < 100.0 => format!("{value:>12.2}"),
        Some(value) => format!("{value:>12.0}"),
    }
}

fn ratio(value: Option<f64>) -> String {
    let value = value.filter(|value| value.is_finite());
    value.map_or_else(|| format!("{:>7}", "-"), |value| format!("{value:>7.2}"))
}

/// The middle one.
pub(crate) fn median(samples: &[f64]) -> f64 {
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
