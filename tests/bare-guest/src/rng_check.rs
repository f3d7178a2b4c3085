// SPDX-License-Identifier: Apache-2.0
//! `rng-check`: random bytes from a virtio entropy device.

use crate::blk::buffer;
use crate::clock;
use crate::console::say;
use crate::mmio::{self, EVENT_IDX, INDIRECT_DESC, Mmio};
use crate::params;
use crate::ring::Ring;
use virtio_drivers::transport::{DeviceType, Transport};

const QUEUE: usize = 16;

/// Asks `bare.ops` times for `bare.bytes` bytes, and counts how often each bit is set.
pub fn run() {
    let ops = params::number("bare.ops", 16);
    let bytes = params::number("bare.bytes", 4096) as usize;
    let base = mmio::find(DeviceType::EntropySource).expect("no entropy device");
    let mut transport = Mmio::new(base).expect("not a device");
    let features = transport.negotiate(EVENT_IDX | INDIRECT_DESC);
    let mut ring: Ring<QUEUE> = Ring::new(&mut transport, 0).expect("no queue");
    transport.finish_init();
    let room = buffer(bytes);
    let (mut got, mut ones, mut same) = (0_u64, 0_u64, 0_u64);
    let mut last = 0;
    for _ in 0..ops {
        room.fill(0);
        // SAFETY: nothing else uses the buffer until it is popped.
        let token = unsafe { ring.add(&[], &mut [&mut *room]) }.expect("the queue is full");
        ring.kick(&mut transport);
        if !clock::wait(clock::LONG_MS, || ring.peek() == Some(token)) {
            say!("error rng-check timeout");
            return;
        }
        let len = ring.pop(token, 1).unwrap_or(0) as usize;
        let filled = core::hint::black_box(&*room).get(..len).unwrap_or_default();
        got += len as u64;
        ones += filled
            .iter()
            .map(|b| u64::from(b.count_ones()))
            .sum::<u64>();
        let mut word = [0; 8];
        word.copy_from_slice(filled.get(..8).unwrap_or(&[0; 8]));
        let word = u64::from_le_bytes(word);
        same += u64::from(word == last);
        last = word;
    }
    say!("rng-check ops={ops} bytes={got} ones={ones} same={same} features={features:#x}");
}
