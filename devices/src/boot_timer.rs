// SPDX-License-Identifier: Apache-2.0
//! A register that a guest writes to say that it has come up.

use std::time::Duration;

use crate::bus::BusDevice;

/// The value that stops the timer.
pub const BOOT_TIMER_MAGIC: u8 = 123;

/// One byte at a fixed address: a write of [`BOOT_TIMER_MAGIC`] logs the time since the start.
///
/// The clock is given as a closure, since what counts as the start (this process, or the jailer
/// before it) is known to the program alone.
pub struct BootTimer {
    clock: Box<dyn Fn() -> (Duration, Duration) + Send>,
    done: bool,
}

impl BootTimer {
    /// A timer that asks `clock` for the wall time and the CPU time since the start.
    pub fn new(clock: impl Fn() -> (Duration, Duration) + Send + 'static) -> Self {
        Self {
            clock: Box::new(clock),
            done: false,
        }
    }
}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Only the first time counts: a guest that keeps writing must not fill the log.
        if self.done || offset != 0 || data.first() != Some(&BOOT_TIMER_MAGIC) {
            return;
        }
        self.done = true;
        let (wall, cpu) = (self.clock)();
        tracing::info!(
            "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
            wall.as_micros(),
            wall.as_millis(),
            cpu.as_micros(),
            cpu.as_millis()
        );
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn only_the_first_magic_write_reads_the_clock() {
        let asked = Arc::new(AtomicU32::new(0));
        let count = asked.clone();
        let mut timer = BootTimer::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
            (Duration::from_millis(3), Duration::from_millis(1))
        });
        timer.write(0, &[122]);
        timer.write(1, &[BOOT_TIMER_MAGIC]);
        timer.write(0, &[]);
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        timer.write(0, &[BOOT_TIMER_MAGIC, 0, 0, 0]);
        timer.write(0, &[BOOT_TIMER_MAGIC]);
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
