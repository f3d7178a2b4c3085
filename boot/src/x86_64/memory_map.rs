// SPDX-License-Identifier: Apache-2.0
//! The memory map that a kernel is handed: which guest-physical addresses are RAM and which of them
//! hold tables (ACPI 6.5, chapter 15, "System Address Map Interfaces").

use std::ops::Range;

use vm_memory::GuestMemoryBackend;

use super::layout;
use crate::guest;

/// What an address range holds. The numbers are the map's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// RAM for anything.
    Ram = 1,
    /// Not to be touched except as the tables in it say.
    Reserved = 2,
}

/// One line of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) range: Range<u64>,
    pub(super) kind: Kind,
}

/// End of the RAM that starts at address 0, which is 0 if there is none, and never beyond the hole.
pub(super) fn low_ram_end<M: GuestMemoryBackend>(memory: &M) -> u64 {
    guest::ram(memory)
        .first()
        .filter(|range| range.start == 0)
        .map_or(0, |range| range.end.min(layout::MMIO_HOLE_START))
}

/// The map of `memory`.
pub(super) fn memory_map<M: GuestMemoryBackend>(memory: &M) -> Vec<Entry> {
    let entry = |range, kind| Entry { range, kind };
    let mut map = vec![
        entry(0..layout::MP_TABLE_START, Kind::Ram),
        entry(
            layout::MP_TABLE_START..layout::BASE_MEMORY_END,
            Kind::Reserved,
        ),
        entry(layout::ACPI_START..layout::ACPI_END, Kind::Reserved),
    ];
    for range in guest::ram(memory) {
        let start = range.start.max(layout::HIGH_MEMORY_START);
        if start < range.end {
            map.push(entry(start..range.end, Kind::Ram));
        }
    }
    map
}
