// SPDX-License-Identifier: Apache-2.0
//! Block benchmarks: as many requests as `bare.qd` in flight for `bare.ms`, polled.

use crate::blk::{self, Blk, SECTOR, kind, status};
use crate::console::say;
use crate::ring::Ring;
use crate::rng::Rng;
use crate::{clock, params};

/// One benchmark's shape.
#[derive(Clone, Copy)]
struct Load {
    kind: u32,
    random: bool,
    size: usize,
    depth: usize,
}

/// `blk-randread`, `blk-randwrite`, `blk-seqread`, `blk-seqwrite`.
pub fn run(step: &str) {
    let kind = if step.ends_with("write") {
        kind::OUT
    } else {
        kind::IN
    };
    let random = step.starts_with("blk-rand");
    let (size, depth) = if random { (4096, 32) } else { (1 << 20, 4) };
    let load = Load {
        kind,
        random,
        size: params::number("bare.bytes", size) as usize,
        depth: params::number("bare.qd", depth).clamp(1, 64) as usize,
    };
    let mut blk = Blk::open();
    let blocks = blk.capacity * SECTOR as u64 / load.size as u64;
    assert!(blocks > 0, "the disk is smaller than one request");
    let mut bench = Bench {
        slots: (0..load.depth).map(|_| Slot::new(load.size)).collect(),
        owners: [0; blk::QUEUE],
        load,
        blocks,
        next: 0,
        rng: Rng::new(params::number("bare.seed", 1)),
    };
    bench.run(&mut blk, params::number("bare.warmup_ms", 100));
    let notifies = blk.transport.notifies;
    let outcome = bench.run(&mut blk, params::number("bare.ms", 1000));
    say!(
        "{step} ops={} bytes={} ticks={} ns={} errors={} qd={} size={} notifies={}",
        outcome.ops,
        outcome.ops * load.size as u64,
        outcome.ticks,
        clock::ns(outcome.ticks),
        outcome.errors,
        load.depth,
        load.size,
        blk.transport.notifies - notifies,
    );
}

/// A request's buffers.
struct Slot {
    header: &'static mut [u8],
    data: &'static mut [u8],
    status: &'static mut [u8],
}

impl Slot {
    fn new(size: usize) -> Self {
        let control = crate::memory::take(64, 64);
        let (header, rest) = control.split_at_mut(16);
        let data = blk::buffer(size);
        // Touched now, so that no page is missing later; and not zeros, which a disk may not store.
        crate::pattern::fill(data, 1, 0, 0);
        Self {
            header,
            data,
            status: &mut rest[..1],
        }
    }

    fn add(&mut self, ring: &mut Ring<{ blk::QUEUE }>, kind: u32, sector: u64) -> u16 {
        self.header.copy_from_slice(&blk::header(kind, sector));
        self.status[0] = status::NONE;
        // SAFETY: the buffers are static, and `Bench` touches none of a slot in flight.
        let token = unsafe {
            if kind == kind::OUT {
                ring.add(&[self.header, self.data], &mut [self.status])
            } else {
                ring.add(&[self.header], &mut [self.data, self.status])
            }
        };
        token.expect("the queue holds all slots")
    }

    /// Returns whether the request succeeded.
    fn pop(&mut self, ring: &mut Ring<{ blk::QUEUE }>, token: u16) -> bool {
        // The status byte is read as the device left it, which the compiler cannot know.
        ring.pop(token, 3).is_ok() && *core::hint::black_box(&self.status[0]) == status::OK
    }
}

struct Outcome {
    ops: u64,
    errors: u64,
    ticks: u64,
}

struct Bench {
    load: Load,
    slots: alloc::vec::Vec<Slot>,
    /// The slot of each token.
    owners: [u8; blk::QUEUE],
    blocks: u64,
    next: u64,
    rng: Rng,
}

impl Bench {
    fn submit(&mut self, blk: &mut Blk, slot: usize) {
        let block = if self.load.random {
            self.rng.below(self.blocks)
        } else {
            let block = self.next;
            self.next = if block + 1 == self.blocks {
                0
            } else {
                block + 1
            };
            block
        };
        let sector = block * (self.load.size / SECTOR) as u64;
        let token = self.slots[slot].add(&mut blk.ring, self.load.kind, sector);
        self.owners[usize::from(token)] = slot as u8;
    }

    /// Keeps the queue full for so many milliseconds, then lets it drain; requests that complete
    /// while it drains count in neither the number nor the time.
    fn run(&mut self, blk: &mut Blk, duration: u64) -> Outcome {
        let mut outcome = Outcome {
            ops: 0,
            errors: 0,
            ticks: 0,
        };
        let start = clock::now();
        let limit = clock::ms(duration);
        for slot in 0..self.slots.len() {
            self.submit(blk, slot);
        }
        let mut in_flight = self.slots.len();
        blk.ring.kick(&mut blk.transport);
        let mut running = true;
        while in_flight > 0 {
            while let Some(token) = blk.ring.peek() {
                let slot = usize::from(self.owners[usize::from(token)]);
                let ok = self.slots[slot].pop(&mut blk.ring, token);
                outcome.errors += u64::from(!ok);
                if running {
                    outcome.ops += 1;
                    self.submit(blk, slot);
                } else {
                    in_flight -= 1;
                }
            }
            blk.ring.kick(&mut blk.transport);
            if running {
                outcome.ticks = clock::now() - start;
                running = outcome.ticks < limit;
            } else {
                core::hint::spin_loop();
            }
        }
        outcome
    }
}
