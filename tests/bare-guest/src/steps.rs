// SPDX-License-Identifier: Apache-2.0
//! The steps that the command line can ask for, and the small ones themselves.

use crate::boot_info::{self, BootInfo};
use crate::console::{self, say};
use crate::{
    balloon_check, blk_bench, blk_cases, blk_check, blk_live, clock, generation, hostile, live,
    live_blk, memory, mmio, net_bench, net_check, params, pattern, rng_check, vsock,
};

/// Mask registers of the two 8259s.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];

/// Runs the steps of `bare.do=STEP[,STEP]` in turn.
pub fn run(boot: &BootInfo) {
    for step in params::text("bare.do").unwrap_or("hello").split(',') {
        run_one(step, boot);
    }
}

fn run_one(step: &str, boot: &BootInfo) {
    match step {
        // boot.s has sent it.
        "first-byte" => {}
        "hello" => hello(boot),
        "boot-timer" => mmio::write32(mmio::BOOT_TIMER, 123),
        "echo" => echo(),
        "cpu-spin" => cpu_spin(),
        "generation" => generation::show(),
        "generation-watch" => generation::watch(),
        "blk-randread" | "blk-randwrite" | "blk-seqread" | "blk-seqwrite" => blk_bench::run(step),
        "blk-check" => blk_check::check(),
        "blk-verify" => blk_check::verify(),
        "blk-sg" => blk_cases::scattered(),
        "blk-ro" => blk_cases::read_only(),
        "blk-discard" => blk_cases::discard(),
        "blk-errors" => blk_cases::errors(),
        "blk-resize" => blk_live::resize(),
        "blk-two" => blk_live::two(),
        "net-echo" => net_check::echo(),
        "net-respond" => net_check::respond(),
        "net-gso" => net_check::segments(),
        "net-tx" => net_bench::transmit(),
        "net-rx" => net_bench::receive(),
        "net-rtt" => net_bench::round_trip(),
        "rng-check" => rng_check::run(),
        "balloon-check" => balloon_check::run(),
        "vsock-listen" => vsock::listen(),
        "vsock-connect" => vsock::connect(),
        "hostile-blk" => hostile::run_blk(),
        "hostile-net" => hostile::run_net(),
        "live" => live::run(boot),
        "live-blk" => live_blk::run(boot),
        "mem-check" => mem_check(boot),
        "fault" => fault(),
        "panic" => panicked(),
        _ => say!("error unknown-step {step}"),
    }
}

/// Tells what the guest was given.
fn hello(boot: &BootInfo) {
    let regions = boot.memory.regions();
    say!(
        "hello protocol={} ram={} regions={}",
        boot.protocol,
        boot.memory.ram(),
        regions.len()
    );
    say!("cmdline {}", boot.command_line);
    for region in regions {
        say!(
            "memory start={:#x} len={:#x} kind={}",
            region.start,
            region.len,
            region.kind
        );
    }
    let (start, end) = memory::free();
    say!("free start={start:#x} end={end:#x}");
    say!(
        "tables rsdp={:#x} initrd={:#x} initrd_len={}",
        boot.rsdp,
        boot.initrd.0,
        boot.initrd.1
    );
    say!(
        "interrupts pic_masks={:#x},{:#x}",
        console::inb(PIC_MASKS[0]),
        console::inb(PIC_MASKS[1])
    );
    mmio::each_device(|base, id| {
        let word = |n| {
            mmio::write32(base + 0x14, n);
            u64::from(mmio::read32(base + 0x10))
        };
        say!(
            "device base={base:#x} id={id} features={:#x}",
            word(0) | word(1) << 32
        );
    });
}

/// Says by pvpanic that the kernel has panicked, again and again, and goes on.
fn panicked() {
    const PORT: u16 = 0x505;
    let events = console::inb(PORT);
    for _ in 0..100 {
        console::outb(PORT, 1);
    }
    say!("panicked events={events:#x}");
}

/// Prints back each line that comes in on the serial port, until one says `end`.
fn echo() {
    let mut line = [0; 256];
    let mut len = 0;
    say!("echo ready");
    loop {
        match console::read_byte() {
            Some(b'\r' | b'\n') => {
                let text = core::str::from_utf8(&line[..len]).unwrap_or("(not text)");
                say!("echo {text}");
                if text == "end" {
                    return;
                }
                len = 0;
            }
            Some(byte) if len < line.len() => {
                line[len] = byte;
                len += 1;
            }
            Some(_) | None => {}
        }
    }
}

/// Counts for `bare.ms`, and tells the longest time in which it did not run.
fn cpu_spin() {
    let limit = clock::ms(params::number("bare.ms", 1000));
    let start = clock::now();
    let (mut loops, mut last, mut gap) = (0_u64, start, 0);
    while last - start < limit {
        let now = clock::now();
        gap = gap.max(now - last);
        last = now;
        loops += 1;
    }
    let ticks = last - start;
    say!(
        "cpu-spin loops={loops} ticks={ticks} ns={} gap_ns={}",
        clock::ns(ticks),
        clock::ns(gap)
    );
}

/// Writes a number to every `bare.stride`-th byte of all free memory, above 4 GiB too, then reads
/// them all back: memory that is not there, or is there twice, shows.
fn mem_check(boot: &BootInfo) {
    let stride = params::number("bare.stride", 2 << 20).max(8);
    let ram = || {
        boot.memory
            .regions()
            .iter()
            .filter(|region| region.kind == boot_info::RAM)
    };
    ram().for_each(|region| memory::map_high(region.start, region.len));
    let free = memory::free().0;
    // The first MiB is the loader's; what lies below `free` is the image and what it took.
    let places = || {
        ram()
            .flat_map(move |region| {
                let end = region.start + region.len;
                (region.start.max(free).next_multiple_of(stride)..end.saturating_sub(8))
                    .step_by(stride as usize)
            })
            .map(|address| (address as *mut u64, pattern::mix(address)))
    };
    let start = clock::now();
    // SAFETY: the map says that memory is there, it is mapped, and nothing of the guest's lies
    // from `free` on.
    places().for_each(|(at, value)| unsafe { at.write_volatile(value) });
    // SAFETY: as above.
    let wrong = places()
        .filter(|&(at, value)| unsafe { at.read_volatile() } != value)
        .count();
    let ticks = clock::now() - start;
    say!(
        "mem-check ram={} checked={} wrong={wrong} ticks={ticks} ns={}",
        boot.memory.ram(),
        places().count(),
        clock::ns(ticks)
    );
}

/// Reads where nothing is mapped: ends with the report of a page fault.
fn fault() {
    let nowhere = (1_u64 << 46) as *const u8;
    // SAFETY: the fault is the purpose, and its handler does not return.
    unsafe { nowhere.read_volatile() };
}
