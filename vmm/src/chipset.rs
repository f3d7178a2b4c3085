// SPDX-License-Identifier: Apache-2.0
//! The devices that every machine has, at their usual places.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use brume_boot::layout;
use brume_devices::{
    AcpiPower, BootTimer, Bus, BusError, I8042, I8042Counters, I8042State, Interrupt, PvPanic,
    PvPanicState, Serial, SerialCounters, SerialState, StateError,
};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::event::{Console, EventSender};

/// The two address spaces of a machine while it is being built.
#[derive(Default)]
pub(crate) struct Buses {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
}

/// A clock that tells the wall time and the CPU time since the start.
pub(crate) type StartClock = Box<dyn Fn() -> (Duration, Duration) + Send>;

impl Buses {
    /// Adds the serial port, with its output going to `output`, on the line `irq`.
    pub(crate) fn add_serial(
        &mut self,
        output: Box<dyn Write + Send>,
        irq: Arc<EventFd>,
        room: Arc<EventFd>,
        counters: Arc<SerialCounters>,
    ) -> Result<Console, BusError> {
        let lines = [irq, room.clone()].map(Interrupt::from_event);
        let [irq, room_line] = lines;
        let serial = Arc::new(Mutex::new(Serial::new(irq, output, room_line, counters)));
        self.pio
            .insert(u64::from(layout::COM1_PORT), Serial::PORTS, serial.clone())?;
        Ok(Console::new(serial, room))
    }

    /// Adds the ways to end a machine: keyboard controller, on the line `irq`, and ACPI registers.
    pub(crate) fn add_power(
        &mut self,
        events: &EventSender,
        irq: Arc<EventFd>,
    ) -> Result<(Arc<Mutex<I8042>>, Arc<I8042Counters>), BusError> {
        let irq = Interrupt::from_event(irq);
        let i8042 = I8042::new(events.guest_events(), irq);
        let counters = i8042.counters();
        let i8042 = Arc::new(Mutex::new(i8042));
        self.pio.insert(
            u64::from(layout::I8042_DATA_PORT),
            I8042::PORTS,
            i8042.clone(),
        )?;
        let acpi = Arc::new(Mutex::new(AcpiPower::new(events.guest_events())));
        self.pio.insert(
            u64::from(layout::ACPI_SLEEP_CONTROL_PORT),
            AcpiPower::PORTS,
            acpi,
        )?;
        Ok((i8042, counters))
    }

    /// Adds the port by which the guest's kernel says that it has panicked.
    pub(crate) fn add_panic_port(
        &mut self,
        events: &EventSender,
    ) -> Result<Arc<Mutex<PvPanic>>, BusError> {
        let device = Arc::new(Mutex::new(PvPanic::new(events.guest_events())));
        let port = u64::from(layout::PVPANIC_PORT);
        self.pio.insert(port, PvPanic::PORTS, device.clone())?;
        Ok(device)
    }

    /// Adds the boot timer.
    pub(crate) fn add_boot_timer(&mut self, clock: StartClock) -> Result<(), BusError> {
        let timer = Arc::new(Mutex::new(BootTimer::new(clock)));
        self.mmio
            .insert(layout::BOOT_TIMER_ADDRESS, layout::BOOT_TIMER_SIZE, timer)
    }
}

/// The devices that every machine has and that have a state.
pub(crate) struct Chipset {
    pub(crate) serial: Arc<Mutex<Serial>>,
    pub(crate) keyboard: Arc<Mutex<I8042>>,
    pub(crate) panic_port: Arc<Mutex<PvPanic>>,
}

/// What is kept of them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChipsetState {
    serial: SerialState,
    keyboard: I8042State,
    panic_port: PvPanicState,
}

impl Chipset {
    /// Takes their state, while no vCPU runs.
    pub(crate) fn save(&self) -> ChipsetState {
        ChipsetState {
            serial: lock(&self.serial).save(),
            keyboard: lock(&self.keyboard).save(),
            panic_port: lock(&self.panic_port).save(),
        }
    }

    /// Gives them a state, after the interrupt controllers have theirs.
    ///
    /// # Errors
    ///
    /// They cannot have that state.
    pub(crate) fn restore(&self, state: ChipsetState) -> Result<(), StateError> {
        lock(&self.serial).restore(state.serial)?;
        lock(&self.keyboard).restore(state.keyboard)?;
        lock(&self.panic_port).restore(&state.panic_port);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// The firmware tables tell the guest what the device takes.
const _: () = assert!(layout::ACPI_RESET_VALUE == brume_devices::RESET_VALUE);
const _: () = assert!(layout::ACPI_S5_SLEEP_TYPE == brume_devices::S5_SLEEP_TYPE);
const _: () = assert!(layout::COM1_SIZE as u64 == Serial::PORTS);
