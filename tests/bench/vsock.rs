// SPDX-License-Identifier: Apache-2.0
//! The socket device: bytes that the guest sends back, and connections made and closed.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::program::{Programs, Running};
use crate::table::{Better, Table};

const PORT: u32 = 52;
/// What is sent at a time; the guest sends that much back at a time.
const CHUNK: usize = 16 * 1024;
const CONNECTIONS: u32 = 500;
const PATIENCE: Duration = Duration::from_secs(20);

/// Takes the rows.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(programs: &Programs, table: &mut Table, ms: u32) -> io::Result<()> {
    let monitors = programs.monitors();
    let time = Duration::from_millis(ms.into());
    let name = "vsock, echo of a stream";
    table.take(name, "MB/s", Better::Higher, &monitors, |monitor| {
        with_guest(programs, monitor, 1, |path| echo(path, time))
    })?;
    let name = "vsock, connections";
    table.take(name, "1/s", Better::Higher, &monitors, |monitor| {
        with_guest(programs, monitor, CONNECTIONS, connections)
    })
}

/// Runs a guest that sends back what comes on `conns` connections, and measures on its socket.
fn with_guest(
    programs: &Programs,
    monitor: &str,
    conns: u32,
    measure: impl FnOnce(&Path) -> io::Result<f64>,
) -> io::Result<f64> {
    let path = programs.folder().join("vsock");
    // One that was killed leaves its socket behind.
    let _ = fs::remove_file(&path);
    let parts = json!({"vsock": {"guest_cid": 3, "uds_path": path}});
    let args = format!("bare.do=vsock-listen bare.port={PORT} bare.conns={conns}");
    let mut guest = Running::spawn(programs.command(monitor, &args, &parts)?)?;
    let mut lines = BufReader::new(guest.stdout()?).lines();
    lines
        .find(|line| {
            line.as_ref()
                .is_ok_and(|line| line.contains("vsock-listen ready"))
        })
        .ok_or_else(|| io::Error::other("the guest does not listen"))??;
    let figure = measure(&path);
    drop(guest);
    let _ = fs::remove_file(&path);
    figure
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // In one piece: Firecracker does not wait for the rest of a line.
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.last() != Some(&b'\n') {
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"OK ") {
        return Err(io::Error::other("the guest did not take the connection"));
    }
    Ok(stream)
}

/// Megabytes a second that come back.
fn echo(path: &Path, time: Duration) -> io::Result<f64> {
    let stream = connect(path)?;
    let mut sender = stream.try_clone()?;
    let start = Instant::now();
    let sending = thread::spawn(move || {
        let data = [7; CHUNK];
        while start.elapsed() < time {
            sender.write_all(&data)?;
        }
        sender.shutdown(std::net::Shutdown::Write)
    });
    let (mut stream, mut bytes, mut buffer) = (stream, 0, vec![0; 64 * 1024]);
    while start.elapsed() < time {
        match stream.read(&mut buffer)? {
            0 => break,
            count => bytes += count,
        }
    }
    let took = start.elapsed();
    // The sender may be waiting for room.
    stream.shutdown(std::net::Shutdown::Both)?;
    let _ = sending.join();
    Ok(bytes as f64 / 1e6 / took.as_secs_f64())
}

/// Connections a second, one after the other.
fn connections(path: &Path) -> io::Result<f64> {
    let start = Instant::now();
    for _ in 1..CONNECTIONS {
        drop(connect(path)?);
    }
    Ok(f64::from(CONNECTIONS - 1) / start.elapsed().as_secs_f64())
}
