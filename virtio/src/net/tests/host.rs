// SPDX-License-Identifier: Apache-2.0
//! Real TAPs and bridges, each test in a network namespace of its own that goes away with its
//! thread. Where making one is not allowed, these tests fail and say so.
//!
//! This is a module with unsafe code: the system calls that tests need and the library does not.

#![allow(unsafe_code)]

use std::ffi::{CString, c_int, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::{ends, eventually, frame, read, signals};
use crate::net::announce::Announcer;
use crate::net::features::{BASIC_OFFLOADS, UDP_OFFLOADS, tap_offloads};
use crate::net::interface::Control;
use crate::net::rx::Rx;
use crate::net::tx::Tx;
use crate::net::{BridgeError, NetCounters, Tap, TapError, join_bridge};
use crate::testing::{BUFFERS, Driver, memory, readable, writable};

/// Runs `test` on a thread with a network namespace of its own.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: takes no pointer; it changes this thread alone.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        let error = io::Error::last_os_error();
        assert_eq!(
            result, 0,
            "network tests need root, to make a network namespace: {error}"
        );
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ioctl(fd: &impl AsRawFd, what: c_ulong, argument: c_ulong) {
    // SAFETY: each caller's `what` takes a number.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), what, argument) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

fn socket(domain: c_int, kind: c_int, protocol: c_int) -> OwnedFd {
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor was made just now, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn create_bridge(name: &str) {
    const SIOCBRADDBR: c_ulong = 0x89a0;
    let name = CString::new(name).unwrap();
    let socket = socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0);
    // SAFETY: SIOCBRADDBR takes a string.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDBR, name.as_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// A TAP that stays when it is closed, as a person makes one.
fn create_persistent(name: &str) {
    let tap = Tap::create(name).unwrap();
    ioctl(&tap, libc::TUNSETPERSIST, 1);
}

fn exists(name: &str) -> bool {
    Control::new().unwrap().index(name).is_ok()
}

/// Takes this thread's rights away.
fn become_nobody() {
    const NOBODY: c_int = 65534;
    // The libc function would change all threads.
    // SAFETY: takes no pointer.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    assert_eq!(result, 0);
}

/// A socket that is on the same wire as the TAP, at the host's end.
fn packet_socket(tap: &Tap) -> OwnedFd {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let socket = socket(
        libc::AF_PACKET,
        libc::SOCK_RAW | libc::SOCK_NONBLOCK,
        protocol.into(),
    );
    // SAFETY: zero is a value of each of its fields.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = Control::new().unwrap().index(tap.name()).unwrap();
    let len = size_of_val(&address) as u32;
    // SAFETY: the address is of the family's type, and `len` its length.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    socket
}

#[test]
fn a_tap_that_is_missing_is_not_created() {
    in_namespace(|| {
        let error = Tap::open("tap7").unwrap_err();
        assert!(matches!(error, TapError::Missing { .. }), "{error}");
        assert!(!exists("tap7"));
    });
}

#[test]
fn an_existing_tap_is_opened_taken_up_and_left_in_place() {
    in_namespace(|| {
        create_persistent("tap7");
        let tap = Tap::open("tap7").unwrap();
        assert_eq!(tap.name(), "tap7");
        assert_eq!(tap.offloads() & BASIC_OFFLOADS, BASIC_OFFLOADS);
        drop(tap);
        assert!(exists("tap7"));
        Tap::open("tap7").unwrap();
    });
}

#[test]
fn names_of_taps_are_checked() {
    for name in ["", "a/b", "tap%d", "sixteen-bytes-ab"] {
        assert!(
            matches!(Tap::open(name), Err(TapError::Name(_))),
            "{name:?}"
        );
    }
    for name in ["", "a/b", "%d%d", "%s", "sixteen-bytes-ab"] {
        assert!(
            matches!(Tap::create(name), Err(TapError::Name(_))),
            "{name:?}"
        );
    }
}

#[test]
fn a_tap_in_use_is_refused() {
    in_namespace(|| {
        let first = Tap::create("tap7").unwrap();
        let error = Tap::open("tap7").unwrap_err();
        assert!(matches!(error, TapError::InUse { .. }), "{error}");
        let error = Tap::create("tap7").unwrap_err();
        assert!(matches!(error, TapError::Exists { .. }), "{error}");
        drop(first);
    });
}

#[test]
fn what_is_not_a_tap_is_refused() {
    in_namespace(|| {
        let error = Tap::open("lo").unwrap_err();
        assert!(matches!(error, TapError::NotATap { .. }), "{error}");
    });
}

#[test]
fn without_rights_it_is_said_what_they_would_be() {
    in_namespace(|| {
        create_persistent("tap7");
        let tap = Tap::create("tap8").unwrap();
        create_bridge("br7");
        let device = std::fs::metadata("/dev/net/tun").unwrap();
        let all = std::os::unix::fs::PermissionsExt::mode(&device.permissions()) & 0o6 == 0o6;
        become_nobody();
        let error = Tap::create("tap9").unwrap_err();
        if all {
            assert!(matches!(error, TapError::Permission { .. }), "{error}");
        } else {
            assert!(matches!(error, TapError::TunPermission(_)), "{error}");
        }
        let error = join_bridge("br7", &tap).unwrap_err();
        assert!(matches!(error, BridgeError::Permission { .. }), "{error}");
        assert!(matches!(tap.set_mtu(1400), Err(TapError::Refused { .. })));
    });
}

#[test]
fn the_kernel_chooses_a_free_name_and_forgets_it_with_the_tap() {
    in_namespace(|| {
        let taps: Vec<_> = (0..3).map(|_| Tap::create("brume%d").unwrap()).collect();
        let names: Vec<_> = taps.iter().map(|tap| tap.name().to_owned()).collect();
        assert_eq!(names, ["brume0", "brume1", "brume2"]);
        drop(taps);
        eventually("the TAPs are gone", || {
            !names.iter().any(|name| exists(name))
        });
    });
}

#[test]
fn the_mtu_is_what_was_set() {
    in_namespace(|| {
        let tap = Tap::create("tap7").unwrap();
        assert_eq!(tap.mtu().unwrap(), 1500);
        tap.set_mtu(9000).unwrap();
        assert_eq!(tap.mtu().unwrap(), 9000);
        assert!(matches!(tap.set_mtu(10), Err(TapError::Refused { .. })));
    });
}

#[test]
fn a_tap_joins_a_bridge_once() {
    in_namespace(|| {
        let tap = Tap::create("tap7").unwrap();
        create_bridge("br7");
        create_bridge("br8");
        join_bridge("br7", &tap).unwrap();
        let error = join_bridge("br8", &tap).unwrap_err();
        assert!(matches!(error, BridgeError::Joined { .. }), "{error}");
    });
}

#[test]
fn what_is_not_a_bridge_is_refused() {
    in_namespace(|| {
        let tap = Tap::create("tap7").unwrap();
        let error = join_bridge("br7", &tap).unwrap_err();
        assert!(matches!(error, BridgeError::Missing { .. }), "{error}");
        for name in ["lo", "tap7"] {
            let error = join_bridge(name, &tap).unwrap_err();
            assert!(
                matches!(error, BridgeError::NotABridge { .. }),
                "{name}: {error}"
            );
        }
        let error = join_bridge("br/7", &tap).unwrap_err();
        assert!(matches!(error, BridgeError::Name(_)), "{error}");
    });
}

#[test]
fn every_set_of_offloads_is_taken() {
    in_namespace(|| {
        let tap = Tap::create("tap7").unwrap();
        for bits in 0..256u64 {
            // The guest's bits of the features, spread to where they are.
            let features = (bits & 1) << 1 | (bits >> 1 & 7) << 7 | (bits >> 4 & 3) << 54;
            let mut offloads = tap_offloads(features);
            if tap.offloads() & UDP_OFFLOADS == 0 {
                offloads &= !UDP_OFFLOADS;
            }
            tap.set_offloads(offloads).unwrap();
        }
    });
}

#[test]
fn frames_pass_between_the_guest_and_the_host() {
    in_namespace(|| {
        let tap = Arc::new(Tap::create("tap7").unwrap());
        let host = packet_socket(&tap);
        let counters: Arc<NetCounters> = Arc::default();
        let (signals, _) = signals();
        let mut driver = Driver::new(memory(), 16);
        // No protocol that the host itself would answer.
        let mut whole = frame(200, 1);
        whole[12..26].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);

        let queue = driver.queue(0);
        let mut rx = Rx::new(queue, &driver.memory, true, ends(&tap, &counters));
        driver.add(&[writable(BUFFERS, 2048)]);
        let bytes = &whole[12..];
        // SAFETY: the pointer and the length are those of a slice.
        let sent = unsafe { libc::send(host.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(sent, 188);
        eventually("our frame arrives at the guest", || {
            rx.process(&signals, None).unwrap();
            let Some(used) = driver.take_used() else {
                return false;
            };
            // The host may have something of its own to say.
            let ours = read(&driver.memory, BUFFERS + 12, used.len as usize - 12) == whole[12..];
            driver.add(&[writable(BUFFERS, 2048)]);
            ours
        });

        let mut driver = Driver::new(memory(), 16);
        let queue = driver.queue(0);
        let announcer = Arc::new(Announcer::new(None).unwrap());
        let mut tx = Tx::new(queue, &driver.memory, ends(&tap, &counters), announcer);
        driver
            .memory
            .write_slice(&whole, GuestAddress(BUFFERS))
            .unwrap();
        driver.add(&[readable(BUFFERS, 200)]);
        tx.process(&signals, None).unwrap();
        let mut data = [0u8; 2048];
        eventually("our frame arrives at the host", || {
            let room = data.len();
            // SAFETY: the pointer and the length are those of a slice.
            let len = unsafe { libc::recv(host.as_raw_fd(), data.as_mut_ptr().cast(), room, 0) };
            len == 188 && data[..188] == whole[12..]
        });

        // Headers that make no sense: segments of no size, checksums past the end, unknown kinds.
        let headers: [[u8; 10]; 4] = [
            [1, 1, 54, 0, 0, 0, 34, 0, 16, 0],
            [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            [0, 0x77, 0, 0, 100, 0, 0, 0, 0, 0],
            [0, 1, 0xff, 0xff, 1, 0, 0, 0, 0, 0],
        ];
        for header in headers {
            let refused = counters.get().tx_errors;
            driver
                .memory
                .write_slice(&header, GuestAddress(BUFFERS))
                .unwrap();
            driver.add(&[readable(BUFFERS, 200)]);
            tx.process(&signals, None).unwrap();
            assert_eq!(counters.get().tx_errors, refused + 1, "{header:x?}");
        }
    });
}

#[test]
fn an_interface_that_was_removed_is_no_work() {
    in_namespace(|| {
        create_persistent("tap7");
        let tap = Arc::new(Tap::open("tap7").unwrap());
        let status = std::process::Command::new("ip")
            .args(["link", "del", "tap7"])
            .status()
            .expect("the program \"ip\"");
        assert!(status.success());
        let (signals, _) = signals();
        let mut driver = Driver::new(memory(), 16);
        let counters: Arc<NetCounters> = Arc::default();
        let queue = driver.queue(0);
        let mut rx = Rx::new(queue, &driver.memory, true, ends(&tap, &counters));
        driver.add(&[writable(BUFFERS, 2048)]);
        assert!(!rx.process(&signals, None).unwrap());
        assert_eq!(counters.get().rx_errors, 1);
    });
}
