// SPDX-License-Identifier: Apache-2.0
//! `brume ctl memory`: which pages of the guest's memory were written, and where they are.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::{Ctl, aligned, print};
use crate::exit::Failure;
use crate::snapshot::absolute;

#[derive(Subcommand)]
pub(super) enum MemoryCommand {
    /// Show how many pages were written since the last snapshot or reset; with --json, which
    Dirty {
        /// Name the runs of pages that were written
        #[arg(long)]
        ranges: bool,
    },
    /// Show how fast pages are written
    Rate {
        /// How long to count, in milliseconds
        #[arg(long, value_name = "MS", default_value_t = 1000)]
        window: u32,
    },
    /// Note which pages are written, stop it, or forget those of before
    Tracking {
        /// What is to be done
        tracking: TrackingArg,
    },
    /// Show where the memory is in the address space of the machine's process
    Mappings,
    /// Show which pages the host holds of a machine that is paused
    Pages,
    /// Write down which pages are in use, for `brume restore --working-set`
    WorkingSet {
        /// The file to write
        file: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum TrackingArg {
    On,
    Off,
    Reset,
}

impl Ctl {
    pub(super) fn memory(&self, command: MemoryCommand) -> Result<(), Failure> {
        match command {
            MemoryCommand::Dirty { ranges } if self.json => {
                let form = if ranges { "ranges" } else { "bitmap" };
                self.print("GET", &format!("/memory/dirty?form={form}"), None)
            }
            MemoryCommand::Dirty { ranges } => {
                let pages = self.get("/memory/dirty?form=ranges")?;
                print(&dirty_table(&pages, ranges))
            }
            MemoryCommand::Rate { window } => {
                let path = format!("/memory/dirty/rate?window_ms={window}");
                if self.json {
                    return self.print("GET", &path, None);
                }
                print(&rate_table(&self.get(&path)?))
            }
            MemoryCommand::Tracking { tracking } => {
                let tracking = match tracking {
                    TrackingArg::On => "On",
                    TrackingArg::Off => "Off",
                    TrackingArg::Reset => "Reset",
                };
                let body = json!({ "tracking": tracking });
                self.print("PUT", "/memory/dirty", Some(&body))
            }
            MemoryCommand::Mappings => self.print("GET", "/memory/mappings", None),
            MemoryCommand::Pages => self.print("GET", "/memory", None),
            MemoryCommand::WorkingSet { file } => {
                let body = json!({ "path": absolute(&file)? });
                self.print("PUT", "/memory/working-set", Some(&body))
            }
        }
    }
}

/// Pages that were written, a line for each region, and for each run if `ranges` are wanted.
fn dirty_table(pages: &Value, ranges: bool) -> String {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let page_size = number(&pages["page_size"]);
    let size = |pages: u64| mib(pages.saturating_mul(page_size));
    let tracking = match pages["tracking"].as_bool() {
        Some(true) => "on",
        _ => "off: every page that the host holds counts",
    };
    let total = number(&pages["dirty_pages"]);
    let mut rows = vec![
        ("tracking".to_owned(), tracking.to_owned()),
        (
            "written".to_owned(),
            format!("{total} pages, {}", size(total)),
        ),
    ];
    for region in pages["regions"].as_array().into_iter().flatten() {
        let address = number(&region["guest_address"]);
        let dirty = number(&region["dirty_pages"]);
        rows.push((
            format!("{address:#x}"),
            format!(
                "{dirty} pages, {} of {}",
                size(dirty),
                mib(number(&region["size"]))
            ),
        ));
        let runs = region["ranges"].as_array().into_iter().flatten();
        for run in runs.filter(|_| ranges) {
            let first = number(&run[0]).saturating_mul(page_size);
            rows.push((
                format!("  {:#x}", address.saturating_add(first)),
                format!("{} pages", number(&run[1])),
            ));
        }
    }
    aligned(&rows)
}

/// How fast pages are written, and by which vCPU if the host can tell.
fn rate_table(rate: &Value) -> String {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let bytes = mib(number(&rate["bytes_per_second"]));
    let pages = number(&rate["pages_per_second"]);
    let mut rows = vec![(
        "written".to_owned(),
        format!("{pages} pages, {bytes} per second"),
    )];
    let vcpus = rate["vcpus"].as_array().into_iter().flatten();
    for (index, pages) in vcpus.enumerate() {
        rows.push((
            format!("vCPU {index}"),
            format!("{} pages per second", number(pages)),
        ));
    }
    aligned(&rows)
}

fn mib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_pages_have_a_line_for_each_region_and_run() {
        let pages = json!({
            "tracking": true, "page_size": 4096, "dirty_pages": 320,
            "regions": [
                {"guest_address": 0, "size": 134_217_728, "dirty_pages": 320, "offset": 0,
                 "ranges": [[1, 256], [512, 64]]},
                {"guest_address": 0x1_0000_0000_u64, "size": 1 << 20, "dirty_pages": 0,
                 "offset": 134_217_728, "ranges": []},
            ],
        });
        let expected = "\
tracking     on
written      320 pages, 1.2 MiB
0x0          320 pages, 1.2 MiB of 128.0 MiB
0x100000000  0 pages, 0.0 MiB of 1.0 MiB";
        assert_eq!(dirty_table(&pages, false), expected);
        let lines = dirty_table(&pages, true);
        let runs: Vec<_> = lines
            .lines()
            .filter(|line| line.starts_with("  "))
            .collect();
        assert_eq!(runs, ["  0x1000     256 pages", "  0x200000   64 pages"]);
    }

    #[test]
    fn a_rate_has_a_line_for_each_vcpu() {
        let rate = json!({
            "window_ms": 1000, "pages_per_second": 512, "bytes_per_second": 2_097_152,
            "vcpus": [500, 12],
        });
        let expected = "\
written  512 pages, 2.0 MiB per second
vCPU 0   500 pages per second
vCPU 1   12 pages per second";
        assert_eq!(rate_table(&rate), expected);
    }
}
