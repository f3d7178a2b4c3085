// SPDX-License-Identifier: Apache-2.0
//! Disks that are sent.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use brume_api::config::HugePages;
use brume_migration::{Channel, Link, Received};
use brume_virtio::block::{Block, BlockConfig, CopiedImage, Locking};

use super::super::lanes::Lane;
use super::*;
use crate::memory::{self, Backing, MachineMemory};

const MIB: u64 = 1 << 20;

#[test]
fn zeros_are_told_apart_from_data() {
    let mut bytes = vec![0; 5 * PIECE + 10];
    bytes[PIECE] = 1;
    bytes[3 * PIECE - 1] = 1;
    let told = |bytes: &[u8]| -> Vec<_> {
        runs(bytes)
            .into_iter()
            .map(|(zero, run)| (zero, run.len()))
            .collect()
    };
    let expected = [(true, PIECE), (false, 2 * PIECE), (true, 2 * PIECE + 10)];
    assert_eq!(told(&bytes), expected);
    bytes[5 * PIECE + 9] = 1;
    assert_eq!(told(&bytes)[2..], [(true, 2 * PIECE), (false, 10)]);
    assert_eq!(told(&[]), []);
}

#[test]
fn holes_are_found_in_a_part_of_a_file() {
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(4 * MIB).unwrap();
    file.write_all_at(&[1; 4096], MIB).unwrap();
    let mut find = |range: Range<u64>| next_data(&mut file, &range);
    assert_eq!(find(0..4 * MIB), Some(MIB..MIB + 4096));
    assert_eq!(find(MIB + 512..MIB + 1024), Some(MIB + 512..MIB + 1024));
    assert_eq!(find(0..MIB), None);
    assert_eq!(find(MIB + 4096..4 * MIB), None);
}

/// A target that writes what it gets to an image, until the end; how many bytes of data that were.
fn receive(stream: UnixStream, path: &Path) -> u64 {
    let mut channel = Channel::new(Link::from_unix(stream).unwrap());
    let image = CopiedImage::open(path).unwrap();
    let mut data = 0;
    loop {
        match channel.receive().unwrap() {
            Received::Disk {
                drive: 0,
                offset,
                bytes,
            } => {
                image.write(offset, bytes).unwrap();
                data += bytes.len() as u64;
            }
            Received::DiskZeros {
                drive: 0,
                offset,
                length,
            } => image.zero(offset, length).unwrap(),
            Received::Message(Message::DisksEnded { last: false }) => {
                channel.send(&Message::KeepAlive).unwrap();
                channel.send(&Message::DisksTaken).unwrap();
            }
            Received::Message(Message::DisksEnded { last: true }) => return data,
            other => panic!("{other:?}"),
        }
    }
}

fn open(path: &Path, locking: Locking) -> Block {
    Block::open(BlockConfig {
        id: "d".into(),
        path: path.into(),
        read_only: false,
        engine: Default::default(),
        cache: Default::default(),
        locking,
        limits: Default::default(),
    })
    .unwrap()
}

fn lanes(stream: UnixStream, control: &Control) -> Lanes {
    let guest = memory::map(2 * MIB, HugePages::default()).unwrap();
    let memory = Arc::new(MachineMemory::new(guest, Backing::Zeros));
    let channel = Channel::new(Link::from_unix(stream).unwrap());
    let lane = Lane::new(channel, memory, control.clone());
    Lanes::new(lane, Vec::new()).unwrap()
}

fn control() -> Control {
    let request = serde_json::json!({"destination": "unix:a"});
    Control::sending(&serde_json::from_value(request).unwrap())
}

struct Files {
    _folder: tempfile::TempDir,
    here: PathBuf,
    there: PathBuf,
}

/// An image with data at 1 and 3 MiB, and another one of the same size full of something else.
fn files() -> Files {
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (folder.path().join("here"), folder.path().join("there"));
    let file = File::create_new(&here).unwrap();
    file.set_len(200 * MIB + 512).unwrap();
    file.write_all_at(&vec![1; 1 << 20], MIB).unwrap();
    file.write_all_at(&vec![3; 4096], 3 * MIB).unwrap();
    file.write_all_at(&vec![0; 1 << 20], 5 * MIB).unwrap();
    let other = File::create_new(&there).unwrap();
    other.set_len(200 * MIB + 512).unwrap();
    for at in [0, 2 * MIB, 199 * MIB] {
        other.write_all_at(&vec![9; 1 << 20], at).unwrap();
    }
    Files {
        _folder: folder,
        here,
        there,
    }
}

#[test]
fn an_image_becomes_the_same_whatever_was_there_and_is_written() {
    let files = files();
    let control = control();
    let progress = Progress::default();
    let (one, other) = UnixStream::pair().unwrap();
    let there = files.there.clone();
    let target = thread::spawn(move || receive(other, &there));
    let mut lanes = lanes(one, &control);
    let block = open(&files.here, Locking::Off);
    let drive = block.control();
    let drives = [("d".to_owned(), drive.clone())].into_iter();
    let mut disks = Disks::of(drives).unwrap();
    assert_eq!(disks.sizes().collect::<Vec<_>>(), [("d", 200 * MIB + 512)]);

    disks.copy(&mut lanes, &control, &progress).unwrap();
    assert_eq!((disks.left_pages(), drive.log().bytes()), (0, 0));
    assert_eq!(progress.get().disk_bytes, MIB + 4096);

    // The blocks that are written again are all of them here.
    let file = File::options().write(true).open(&files.here).unwrap();
    file.write_all_at(&[7; 10_000], 100 * MIB - 77).unwrap();
    file.write_all_at(&vec![0; 1 << 20], MIB).unwrap();
    drive.set_image(&files.here).unwrap();
    assert!(disks.left_pages() >= 200 * MIB / PAGE_SIZE);
    disks.pass(&mut lanes, &progress).unwrap();
    assert_eq!(disks.left_pages(), 0);
    file.write_all_at(&[8; 512], 200 * MIB).unwrap();
    drive.set_image(&files.here).unwrap();
    disks.last(&mut lanes, &progress).unwrap();

    let data = target.join().unwrap();
    assert_eq!(progress.get().disk_bytes, data);
    let [here, there] = [&files.here, &files.there].map(|path| fs::read(path).unwrap());
    assert!(here == there);
    let blocks = fs::metadata(&files.there).unwrap().blocks();
    assert!(blocks * 512 < MIB, "{blocks} blocks are in use");
    drop(disks);
    assert!(drive.log().take().is_none());
}

#[test]
fn an_image_is_locked_while_it_is_copied() {
    for (locking, after) in [(Locking::Off, true), (Locking::Now, false)] {
        let files = files();
        let block = open(&files.here, locking);
        let drives = || [("d".to_owned(), block.control())].into_iter();
        let disks = Disks::of(drives()).unwrap();
        CopiedImage::open(&files.here).unwrap_err();
        drop(disks);
        assert_eq!(CopiedImage::open(&files.here).is_ok(), after);
        // Nothing has been tracked, and the lock can be had again.
        drop(Disks::of(drives()).unwrap());
    }
}

#[test]
fn what_is_called_off_ends_soon() {
    let files = files();
    let control = control();
    let (one, _other) = UnixStream::pair().unwrap();
    let mut lanes = lanes(one, &control);
    let block = open(&files.here, Locking::Off);
    let drives = [("d".to_owned(), block.control())].into_iter();
    let mut disks = Disks::of(drives).unwrap();
    control.cancel();
    let copied = disks.copy(&mut lanes, &control, &Progress::default());
    assert!(matches!(copied, Err(SourceError::Cancelled)), "{copied:?}");
    drop(disks);
    assert!(block.control().log().take().is_none());
}
