// SPDX-License-Identifier: Apache-2.0
//! A guest that goes on from a snapshot is told that it is another machine now: a clone must not
//! give out random numbers, keys and names that its siblings give out too.
//!
//! Two pages of guest memory say so. One holds the VM generation id, 128 random bits (Microsoft,
//! "Virtual Machine Generation ID"). The other is the VMClock device's (UAPI Group, "VMClock";
//! `vmclock-abi.h` of Linux): it tells no time here, but counts the times that the machine went on.
//! After [`renew`], [`notify`] makes the guest look. A guest that has written to its pages deceives
//! nobody but itself, so what they hold is not checked.

use std::sync::atomic::Ordering::SeqCst;

use brume_boot::layout;
use brume_virtio::GuestMemory;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::kvm::{KvmError, Vm};

/// Size of the VM generation id in bytes.
const ID_SIZE: usize = 16;

// Fields of the VMClock page by their offsets in bytes, little endian. All others stay zero: the
// state of the clock is unknown.
const MAGIC: u64 = 0;
const SIZE: u64 = 4;
const VERSION: u64 = 8;
const COUNTER_ID: u64 = 10;
/// Odd while the fields after it change.
const SEQ_COUNT: u64 = 12;
const DISRUPTION_MARKER: u64 = 16;
const FLAGS: u64 = 24;
const VM_GENERATION_COUNTER: u64 = 104;

const VMCLOCK_MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VMCLOCK_VERSION: u16 = 1;
/// No counter of the CPU is related to the time.
const COUNTER_INVALID: u8 = 0xff;
const VM_GEN_COUNTER_PRESENT: u64 = 1 << 8;
const NOTIFICATION_PRESENT: u64 = 1 << 9;

const _: () = assert!(ID_SIZE as u64 <= layout::VMCLOCK_PAGE - layout::VMGENID_PAGE);
const _: () = assert!(VM_GENERATION_COUNTER + 8 <= layout::VMCLOCK_SIZE);

/// The guest cannot be told which machine it is.
#[derive(Debug, Error)]
pub enum GenerationError {
    /// The host gives no random numbers.
    #[error("the host gives no random bytes for the VM generation id")]
    Random(#[from] getrandom::Error),
    /// The pages are not there.
    #[error("the VM generation id cannot be written to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Fills both pages for a machine that boots. Its memory is fresh.
///
/// # Errors
///
/// The host gives no random numbers, or the memory has no such pages.
pub(crate) fn init(memory: &GuestMemory) -> Result<(), GenerationError> {
    write_id(memory)?;
    let size = u32::try_from(layout::VMCLOCK_SIZE).unwrap_or(u32::MAX);
    let flags = VM_GEN_COUNTER_PRESENT | NOTIFICATION_PRESENT;
    memory.write_slice(&size.to_le_bytes(), vmclock(SIZE))?;
    memory.write_slice(&VMCLOCK_VERSION.to_le_bytes(), vmclock(VERSION))?;
    memory.write_slice(&[COUNTER_INVALID], vmclock(COUNTER_ID))?;
    memory.write_slice(&flags.to_le_bytes(), vmclock(FLAGS))?;
    memory.write_slice(&VMCLOCK_MAGIC.to_le_bytes(), vmclock(MAGIC))?;
    Ok(())
}

/// Makes the guest in `memory` another machine. Its vCPUs do not run meanwhile, and [`notify`] has
/// to follow before they do.
///
/// # Errors
///
/// As for [`init`].
pub(crate) fn renew(memory: &GuestMemory) -> Result<(), GenerationError> {
    write_id(memory)?;
    let updating = u32::from_le(memory.load(vmclock(SEQ_COUNT), SeqCst)?) | 1;
    memory.store(updating.to_le(), vmclock(SEQ_COUNT), SeqCst)?;
    for counter in [DISRUPTION_MARKER, VM_GENERATION_COUNTER] {
        let count = u64::from_le(memory.load(vmclock(counter), SeqCst)?);
        memory.store(count.wrapping_add(1).to_le(), vmclock(counter), SeqCst)?;
    }
    memory.store(updating.wrapping_add(1).to_le(), vmclock(SEQ_COUNT), SeqCst)?;
    Ok(())
}

/// Lets the guest look at both pages, at once or when its vCPUs go on. The interrupt controllers
/// must have their state from the snapshot by then.
///
/// # Errors
///
/// KVM does not raise the interrupt.
pub(crate) fn notify(vm: &Vm) -> Result<(), KvmError> {
    vm.pulse_interrupt(layout::GENERATION_GSI)
}

fn write_id(memory: &GuestMemory) -> Result<(), GenerationError> {
    let mut id = [0; ID_SIZE];
    getrandom::fill(&mut id)?;
    memory.write_slice(&id, GuestAddress(layout::VMGENID_PAGE))?;
    Ok(())
}

/// Address of a field of the VMClock page.
fn vmclock(field: u64) -> GuestAddress {
    GuestAddress(layout::VMCLOCK_PAGE + field)
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use vm_memory::{GuestMemoryBackend, MmapRegion};

    use super::*;

    fn booted() -> GuestMemory {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        init(&memory).unwrap();
        memory
    }

    fn page(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let mut page = vec![0; 4096];
        memory.read_slice(&mut page, GuestAddress(address)).unwrap();
        page
    }

    /// Sequence count, disruption marker and generation counter.
    fn counters(memory: &GuestMemory) -> (u32, u64, u64) {
        let page = page(memory, layout::VMCLOCK_PAGE);
        (
            u32::from_le_bytes(page[12..16].try_into().unwrap()),
            u64::from_le_bytes(page[16..24].try_into().unwrap()),
            u64::from_le_bytes(page[104..112].try_into().unwrap()),
        )
    }

    #[test]
    fn a_booted_machine_has_an_id_and_a_clock_that_tells_no_time() {
        let memory = booted();
        let id = page(&memory, layout::VMGENID_PAGE);
        assert_ne!(id[..16], [0; 16]);
        assert_eq!(id[16..], [0; 4080]);
        let mut clock = vec![0; 4096];
        clock[..12].copy_from_slice(b"VCLK\x00\x10\x00\x00\x01\x00\xff\x00");
        clock[25] = 0b11;
        assert_eq!(page(&memory, layout::VMCLOCK_PAGE), clock);
    }

    #[test]
    fn no_two_machines_have_the_same_id() {
        let memory = booted();
        let mut ids = vec![page(&booted(), layout::VMGENID_PAGE)];
        for _ in 0..3 {
            ids.push(page(&memory, layout::VMGENID_PAGE));
            renew(&memory).unwrap();
        }
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 4);
    }

    #[test]
    fn a_renewed_machine_has_counted_it_and_nothing_else_changed() {
        let memory = booted();
        memory
            .write_slice(&[7], GuestAddress(layout::VMGENID_PAGE + 2048))
            .unwrap();
        let before = page(&memory, layout::VMCLOCK_PAGE);
        for times in 1..=3 {
            renew(&memory).unwrap();
            let count = u64::from(times);
            assert_eq!(counters(&memory), (2 * times, count, count));
        }
        let after = page(&memory, layout::VMCLOCK_PAGE);
        assert_eq!(after[..12], before[..12]);
        assert_eq!(after[24..104], before[24..104]);
        assert_eq!(after[112..], before[112..]);
        assert_eq!(page(&memory, layout::VMGENID_PAGE)[2048], 7);
    }

    #[test]
    fn what_the_guest_has_written_there_does_no_harm() {
        let memory = booted();
        memory
            .write_slice(&[0xff; 4096], GuestAddress(layout::VMCLOCK_PAGE))
            .unwrap();
        renew(&memory).unwrap();
        assert_eq!(counters(&memory), (0, 0, 0));
    }

    #[test]
    fn both_pages_are_dirty_after_a_renewal() {
        let memory = booted();
        let region: &MmapRegion<AtomicBitmap> = memory.iter().next().unwrap();
        region.bitmap().reset();
        renew(&memory).unwrap();
        for address in (0..1 << 20).step_by(4096) {
            let ours = [layout::VMGENID_PAGE, layout::VMCLOCK_PAGE].contains(&(address as u64));
            assert_eq!(region.bitmap().dirty_at(address), ours, "{address:#x}");
        }
    }
}
