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
        entry(
            layout::ACPI_START..layout::HIGH_MEMORY_START,
            Kind::Reserved,
        ),
    ];
    for range in guest::ram(memory) {
        let start = range.start.max(layout::HIGH_MEMORY_START);
        if start < range.end {
            map.push(entry(start..range.end, Kind::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    fn map_of(ranges: &[(u64, usize)]) -> Vec<(Range<u64>, Kind)> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(start, size)| (GuestAddress(start), size))
            .collect();
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        memory_map(&memory)
            .into_iter()
            .map(|entry| (entry.range, entry.kind))
            .collect()
    }

    #[test]
    fn tables_are_reserved_and_the_rest_is_ram() {
        assert_eq!(
            map_of(&[(0, 4 << 20)]),
            [
                (0..0x9_fc00, Kind::Ram),
                (0x9_fc00..0xa_0000, Kind::Reserved),
                (0xe_0000..0x10_0000, Kind::Reserved),
                (0x10_0000..0x40_0000, Kind::Ram),
            ]
        );
    }

    #[test]
    fn the_pages_that_tell_clones_apart_are_reserved() {
        let map = map_of(&[(0, 4 << 20)]);
        for page in [layout::VMGENID_PAGE, layout::VMCLOCK_PAGE] {
            let holders: Vec<_> = map
                .iter()
                .filter(|(range, _)| range.start < page + 4096 && page < range.end)
                .collect();
            assert_eq!(
                holders,
                [&(
                    layout::ACPI_START..layout::HIGH_MEMORY_START,
                    Kind::Reserved
                )]
            );
        }
    }

    #[test]
    fn ram_above_4_gib_is_in_the_map() {
        let map = map_of(&[(0, 4 << 20), (1 << 32, 1 << 20)]);
        assert_eq!(
            map.last(),
            Some(&(1 << 32..(1 << 32) + (1 << 20), Kind::Ram))
        );
    }

    #[test]
    fn low_ram_starts_at_0_and_ends_before_the_hole() {
        let end = |start, size| {
            let memory: GuestMemoryMmap =
                GuestMemoryMmap::from_ranges(&[(GuestAddress(start), size)]).unwrap();
            low_ram_end(&memory)
        };
        assert_eq!(end(0, 4 << 20), 4 << 20);
        assert_eq!(end(0x1000, 4 << 20), 0);
        assert_eq!(end(0, 5 << 30), 3 << 30);
    }
}
