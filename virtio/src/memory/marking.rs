// SPDX-License-Identifier: Apache-2.0
//! Whatever a device writes to guest memory has to be marked, or a snapshot of what has changed
//! loses it. Each way of writing is gone here, and guest memory is compared page by page; then the
//! marks of each place are made to fail, and the comparison has to see that.

// Sizes here are small by construction.
#![allow(clippy::cast_possible_truncation)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brume_devices::Interrupt;
use brume_mmds::{SharedMmds, Stack, StackConfig};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use crate::balloon::{Balloon, BalloonConfig};
use crate::block::{Block, BlockConfig, CacheType, Engine, Locking};
use crate::device::{StartContext, StartedQueue, VirtioDevice, feature};
use crate::limiter::LimiterUpdate;
use crate::net::{Net, NetConfig, Tap};
use crate::queue::Queue;
use crate::rng::Rng;
use crate::signals::DeviceSignals;
use crate::testing::machine::eventually;
use crate::testing::marks::{SITES, Site, Watched};
use crate::testing::{Driver, Piece, readable, writable};
use crate::vsock::{Vsock, VsockConfig};

/// So many that the elements of a used ring fill a page.
const SIZE: u16 = 512;
/// What the driver writes is here, and behind it what the device does.
const DRIVERS: u64 = 0x20_0000;
const DEVICES: u64 = 0x40_0000;

/// A device and its driver in watched memory.
struct Bench {
    watched: Watched,
    drivers: Vec<Driver>,
    features: u64,
}

impl Bench {
    /// With `queues` queues. Index, elements and event index of a used ring are on pages of their
    /// own.
    fn new(fails: Option<Site>, queues: u64, features: u64) -> Self {
        let watched = Watched::new(fails);
        let drivers = (1..=queues).map(|number| {
            let mut driver = Driver::new(watched.guest.clone(), SIZE);
            let base = number * 0x1_0000;
            driver.state.desc_table = base;
            driver.state.avail_ring = base + 0x8000;
            driver.state.used_ring = base + 0xaffc;
            // An element of zeroes is to be a change too.
            let elements = GuestAddress(base + 0xb000);
            watched
                .guest
                .write_slice(&[0xff; 0x1000], elements)
                .unwrap();
            driver
        });
        Self {
            drivers: drivers.collect(),
            features: features | feature::VERSION_1,
            watched,
        }
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let memory = &self.watched.guest;
        memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Starts `device`, waits until it has used as many buffers of each queue as `used` says, and
    /// stops it; where marks were made, and whether one is missing.
    fn run(
        mut self,
        mut device: impl VirtioDevice,
        used: &[u16],
        meanwhile: impl FnOnce(&Self),
    ) -> (BTreeSet<Site>, bool) {
        self.watched.begin();
        let queues = self.drivers.iter().map(|driver| {
            let memory = self.watched.device.clone();
            Some(StartedQueue {
                queue: Queue::new(driver.state, memory, self.features).unwrap(),
                kick: driver.kick.clone(),
            })
        });
        let context = StartContext {
            memory: self.watched.device.clone(),
            features: self.features,
            queues: queues.collect(),
            signals: DeviceSignals::new(Interrupt::from_fn(|| {})),
        };
        device.start(context).unwrap();
        meanwhile(&self);
        for (driver, &count) in self.drivers.iter().zip(used) {
            eventually("all is used", || driver.used_index() == count);
        }
        // Whoever has nothing to do any more asks for notifications, on most queues.
        let asks = self.features & feature::EVENT_IDX != 0;
        let start = Instant::now();
        while asks
            && start.elapsed() < Duration::from_millis(500)
            && self.drivers.iter().all(|driver| driver.avail_event() == 0)
        {
            std::thread::yield_now();
        }
        device.stop();
        let (unmarked, seen) = self.watched.unmarked();
        (seen, !unmarked.is_empty())
    }
}

type Outcome = (BTreeSet<Site>, bool);

fn block(
    fails: Option<Site>,
    engine: Engine,
    features: u64,
    requests: &[(u32, Option<Piece>)],
) -> Outcome {
    let image = NamedTempFile::new().unwrap();
    image.as_file().write_all(&[7; 1 << 16]).unwrap();
    let config = BlockConfig {
        id: "rootfs".into(),
        path: image.path().into(),
        read_only: false,
        engine,
        cache: CacheType::Writeback,
        locking: Locking::Off,
        limits: LimiterUpdate::default(),
    };
    let mut bench = Bench::new(fails, 1, features);
    for (number, (kind, data)) in (0..).zip(requests) {
        let header = DRIVERS + 0x1000 * number;
        let status = DEVICES + 0x1000 * number;
        bench.put(header, &u64::from(*kind).to_le_bytes());
        bench.put(status, &[0xff]);
        let pieces = [Some(readable(header, 16)), *data, Some(writable(status, 1))];
        let pieces: Vec<_> = pieces.into_iter().flatten().collect();
        bench.drivers[0].add(&pieces);
    }
    let used = [requests.len() as u16];
    bench.run(Block::open(config).unwrap(), &used, |_| {})
}

fn reads(fails: Option<Site>, engine: Engine) -> Outcome {
    let data = |at: u64| Some(writable(DEVICES + 0x10_0000 + at, 0x3000));
    let requests = [(0, data(0)), (0, data(0x4000)), (0, data(0x8000))];
    block(fails, engine, feature::EVENT_IDX, &requests)
}

fn block_reads(fails: Option<Site>) -> Outcome {
    reads(fails, Engine::Sync)
}

fn block_reads_by_io_uring(fails: Option<Site>) -> Outcome {
    reads(fails, Engine::Async)
}

/// It ends in the middle of its data, and is refused.
fn block_reads_past_the_end_of_the_image(fails: Option<Site>) -> Outcome {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 16).unwrap();
    let config = BlockConfig {
        id: "rootfs".into(),
        path: image.path().into(),
        read_only: true,
        engine: Engine::Sync,
        cache: CacheType::Unsafe,
        locking: Locking::Off,
        limits: LimiterUpdate::default(),
    };
    let device = Block::open(config).unwrap();
    fs::write(image.path(), [7; 0x1800]).unwrap();
    let mut bench = Bench::new(fails, 1, 0);
    let data = DEVICES + 0x1000;
    bench.drivers[0].add(&[
        readable(DRIVERS, 16),
        writable(data, 0x3000),
        writable(DEVICES, 1),
    ]);
    bench.run(device, &[1], |_| {})
}

fn block_id(fails: Option<Site>) -> Outcome {
    let requests = [(8, Some(writable(DEVICES + 0x10_0000, 20)))];
    block(fails, Engine::Sync, feature::EVENT_IDX, &requests)
}

fn block_writes(fails: Option<Site>) -> Outcome {
    let data = Some(readable(DRIVERS + 0x10_0000, 512));
    block(
        fails,
        Engine::Async,
        feature::EVENT_IDX,
        &[(1, data), (4, None), (99, None)],
    )
}

/// Nothing but the wish for no notifications.
fn idle(fails: Option<Site>) -> Outcome {
    block(fails, Engine::Sync, 0, &[])
}

fn rng(fails: Option<Site>) -> Outcome {
    let mut bench = Bench::new(fails, 1, feature::EVENT_IDX);
    bench.drivers[0].add(&[writable(DEVICES, 0x2800), writable(DEVICES + 0x5000, 100)]);
    bench.run(Rng::new(LimiterUpdate::default()).unwrap(), &[1], |_| {})
}

fn net() -> (Net, UnixStream) {
    let config = NetConfig {
        id: "eth0".to_owned(),
        mac: None,
        mtu: None,
        rx_limits: LimiterUpdate::default(),
        tx_limits: LimiterUpdate::default(),
    };
    let (tap, wire) = Tap::mock();
    (Net::new(config, tap).unwrap(), wire)
}

/// One frame goes to where it belongs at once.
fn net_frame(fails: Option<Site>) -> Outcome {
    let (net, mut wire) = net();
    let mut bench = Bench::new(fails, 2, feature::EVENT_IDX);
    bench.drivers[0].add(&[writable(DEVICES, 0x3000)]);
    bench.run(net, &[1, 0], |_| wire.write_all(&[5; 6000]).unwrap())
}

/// The second buffer of the frame is filled by way of the spill.
fn net_spill(fails: Option<Site>) -> Outcome {
    const MRG_RXBUF: u64 = 1 << 15;
    let (net, mut wire) = net();
    let mut bench = Bench::new(fails, 2, MRG_RXBUF | feature::EVENT_IDX);
    for number in 0..3 {
        bench.drivers[0].add(&[writable(DEVICES + 0x1000 * number, 0x1000)]);
    }
    bench.run(net, &[2, 0], |_| wire.write_all(&[5; 6000]).unwrap())
}

/// A frame of the metadata service: an answer to who asks for its address.
fn metadata(fails: Option<Site>) -> Outcome {
    let config = StackConfig {
        address: Ipv4Addr::new(169, 254, 169, 254),
        needs_token: false,
        imds_compat: false,
    };
    let stack = Stack::new(config, SharedMmds::default()).unwrap();
    let (net, _wire) = net();
    let mut bench = Bench::new(fails, 2, feature::EVENT_IDX);
    let mac = [6, 0, 0xac, 0x10, 0, 2];
    let asks = [
        &[0; 12][..],
        &[0xff; 6],
        &mac,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &mac,
        &[172, 16, 0, 2],
        &[0; 6],
        &[169, 254, 169, 254],
    ];
    let asks = asks.concat();
    bench.put(DRIVERS, &asks);
    bench.drivers[1].add(&[readable(DRIVERS, asks.len() as u32)]);
    bench.drivers[0].add(&[writable(DEVICES, 0x1000)]);
    bench.run(net.with_metadata(stack).unwrap(), &[1, 1], |_| {})
}

fn vsock_device(folder: &Path) -> Vsock {
    let config = VsockConfig {
        guest_cid: 3,
        uds_path: folder.join("v"),
    };
    Vsock::new(&config).unwrap()
}

/// A request to connect, which is a header only, and the event that comes before it.
fn vsock_request_and_event(fails: Option<Site>) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let mut device = vsock_device(folder.path());
    device.announce_transport_reset();
    let mut bench = Bench::new(fails, 3, feature::EVENT_IDX);
    bench.drivers[0].add(&[writable(DEVICES, 0x3000)]);
    bench.put(DEVICES + 0x8000, &[0xff; 4]);
    bench.drivers[2].add(&[writable(DEVICES + 0x8000, 4)]);
    let mut client = UnixStream::connect(folder.path().join("v")).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    bench.run(device, &[1, 0, 1], |_| {})
}

/// Bytes from a socket, behind the header of their packet.
fn vsock_data(fails: Option<Site>) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let device = vsock_device(folder.path());
    let host = std::os::unix::net::UnixListener::bind(folder.path().join("v_9")).unwrap();
    let mut bench = Bench::new(fails, 3, feature::EVENT_IDX);
    for number in 0..4 {
        bench.drivers[0].add(&[writable(DEVICES + 0x4000 * number, 0x4000)]);
    }
    // The guest asks for a connection: src, dst, ports, len, type, op, flags, buf_alloc, fwd_cnt.
    let mut request = Vec::new();
    request.extend([3_u64, 2].into_iter().flat_map(u64::to_le_bytes));
    request.extend(
        [1000_u32, 9, 0, 1 | 1 << 16, 0, 1 << 20, 0]
            .into_iter()
            .flat_map(u32::to_le_bytes),
    );
    bench.put(DRIVERS, &request);
    bench.drivers[1].add(&[readable(DRIVERS, request.len() as u32)]);
    bench.run(device, &[2, 1, 0], |_| {
        let (mut stream, _) = host.accept().unwrap();
        stream.write_all(&[5; 9000]).unwrap();
        // It stays open.
        std::mem::forget(stream);
    })
}

fn balloon(fails: Option<Site>, queue: usize, pieces: &[Piece]) -> Outcome {
    let config = BalloonConfig {
        amount_mib: 1,
        deflate_on_oom: true,
        statistics_interval_s: 3600,
        free_page_hinting: true,
        free_page_reporting: true,
    };
    let device = Balloon::new(config).unwrap();
    let control = device.control();
    let mut bench = Bench::new(fails, 5, device.features() | feature::EVENT_IDX);
    bench.put(DEVICES, &[7; 0x2000]);
    bench.put(DRIVERS, &((DEVICES >> 12) as u32).to_le_bytes());
    bench.put(DRIVERS + 4, &2_u32.to_le_bytes());
    let mut used = [0; 5];
    if queue == 3 {
        bench.drivers[queue].add(&[readable(DRIVERS + 4, 4)]);
        used[queue] += 1;
    }
    bench.drivers[queue].add(pieces);
    // A buffer with statistics is held.
    used[queue] += u16::from(queue != 2);
    let commands = Arc::new(device.control());
    // The command has to be there when the driver confirms it; a device that was never started
    // knows no driver, so it is started once for nothing.
    let mut device = device;
    if queue == 3 {
        let spare = Driver::new(crate::testing::memory(), 16);
        let mut context = spare.context(0, &Arc::default());
        context.queues = (0..5).map(|_| None).collect();
        device.start(context).unwrap();
        commands.start_hinting(false).unwrap();
        device.stop();
    }
    bench.run(device, &used, |_| {
        let counts = || control.counts().statistics;
        eventually("statistics are taken", || queue != 2 || counts() == 1);
    })
}

fn balloon_inflates(fails: Option<Site>) -> Outcome {
    balloon(fails, 0, &[readable(DRIVERS, 4)])
}

fn balloon_deflates(fails: Option<Site>) -> Outcome {
    balloon(fails, 1, &[readable(DRIVERS, 4)])
}

fn balloon_statistics(fails: Option<Site>) -> Outcome {
    balloon(fails, 2, &[readable(DRIVERS, 4)])
}

fn balloon_hints(fails: Option<Site>) -> Outcome {
    balloon(fails, 3, &[writable(DEVICES, 0x1000)])
}

fn balloon_reports(fails: Option<Site>) -> Outcome {
    balloon(fails, 4, &[writable(DEVICES, 0x2000)])
}

use Site::{AvailEvent, Copy, GivenBack, HostIo, Status, UsedElement, UsedFlags, UsedIndex};

/// A piece of work, and whose lack of marks it has to show. Of two that mark the same page the one
/// may fail without harm.
type Work = (fn(Option<Site>) -> Outcome, &'static str, &'static [Site]);

fn works() -> Vec<Work> {
    vec![
        (
            block_reads,
            "block reads",
            &[HostIo, Status, UsedElement, UsedIndex, AvailEvent],
        ),
        (
            block_reads_by_io_uring,
            "block reads by io_uring",
            &[HostIo, Status, UsedElement, UsedIndex, AvailEvent],
        ),
        (
            block_reads_past_the_end_of_the_image,
            "block reads past the end",
            &[HostIo, Status],
        ),
        (
            block_id,
            "block id",
            &[Copy, Status, UsedElement, UsedIndex],
        ),
        (
            block_writes,
            "block writes",
            &[Status, UsedElement, UsedIndex],
        ),
        (idle, "idle", &[UsedFlags]),
        (rng, "rng", &[Copy, UsedElement, UsedIndex, AvailEvent]),
        (net_frame, "net frame", &[HostIo, UsedElement, UsedIndex]),
        (net_spill, "net spill", &[Copy, UsedElement, UsedIndex]),
        (metadata, "metadata", &[Copy, UsedElement, UsedIndex]),
        (
            vsock_request_and_event,
            "vsock request and event",
            &[Copy, UsedElement, UsedIndex],
        ),
        (
            vsock_data,
            "vsock data",
            &[HostIo, Copy, UsedElement, UsedIndex],
        ),
        (
            balloon_inflates,
            "balloon inflates",
            &[GivenBack, UsedElement, UsedIndex, AvailEvent],
        ),
        (
            balloon_deflates,
            "balloon deflates",
            &[UsedElement, UsedIndex, AvailEvent],
        ),
        (balloon_statistics, "balloon statistics", &[AvailEvent]),
        (
            balloon_hints,
            "balloon hints",
            &[GivenBack, UsedElement, UsedIndex, AvailEvent],
        ),
        (
            balloon_reports,
            "balloon reports",
            &[GivenBack, UsedElement, UsedIndex, AvailEvent],
        ),
    ]
}

#[test]
fn whatever_a_device_writes_is_marked() {
    let mut all = BTreeSet::new();
    for (work, name, expected) in works() {
        let (seen, missing) = work(None);
        assert!(!missing, "{name}: pages have changed that are not marked");
        assert!(
            expected.iter().all(|site| seen.contains(site)),
            "{name}: {seen:?}"
        );
        all.extend(seen);
    }
    assert_eq!(all, SITES.into_iter().collect(), "each place is gone to");
}

#[test]
fn a_place_that_does_not_mark_is_found() {
    let mut found = BTreeSet::new();
    for (work, name, expected) in works() {
        for &site in expected {
            let (_, missing) = work(Some(site));
            assert!(missing, "{name}: nobody misses the marks of {site:?}");
            found.insert(site);
        }
    }
    assert_eq!(found, SITES.into_iter().collect(), "each place is found");
}

/// The ways to guest memory, as they are written, and how often each file goes them. Another one
/// needs a [`Site`] with its marks, and a piece of work above.
const WAYS: &[(&str, &str, usize)] = &[
    ("balloon/host.rs", "mark_dirty(", 1),
    ("balloon/host.rs", "ptr_guard_mut(", 1),
    ("block/host.rs", "as_iovecs(", 3),
    ("block/host.rs", "mark_written(", 2),
    ("block/server.rs", "write_obj(", 1),
    ("block/uring.rs", "as_iovecs(", 1),
    ("block/uring.rs", "mark_written(", 1),
    ("memory.rs", "as_iovecs(", 1),
    ("memory.rs", "mark_dirty(", 1),
    ("memory.rs", "mark_written(", 1),
    ("memory.rs", "ptr_guard_mut(", 1),
    ("net/rx.rs", "mark_written(", 2),
    ("net/tap.rs", "as_iovecs(", 2),
    ("queue.rs", "memory.store(", 4),
    ("queue.rs", "write_obj(", 1),
    ("queue/chain.rs", "write_slice(", 1),
    ("vsock/rx.rs", "mark_written(", 2),
    ("vsock/socket.rs", "as_iovecs(", 2),
];

/// The source files of this crate, without tests.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if ["tests", "testing", "marking"].contains(&name) {
            continue;
        }
        if path.is_dir() {
            sources(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn there_is_no_other_way_to_guest_memory() {
    const NEEDLES: [&str; 11] = [
        "write_obj(",
        "write_slice(",
        "write_all_volatile(",
        "read_volatile_from(",
        "read_exact_volatile_from(",
        "memory.store(",
        "mark_written(",
        "mark_dirty(",
        "ptr_guard_mut(",
        "get_host_address(",
        "as_iovecs(",
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut found = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let code: String = code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect();
        let code: String = code.split_whitespace().collect();
        let name = file
            .strip_prefix(&root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        for needle in NEEDLES {
            let count = code.matches(needle).count();
            if count > 0 {
                found.push((name.clone(), needle, count));
            }
        }
    }
    found.sort_unstable();
    let expected: Vec<_> = WAYS
        .iter()
        .map(|&(file, way, count)| (file.to_owned(), way, count))
        .collect();
    assert_eq!(found, expected);
}
