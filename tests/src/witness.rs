// SPDX-License-Identifier: Apache-2.0
//! Linux at work while its machine is saved, restored or moved: the guest's step `witness`, which
//! see in `resources/guest/README.md`.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::api::ApiVm;
use crate::artefacts;
use crate::netns::NetNs;
use crate::vm::{LINUX, SOON, Vm, output_of};

/// The guest's address. It reaches 169.254.170.2 as well, where the metadata service is.
pub const ADDRESS: &str = "169.254.1.2";
/// An address for the host, on the same network.
pub const HOST: &str = "169.254.1.1/16";
const PORT: u16 = 7070;
/// How often a clock is read at most, to know it better than an answer takes.
const READINGS: usize = 40;
/// How well it has to be known, in milliseconds.
const KNOWN: f64 = 20.0;

/// What the guest says of itself.
#[derive(Debug)]
pub struct Status {
    /// The words of its answer.
    pub words: HashMap<String, String>,
    /// By how much its clock is behind the host's.
    pub behind: Duration,
}

impl Status {
    /// Reads an answer that has just come.
    ///
    /// # Panics
    ///
    /// It is none.
    pub fn parse(text: &str) -> Self {
        let words = text.split_whitespace().filter_map(|w| w.split_once('='));
        let words: HashMap<_, _> = words.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let mut status = Self {
            words,
            behind: Duration::ZERO,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let guest = Duration::from_millis(status.number("real_ms"));
        status.behind = now.saturating_sub(guest);
        status
    }

    /// The word `key`, which is a number.
    ///
    /// # Panics
    ///
    /// It is not there, or is none.
    #[track_caller]
    pub fn number(&self, key: &str) -> u64 {
        let word = self.words.get(key).unwrap_or_else(|| panic!("{self:?}"));
        word.parse().unwrap()
    }

    /// Checks that the machine has gone on from `before`, with its memory as it should be.
    ///
    /// # Panics
    ///
    /// It has not.
    #[track_caller]
    pub fn assert_after(&self, before: &Self) {
        for key in ["turns", "writes", "up_ms"] {
            let (now, then) = (self.number(key), before.number(key));
            assert!(now > then, "{key}: {before:?} {self:?}");
        }
        for key in ["records", "busy"] {
            assert!(self.number(key) >= before.number(key), "{key}");
        }
        assert_eq!(self.number("bad"), 0, "{self:?}");
        // It was not started anew, nor has it lost more time than a busy host takes.
        let up = self.number("up_ms") - before.number("up_ms");
        assert!(up < 300_000, "{before:?} {self:?}");
    }
}

/// How far the guest's clock is from the test's, as bounds in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Offset {
    low: f64,
    high: f64,
}

impl Offset {
    /// How much `self` is at least away from `other`, in milliseconds.
    pub fn distance(self, other: Self) -> f64 {
        (self.low - other.high).max(other.low - self.high).max(0.0)
    }

    /// How well it is known, in milliseconds.
    pub fn uncertainty(self) -> f64 {
        self.high - self.low
    }
}

/// Whoever asks the guest over the network.
pub struct Asker {
    socket: UdpSocket,
    /// Questions asked.
    asked: Cell<u64>,
    began: Instant,
}

impl Asker {
    /// One in `network`, which has [`HOST`].
    ///
    /// # Panics
    ///
    /// It cannot be entered.
    pub fn new(network: &NetNs) -> Self {
        let socket = network.within(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        Self {
            socket,
            asked: Cell::new(0),
            began: Instant::now(),
        }
    }

    /// What the guest answers to `request`.
    ///
    /// # Panics
    ///
    /// Nothing; `vm` is where its console is.
    #[track_caller]
    pub fn ask(&self, vm: &Vm, request: &str) -> String {
        let number = self.asked.get() + 1;
        self.asked.set(number);
        // An answer begins with the request; what is late of another is none.
        let request = format!("{request}{number}");
        let mut bytes = [0; 1024];
        let start = Instant::now();
        while start.elapsed() < SOON {
            // A host without a neighbour says so.
            let _ = self.socket.send_to(request.as_bytes(), (ADDRESS, PORT));
            while let Ok(count) = self.socket.recv(&mut bytes) {
                let answer = String::from_utf8_lossy(bytes.get(..count).unwrap_or_default());
                match answer.split_once(' ') {
                    Some((asked, answer)) if asked == request => return answer.to_owned(),
                    _ => {}
                }
            }
        }
        panic!("no answer; the console:\n{}", vm.stdout());
    }

    /// How the guest is.
    ///
    /// # Panics
    ///
    /// As [`Asker::ask`].
    #[track_caller]
    pub fn status(&self, vm: &Vm) -> Status {
        Status::parse(&self.ask(vm, "?"))
    }

    /// How far the guest's monotonic clock is from ours. Each answer says that it was read between
    /// question and answer, so that several together say it better than one.
    ///
    /// # Panics
    ///
    /// As [`Asker::ask`].
    #[track_caller]
    #[allow(clippy::cast_precision_loss, reason = "milliseconds")]
    pub fn uptime(&self, vm: &Vm) -> Offset {
        let ms = || self.began.elapsed().as_secs_f64() * 1e3;
        let mut known = Offset {
            low: f64::MIN,
            high: f64::MAX,
        };
        for _ in 0..READINGS {
            let asked = ms();
            let up = self.status(vm).number("up_ms") as f64;
            let answered = ms();
            known.low = known.low.max(up - answered);
            // It leaves out what is less than a millisecond.
            known.high = known.high.min(up + 1.0 - asked);
            if known.uncertainty() <= KNOWN {
                break;
            }
        }
        known
    }
}

/// Boots Linux with two vCPUs and one of every device, and waits for its witness. What is in
/// `parts` is asked for besides, before it starts.
///
/// # Panics
///
/// A request is refused, or it is not ready in time.
#[track_caller]
pub fn boot(api: &ApiVm, disk: &Path, vsock: &Path, parts: &[(&str, Value)]) {
    let boot_args = format!(
        "{} quiet clocksource=kvm-clock brume.ip={ADDRESS}/16 brume.do=net,witness,poweroff",
        artefacts::linux_args()
    );
    let boot = json!({
        "kernel_image_path": artefacts::vmlinux(), "initrd_path": artefacts::initramfs(),
        "boot_args": boot_args,
    });
    let drive = json!({"drive_id": "d", "is_root_device": false, "path_on_host": disk});
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1});
    let mmds = json!({
        "version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.170.2",
    });
    api.done("PUT", "/boot-source", &boot);
    for (path, body) in parts {
        api.done("PUT", path, body);
    }
    for (path, body) in [
        ("/drives/d", drive),
        ("/vsock", json!({"guest_cid": 7, "uds_path": vsock})),
        ("/balloon", balloon),
        ("/entropy", json!({})),
        ("/mmds/config", mmds),
        ("/mmds", json!({"value": "v"})),
        ("/actions", json!({"action_type": "InstanceStart"})),
    ] {
        api.done("PUT", path, &body);
    }
    api.vm.wait_for("brume-guest: witness note ready", LINUX);
}

/// A stream to the guest's socket, by the host's socket `vsock`.
///
/// # Panics
///
/// There is none to be had; `vm` is where the guest's console is.
#[track_caller]
pub fn stream(vsock: &Path, vm: &Vm) -> BufReader<UnixStream> {
    let start = Instant::now();
    while start.elapsed() < SOON {
        let mut stream = UnixStream::connect(vsock).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"CONNECT 7070\n").unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        if line.starts_with("OK ") {
            return stream;
        }
        // A guest that is busy, with its balloon for one, may take longer than a host waits.
    }
    panic!("no stream; the console:\n{}", vm.stdout());
}

/// Asks over a stream.
///
/// # Panics
///
/// There is no answer.
#[track_caller]
pub fn status_over(stream: &mut BufReader<UnixStream>) -> Status {
    stream.get_mut().write_all(b"?").unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    Status::parse(&line)
}

/// Checks that the journal on the disk holds so many records, each once and in its order.
///
/// # Panics
///
/// It does not.
pub fn assert_journal(disk: &Path, records: u64) {
    let program = if Path::new("/sbin/debugfs").exists() {
        "/sbin/debugfs"
    } else {
        "debugfs"
    };
    let text = output_of(program, &["-R", "cat /journal", disk.to_str().unwrap()]);
    let mut turns = 0;
    let mut count = 0;
    for line in text.lines() {
        let (record, turn) = line.split_once(' ').unwrap();
        assert_eq!(record.parse(), Ok(count), "{line}");
        let turn: u64 = turn.parse().unwrap();
        assert!(turn > turns, "{line} after turn {turns}");
        turns = turn;
        count += 1;
    }
    assert_eq!(count, records);
}
