// SPDX-License-Identifier: Apache-2.0
//! Network benchmarks: frames sent, frames received, and the round trip.

use crate::console::say;
use crate::net::{HEADER, Net};
use crate::net_check::peer;
use crate::{clock, frame, memory, params};

/// `net-tx`: keeps the transmit queue full of frames of `bare.bytes` for `bare.ms`; counts those
/// that the device took. Three stop frames follow.
pub fn transmit() {
    let size = params::number("bare.bytes", frame::MIN as u64) as usize;
    let mut net = Net::open(size.max(frame::MAX));
    let depth = params::number("bare.qd", 256);
    let (destination, source) = (peer(), net.mac);
    let mut slots = alloc::vec::Vec::new();
    while let Some(slot) = net.tx.take() {
        let bytes = &mut net.tx.buffer(slot)[HEADER..HEADER + size];
        frame::build(bytes, destination, source, frame::DATA, slot as u64, 1);
        slots.push(slot);
    }
    for slot in slots.into_iter().take(depth as usize) {
        net.tx.submit(slot, size, 1);
    }
    let limit = clock::ms(params::number("bare.ms", 1000));
    let notifies = net.transport.notifies;
    let start = clock::now();
    let (mut frames, mut ticks) = (0, 0);
    while ticks < limit {
        net.kick();
        frames += net.tx.reap();
        while let Some(slot) = net.tx.take() {
            net.tx.submit(slot, size, 1);
        }
        ticks = clock::now() - start;
    }
    let notifies = net.transport.notifies - notifies;
    clock::wait(2000, || net.tx.reap() == 0 && net.tx.is_idle());
    for sequence in 0..3 {
        if let Some(slot) = net.tx.take() {
            let bytes = &mut net.tx.buffer(slot)[HEADER..HEADER + frame::MIN];
            frame::build(bytes, destination, source, frame::STOP, sequence, 1);
            net.tx.submit(slot, frame::MIN, 1);
        }
    }
    net.kick();
    let stuck = !clock::wait(2000, || net.tx.reap() == 0 && net.tx.is_idle());
    say!(
        "net-tx frames={frames} bytes={} ticks={ticks} ns={} errors={} size={size} \
         notifies={notifies}",
        frames * size as u64,
        clock::ns(ticks),
        u8::from(stuck),
    );
}

/// `net-rx`: counts test frames for `bare.ms` from the first on, or until a stop frame. `lost` is
/// what is missing among the sequence numbers.
pub fn receive() {
    let mut net = Net::open(params::number("bare.max", frame::MAX as u64) as usize);
    say!("net-rx ready");
    let limit = clock::ms(params::number("bare.ms", 1000));
    let patience = clock::ms(params::number("bare.wait_ms", 10_000));
    let opened = clock::now();
    let (mut frames, mut bytes, mut other, mut stop) = (0, 0, 0, false);
    let (mut first, mut last) = (u64::MAX, 0);
    let (mut start, mut ticks) = (0, 0);
    let notifies = net.transport.notifies;
    while !stop && ticks < limit && (frames > 0 || clock::now() - opened < patience) {
        net.rx.poll(|_, data| match frame::parse(data) {
            Some((frame::DATA, sequence)) => {
                frames += 1;
                bytes += data.len();
                first = first.min(sequence);
                last = last.max(sequence);
            }
            Some(_) => stop = true,
            None => other += 1,
        });
        net.kick();
        if frames > 0 {
            let now = clock::now();
            if start == 0 {
                start = now;
            }
            ticks = now - start;
        }
    }
    let lost = if frames == 0 {
        0
    } else {
        (last - first + 1).saturating_sub(frames)
    };
    say!(
        "net-rx frames={frames} bytes={bytes} ticks={ticks} ns={} lost={lost} other={other} \
         broken={} notifies={}",
        clock::ns(ticks),
        net.rx.broken,
        net.transport.notifies - notifies
    );
}

/// `net-rtt`: one frame at a time, sent and waited for, `bare.ops` times.
pub fn round_trip() {
    let size = params::number("bare.bytes", frame::MIN as u64) as usize;
    let ops = params::number("bare.ops", 1000);
    let timeout = params::number("bare.timeout_ms", 1000);
    let mut net = Net::open(size.max(frame::MAX));
    say!("net-rtt ready");
    let (destination, source) = (peer(), net.mac);
    let samples = memory::take(ops as usize * 8, 4096);
    // SAFETY: taken for this alone, aligned to a page, and any bits are a u64.
    let samples = unsafe {
        core::slice::from_raw_parts_mut(samples.as_mut_ptr().cast::<u64>(), ops as usize)
    };
    let (mut count, mut lost) = (0, 0);
    for sequence in 0..ops {
        let slot = net.tx.take().expect("a buffer, since each is waited for");
        let bytes = &mut net.tx.buffer(slot)[HEADER..HEADER + size];
        frame::build(bytes, destination, source, frame::DATA, sequence, 1);
        let start = clock::now();
        net.tx.submit(slot, size, 1);
        net.kick();
        let mut back = false;
        let came = clock::wait(timeout, || {
            net.rx
                .poll(|_, data| back |= frame::parse(data) == Some((frame::DATA, sequence)));
            back
        });
        let end = clock::now();
        net.kick();
        if came {
            samples[count] = end - start;
            count += 1;
        } else {
            lost += 1;
        }
        clock::wait(timeout, || net.tx.reap() > 0 || net.tx.is_idle());
    }
    let samples = &mut samples[..count];
    samples.sort_unstable();
    let at = |part: usize| {
        samples
            .get(count * part / 100)
            .map_or(0, |&ticks| clock::ns(ticks))
    };
    say!(
        "net-rtt ops={count} lost={lost} min_ns={} median_ns={} p99_ns={} max_ns={}",
        at(0),
        at(50),
        at(99),
        samples.last().map_or(0, |&ticks| clock::ns(ticks)),
    );
}
