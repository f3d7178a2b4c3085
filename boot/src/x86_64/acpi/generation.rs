// SPDX-License-Identifier: Apache-2.0
//! What tells a guest that it has become another machine: the VM generation id (Microsoft,
//! "Virtual Machine Generation ID"), the VMClock device (UAPI Group, "VMClock"), and the Generic
//! Event Device that notifies both of them (ACPI 6.5, 5.6.9).
//!
//! On a hardware-reduced platform there is no SCI: an interrupt of the Generic Event Device is how
//! firmware tells of events.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
};

use super::{edge, layout, low};

/// Notification that both devices give: what their memory holds has changed.
const CHANGED: u8 = 0x80;
const VM_GENERATION_ID: &str = "VGEN";
const VMCLOCK: &str = "VCLK";

/// Adds the three devices to the system bus.
pub(super) fn devices(bus: &mut Vec<u8>) {
    vm_generation_id(bus);
    vmclock(bus);
    event_device(bus);
}

/// Windows looks for the compatible id, Linux for either. The hardware id is the short form that
/// Hyper-V has; a compiler of ASL would not take it, since it does not end in four digits.
fn vm_generation_id(bus: &mut Vec<u8>) {
    let page = layout::VMGENID_PAGE;
    let (page_low, page_high) = (low(page & 0xffff_ffff), low(page >> 32));
    let address = Package::new(vec![&page_low, &page_high]);
    Device::new(
        Path::new(VM_GENERATION_ID),
        vec![
            &Name::new(Path::new("_HID"), &"VMGENCTR"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &address),
        ],
    )
    .to_aml_bytes(bus);
}

fn vmclock(bus: &mut Vec<u8>) {
    // For the guest, the memory is read-only.
    let memory = Memory32Fixed::new(false, low(layout::VMCLOCK_PAGE), low(layout::VMCLOCK_SIZE));
    Device::new(
        Path::new(VMCLOCK),
        vec![
            &Name::new(Path::new("_HID"), &"AMZNC10C"),
            &Name::new(Path::new("_CID"), &"VMCLOCK"),
            &Name::new(Path::new("_DDN"), &"VMCLOCK"),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&memory])),
        ],
    )
    .to_aml_bytes(bus);
}

fn event_device(bus: &mut Vec<u8>) {
    let interrupt = edge(layout::GENERATION_GSI);
    let (id, clock) = (Path::new(VM_GENERATION_ID), Path::new(VMCLOCK));
    // There is one interrupt, so the method need not look at its argument.
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![&Notify::new(&id, &CHANGED), &Notify::new(&clock, &CHANGED)],
            ),
        ],
    )
    .to_aml_bytes(bus);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus() -> Vec<u8> {
        let mut bus = Vec::new();
        devices(&mut bus);
        bus
    }

    fn count(what: &[u8]) -> usize {
        bus()
            .windows(what.len())
            .filter(|window| *window == what)
            .count()
    }

    #[test]
    fn the_generation_id_has_its_names_and_the_halves_of_its_address() {
        assert_eq!(count(b"\x08_HID\x0dVMGENCTR\0"), 1);
        assert_eq!(count(b"\x08_CID\x0dVM_Gen_Counter\0"), 1);
        assert_eq!(count(b"\x08_DDN\x0dVM_Gen_Counter\0"), 1);
        // Two elements: a double word, and zero.
        let halves = [0x12, 8, 2, 0x0c, 0, 0xe0, 0x0e, 0, 0];
        assert_eq!(count(&[b"ADDR", &halves[..]].concat()), 1);
    }

    #[test]
    fn the_clock_has_its_page() {
        assert_eq!(count(b"\x08_HID\x0dAMZNC10C\0"), 1);
        assert_eq!(count(b"\x08_CID\x0dVMCLOCK\0"), 1);
        let window = [0x86, 9, 0, 0, 0, 0xf0, 0x0e, 0, 0, 0x10, 0, 0];
        assert_eq!(count(&window), 1);
    }

    #[test]
    fn one_edge_notifies_both() {
        assert_eq!(count(b"\x08_HID\x0dACPI0013\0"), 1);
        let interrupt = [0x89, 6, 0, 0b11, 1, 3, 0, 0, 0];
        assert_eq!(count(&interrupt), 1);
        assert_eq!(count(b"_EVT\x09\x86VGEN\x0a\x80\x86VCLK\x0a\x80"), 1);
    }
}
