// SPDX-License-Identifier: Apache-2.0
//! The machine around its vCPUs: what a fresh machine and a restored one have in common.

use std::io::Write;
use std::sync::Arc;

use brume_boot::{MmioDevice, layout};
use brume_virtio::block::Locking;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::attach::{NamedTransport, VirtioSlots};
use crate::build::{BuildError, open_devices};
use crate::chipset::{Buses, Chipset, StartClock};
use crate::controls::Controls;
use crate::cpu::VcpuBuses;
use crate::dirty::{DirtyTracker, Reader};
use crate::event::{Console, EventSender};
use crate::instance::Description;
use crate::kvm::Vm;
use crate::memory::MachineMemory;
use crate::serial;

/// A machine without vCPUs: memory, buses and the devices on them, none of which has run.
pub(crate) struct Assembly {
    pub(crate) vm: Arc<Vm>,
    pub(crate) memory: MachineMemory,
    pub(crate) tracker: DirtyTracker,
    pub(crate) buses: VcpuBuses,
    pub(crate) transports: Vec<NamedTransport>,
    /// Where the virtio devices are, for the firmware tables.
    pub(crate) places: Vec<MmioDevice>,
    pub(crate) chipset: Chipset,
    pub(crate) controls: Controls,
    pub(crate) console: Console,
}

/// Where a machine's serial output and its boot timer lead.
pub(crate) struct Outside {
    pub(crate) console: Box<dyn Write + Send>,
    pub(crate) clock: Option<StartClock>,
    /// When drives that are to be locked are.
    pub(crate) locking: Locking,
}

impl Assembly {
    /// Opens what `description` names and puts it around `memory`.
    ///
    /// # Errors
    ///
    /// A device cannot be used, or the host does not give what they need.
    pub(crate) fn new(
        description: &Description,
        memory: MachineMemory,
        outside: Outside,
        sender: &EventSender,
    ) -> Result<Self, BuildError> {
        let config = &description.config;
        let (devices, mut controls) = open_devices(description, outside.locking)?;
        let counters = controls.serial.clone();
        let output = serial::output(config.serial.as_ref(), outside.console, counters.clone())?;

        let track = config.machine_config.track_dirty_pages;
        let vm = Arc::new(Vm::new(&memory.guest, track)?);
        let mut tracker = DirtyTracker::new(vm.clone(), memory.guest.clone());
        if track {
            tracker.start(Reader::Snapshot)?;
        }
        let mut buses = Buses::default();
        let room = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let irq = wired(&vm, layout::COM1_GSI)?;
        let console = buses.add_serial(output, irq, room, counters)?;
        let (keyboard, counters) = buses.add_power(sender, wired(&vm, layout::KEYBOARD_GSI)?)?;
        controls.keyboard = Some(keyboard.clone());
        controls.keyboard_counters = counters;
        let chipset = Chipset {
            serial: console.serial().clone(),
            keyboard,
            panic_port: buses.add_panic_port(sender)?,
        };
        if let Some(clock) = outside.clock {
            buses.add_boot_timer(clock)?;
        }
        let mut slots = VirtioSlots::new(&vm, &memory.guest, sender);
        for device in devices {
            slots.add(&mut buses, device)?;
        }
        let VirtioSlots {
            transports, places, ..
        } = slots;
        Ok(Self {
            vm,
            memory,
            tracker,
            buses: VcpuBuses {
                pio: Arc::new(buses.pio),
                mmio: Arc::new(buses.mmio),
            },
            transports,
            places,
            chipset,
            controls,
            console,
        })
    }
}

/// An event that raises the interrupt `gsi`.
fn wired(vm: &Vm, gsi: u32) -> Result<Arc<EventFd>, BuildError> {
    let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    vm.wire_interrupt(&event, gsi)?;
    Ok(event)
}
