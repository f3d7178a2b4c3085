// SPDX-License-Identifier: Apache-2.0
//! The block device: a file of 1 GiB in the host's page cache.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde_json::json;

use crate::program::Programs;
use crate::table::{Better, Table};

const DISK_MIB: usize = 1024;
const ENGINES: [&str; 2] = ["Sync", "Async"];
/// Step, queue depth, what is counted, in which unit, and how many of that the unit holds.
const LOADS: [(&str, u32, &str, &str, f64); 6] = [
    ("blk-randread", 1, "ops", "op/s", 1.0),
    ("blk-randread", 32, "ops", "op/s", 1.0),
    ("blk-randwrite", 1, "ops", "op/s", 1.0),
    ("blk-randwrite", 32, "ops", "op/s", 1.0),
    ("blk-seqread", 4, "bytes", "GB/s", 1e9),
    ("blk-seqwrite", 4, "bytes", "GB/s", 1e9),
];

/// Takes the rows.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(programs: &Programs, table: &mut Table, ms: u32) -> io::Result<()> {
    let disk = programs.folder().join("disk.img");
    fill(&disk)?;
    for (step, depth, key, unit, scale) in LOADS {
        for engine in ENGINES {
            let name = format!("{step} depth {depth}, {engine}");
            let parts = json!({"drives": [{
                "drive_id": "d", "is_root_device": false, "path_on_host": disk, "io_engine": engine
            }]});
            let args = format!("bare.do={step} bare.qd={depth} bare.ms={ms}");
            table.take(&name, unit, Better::Higher, &programs.monitors(), |name| {
                let output = programs.figure(name, &args, &parts)?;
                if output.number(step, "errors")? != 0.0 {
                    return Err(io::Error::other(format!("{name} met errors in {step}")));
                }
                Ok(output.rate(step, key)? / scale)
            })?;
        }
    }
    Ok(())
}

/// Makes a file without holes, and leaves it in the page cache.
fn fill(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut block = vec![0; 1 << 20];
    for number in 0..DISK_MIB {
        for (index, byte) in block.iter_mut().enumerate() {
            *byte = ((index ^ (index >> 8)) + number) as u8;
        }
        file.write_all(&block)?;
    }
    // What is written back later would disturb the figures.
    file.sync_all()
}
