// SPDX-License-Identifier: Apache-2.0
//! The balloon and the entropy device, asked for and steered by the control API.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use brume_tests::artefacts;
use brume_tests::vm::{SOON, Vm, brume};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A machine with an API socket.
struct Api {
    vm: Vm,
    socket: PathBuf,
    _folder: TempDir,
}

impl Api {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let mut command = brume();
        command.arg("--api-sock").arg(&socket);
        // Else it would be between the guest's words.
        let log = folder.path().join("log");
        command.arg("--log-path").arg(log);
        let api = Self {
            vm: Vm::spawn(command),
            socket,
            _folder: folder,
        };
        eventually("the socket is there", || {
            UnixStream::connect(&api.socket).is_ok()
        });
        api
    }

    /// Sends a request; status and body of the answer.
    fn request(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        let len = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: brume\r\nContent-Length: {len}");
        write!(stream, "{head}\r\nConnection: close\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        let mut bytes = [0; 4096];
        while !is_whole(&answer) {
            let count = stream.read(&mut bytes).unwrap();
            assert!(count > 0, "the answer is broken off: {answer}");
            answer.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    #[track_caller]
    fn done(&self, method: &str, path: &str, body: &Value) {
        let (status, answer) = self.request(method, path, &body.to_string());
        assert_eq!(status, 204, "{method} {path}: {answer}");
    }

    #[track_caller]
    fn refused(&self, method: &str, path: &str, body: &str, text: &str) {
        let (status, answer) = self.request(method, path, body);
        let expected = json!({ "fault_message": text });
        assert_eq!((status, answer), (400, expected), "{method} {path}");
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        let (status, answer) = self.request("GET", path, "");
        assert_eq!(status, 200, "{path}: {answer}");
        answer
    }

    /// Makes a machine of the bare guest, told `args`, with these parts besides, and starts it.
    fn start(&self, args: &str, parts: &[(&str, Value)]) {
        let boot_args = format!("bare.tsc_khz=2000000 {args}");
        let kernel = artefacts::bare();
        let boot = json!({"kernel_image_path": kernel, "boot_args": boot_args});
        self.done("PUT", "/boot-source", &boot);
        for (path, body) in parts {
            self.done("PUT", path, body);
        }
        let start = json!({"action_type": "InstanceStart"});
        self.done("PUT", "/actions", &start);
    }
}

/// Whether an HTTP answer has all of its body.
fn is_whole(answer: &str) -> bool {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return false;
    };
    let len = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        let named = name.eq_ignore_ascii_case("content-length");
        named.then(|| value.parse().unwrap())
    });
    body.len() >= len.unwrap_or(0)
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON, "not so: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn memory_goes_to_the_host_by_each_way_of_the_balloon() {
    let mut api = Api::new();
    let none = "Balloon config error: No balloon device found.";
    api.refused("GET", "/balloon", "", none);
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 256});
    let balloon = json!({
        "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1,
        "free_page_hinting": true, "free_page_reporting": true,
    });
    api.done("PUT", "/machine-config", &machine);
    let too_large = r#"{"amount_mib": 257, "deflate_on_oom": false}"#;
    let text = "Balloon config error: Amount of pages requested is too large.";
    api.refused("PUT", "/balloon", too_large, text);
    let amount = r#"{"amount_mib": 64}"#;
    let early = "The requested operation is not supported before starting the microVM.";
    api.refused("PATCH", "/balloon", amount, early);

    let args = "bare.do=balloon-check bare.ms=30000 bare.hold=1 bare.end=spin";
    api.start(args, &[("/balloon", balloon.clone())]);
    assert_eq!(api.get("/balloon"), balloon);
    eventually("the guest has a driver", || {
        api.request("PATCH", "/balloon", amount).0 == 204
    });
    api.vm.wait_for("bare: balloon filled mib=64", SOON);
    let full = api.vm.resident_mib();
    api.vm.send(b"x");
    api.vm.wait_for("bare: balloon inflated", SOON);
    let inflated = api.vm.resident_mib();
    assert!(full >= 64 && inflated + 60 <= full, "{full} {inflated}");
    let statistics = api.get("/balloon/statistics");
    assert_eq!(
        statistics,
        json!({
            "target_pages": 16384, "actual_pages": 16384, "target_mib": 64, "actual_mib": 64,
            "free_memory": 1 << 20, "total_memory": 2 << 20,
        })
    );
    api.vm.send(b"x");

    api.vm.wait_for("bare: balloon report", SOON);
    api.done("PATCH", "/balloon/hinting/start", &json!({}));
    api.vm.wait_for("bare: balloon hint", SOON);
    eventually("the run is over", || {
        api.get("/balloon/hinting/status") == json!({"host_cmd": 1, "guest_cmd": 0})
    });
    eventually("the guest is through", || api.vm.stdout().contains(" end="));
    for line in [
        "bare: balloon inflate kept=0 zero=1024 again=1024",
        "bare: balloon report kept=0 zero=1024",
        "bare: balloon hint run=2 kept=0 zero=1024 end=1",
    ] {
        assert!(api.vm.stdout().contains(line), "{}", api.vm.stdout());
    }
    let text = "Balloon update error: Balloon: Requested memory should be less than 257MiB";
    api.refused("PATCH", "/balloon", r#"{"amount_mib": 257}"#, text);
    assert_eq!(api.get("/vm/config")["balloon"]["amount_mib"], 64);
}

#[test]
fn a_balloon_that_is_not_there_says_so() {
    let api = Api::new();
    api.start("bare.end=spin", &[]);
    let none = "Failed perform action on device: Device not found";
    let read = format!("Internal VMM error: {none}");
    let change = format!("Balloon update error: {none}");
    api.refused("GET", "/balloon", "", &read);
    api.refused("GET", "/balloon/statistics", "", &read);
    api.refused("GET", "/balloon/hinting/status", "", &change);
    api.refused("PATCH", "/balloon", r#"{"amount_mib": 1}"#, &change);
    api.refused("PATCH", "/balloon/hinting/stop", "", &change);
}

#[test]
fn the_guest_gets_random_bytes() {
    let api = Api::new();
    let args = "bare.do=rng-check bare.ops=20 bare.bytes=100000 bare.end=spin";
    api.start(args, &[("/entropy", json!({}))]);
    // No request gets more than 64 KiB.
    api.vm.wait_for(" same=0 ", SOON);
    let text = api.vm.stdout();
    let line = text.lines().find(|line| line.starts_with("bare: rng"));
    let number = |name: &str| -> u64 {
        let word = line.unwrap().split(' ').find_map(|w| w.strip_prefix(name));
        word.unwrap().parse().unwrap()
    };
    let bits = 8 * number("bytes=");
    assert_eq!(bits, 20 * 64 * 1024 * 8);
    // Twenty standard deviations around one half.
    let ones = number("ones=");
    assert!(
        ones.abs_diff(bits / 2) < 10 * bits.isqrt(),
        "{ones} of {bits}"
    );
}
