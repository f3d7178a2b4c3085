// SPDX-License-Identifier: Apache-2.0
//! What the boot loader handed over: the command line and the memory map.

use core::slice;

/// Type of usable memory, in the E820 map and in PVH's alike.
pub const RAM: u32 = 1;

const MAX_REGIONS: usize = 32;

/// One entry of the memory map.
#[derive(Clone, Copy, Default)]
pub struct Region {
    /// First byte, guest-physical.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// [`RAM`], or one of the kinds that are not to be used.
    pub kind: u32,
}

/// The memory map, in the VMM's order.
pub struct MemoryMap {
    regions: [Region; MAX_REGIONS],
    count: usize,
}

impl MemoryMap {
    /// Its entries.
    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.count]
    }

    /// Bytes of usable memory.
    pub fn ram(&self) -> u64 {
        self.regions()
            .iter()
            .filter(|r| r.kind == RAM)
            .map(|r| r.len)
            .sum()
    }
}

/// The parts of the hand-over that this guest uses.
pub struct BootInfo {
    /// `pvh` or `linux64`.
    pub protocol: &'static str,
    /// The kernel command line.
    pub command_line: &'static str,
    /// The memory map.
    pub memory: MemoryMap,
    /// Initial RAM disk, address and length in bytes; both 0 if there is none.
    pub initrd: (u64, u64),
    /// ACPI root pointer as the loader gave it, or 0.
    pub rsdp: u64,
}

/// Reads the hand-over of either protocol.
///
/// # Safety
///
/// `info` must be what the VMM passed in the register that `protocol` names, and all it points to
/// must be mapped.
pub unsafe fn read(protocol: u32, info: u64) -> BootInfo {
    // SAFETY: the caller's promise.
    unsafe {
        if protocol == 0 {
            read_boot_params(info)
        } else {
            read_start_info(info)
        }
    }
}

/// # Safety
///
/// The address must be mapped memory.
unsafe fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: the caller's promise; alignment is not needed.
    unsafe { (address as *const T).read_unaligned() }
}

/// # Safety
///
/// `address` must be 0 or point to mapped, zero-terminated text that nothing overwrites.
unsafe fn text(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    let mut len = 0;
    // SAFETY: the caller's promise; the bound is Linux's own.
    unsafe {
        while len < 4096 && peek::<u8>(address + len) != 0 {
            len += 1;
        }
        let bytes = slice::from_raw_parts(address as *const u8, len as usize);
        core::str::from_utf8(bytes).unwrap_or("")
    }
}

/// `struct boot_params`, Linux `Documentation/arch/x86/zero-page.rst`.
///
/// # Safety
///
/// As [`read`].
unsafe fn read_boot_params(info: u64) -> BootInfo {
    let mut regions = [Region::default(); MAX_REGIONS];
    // SAFETY: the caller's promise; offsets are the ABI's.
    unsafe {
        let count = usize::from(peek::<u8>(info + 0x1e8)).min(MAX_REGIONS);
        for (i, region) in regions[..count].iter_mut().enumerate() {
            let entry = info + 0x2d0 + 20 * i as u64;
            *region = Region {
                start: peek(entry),
                len: peek(entry + 8),
                kind: peek(entry + 16),
            };
        }
        let high: u32 = peek(info + 0xc8);
        let low: u32 = peek(info + 0x228);
        BootInfo {
            protocol: "linux64",
            command_line: text(u64::from(high) << 32 | u64::from(low)),
            memory: MemoryMap { regions, count },
            initrd: (
                peek::<u32>(info + 0x218).into(),
                peek::<u32>(info + 0x21c).into(),
            ),
            rsdp: peek(info + 0x70),
        }
    }
}

/// `struct hvm_start_info`, Xen `public/arch-x86/hvm/start_info.h`.
///
/// # Safety
///
/// As [`read`].
unsafe fn read_start_info(info: u64) -> BootInfo {
    let mut regions = [Region::default(); MAX_REGIONS];
    // SAFETY: the caller's promise; offsets are the ABI's.
    unsafe {
        let modules: u32 = peek(info + 12);
        let module: u64 = peek(info + 16);
        let table: u64 = peek(info + 40);
        let version: u32 = peek(info + 4);
        // Version 0 has no memory map.
        let count = if version == 0 {
            0
        } else {
            (peek::<u32>(info + 48) as usize).min(MAX_REGIONS)
        };
        for (i, region) in regions[..count].iter_mut().enumerate() {
            let entry = table + 24 * i as u64;
            *region = Region {
                start: peek(entry),
                len: peek(entry + 8),
                kind: peek(entry + 16),
            };
        }
        BootInfo {
            protocol: "pvh",
            command_line: text(peek(info + 24)),
            memory: MemoryMap { regions, count },
            initrd: if modules == 0 {
                (0, 0)
            } else {
                (peek(module), peek(module + 8))
            },
            rsdp: peek(info + 32),
        }
    }
}
