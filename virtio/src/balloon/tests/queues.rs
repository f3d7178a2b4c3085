// SPDX-License-Identifier: Apache-2.0
//! What goes over the queues.

use std::sync::atomic::Ordering;

use super::*;
use crate::balloon::Statistics;
use crate::testing::writable;

const LEN: usize = 0x10_0000;

#[test]
fn inflated_pages_are_gone_and_come_back_when_touched() {
    let mut rig = Rig::new(all());
    rig.touch(LEN);
    // Every second page first, backwards, then the rest.
    rig.inflate((0..128).rev().map(|n| page(PAGES) + 2 * n));
    assert_eq!(rig.resident(LEN), 128);
    rig.inflate((0..128).map(|n| page(PAGES) + 2 * n + 1));
    assert_eq!(rig.resident(LEN), 0);
    let interrupts = rig.interrupts.clone();
    eventually("there is an interrupt", || {
        interrupts.load(Ordering::SeqCst) > 0
    });

    let head = rig.send(1, &page(PAGES).to_le_bytes());
    assert_eq!(rig.used(1).head, head);
    assert_eq!(rig.resident(LEN), 0, "deflating alone needs no memory");
    rig.touch(0x1000);
    assert_eq!(rig.resident(LEN), 1);
}

#[test]
fn memory_of_the_process_shrinks_by_what_is_inflated() {
    const BIG: usize = 0x38_0000;
    let shrunk = || {
        let mut rig = Rig::new(all());
        rig.touch(BIG);
        let before = resident_kib(&rig);
        for start in (0..BIG as u32 / 4096).step_by(256) {
            let end = (start + 256).min(BIG as u32 / 4096);
            rig.inflate((start..end).map(|n| page(PAGES) + n));
        }
        before.saturating_sub(resident_kib(&rig))
    };
    // Some pages of rings and lists are new. The kernel may take our mapping and that of a test
    // beside this one for one, which then grows at the same time; not again and again, though.
    let enough = BIG as u64 / 1024 - 64;
    assert!((0..20).any(|_| shrunk() > enough), "it does not shrink");
}

/// `Rss` of the mapping of guest memory, from the kernel's list of mappings.
fn resident_kib(rig: &Rig) -> u64 {
    use vm_memory::GuestMemoryBackend;
    let start = rig.memory.get_host_address(GuestAddress(0)).unwrap() as usize;
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in maps.lines() {
        let range = line.split(' ').next().and_then(|word| word.split_once('-'));
        let range = range.and_then(|(from, to)| {
            let parse = |text| usize::from_str_radix(text, 16).ok();
            Some(parse(from)?..parse(to)?)
        });
        if let Some(range) = range {
            inside = range.contains(&start);
        } else if let Some(size) = line.strip_prefix("Rss:").filter(|_| inside) {
            return size.trim().trim_end_matches(" kB").parse().unwrap();
        }
    }
    panic!("guest memory is not in the list");
}

#[test]
fn reported_pages_are_gone_before_the_driver_hears_of_it() {
    let mut rig = Rig::new(all());
    rig.touch(LEN);
    rig.drivers[4].add(&[
        writable(PAGES + 0x8000, 0x8000),
        writable(PAGES, 0x8000),
        writable(PAGES + 0x2_0000, 0x1800),
    ]);
    rig.drivers[4].kick();
    assert_eq!(rig.used(4).len, 0);
    // Of the last one only the whole page goes.
    assert_eq!(rig.resident(LEN), 256 - 16 - 1);
}

fn statistics(values: &[(u16, u64)]) -> Vec<u8> {
    let entry = |&(tag, value): &(u16, u64)| {
        let value = value.to_le_bytes();
        tag.to_le_bytes().into_iter().chain(value)
    };
    values.iter().flat_map(entry).collect()
}

#[test]
fn the_statistics_buffer_is_held_until_new_ones_are_wanted() {
    let mut rig = Rig::new(all());
    let head = rig.send(2, &statistics(&[(4, 1000), (5, 2000)]));
    let mut expected = Statistics::default();
    (expected.values[4], expected.values[5]) = (Some(1000), Some(2000));
    let control = rig.control.clone();
    eventually("statistics are there", || {
        control.statistics().unwrap() == expected
    });
    assert_eq!(rig.drivers[2].take_used(), None);

    let asked = Instant::now();
    rig.control.set_statistics_interval_s(1).unwrap();
    assert_eq!(rig.used(2).head, head);
    let head = rig.send(2, &statistics(&[(4, 900)]));
    assert_eq!(rig.used(2).head, head, "by the timer");
    assert!(asked.elapsed() >= Duration::from_millis(500));
    assert_eq!(rig.control.statistics().unwrap().values[4], Some(900));
    let head = rig.send(2, &statistics(&[(4, 800)]));
    assert_eq!(rig.used(2).head, head, "and again");
}

#[test]
fn a_held_statistics_buffer_survives_a_pause() {
    let mut rig = Rig::new(all());
    let head = rig.send(2, &statistics(&[(4, 1000)]));
    let control = rig.control.clone();
    eventually("statistics are there", || {
        control.statistics().unwrap().values[4].is_some()
    });
    rig.stop();
    assert_eq!(rig.drivers[2].state.next_avail, 0);
    rig.start();
    assert_eq!(control.statistics().unwrap().values[4], Some(1000));
    rig.control.set_statistics_interval_s(10).unwrap();
    assert_eq!(rig.used(2).head, head);
}

/// Has the driver confirm `command`.
fn confirm(rig: &mut Rig, command: u32) {
    rig.send(3, &command.to_le_bytes());
    rig.used(3);
}

/// Hints `len` bytes from `offset` of the pages.
fn hint(rig: &mut Rig, offset: u64, len: u32) {
    rig.drivers[3].add(&[writable(PAGES + offset, len)]);
    rig.drivers[3].kick();
    rig.used(3);
}

#[test]
fn hints_count_only_in_the_run_that_is_wanted() {
    let mut rig = Rig::new(all());
    rig.touch(LEN);
    hint(&mut rig, 0, 0x1000);
    assert_eq!(rig.resident(LEN), 256, "no run");

    rig.control.start_hinting(true).unwrap();
    assert_eq!(rig.config(2), 2);
    hint(&mut rig, 0, 0x1000);
    assert_eq!(rig.resident(LEN), 256, "the driver has not begun");
    confirm(&mut rig, 2);
    hint(&mut rig, 0, 0x8_0000);
    assert_eq!(rig.resident(LEN), 128);

    rig.control.stop_hinting().unwrap();
    assert_eq!(rig.config(2), 1);
    hint(&mut rig, 0x8_0000, 0x1000);
    assert_eq!(rig.resident(LEN), 128, "the run is over");

    rig.control.start_hinting(true).unwrap();
    assert_eq!(rig.config(2), 3);
    hint(&mut rig, 0x8_0000, 0x1000);
    assert_eq!(rig.resident(LEN), 128, "a hint of the run before");
    confirm(&mut rig, 3);
    hint(&mut rig, 0x8_0000, 0x1000);
    assert_eq!(rig.resident(LEN), 127);
}

#[test]
fn a_run_ends_by_itself_only_if_that_is_wanted() {
    for acknowledge in [true, false] {
        let mut rig = Rig::new(all());
        rig.control.start_hinting(acknowledge).unwrap();
        confirm(&mut rig, 2);
        let before = rig.signals.config_generation();
        confirm(&mut rig, 0);
        let status = rig.control.hinting_status().unwrap();
        let host_cmd = if acknowledge { 1 } else { 2 };
        assert_eq!((status.host_cmd, status.guest_cmd), (host_cmd, Some(0)));
        assert_eq!(rig.config(2), host_cmd);
        assert_eq!(rig.signals.config_generation() > before, acknowledge);
    }
}

#[test]
fn the_end_of_an_old_run_does_not_end_the_next() {
    let mut rig = Rig::new(all());
    rig.control.start_hinting(true).unwrap();
    confirm(&mut rig, 2);
    rig.control.start_hinting(true).unwrap();
    confirm(&mut rig, 0);
    assert_eq!(rig.control.hinting_status().unwrap().host_cmd, 3);
}

#[test]
fn queues_go_by_the_features_that_were_agreed() {
    // Without statistics the queue of reports is the third.
    let mut rig = Rig::with_features(all(), bit::PAGE_REPORTING);
    rig.touch(LEN);
    rig.drivers[2].add(&[writable(PAGES, 0x1000)]);
    rig.drivers[2].kick();
    rig.used(2);
    assert_eq!(rig.resident(LEN), 255);
    rig.drivers[4].add(&[writable(PAGES, LEN as u32)]);
    rig.drivers[4].kick();
    rig.stop();
    assert_eq!(rig.drivers[4].used_index(), 0, "it is for nothing");
}

#[test]
fn a_queue_that_the_driver_leaves_out_is_not_missed() {
    let mut rig = Rig::new(all());
    rig.stop();
    let queue = |driver: &Driver| {
        Some(StartedQueue {
            queue: driver.queue(rig.features),
            kick: driver.kick.clone(),
        })
    };
    let mut queues: Vec<_> = rig.drivers.iter().map(queue).collect();
    queues[1] = None;
    let context = StartContext {
        memory: rig.memory.clone(),
        features: rig.features,
        queues,
        signals: rig.signals.clone(),
    };
    rig.balloon.start(context).unwrap();
    rig.touch(LEN);
    rig.drivers[4].add(&[writable(PAGES, 0x1000)]);
    rig.drivers[4].kick();
    rig.used(4);
    assert_eq!(rig.resident(LEN), 255);
    let states = rig.balloon.stop();
    assert!(states[1].is_none() && states[4].is_some());
}
