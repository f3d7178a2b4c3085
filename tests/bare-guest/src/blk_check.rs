// SPDX-License-Identifier: Apache-2.0
//! `blk-check` and `blk-verify`: random reads and writes through virtio-drivers' own block driver,
//! every sector checked against a model.

use crate::console::say;
use crate::memory::{self, BareHal};
use crate::mmio::{self, Mmio};
use crate::pattern::{self, SECTOR};
use crate::plan::{self, Op, Plan};
use crate::rng::Rng;
use crate::{blk, params};
use alloc::vec::Vec;
use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, VirtIOBlk};
use virtio_drivers::transport::DeviceType;

/// Sectors in one request of the first filling and of the last check.
const CHUNK: u64 = 256;

/// In flight at once; three descriptors each, in the driver's queue of 16.
const DEPTH: usize = 5;

/// Buffers begin up to so many bytes after a page's start, since no driver promises alignment.
const MAX_SHIFT: usize = 512;

/// `blk-check`: fills the window, runs the plan, flushes, and checks all of it.
pub fn check() {
    let mut check = Check::open("blk-check");
    if check.disk.readonly() {
        say!("blk-check errors=1 read-only");
        return;
    }
    check.fill();
    check.run_plan();
    if check.disk.flush().is_err() {
        check.errors += 1;
    }
    check.verify();
    check.report();
}

/// `blk-verify`: checks that the disk holds what `blk-check` with the same parameters left, and
/// writes nothing.
pub fn verify() {
    let mut check = Check::open("blk-verify");
    plan::generations(check.plan.clone(), check.generations);
    check.verify();
    check.report();
}

struct Check {
    name: &'static str,
    disk: VirtIOBlk<BareHal, Mmio>,
    plan: Plan,
    seed: u64,
    generations: &'static mut [u32],
    max: u64,
    /// Draws buffer shifts; apart from the plan, which the host must be able to follow.
    rng: Rng,
    slots: Vec<Slot>,
    reads: u64,
    writes: u64,
    flushes: u64,
    errors: u64,
    mismatches: u64,
}

/// A request in flight and its buffers.
struct Slot {
    token: Option<u16>,
    op: Op,
    request: BlkReq,
    response: BlkResp,
    memory: &'static mut [u8],
    shift: usize,
}

impl Slot {
    fn new(max: u64) -> Self {
        Self {
            token: None,
            op: Op::Flush,
            request: BlkReq::default(),
            response: BlkResp::default(),
            memory: blk::buffer(max as usize * SECTOR + MAX_SHIFT),
            shift: 0,
        }
    }
}

/// The sectors that an operation covers.
fn range(op: Op) -> (u64, u64) {
    match op {
        Op::Read { sector, count } | Op::Write { sector, count } => (sector, count),
        Op::Flush => (0, 0),
    }
}

/// Whether two operations may not be in flight together.
fn conflict(a: Op, b: Op) -> bool {
    let ((a_start, a_len), (b_start, b_len)) = (range(a), range(b));
    let reads = matches!((a, b), (Op::Read { .. }, Op::Read { .. }));
    !reads && a_start < b_start + b_len && b_start < a_start + a_len
}

impl Check {
    fn open(name: &'static str) -> Self {
        let base = mmio::find(DeviceType::Block).expect("no block device");
        let transport = Mmio::new(base).expect("not a virtio device");
        let mut disk = VirtIOBlk::<BareHal, _>::new(transport).expect("no block driver");
        let capacity = disk.capacity();
        let mut id = [0; 20];
        let serial = match disk.device_id(&mut id) {
            Ok(len) => core::str::from_utf8(&id[..len]).unwrap_or("(not text)"),
            Err(_) => "(none)",
        };
        say!(
            "{name} capacity={capacity} readonly={} serial={serial}",
            disk.readonly()
        );
        let window = params::number("bare.sectors", 32768).min(capacity);
        let max = params::number("bare.max_sectors", CHUNK).clamp(1, window);
        let seed = params::number("bare.seed", 1);
        let bytes = memory::take(window as usize * 4, 4096);
        // SAFETY: taken for this alone, aligned to a page, and any bits are a u32.
        let generations = unsafe {
            core::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<u32>(), window as usize)
        };
        Self {
            name,
            disk,
            plan: Plan::new(seed, window, max, params::number("bare.ops", 2000)),
            seed,
            generations,
            max,
            rng: Rng::new(!seed),
            slots: (0..DEPTH).map(|_| Slot::new(max.max(CHUNK))).collect(),
            reads: 0,
            writes: 0,
            flushes: 0,
            errors: 0,
            mismatches: 0,
        }
    }

    fn window(&self) -> u64 {
        self.generations.len() as u64
    }

    /// Writes generation 1 of every sector, one request at a time.
    fn fill(&mut self) {
        self.generations.fill(1);
        let mut sector = 0;
        while sector < self.window() {
            let count = CHUNK.min(self.window() - sector);
            let data = &mut self.slots[0].memory[..count as usize * SECTOR];
            for (i, bytes) in data.chunks_mut(SECTOR).enumerate() {
                pattern::fill(bytes, self.seed, sector + i as u64, 1);
            }
            self.errors += u64::from(self.disk.write_blocks(sector as usize, data).is_err());
            sector += count;
        }
    }

    /// Reads the whole window, one request at a time, and compares it with the model.
    fn verify(&mut self) {
        let mut sector = 0;
        while sector < self.window() {
            let count = CHUNK.min(self.window() - sector);
            let data = &mut self.slots[0].memory[..count as usize * SECTOR];
            data.fill(0xa5);
            let failed = self.disk.read_blocks(sector as usize, data).is_err();
            self.errors += u64::from(failed);
            self.compare(0, 0, sector, count);
            sector += count;
        }
    }

    /// Compares a slot's buffer with the model; only the first few differences are told.
    fn compare(&mut self, slot: usize, shift: usize, sector: u64, count: u64) {
        let data = &self.slots[slot].memory[shift..][..count as usize * SECTOR];
        for (at, bytes) in (sector..).zip(data.chunks(SECTOR)) {
            let generation = self.generations[at as usize];
            if !pattern::matches(bytes, self.seed, at, generation.into()) {
                self.mismatches += 1;
                if self.mismatches <= 4 {
                    say!("{} mismatch sector={at} generation={generation}", self.name);
                }
            }
        }
    }

    /// Runs the plan with up to [`DEPTH`] requests in flight. A request waits until none that
    /// touches the same sectors is left, and a flush until none is left at all.
    fn run_plan(&mut self) {
        for op in self.plan.clone() {
            if op == Op::Flush {
                self.drain();
                self.flushes += 1;
                self.errors += u64::from(self.disk.flush().is_err());
                continue;
            }
            while self
                .slots
                .iter()
                .any(|slot| slot.token.is_some() && conflict(slot.op, op))
            {
                self.complete();
            }
            let slot = loop {
                match self.slots.iter().position(|slot| slot.token.is_none()) {
                    Some(slot) => break slot,
                    None => self.complete(),
                }
            };
            self.submit(slot, op);
        }
        self.drain();
    }

    fn drain(&mut self) {
        while self.slots.iter().any(|slot| slot.token.is_some()) {
            self.complete();
        }
    }

    fn submit(&mut self, slot: usize, op: Op) {
        plan::advance(self.generations, op);
        let (sector, count) = range(op);
        let slot = &mut self.slots[slot];
        slot.op = op;
        slot.shift = self.rng.below(MAX_SHIFT as u64) as usize;
        let data = &mut slot.memory[slot.shift..][..count as usize * SECTOR];
        let at = sector as usize;
        // SAFETY: the slot's buffers are static or live as long as the driver, and are not touched
        // before `complete` has taken the token.
        let token = unsafe {
            if matches!(op, Op::Write { .. }) {
                self.writes += 1;
                for (i, bytes) in data.chunks_mut(SECTOR).enumerate() {
                    let generation = self.generations[at + i];
                    pattern::fill(bytes, self.seed, (at + i) as u64, generation.into());
                }
                self.disk
                    .write_blocks_nb(at, &mut slot.request, data, &mut slot.response)
            } else {
                self.reads += 1;
                data.fill(0xa5);
                self.disk
                    .read_blocks_nb(at, &mut slot.request, data, &mut slot.response)
            }
        };
        slot.token = Some(token.expect("the driver's queue is full"));
    }

    /// Waits for one request, whichever the device finishes next, and checks it.
    fn complete(&mut self) {
        let token = loop {
            match self.disk.peek_used() {
                Some(token) => break token,
                None => core::hint::spin_loop(),
            }
        };
        let index = self.slots.iter().position(|slot| slot.token == Some(token));
        let index = index.expect("the device returned a request that it does not have");
        let slot = &mut self.slots[index];
        slot.token = None;
        let (sector, count) = range(slot.op);
        let data = &mut slot.memory[slot.shift..][..count as usize * SECTOR];
        let write = matches!(slot.op, Op::Write { .. });
        // SAFETY: the same buffers as in `submit`.
        let result = unsafe {
            if write {
                self.disk
                    .complete_write_blocks(token, &slot.request, data, &mut slot.response)
            } else {
                self.disk
                    .complete_read_blocks(token, &slot.request, data, &mut slot.response)
            }
        };
        if result.is_err() || slot.response.status() != RespStatus::OK {
            self.errors += 1;
        } else if !write {
            let shift = slot.shift;
            self.compare(index, shift, sector, count);
        }
    }

    fn report(self) {
        say!(
            "{} reads={} writes={} flushes={} errors={} mismatches={} sectors={} seed={} max={}",
            self.name,
            self.reads,
            self.writes,
            self.flushes,
            self.errors,
            self.mismatches,
            self.window(),
            self.seed,
            self.max,
        );
    }
}
