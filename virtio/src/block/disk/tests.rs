// SPDX-License-Identifier: Apache-2.0
//! Which images are taken, and who may have them at once.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;

use tempfile::{NamedTempFile, TempDir};

use super::*;

fn image(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

#[track_caller]
fn kind_of(path: &Path) -> &'static str {
    match Disk::open(path, true, true) {
        Err(BlockError::Kind { kind, .. }) => kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_files_and_block_devices_are_images() {
    let dir = TempDir::new().unwrap();
    assert_eq!(kind_of(dir.path()), "directory");
    assert_eq!(kind_of(Path::new("/dev/null")), "character device");
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert_eq!(kind_of(&socket), "socket");
    let fifo = dir.path().join("fifo");
    make_fifo(&fifo);
    assert_eq!(kind_of(&fifo), "FIFO");
}

#[allow(unsafe_code)]
fn make_fifo(path: &Path) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is a string that ends in a zero byte.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
}

#[test]
fn what_cannot_be_opened_is_named_with_what_to_do() {
    let error = Disk::open(Path::new("/nowhere/disk.img"), false, true).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/nowhere/disk.img"), "{text}");
    assert!(text.contains("writing") && text.contains("check"), "{text}");
    assert!(matches!(error, BlockError::Open { .. }));
}

#[test]
fn a_last_part_of_a_sector_is_left_out() {
    for (bytes, sectors) in [(0, 0), (511, 0), (512, 1), (1023, 1), (1 << 30, 1 << 21)] {
        let file = image(bytes);
        let disk = Disk::open(file.path(), false, true).unwrap();
        assert_eq!(disk.sectors, sectors, "{bytes} bytes");
    }
}

#[test]
fn block_sizes_are_ones_a_disk_can_have() {
    let disk = Disk::open(image(4096).path(), true, true).unwrap();
    assert_eq!(disk.logical_block, 512);
    assert!(disk.physical_block.is_power_of_two() && disk.physical_block >= 512);
    for (size, expected) in [
        (512, 512),
        (4096, 4096),
        (0, 4096),
        (1000, 4096),
        (256, 4096),
        (1 << 20, 1 << 20),
        (1 << 21, 4096),
        (1 << 40, 4096),
        (u64::MAX, 4096),
    ] {
        assert_eq!(block_size(size, 4096), expected, "{size}");
    }
}

#[test]
fn a_disk_has_one_writer_or_any_number_of_readers() {
    let file = image(4096);
    let open = |read_only| Disk::open(file.path(), read_only, true);
    let in_use = |result| matches!(result, Err(BlockError::InUse { .. }));

    let writer = open(false).unwrap();
    assert!(in_use(open(false)));
    assert!(in_use(open(true)));
    Disk::open(file.path(), false, false).expect("without a lock nobody is in the way");
    drop(writer);

    let reader = open(true).unwrap();
    let other = open(true).unwrap();
    assert!(in_use(open(false)));
    drop((reader, other));
    open(false).expect("the locks are gone with their disks");
}
