// SPDX-License-Identifier: Apache-2.0
//! Parts of a machine that the control API sets and no virtio device is behind: serial output,
//! memory, CPUs, and what a guest says of its panic.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use brume_api::Client;
use brume_tests::artefacts;
use brume_tests::vm::{SOON, Vm, brume};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A machine of the bare guest that is not started yet.
struct Machine {
    vm: Vm,
    client: Client,
    folder: TempDir,
}

impl Machine {
    fn new(args: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let mut command = brume();
        command.arg("--api-sock").arg(&socket);
        command.arg("--log-path").arg(folder.path().join("log"));
        let vm = Vm::spawn(command);
        while UnixStream::connect(&socket).is_err() {
            thread::sleep(Duration::from_millis(5));
        }
        let client = Client::new(&socket).unwrap();
        let machine = Self { vm, client, folder };
        let boot = json!({
            "kernel_image_path": artefacts::bare(),
            "boot_args": format!("bare.tsc_khz=2000000 {args}"),
        });
        machine.put("/boot-source", &boot);
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[track_caller]
    fn put(&self, path: &str, body: &Value) {
        let reply = self.client.send("PUT", path, &body.to_string()).unwrap();
        assert_eq!(reply.status, 204, "{path}: {}", reply.body);
    }

    fn start(&self) {
        self.put("/actions", &json!({"action_type": "InstanceStart"}));
    }

    /// What is said to a start that fails.
    #[track_caller]
    fn refusal(&self) -> String {
        let start = r#"{"action_type": "InstanceStart"}"#;
        let reply = self.client.send("PUT", "/actions", start).unwrap();
        assert_eq!(reply.status, 400);
        let body: Value = serde_json::from_str(&reply.body).unwrap();
        body["fault_message"].as_str().unwrap().to_owned()
    }

    /// The value of a metric, with its labels as they are written.
    fn metric(&self, name: &str) -> u64 {
        let text = self.client.send("GET", "/metrics", "").unwrap().body;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    }
}

/// Reads `file` until it has `text`.
fn read_until(file: &mut impl Read, text: &str) -> String {
    let mut read = Vec::new();
    for _ in 0..SOON.as_millis() / 10 {
        let mut chunk = [0; 4096];
        match file.read(&mut chunk) {
            Ok(count) if count > 0 => read.extend_from_slice(&chunk[..count]),
            _ => thread::sleep(Duration::from_millis(10)),
        }
        let so_far = String::from_utf8_lossy(&read);
        if so_far.contains(text) {
            return so_far.into_owned();
        }
    }
    panic!("{text} does not come: {}", String::from_utf8_lossy(&read));
}

#[test]
fn serial_output_goes_to_a_named_pipe() {
    let machine = Machine::new("bare.do=hello bare.end=spin");
    let pipe = machine.path("serial");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let mut reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&pipe)
        .unwrap();
    machine.put("/serial", &json!({"serial_out_path": pipe}));
    machine.start();
    let said = read_until(&mut reader, "bare: tables");
    assert!(said.contains("bare: hello protocol="), "{said}");
    assert_eq!(machine.vm.stdout(), "");
    let late = r#"{"serial_out_path": "/x"}"#;
    let reply = machine.client.send("PUT", "/serial", late).unwrap();
    assert!(
        reply
            .body
            .contains("not supported after starting the microVM")
    );
}

#[test]
fn serial_output_over_the_limit_is_dropped_and_counted() {
    let machine = Machine::new("bare.do=hello bare.end=spin");
    let file = machine.path("serial");
    let limit = json!({"size": 10, "one_time_burst": 5, "refill_time": 36_000_000});
    machine.put(
        "/serial",
        &json!({"serial_out_path": file, "rate_limiter": limit}),
    );
    machine.start();
    let dropped = "brume_serial_dropped_bytes_total{reason=\"limit\"}";
    while machine.metric(dropped) < 100 {
        thread::sleep(Duration::from_millis(10));
    }
    // A line break, then the first line.
    assert_eq!(fs::read_to_string(file).unwrap(), "\nbare: hello pr");
}

#[test]
fn cpu_templates_are_taken_if_kvm_can_do_them() {
    let machine = Machine::new("bare.do=hello");
    let register = |addr: &str| json!({"msr_modifiers": [{"addr": addr, "bitmap": "0bxx"}]});
    machine.put("/cpu-config", &json!({"kvm_capabilities": ["999999"]}));
    let text = "Start microvm error: Missing KVM capabilities: 0xf423f";
    assert_eq!(machine.refusal(), text);
    machine.put("/cpu-config", &register("0xabcdef"));
    let text = "Start microvm error: Template changes an MSR entry not supported by KVM: Register \
                Address: abcdef";
    assert_eq!(machine.refusal(), text);
    let leaf = |leaf: &str| {
        json!({"cpuid_modifiers": [{"leaf": leaf, "subleaf": "0x0", "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0b0"}]}]})
    };
    machine.put("/cpu-config", &leaf("0xbadc0de"));
    let text = "Start microvm error: Template changes a CPUID entry not supported by KVM: Leaf: \
                badc0de, Subleaf: 0";
    assert_eq!(machine.refusal(), text);

    let mut good = leaf("0x1");
    // The time stamp counter, which every KVM has.
    good["msr_modifiers"] = register("0x10")["msr_modifiers"].clone();
    machine.put("/cpu-config", &good);
    machine.start();
    machine.vm.wait_for("bare: hello", SOON);
}

#[test]
fn memory_is_of_huge_pages_or_the_fault_says_how_to_get_some() {
    let machine = Machine::new("bare.do=hello,mem-check bare.end=spin");
    let memory =
        |mib: u32, pages: &str| json!({"vcpu_count": 1, "mem_size_mib": mib, "huge_pages": pages});
    let odd = memory(33, "2M").to_string();
    let reply = machine.client.send("PUT", "/machine-config", &odd).unwrap();
    let text = "The memory size (MiB) is either 0, or not a multiple of the configured page size.";
    assert!(reply.body.contains(text), "{}", reply.body);
    machine.put("/machine-config", &memory(32, "2M"));
    let free = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = fs::read_to_string(free).unwrap_or_default();
    if free.trim().parse().unwrap_or(0) < 16 {
        let text = machine.refusal();
        for part in [
            "Cannot create mmap region",
            "16 huge pages",
            "vm.nr_hugepages",
        ] {
            assert!(text.contains(part), "{text}");
        }
        machine.put("/machine-config", &memory(32, "Transparent"));
    }
    machine.start();
    machine.vm.wait_for("bare: mem-check", SOON);
}

#[test]
fn a_panic_of_the_guest_is_an_event() {
    let machine = Machine::new("bare.do=panic,hello");
    let watcher = Client::new(&machine.path("api.sock")).unwrap();
    let (told, ready) = std::sync::mpsc::channel();
    let events = thread::spawn(move || {
        let mut events = Vec::new();
        let watched = watcher.stream("/events", |line| {
            events.extend(line.strip_prefix("event: ").map(str::to_owned));
            let _ = told.send(());
            ControlFlow::Continue(())
        });
        watched.map(|()| events)
    });
    ready.recv_timeout(SOON).unwrap();
    machine.start();
    machine.vm.wait_for("bare: hello", SOON);
    let events = events.join().unwrap().unwrap();
    let panics = events.iter().filter(|event| *event == "guest_panicked");
    assert_eq!(panics.count(), 1, "{events:?}");
    assert!(events.contains(&"reset".to_owned()), "{events:?}");
}
