// SPDX-License-Identifier: Apache-2.0
//! Drivers that lie.

use super::*;
use crate::testing::{MEMORY_END, NEXT, WRITE, writable};

const LEN: usize = 0x10_0000;

#[test]
fn pages_outside_memory_and_pages_named_twice_do_no_harm() {
    let mut rig = Rig::new(all());
    rig.touch(LEN);
    rig.inflate([
        page(MEMORY_END),
        u32::MAX,
        page(PAGES),
        page(PAGES),
        u32::MAX - 1,
        page(PAGES),
    ]);
    assert_eq!(rig.resident(LEN), 255);
    assert!(!rig.signals.is_reset_needed());
}

#[test]
fn page_numbers_that_are_cut_are_left_out() {
    let mut rig = Rig::new(all());
    rig.touch(LEN);
    let mut numbers = page(PAGES).to_le_bytes().to_vec();
    numbers.extend(&(page(PAGES) + 1).to_le_bytes()[..3]);
    rig.send(0, &numbers);
    rig.used(0);
    assert_eq!(rig.resident(LEN), 255);
}

#[test]
fn endless_lists_of_pages_are_cut() {
    let mut rig = Rig::new(all());
    rig.touch(LEN);
    // Page number 0 again and again, then more than one chain may name.
    let numbers = vec![0; 0x10_000];
    rig.write(&numbers);
    let list = readable(SCRATCH, 0x10_000);
    rig.memory
        .write_obj(page(PAGES), GuestAddress(SCRATCH + 0x1_0000))
        .unwrap();
    rig.drivers[0].add(&[list, readable(SCRATCH + 0x1_0000, 4)]);
    // The whole of memory, many times.
    rig.drivers[0].add(&[readable(0x30_0000, 0x10_0000); 60]);
    rig.drivers[0].kick();
    rig.used(0);
    assert_eq!(rig.resident(LEN), 256, "the page behind the limit");
    rig.used(0);
}

#[test]
fn buffers_outside_memory_do_no_harm() {
    let mut rig = Rig::new(all());
    for index in 0..5 {
        for piece in [
            readable(MEMORY_END, 4096),
            readable(MEMORY_END - 2, 4),
            readable(u64::MAX - 1, u32::MAX),
            writable(MEMORY_END, 4096),
            writable(u64::MAX - 0xfff, u32::MAX),
            writable(0, 0),
            readable(0, 0),
        ] {
            rig.drivers[index].add(&[piece]);
            rig.drivers[index].kick();
            // Statistics are given back one buffer later.
            if index != 2 {
                rig.used(index);
            }
        }
    }
    // Also as hints of a run.
    rig.control.start_hinting(true).unwrap();
    rig.send(3, &2_u32.to_le_bytes());
    rig.used(3);
    rig.drivers[3].add(&[
        writable(MEMORY_END, u32::MAX),
        writable(u64::MAX - 0xfff, u32::MAX),
    ]);
    rig.drivers[3].kick();
    rig.used(3);
    assert!(!rig.signals.is_reset_needed());
}

#[test]
fn reports_that_reach_beyond_memory_take_what_is_in_it() {
    let mut rig = Rig::new(all());
    rig.touch(LEN);
    rig.drivers[4].add(&[writable(PAGES + 0x8_0000, u32::MAX); 50]);
    rig.drivers[4].kick();
    rig.used(4);
    assert_eq!(rig.resident(LEN), 128);
}

#[test]
fn only_one_statistics_buffer_is_held() {
    let mut rig = Rig::new(all());
    let first = rig.send(2, &[0; 10]);
    let second = rig.send(2, &[0; 10]);
    assert_eq!(rig.used(2).head, first);
    rig.stop();
    assert_eq!(rig.drivers[2].take_used(), None);
    rig.start();
    rig.control.set_statistics_interval_s(9).unwrap();
    assert_eq!(rig.used(2).head, second);
}

#[test]
fn a_statistics_buffer_of_any_length_is_read_up_to_a_limit() {
    let mut rig = Rig::new(all());
    rig.drivers[2].add(&[readable(PAGES, 0x30_0000); 20]);
    rig.drivers[2].kick();
    let control = rig.control.clone();
    eventually("statistics are there", || {
        control.statistics().unwrap().values[0] == Some(0)
    });
}

#[test]
fn commands_out_of_turn_end_nothing_and_start_nothing() {
    let mut rig = Rig::new(all());
    rig.touch(LEN);
    for command in [0, 1, 2, 3, u32::MAX] {
        rig.send(3, &command.to_le_bytes());
        rig.used(3);
        rig.drivers[3].add(&[writable(PAGES, LEN as u32)]);
        rig.drivers[3].kick();
        rig.used(3);
    }
    assert_eq!((rig.resident(LEN), rig.config(2)), (256, 0));
    rig.control.start_hinting(true).unwrap();
    for command in [0, 1, 3, u32::MAX, 0] {
        rig.send(3, &command.to_le_bytes());
        rig.used(3);
    }
    assert_eq!((rig.resident(LEN), rig.config(2)), (256, 2));
}

#[test]
fn a_loop_in_any_ring_stops_the_device_and_nothing_else() {
    for index in 0..5 {
        let mut rig = Rig::new(all());
        rig.drivers[index].set_descriptor(0, (PAGES, 4096, NEXT | WRITE, 0));
        rig.drivers[index].offer(0);
        rig.drivers[index].kick();
        let signals = rig.signals.clone();
        eventually("a reset is wanted", || signals.is_reset_needed());
        rig.stop();
        rig.control.set_target(2).unwrap();
    }
}
