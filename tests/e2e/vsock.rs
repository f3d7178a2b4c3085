// SPDX-License-Identifier: Apache-2.0
//! Sockets between the host and the bare guest, whose driver was not written for brume.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use brume_tests::artefacts;
use brume_tests::vm::{Outcome, SOON, Vm, brume};
use serde_json::json;
use tempfile::TempDir;

/// A machine with a socket device, whose guest does as `args` say.
fn machine(args: &str) -> (TempDir, PathBuf, Vm) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("v.sock");
    let process = start(folder.path(), &socket, args);
    (folder, socket, process)
}

fn start(folder: &Path, socket: &Path, args: &str) -> Vm {
    let file = folder.join("vm.json");
    let config = json!({
        "boot-source": {
            "kernel_image_path": artefacts::bare(),
            "boot_args": format!("bare.tsc_khz=2000000 {args}"),
        },
        "drives": [],
        "vsock": {"guest_cid": 7, "uds_path": socket},
    });
    fs::write(&file, config.to_string()).unwrap();
    let mut command = brume();
    command.arg("--no-api").arg("--config-file").arg(file);
    Vm::spawn(command)
}

/// Connects to a port of the guest.
pub(crate) fn connect(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    let line = String::from_utf8(line).unwrap();
    let host_port = line.strip_prefix("OK ").unwrap().trim_end();
    host_port.parse::<u32>().unwrap();
    stream
}

/// Sends `len` bytes and checks that they come back.
pub(crate) fn echo(stream: &mut UnixStream, len: usize) {
    let data: Vec<u8> = (0..len).map(|at| (at * 7 + at / 251) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let writer = thread::spawn(move || writer.write_all(&sent).unwrap());
    let mut back = vec![0; len];
    stream.read_exact(&mut back).unwrap();
    writer.join().unwrap();
    assert!(back == data, "{len} bytes came back as others");
}

fn end(process: Vm, socket: &Path) -> Outcome {
    let outcome = process.wait(SOON);
    // Firecracker's clients remove it, and miss it if it is gone.
    assert!(socket.exists());
    outcome
}

#[test]
fn the_host_connects_to_the_guest() {
    let (_folder, socket, process) = machine("bare.do=vsock-listen bare.conns=20");
    process.wait_for("bare: vsock-listen ready cid=7", SOON);
    let mut first = connect(&socket, 52);
    let mut second = connect(&socket, 52);
    echo(&mut first, 2_000_000);
    echo(&mut second, 5);
    drop((first, second));
    for round in 0..18 {
        echo(&mut connect(&socket, 52), 1 + round * 1000);
    }
    let outcome = end(process, &socket);
    let line = outcome.assert_clean().line("bare: vsock-listen accepted");
    assert!(
        line.contains("accepted=20 ended=20 bytes=2153023 timeout=0"),
        "{line}"
    );
}

#[test]
fn the_guest_connects_to_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("v.sock");
    let listener = UnixListener::bind(folder.path().join("v.sock_99")).unwrap();
    let args = "bare.do=vsock-connect bare.port=99 bare.bytes=2000000";
    let process = start(folder.path(), &socket, args);
    let (mut stream, _) = listener.accept().unwrap();
    let mut data = vec![0; 100_000];
    let mut total = 0;
    loop {
        let count = stream.read(&mut data).unwrap();
        if count == 0 {
            break;
        }
        stream.write_all(&data[..count]).unwrap();
        total += count;
    }
    assert_eq!(total, 2_000_000);
    let outcome = end(process, &socket);
    let line = outcome.assert_clean().line("bare: vsock-connect sent");
    assert!(
        line.contains("sent=2000000 received=2000000 right=1 closed=1 timeout=0"),
        "{line}"
    );
}

#[test]
fn ports_where_nobody_listens_refuse() {
    let (_folder, socket, process) =
        machine("bare.do=vsock-connect,vsock-listen bare.port=98 bare.timeout_ms=20000");
    process.wait_for("bare: vsock-connect refused", SOON);
    process.wait_for("bare: vsock-listen ready", SOON);
    let mut client = UnixStream::connect(&socket).unwrap();
    client.write_all(b"CONNECT 97\n").unwrap();
    let mut said = String::new();
    client.read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
    echo(&mut connect(&socket, 98), 10);
    end(process, &socket).assert_clean();
}

#[test]
fn a_path_that_is_taken_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("taken");
    fs::write(&socket, "").unwrap();
    let outcome = start(folder.path(), &socket, "bare.do=hello").wait(SOON);
    assert_ne!(outcome.status, 0, "{outcome:#?}");
    let text = &outcome.stderr;
    assert!(
        text.contains(socket.to_str().unwrap()) && text.contains("Address already in use"),
        "{outcome:#?}"
    );
    assert!(socket.exists());
}
