// SPDX-License-Identifier: Apache-2.0
//! Puts a kernel, its initrd, its command line and its firmware tables into guest memory, and says
//! with which registers the first vCPU has to start.
//!
//! Nothing here knows KVM: [`load`] writes to guest memory and returns a [`BootState`] of plain
//! numbers, which the `vmm` crate applies to the vCPU. So all of it is tested on any machine.
//!
//! # How a guest starts
//!
//! 1. [`layout::memory_regions`] says where RAM of a given size lies; the caller maps it.
//! 2. [`load`] looks at the kernel file and chooses a [`KernelProtocol`] (or checks the one that
//!    was asked for), then reads the kernel straight into guest memory: the host's page cache is
//!    copied once, and nothing is zeroed, since fresh guest memory is zero already.
//! 3. The initrd goes to the end of low RAM, far from the kernel, which grows upwards.
//! 4. The command line is checked, completed with `virtio_mmio.device=` arguments where they are
//!    wanted (see [`DeviceArguments`]), and written.
//! 5. ACPI tables and an Intel MP table are written, so that the guest finds its processors,
//!    interrupt controllers and devices with `acpi=off` too.
//! 6. The protocol's own structure follows (`boot_params` or `hvm_start_info`), with the memory
//!    map, and for the 64-bit entry also page tables.
//!
//! | protocol | file | CPU state at entry | what the kernel is handed |
//! |---|---|---|---|
//! | [`KernelProtocol::Linux64`] | ELF | long mode, first 4 GiB mapped one to one | `boot_params` in RSI |
//! | [`KernelProtocol::Pvh`] | ELF with a `XEN_ELFNOTE_PHYS32_ENTRY` note | 32-bit protected mode, paging off | `hvm_start_info` in EBX |
//! | [`KernelProtocol::BzImage`] | bzImage, protocol 2.12 or newer | as `Linux64`, at the 64-bit entry | `boot_params` in RSI |
//!
//! # Address map
//!
//! All constants are in [`layout`].
//!
//! | guest-physical address | what |
//! |---|---|
//! | `0x0000_0000` | low RAM; boot structures in its first 640 KiB |
//! | `0x0009_fc00` | MP table, in the last KiB of base memory |
//! | `0x000e_0000` | ACPI tables, RSDP first |
//! | `0x000e_e000` | VM generation id, then the VMClock device's page: they tell clones apart |
//! | `0x0010_0000` | kernel, where its file says, up to the initrd at the end of low RAM |
//! | `0xc000_0000` | boot timer, then virtio-mmio devices, 4 KiB each |
//! | `0xfec0_0000` | I/O APIC |
//! | `0xfee0_0000` | local APICs |
//! | `0xfffb_c000` | pages that KVM needs for itself on Intel hosts |
//! | `0x1_0000_0000` | high RAM |
//!
//! # Trust
//!
//! Kernel and initrd come from whoever asks for the guest, and are not trusted: a corrupt or
//! hostile file ends in a [`BootError`], never in a panic, and no size in a file decides how much
//! is allocated.

mod cmdline;
mod error;
mod guest;
mod protocol;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::fs::File;
use std::ops::Range;

use vm_memory::GuestMemoryBackend;

pub use cmdline::{CommandLineError, DeviceArguments};
pub use error::{BootError, InitrdError, KernelError};
pub use protocol::{KernelProtocol, UnknownProtocol};
#[cfg(target_arch = "x86_64")]
pub use x86_64::layout;
#[cfg(target_arch = "x86_64")]
pub use x86_64::registers::{DescriptorTable, Registers, Segment};

/// A virtio device on the MMIO transport, as the guest is told about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of the register window, below 4 GiB and outside RAM.
    pub address: u64,
    /// Size of the window in bytes.
    pub size: u64,
    /// Global system interrupt of the device, edge-triggered: an I/O APIC pin.
    pub gsi: u32,
}

/// What to start, and on which machine.
#[derive(Clone, Copy, Debug)]
pub struct BootRequest<'a> {
    /// The kernel: an ELF vmlinux or a bzImage, read from its beginning whatever the file position.
    pub kernel: &'a File,
    /// The initial RAM disk, if any, read from its beginning.
    pub initrd: Option<&'a File>,
    /// The kernel's command line, without the arguments that describe devices.
    pub cmdline: &'a str,
    /// The protocol to insist on; `None` lets the file decide.
    pub protocol: Option<KernelProtocol>,
    /// Number of vCPUs, 1 to [`layout::MAX_VCPUS`]. Their APIC ids are 0, 1, 2 and so on.
    pub vcpus: u8,
    /// The virtio-mmio devices.
    pub devices: &'a [MmioDevice],
    /// When the devices are named on the command line as well as in the ACPI tables.
    pub device_arguments: DeviceArguments,
}

/// Where everything went, and how the first vCPU starts. The other vCPUs wait for the guest's
/// start-up interrupt in their reset state.
#[derive(Clone, Debug, PartialEq)]
pub struct BootState {
    /// The protocol that was used.
    pub protocol: KernelProtocol,
    /// Registers of vCPU 0.
    pub registers: Registers,
    /// Guest-physical addresses that the kernel needs until it has read the memory map.
    pub kernel: Range<u64>,
    /// Guest-physical addresses of the initrd.
    pub initrd: Option<Range<u64>>,
    /// The command line as the guest sees it.
    pub cmdline: String,
}

/// Loads the guest that `request` describes into `memory`.
///
/// `memory` must be laid out by [`layout::memory_regions`] and must be fresh: what is not written
/// here is taken to be zero, as the kernel's BSS must be.
///
/// # Errors
///
/// Whatever is wrong with the request or its files; guest memory is then half written, and must
/// not be started.
#[cfg(target_arch = "x86_64")]
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    request: &BootRequest<'_>,
) -> Result<BootState, BootError> {
    x86_64::load(memory, request)
}
