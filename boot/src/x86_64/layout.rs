// SPDX-License-Identifier: Apache-2.0
//! The guest's address map: guest-physical addresses, I/O ports and interrupts, each given once.
//!
//! RAM fills `0..0xc000_0000` first and goes on at 4 GiB; the last GiB below 4 GiB belongs to
//! devices. Boot structures lie in the first 640 KiB, which every kernel keeps its hands off until
//! it has copied them; tables that the guest reads later lie in areas that the memory map reserves.

use vm_memory::GuestAddress;

use crate::MmioDevice;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

// Boot structures, in base memory. A protocol uses either the zero page or the PVH structures.

/// Global descriptor table of the first vCPU.
pub const GDT_START: u64 = 0x500;
/// `hvm_start_info` of the PVH protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list of the PVH protocol: the initrd.
pub const PVH_MODULES: u64 = 0x6040;
/// Memory map of the PVH protocol.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// The zero page: `boot_params` of the Linux boot protocol, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer. The page below it is nobody else's.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables for the 64-bit entry: PML4, page directory pointers, then four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// End of the page tables.
pub const PAGE_TABLES_END: u64 = PAGE_TABLES + 6 * PAGE;
/// The kernel's command line, with its terminating NUL.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Bytes that a command line may have, with its terminating NUL: `COMMAND_LINE_SIZE` of x86 Linux.
pub const CMDLINE_MAX_SIZE: usize = 2048;

// Tables that the guest reads after it has taken over memory.

/// The MP floating pointer and the MP table: the last KiB of base memory, where guests look
/// first. The memory map reserves it.
pub const MP_TABLE_START: u64 = 0x9_fc00;
/// Bytes for both.
pub const MP_TABLE_SIZE: usize = 1024;
/// End of base memory (640 KiB).
pub const BASE_MEMORY_END: u64 = MP_TABLE_START + MP_TABLE_SIZE as u64;
/// The ACPI root pointer, followed by all other tables. Guests that are not told the address scan
/// from here. The memory map reserves all from here to [`HIGH_MEMORY_START`].
pub const ACPI_START: u64 = 0xe_0000;
/// End of the area for ACPI tables.
pub const ACPI_END: u64 = VMGENID_PAGE;
/// The page of the VM generation id: 16 bytes that no other machine has, and that a machine which
/// goes on from a snapshot gets anew. The rest of the page is the VMM's. Above it, up to
/// `0xf_0000`, lies [`VMCLOCK_PAGE`]; guests take what follows for a ROM.
pub const VMGENID_PAGE: u64 = 0xe_e000;
/// The page of the VMClock device: counts how often the machine went on from a snapshot.
pub const VMCLOCK_PAGE: u64 = VMGENID_PAGE + PAGE;
/// Size of the VMClock device's memory in bytes.
pub const VMCLOCK_SIZE: u64 = PAGE;

// RAM.

/// Where RAM above the low structures begins: kernels are loaded from here.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// End of low RAM, and start of the hole for devices.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// End of the hole: RAM goes on here.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// Least RAM that a guest can have: one MiB for the structures above and one for a kernel.
pub const MIN_MEMORY: u64 = 2 * MIB;
/// Most RAM that a guest can have: KVM's limit of 2^31 - 1 pages in one slot, rounded down.
pub const MAX_MEMORY: u64 = 4 << 40;

// Devices in the hole.

/// The boot timer's page.
pub const BOOT_TIMER_ADDRESS: u64 = MMIO_HOLE_START;
/// Size of the boot timer's window in bytes.
pub const BOOT_TIMER_SIZE: u64 = PAGE;
/// Where the windows of virtio-mmio devices begin.
pub const VIRTIO_MMIO_START: u64 = BOOT_TIMER_ADDRESS + BOOT_TIMER_SIZE;
/// Size of one virtio-mmio window in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = PAGE;
/// End of the space for virtio-mmio windows.
pub const VIRTIO_MMIO_END: u64 = IOAPIC_ADDRESS;
/// The I/O APIC of KVM's in-kernel interrupt controllers.
pub const IOAPIC_ADDRESS: u64 = 0xfec0_0000;
/// The local APICs.
pub const LAPIC_ADDRESS: u64 = 0xfee0_0000;
/// One page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS_ADDRESS: u64 = 0xfffb_d000;

// Interrupts.

/// Pins of KVM's I/O APIC: GSIs 0 to 23.
pub const IOAPIC_PINS: u8 = 24;
/// Last GSI that is an I/O APIC pin.
pub const LAST_GSI: u32 = 23;
/// GSI of the keyboard controller.
pub const KEYBOARD_GSI: u32 = 1;
/// GSI of the Generic Event Device, which tells a guest that it has become another machine. A PC
/// has its second serial port there, which this machine has not.
pub const GENERATION_GSI: u32 = 3;
/// GSI of the first serial port.
pub const COM1_GSI: u32 = 4;
/// First GSI for virtio-mmio devices: those below belong to the timer, the keyboard, the cascade,
/// the Generic Event Device and the serial port.
pub const FIRST_VIRTIO_GSI: u32 = 5;
/// Devices that can have a GSI of their own.
pub const MAX_VIRTIO_MMIO_DEVICES: usize = 19;
/// Most vCPUs of a guest.
pub const MAX_VCPUS: u8 = 32;

// I/O ports.

/// First serial port (16550).
pub const COM1_PORT: u16 = 0x3f8;
/// Ports of a serial port.
pub const COM1_SIZE: u8 = 8;
/// i8042 data port; its command port is at `0x64`. Not in the ACPI tables: a guest that finds it
/// there looks for a keyboard, and waits seconds for one that does not answer.
pub const I8042_DATA_PORT: u16 = 0x60;
/// i8042 command and status port: writing `0xfe` resets the guest.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// pvpanic, one byte: a guest's kernel writes 1 when it has panicked.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control register, one byte: `SLP_TYP` in bits 4:2, `SLP_EN` in bit 5 (ACPI 6.5,
/// 4.8.3.7).
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register, one byte: `WAK_STS` in bit 7, written back to clear.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, one byte.
pub const ACPI_RESET_PORT: u16 = 0x602;
/// Value that resets the guest when it is written to [`ACPI_RESET_PORT`].
pub const ACPI_RESET_VALUE: u8 = 1;
/// `SLP_TYP` of the soft-off state S5, as the `_S5` object gives it.
pub const ACPI_S5_SLEEP_TYPE: u8 = 5;

const _: () = assert!(PVH_MEMORY_MAP < ZERO_PAGE);
const _: () = assert!(BOOT_STACK < PAGE_TABLES);
const _: () = assert!(PAGE_TABLES_END <= CMDLINE_START);
const _: () = assert!(CMDLINE_START + CMDLINE_MAX_SIZE as u64 <= MP_TABLE_START);
const _: () = assert!(ACPI_START < ACPI_END);
const _: () = assert!(VMCLOCK_PAGE + VMCLOCK_SIZE <= HIGH_MEMORY_START);
const _: () = assert!(GENERATION_GSI < FIRST_VIRTIO_GSI);
const _: () = assert!(FIRST_VIRTIO_GSI as usize + MAX_VIRTIO_MMIO_DEVICES - 1 == LAST_GSI as usize);
const _: () = assert!(LAST_GSI + 1 == IOAPIC_PINS as u32);

/// A size of RAM that a guest cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemorySizeError {
    /// No room for a kernel.
    #[error("{0} bytes of memory are too few: a guest needs at least {MIN_MEMORY} bytes (2 MiB)")]
    TooSmall(u64),
    /// More than KVM can map.
    #[error("{0} bytes of memory are too many: a guest can have {MAX_MEMORY} bytes (4 TiB)")]
    TooLarge(u64),
    /// Not whole pages.
    #[error("{0} bytes of memory are not a whole number of 4 KiB pages")]
    NotPages(u64),
}

/// Where `size` bytes of RAM lie: one region below the hole, and a second one from 4 GiB up if the
/// first does not hold all.
///
/// # Errors
///
/// `size` must be a multiple of 4096 from [`MIN_MEMORY`] to [`MAX_MEMORY`].
pub fn memory_regions(size: u64) -> Result<Vec<(GuestAddress, usize)>, MemorySizeError> {
    if size < MIN_MEMORY {
        return Err(MemorySizeError::TooSmall(size));
    }
    if size > MAX_MEMORY {
        return Err(MemorySizeError::TooLarge(size));
    }
    if !size.is_multiple_of(PAGE) {
        return Err(MemorySizeError::NotPages(size));
    }
    let low = size.min(MMIO_HOLE_START);
    let mut regions = Vec::with_capacity(2);
    for (start, size) in [(0, low), (MMIO_HOLE_END, size - low)] {
        if size > 0 {
            let size = usize::try_from(size).map_err(|_| MemorySizeError::TooLarge(size))?;
            regions.push((GuestAddress(start), size));
        }
    }
    Ok(regions)
}

/// Window and interrupt of the virtio-mmio device number `index`, or `None` if there is no
/// interrupt left for it.
pub fn virtio_mmio_device(index: usize) -> Option<MmioDevice> {
    if index >= MAX_VIRTIO_MMIO_DEVICES {
        return None;
    }
    let number = u32::try_from(index).ok()?;
    Some(MmioDevice {
        address: VIRTIO_MMIO_START + u64::from(number) * VIRTIO_MMIO_SIZE,
        size: VIRTIO_MMIO_SIZE,
        gsi: FIRST_VIRTIO_GSI + number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_up_to_the_hole_is_one_region() {
        assert_eq!(
            memory_regions(MIN_MEMORY),
            Ok(vec![(GuestAddress(0), 2 << 20)])
        );
        assert_eq!(
            memory_regions(3 * GIB),
            Ok(vec![(GuestAddress(0), 3 << 30)])
        );
    }

    #[test]
    fn ram_beyond_the_hole_goes_on_at_4_gib_and_nothing_is_lost() {
        assert_eq!(
            memory_regions(3 * GIB + PAGE),
            Ok(vec![
                (GuestAddress(0), 3 << 30),
                (GuestAddress(4 * GIB), 4096)
            ])
        );
        let regions = memory_regions(MAX_MEMORY).unwrap();
        let sum: u64 = regions.iter().map(|(_, size)| *size as u64).sum();
        assert_eq!(sum, MAX_MEMORY);
    }

    #[test]
    fn impossible_sizes_are_refused_with_their_reason() {
        for size in [0, 1 << 20, MIN_MEMORY - 1] {
            assert_eq!(memory_regions(size), Err(MemorySizeError::TooSmall(size)));
        }
        assert_eq!(
            memory_regions(u64::MAX),
            Err(MemorySizeError::TooLarge(u64::MAX))
        );
        let odd = MIN_MEMORY + 1;
        assert_eq!(memory_regions(odd), Err(MemorySizeError::NotPages(odd)));
    }

    #[test]
    fn virtio_devices_have_windows_and_interrupts_of_their_own() {
        let devices: Vec<_> = (0..).map_while(virtio_mmio_device).collect();
        assert_eq!(devices.len(), MAX_VIRTIO_MMIO_DEVICES);
        assert_eq!(
            devices[0],
            MmioDevice {
                address: 0xc000_1000,
                size: 4096,
                gsi: 5
            }
        );
        assert!(
            devices
                .windows(2)
                .all(|pair| pair[0].address + pair[0].size == pair[1].address)
        );
        assert_eq!(devices[18].gsi, LAST_GSI);
    }
}
