// SPDX-License-Identifier: Apache-2.0
//! A freestanding guest that drives a VMM's devices at native speed, for tests and benchmarks.
//!
//! Booted as an ELF by PVH or by the 64-bit Linux protocol, it drops to CPL3 at once (`boot.s`),
//! polls everything and takes no interrupt. The kernel command line says what to do
//! (`bare.do=STEP[,STEP]`); lines that begin with `bare: ` on COM1 say what came out.
//! `README.md` lists the steps.

#![no_std]
#![no_main]

extern crate alloc;

mod area;
mod balloon_check;
mod blk;
mod blk_bench;
mod blk_cases;
mod blk_check;
mod blk_live;
mod boot_info;
mod clock;
mod cmdline;
mod console;
mod end;
mod fault;
mod frame;
mod generation;
mod hostile;
mod hostile_blk;
mod hostile_net;
mod hostile_queue;
mod hostile_regs;
mod libc;
mod live;
mod live_blk;
mod memory;
mod mmio;
mod net;
mod net_bench;
mod net_check;
mod params;
mod pattern;
mod plan;
mod ring;
mod rng;
mod rng_check;
mod steps;
mod turns;
mod vsock;

use console::say;

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

/// The first Rust code, at CPL3: `boot.s` calls it.
///
/// `protocol` is 0 for the 64-bit Linux protocol (`info` is `boot_params`) and 1 for PVH (`info` is
/// `hvm_start_info`).
#[unsafe(no_mangle)]
extern "C" fn bare_main(protocol: u32, info: u64) -> ! {
    // SAFETY: boot.s hands over what the VMM gave it, and everything below 4 GiB is mapped.
    let boot = unsafe { boot_info::read(protocol, info) };
    params::set(boot.command_line);
    clock::set_khz(params::number("bare.tsc_khz", 0));
    fault::install();
    memory::init(&boot.memory);
    steps::run(&boot);
    end::end()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => say!("panic {}:{} {}", at.file(), at.line(), info.message()),
        None => say!("panic {}", info.message()),
    }
    end::reset()
}
