// SPDX-License-Identifier: Apache-2.0
//! What a client gets, and what a bad client cannot do.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;
use crate::events::MachineEvent;

/// Answers the version, does nothing else, and fails to start.
struct Echo;

impl Controller for Echo {
    fn call(&self, request: Request, reply: Reply) {
        reply.send(match request {
            Request::GetVersion => Answer::json(&"v"),
            Request::Start => Err(Fault::new("no \"start\"")),
            _ => Ok(Answer::done()),
        });
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    serving: Serving,
    events: EventHub,
}

impl Fixture {
    fn new() -> Self {
        Self::with(Echo)
    }

    fn with(controller: impl Controller + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::bind(&dir.path().join("s"), 100).unwrap();
        let events = EventHub::default();
        let serving = server
            .spawn(Box::new(controller), events.clone(), Arc::default())
            .unwrap();
        Self {
            dir,
            serving,
            events,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
    }

    /// Sends `text` and reads until `end` is there.
    fn exchange(&self, text: &[u8], end: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(text).unwrap();
        read_until(&mut stream, end)
    }
}

fn read_until(stream: &mut UnixStream, end: &str) -> String {
    let mut got = Vec::new();
    let mut byte = [0];
    while !got.ends_with(end.as_bytes()) && stream.read(&mut byte).unwrap() == 1 {
        got.push(byte[0]);
    }
    String::from_utf8(got).unwrap()
}

#[test]
fn answers_have_firecrackers_form() {
    let server = Fixture::new();
    let answer = server.exchange(b"GET /version HTTP/1.1\r\n\r\n", "\"v\"");
    assert!(answer.starts_with("HTTP/1.1 200 \r\n"), "{answer}");
    for header in [
        "Server: Firecracker API\r\n",
        "Connection: keep-alive\r\n",
        "Content-Type: application/json\r\n",
        "Content-Length: 3\r\n",
    ] {
        assert!(answer.contains(header), "{answer}");
    }
    let body = r#"{"state": "Paused"}"#;
    let text = format!(
        "PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = server.exchange(text.as_bytes(), "\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 204 \r\n"), "{answer}");
    assert!(!answer.contains("Content-Length"), "{answer}");
    let body = r#"{"action_type": "InstanceStart"}"#;
    let text = format!(
        "PUT /actions HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = server.exchange(text.as_bytes(), "}");
    assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{answer}");
    assert!(
        answer.ends_with(r#"{"fault_message":"no \"start\""}"#),
        "{answer}"
    );
}

#[test]
fn a_body_may_be_as_large_as_the_limit() {
    let server = Fixture::new();
    let put = |size: usize| {
        let body = format!("{:size$}", "{\"level\": \"Off\"}");
        let text = format!("PUT /logger HTTP/1.1\r\nContent-Length: {size}\r\n\r\n{body}");
        server.exchange(text.as_bytes(), "\r\n\r\n")
    };
    assert!(put(100).starts_with("HTTP/1.1 204 "));
    assert!(put(101).starts_with("HTTP/1.1 413 "));
    let said = b"PUT /logger HTTP/1.1\r\nContent-Length: 101\r\n\r\n";
    let answer = server.exchange(said, "}");
    assert!(
        answer.contains("413") && answer.contains("with size 101 is larger"),
        "nothing is waited for: {answer}"
    );
    let chunked = format!(
        "PUT /logger HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n65\r\n{:101}\r\n",
        ""
    );
    let answer = server.exchange(chunked.as_bytes(), "\r\n\r\n");
    assert!(
        answer.starts_with("HTTP/1.1 413 "),
        "a body without an end: {answer}"
    );
}

#[test]
fn requests_on_one_connection_are_answered_in_order() {
    let server = Fixture::new();
    let mut stream = server.connect();
    stream
        .write_all(b"GET /version HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\nGET /x HTTP/1.1\r\n\r\n")
        .unwrap();
    assert!(read_until(&mut stream, "\"v\"").contains(" 200 "));
    assert!(read_until(&mut stream, "\r\n\r\n").contains(" 204 "));
    assert!(read_until(&mut stream, "}").contains(" 400 "));
}

#[test]
fn the_eleventh_connection_is_turned_away_and_others_go_on() {
    let server = Fixture::new();
    let mut open: Vec<_> = (0..MAX_CONNECTIONS).map(|_| server.connect()).collect();
    for stream in &mut open {
        // Half a request.
        stream.write_all(b"GET /version HT").unwrap();
    }
    let answer = server.exchange(b"", "}");
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    for mut stream in open {
        stream.write_all(b"TP/1.1\r\n\r\n").unwrap();
        assert!(read_until(&mut stream, "\"v\"").contains(" 200 "));
    }
}

#[test]
fn what_is_no_http_ends_only_its_connection() {
    let server = Fixture::new();
    for bad in [
        &b"\xff\xfe\r\n\r\n"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
    ] {
        let mut stream = server.connect();
        stream.write_all(bad).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 4"));
    }
    drop(server.connect());
    let answer = server.exchange(b"GET /version HTTP/1.1\r\n\r\n", "\"v\"");
    assert!(answer.contains(" 200 "));
}

#[test]
fn a_path_that_is_taken_is_an_error_and_stays() {
    let server = Fixture::new();
    let path = server.dir.path().join("s");
    assert!(matches!(
        Server::bind(&path, 1),
        Err(ServerError::Exists(_))
    ));
    server.connect();
    assert!(matches!(
        Server::bind(&server.dir.path().join("no/where"), 1),
        Err(ServerError::Bind { .. })
    ));
}

/// Gives what it is asked to somebody else.
struct Later(mpsc::Sender<Reply>);

impl Controller for Later {
    fn call(&self, _request: Request, reply: Reply) {
        self.0.send(reply).unwrap();
    }
}

fn rest_of(mut stream: UnixStream) -> String {
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    rest
}

/// A server whose machine does not answer yet, a client that has asked, and the answer to give.
fn asked() -> (Fixture, UnixStream, Reply) {
    let (later, asked) = mpsc::channel();
    let server = Fixture::with(Later(later));
    let mut client = server.connect();
    client.write_all(b"GET /version HTTP/1.1\r\n\r\n").unwrap();
    let reply = asked.recv().unwrap();
    (server, client, reply)
}

#[test]
fn what_was_asked_is_answered_and_what_was_told_goes_out_before_the_end() {
    let (server, client, reply) = asked();
    let mut watcher = server.connect();
    watcher.write_all(b"GET /events HTTP/1.1\r\n\r\n").unwrap();
    read_until(&mut watcher, "\r\n\r\n");
    let silent = server.connect();
    server.events.publish(MachineEvent::Reset);
    let ends = thread::spawn(move || {
        drop(server.serving);
        server.dir
    });
    // Those who wait for nothing are let go while others wait.
    assert_eq!(rest_of(silent), "");
    let events = rest_of(watcher);
    assert!(events.contains("event: reset\n"), "{events}");
    assert!(events.ends_with("\r\n0\r\n\r\n"), "{events}");
    reply.send(Answer::json(&"late"));
    let answer = rest_of(client);
    assert!(answer.ends_with("\"late\""), "{answer}");
    let dir = ends.join().unwrap();
    UnixStream::connect(dir.path().join("s")).unwrap_err();
}

#[test]
fn nobody_is_waited_for_for_ever() {
    let (server, _client, _never) = asked();
    drop(server.serving);
}
