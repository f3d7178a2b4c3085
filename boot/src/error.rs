// SPDX-License-Identifier: Apache-2.0
//! What can go wrong before a guest starts. The caller knows the files' names and puts them in
//! front; the messages here say what is wrong inside them and what to do.

use std::io;

use vm_memory::GuestMemoryError;

use crate::cmdline::CommandLineError;
use crate::layout;
use crate::protocol::KernelProtocol;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file cannot be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initrd file cannot be used.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The command line cannot be used.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// The guest has too little RAM for the fixed boot structures.
    #[error(
        "{size} bytes of RAM from address 0 are too few: a guest needs at least {min} bytes",
        min = layout::MIN_MEMORY
    )]
    MemoryTooSmall {
        /// Bytes of RAM from address 0.
        size: u64,
    },
    /// A number of vCPUs that the tables cannot describe.
    #[error("{0} vCPUs are not possible: ask for 1 to {max}", max = layout::MAX_VCPUS)]
    VcpuCount(u8),
    /// More devices than there are interrupt lines.
    #[error(
        "{0} virtio-mmio devices are too many: there are interrupts for {max}",
        max = layout::MAX_VIRTIO_MMIO_DEVICES
    )]
    DeviceCount(usize),
    /// A device outside the window for MMIO devices, or on an interrupt that is not for them.
    #[error(
        "a virtio-mmio device at {address:#x}, {size:#x} bytes, GSI {gsi} is not in the map: it \
         belongs between {start:#x} and {end:#x} on a GSI from {first} to {last}",
        start = layout::VIRTIO_MMIO_START,
        end = layout::VIRTIO_MMIO_END,
        first = layout::FIRST_VIRTIO_GSI,
        last = layout::LAST_GSI
    )]
    DevicePlace {
        /// Guest-physical address of the device.
        address: u64,
        /// Size of its window in bytes.
        size: u64,
        /// Its interrupt.
        gsi: u32,
    },
    /// Guest memory that should hold a boot structure is not there.
    #[error("cannot write the {what} to guest memory")]
    Write {
        /// The structure.
        what: &'static str,
        /// What guest memory said.
        source: GuestMemoryError,
    },
}

/// Why a kernel file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Reading the file failed.
    #[error("the kernel cannot be read")]
    Read(#[source] io::Error),
    /// Copying the file into guest memory failed.
    #[error("the kernel cannot be read into guest memory")]
    Copy(#[source] GuestMemoryError),
    /// An empty file.
    #[error("the kernel file is empty: give an ELF vmlinux or a bzImage")]
    Empty,
    /// Neither ELF nor bzImage.
    #[error(
        "the file is not a kernel: it starts neither like an ELF file nor like a bzImage; give a \
         vmlinux (uncompressed) or a bzImage"
    )]
    NotAKernel,
    /// The file ends before what its headers promise.
    #[error(
        "the kernel is truncated: its {what} ends at byte {end} and the file at byte {size}; copy \
         or build it again"
    )]
    Truncated {
        /// The part that is cut off.
        what: &'static str,
        /// Offset in the file where that part ends.
        end: u64,
        /// Size of the file.
        size: u64,
    },
    /// The file is a kernel of the other format.
    #[error("the kernel is {found}, so it cannot be started by the {asked} protocol; {hint}")]
    WrongFormat {
        /// The protocol that was insisted on.
        asked: KernelProtocol,
        /// What the file is.
        found: &'static str,
        /// What would work.
        hint: &'static str,
    },
    /// An ELF file for another machine or of a kind that cannot be loaded.
    #[error("the ELF file is not a kernel for this machine: {0}; a 64-bit x86 vmlinux is needed")]
    ElfKind(&'static str),
    /// ELF headers that contradict themselves.
    #[error("the ELF file is corrupt: {0}")]
    ElfCorrupt(&'static str),
    /// Something of the kernel would lie where there is no RAM or where boot structures lie.
    #[error(
        "the kernel does not fit: it needs {start:#x} to {end:#x} and RAM for it goes from \
         {ram_start:#x} to {ram_end:#x}; give the guest more memory"
    )]
    NoRoom {
        /// First byte that the kernel needs.
        start: u64,
        /// End of what it needs.
        end: u64,
        /// First address that a kernel may use.
        ram_start: u64,
        /// End of low RAM.
        ram_end: u64,
    },
    /// The entry point is in no loaded segment.
    #[error(
        "the entry point {0:#x} is in no segment of the kernel; the file is corrupt, or is not \
         linked for physical addresses"
    )]
    Entry(u64),
    /// PVH was insisted on and the file has no entry for it.
    #[error(
        "the kernel has no PVH entry (ELF note XEN_ELFNOTE_PHYS32_ENTRY): build it with \
         CONFIG_PVH=y, or use the elf64 protocol"
    )]
    NoPvhEntry,
    /// A bzImage that cannot be entered in 64-bit mode.
    #[error("the bzImage cannot be started: {0}; use a 64-bit kernel of Linux 3.8 or newer")]
    BzImageKind(&'static str),
    /// A bzImage header that contradicts itself.
    #[error("the bzImage is corrupt: {0}")]
    BzImageCorrupt(&'static str),
}

/// Why an initrd file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// Reading the file failed.
    #[error("the initrd cannot be read")]
    Read(#[source] io::Error),
    /// Copying the file into guest memory failed.
    #[error("the initrd cannot be read into guest memory")]
    Copy(#[source] GuestMemoryError),
    /// An empty file.
    #[error("the initrd file is empty: give a cpio archive, or no initrd")]
    Empty,
    /// The initrd does not fit beside the kernel.
    #[error(
        "the initrd of {size} bytes is too large: beside the kernel there is room for {room} \
         bytes; give the guest more memory or a smaller initrd"
    )]
    TooLarge {
        /// Size of the file in bytes.
        size: u64,
        /// Bytes between the kernel's end and the end of RAM that an initrd may use.
        room: u64,
    },
    /// The file became shorter while it was read.
    #[error("the initrd ended after {read} of {size} bytes: it changed while it was read")]
    Truncated {
        /// Bytes that were read.
        read: u64,
        /// Bytes that the file had before.
        size: u64,
    },
}
