// SPDX-License-Identifier: Apache-2.0
//! Clients that do what no client should, against the real program: each gets its status, or loses
//! its connection, and the machine goes on.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use brume_tests::api::{ApiVm, eventually};
use brume_tests::vm::{brume, inside};

/// The most connections at a time.
const CONNECTIONS: usize = 10;
/// The largest body, in bytes.
const LIMIT: usize = 51_200;

fn machine() -> ApiVm {
    let api = ApiVm::new();
    api.start_bare("bare.do=hello bare.end=spin", &[]);
    api
}

fn put(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// `start`, many times `middle`, `end`.
fn nested(start: &str, middle: &str, times: usize, end: &str) -> Vec<u8> {
    [start, &middle.repeat(times), end].concat().into_bytes()
}

/// Reads one answer, or what there is until the connection ends.
fn answer(stream: &mut UnixStream) -> String {
    let mut got = Vec::new();
    let mut byte = [0];
    while !is_whole(&got) && stream.read(&mut byte).is_ok_and(|count| count == 1) {
        got.extend(byte);
    }
    String::from_utf8(got).unwrap()
}

fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let len = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "));
    body.len() >= len.map_or(0, |len| len.parse().unwrap())
}

fn exchange(api: &ApiVm, bytes: &[u8]) -> String {
    let mut stream = api.connect();
    // What is refused early need not be read to its end.
    let _ = stream.write_all(bytes);
    answer(&mut stream)
}

/// A request, the status, and a part of the answer.
type Case = (&'static str, Vec<u8>, &'static str, &'static str);

fn bodies() -> Vec<Case> {
    let fault = "An error occurred when deserializing the json body of a request: ";
    let mmds = |value: &str| put("/mmds", format!("{{\"a\": {value}}}").as_bytes());
    let machine = |fields: &str| put("/machine-config", format!("{{{fields}}}").as_bytes());
    let padded = |size: usize| put("/logger", format!("{:size$}", "{}").as_bytes());
    let early = b"PUT /logger HTTP/1.1\r\nContent-Length: 51201\r\n\r\n".to_vec();
    let expecting = b"PUT /logger HTTP/1.1\r\nContent-Length: 60000\r\n\
        Expect: 100-continue\r\n\r\n"
        .to_vec();
    vec![
        (
            "no UTF-8",
            put("/mmds", b"{\"a\": \"\xff\xfe\"}"),
            "400",
            "invalid unicode code point",
        ),
        (
            "no UTF-8 in a name",
            put("/logger", b"{\"\xff\": 1}"),
            "400",
            fault,
        ),
        (
            "deep lists",
            put("/mmds", &nested("", "[", 25_000, "")),
            "400",
            "recursion limit exceeded",
        ),
        (
            "deep maps",
            put("/mmds", &nested("", "{\"a\":", 10_000, "")),
            "400",
            "recursion limit exceeded",
        ),
        (
            "deep where nothing belongs",
            put("/logger", &nested("{\"x\":", "[", 25_000, "")),
            "400",
            "unknown field `x`",
        ),
        (
            "twice",
            machine(r#""vcpu_count": 1, "vcpu_count": 2, "mem_size_mib": 128"#),
            "400",
            "duplicate field `vcpu_count`",
        ),
        (
            "more than 8 bits",
            machine(r#""vcpu_count": 256, "mem_size_mib": 128"#),
            "400",
            "invalid value: integer `256`, expected u8",
        ),
        (
            "less than nothing",
            machine(r#""vcpu_count": 1, "mem_size_mib": -1"#),
            "400",
            "invalid value: integer `-1`",
        ),
        (
            "more than 64 bits",
            machine(r#""vcpu_count": 1, "mem_size_mib": 18446744073709551616"#),
            "400",
            "invalid type: floating point",
        ),
        (
            "a fraction",
            machine(r#""vcpu_count": 1.5, "mem_size_mib": 128"#),
            "400",
            "invalid type: floating point `1.5`",
        ),
        ("no number", mmds("1e400"), "400", "number out of range"),
        (
            "the largest number",
            mmds("18446744073709551615"),
            "400",
            "MMDS",
        ),
        (
            "rubbish behind",
            put("/logger", b"{} x"),
            "400",
            "trailing characters",
        ),
        (
            "cut off",
            put("/logger", b"{\"level\": "),
            "400",
            "EOF while parsing",
        ),
        (
            "as large as may be",
            padded(LIMIT),
            "400",
            "after starting the microVM",
        ),
        (
            "a byte more",
            padded(LIMIT + 1),
            "413",
            "with size 51201 is larger than the limit of 51200",
        ),
        (
            "a byte more, said and not sent",
            early,
            "413",
            "with size 51201 is larger",
        ),
        (
            "too much, asked for first",
            expecting,
            "413",
            "with size 60000 is larger",
        ),
    ]
}

/// What is no request; hyper answers these by itself.
fn heads() -> Vec<Case> {
    let mut many = String::from("GET /version HTTP/1.1\r\n");
    for number in 0..300 {
        write!(many, "X{number}: a\r\n").unwrap();
    }
    many.push_str("\r\n");
    let endless = nested("GET /version HTTP/1.1\r\nX: ", "a", 1 << 20, "\r\n\r\n");
    vec![
        (
            "no HTTP",
            b"\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n".to_vec(),
            "400",
            "",
        ),
        (
            "another version",
            b"GET / HTTP/9.9\r\n\r\n".to_vec(),
            "400",
            "",
        ),
        (
            "no UTF-8 in the path",
            b"GET /\xff\xfe HTTP/1.1\r\n\r\n".to_vec(),
            "400",
            "",
        ),
        (
            "a length below zero",
            b"PUT /logger HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_vec(),
            "400",
            "",
        ),
        (
            "a length above all",
            b"PUT /logger HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".to_vec(),
            "400",
            "",
        ),
        (
            "two lengths",
            b"PUT /logger HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}".to_vec(),
            "400",
            "",
        ),
        ("many headers", many.into_bytes(), "431", ""),
        ("a header without end", endless, "431", ""),
        (
            "a method of its own",
            b"BREW / HTTP/1.1\r\n\r\n".to_vec(),
            "400",
            "Invalid request method",
        ),
    ]
}

#[test]
fn what_is_no_request_gets_its_status_and_the_machine_goes_on() {
    let api = machine();
    for (name, bytes, status, part) in bodies().into_iter().chain(heads()) {
        let answer = exchange(&api, &bytes);
        let start = format!("HTTP/1.1 {status} ");
        assert!(
            answer.starts_with(&start) && answer.contains(part),
            "{name}: {answer}"
        );
        api.assert_alive("Running");
    }
    assert_eq!(api.get("/machine-config")["mem_size_mib"], 128);
}

#[test]
fn json_nested_100_000_deep_is_refused_where_that_much_may_be_sent() {
    let api = ApiVm::start_with(brume(), |mut command| {
        command.args(["--http-api-max-payload-size", "1000000"]);
        command
    });
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let body = [open.repeat(100_000), "1".into(), close.repeat(100_000)].concat();
        let answer = exchange(&api, &put("/mmds", body.as_bytes()));
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains("recursion limit exceeded"), "{answer}");
    }
    // The store has its own limit, which is this one by default.
    let large = format!("{{\"a\": \"{}\"}}", " ".repeat(1_000_000));
    let answer = exchange(&api, &put("/mmds", large.as_bytes()));
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    api.assert_alive("Not started");
}

#[test]
fn ten_are_served_and_the_eleventh_is_told_so() {
    let api = machine();
    // Nobody else may be connected: whoever asked before has to be gone.
    let mut open = Vec::new();
    eventually("ten connections are open", || {
        open.clear();
        // The server may see new ones before it sees that these are gone.
        std::thread::sleep(Duration::from_millis(20));
        open.extend((0..CONNECTIONS).map(|_| api.connect()));
        open.iter_mut().all(|stream| {
            stream.write_all(b"GET /version HTTP/1.1\r\n\r\n").is_ok()
                && answer(stream).starts_with("HTTP/1.1 200 ")
        })
    });
    for stream in &mut open {
        // Half a request, and silence.
        stream
            .write_all(b"PUT /logger HTTP/1.1\r\nContent-Length: 2\r\n\r\n{")
            .unwrap();
    }
    for _ in 0..3 {
        let mut late = api.connect();
        let told = answer(&mut late);
        assert!(told.starts_with("HTTP/1.1 503 "), "{told}");
        assert!(told.contains("Too many open connections"), "{told}");
        assert_eq!(
            late.read(&mut [0]).unwrap(),
            0,
            "the connection is still open"
        );
    }
    // The ten are still served, and one that leaves makes room.
    for stream in &mut open {
        stream.write_all(b"}").unwrap();
        let told = answer(stream);
        assert!(told.contains("after starting the microVM"), "{told}");
    }
    open.pop();
    eventually("there is room again", || {
        exchange(&api, b"GET /version HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 ")
    });
}

#[test]
fn half_a_request_hinders_nobody() {
    let api = machine();
    let mut halves = Vec::new();
    for half in [
        "G",
        "GET / HTTP/1.1\r\nHo",
        "PUT /mmds HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    ] {
        let mut stream = api.connect();
        stream.write_all(half.as_bytes()).unwrap();
        halves.push(stream);
        api.assert_alive("Running");
    }
    let short = Some(Duration::from_millis(100));
    for mut stream in halves {
        stream.set_read_timeout(short).unwrap();
        stream.read_exact(&mut [0]).unwrap_err();
    }
    api.assert_alive("Running");
}

#[test]
fn a_body_that_never_ends_is_cut_off() {
    let api = machine();
    let mut stream = api.connect();
    stream
        .write_all(b"PUT /logger HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        .unwrap();
    let chunk = format!("400\r\n{:1024}\r\n", "");
    let sent = (0..10_000).take_while(|_| stream.write_all(chunk.as_bytes()).is_ok());
    let sent = sent.count();
    assert!((50..1000).contains(&sent), "{sent} KiB were taken");
    let told = answer(&mut stream);
    assert!(told.starts_with("HTTP/1.1 413 "), "{told}");
    api.assert_alive("Running");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let api = machine();
    let mut stream = api.connect();
    let paths = ["/version", "/machine-config", "/nothing", "/"];
    for round in 0..50 {
        let requests: String = paths
            .iter()
            .map(|path| format!("GET {path} HTTP/1.1\r\n\r\n"))
            .collect();
        let patch = put("/vsock", b"{}");
        stream
            .write_all(&[requests.as_bytes(), &patch].concat())
            .unwrap();
        for part in [
            "firecracker_version",
            "vcpu_count",
            "GET nothing.",
            "Running",
            "missing field",
        ] {
            let told = answer(&mut stream);
            assert!(told.contains(part), "round {round}, {part}: {told}");
        }
    }
}

#[test]
fn clients_that_leave_leave_nothing_behind() {
    let api = machine();
    // A pause here and there, so that the requests differ in how far they came.
    for round in 0..300_u64 {
        let mut stream = api.connect();
        let path = ["/vm/config", "/metrics", "/events"][(round % 3) as usize];
        // The server may be full of connections that it has not seen the end of yet.
        let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes());
        if round % 7 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        if round % 2 == 0 {
            let _ = stream.read(&mut [0; 5]);
        }
    }
    eventually("the API is free again", || {
        exchange(&api, b"GET / HTTP/1.1\r\n\r\n").contains("Running")
    });
    let files = format!("/proc/{}/fd", api.vm.pid());
    let sockets = || {
        let files = std::fs::read_dir(&files).unwrap();
        let targets = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
        targets
            .filter(|target| target.to_string_lossy().starts_with("socket"))
            .count()
    };
    // The socket itself, and one that may be on its way out.
    eventually("all connections are closed", || sockets() <= 2);
    // Whoever watches is told of what comes.
    assert_eq!(
        api.send("PATCH", "/vm", r#"{"state": "Paused"}"#).status,
        204
    );
    api.assert_alive("Paused");
}

#[test]
fn few_file_descriptors_do_not_end_the_machine() {
    // With this many it starts, and cannot take all ten connections.
    let api = ApiVm::start_with(brume(), |command| {
        inside("prlimit", &["--nofile=16"], &command)
    });
    // Its owner answers this, so all that it needs itself is open.
    assert!(exchange(&api, b"GET /machine-config HTTP/1.1\r\n\r\n").contains("vcpu_count"));
    let open: Vec<_> = (0..CONNECTIONS).map(|_| api.connect()).collect();
    std::thread::sleep(Duration::from_millis(50));
    drop(open);
    eventually("the API is there again", || {
        exchange(&api, b"GET / HTTP/1.1\r\n\r\n").contains("Not started")
    });
}
