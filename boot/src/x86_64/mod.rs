// SPDX-License-Identifier: Apache-2.0
//! Loading an x86-64 guest: the steps in order. Each protocol, file format and table has a module.

mod acpi;
mod bzimage;
mod elf;
mod initrd;
mod kernel;
pub mod layout;
mod linux;
mod memory_map;
mod mptable;
mod pvh;
pub(crate) mod registers;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::error::BootError;
use crate::{BootRequest, BootState, KernelProtocol, MmioDevice, cmdline};

/// Loads a guest; see [`crate::load`].
pub(crate) fn load<M: GuestMemoryBackend>(
    memory: &M,
    request: &BootRequest<'_>,
) -> Result<BootState, BootError> {
    check_machine(request)?;
    let low_ram_end = memory_map::low_ram_end(memory);
    if low_ram_end < layout::MIN_MEMORY {
        return Err(BootError::MemoryTooSmall { size: low_ram_end });
    }

    let kernel = kernel::load(memory, request.kernel, request.protocol, low_ram_end)?;
    let initrd = request
        .initrd
        .map(|file| {
            initrd::load(
                memory,
                file,
                kernel.range.end,
                kernel.initrd_end.min(low_ram_end),
            )
        })
        .transpose()?;

    let cmdline = cmdline::build(
        request.cmdline,
        request.devices,
        request.device_arguments,
        kernel.cmdline_limit.min(layout::CMDLINE_MAX_SIZE - 1),
    )?;
    write_cmdline(memory, &cmdline)?;
    acpi::write_tables(memory, request.vcpus, request.devices)?;
    mptable::write(memory, request.vcpus)?;

    let memory_map = memory_map::memory_map(memory);
    let handover = Handover {
        cmdline_size: cmdline.len(),
        initrd: initrd.clone(),
        memory_map,
    };
    let registers = match kernel.protocol {
        KernelProtocol::Pvh => {
            pvh::write_start_info(memory, &handover)?;
            registers::protected_mode(memory, kernel.entry, layout::PVH_START_INFO)?
        }
        KernelProtocol::Linux64 | KernelProtocol::BzImage => {
            linux::write_zero_page(memory, kernel.setup_header, &handover)?;
            registers::long_mode(memory, kernel.entry, layout::ZERO_PAGE)?
        }
    };
    Ok(BootState {
        protocol: kernel.protocol,
        registers,
        kernel: kernel.range,
        initrd,
        cmdline,
    })
}

/// What a kernel is told by either protocol's structure.
struct Handover {
    /// Length of the command line, without its NUL.
    cmdline_size: usize,
    /// Where the initrd is.
    initrd: Option<std::ops::Range<u64>>,
    /// What guest-physical memory holds.
    memory_map: Vec<memory_map::Entry>,
}

/// The machine has to be one that the tables can describe.
fn check_machine(request: &BootRequest<'_>) -> Result<(), BootError> {
    if !(1..=layout::MAX_VCPUS).contains(&request.vcpus) {
        return Err(BootError::VcpuCount(request.vcpus));
    }
    if request.devices.len() > layout::MAX_VIRTIO_MMIO_DEVICES {
        return Err(BootError::DeviceCount(request.devices.len()));
    }
    for &MmioDevice { address, size, gsi } in request.devices {
        let fits = address >= layout::VIRTIO_MMIO_START
            && size > 0
            && address
                .checked_add(size)
                .is_some_and(|end| end <= layout::VIRTIO_MMIO_END)
            && (layout::FIRST_VIRTIO_GSI..=layout::LAST_GSI).contains(&gsi);
        if !fits {
            return Err(BootError::DevicePlace { address, size, gsi });
        }
    }
    Ok(())
}

fn write_cmdline<M: GuestMemoryBackend>(memory: &M, cmdline: &str) -> Result<(), BootError> {
    let terminated = [cmdline.as_bytes(), b"\0"].concat();
    memory
        .write_slice(&terminated, GuestAddress(layout::CMDLINE_START))
        .map_err(|source| BootError::Write {
            what: "command line",
            source,
        })
}
