// SPDX-License-Identifier: Apache-2.0
//! Time by the time-stamp counter, whose rate the host gives (`bare.tsc_khz`).

use core::sync::atomic::{AtomicU64, Ordering};

/// What durations are reckoned with when the host gave no rate; results then carry no time.
const ASSUMED_KHZ: u64 = 2_500_000;

/// How long to wait for what has to come, in milliseconds: the host may stand still meanwhile.
pub const LONG_MS: u64 = 30_000;

static KHZ: AtomicU64 = AtomicU64::new(0);

/// Sets the counter's rate; 0 means that it is unknown.
pub fn set_khz(khz: u64) {
    KHZ.store(khz, Ordering::Relaxed);
}

/// The counter now, in ticks.
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Ticks in so many milliseconds.
pub fn ms(count: u64) -> u64 {
    count.saturating_mul(match KHZ.load(Ordering::Relaxed) {
        0 => ASSUMED_KHZ,
        khz => khz,
    })
}

/// Nanoseconds in so many ticks; 0 when the rate is unknown.
pub fn ns(ticks: u64) -> u64 {
    match KHZ.load(Ordering::Relaxed) {
        0 => 0,
        khz => (u128::from(ticks) * 1_000_000 / u128::from(khz)) as u64,
    }
}

/// Waits for `done`, at most `timeout_ms`. Returns whether it came.
pub fn wait(timeout_ms: u64, mut done: impl FnMut() -> bool) -> bool {
    let start = now();
    let limit = ms(timeout_ms);
    loop {
        if done() {
            return true;
        }
        if now().wrapping_sub(start) > limit {
            // This processor may have stood still for all that time.
            return done();
        }
        core::hint::spin_loop();
    }
}
