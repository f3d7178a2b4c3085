// SPDX-License-Identifier: Apache-2.0
//! ACPI tables of a hardware-reduced platform (ACPI 6.5): no fixed-feature hardware but the
//! registers for sleep and reset, and a namespace with nothing but the devices.
//!
//! The namespace is kept as small as it can be, without methods: the guest interprets it while it
//! boots. Nothing is said of an i8042: the one of this machine only resets, and a guest that is
//! told of a keyboard controller waits for its answers.

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

/// The namespace: `\_S5` and the devices.
fn dsdt(devices: &[MmioDevice]) -> Sdt {
    let mut aml = Vec::new();
    soft_off(&mut aml);
    serial_port(&mut aml);
    for (index, device) in devices.iter().enumerate() {
        virtio_mmio(index, device, &mut aml);
    }
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
fn soft_off(aml: &mut Vec<u8>) {
    let mut package = PackageBuilder::new();
    package.add_element(&layout::ACPI_S5_SLEEP_TYPE);
    package.add_element(&0u8);
    Name::new(Path::new("_S5_"), &package).to_aml_bytes(aml);
}

fn serial_port(aml: &mut Vec<u8>) {
    let ports = IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, layout::COM1_SIZE);
    let interrupt = edge(layout::COM1_GSI);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&ports, &interrupt]),
                ),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// A virtio-mmio device, by the id that Linaro registered for it.
fn virtio_mmio(index: usize, device: &MmioDevice, aml: &mut Vec<u8>) {
    // The addresses were checked to lie below 4 GiB, and there are at most 19 devices.
    let address = u32::try_from(device.address).unwrap_or(u32::MAX);
    let size = u32::try_from(device.size).unwrap_or(u32::MAX);
    let window = Memory32Fixed::new(true, address, size);
    let interrupt = edge(device.gsi);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&format!("V{index:03}")),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &index),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&window, &interrupt]),
                ),
            ],
        )],
    )
    .to_aml_bytes(aml);
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
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
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
