// SPDX-License-Identifier: Apache-2.0
//! Reports a processor fault on the console, and runs single instructions at CPL0.
//!
//! The IDT is filled in here, at CPL3, since only its address had to be loaded at CPL0.

use crate::console::say;
use crate::end;

const GATE: u64 = 0x8e00; // present, DPL 0, interrupt gate
const KERNEL_CS: u64 = 0x10;

unsafe extern "C" {
    static mut idt: [[u64; 2]; 32];
    static fault_entries: [[u8; 16]; 32];
    static fault_record: [u64; 8];
    static mut ring0_call: u64;
    fn ring0_hlt();
    fn ring0_int3();
    fn ring0_popcnt();
    fn ring0_fetch_mmio();
}

/// Fills the IDT, so that faults are reported instead of ending the VM.
pub fn install() {
    // SAFETY: the symbols are boot.s's, and there is one thread.
    unsafe {
        for (vector, entry) in fault_entries.iter().enumerate() {
            let address = entry.as_ptr() as u64;
            let low = address & 0xffff | KERNEL_CS << 16 | GATE << 32 | (address >> 16) << 48;
            idt[vector] = [low, address >> 32];
        }
    }
}

/// Empties the IDT and faults: the processor shuts down (triple fault).
pub fn triple_fault() -> ! {
    // SAFETY: one thread; the processor reads the table itself, so the write must not be left out.
    unsafe {
        (&raw mut idt).write_volatile([[0; 2]; 32]);
        core::arch::asm!("ud2", options(noreturn));
    }
}

/// What [`ring0`] can do.
pub enum Ring0 {
    /// `cli; hlt` for ever.
    Halt,
    /// A breakpoint.
    Int3,
    /// A population count.
    Popcnt,
    /// A jump to where there is no memory.
    FetchMmio,
}

/// Goes to CPL0 for good, by a fault whose handler jumps there.
pub fn ring0(what: &Ring0) -> ! {
    let target = match what {
        Ring0::Halt => ring0_hlt as *const () as u64,
        Ring0::Int3 => ring0_int3 as *const () as u64,
        Ring0::Popcnt => ring0_popcnt as *const () as u64,
        Ring0::FetchMmio => ring0_fetch_mmio as *const () as u64,
    };
    // SAFETY: one thread; the handler reads it.
    unsafe {
        (&raw mut ring0_call).write_volatile(target);
        core::arch::asm!("ud2", options(noreturn));
    }
}

/// Where boot.s goes after a fault, back at CPL3.
#[unsafe(no_mangle)]
extern "C" fn bare_fault() -> ! {
    // SAFETY: boot.s filled it before it came here.
    let [vector, error, rip, _, flags, rsp, _, cr2] =
        unsafe { (&raw const fault_record).read_volatile() };
    say!(
        "fault vector={vector} error={error:#x} rip={rip:#x} rsp={rsp:#x} cr2={cr2:#x} rflags={flags:#x}"
    );
    end::reset()
}
