// SPDX-License-Identifier: Apache-2.0
//! The device's side of the ring, against drivers that keep to the rules and drivers that do not.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the numbers of a test are known to fit"
)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::memory::IoBuffers;
use crate::testing::{
    BUFFERS, Driver, INDIRECT, MEMORY_END, NEXT, Piece, Used, WRITE, memory, memory_of, readable,
    writable,
};

const EVENT_IDX: u64 = feature::EVENT_IDX;
const INDIRECT_DESC: u64 = feature::INDIRECT_DESC;
/// Where an indirect table may lie.
const TABLE: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x10_0000;

fn driver(size: u16) -> Driver {
    Driver::new(memory(), size)
}

#[track_caller]
fn pop(queue: &mut Queue) -> Chain {
    let mut chain = Chain::new();
    assert!(queue.pop(&mut chain).unwrap(), "nothing to pop");
    chain
}

#[track_caller]
fn pop_error(queue: &mut Queue) -> QueueError {
    queue.pop(&mut Chain::new()).unwrap_err()
}

fn buffers(buffers: &Buffers) -> Vec<(u64, u32)> {
    buffers.iter().map(|b| (b.address.0, b.len)).collect()
}

/// Pops, uses and publishes one chain; whether the driver wants to know.
fn serve_one(queue: &mut Queue) -> bool {
    let chain = pop(queue);
    queue.push_used(chain.head(), 0).unwrap();
    queue.publish().unwrap();
    queue.needs_interrupt().unwrap()
}

#[test]
fn a_chain_is_split_by_direction_and_keeps_its_order() {
    let mut driver = driver(8);
    let mut queue = driver.queue(0);
    assert!(!queue.pop(&mut Chain::new()).unwrap());
    driver.add(&[
        readable(DATA, 16),
        readable(DATA + 100, 0),
        writable(DATA + 200, 512),
        writable(DATA + 1000, 1),
    ]);
    driver.add(&[writable(DATA, 7)]);
    let first = pop(&mut queue);
    assert_eq!(first.head(), 0);
    assert_eq!(buffers(first.readable()), [(DATA, 16), (DATA + 100, 0)]);
    let written = [(DATA + 200, 512), (DATA + 1000, 1)];
    assert_eq!(buffers(first.writable()), written);
    assert_eq!((first.readable().len(), first.writable().len()), (16, 513));
    assert_eq!(
        first.writable().last_byte(),
        Some(GuestAddress(DATA + 1000))
    );
    let second = pop(&mut queue);
    assert_eq!(second.head(), 4);
    assert!(second.readable().is_empty());
    assert_eq!(second.readable().last_byte(), None);
    assert!(!queue.pop(&mut Chain::new()).unwrap());
}

#[test]
fn a_chain_that_is_used_again_keeps_nothing_of_the_one_before() {
    let mut driver = driver(8);
    let mut queue = driver.queue(0);
    driver.add(&[readable(DATA, 1), writable(DATA, 2)]);
    driver.add(&[readable(DATA, 3)]);
    let mut chain = pop(&mut queue);
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!(buffers(chain.readable()), [(DATA, 3)]);
    assert!(chain.writable().is_empty());
}

#[test]
fn bytes_are_copied_across_buffers() {
    let mut driver = driver(8);
    let mut queue = driver.queue(0);
    driver.add(&[
        readable(DATA, 3),
        readable(DATA + 100, 0),
        readable(DATA + 50, 5),
        writable(DATA + 200, 2),
        writable(DATA + 300, 4),
    ]);
    let memory = queue.memory().clone();
    memory.write_slice(b"abc", GuestAddress(DATA)).unwrap();
    memory
        .write_slice(b"defgh", GuestAddress(DATA + 50))
        .unwrap();
    let chain = pop(&mut queue);
    for (offset, len, expected) in [
        (0, 8, &b"abcdefgh"[..]),
        (2, 3, b"cde"),
        (3, 2, b"de"),
        (6, 9, b"gh"),
        (8, 4, b""),
        (u64::MAX, 4, b""),
    ] {
        let mut data = vec![0; len];
        let count = chain
            .readable()
            .read_at(&memory, offset, &mut data)
            .unwrap();
        assert_eq!(&data[..count], expected, "from {offset}");
    }
    assert_eq!(
        chain.writable().write_at(&memory, 1, b"12345678").unwrap(),
        5
    );
    let mut data = [0; 4];
    memory
        .read_slice(&mut data[..2], GuestAddress(DATA + 200))
        .unwrap();
    assert_eq!(data[..2], [0, b'1']);
    memory
        .read_slice(&mut data, GuestAddress(DATA + 300))
        .unwrap();
    assert_eq!(data, *b"2345");
}

#[test]
fn buffers_outside_of_memory_are_found_when_they_are_accessed() {
    for (address, len) in [
        (MEMORY_END - 1, 2),
        (MEMORY_END, 1),
        (u64::MAX, 1),
        (u64::MAX, 2),
    ] {
        let mut driver = driver(8);
        let mut queue = driver.queue(0);
        driver.add(&[readable(address, len), writable(address, len)]);
        let memory = queue.memory().clone();
        let chain = pop(&mut queue);
        chain
            .readable()
            .read_at(&memory, 0, &mut [0; 2])
            .unwrap_err();
        chain.writable().write_at(&memory, 0, &[0; 2]).unwrap_err();
        let mut target = IoBuffers::new(memory);
        chain.readable().add_to(&mut target, 0, 2).unwrap_err();
    }
}

#[test]
fn the_driver_sees_used_elements_when_they_are_published() {
    let mut driver = driver(8);
    let mut queue = driver.queue(0);
    for _ in 0..3 {
        driver.add(&[writable(DATA, 8)]);
    }
    for _ in 0..3 {
        let chain = pop(&mut queue);
        queue
            .push_used(chain.head(), 5 + u32::from(chain.head()))
            .unwrap();
        assert_eq!(driver.take_used(), None);
    }
    queue.publish().unwrap();
    let used: Vec<_> = std::iter::from_fn(|| driver.take_used()).collect();
    let expected = [(0, 5), (1, 6), (2, 7)].map(|(head, len)| Used { head, len });
    assert_eq!(used, expected);
}

#[test]
fn indices_wrap_at_65536() {
    for features in [0, EVENT_IDX] {
        let mut driver = driver(4).start_at(0xfffd);
        let mut queue = driver.queue(features);
        for round in 0..10 {
            assert!(!queue.enable_kicks().unwrap());
            driver.set_used_event(driver.used);
            let head = driver.add(&[writable(DATA, 1)]);
            assert!(serve_one(&mut queue), "round {round}");
            assert_eq!(driver.take_used().unwrap().head, u32::from(head));
            assert_eq!(driver.take_used(), None);
        }
        assert_eq!((queue.state().next_avail, queue.state().next_used), (7, 7));
    }
}

#[test]
fn a_chain_that_was_put_back_comes_again() {
    let mut driver = driver(4).start_at(0xffff);
    let mut queue = driver.queue(0);
    let heads = [
        driver.add(&[writable(DATA, 1)]),
        driver.add(&[writable(DATA, 1)]),
    ];
    assert_eq!(pop(&mut queue).head(), heads[0]);
    queue.undo_pop();
    assert_eq!(pop(&mut queue).head(), heads[0]);
    assert_eq!(pop(&mut queue).head(), heads[1]);
    queue.undo_pop();
    assert_eq!(queue.state().next_avail, 0);
    assert_eq!(pop(&mut queue).head(), heads[1]);
}

#[test]
fn a_queue_goes_on_from_its_state() {
    let mut driver = driver(4);
    let mut queue = driver.queue(EVENT_IDX);
    for round in 0..20 {
        let head = driver.add(&[writable(DATA, 1)]);
        let chain = pop(&mut queue);
        queue.push_used(chain.head(), round).unwrap();
        queue.publish().unwrap();
        let state = queue.state();
        queue = Queue::new(state, driver.memory.clone(), EVENT_IDX).unwrap();
        assert_eq!(queue.state(), state);
        let head = u32::from(head);
        assert_eq!(driver.take_used(), Some(Used { head, len: round }));
    }
}

#[test]
fn chains_in_flight_are_counted() {
    let mut driver = driver(4);
    let mut queue = driver.queue(0);
    for _ in 0..3 {
        driver.add(&[writable(DATA, 1)]);
    }
    let first = pop(&mut queue);
    assert_eq!(queue.in_flight(), 3);
    pop(&mut queue);
    assert_eq!(queue.in_flight(), 3);
    queue.push_used(first.head(), 0).unwrap();
    assert_eq!(queue.in_flight(), 2);
}

#[test]
fn an_interrupt_is_sent_unless_the_driver_says_no() {
    let mut driver = driver(4);
    let mut queue = driver.queue(0);
    assert!(!queue.needs_interrupt().unwrap(), "nothing was used");
    driver.add(&[writable(DATA, 1)]);
    assert!(serve_one(&mut queue));
    assert!(!queue.needs_interrupt().unwrap(), "it was decided already");
    driver.set_avail_flags(AVAIL_NO_INTERRUPT);
    driver.add(&[writable(DATA, 1)]);
    assert!(!serve_one(&mut queue));
    driver.set_avail_flags(!AVAIL_NO_INTERRUPT);
    driver.add(&[writable(DATA, 1)]);
    assert!(serve_one(&mut queue));
}

#[test]
fn with_event_idx_an_interrupt_is_sent_when_its_index_is_passed() {
    let mut driver = driver(16).start_at(0xfff8);
    let mut queue = driver.queue(EVENT_IDX);
    // The flag means nothing then.
    driver.set_avail_flags(AVAIL_NO_INTERRUPT);
    driver.set_used_event(0xfffb);
    let mut wanted = Vec::new();
    for _ in 0..16 {
        driver.add(&[writable(DATA, 1)]);
        wanted.push(serve_one(&mut queue));
        driver.take_used();
    }
    let only_the_fourth: Vec<_> = (0..16).map(|n| n == 3).collect();
    assert_eq!(wanted, only_the_fourth);

    // Several at once that reach past it, over the wrap of the ring.
    driver.set_used_event(driver.used + 2);
    for _ in 0..5 {
        driver.add(&[writable(DATA, 1)]);
        let chain = pop(&mut queue);
        queue.push_used(chain.head(), 0).unwrap();
    }
    assert!(!queue.needs_interrupt().unwrap(), "not published");
    queue.publish().unwrap();
    assert!(queue.needs_interrupt().unwrap());
    assert!(!queue.needs_interrupt().unwrap());
}

#[test]
fn kicks_are_asked_for_and_declined() {
    let mut driver = driver(4);
    let mut queue = driver.queue(0);
    queue.suppress_kicks().unwrap();
    assert_eq!(driver.used_flags(), USED_NO_NOTIFY);
    assert!(!queue.enable_kicks().unwrap());
    assert_eq!(driver.used_flags(), 0);
    driver.add(&[writable(DATA, 1)]);
    assert!(queue.enable_kicks().unwrap(), "came in meanwhile");

    let mut queue = driver.queue(EVENT_IDX);
    pop(&mut queue);
    assert!(!queue.enable_kicks().unwrap());
    assert_eq!(driver.avail_event(), 1);
    queue.suppress_kicks().unwrap();
    assert_eq!(driver.used_flags(), 0, "flags mean nothing then");
    driver.add(&[writable(DATA, 1)]);
    // A driver that goes from 1 to 2 passes the event index, and kicks.
    assert!(queue.enable_kicks().unwrap());
}

#[test]
fn a_queue_that_cannot_be_is_refused() {
    let good = driver(8).state;
    let refused = |change: fn(&mut QueueState)| {
        let mut state = good;
        change(&mut state);
        Queue::new(state, memory(), 0).unwrap_err()
    };
    type Change = fn(&mut QueueState);
    let sizes: [Change; 5] = [
        |s| s.size = 0,
        |s| s.size = 3,
        |s| s.size = 7,
        |s| s.size = 16,
        |s| s.size = 0x8000,
    ];
    for change in sizes {
        assert!(matches!(refused(change), QueueError::Size { .. }));
    }
    let alignments: [Change; 4] = [
        |s| s.desc_table += 8,
        |s| s.avail_ring += 1,
        |s| s.used_ring += 2,
        |s| s.desc_table = u64::MAX,
    ];
    for change in alignments {
        assert!(matches!(refused(change), QueueError::Alignment { .. }));
    }
    let ranges: [Change; 9] = [
        |s| s.desc_table = MEMORY_END,
        |s| s.desc_table = MEMORY_END - 8 * 16 + 16,
        |s| s.desc_table = !15,
        |s| s.avail_ring = MEMORY_END - (4 + 2 * 8),
        |s| s.avail_ring = u64::MAX - 1,
        |s| s.used_ring = MEMORY_END - (4 + 8 * 8),
        |s| s.used_ring = u64::MAX - 3,
        |s| s.used_ring = 1 << 63,
        |s| s.avail_ring = MEMORY_END,
    ];
    for change in ranges {
        assert!(matches!(refused(change), QueueError::Range { .. }));
    }
    let mut state = good;
    state.desc_table = MEMORY_END - 8 * 16;
    Queue::new(state, memory(), 0).expect("up to the last byte of memory");
}

#[test]
fn an_available_index_that_jumps_is_an_error() {
    for jump in [5, 0x7fff, 0x8000, 0xffff] {
        let mut driver = driver(4);
        let mut queue = driver.queue(0);
        driver.set_avail_index(jump);
        let error = pop_error(&mut queue);
        assert!(
            matches!(error, QueueError::AvailIndex { .. }),
            "{jump}: {error}"
        );
        assert!(queue.enable_kicks().is_err());
        // It did not go on.
        assert_eq!(queue.state().next_avail, 0);
    }
    // Back behind what was taken, and more than there are descriptors for.
    let mut driver = driver(4);
    let mut queue = driver.queue(0);
    for _ in 0..4 {
        driver.add(&[readable(DATA, 1)]);
        pop(&mut queue);
    }
    for index in [3, 5] {
        driver.set_avail_index(index);
        assert!(matches!(
            pop_error(&mut queue),
            QueueError::AvailIndex { .. }
        ));
    }
}

#[test]
fn an_index_outside_the_table_is_an_error() {
    for head in [4, 5, 0x8000, 0xffff] {
        let mut driver = driver(4);
        driver.offer(head);
        let error = pop_error(&mut driver.queue(0));
        let QueueError::DescriptorIndex { index, size: 4 } = error else {
            panic!("{error}");
        };
        assert_eq!(index, head);
        let mut driver = Driver::new(memory(), 4);
        driver.set_descriptor(1, (DATA, 1, NEXT, head));
        driver.offer(1);
        let error = pop_error(&mut driver.queue(0));
        assert!(
            matches!(error, QueueError::DescriptorIndex { .. }),
            "{error}"
        );
    }
}

#[test]
fn a_loop_is_an_error() {
    for length in [1, 2, 3, 8] {
        let mut driver = driver(8);
        for index in 0..length {
            driver.set_descriptor(index, (DATA, 1, NEXT, (index + 1) % length));
        }
        driver.offer(0);
        let error = pop_error(&mut driver.queue(0));
        assert!(
            matches!(error, QueueError::ChainLength { head: 0, limit: 8 }),
            "{error}"
        );
    }
    // As long as the queue, and not a loop.
    let mut driver = driver(8);
    driver.add(&[readable(DATA, 1); 8]);
    assert_eq!(pop(&mut driver.queue(0)).readable().len(), 8);
}

#[test]
fn what_the_device_reads_comes_first() {
    let mut driver = driver(8);
    driver.add(&[readable(DATA, 1), writable(DATA, 1), readable(DATA, 1)]);
    let error = pop_error(&mut driver.queue(0));
    assert!(matches!(error, QueueError::Order { head: 0 }), "{error}");
}

/// A queue whose only chain is `leading` descriptors, then a table of `len` bytes at `table`.
fn with_table(leading: u16, table: u64, len: u32, flags: u16, features: u64) -> (Driver, Queue) {
    let mut driver = driver(8);
    for index in 0..leading {
        driver.set_descriptor(index, (DATA, 10, NEXT, index + 1));
    }
    driver.set_descriptor(leading, (table, len, INDIRECT | flags, 0));
    driver.offer(0);
    let queue = driver.queue(features);
    (driver, queue)
}

#[test]
fn an_indirect_table_is_followed() {
    for leading in [0, 3] {
        // The write flag of a descriptor that names a table is ignored (section 2.7.5.3.2).
        for flags in [0, WRITE] {
            let (driver, mut queue) = with_table(leading, TABLE, 3 * 16, flags, INDIRECT_DESC);
            let pieces = [readable(DATA, 1), readable(DATA, 2), writable(DATA, 4)];
            driver.write_table(TABLE, &pieces);
            let chain = pop(&mut queue);
            assert_eq!(chain.head(), 0);
            let len = u64::from(leading) * 10 + 3;
            assert_eq!((chain.readable().len(), chain.writable().len()), (len, 4));
        }
    }
}

#[test]
fn an_indirect_table_has_up_to_1024_entries() {
    let (driver, mut queue) = with_table(0, TABLE, 1024 * 16, 0, INDIRECT_DESC);
    driver.write_table(TABLE, &[readable(DATA, 1); 1024]);
    assert_eq!(pop(&mut queue).readable().len(), 1024);
    for len in [1025 * 16, 65536 * 16, !15, u32::MAX, 0, 1, 15, 17, 40] {
        let (_driver, mut queue) = with_table(0, TABLE, len, 0, INDIRECT_DESC);
        let error = pop_error(&mut queue);
        assert!(
            matches!(error, QueueError::IndirectLength { .. }),
            "{len}: {error}"
        );
    }
}

#[test]
fn an_indirect_table_has_to_be_agreed_on_and_last_and_not_nested() {
    let indirect = |error| matches!(error, QueueError::Indirect { head: 0 });
    let (_driver, mut queue) = with_table(0, TABLE, 16, 0, 0);
    assert!(indirect(pop_error(&mut queue)));
    let (_driver, mut queue) = with_table(0, TABLE, 16, NEXT, INDIRECT_DESC);
    assert!(indirect(pop_error(&mut queue)));
    let (driver, mut queue) = with_table(0, TABLE, 32, 0, INDIRECT_DESC);
    driver.set_descriptor_at(TABLE, 0, (DATA, 1, NEXT, 1));
    driver.set_descriptor_at(TABLE, 1, (TABLE, 16, INDIRECT, 0));
    assert!(indirect(pop_error(&mut queue)));
}

#[test]
fn an_indirect_table_has_to_keep_to_itself_and_to_memory() {
    let (driver, mut queue) = with_table(0, TABLE, 32, 0, INDIRECT_DESC);
    driver.set_descriptor_at(TABLE, 0, (DATA, 1, NEXT, 2));
    let error = pop_error(&mut queue);
    assert!(
        matches!(error, QueueError::DescriptorIndex { index: 2, size: 2 }),
        "{error}"
    );
    driver.set_descriptor_at(TABLE, 0, (DATA, 1, NEXT, 0));
    let error = pop_error(&mut queue);
    assert!(
        matches!(error, QueueError::ChainLength { limit: 2, .. }),
        "{error}"
    );
    for table in [MEMORY_END, MEMORY_END - 8, u64::MAX - 7, u64::MAX] {
        let (_driver, mut queue) = with_table(0, table, 32, 0, INDIRECT_DESC);
        let error = pop_error(&mut queue);
        assert!(
            matches!(error, QueueError::Memory(_)),
            "{table:#x}: {error}"
        );
    }
}

/// Memory small enough to be compared as a whole.
const SMALL: u64 = 0x1_4000;

proptest! {
    /// Whatever is in the rings, the device neither panics nor writes anywhere but to the used
    /// ring, and comes to an end.
    #[test]
    fn nothing_in_the_rings_leads_astray(
        descriptors in vec((any_address(), any_len(), any_flags(), 0_u16..40), 32),
        table in vec((any_address(), any_len(), any_flags(), 0_u16..40), 8),
        heads in vec(prop_oneof![9 => 0_u16..34, 1 => any::<u16>()], 32),
        start in any::<u16>(),
        ahead in prop_oneof![9 => 0_u16..=32, 1 => any::<u16>()],
        features in prop_oneof![
            Just(0), Just(EVENT_IDX), Just(INDIRECT_DESC), Just(EVENT_IDX | INDIRECT_DESC)
        ],
        avail_flags in any::<u16>(),
        used_event in any::<u16>(),
    ) {
        let mut driver = Driver::new(memory_of(SMALL), 32).start_at(start);
        for (index, &fields) in (0..).zip(&descriptors) {
            driver.set_descriptor(index, fields);
        }
        for (index, &fields) in (0..).zip(&table) {
            driver.set_descriptor_at(TABLE, index, fields);
        }
        for &head in &heads {
            driver.offer(head);
        }
        driver.set_avail_index(start.wrapping_add(ahead));
        driver.set_avail_flags(avail_flags);
        driver.set_used_event(used_event);

        let before = snapshot(&driver);
        let mut queue = driver.queue(features);
        let mut chain = Chain::new();
        let mut taken = 0;
        while let Ok(true) = queue.pop(&mut chain) {
            taken += 1;
            prop_assert!(taken <= 32, "more than the queue holds");
            let count = chain.readable().iter().count() + chain.writable().iter().count();
            prop_assert!(count <= 32 + 1024);
            let memory = queue.memory().clone();
            // May fail, and may not do more than that.
            let _ = chain.readable().read_at(&memory, 3, &mut [0; 64]);
            let mut target = IoBuffers::new(memory);
            let _ = chain.writable().add_to(&mut target, 1, u64::MAX);
            if taken % 3 == 0 {
                queue.push_used(chain.head(), u32::MAX).unwrap();
            }
            if taken % 5 == 0 {
                queue.undo_pop();
                let _ = queue.pop(&mut chain);
            }
        }
        queue.publish().unwrap();
        queue.needs_interrupt().unwrap();
        queue.suppress_kicks().unwrap();
        let _ = queue.enable_kicks();

        let after = snapshot(&driver);
        let used = driver.state.used_ring as usize..driver.state.used_ring as usize + 4 + 8 * 32 + 2;
        prop_assert!(before[..used.start] == after[..used.start]);
        prop_assert!(before[used.end..] == after[used.end..]);
    }

    /// With a driver that keeps to the rules, each chain is taken once and in order, comes back
    /// once whatever order the device uses, and what was not taken at a stop is taken after it.
    #[test]
    fn each_chain_is_taken_in_order_and_comes_back_once(
        start in any::<u16>(),
        event_idx in any::<bool>(),
        steps in vec((0_u8..6, any::<prop::sample::Index>()), 1..400),
    ) {
        const SIZE: u16 = 16;
        let features = if event_idx { EVENT_IDX } else { 0 };
        let mut driver = driver(SIZE).start_at(start);
        let mut queue = driver.queue(features);
        let mut free: Vec<u16> = (0..SIZE).collect();
        let mut offered = std::collections::VecDeque::new();
        let mut taken: Vec<u16> = Vec::new();
        let mut pushed = std::collections::VecDeque::new();
        let mut serial = 0;
        for (step, index) in steps {
            match step {
                0 | 1 => if !free.is_empty() {
                    let head = free.swap_remove(index.index(free.len()));
                    serial += 1;
                    driver.set_descriptor(head, (DATA + serial, 1, 0, 0));
                    driver.offer(head);
                    offered.push_back((head, DATA + serial));
                },
                2 | 3 => {
                    let mut chain = Chain::new();
                    let expected = offered.pop_front();
                    prop_assert_eq!(queue.pop(&mut chain).unwrap(), expected.is_some());
                    if let Some((head, address)) = expected {
                        prop_assert_eq!(chain.head(), head);
                        prop_assert_eq!(buffers(chain.readable()), [(address, 1)]);
                        taken.push(head);
                    }
                }
                4 => if !taken.is_empty() {
                    let head = taken.swap_remove(index.index(taken.len()));
                    queue.push_used(head, u32::from(head)).unwrap();
                    pushed.push_back(head);
                },
                _ => {
                    queue.publish().unwrap();
                    while let Some(used) = driver.take_used() {
                        let head = pushed.pop_front().expect("used once");
                        let expected = Used { head: head.into(), len: head.into() };
                        prop_assert_eq!(used, expected);
                        free.push(head);
                    }
                    prop_assert!(pushed.is_empty());
                    if taken.is_empty() {
                        queue = Queue::new(queue.state(), driver.memory.clone(), features).unwrap();
                    }
                }
            }
        }
    }

    /// The rule of section 2.7.7.1, against counting one by one.
    #[test]
    fn an_interrupt_is_due_if_the_event_index_was_among_those_published(
        start in any::<u16>(),
        count in 1_u16..=16,
        event in any::<u16>(),
        near in 0_u16..20,
        is_near in any::<bool>(),
    ) {
        let event = if is_near { start.wrapping_add(near).wrapping_sub(2) } else { event };
        let mut driver = driver(16).start_at(start);
        let mut queue = driver.queue(EVENT_IDX);
        driver.set_used_event(event);
        for _ in 0..count {
            driver.add(&[writable(DATA, 1)]);
            let chain = pop(&mut queue);
            queue.push_used(chain.head(), 0).unwrap();
        }
        queue.publish().unwrap();
        let expected = (0..count).any(|n| start.wrapping_add(n) == event);
        prop_assert_eq!(queue.needs_interrupt().unwrap(), expected);
    }

    /// Any range of any buffers comes out as the same bytes as one run would.
    #[test]
    fn a_part_of_a_run_is_the_same_bytes(
        lens in vec(0_u32..50, 1..8),
        offset in 0_u64..300,
        len in 0_usize..300,
    ) {
        let mut driver = driver(8);
        let mut queue = driver.queue(0);
        let mut run = Vec::new();
        let mut pieces: Vec<Piece> = Vec::new();
        for (number, &len) in (0..).zip(&lens) {
            let bytes: Vec<u8> = (0..len).map(|n| (number * 50 + n) as u8).collect();
            let address = DATA + u64::from(number) * 100;
            driver.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
            run.extend(bytes);
            pieces.push(readable(address, len));
        }
        driver.add(&pieces);
        let chain = pop(&mut queue);
        let from = run.len().min(offset as usize);
        let expected = &run[from..run.len().min(from + len)];
        let mut data = vec![0; len];
        let count = chain.readable().read_at(&driver.memory, offset, &mut data).unwrap();
        prop_assert_eq!(&data[..count], expected);
        let mut target = IoBuffers::new(driver.memory.clone());
        chain.readable().add_to(&mut target, offset, len as u64).unwrap();
        prop_assert_eq!(target.len(), expected.len());
    }
}

fn any_address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..SMALL,
        4 => Just(TABLE),
        1 => SMALL - 20..SMALL + 20,
        1 => any::<u64>(),
    ]
}

fn any_len() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0_u32..5000,
        3 => (0_u32..10).prop_map(|count| count * 16),
        1 => any::<u32>(),
    ]
}

fn any_flags() -> impl Strategy<Value = u16> {
    prop_oneof![
        3 => Just(0), 3 => Just(NEXT), 2 => Just(WRITE), 1 => Just(NEXT | WRITE),
        2 => Just(INDIRECT), 1 => any::<u16>(),
    ]
}

fn snapshot(driver: &Driver) -> Vec<u8> {
    let mut bytes = vec![0; SMALL as usize];
    driver
        .memory
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    bytes
}
