// SPDX-License-Identifier: Apache-2.0
//! Registers of the first vCPU at the kernel's entry, and the descriptor and page tables that they
//! point to.
//!
//! Names and meanings are those of the Intel SDM, volume 3, and of `struct kvm_sregs`.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout;
use crate::error::BootError;

/// RFLAGS: bit 1 always reads as one, and interrupts are off.
const RFLAGS_RESERVED: u64 = 1 << 1;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Page table entry: present and writable.
const TABLE: u64 = 0b11;
/// Page directory entry: present, writable, a page of 2 MiB.
const LARGE_PAGE: u64 = 0b1000_0011;
const ENTRIES: usize = 512;
const TABLE_SIZE: u64 = 4096;
/// Page directories, for 1 GiB each.
const DIRECTORIES: u64 = 4;

/// Selectors, as the Linux boot protocol asks for them (`__BOOT_CS`, `__BOOT_DS`).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// A segment register with its hidden part, as in `struct kvm_segment`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Linear address of the first byte.
    pub base: u64,
    /// Offset of the last byte, in bytes whatever the granularity.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Type field of the descriptor.
    pub type_: u8,
    /// Present.
    pub present: bool,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// Default operation size is 32 bits.
    pub db: bool,
    /// Code or data, not a system segment.
    pub s: bool,
    /// 64-bit code.
    pub l: bool,
    /// The limit counts pages of 4 KiB in the descriptor.
    pub g: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Offset of its last byte.
    pub limit: u16,
}

/// Registers that differ from a vCPU's reset state; general registers that are not here are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Entry point.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Address of `boot_params` (Linux boot protocol), else 0.
    pub rsi: u64,
    /// Address of `hvm_start_info` (PVH), else 0.
    pub rbx: u64,
    /// Flags: interrupts off.
    pub rflags: u64,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3: the page tables' root, or 0.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended feature enables.
    pub efer: u64,
    /// Code segment.
    pub cs: Segment,
    /// Data segment.
    pub ds: Segment,
    /// Extra segment.
    pub es: Segment,
    /// FS segment.
    pub fs: Segment,
    /// GS segment.
    pub gs: Segment,
    /// Stack segment.
    pub ss: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table: empty, so that an exception before the kernel has its own ends
    /// in a shutdown exit and not in some handler.
    pub idt: DescriptorTable,
}

impl Segment {
    /// Flat code: execute, read, accessed.
    const fn code(long_mode: bool) -> Self {
        Self {
            selector: CODE_SELECTOR,
            type_: 0xb,
            l: long_mode,
            db: !long_mode,
            ..Self::flat()
        }
    }

    /// Flat data: read, write, accessed.
    const fn data() -> Self {
        Self {
            selector: DATA_SELECTOR,
            type_: 0x3,
            db: true,
            ..Self::flat()
        }
    }

    /// A busy task state segment (VMX entry refuses a vCPU without one). Nothing switches tasks, so
    /// nothing reads it.
    const fn task_state() -> Self {
        Self {
            base: 0,
            limit: 0x67,
            selector: TSS_SELECTOR,
            type_: 0xb,
            present: true,
            dpl: 0,
            db: false,
            s: false,
            l: false,
            g: false,
        }
    }

    const fn flat() -> Self {
        Self {
            base: 0,
            limit: u32::MAX,
            selector: 0,
            type_: 0,
            present: true,
            dpl: 0,
            db: false,
            s: true,
            l: false,
            g: true,
        }
    }

    /// The segment's descriptor (Intel SDM volume 3, figure 3-8).
    fn descriptor(&self) -> u64 {
        let limit = u64::from(if self.g { self.limit >> 12 } else { self.limit });
        let bit = |set: bool, position: u32| u64::from(set) << position;
        (limit & 0xffff)
            | (self.base & 0xff_ffff) << 16
            | u64::from(self.type_) << 40
            | bit(self.s, 44)
            | u64::from(self.dpl) << 45
            | bit(self.present, 47)
            | (limit >> 16 & 0xf) << 48
            | bit(self.l, 53)
            | bit(self.db, 54)
            | bit(self.g, 55)
            | (self.base >> 24 & 0xff) << 56
    }
}

/// Registers for the 64-bit entry at `entry`, with `boot_params` at `zero_page`; writes the GDT and
/// the page tables.
pub(super) fn long_mode<M: GuestMemoryBackend>(
    memory: &M,
    entry: u64,
    zero_page: u64,
) -> Result<Registers, BootError> {
    write_page_tables(memory)?;
    Ok(Registers {
        rsi: zero_page,
        cr0: CR0_PE | CR0_ET | CR0_PG,
        cr3: layout::PAGE_TABLES,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..flat(memory, entry, Segment::code(true))?
    })
}

/// Registers for the PVH entry at `entry`, with `hvm_start_info` at `start_info`; writes the GDT.
pub(super) fn protected_mode<M: GuestMemoryBackend>(
    memory: &M,
    entry: u64,
    start_info: u64,
) -> Result<Registers, BootError> {
    Ok(Registers {
        rbx: start_info,
        cr0: CR0_PE | CR0_ET,
        ..flat(memory, entry, Segment::code(false))?
    })
}

/// What both entries share: flat segments from a GDT, a stack, no interrupts.
fn flat<M: GuestMemoryBackend>(
    memory: &M,
    entry: u64,
    code: Segment,
) -> Result<Registers, BootError> {
    let data = Segment::data();
    let task_state = Segment::task_state();
    // Two null descriptors come first, since the code selector is 0x10. A long-mode TSS descriptor
    // takes two entries; the second holds the upper half of its base.
    let descriptors = [
        0,
        0,
        code.descriptor(),
        data.descriptor(),
        task_state.descriptor(),
        0,
    ]
    .map(u64::to_le_bytes);
    let gdt = descriptors.as_flattened();
    memory
        .write_slice(gdt, GuestAddress(layout::GDT_START))
        .map_err(|source| BootError::Write {
            what: "GDT",
            source,
        })?;
    Ok(Registers {
        rip: entry,
        rsp: layout::BOOT_STACK,
        rflags: RFLAGS_RESERVED,
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task_state,
        gdt: DescriptorTable {
            base: layout::GDT_START,
            limit: 6 * 8 - 1,
        },
        ..Registers::default()
    })
}

/// Maps the first 4 GiB one to one: the kernel, its initrd and boot structures, wherever they are
/// in low RAM, and the devices.
fn write_page_tables<M: GuestMemoryBackend>(memory: &M) -> Result<(), BootError> {
    let write = |address, bytes: &[u8]| {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| BootError::Write {
                what: "page tables",
                source,
            })
    };
    let pointers = layout::PAGE_TABLES + TABLE_SIZE;
    let directories = pointers + TABLE_SIZE;
    write(layout::PAGE_TABLES, &(pointers | TABLE).to_le_bytes())?;
    let mut pages = 0..;
    for index in 0..DIRECTORIES {
        let directory = directories + index * TABLE_SIZE;
        write(pointers + index * 8, &(directory | TABLE).to_le_bytes())?;
        let mut entries = [[0; 8]; ENTRIES];
        for (entry, page) in entries.iter_mut().zip(&mut pages) {
            let page: u64 = page;
            *entry = (page << 21 | LARGE_PAGE).to_le_bytes();
        }
        write(directory, entries.as_flattened())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    /// Walks the page tables as a processor would; `None` if the address is not mapped.
    fn translate(memory: &GuestMemoryMmap, cr3: u64, address: u64) -> Option<u64> {
        let mut table = cr3;
        for level in [39, 30, 21] {
            let entry: u64 = memory
                .read_obj(GuestAddress(table + (address >> level & 511) * 8))
                .unwrap();
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 0b10, 0b10, "writable");
            table = entry & 0x000f_ffff_ffff_f000;
            if entry & 1 << 7 != 0 {
                return Some(table | address & ((1 << level) - 1));
            }
        }
        None
    }

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(Segment::code(true).descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(Segment::code(false).descriptor(), 0x00cf_9b00_0000_ffff);
        assert_eq!(Segment::data().descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(Segment::task_state().descriptor(), 0x0000_8b00_0000_0067);
        let odd = Segment {
            base: 0x1234_5678,
            ..Segment::data()
        };
        assert_eq!(odd.descriptor(), 0x12cf_9334_5678_ffff);
    }

    #[test]
    fn long_mode_maps_the_first_4_gib_one_to_one() {
        let memory = memory();
        let registers = long_mode(&memory, 0x100_0200, layout::ZERO_PAGE).unwrap();
        for address in [
            0,
            0x100_0200,
            0xbfff_ffff,
            layout::VIRTIO_MMIO_START,
            u32::MAX.into(),
        ] {
            assert_eq!(translate(&memory, registers.cr3, address), Some(address));
        }
        assert_eq!(translate(&memory, registers.cr3, 1 << 32), None);
    }

    #[test]
    fn long_mode_is_on_and_the_selectors_are_the_boot_protocols() {
        let memory = memory();
        let registers = long_mode(&memory, 0x100_0200, layout::ZERO_PAGE).unwrap();
        assert_eq!(
            (registers.rip, registers.rsi),
            (0x100_0200, layout::ZERO_PAGE)
        );
        assert_eq!(registers.cr0, 0x8000_0011);
        assert_eq!(registers.cr4, 0x20);
        assert_eq!(registers.efer, 0x500);
        assert_eq!(registers.rflags, 2);
        assert!(registers.cs.l && !registers.cs.db);
        for segment in [registers.cs, registers.ds, registers.ss, registers.tr] {
            assert!(segment.selector < registers.gdt.limit);
            let descriptor: u64 = memory
                .read_obj(GuestAddress(
                    registers.gdt.base + u64::from(segment.selector),
                ))
                .unwrap();
            assert_eq!(descriptor, segment.descriptor());
        }
        assert_eq!((registers.cs.selector, registers.ds.selector), (0x10, 0x18));
    }

    #[test]
    fn pvh_starts_in_protected_mode_without_paging() {
        let registers = protected_mode(&memory(), 0x100_0000, layout::PVH_START_INFO).unwrap();
        assert_eq!(
            (registers.rip, registers.rbx),
            (0x100_0000, layout::PVH_START_INFO)
        );
        assert_eq!(registers.cr0, 0x11);
        assert_eq!((registers.cr3, registers.cr4, registers.efer), (0, 0, 0));
        assert!(!registers.cs.l && registers.cs.db);
        assert_eq!(registers.cs.limit, u32::MAX);
    }

    #[test]
    fn memory_without_room_for_the_tables_is_an_error() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0xa000)]).unwrap();
        assert!(long_mode(&memory, 0, 0).is_err());
    }
}
