// SPDX-License-Identifier: Apache-2.0
//! ACPI tables of a hardware-reduced platform (ACPI 6.5): no fixed-feature hardware but the
//! registers for sleep and reset, and a namespace with nothing but the devices.
//!
//! The namespace is kept as small as it can be: the guest interprets it while it boots. The one
//! method runs when a machine has gone on from a snapshot.

mod generation;

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, PackageBuilder, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout;
use crate::MmioDevice;
use crate::error::BootError;

const OEM_ID: [u8; 6] = *b"BRUME ";
/// The same in all tables, as the specification wants it.
const OEM_TABLE_ID: [u8; 8] = *b"BRUMEVM ";
const OEM_REVISION: u32 = 1;
/// `Hypervisor Vendor Identity` in the FADT.
const HYPERVISOR_VENDOR: [u8; 8] = *b"BRUMEVM\0";
/// Revision of the DSDT: 2 and above have integers of 64 bits.
const DSDT_REVISION: u8 = 2;
const DSDT_HEADER_SIZE: u32 = 36;
/// `IAPC_BOOT_ARCH`: there is an i8042.
const KEYBOARD_CONTROLLER: u16 = 1 << 1;
/// `IAPC_BOOT_ARCH`: there is no VGA, and no CMOS real-time clock.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
/// Id of the I/O APIC: what KVM's has after reset.
const IOAPIC_ID: u8 = 0;
/// Tables start at addresses that a debugger shows well.
const TABLE_ALIGNMENT: u64 = 16;

/// Writes all tables: the root pointer at [`layout::ACPI_START`], the others after it.
pub(super) fn write_tables<M: GuestMemoryBackend>(
    memory: &M,
    vcpus: u8,
    devices: &[MmioDevice],
) -> Result<(), BootError> {
    let write = |what, address, bytes: &[u8]| {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| BootError::Write { what, source })
    };
    let mut next = layout::ACPI_START + rounded_size(Rsdp::len());
    // Each table goes after those that it points to.
    let mut place = |what, table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = next;
        next += rounded_size(bytes.len());
        write(what, address, &bytes).map(|()| address)
    };

    let dsdt = place("DSDT", &dsdt(devices))?;
    let fadt = place("FADT", &fadt(dsdt))?;
    let madt = place("MADT", &madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place("XSDT", &xsdt)?;

    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    write("RSDP", layout::ACPI_START, &rsdp)
}

fn rounded_size(bytes: usize) -> u64 {
    u64::try_from(bytes)
        .unwrap_or(u64::MAX)
        .next_multiple_of(TABLE_ALIGNMENT)
}

/// The namespace: `\_S5`, and the devices on the system bus.
fn dsdt(devices: &[MmioDevice]) -> Sdt {
    let mut aml = Vec::new();
    soft_off().to_aml_bytes(&mut aml);
    let mut bus = Vec::new();
    serial_port(&mut bus);
    keyboard(&mut bus);
    panic_port(&mut bus);
    generation::devices(&mut bus);
    for (index, device) in devices.iter().enumerate() {
        virtio_mmio(index, device, &mut bus);
    }
    aml.extend(Scope::raw(Path::new("_SB_"), bus));
    let mut dsdt = Sdt::new(
        *b"DSDT",
        DSDT_HEADER_SIZE,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    dsdt
}

/// `\_S5`: what the guest writes to the sleep control register to power off (ACPI 6.5, 7.4.2).
fn soft_off() -> Name {
    let mut package = PackageBuilder::new();
    package.add_element(&layout::ACPI_S5_SLEEP_TYPE);
    package.add_element(&0u8);
    Name::new(Path::new("_S5_"), &package)
}

fn serial_port(bus: &mut Vec<u8>) {
    let ports = IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, layout::COM1_SIZE);
    let interrupt = edge(layout::COM1_GSI);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    device("COM1", &EISAName::new("PNP0501"), 0, &resources, bus);
}

fn keyboard(bus: &mut Vec<u8>) {
    let [data, command] = [layout::I8042_DATA_PORT, layout::I8042_COMMAND_PORT];
    let (data, command) = (IO::new(data, data, 1, 1), IO::new(command, command, 1, 1));
    let interrupt = edge(layout::KEYBOARD_GSI);
    let resources = ResourceTemplate::new(vec![&data, &command, &interrupt]);
    device("PS2K", &EISAName::new("PNP0303"), 0, &resources, bus);
}

/// The pvpanic device, by the id that QEMU gave it.
fn panic_port(bus: &mut Vec<u8>) {
    let port = IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, 1);
    let resources = ResourceTemplate::new(vec![&port]);
    device("PEVT", &"QEMU0001", 0, &resources, bus);
}

/// A virtio-mmio device, by the id that Linaro registered for it.
fn virtio_mmio(index: usize, mmio: &MmioDevice, bus: &mut Vec<u8>) {
    // The window was checked to lie below 4 GiB, and there are at most 19 devices.
    let window = Memory32Fixed::new(true, low(mmio.address), low(mmio.size));
    let interrupt = edge(mmio.gsi);
    let resources = ResourceTemplate::new(vec![&window, &interrupt]);
    device(&format!("V{index:03}"), &"LNRO0005", index, &resources, bus);
}

fn device(name: &str, id: &dyn Aml, index: usize, resources: &dyn Aml, bus: &mut Vec<u8>) {
    let id = Name::new(Path::new("_HID"), id);
    let index = Name::new(Path::new("_UID"), &index);
    let resources = Name::new(Path::new("_CRS"), resources);
    Device::new(Path::new(name), vec![&id, &index, &resources]).to_aml_bytes(bus);
}

/// An interrupt that a device consumes: edge-triggered, active high, its own.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // These two say that there is no such button as fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (KEYBOARD_CONTROLLER | VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = byte_port(layout::ACPI_RESET_PORT);
    fadt.reset_value = layout::ACPI_RESET_VALUE;
    fadt.sleep_control_reg = byte_port(layout::ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(layout::ACPI_SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(HYPERVISOR_VENDOR).into();
    fadt.finalize()
}

fn byte_port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn madt(vcpus: u8) -> MADT {
    let (lapic, ioapic) = (low(layout::LAPIC_ADDRESS), low(layout::IOAPIC_ADDRESS));
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(lapic),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IOAPIC_ID, ioapic, 0));
    madt
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::super::testing::{bytes_at, memory, sum, u16_at, u32_at, u64_at};
    use super::*;

    /// The tables, found from the root pointer as a guest finds them.
    struct Tables {
        fadt: Vec<u8>,
        madt: Vec<u8>,
        dsdt: Vec<u8>,
    }

    fn table(memory: &GuestMemoryMmap, address: u64, signature: &[u8]) -> Vec<u8> {
        let size = u32_at(&bytes_at(memory, address, 8), 4);
        assert!(address >= layout::ACPI_START);
        assert!(address + u64::from(size) <= layout::ACPI_END);
        let bytes = bytes_at(memory, address, size as usize);
        assert_eq!(&bytes[..4], signature);
        assert_eq!(
            sum(&bytes),
            0,
            "checksum of {}",
            String::from_utf8_lossy(signature)
        );
        bytes
    }

    fn tables(vcpus: u8, devices: &[MmioDevice]) -> Tables {
        let memory = memory(2);
        write_tables(&memory, vcpus, devices).unwrap();
        let rsdp = bytes_at(&memory, layout::ACPI_START, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&memory, u64_at(&rsdp, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(&memory, u64_at(&xsdt, 36), b"FACP");
        let madt = table(&memory, u64_at(&xsdt, 44), b"APIC");
        let dsdt = table(&memory, u64_at(&fadt, 140), b"DSDT");
        Tables { fadt, madt, dsdt }
    }

    fn devices() -> Vec<MmioDevice> {
        (0..).map_while(layout::virtio_mmio_device).collect()
    }

    fn count(bytes: &[u8], what: &[u8]) -> usize {
        bytes
            .windows(what.len())
            .filter(|window| *window == what)
            .count()
    }

    #[test]
    fn the_platform_is_hardware_reduced_with_sleep_and_reset_ports() {
        let fadt = tables(1, &[]).fadt;
        assert_eq!(fadt.len(), 276);
        let flags = u32_at(&fadt, 112);
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        assert_eq!(
            u16_at(&fadt, 109),
            0b10_0110,
            "an i8042, no VGA, no CMOS clock"
        );
        for (offset, port) in [
            (116, layout::ACPI_RESET_PORT),
            (244, layout::ACPI_SLEEP_CONTROL_PORT),
            (256, layout::ACPI_SLEEP_STATUS_PORT),
        ] {
            assert_eq!(
                fadt[offset..offset + 4],
                [1, 8, 0, 1],
                "an I/O port of one byte"
            );
            assert_eq!(u64_at(&fadt, offset + 4), u64::from(port));
        }
        assert_eq!(fadt[128], layout::ACPI_RESET_VALUE);
    }

    #[test]
    fn every_processor_and_the_io_apic_are_in_the_madt() {
        for vcpus in [1, 2, layout::MAX_VCPUS] {
            let madt = tables(vcpus, &[]).madt;
            assert_eq!(u32_at(&madt, 36), 0xfee0_0000);
            let mut rest = &madt[44..];
            for id in 0..vcpus {
                assert_eq!(rest[..8], [0, 8, id, id, 1, 0, 0, 0]);
                rest = &rest[8..];
            }
            assert_eq!(*rest, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        }
    }

    #[test]
    fn every_device_has_its_window_and_interrupt_in_the_dsdt() {
        let devices = devices();
        let dsdt = tables(1, &devices).dsdt;
        assert_eq!(count(&dsdt, b"LNRO0005\0"), devices.len());
        for device in &devices {
            let window = [&[0x86, 9, 0, 1][..], &low(device.address).to_le_bytes()].concat();
            assert_eq!(count(&dsdt, &window), 1);
            let interrupt = [&[0x89, 6, 0, 0b11, 1][..], &device.gsi.to_le_bytes()].concat();
            assert_eq!(count(&dsdt, &interrupt), 1);
        }
        assert_eq!(count(&dsdt, b"V018"), 1);
    }

    #[test]
    fn each_interrupt_has_one_device() {
        let dsdt = tables(1, &devices()).dsdt;
        let interrupts: Vec<_> = dsdt
            .windows(9)
            .filter(|window| window.starts_with(&[0x89, 6, 0]))
            .map(|window| u32_at(window, 5))
            .collect();
        let distinct: std::collections::HashSet<_> = interrupts.iter().collect();
        assert_eq!(interrupts.len(), 3 + layout::MAX_VIRTIO_MMIO_DEVICES);
        assert_eq!(distinct.len(), interrupts.len());
        assert!(distinct.contains(&layout::GENERATION_GSI));
    }

    #[test]
    fn the_port_for_panics_is_in_the_dsdt() {
        let dsdt = tables(1, &[]).dsdt;
        assert_eq!(count(&dsdt, b"\x08_HID\x0dQEMU0001\0"), 1);
        assert_eq!(count(&dsdt, &[0x47, 1, 0x05, 5, 0x05, 5, 1, 1]), 1);
    }

    #[test]
    fn soft_off_and_the_serial_port_are_in_the_dsdt() {
        let dsdt = tables(1, &[]).dsdt;
        assert_eq!(count(&dsdt, b"\x08_S5_\x12\x05\x02\x0a\x05"), 1);
        assert_eq!(count(&dsdt, &[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8]), 1);
        assert_eq!(count(&dsdt, &[0x89, 6, 0, 0b11, 1, 4, 0, 0, 0]), 1);
    }
}
