// SPDX-License-Identifier: Apache-2.0
//! Which machine this is: the VM generation id and the counters of the VMClock page, as they are
//! in memory.

use crate::console::say;
use crate::params;
use core::fmt::{self, Display, Formatter};
use core::sync::atomic::{Ordering, fence};

const VMGENID_PAGE: u64 = 0xe_e000;
const VMCLOCK_PAGE: u64 = 0xe_f000;
const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");

/// Addresses of both pages, from the command line if it has them.
pub struct Pages {
    id: u64,
    clock: u64,
}

/// A VM generation id; shown as 32 hexadecimal digits.
#[derive(PartialEq)]
pub struct Id([u8; 16]);

impl Display for Id {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Prints it once.
pub fn show() {
    let pages = Pages::new();
    pages.say("generation", &pages.id());
}

/// Prints it, and again each time that the id has changed, `bare.ops` times (for ever without).
pub fn watch() {
    let pages = Pages::new();
    let mut left = params::number("bare.ops", u64::MAX);
    let mut id = pages.id();
    pages.say("generation-watch", &id);
    while left > 0 {
        let now = pages.id();
        if now != id {
            id = now;
            left -= 1;
            pages.say("generation-watch", &id);
        }
        core::hint::spin_loop();
    }
}

impl Pages {
    /// Those of this machine.
    pub fn new() -> Self {
        Self {
            id: params::number("bare.vmgenid", VMGENID_PAGE),
            clock: params::number("bare.vmclock", VMCLOCK_PAGE),
        }
    }

    /// The id. This machine may have become another one halfway through, so it is read until it is
    /// the same twice.
    pub fn id(&self) -> Id {
        let read = || peek::<[u8; 16]>(self.id);
        let mut id = read();
        loop {
            let again = read();
            if again == id {
                return Id(id);
            }
            id = again;
        }
    }

    /// Disruption marker and generation counter, if there is a VMClock page.
    pub fn clock(&self) -> Option<(u64, u64)> {
        let (_, disruption, generation) = self.has_clock().then(|| self.counters())?;
        Some((disruption, generation))
    }

    fn has_clock(&self) -> bool {
        peek::<u32>(self.clock) == MAGIC
    }

    fn say(&self, step: &str, id: &Id) {
        if !self.has_clock() {
            say!("{step} id={id} vmclock=none");
            return;
        }
        let (seq, disruption, generation) = self.counters();
        say!(
            "{step} id={id} vmclock=v{} flags={:#x} seq={seq} disruption={disruption} \
             generation={generation}",
            peek::<u16>(self.clock + 8),
            peek::<u64>(self.clock + 24)
        );
    }

    /// Sequence count, disruption marker and generation counter, from between two updates.
    fn counters(&self) -> (u32, u64, u64) {
        loop {
            let seq = peek::<u32>(self.clock + 12);
            fence(Ordering::SeqCst);
            let counters = (peek(self.clock + 16), peek(self.clock + 104));
            fence(Ordering::SeqCst);
            if seq & 1 == 0 && seq == peek(self.clock + 12) {
                return (seq, counters.0, counters.1);
            }
        }
    }
}

fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: the addresses are of reserved memory below 1 MiB, or what the command line says;
    // everything below 4 GiB is mapped, and every value of the types read is one.
    unsafe { (address as *const T).read_volatile() }
}
