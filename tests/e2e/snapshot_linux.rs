// SPDX-License-Identifier: Apache-2.0
//! Linux at work, saved and restored generation after generation: it must not notice.
//!
//! A boot takes long where kernel code is emulated, so all of this shares one. The guest runs its
//! step `witness`, which see in `resources/guest/README.md`.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use brume_tests::api::{ApiVm, eventually, with};
use brume_tests::live::Snapshot;
use brume_tests::memory_files::{assert_same_memory, merge};
use brume_tests::netns::NetNs;
use brume_tests::vm::{LINUX, SOON, brume};
use brume_tests::witness::{self, Asker, Status, assert_journal, status_over, stream};
use brume_tests::{artefacts, linux_slot};
use serde_json::{Value, json};
use tempfile::TempDir;

const REFORKED: &str = "random: crng reseeded due to virtual machine fork";
/// The address on the host's side, which goes from TAP to TAP with the MAC.
const TAP_UP: &str = "ip addr add 169.254.1.1/16 dev $tap; ip link set $tap up";

/// How a generation is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Full,
    /// The diff alone, merged by `brume rebase`, and compared with a full one of the same instant.
    Diff,
    /// The diff into a copy of the snapshot before.
    DiffOnto,
    /// As `Diff`, while the machine runs.
    PreCopied,
}

const WAYS: [Way; 10] = [
    Way::Full,
    Way::Diff,
    Way::PreCopied,
    Way::DiffOnto,
    Way::Full,
    Way::Diff,
    Way::Diff,
    Way::PreCopied,
    Way::PreCopied,
    Way::DiffOnto,
];

/// All around the machine that outlives each of its processes.
struct Surroundings {
    network: NetNs,
    folder: TempDir,
    asker: Asker,
    disk: PathBuf,
}

impl Surroundings {
    fn new() -> Self {
        let network = NetNs::new();
        for (tap, state) in [("tap0", TAP_UP), ("tap1", "true")] {
            let mac = "02:00:00:00:00:01";
            network.sh(&format!(
                "tap={tap}; ip tuntap add $tap mode tap vnet_hdr; \
                 ip link set $tap address {mac}; {state}"
            ));
        }
        let asker = Asker::new(&network);
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.ext4");
        fs::copy(artefacts::rootfs(), &disk).unwrap();
        Self {
            network,
            folder,
            asker,
            disk,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// brume, in the namespace.
    fn process(&self) -> ApiVm {
        ApiVm::start_with(brume(), |command| self.network.wrap(&command))
    }

    fn use_second_tap(&self) {
        self.network.sh(&format!(
            "ip addr flush dev tap0; ip link set tap0 down; tap=tap1; {TAP_UP}"
        ));
    }

    /// Boots Linux with one of every device, and waits for its witness.
    fn boot(&self) -> Machine<'_> {
        let api = self.process();
        let vsock = self.path("first.sock");
        let machine = json!({"vcpu_count": 2, "mem_size_mib": 64, "track_dirty_pages": true});
        let interface = json!({"iface_id": "eth0", "host_dev_name": "tap0"});
        let parts = [
            ("/machine-config", machine),
            ("/network-interfaces/eth0", interface),
        ];
        witness::boot(&api, &self.disk, &vsock, &parts);
        Machine {
            api,
            vsock,
            around: self,
        }
    }

    /// Restores `snapshot` in a process of its own.
    fn restore(&self, snapshot: &Snapshot, name: &str, extra: &Value) -> Machine<'_> {
        let api = self.process();
        let vsock = self.path(&format!("{name}.sock"));
        let body = json!({
            "track_dirty_pages": true, "vsock_override": {"uds_path": vsock},
        });
        let body = with(body, extra);
        api.done("PUT", "/snapshot/load", &snapshot.load_request(&body));
        Machine {
            api,
            vsock,
            around: self,
        }
    }
}

/// One process of the machine.
struct Machine<'a> {
    api: ApiVm,
    vsock: PathBuf,
    around: &'a Surroundings,
}

impl Machine<'_> {
    /// Asks over the network.
    #[track_caller]
    fn ask(&self, request: &str) -> String {
        self.around.asker.ask(&self.api.vm, request)
    }

    #[track_caller]
    fn status(&self) -> Status {
        self.around.asker.status(&self.api.vm)
    }

    /// Asks on the console.
    #[track_caller]
    fn type_in(&mut self, request: &str) -> String {
        let before = self.api.vm.stdout().len();
        self.api.vm.send(format!("{request}\n").as_bytes());
        let start = "brume-guest: witness note ";
        self.api.vm.line_after(before, start, SOON)
    }

    /// The statuses of the metadata service with the token that the guest had and with a new one.
    #[track_caller]
    fn assert_metadata(&self, expected: &str) {
        assert_eq!(self.ask("m"), format!("mmds {expected}"));
    }

    #[track_caller]
    fn set_balloon(&self, mib: u64) {
        self.api
            .done("PATCH", "/balloon", &json!({"amount_mib": mib}));
    }

    #[track_caller]
    fn wait_for_balloon(&self, mib: u64) {
        eventually("the balloon is as large as it should be", || {
            self.api.get("/balloon/statistics")["actual_mib"] == mib
        });
    }

    fn pause(&self) {
        self.api.done("PATCH", "/vm", &json!({"state": "Paused"}));
    }

    fn create(&self, body: &Value) {
        self.api.done("PUT", "/snapshot/create", body);
    }

    /// Saves the machine as `name`, after the snapshot `base`.
    fn save(&self, way: Way, name: &str, base: Option<&Snapshot>) -> Snapshot {
        let snapshot = Snapshot::named(self.around.folder.path(), name);
        let Some(base) = base.filter(|_| way != Way::Full) else {
            self.pause();
            self.create(&snapshot.create_request("Full"));
            return snapshot;
        };
        if way == Way::DiffOnto {
            self.pause();
            fs::copy(&base.memory, &snapshot.memory).unwrap();
            self.create(&snapshot.create_request("Diff"));
            return snapshot;
        }
        let mut diff = snapshot.clone();
        diff.memory = self.around.path(&format!("{name}.diff"));
        let mut request = diff.create_request("Diff");
        if way == Way::PreCopied {
            // The machine goes on afterwards, and must not leave what was saved behind on its disk.
            assert!(self.ask("r").starts_with("rests"));
            request["pre_copy"] = true.into();
        } else {
            self.pause();
        }
        self.create(&request);
        merge(&base.memory, &diff.memory, &snapshot.memory);
        if way == Way::Diff {
            let full = Snapshot::named(self.around.folder.path(), "compared");
            self.create(&full.create_request("Full"));
            assert_same_memory(&snapshot.memory, &full.memory);
            fs::remove_file(full.memory).unwrap();
        }
        fs::remove_file(diff.memory).unwrap();
        snapshot
    }
}

#[test]
fn linux_does_not_notice_ten_generations() {
    let _slot = linux_slot(2);
    let around = Surroundings::new();
    let mut machine = around.boot();
    machine.assert_metadata("before=0 after=200");
    machine.assert_metadata("before=200 after=200");
    let mut base: Option<Snapshot> = None;
    for (number, way) in (1..).zip(WAYS) {
        let name = number.to_string();
        let open = stream(&machine.vsock, &machine.api.vm);
        match number {
            // Saved while it is being filled.
            2 => machine.set_balloon(12),
            5 => machine.set_balloon(0),
            _ => {}
        }
        let before = machine.status();
        let saved = machine.save(way, &name, base.as_ref());
        // No other has any of its files.
        drop((machine, open));
        let asleep = Duration::from_secs(if matches!(number, 4 | 5) { 2 } else { 0 });
        thread::sleep(asleep);
        let realtime = number % 2 == 0;
        let mut extra = json!({"clock_realtime": realtime});
        if number == 3 {
            around.use_second_tap();
            extra["network_overrides"] = json!([{"iface_id": "eth0", "host_dev_name": "tap1"}]);
        }
        machine = around.restore(&saved, &name, &extra);
        machine.api.vm.wait_for(REFORKED, SOON);
        assert!(machine.ask("g").starts_with("goes"));
        let after = machine.status();
        after.assert_after(&before);
        eventually("the guest has lost the stream", || {
            machine.status().number("resets") == number
        });
        eventually("the second CPU goes on", || {
            machine.status().number("busy") > after.number("busy")
        });
        // An answer that was long on its way makes it more than it is.
        let more = (0..4).map(|_| machine.status().behind);
        let behind = more.fold(after.behind, Duration::min);
        let lost = behind.saturating_sub(before.behind);
        let is_kept = if realtime {
            lost < Duration::from_secs(1)
        } else {
            lost >= asleep
        };
        assert!(is_kept, "{number}: {before:?} {after:?}");
        let streams = status_over(&mut stream(&machine.vsock, &machine.api.vm)).number("streams");
        assert!(streams > after.number("streams"));
        if number == 1 {
            // Neither the sessions nor the data of the service are in a snapshot.
            let data = json!({"value": "v"});
            machine.api.done("PUT", "/mmds", &data);
            machine.assert_metadata("before=401 after=200");
        }
        Status::parse(&machine.type_in("?")).assert_after(&after);
        match number {
            2 => machine.wait_for_balloon(12),
            5 => machine.wait_for_balloon(0),
            _ => {}
        }
        if let Some(base) = base.replace(saved) {
            fs::remove_file(base.memory).unwrap();
        }
    }
    // Its disk is as it is now, so nothing may go on with it but one of what is made from this.
    let last = machine.save(Way::Full, "last", None);
    drop(machine);
    let copy = around.path("copy.ext4");
    fs::copy(&around.disk, &copy).unwrap();
    let other = json!({"drive_overrides": [{"drive_id": "d", "path_on_host": copy}]});
    let random = |name, extra: &Value| {
        let mut machine = around.restore(&last, name, extra);
        machine.api.vm.wait_for(REFORKED, SOON);
        let status = Status::parse(&machine.type_in("?"));
        (machine, status.words["random"].clone())
    };
    let (clone, first) = random("clone", &other);
    drop(clone);
    let (machine, second) = random("other", &json!({}));
    assert_ne!(first, second);
    let status = Status::parse(&machine.ask("q"));
    let outcome = machine.api.vm.wait(LINUX);
    outcome.assert_clean();
    outcome.line("brume-guest: witness ok");
    assert_journal(&around.disk, status.number("records"));
}
