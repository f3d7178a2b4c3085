// SPDX-License-Identifier: Apache-2.0
//! What is written is what is read, and nothing else is.

use std::fs;
use std::time::{Duration, Instant};

use brume_api::config::HugePages;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{Backing, map, map_file};

const SIZE: u64 = 4 << 20;

/// A file whose pages are not those that the kernel maps together.
fn memory_of_file() -> MachineMemory {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    map_file(SIZE, file).unwrap()
}

fn mapped(memory: &MachineMemory) -> Vec<u64> {
    let pages = pagemap::find(&memory.regions, memory.size, Wanted::Mapped).unwrap();
    pages.ranges().flatten().collect()
}

#[test]
fn the_pages_that_are_mapped_are_brought_in_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set");
    let memory = MachineMemory::new(map(SIZE, HugePages::None).unwrap(), Backing::Zeros);
    let touched = [3, 4, 5, 700, 1023];
    for page in touched {
        let place = GuestAddress(page * PAGE_SIZE);
        memory.guest.write_obj(1_u8, place).unwrap();
    }
    assert_eq!(save(&memory, &path).unwrap(), 5);
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        r#"{"version":1,"page_size":4096,"memory_size":4194304,"ranges":[[3,3],[700,1],[1023,1]]}"#
    );
    let pages = load(&path, SIZE).unwrap();
    assert_eq!(pages.ranges().flatten().collect::<Vec<_>>(), touched);

    let fresh = memory_of_file();
    assert!(mapped(&fresh).is_empty());
    prefetch(&fresh, pages);
    let begun = Instant::now();
    while mapped(&fresh) != touched {
        assert!(begun.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn files_that_are_no_working_set_of_the_machine_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set");
    let fails = |text: &str, why: &str| {
        fs::write(&path, text).unwrap();
        let error = load(&path, SIZE).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        let said = format!("{error}: {}", source.unwrap_or_default());
        assert!(said.contains(why), "{text:.80}: {said}");
    };
    let with = |version: u32, page: u64, size: u64, ranges: &str| {
        format!(
            r#"{{"version":{version},"page_size":{page},"memory_size":{size},"ranges":{ranges}}}"#
        )
    };
    fails("", "is no working set");
    fails("[]", "is no working set");
    fails(&with(2, 4096, SIZE, "[]"), "it is of version 2");
    fails(
        &with(1, 2 << 20, SIZE, "[]"),
        "its pages have 2097152 bytes",
    );
    fails(
        &with(1, 4096, SIZE * 2, "[]"),
        "with 8388608 bytes of memory",
    );
    fails(&with(1, 4096, SIZE, "[[1024,1]]"), "from page 1024 on");
    fails(&with(1, 4096, SIZE, "[[1020,5]]"), "5 pages from page 1020");
    let beyond = format!("[[{},2]]", u64::MAX);
    fails(&with(1, 4096, SIZE, &beyond), "which are not all there");
    fails(&with(1, 4096, SIZE, "[[-1,2]]"), "is no working set");
    fails(&with(1, 4096, SIZE, "[[1]]"), "is no working set");
    fails(&" ".repeat(1 << 20), "too long");
    // The most that there can be.
    let ranges: Vec<[u64; 2]> = (0..SIZE / PAGE_SIZE / 2).map(|n| [2 * n + 1, 1]).collect();
    let ranges = serde_json::to_string(&ranges).unwrap();
    fs::write(&path, with(1, 4096, SIZE, &ranges)).unwrap();
    assert_eq!(load(&path, SIZE).unwrap().count(), SIZE / PAGE_SIZE / 2);
    let folder = load(folder.path(), SIZE).unwrap_err();
    assert!(folder.to_string().contains("cannot be read"), "{folder}");
    let missing = load(Path::new("/there/is/none"), SIZE).unwrap_err();
    assert!(matches!(missing, WorkingSetError::Read { .. }));
}

#[test]
fn a_file_that_cannot_be_written_is_told() {
    let memory = memory_of_file();
    let error = save(&memory, Path::new("/there/is/none")).unwrap_err();
    assert!(error.to_string().contains("/there/is/none"), "{error}");
}
