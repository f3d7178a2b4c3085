// SPDX-License-Identifier: Apache-2.0
//! What happens to disks from outside while the guest uses them: another size, a host that hangs.

use crate::blk::{self, Blk, SECTOR, header, kind, status};
use crate::clock;
use crate::console::say;
use crate::mmio;
use crate::params;

/// The virtio id of block devices.
const BLOCK: u32 = 2;
/// The register of pending interrupts, that which clears them, and the bit of a new configuration
/// (virtio 1.3, section 4.2.2).
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const CONFIG_CHANGED: u32 = 2;
/// How often `blk-two` tells how far it is.
const REPORT_MS: u64 = 50;

/// `blk-resize`: tells the size of the disk, and again each time that the device says it has
/// another, `bare.ops` times; the last sector has to be readable.
pub fn resize() {
    let mut blk = Blk::open();
    let base = blk.transport.base;
    let data = blk::buffer(SECTOR);
    tell_size(&mut blk, data);
    for _ in 0..params::number("bare.ops", 1) {
        let changed = || mmio::read32(base + INTERRUPT_STATUS) & CONFIG_CHANGED != 0;
        if !clock::wait(params::number("bare.ms", 30_000), changed) {
            say!("blk-resize none");
            return;
        }
        mmio::write32(base + INTERRUPT_ACK, CONFIG_CHANGED);
        tell_size(&mut blk, data);
    }
}

fn tell_size(blk: &mut Blk, data: &mut [u8]) {
    let capacity = u64::from(blk.config(0)) | u64::from(blk.config(4)) << 32;
    let last = blk.read(capacity.saturating_sub(1), data);
    say!("blk-resize capacity={capacity} last={last}");
}

/// `blk-two`: writes to two disks for `bare.ms`. Nothing waits for a request to the first; each
/// line says how many of both are done.
pub fn two() {
    let mut bases = [None; 2];
    let mut places = bases.iter_mut();
    mmio::each_device(|base, id| {
        if id == BLOCK
            && let Some(place) = places.next()
        {
            *place = Some(base);
        }
    });
    let [mut first, mut second] =
        bases.map(|base| Blk::open_at(base.expect("two disks")).expect("a disk that works"));
    let (head, data, answer) = (blk::buffer(16), blk::buffer(SECTOR), blk::buffer(1));
    let other = blk::buffer(SECTOR);
    let (mut done, mut other_done, mut token) = ([0_u64; 2], 0_u64, None);
    let start = clock::now();
    let mut reported = start;
    while clock::now() - start < clock::ms(params::number("bare.ms", 30_000)) {
        match token {
            None => {
                head.copy_from_slice(&header(kind::OUT, done[0] % first.capacity));
                answer[0] = status::NONE;
                // SAFETY: the buffers are never freed, and are touched again only when the
                // request is back.
                let added = unsafe { first.ring.add(&[head, data], &mut [&mut *answer]) };
                token = Some(added.expect("the queue is full"));
                first.ring.kick(&mut first.transport);
            }
            Some(sent) if first.ring.peek() == Some(sent) => {
                let _ = first.ring.pop(sent, 3);
                let good = core::hint::black_box(&*answer)[0] == status::OK;
                done[usize::from(!good)] += 1;
                token = None;
            }
            Some(_) => {}
        }
        other_done += u64::from(second.write(other_done % second.capacity, other) == status::OK);
        if clock::now() - reported > clock::ms(REPORT_MS) {
            reported = clock::now();
            let [good, bad] = done;
            say!("blk-two first={good} bad={bad} second={other_done} end");
        }
    }
}
