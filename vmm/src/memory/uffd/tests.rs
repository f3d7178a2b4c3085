// SPDX-License-Identifier: Apache-2.0
//! What a handler is told, and what becomes of one that does not answer.

use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use serde_json::json;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::page_set::PageSet;

const SIZE: u64 = 4 << 20;

fn socket() -> (TempDir, PathBuf, UnixListener) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("uffd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    (folder, path, listener)
}

/// What one connection brought, and the connection.
fn accept(listener: UnixListener) -> JoinHandle<(String, File, UnixStream)> {
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut text = vec![0; 4096];
        let (len, file) = stream.recv_with_fd(&mut text).unwrap();
        text.truncate(len);
        (String::from_utf8(text).unwrap(), file.unwrap(), stream)
    })
}

/// Fills the memory at the host address `dst` with `byte`s.
fn fill(uffd: &File, dst: u64, byte: u8) {
    let page = vec![byte; 4096];
    let mut copy = Copy {
        to: dst,
        from: page.as_ptr() as u64,
        len: PAGE_SIZE,
        mode: 0,
        copied: 0,
    };
    // SAFETY: the kernel reads a page from `from`, which has as much, and puts it where there is
    // none yet in memory that was registered for that.
    let result = unsafe { ioctl_with_mut_ref(uffd, UFFDIO_COPY(), &mut copy) };
    assert_eq!((result, copy.copied), (0, 4096));
}

#[test]
fn a_handler_is_told_where_the_memory_is_and_brings_it() {
    // Enough for a part behind the hole for devices.
    let size = 4 << 30;
    let (_folder, path, listener) = socket();
    let handler = accept(listener);
    let memory = map_served(size, HugePages::None, &path).unwrap();
    let (text, uffd, stream) = handler.join().unwrap();
    let [low, high] = memory.regions[..] else {
        panic!("{:?}", memory.regions);
    };
    let part = |region: Region| {
        json!({
            "base_host_virt_addr": region.host_address, "size": region.size,
            "offset": region.offset, "page_size": 4096, "page_size_kib": 4096,
        })
    };
    let told: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(told, json!([part(low), part(high)]));
    assert_eq!((low.offset, high.offset), (0, low.size));
    // Nothing comes after it, and the connection stays.
    stream.set_nonblocking(true).unwrap();
    let mut more = [0; 1];
    let nothing = stream.recv_with_fd(&mut more).unwrap_err();
    assert_eq!(nothing.errno(), libc::EAGAIN);

    let guest = memory.guest.clone();
    let touch = thread::spawn(move || guest.read_obj::<u8>(GuestAddress(5 * PAGE_SIZE)).unwrap());
    fill(&uffd, low.host_address as u64 + 5 * PAGE_SIZE, 7);
    assert_eq!(touch.join().unwrap(), 7);
    drop(memory);
}

#[test]
fn memory_that_is_not_served_holds_nobody_up_for_ever() {
    let (_folder, path, listener) = socket();
    let handler = accept(listener);
    let memory = map_served(SIZE, HugePages::None, &path).unwrap();
    let (_, uffd, stream) = handler.join().unwrap();
    fill(&uffd, memory.regions[0].host_address as u64, 1);
    let mut pages = PageSet::empty(SIZE);
    pages.insert(0);
    memory.fetch(&pages).unwrap();
    pages.insert(1);
    // It has hung up, but the process lives: it may serve on.
    drop(stream);
    let silent = memory.fetch(&pages).unwrap_err();
    assert!(matches!(silent, UffdError::Silent { .. }), "{silent}");
    let handler = memory.handler.clone().unwrap();
    let read = || {
        memory
            .guest
            .read_obj::<u8>(GuestAddress(9 * PAGE_SIZE))
            .map_err(|error| UffdError::ReadIn(io::Error::other(error)))
    };
    let silent = handler.guard(read).unwrap_err();
    assert!(matches!(silent, UffdError::Silent { .. }), "{silent}");
}

#[test]
fn nobody_at_the_socket_is_told_in_the_words_of_firecracker() {
    let (_folder, path, listener) = socket();
    drop(listener);
    for path in [&*path, Path::new("/there/is/none")] {
        let error = map_served(SIZE, HugePages::None, path).err().unwrap();
        assert!(matches!(error, UffdError::Connect(_)));
        assert_eq!(error.to_string(), "Failed to connect to UDS Unix stream");
    }
}
