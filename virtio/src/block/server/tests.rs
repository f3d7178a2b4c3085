// SPDX-License-Identifier: Apache-2.0
//! The server with an engine that does as it is told.

use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use vm_memory::GuestAddress;

use super::*;
use crate::block::disk::Disk;
use crate::device::StartContext;
use crate::limiter::LimiterUpdate;
use crate::memory::IoBuffers;
use crate::testing::{BUFFERS, Driver, MEMORY_END, memory, readable, writable};

const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x8000;
const SIZE: u16 = 256;

/// Requests that were started, and how many of them may end, the last one first.
#[derive(Default)]
struct Held {
    tickets: Vec<Ticket>,
    submitted: usize,
    released: usize,
    waits: usize,
    broken: bool,
    failing: bool,
    /// Happens once, when the server is about to look at the queue.
    meanwhile: Option<Box<dyn FnOnce() + Send>>,
}

/// Holds up to four requests until it is waited for or they are released.
struct SlowEngine {
    held: Arc<Mutex<Held>>,
    buffers: IoBuffers,
}

impl Engine for SlowEngine {
    fn has_room(&self) -> bool {
        let meanwhile = self.held.lock().unwrap().meanwhile.take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        self.held.lock().unwrap().tickets.len() < 4
    }

    fn buffers(&mut self) -> &mut IoBuffers {
        self.buffers.clear();
        &mut self.buffers
    }

    fn set_disk(&mut self, _disk: Arc<Disk>) {
        assert!(self.held.lock().unwrap().tickets.is_empty());
    }

    fn start(&mut self, _request: Request, ticket: Ticket) -> Option<Done> {
        assert!(self.has_room());
        self.held.lock().unwrap().tickets.push(ticket);
        None
    }

    fn submit(&mut self) -> io::Result<()> {
        let mut held = self.held.lock().unwrap();
        held.submitted = held.tickets.len();
        Ok(())
    }

    fn next_done(&mut self) -> Option<Done> {
        let mut held = self.held.lock().unwrap();
        held.released = held.released.checked_sub(1)?;
        let ticket = held.tickets.pop()?;
        Some(Done {
            ticket,
            written: 512,
            result: if held.failing {
                Err(io::ErrorKind::Other.into())
            } else {
                Ok(())
            },
        })
    }

    fn wait(&mut self) -> io::Result<bool> {
        let mut held = self.held.lock().unwrap();
        if held.broken {
            return Err(io::ErrorKind::Other.into());
        }
        held.waits += 1;
        held.released += 1;
        Ok(!held.tickets.is_empty())
    }
}

fn server() -> (Server, Driver, Arc<Mutex<Held>>) {
    server_of(100)
}

fn server_of(sectors: u64) -> (Server, Driver, Arc<Mutex<Held>>) {
    let driver = Driver::new(memory(), SIZE);
    let held = Arc::<Mutex<Held>>::default();
    let interrupts = Arc::new(AtomicU32::new(0));
    let StartContext {
        memory,
        features,
        mut queues,
        signals,
    } = driver.context(0, &interrupts);
    let started = queues.pop().flatten().unwrap();
    let engine = SlowEngine {
        held: held.clone(),
        buffers: IoBuffers::new(memory.clone()),
    };
    let server = Server::new(Parts {
        queue: started.queue,
        kick: started.kick,
        memory,
        signals,
        limits: Limits {
            sectors,
            features,
            read_only: false,
        },
        serial: [0; ID_SIZE as usize],
        name: "block device test".into(),
        engine: Box::new(engine),
        shared: Arc::new(Shared::new(disk(), false, LimiterUpdate::default()).unwrap()),
        generation: 0,
    });
    (server, driver, held)
}

fn disk() -> Disk {
    let file = tempfile::NamedTempFile::new().unwrap();
    Disk::open(file.path(), false, false).unwrap()
}

/// Offers a read of one sector, with its own status byte; its head.
fn offer(driver: &mut Driver, number: u64) -> u16 {
    let header = GuestAddress(HEADER);
    driver.memory.write_slice(&[0; 16], header).unwrap();
    let (data, status) = (writable(DATA, 512), writable(STATUS + number, 1));
    let byte = GuestAddress(STATUS + number);
    driver.memory.write_slice(&[0xff], byte).unwrap();
    driver.add(&[readable(HEADER, 16), data, status])
}

fn heads(driver: &mut Driver) -> Vec<u32> {
    std::iter::from_fn(|| driver.take_used())
        .map(|used| used.head)
        .collect()
}

fn statuses(driver: &Driver, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let start = GuestAddress(STATUS);
    driver.memory.read_slice(&mut bytes, start).unwrap();
    bytes
}

#[test]
fn requests_are_answered_in_the_order_in_which_they_end() {
    let (mut server, mut driver, held) = server();
    for number in 0..3 {
        offer(&mut driver, number);
    }
    assert!(server.process().unwrap());
    assert!(heads(&mut driver).is_empty());
    assert_eq!(statuses(&driver, 3), [0xff; 3]);
    assert!(!server.process().unwrap(), "there is nothing to do");

    held.lock().unwrap().released = 2;
    assert!(server.process().unwrap());
    assert_eq!(heads(&mut driver), [6, 3]);
    assert_eq!(statuses(&driver, 3), [0xff, 0, 0]);
    held.lock().unwrap().released = 1;
    assert!(server.process().unwrap());
    assert_eq!(heads(&mut driver), [0]);
}

#[test]
fn no_more_is_taken_than_the_engine_has_room_for() {
    let (mut server, mut driver, held) = server();
    for number in 0..6 {
        offer(&mut driver, number);
    }
    server.process().unwrap();
    assert_eq!(held.lock().unwrap().submitted, 4);
    // There is work, but none that could be done; the engine will say when that changes.
    assert!(!server.process().unwrap());
    assert!(!server.arm().unwrap());

    held.lock().unwrap().released = 1;
    server.process().unwrap();
    assert_eq!(heads(&mut driver), [9]);
    assert_eq!(held.lock().unwrap().submitted, 4);
    held.lock().unwrap().released = 4;
    server.process().unwrap();
    held.lock().unwrap().released = 4;
    server.process().unwrap();
    assert_eq!(heads(&mut driver).len(), 5);
    assert!(!server.arm().unwrap(), "the queue is empty");
    offer(&mut driver, 0);
    assert!(server.arm().unwrap(), "now it is not");
}

#[test]
fn a_stop_waits_for_what_is_in_flight() {
    let (mut server, mut driver, held) = server();
    for number in 0..6 {
        offer(&mut driver, number);
    }
    server.process().unwrap();
    let state = server.finish();
    assert_eq!(heads(&mut driver), [9, 6, 3, 0]);
    assert_eq!(statuses(&driver, 6), [0, 0, 0, 0, 0xff, 0xff]);
    assert_eq!((state.next_avail, state.next_used), (4, 4));
    assert!(held.lock().unwrap().waits >= 4);
}

#[test]
fn a_stop_ends_although_the_host_does_not_answer() {
    let (mut server, mut driver, held) = server();
    offer(&mut driver, 0);
    server.process().unwrap();
    held.lock().unwrap().broken = true;
    let signals = server.parts.signals.clone();
    let state = server.finish();
    assert_eq!((state.next_avail, state.next_used), (1, 0));
    assert!(heads(&mut driver).is_empty());
    assert!(signals.is_reset_needed());
}

#[test]
fn a_stop_that_cannot_answer_everything_asks_for_a_reset() {
    let (mut server, mut driver, _held) = server();
    offer(&mut driver, 0);
    let data = writable(DATA, 512);
    driver.add(&[readable(HEADER, 16), data, writable(MEMORY_END, 1)]);
    server.process().unwrap();
    let signals = server.parts.signals.clone();
    assert!(!signals.is_reset_needed());
    server.finish();
    assert!(signals.is_reset_needed());
}

#[test]
fn a_round_ends_when_enough_data_was_moved() {
    let (mut server, mut driver, held) = server_of(1 << 20);
    let half = u32::try_from(MAX_ROUND_BYTES / 2).unwrap();
    for _ in 0..4 {
        // In pieces, as the memory has not as much in one.
        let pieces = [writable(DATA, half / 4); 4];
        let last = writable(STATUS, 1);
        driver.add(&[&[readable(HEADER, 16)], &pieces[..], &[last]].concat());
    }
    assert!(server.process().unwrap());
    assert_eq!(held.lock().unwrap().submitted, 2);
    assert!(server.process().unwrap());
    assert_eq!(held.lock().unwrap().submitted, 4);
}

#[test]
fn a_round_ends_even_if_there_is_more() {
    let (mut server, mut driver, _held) = server();
    // Without a header, and so answered at once.
    for _ in 0..SIZE {
        driver.add(&[writable(STATUS, 1)]);
    }
    let mut rounds = 0;
    while server.process().unwrap() {
        rounds += 1;
        let served = heads(&mut driver).len();
        assert_eq!(served, MAX_ROUND);
    }
    assert_eq!(rounds, usize::from(SIZE) / MAX_ROUND);
}

/// Offers a write of the sector `sector`.
fn offer_write(driver: &mut Driver, sector: u64) {
    let header = [1, sector].map(u64::to_le_bytes).concat();
    driver
        .memory
        .write_slice(&header, GuestAddress(HEADER))
        .unwrap();
    let status = writable(STATUS, 1);
    driver.add(&[readable(HEADER, 16), readable(DATA, 512), status]);
}

#[test]
fn a_write_is_noted_when_it_ends_even_if_it_fails() {
    const BLOCK: u64 = crate::block::BlockLog::BLOCK;
    for failing in [false, true] {
        let (mut server, mut driver, held) = server_of(1000);
        held.lock().unwrap().failing = failing;
        let shared = server.parts.shared.clone();
        shared.log.all_changed(1000 * 512);
        shared.log.start();
        for sector in [200, 1001] {
            offer_write(&mut driver, sector);
            server.process().unwrap();
        }
        // What was refused has not begun.
        assert_eq!(heads(&mut driver).len(), 1);
        let taken = || shared.log.take().unwrap().ranges().collect::<Vec<_>>();
        assert!(taken().is_empty(), "who reads it now may miss it");
        held.lock().unwrap().released = 1;
        server.process().unwrap();
        assert_eq!(statuses(&driver, 1), [u8::from(failing)]);
        let block = BLOCK..2 * BLOCK;
        assert_eq!(taken(), [block]);
    }
}

/// Gives the server a disk of 1000 sectors.
fn exchange(shared: &Arc<Shared>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1000 * 512).unwrap();
    let control = crate::block::BlockControl {
        shared: shared.clone(),
        read_only: false,
        locks: false,
    };
    control.set_image(file.path()).unwrap();
}

#[test]
fn what_is_asked_for_after_an_exchange_is_for_the_new_disk() {
    let (mut server, mut driver, held) = server_of(100);
    let shared = server.parts.shared.clone();
    // The driver has heard of it, and asks, after the server has begun a round.
    held.lock().unwrap().meanwhile = Some(Box::new(move || exchange(&shared)));
    offer_write(&mut driver, 200);
    server.process().unwrap();
    held.lock().unwrap().released = 1;
    server.process().unwrap();
    assert_eq!(statuses(&driver, 1), [0]);
}

#[test]
fn after_a_failure_of_the_host_all_may_have_been_written() {
    let (mut server, mut driver, held) = server_of(1000);
    let shared = server.parts.shared.clone();
    exchange(&shared);
    server.process().unwrap();
    shared.log.start();
    offer_write(&mut driver, 200);
    server.process().unwrap();
    held.lock().unwrap().broken = true;
    server.finish();
    assert_eq!(shared.log.take().unwrap().bytes(), 1000 * 512);
}
