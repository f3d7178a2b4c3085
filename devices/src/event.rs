// SPDX-License-Identifier: Apache-2.0
//! What a guest asks of the machine as a whole.

use std::fmt;
use std::sync::Arc;

/// A request of the guest that concerns the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest asked for a restart (keyboard controller or ACPI reset register).
    Reset,
    /// The guest powered itself off (ACPI sleep state S5).
    PowerOff,
    /// The guest's kernel panicked (pvpanic); the guest may go on.
    Panicked,
}

/// Where devices report [`GuestEvent`]s.
///
/// It is called on a vCPU thread while that vCPU's I/O access is being emulated, so it must not
/// block: it hands the event to the owner of the machine and returns.
#[derive(Clone)]
pub struct EventSink(Arc<dyn Fn(GuestEvent) + Send + Sync>);

impl EventSink {
    /// A sink that calls `report` with each event.
    pub fn new(report: impl Fn(GuestEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(report))
    }

    /// Reports one event.
    pub fn report(&self, event: GuestEvent) {
        (self.0)(event);
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventSink")
    }
}
