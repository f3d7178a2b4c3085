// SPDX-License-Identifier: Apache-2.0
//! Moving the bare guest from one process of a monitor to another, each monitor in its own way.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, MigrationStatus};
use serde_json::{Value, json};

use crate::guest::{Guest, Size};
use crate::program::{CLOUD_HYPERVISOR, Programs, QEMU, Running};
use crate::qemu::Qemu;
use crate::session::{Session, unless_refused};

/// A move that takes longer is called off.
const LIMIT: Duration = Duration::from_secs(30);
const LIMIT_S: u64 = LIMIT.as_secs();
/// How long the guest may stand still, by what the monitor reckons.
const DOWNTIME_MS: u64 = 20;
/// How often a monitor is asked how far it is.
const POLL: Duration = Duration::from_millis(1);
/// Until a monitor listens that does not say so.
const LISTENS: Duration = Duration::from_millis(300);

/// What carries the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// A unix socket.
    Unix,
    /// TCP on one host.
    Tcp,
    /// A unix socket, and memory is handed over as it is if the monitor can do that.
    OneHost,
}

/// How a machine moves.
#[derive(Clone, Copy)]
pub(crate) struct Way {
    /// What carries it.
    pub(crate) link: Link,
    /// Whether it goes before its memory.
    pub(crate) post_copy: bool,
}

/// How a move went. What the monitor does not tell is not a number.
pub(crate) struct Moved {
    /// From the request until all of the machine was there.
    pub(crate) took: Duration,
    /// How long the guest stood still, as the monitor says, in milliseconds.
    pub(crate) downtime_ms: f64,
    /// Bytes per second of the first pass, on the wire.
    pub(crate) first_pass: f64,
}

/// The source, where a guest runs, and the target.
enum Sides {
    Brume(Session, Session),
    CloudHypervisor(Session, Session),
    Qemu(Qemu, Qemu),
}

/// A guest that runs, and a process that waits for it.
pub(crate) struct Mover {
    sides: Sides,
    way: Way,
    address: String,
}

impl Mover {
    /// Starts both. `args` are for the guest.
    ///
    /// # Errors
    ///
    /// One does not start. If the monitor cannot move a machine in this way, the kind is
    /// [`io::ErrorKind::InvalidInput`].
    pub(crate) fn start(
        programs: &Programs,
        monitor: &str,
        size: Size,
        args: &str,
        way: Way,
    ) -> io::Result<Self> {
        let address = address(programs, way.link)?;
        let words = format!("bare.do=live bare.touch={} {args}", size.touched());
        let sides = match monitor {
            QEMU if way.link == Link::OneHost => {
                let text = "QEMU copies the memory";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            QEMU => Sides::Qemu(
                Qemu::start(programs, "source", size.mib, &words, false)?,
                Qemu::start(programs, "target", size.mib, &words, true)?,
            ),
            CLOUD_HYPERVISOR => Sides::CloudHypervisor(
                cloud_hypervisor(programs, size, &words, way.link)?,
                Session::start(programs, monitor, "target")?,
            ),
            _ => Sides::Brume(
                Guest::boot(programs, monitor, size, false, &words)?.session,
                Session::start(programs, monitor, "target")?,
            ),
        };
        let mut mover = Self {
            sides,
            way,
            address,
        };
        mover.source().line("bare: live ready")?;
        mover.listen()?;
        Ok(mover)
    }

    /// Where the guest is before.
    pub(crate) fn source(&mut self) -> &mut Running {
        match &mut self.sides {
            Sides::Brume(source, _) | Sides::CloudHypervisor(source, _) => &mut source.monitor,
            Sides::Qemu(source, _) => &mut source.monitor,
        }
    }

    /// Where the guest is after.
    pub(crate) fn target(&mut self) -> &mut Running {
        match &mut self.sides {
            Sides::Brume(_, target) | Sides::CloudHypervisor(_, target) => &mut target.monitor,
            Sides::Qemu(_, target) => &mut target.monitor,
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        let post_copy = self.way.post_copy;
        match &mut self.sides {
            Sides::Brume(_, target) => {
                let body = json!({"listen": self.address}).to_string();
                target.send(("PUT", "/migration/receive", body))?;
                while status(target)?.phase != MigrationPhase::Listening {
                    thread::sleep(POLL);
                }
            }
            Sides::CloudHypervisor(_, target) => {
                let mode = if post_copy { "Postcopy" } else { "Precopy" };
                let body = json!({"receiver_url": self.address, "memory_mode": mode}).to_string();
                // It answers when the machine is there.
                target.begin(("PUT", "/api/v1/vm.receive-migration", body))?;
                thread::sleep(LISTENS);
            }
            Sides::Qemu(source, target) => {
                for side in [source, &mut *target] {
                    set_up(side, post_copy)?;
                }
                target.ask("migrate-incoming", &json!({"uri": self.address}))?;
            }
        }
        Ok(())
    }

    /// Moves the guest; nothing if it was not there in time.
    ///
    /// # Errors
    ///
    /// It is refused, or a monitor ends.
    pub(crate) fn go(&mut self) -> io::Result<Option<Moved>> {
        let (address, way) = (&self.address, self.way);
        match &mut self.sides {
            Sides::Brume(source, target) => by_brume(source, target, address, way),
            Sides::CloudHypervisor(source, target) => {
                by_cloud_hypervisor(source, target, address, way)
            }
            Sides::Qemu(source, target) => by_qemu(source, target, address, way),
        }
    }
}

fn address(programs: &Programs, link: Link) -> io::Result<String> {
    if link == Link::Tcp {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        return Ok(format!("tcp:{}", listener.local_addr()?));
    }
    let path = programs.folder().join("migration");
    // Cloud Hypervisor leaves its socket behind.
    let _ = fs::remove_file(&path);
    Ok(format!("unix:{}", path.display()))
}

fn by_brume(
    source: &mut Session,
    target: &mut Session,
    address: &str,
    way: Way,
) -> io::Result<Option<Moved>> {
    let mode = if way.post_copy { "PostCopy" } else { "PreCopy" };
    let body = json!({
        "destination": address, "max_downtime_ms": DOWNTIME_MS, "timeout_s": LIMIT_S,
        "mode": mode, "compression": "None",
    });
    let begun = Instant::now();
    source.send(("PUT", "/migration/send", body.to_string()))?;
    let sent = over(source)?;
    let came = over(target)?;
    let took = begun.elapsed();
    if [&sent, &came].map(|status| status.phase) != [MigrationPhase::Completed; 2] {
        return Ok(None);
    }
    let downtime = sent.downtime.or(came.downtime);
    let first_pass = sent.passes.first();
    Ok(Some(Moved {
        took,
        downtime_ms: downtime.map_or(f64::NAN, |downtime| downtime.total_us as f64 / 1e3),
        first_pass: first_pass.map_or(f64::NAN, |pass| {
            pass.bytes as f64 * 1e6 / pass.duration_us.max(1) as f64
        }),
    }))
}

/// Waits until brume says that it is over; how.
fn over(side: &mut Session) -> io::Result<MigrationStatus> {
    loop {
        let status = status(side)?;
        if status.phase.is_over() {
            return Ok(status);
        }
        thread::sleep(POLL);
    }
}

fn status(side: &mut Session) -> io::Result<MigrationStatus> {
    let body = side.send(("GET", "/migration", String::new()))?;
    Ok(serde_json::from_str(&body)?)
}

/// Starts a machine of Cloud Hypervisor's. This host's KVM has no nested guests.
fn cloud_hypervisor(
    programs: &Programs,
    size: Size,
    args: &str,
    link: Link,
) -> io::Result<Session> {
    let mut session = Session::start(programs, CLOUD_HYPERVISOR, "source")?;
    let machine = json!({
        "payload": {"kernel": programs.guest(), "cmdline": programs.guest_args(args)},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "nested": false},
        "memory": {"size": size.mib << 20, "shared": link == Link::OneHost},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    });
    session.send(("PUT", "/api/v1/vm.create", machine.to_string()))?;
    session.send(("PUT", "/api/v1/vm.boot", String::new()))?;
    Ok(session)
}

fn by_cloud_hypervisor(
    source: &mut Session,
    target: &mut Session,
    address: &str,
    way: Way,
) -> io::Result<Option<Moved>> {
    let mode = if way.post_copy { "Postcopy" } else { "Precopy" };
    let body = json!({
        "destination_url": address, "downtime_ms": DOWNTIME_MS, "timeout_s": LIMIT_S,
        "memory_mode": mode, "local": way.link == Link::OneHost,
    });
    let begun = Instant::now();
    source.send(("PUT", "/api/v1/vm.send-migration", body.to_string()))?;
    if unless_refused(target.answer("receive-migration"))?.is_none() {
        return Ok(None);
    }
    // The answer comes before the memory, and the source ends when all of that has gone.
    while way.post_copy && !source.monitor.has_ended()? {
        if begun.elapsed() > LIMIT {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
    Ok(Some(Moved {
        took: begun.elapsed(),
        downtime_ms: f64::NAN,
        first_pass: f64::NAN,
    }))
}

/// Says how one side is to move.
fn set_up(side: &mut Qemu, post_copy: bool) -> io::Result<()> {
    let post_copy = json!({"capability": "postcopy-ram", "state": post_copy});
    let capabilities = json!({ "capabilities": [post_copy] });
    side.ask("migrate-set-capabilities", &capabilities)?;
    // Without a limit it takes what there is.
    let parameters = json!({"downtime-limit": DOWNTIME_MS, "max-bandwidth": 0});
    side.ask("migrate-set-parameters", &parameters).map(drop)
}

fn by_qemu(
    source: &mut Qemu,
    target: &mut Qemu,
    address: &str,
    way: Way,
) -> io::Result<Option<Moved>> {
    let begun = Instant::now();
    source.ask("migrate", &json!({"uri": address}))?;
    if way.post_copy {
        source.ask("migrate-start-postcopy", &json!({}))?;
    }
    let done = loop {
        let status = source.ask("query-migrate", &json!({}))?;
        match status.get("status").and_then(Value::as_str) {
            Some("completed") => break status,
            Some("failed" | "cancelled") => return Ok(None),
            _ if begun.elapsed() > LIMIT => {
                source.ask("migrate_cancel", &json!({}))?;
                return Ok(None);
            }
            _ => thread::sleep(POLL),
        }
    };
    while target.ask("query-status", &json!({}))?.get("running") != Some(&true.into()) {
        thread::sleep(POLL);
    }
    let took = begun.elapsed();
    let downtime = done.get("downtime").and_then(Value::as_f64);
    // Of a post-copy it may tell nonsense.
    let downtime = downtime.filter(|&ms| ms <= took.as_secs_f64() * 1e3);
    Ok(Some(Moved {
        took,
        downtime_ms: downtime.unwrap_or(f64::NAN),
        first_pass: f64::NAN,
    }))
}
