// SPDX-License-Identifier: Apache-2.0
//! `balloon-check`: memory goes to the host by each way that a balloon has, and comes back.

use crate::blk::buffer;
use crate::console::{self, say};
use crate::mmio::{self, EVENT_IDX, INDIRECT_DESC, Mmio};
use crate::ring::Ring;
use crate::{clock, params, pattern};
use virtio_drivers::transport::Transport;

/// `MemoryBalloon` of virtio-drivers is the number of another device.
const DEVICE_ID: u32 = 5;
const QUEUE: usize = 16;
const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
/// Page numbers in a request, as Linux sends them.
const NUMBERS: usize = 256;

const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const FREE_PAGE_HINT: u64 = 1 << 3;
const PAGE_REPORTING: u64 = 1 << 5;

/// Fields of the configuration space.
const NUM_PAGES: u64 = 0x100;
const ACTUAL: u64 = 0x104;
const HINT_CMD: u64 = 0x108;

struct Balloon {
    transport: Mmio,
    features: u64,
}

/// One of its queues.
struct Way {
    ring: Ring<QUEUE>,
}

impl Way {
    fn new(transport: &mut Mmio, index: &mut u16) -> Self {
        let ring = Ring::new(transport, *index).expect("a queue is missing");
        *index += 1;
        Self { ring }
    }

    /// Sends buffers and leaves them with the device.
    fn offer<'a>(
        &mut self,
        transport: &mut Mmio,
        input: &[&'a [u8]],
        output: &mut [&'a mut [u8]],
    ) -> u16 {
        // SAFETY: the callers leave the buffers alone until the device is through.
        let token = unsafe { self.ring.add(input, output) }.expect("the queue is full");
        self.ring.kick(transport);
        token
    }

    /// Waits until the device is through with `token`; whether that was in time.
    fn done(&mut self, token: u16) -> bool {
        clock::wait(clock::LONG_MS, || self.ring.peek() == Some(token))
            && self.ring.pop(token, 1).is_ok()
    }

    fn send<'a>(&mut self, transport: &mut Mmio, input: &[&'a [u8]], output: &mut [&'a mut [u8]]) {
        let token = self.offer(transport, input, output);
        assert!(self.done(token), "no answer");
    }

    /// Sends the numbers of all pages of `memory`.
    fn send_pages(&mut self, transport: &mut Mmio, memory: &[u8], numbers: &mut [u8]) {
        for part in memory.chunks(NUMBERS * PAGE) {
            let first = (part.as_ptr() as usize / PAGE) as u32;
            let count = part.len() / PAGE;
            for (number, to) in (first..).zip(numbers.chunks_mut(4).take(count)) {
                to.copy_from_slice(&number.to_le_bytes());
            }
            self.send(transport, &[&numbers[..4 * count]], &mut []);
        }
    }
}

/// Writes to each page.
fn fill(memory: &mut [u8]) {
    for page in memory.chunks_mut(PAGE) {
        let value = pattern::mix(page.as_ptr() as u64) | 1;
        page[..8].copy_from_slice(&value.to_le_bytes());
    }
}

/// Looks at every 16th page: how many hold what was written, and how many zero.
fn look(memory: &[u8]) -> (usize, usize) {
    let (mut kept, mut zero) = (0, 0);
    for page in core::hint::black_box(memory).chunks(PAGE).step_by(16) {
        let mut word = [0; 8];
        word.copy_from_slice(&page[..8]);
        match u64::from_le_bytes(word) {
            0 => zero += 1,
            value if value == pattern::mix(page.as_ptr() as u64) | 1 => kept += 1,
            _ => {}
        }
    }
    (kept, zero)
}

impl Balloon {
    fn open() -> Self {
        let base = mmio::find_id(DEVICE_ID).expect("no balloon");
        let mut transport = Mmio::new(base).expect("not a device");
        let wanted = STATS_VQ | DEFLATE_ON_OOM | FREE_PAGE_HINT | PAGE_REPORTING;
        let features = transport.negotiate(wanted | EVENT_IDX | INDIRECT_DESC);
        Self {
            transport,
            features,
        }
    }

    fn field(&self, offset: u64) -> u32 {
        mmio::read32(self.transport.base + offset)
    }

    fn set_actual(&self, pages: usize) {
        mmio::write32(self.transport.base + ACTUAL, pages as u32);
    }
}

/// Waits for a target, lets go of that much memory by the inflate queue, takes it back, and does
/// the same with the queues of reports and, for `bare.ms`, of hints. Statistics are told once.
pub fn run() {
    let mut balloon = Balloon::open();
    let mut index = 0;
    let transport = &mut balloon.transport;
    let mut inflate = Way::new(transport, &mut index);
    let mut deflate = Way::new(transport, &mut index);
    let features = balloon.features;
    let mut next =
        |feature| (features & feature != 0).then(|| Way::new(&mut *transport, &mut index));
    let mut statistics = next(STATS_VQ);
    let mut hints = next(FREE_PAGE_HINT);
    let mut reports = next(PAGE_REPORTING);
    balloon.transport.finish_init();
    if let Some(way) = &mut statistics {
        tell(&mut balloon, way);
    }
    let wait = params::number("bare.ms", 2000);
    clock::wait(wait, || balloon.field(NUM_PAGES) != 0);
    let pages = balloon.field(NUM_PAGES) as usize;
    let memory = buffer(pages * PAGE);
    let numbers = buffer(4 * NUMBERS);
    fill(memory);
    say!(
        "balloon filled mib={} features={:#x}",
        memory.len() / MIB,
        balloon.features
    );
    hold();
    inflate.send_pages(&mut balloon.transport, memory, numbers);
    balloon.set_actual(pages);
    say!("balloon inflated pages={pages}");
    hold();
    let (kept, zero) = look(memory);
    deflate.send_pages(&mut balloon.transport, memory, numbers);
    balloon.set_actual(0);
    fill(memory);
    let (again, _) = look(memory);
    say!("balloon inflate kept={kept} zero={zero} again={again}");
    if let Some(way) = &mut reports {
        way.send(&mut balloon.transport, &[], &mut [&mut *memory]);
        let (kept, zero) = look(memory);
        say!("balloon report kept={kept} zero={zero}");
    }
    if let Some(way) = &mut hints {
        fill(memory);
        hint(&mut balloon, way, memory, wait);
    }
    // Dropping it would reset the device, which then forgets what the host may want to see.
    core::mem::forget(balloon);
}

/// Waits for a byte from the console, if it is to.
fn hold() {
    if params::number("bare.hold", 0) == 0 {
        return;
    }
    while console::read_byte().is_none() {
        core::hint::spin_loop();
    }
}

/// Sends statistics; the device keeps the buffer.
fn tell(balloon: &mut Balloon, way: &mut Way) {
    let entries = buffer(20);
    for (entry, (tag, value)) in entries
        .chunks_mut(10)
        .zip([(4_u16, 1_u64 << 20), (5, 2 << 20)])
    {
        entry[..2].copy_from_slice(&tag.to_le_bytes());
        entry[2..].copy_from_slice(&value.to_le_bytes());
    }
    way.offer(&mut balloon.transport, &[entries], &mut []);
}

/// Waits for a command to hint, and hints `memory`.
fn hint(balloon: &mut Balloon, way: &mut Way, memory: &mut [u8], wait: u64) {
    if !clock::wait(wait, || balloon.field(HINT_CMD) > 1) {
        say!("balloon hint run=none");
        return;
    }
    let run = balloon.field(HINT_CMD);
    let command = buffer(4);
    command.copy_from_slice(&run.to_le_bytes());
    way.send(&mut balloon.transport, &[command], &mut []);
    way.send(&mut balloon.transport, &[], &mut [&mut *memory]);
    let (kept, zero) = look(memory);
    command.fill(0);
    way.send(&mut balloon.transport, &[command], &mut []);
    let end = clock::wait(wait, || balloon.field(HINT_CMD) == 1);
    say!(
        "balloon hint run={run} kept={kept} zero={zero} end={}",
        u8::from(end)
    );
}
