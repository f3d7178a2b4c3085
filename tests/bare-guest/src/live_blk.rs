// SPDX-License-Identifier: Apache-2.0
//! `live-blk`: a disk at work for ever, with a full queue, while the machine is saved and restored.
//!
//! Each request slot has a piece of the disk to itself, which it writes with its next generation,
//! then reads back and compares. Memory besides is written as the host asks.

use crate::area::Area;
use crate::blk::{self, Blk, SECTOR, header, kind, status};
use crate::boot_info::BootInfo;
use crate::console::{self, say};
use crate::rng::Rng;
use crate::{clock, end, params, pattern};
use alloc::vec::Vec;
use core::hint::black_box;

const PAGES_PER_MIB: u64 = 256;
/// Descriptors of each request: header, data, status.
const PIECES: usize = 3;
/// Of how many requests the answers are looked at in a turn, so that the queue is never empty.
const AT_ONCE: usize = 4;

/// What a slot waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Writing,
    Reading,
}

/// A request at a time, and its buffers.
struct Slot {
    doing: Doing,
    token: u16,
    /// Whether its piece of the disk was read since it was written.
    read_back: bool,
    generation: u64,
    head: &'static mut [u8],
    data: &'static mut [u8],
    answer: &'static mut [u8],
}

struct Disk {
    blk: Blk,
    slots: Vec<Slot>,
    seed: u64,
    /// Whether nothing more is written, and whether nothing more is asked.
    read_only: bool,
    rests: bool,
    ops: u64,
    bytes: u64,
    errors: u64,
    bad: u64,
}

impl Disk {
    fn open() -> Self {
        let blk = Blk::open();
        let len = params::number("bare.bytes", 4096) as usize;
        let depth = params::number("bare.qd", 32);
        assert!(depth * len as u64 <= blk.capacity * SECTOR as u64);
        let slot = |_| Slot {
            doing: Doing::Nothing,
            token: 0,
            read_back: true,
            generation: 0,
            head: blk::buffer(16),
            data: blk::buffer(len),
            answer: blk::buffer(1),
        };
        Self {
            blk,
            slots: (0..depth).map(slot).collect(),
            seed: params::number("bare.seed", 1),
            read_only: false,
            rests: false,
            ops: 0,
            bytes: 0,
            errors: 0,
            bad: 0,
        }
    }

    /// Gives every slot that does nothing a request.
    fn submit(&mut self) {
        if self.rests {
            return;
        }
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.doing != Doing::Nothing {
                continue;
            }
            let write = slot.generation == 0 || (slot.read_back && !self.read_only);
            let sector = (index * slot.data.len() / SECTOR) as u64;
            let Slot {
                head, data, answer, ..
            } = slot;
            let added = if write {
                slot.generation += 1;
                pattern::fill(data, self.seed, sector, slot.generation);
                head.copy_from_slice(&header(kind::OUT, sector));
                answer[0] = status::NONE;
                slot.doing = Doing::Writing;
                // SAFETY: the buffers are never freed, and are touched again only when the request
                // is back.
                unsafe { self.blk.ring.add(&[head, data], &mut [&mut **answer]) }
            } else {
                data.fill(0);
                head.copy_from_slice(&header(kind::IN, sector));
                answer[0] = status::NONE;
                slot.doing = Doing::Reading;
                // SAFETY: as above.
                unsafe {
                    self.blk
                        .ring
                        .add(&[head], &mut [&mut **data, &mut **answer])
                }
            };
            slot.token = added.expect("the queue holds all slots");
        }
        self.blk.ring.kick(&mut self.blk.transport);
    }

    /// Looks at what has come back.
    fn reap(&mut self) {
        for _ in 0..AT_ONCE {
            let Some(token) = self.blk.ring.peek() else {
                return;
            };
            let mut slots = self.slots.iter_mut().enumerate();
            let slot = slots.find(|(_, slot)| slot.doing != Doing::Nothing && slot.token == token);
            let (index, slot) = slot.expect("the device returned a request that it does not have");
            let popped = self.blk.ring.pop(token, PIECES);
            popped.expect("the device returned a request twice");
            self.ops += 1;
            self.bytes += slot.data.len() as u64;
            self.errors += u64::from(black_box(&*slot.answer)[0] != status::OK);
            slot.read_back = slot.doing == Doing::Reading;
            if slot.read_back {
                let sector = (index * slot.data.len() / SECTOR) as u64;
                let data = black_box(&*slot.data);
                self.bad += u64::from(!pattern::matches(data, self.seed, sector, slot.generation));
            }
            slot.doing = Doing::Nothing;
        }
    }

    fn in_flight(&self) -> usize {
        self.slots
            .iter()
            .filter(|slot| slot.doing != Doing::Nothing)
            .count()
    }

    fn tell(&self) {
        say!(
            "live-blk ops={} bytes={} errors={} bad={} inflight={}",
            self.ops,
            self.bytes,
            self.errors,
            self.bad,
            self.in_flight()
        );
    }
}

/// Keeps the disk at work, and answers the host until that says `p`.
pub fn run(boot: &BootInfo) {
    let mut disk = Disk::open();
    // The last to take memory.
    let pages = params::number("bare.area", 1) * PAGES_PER_MIB;
    let mut area = Area::new(&boot.memory, pages, disk.seed);
    let mut rng = Rng::new(disk.seed);
    let interval = clock::ms(1) * params::number("bare.poll_us", 200) / 1000;
    let mut polled = clock::now();
    say!("live-blk ready");
    loop {
        disk.submit();
        disk.reap();
        if clock::now().wrapping_sub(polled) < interval {
            continue;
        }
        while let Some(command) = console::read_byte() {
            answer(command, &mut disk, &mut area, &mut rng);
        }
        polled = clock::now();
    }
}

fn answer(command: u8, disk: &mut Disk, area: &mut Area, rng: &mut Rng) {
    match command {
        b'?' => disk.tell(),
        // No more writes: a machine that goes on after it was saved leaves the disk as it is.
        b'r' => {
            disk.read_only = true;
            let written = |disk: &mut Disk| {
                disk.reap();
                disk.slots.iter().all(|slot| slot.doing != Doing::Writing)
            };
            while !written(disk) {}
            disk.tell();
        }
        b's' => {
            disk.rests = true;
            while disk.in_flight() > 0 {
                disk.reap();
            }
            disk.tell();
        }
        b'g' => {
            disk.read_only = false;
            disk.rests = false;
            disk.tell();
        }
        b'w' => {
            let count = 1 + rng.below(area.pages() / 4);
            (0..count).for_each(|_| area.write(rng.below(area.pages())));
            say!("wrote {count}");
        }
        b'z' => {
            let count = 1 + rng.below(area.pages() / 8);
            (0..count).for_each(|_| area.zero(rng.below(area.pages())));
            say!("zeroed {count}");
        }
        b'h' => match area.hash() {
            (hash, None) => say!("hash {hash:016x} ok"),
            (hash, Some(page)) => say!("hash {hash:016x} BAD page {page}"),
        },
        b'p' => end::power_off(),
        _ => {}
    }
}
