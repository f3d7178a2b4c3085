// SPDX-License-Identifier: Apache-2.0
//! Holes are found, made and kept.

use std::io::Read;
use std::os::unix::fs::MetadataExt;

use super::*;

/// A block of most file systems, in bytes.
const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = 4096;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

/// A file of 64 blocks of which blocks 3, 4 and 40 have data.
fn sparse() -> File {
    let file = file();
    file.set_len(64 * BLOCK).unwrap();
    file.write_all_at(&[7; 2 * BLOCK_BYTES], 3 * BLOCK).unwrap();
    file.write_all_at(&[8; 1], 40 * BLOCK).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn data_is_where_it_was_written() {
    let file = sparse();
    let expected = [3 * BLOCK..5 * BLOCK, 40 * BLOCK..41 * BLOCK];
    assert_eq!(data_ranges(&file, 64 * BLOCK).unwrap(), expected);
    assert_eq!(data_ranges(&file, u64::MAX).unwrap(), expected);
    let part = data_ranges(&file, 4 * BLOCK + 1).unwrap();
    assert_eq!(
        part.as_slice(),
        std::slice::from_ref(&(3 * BLOCK..4 * BLOCK + 1))
    );
    assert!(data_ranges(&file, 3 * BLOCK).unwrap().is_empty());
    assert!(data_ranges(&file, 0).unwrap().is_empty());
}

#[test]
fn a_punched_hole_is_zeros_and_takes_no_space() {
    let file = sparse();
    punch_hole(&file, &(3 * BLOCK..4 * BLOCK)).unwrap();
    assert!(is_hole(&file, &(3 * BLOCK..4 * BLOCK)).unwrap());
    assert!(is_hole(&file, &(60 * BLOCK..64 * BLOCK)).unwrap());
    assert!(!is_hole(&file, &(3 * BLOCK..4 * BLOCK + 1)).unwrap());
    let left = data_ranges(&file, 64 * BLOCK).unwrap();
    assert_eq!(left, [4 * BLOCK..5 * BLOCK, 40 * BLOCK..41 * BLOCK]);
    assert_eq!(file.metadata().unwrap().len(), 64 * BLOCK);
    let mut block = [1; BLOCK_BYTES];
    file.read_exact_at(&mut block, 3 * BLOCK).unwrap();
    assert_eq!(block, [0; BLOCK_BYTES]);
    assert!(punch_hole(&file, &(0..0)).is_err());
}

#[test]
fn a_copy_has_the_holes_of_the_original() {
    let (from, to) = (sparse(), file());
    let method = clone_file(&from, &to, 64 * BLOCK).unwrap();
    assert_ne!(method, CopyMethod::ReadWrite, "the kernel can do better");
    assert_eq!(content(&to), content(&from));
    let blocks = |file: &File| file.metadata().unwrap().blocks();
    assert_eq!(blocks(&to), blocks(&from));
    let part = file();
    clone_file(&from, &part, 4 * BLOCK + 1).unwrap();
    assert_eq!(content(&part), content(&from)[..4 * BLOCK_BYTES + 1]);
    assert!(clone_file(&from, &file(), 64 * BLOCK + 1).is_err());
}

#[test]
fn each_way_of_copying_copies_the_same() {
    for method in [
        CopyMethod::Clone,
        CopyMethod::CopyRange,
        CopyMethod::ReadWrite,
    ] {
        let (from, to) = (sparse(), file());
        to.set_len(64 * BLOCK).unwrap();
        let mut copier = Copier::new(&from, &to);
        copier.method = method;
        for range in data_ranges(&from, 64 * BLOCK).unwrap() {
            copier.copy(range).unwrap();
        }
        assert_eq!(content(&to), content(&from), "{method:?}");
    }
}

#[test]
fn more_than_one_buffer_is_read_and_written() {
    let (from, to) = (file(), file());
    let bytes = (0..=255).cycle().take(2 * BUFFER_BYTES + 17);
    let bytes = bytes.collect::<Vec<u8>>();
    from.write_all_at(&bytes, 0).unwrap();
    read_write(&from, &to, 0..bytes.len() as u64).unwrap();
    assert_eq!(content(&to), bytes);
}

#[test]
fn a_source_that_is_cut_off_meanwhile_is_an_error() {
    let (from, to) = (sparse(), file());
    let mut copier = Copier::new(&from, &to);
    let beyond = copier.copy(63 * BLOCK..65 * BLOCK).unwrap_err();
    assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn what_cannot_be_copied_in_the_kernel_is_read_and_written() {
    // The kernel does not copy ranges of a pseudo file, and its length is not known either.
    let from = File::open("/proc/self/status").unwrap();
    let mut start = [0; 5];
    (&from).read_exact(&mut start).unwrap();
    let to = file();
    let mut copier = Copier::new(&from, &to);
    copier.copy(0..5).unwrap();
    assert_eq!(copier.method, CopyMethod::ReadWrite);
    assert_eq!(content(&to), start);
}
