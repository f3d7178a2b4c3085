// SPDX-License-Identifier: Apache-2.0
//! The device with its worker thread, on real files, with both engines.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the numbers of a test are known to fit"
)]

mod handover;
mod restore;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::device::feature;
use crate::limiter::{BucketLimits, BucketUpdate};
use crate::testing::{BUFFERS, Driver, MEMORY_END, Piece, Used, memory, readable, writable};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What a status byte holds before the device wrote it.
const NONE: u8 = 0xff;

/// Where the parts of the request with the given number are; data may have 64 KiB.
fn place(number: u64) -> u64 {
    BUFFERS + number * 0x1_1000
}
const STATUS: u64 = 0x800;
const DATA: u64 = 0x1000;

const BOTH: [Engine; 2] = [Engine::Sync, Engine::Async];

fn config(path: &Path, engine: Engine) -> BlockConfig {
    BlockConfig {
        id: "rootfs".into(),
        path: path.into(),
        read_only: false,
        engine,
        cache: CacheType::Writeback,
        locking: Locking::Now,
        limits: LimiterUpdate::default(),
    }
}

/// An image of `len` bytes that differ from place to place.
fn image(len: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&pattern(len, 1), 0).unwrap();
    file
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

/// A running device and its driver.
struct Guest {
    block: Block,
    driver: Driver,
    features: u64,
    interrupts: Arc<AtomicU32>,
    signals: Option<crate::signals::DeviceSignals>,
}

impl Guest {
    fn new(config: BlockConfig) -> Self {
        let block = Block::open(config).unwrap();
        let features = block.features();
        Self::with(block, features)
    }

    fn with(block: Block, features: u64) -> Self {
        let mut guest = Self {
            block,
            driver: Driver::new(memory(), 256),
            features: features | feature::EVENT_IDX,
            interrupts: Arc::default(),
            signals: None,
        };
        guest.start();
        guest
    }

    fn start(&mut self) {
        let context = self.driver.context(self.features, &self.interrupts);
        self.signals = Some(context.signals.clone());
        self.block.start(context).unwrap();
    }

    /// Stops the device and lets the next start go on from there.
    fn stop(&mut self) {
        let [Some(state)] = self.block.stop()[..] else {
            panic!("one queue was running");
        };
        self.driver.state = state;
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let address = GuestAddress(address);
        self.driver.memory.write_slice(bytes, address).unwrap();
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let address = GuestAddress(address);
        self.driver.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }

    fn write_header(&self, at: u64, kind: u32, sector: u64) {
        self.write(at, &u64::from(kind).to_le_bytes());
        self.write(at + 8, &sector.to_le_bytes());
        self.write(at + STATUS, &[NONE]);
    }

    fn wait_used(&mut self) -> Used {
        let start = Instant::now();
        loop {
            if let Some(used) = self.driver.take_used() {
                return used;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no answer");
            thread::yield_now();
        }
    }

    fn offer(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.driver.add(pieces);
        self.driver.kick();
        head
    }

    /// Sends a request whose chain is a header, `pieces` and a status byte; status, used length.
    fn request(&mut self, kind: u32, sector: u64, pieces: &[Piece]) -> (u8, u32) {
        let at = place(0);
        self.write_header(at, kind, sector);
        let (first, last) = ([readable(at, 16)], [writable(at + STATUS, 1)]);
        let head = self.offer(&[&first, pieces, &last].concat());
        let used = self.wait_used();
        assert_eq!(used.head, u32::from(head));
        (self.read(at + STATUS, 1)[0], used.len)
    }

    fn read_sectors(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let at = place(0) + DATA;
        let answer = self.request(IN, sector, &[writable(at, len)]);
        assert_eq!(answer, (OK, len + 1));
        self.read(at, len as usize)
    }

    fn write_sectors(&mut self, sector: u64, data: &[u8]) -> (u8, u32) {
        let at = place(0) + DATA;
        self.write(at, data);
        self.request(OUT, sector, &[readable(at, data.len() as u32)])
    }

    fn request_range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> (u8, u32) {
        let at = place(0) + DATA;
        self.write(at, &sector.to_le_bytes());
        self.write(at + 8, &count.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.request(kind, 0, &[readable(at, 16)])
    }

    #[track_caller]
    fn assert_needs_reset(&self) {
        let start = Instant::now();
        while !self.signals.as_ref().unwrap().is_reset_needed() {
            assert!(start.elapsed() < Duration::from_secs(20), "goes on");
            thread::yield_now();
        }
    }

    fn dirty_pages(&self) -> Vec<u64> {
        let region = self.driver.memory.find_region(GuestAddress(0)).unwrap();
        let pages = (0..MEMORY_END).step_by(4096);
        pages
            .filter(|&page| region.bitmap().dirty_at(page as usize))
            .collect()
    }

    fn forget_dirty_pages(&self) {
        let region = self.driver.memory.find_region(GuestAddress(0)).unwrap();
        (**region).bitmap().reset();
    }
}

#[test]
fn reads_bring_what_the_image_holds() {
    let file = image(1 << 20);
    for engine in BOTH {
        let mut guest = Guest::new(config(file.path(), engine));
        let all = pattern(1 << 20, 1);
        for (sector, len) in [(0, 512), (1, 4096), (7, 65536), (2047, 512), (5, 0)] {
            let data = guest.read_sectors(sector, len);
            let start = sector as usize * 512;
            assert!(data == all[start..start + len as usize], "at {sector}");
        }
    }
}

#[test]
fn writes_reach_the_image() {
    for engine in BOTH {
        let file = image(1 << 20);
        let mut guest = Guest::new(config(file.path(), engine));
        let mut expected = pattern(1 << 20, 1);
        for (sector, len) in [(0, 512), (3, 4096), (1920, 65536), (9, 0)] {
            let data = pattern(len, 2 + sector);
            assert_eq!(guest.write_sectors(sector, &data), (OK, 1));
            let start = sector as usize * 512;
            expected[start..start + len].copy_from_slice(&data);
        }
        assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
        assert!(std::fs::read(file.path()).unwrap() == expected);
    }
}

#[test]
fn data_is_put_together_from_any_pieces() {
    let file = image(1 << 20);
    for engine in BOTH {
        let mut guest = Guest::new(config(file.path(), engine));
        let at = place(0) + DATA;
        // 1021 bytes in 200 pieces with holes between them, then the rest and an empty one.
        let mut pieces: Vec<_> = (0..200).map(|n| writable(at + 16 * n, 5)).collect();
        pieces.extend([writable(at + 3200, 21), writable(0xffff_ffff_0000, 0)]);
        pieces.push(writable(at + 4096, 3));
        assert_eq!(guest.request(IN, 4, &pieces), (OK, 1025));
        let mut data = Vec::new();
        for piece in &pieces[..201] {
            data.extend(guest.read(piece.address, piece.len as usize));
        }
        data.extend(guest.read(at + 4096, 3));
        assert!(data == pattern(1 << 20, 1)[2048..3072]);
    }
}

#[test]
fn exactly_the_pages_that_were_read_into_are_dirty() {
    let file = image(1 << 20);
    for engine in BOTH {
        let mut guest = Guest::new(config(file.path(), engine));
        let at = 0x20_0000;
        guest.forget_dirty_pages();
        guest.write_header(at, IN, 0);
        guest.forget_dirty_pages();
        let (header, status) = (readable(at, 16), writable(at + 0x10_0000, 1));
        let data = writable(at + 0x3000, 0x2000);
        let head = guest.driver.add(&[header, data, status]);
        guest.forget_dirty_pages();
        guest.driver.kick();
        assert_eq!(guest.wait_used().head, u32::from(head));
        guest.stop();
        // The used ring, the data, the status.
        assert_eq!(
            guest.dirty_pages(),
            [0xa000, at + 0x3000, at + 0x4000, at + 0x10_0000]
        );
    }
}

#[test]
fn the_serial_id_is_the_drive_id() {
    let file = image(512);
    for (id, expected) in [
        ("rootfs", *b"rootfs\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("a-drive-id-of-30-characters---", *b"a-drive-id-of-30-cha"),
    ] {
        let id = id.into();
        let mut guest = Guest::new(BlockConfig {
            id,
            ..config(file.path(), Engine::Sync)
        });
        let at = place(0) + DATA;
        assert_eq!(guest.request(GET_ID, 0, &[writable(at, 20)]), (OK, 21));
        assert_eq!(guest.read(at, 20), expected);
    }
}

#[test]
fn flushes_are_offered_with_a_write_back_cache_only() {
    let file = image(512);
    for engine in BOTH {
        let writeback = config(file.path(), engine);
        let cache = CacheType::Unsafe;
        let mut guest = Guest::new(BlockConfig {
            cache,
            ..writeback.clone()
        });
        assert_eq!(guest.block.features() & F_FLUSH, 0);
        assert_eq!(guest.request(FLUSH, 0, &[]), (UNSUPP, 1));
        drop(guest);
        let mut guest = Guest::new(writeback);
        assert_ne!(guest.block.features() & F_FLUSH, 0);
        assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    }
}

#[test]
fn writes_are_durable_if_and_only_if_the_driver_was_offered_flushes_and_does_without() {
    let file = image(4096);
    for (cache, features, durable) in [
        (CacheType::Unsafe, 0, false),
        (CacheType::Writeback, F_FLUSH, false),
        (CacheType::Writeback, 0, true),
    ] {
        for engine in BOTH {
            let block = Block::open(BlockConfig {
                cache,
                ..config(file.path(), engine)
            })
            .unwrap();
            assert_eq!(block.writes_through(features), durable);
            let mut guest = Guest::with(block, features | F_DISCARD | F_WRITE_ZEROES);
            let data = pattern(4096, 7);
            assert_eq!(guest.write_sectors(0, &data), (OK, 1));
            let at = place(0) + DATA;
            let halves = [readable(at, 100), readable(at + 100, 4096 - 100)];
            assert_eq!(guest.request(OUT, 0, &halves), (OK, 1));
            assert_eq!(guest.request_range(WRITE_ZEROES, 1, 1, 0), (OK, 1));
            assert_eq!(guest.request_range(DISCARD, 2, 1, 0), (OK, 1));
            assert!(guest.read_sectors(0, 512) == data[..512]);
            assert_eq!(guest.read_sectors(1, 512), [0; 512]);
        }
    }
}

#[test]
fn discards_give_space_back_and_zeroes_read_as_zeroes() {
    for engine in BOTH {
        let file = image(1 << 20);
        let blocks = || file.as_file().metadata().unwrap().blocks();
        file.as_file().sync_all().unwrap();
        let full = blocks();
        let mut guest = Guest::new(config(file.path(), engine));
        assert_eq!(guest.request_range(DISCARD, 0, 512, 0), (OK, 1));
        assert!(blocks() < full, "{} of {full}", blocks());
        assert_eq!(guest.read_sectors(8, 4096), [0; 4096]);
        let punched = blocks();
        assert_eq!(guest.request_range(WRITE_ZEROES, 600, 9, 0), (OK, 1));
        assert_eq!(guest.request_range(WRITE_ZEROES, 1000, 512, 1), (OK, 1));
        assert!(blocks() < punched, "{} of {punched}", blocks());
        assert_eq!(guest.request_range(DISCARD, 0, 0, 0), (OK, 1));
        assert_eq!(guest.request_range(WRITE_ZEROES, 0, 0, 0), (OK, 1));
        let mut expected = pattern(1 << 20, 1);
        expected[..512 * 512].fill(0);
        expected[600 * 512..609 * 512].fill(0);
        expected[1000 * 512..1512 * 512].fill(0);
        assert!(std::fs::read(file.path()).unwrap() == expected);
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_has_no_better_way() {
    for engine in BOTH {
        // tmpfs punches holes, but cannot zero a range and keep its space.
        let file = NamedTempFile::new_in("/dev/shm").unwrap();
        let mut expected = pattern(1 << 20, 1);
        file.as_file().write_all_at(&expected, 0).unwrap();
        let refused = host::fallocate(file.as_file(), libc::FALLOC_FL_ZERO_RANGE, 0, 512);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
        let mut guest = Guest::new(config(file.path(), engine));
        assert_eq!(guest.request_range(WRITE_ZEROES, 1, 300, 0), (OK, 1));
        assert_eq!(guest.request_range(WRITE_ZEROES, 1001, 16, 1), (OK, 1));
        expected[512..301 * 512].fill(0);
        expected[1001 * 512..1017 * 512].fill(0);
        assert!(std::fs::read(file.path()).unwrap() == expected);
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for engine in BOTH {
        let file = image(1 << 20);
        let mut guest = Guest::new(BlockConfig {
            read_only: true,
            ..config(file.path(), engine)
        });
        let features = guest.block.features();
        assert_eq!(features & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
        assert_eq!(guest.write_sectors(0, &[9; 512]), (IOERR, 1));
        assert_eq!(guest.request_range(DISCARD, 0, 8, 0), (UNSUPP, 1));
        assert_eq!(guest.request_range(WRITE_ZEROES, 0, 8, 0), (UNSUPP, 1));
        assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
        assert!(guest.read_sectors(0, 512) == pattern(512, 1));
        assert!(std::fs::read(file.path()).unwrap() == pattern(1 << 20, 1));
    }
}

#[test]
fn a_request_with_a_fault_is_answered_and_the_next_one_served() {
    let file = image(1 << 20);
    for engine in BOTH {
        let mut guest = Guest::new(config(file.path(), engine));
        let at = place(0) + DATA;
        let outside = [
            writable(MEMORY_END - 256, 512),
            writable(MEMORY_END, 512),
            writable(u64::MAX - 100, 512),
            writable(!511, 512),
        ];
        for piece in outside {
            assert_eq!(guest.request(IN, 0, &[piece]), (IOERR, 1), "{piece:?}");
            let piece = readable(piece.address, piece.len);
            assert_eq!(guest.request(OUT, 0, &[piece]), (IOERR, 1), "{piece:?}");
            let pieces = [readable(at, 512), piece];
            assert_eq!(guest.request(OUT, 0, &pieces), (IOERR, 1), "{piece:?}");
        }
        let id = [writable(MEMORY_END, 20)];
        assert_eq!(guest.request(GET_ID, 0, &id), (IOERR, 1));
        let huge = [writable(0, u32::MAX - 511), writable(0, u32::MAX - 511)];
        assert_eq!(guest.request(IN, 0, &huge), (IOERR, 1));
        assert_eq!(guest.request(IN, 2048, &[writable(at, 512)]), (IOERR, 1));
        assert_eq!(
            guest.request(IN, u64::MAX, &[writable(at, 512)]),
            (IOERR, 1)
        );
        assert_eq!(guest.request(IN, 0, &[readable(at, 512)]), (IOERR, 1));
        assert_eq!(guest.request(OUT, 0, &[writable(at, 512)]), (IOERR, 1));
        assert_eq!(guest.request(77, 0, &[writable(at, 512)]), (UNSUPP, 1));
        assert!(guest.read_sectors(0, 4096) == pattern(4096, 1));
        assert!(std::fs::read(file.path()).unwrap() == pattern(1 << 20, 1));
        assert!(!guest.signals.as_ref().unwrap().is_reset_needed());
    }
}

#[test]
fn a_request_that_cannot_be_answered_stops_the_device() {
    let file = image(1 << 20);
    for engine in BOTH {
        let at = place(0);
        let header = readable(at, 16);
        for chain in [
            vec![header],
            vec![header, readable(at + DATA, 512)],
            vec![header, writable(at + DATA, 0)],
            vec![header, writable(at + DATA, 512), writable(MEMORY_END, 1)],
            vec![header, writable(at + DATA, 512), writable(u64::MAX, 1)],
        ] {
            let mut guest = Guest::new(config(file.path(), engine));
            guest.write_header(at, IN, 0);
            guest.offer(&chain);
            guest.assert_needs_reset();
            assert_eq!(guest.driver.take_used(), None, "{chain:?}");
            guest.stop();
        }
    }
}

#[test]
fn an_error_of_the_host_is_an_error_of_the_request() {
    for engine in BOTH {
        let file = image(1 << 20);
        let mut guest = Guest::new(config(file.path(), engine));
        file.as_file().set_len(1024).unwrap();
        let at = place(0) + DATA;
        guest.write(at, &[9; 4096]);
        // Half of it is still there, and what was read counts as written.
        assert_eq!(guest.request(IN, 1, &[writable(at, 1024)]), (IOERR, 513));
        assert!(guest.read(at, 512) == pattern(1024, 1)[512..]);
        assert_eq!(guest.read(at + 512, 512), [9; 512]);
        assert_eq!(guest.request(IN, 8, &[writable(at, 512)]), (IOERR, 1));
        assert!(guest.read_sectors(1, 512) == pattern(1024, 1)[512..]);
    }
}

#[test]
fn a_refused_write_is_an_error_of_the_request() {
    for engine in BOTH {
        let file = sealable_file();
        file.set_len(4096).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let mut guest = Guest::new(config(Path::new(&path), engine));
        assert_eq!(guest.write_sectors(0, &[9; 512]), (OK, 1));
        seal_against_writes(&file);
        assert_eq!(guest.write_sectors(0, &[8; 512]), (IOERR, 1));
        assert_eq!(guest.request_range(WRITE_ZEROES, 0, 8, 0), (IOERR, 1));
        assert_eq!(guest.read_sectors(0, 512), [9; 512]);
    }
}

#[allow(unsafe_code)]
fn sealable_file() -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a string that ends in a zero byte.
    let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new and nobody else's.
    unsafe { File::from_raw_fd(fd) }
}

#[allow(unsafe_code)]
fn seal_against_writes(file: &File) {
    let fd = std::os::fd::AsRawFd::as_raw_fd(file);
    // SAFETY: no memory is handed over.
    let result = unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(result, 0);
}

/// A request in flight: head, kind, sector, and the data that is written or has to be read.
type Sent = (u16, u32, usize, Vec<u8>);

/// Many requests in flight at once, with a model of what the disk holds.
struct Traffic {
    depth: u64,
    model: Vec<u8>,
    /// By slot.
    in_flight: Vec<Option<Sent>>,
    state: u64,
    done: u64,
}

impl Traffic {
    const SECTORS: usize = 2048;
    /// Sectors of a request, each slot in its own part of the disk so that order does not matter.
    const MOST: usize = 16;

    fn new(depth: u64) -> Self {
        Self {
            depth,
            model: pattern(Self::SECTORS * 512, 1),
            in_flight: (0..depth).map(|_| None).collect(),
            state: 88_172_645_463_325_252,
            done: 0,
        }
    }

    fn random(&mut self, below: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state % below as u64) as usize
    }

    /// Puts a request into each free slot.
    fn fill(&mut self, guest: &mut Guest) {
        let part = Self::SECTORS / self.depth as usize;
        for slot in 0..self.depth as usize {
            if self.in_flight[slot].is_some() {
                continue;
            }
            let count = 1 + self.random(Self::MOST.min(part));
            let sector = slot * part + self.random(part - count + 1);
            let (start, len) = (sector * 512, count * 512);
            let at = place(slot as u64 % 100);
            let kind = [IN, OUT][self.random(2)];
            guest.write_header(at, kind, sector as u64);
            let data = if kind == IN {
                self.model[start..start + len].to_vec()
            } else {
                let data = pattern(len, self.state);
                self.model[start..start + len].copy_from_slice(&data);
                guest.write(at + DATA, &data);
                data
            };
            let piece = Piece {
                address: at + DATA,
                len: len as u32,
                write: kind == IN,
            };
            // Three descriptors for each slot, always the same ones.
            let head = 3 * slot as u16;
            let chain = [readable(at, 16), piece, writable(at + STATUS, 1)];
            for (index, piece) in (head..).zip(chain) {
                let flags = u16::from(index < head + 2) | if piece.write { 2 } else { 0 };
                let fields = (piece.address, piece.len, flags, index + 1);
                guest.driver.set_descriptor(index, fields);
            }
            guest.driver.offer(head);
            self.in_flight[slot] = Some((head, kind, sector, data));
        }
        guest.driver.kick();
    }

    /// Takes one answer and checks it.
    fn check(&mut self, guest: &mut Guest, used: Used) {
        let slot = used.head as usize / 3;
        let at = place(slot as u64 % 100);
        let (head, kind, sector, data) = self.in_flight[slot].take().expect("answered once");
        assert_eq!(u32::from(head), used.head);
        assert_eq!(guest.read(at + STATUS, 1), [OK], "at sector {sector}");
        let written = if kind == IN { data.len() as u32 } else { 0 };
        assert_eq!(used.len, written + 1);
        if kind == IN {
            let got = guest.read(at + DATA, data.len());
            assert!(got == data, "wrong data at sector {sector}");
        }
        self.done += 1;
    }

    fn drain(&mut self, guest: &mut Guest) {
        while self.in_flight.iter().any(Option::is_some) {
            let used = guest.wait_used();
            self.check(guest, used);
        }
    }
}

#[test]
fn many_requests_at_once_all_come_back_once_and_right() {
    for engine in BOTH {
        for depth in [1, 7, 64] {
            let file = image(Traffic::SECTORS * 512);
            let mut guest = Guest::new(config(file.path(), engine));
            let mut traffic = Traffic::new(depth);
            while traffic.done < 3000 {
                traffic.fill(&mut guest);
                let used = guest.wait_used();
                traffic.check(&mut guest, used);
            }
            traffic.drain(&mut guest);
            assert_eq!(guest.driver.take_used(), None);
            assert!(guest.interrupts.load(Ordering::SeqCst) > 0);
            drop(guest);
            assert!(std::fs::read(file.path()).unwrap() == traffic.model);
        }
    }
}

/// Makes the next reads go to the disk, where there is one.
#[allow(unsafe_code)]
fn forget_cached(file: &File) {
    let fd = std::os::fd::AsRawFd::as_raw_fd(file);
    file.sync_all().unwrap();
    // SAFETY: no memory is handed over.
    let result = unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(result, 0);
}

#[test]
fn a_stop_in_the_middle_of_traffic_loses_and_doubles_nothing() {
    for engine in BOTH {
        let file = image(Traffic::SECTORS * 512);
        let mut guest = Guest::new(config(file.path(), engine));
        let mut traffic = Traffic::new(64);
        for round in 0..50 {
            if round % 10 == 0 {
                forget_cached(file.as_file());
            }
            traffic.fill(&mut guest);
            for _ in 0..round % 7 {
                let used = guest.wait_used();
                traffic.check(&mut guest, used);
            }
            guest.stop();
            // What was taken is answered, and what was not is still to be taken.
            let state = guest.driver.state;
            assert_eq!(state.next_avail, state.next_used);
            assert_eq!(state.next_used, guest.driver.used_index());
            let index = state.next_used;
            thread::sleep(Duration::from_micros(200));
            assert_eq!(
                guest.driver.used_index(),
                index,
                "a stopped device does nothing"
            );
            while let Some(used) = guest.driver.take_used() {
                traffic.check(&mut guest, used);
            }
            guest.start();
            guest.driver.kick();
        }
        traffic.drain(&mut guest);
        drop(guest);
        assert!(std::fs::read(file.path()).unwrap() == traffic.model);
    }
}

#[test]
fn a_device_whose_driver_uses_no_queue_starts_and_stops() {
    let file = image(512);
    let mut block = Block::open(config(file.path(), Engine::Sync)).unwrap();
    let driver = Driver::new(memory(), 256);
    let mut context = driver.context(0, &Arc::default());
    context.queues = vec![None];
    block.start(context).unwrap();
    assert!(block.stop().is_empty());
    assert!(block.stop().is_empty());
}

#[test]
fn a_second_device_gets_the_image_when_the_first_is_gone() {
    let file = image(4096);
    for engine in BOTH {
        for _ in 0..20 {
            let mut guest = Guest::new(config(file.path(), engine));
            assert!(matches!(
                Block::open(config(file.path(), engine)),
                Err(BlockError::InUse { .. })
            ));
            assert!(guest.read_sectors(0, 512) == pattern(512, 1));
        }
    }
}

#[test]
fn an_idle_worker_sleeps_until_it_is_kicked() {
    let file = image(4096);
    for engine in BOTH {
        let mut guest = Guest::new(config(file.path(), engine));
        for _ in 0..20 {
            // Longer than it looks at an empty queue.
            thread::sleep(Duration::from_millis(2));
            assert!(guest.read_sectors(0, 512) == pattern(512, 1));
        }
        assert_eq!(guest.driver.avail_event(), guest.driver.avail);
    }
}

/// A block device of the host over a file, for the test that has it.
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &Path, sector_size: u32) -> Self {
        let size = sector_size.to_string();
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &size])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().into())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_block_device_of_the_host_is_served_like_a_file() {
    for engine in BOTH {
        for sector_size in [512, 4096] {
            let file = image(4 << 20);
            let device = LoopDevice::new(file.path(), sector_size);
            let mut guest = Guest::new(config(Path::new(&device.0), engine));
            let mut config = [0; 24];
            guest.block.read_config(0, &mut config);
            assert_eq!(config[..8], 8192_u64.to_le_bytes());
            assert_eq!(config[20..], sector_size.to_le_bytes());

            let mut expected = pattern(4 << 20, 1);
            assert!(guest.read_sectors(16, 8192) == expected[8192..16384]);
            let data = pattern(4096, 5);
            assert_eq!(guest.write_sectors(8, &data), (OK, 1));
            expected[4096..8192].copy_from_slice(&data);
            // Whole blocks, and a range that the device does not take with large ones.
            assert_eq!(guest.request_range(WRITE_ZEROES, 64, 64, 0), (OK, 1));
            assert_eq!(guest.request_range(WRITE_ZEROES, 257, 7, 0), (OK, 1));
            assert_eq!(guest.request_range(WRITE_ZEROES, 512, 64, 1), (OK, 1));
            assert_eq!(guest.request_range(DISCARD, 4096, 4096, 0), (OK, 1));
            assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
            for sectors in [64..128, 257..264, 512..576] {
                expected[sectors.start * 512..sectors.end * 512].fill(0);
            }
            drop(guest);
            let held = std::fs::read(&device.0).unwrap();
            // What was discarded may hold anything.
            assert!(held[..2 << 20] == expected[..2 << 20]);
            let full = file.as_file().metadata().unwrap().blocks();
            assert!(full < 8192, "the space was not given back: {full}");
        }
    }
}

#[test]
fn the_image_can_be_exchanged_while_requests_go_on() {
    for engine in BOTH {
        let (old, new) = (image(64 << 10), NamedTempFile::new().unwrap());
        new.as_file()
            .write_all_at(&pattern(128 << 10, 7), 0)
            .unwrap();
        let mut guest = Guest::new(config(old.path(), engine));
        let control = guest.block.control();
        assert_eq!(guest.read_sectors(0, 4096), pattern(64 << 10, 1)[..4096]);
        let before = guest.interrupts.load(Ordering::SeqCst);
        control.set_image(new.path()).unwrap();
        assert!(guest.interrupts.load(Ordering::SeqCst) > before);
        let mut sectors = [0; 8];
        guest.block.read_config(0, &mut sectors);
        assert_eq!(u64::from_le_bytes(sectors), 256);
        assert_eq!(
            guest.read_sectors(200, 4096),
            pattern(128 << 10, 7)[200 * 512..][..4096]
        );
        // The old image is let go, with its lock.
        Block::open(config(old.path(), engine)).unwrap();
        assert_eq!(control.counts().updates, 1);
    }
}

#[test]
fn an_image_that_grew_is_given_again() {
    let file = image(64 << 10);
    let mut guest = Guest::new(config(file.path(), Engine::Sync));
    file.as_file().set_len(1 << 20).unwrap();
    guest.block.control().set_image(file.path()).unwrap();
    assert_eq!(guest.read_sectors(2000, 512), [0; 512]);
    // It is still locked.
    assert!(Block::open(config(file.path(), Engine::Sync)).is_err());
}

#[test]
fn an_image_that_cannot_be_used_changes_nothing() {
    let file = image(64 << 10);
    let mut guest = Guest::new(config(file.path(), Engine::Sync));
    let control = guest.block.control();
    for path in ["/", "/dev/null", "/no/such/image"] {
        assert!(control.set_image(Path::new(path)).is_err(), "{path}");
    }
    assert_eq!(guest.read_sectors(0, 512), pattern(64 << 10, 1)[..512]);
    assert_eq!(control.counts().update_fails, 3);
}

#[test]
fn limited_requests_wait_and_then_go_on() {
    for engine in BOTH {
        let file = image(64 << 10);
        let limits = BucketLimits {
            size: 4,
            refill_time: Duration::from_millis(200),
            one_time_burst: 0,
        };
        let mut guest = Guest::new(BlockConfig {
            limits: LimiterUpdate {
                ops: BucketUpdate::Set(limits),
                bandwidth: BucketUpdate::Keep,
            },
            ..config(file.path(), engine)
        });
        let start = Instant::now();
        for _ in 0..12 {
            guest.read_sectors(0, 512);
        }
        let took = start.elapsed();
        // Four at once, and one every 50 ms after that.
        assert!(took >= Duration::from_millis(380), "{engine:?}: {took:?}");
        assert!(guest.block.control().counts().throttled > 0);
        // A flush moves nothing and is not held back by what was spent.
        guest.block.control().limit(LimiterUpdate {
            ops: BucketUpdate::Remove,
            bandwidth: BucketUpdate::Keep,
        });
        for _ in 0..100 {
            guest.read_sectors(0, 512);
        }
    }
}

#[test]
fn requests_are_counted_with_their_time() {
    let file = image(64 << 10);
    let mut guest = Guest::new(config(file.path(), Engine::Sync));
    guest.read_sectors(0, 1024);
    guest.write_sectors(0, &[1; 512]);
    assert_eq!(guest.request(FLUSH, 0, &[]).0, OK);
    assert_eq!(guest.request(99, 0, &[]).0, UNSUPP);
    let counts = guest.block.control().counts();
    assert_eq!((counts.reads.count, counts.reads.bytes), (1, 1024));
    assert_eq!((counts.writes.count, counts.writes.bytes), (1, 512));
    assert_eq!((counts.flushes.count, counts.refused), (1, 1));
    let latency = counts.reads.latency;
    assert_eq!(latency.classes.iter().sum::<u64>(), 1);
    assert!(latency.min > Duration::ZERO && latency.min == latency.max);
}
