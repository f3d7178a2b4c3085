// SPDX-License-Identifier: Apache-2.0
//! Disks: what the guest wrote is what the host finds, on both engines.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use brume_tests::vm::{Outcome, SOON, outcome, run_bare};
use tempfile::TempDir;

const ENGINES: [&str; 2] = ["sync", "async"];
const DISK: u64 = 4 << 20;

/// A folder with a disk full of one byte in it.
pub(crate) fn disk() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    fs::write(&path, vec![0x5a; DISK as usize]).unwrap();
    (folder, path)
}

fn run(args: &str, path: &Path, spec: &str) -> Outcome {
    let mut command = run_bare(args);
    command
        .arg("--disk")
        .arg(format!("{},{spec}", path.display()));
    outcome(command, SOON)
}

#[test]
fn thousands_of_reads_and_writes_give_what_was_written() {
    for engine in ENGINES {
        let (_folder, path) = disk();
        let spec = format!("engine={engine},id=my_disk");
        let check = run("bare.do=blk-check bare.ops=2000 bare.seed=7", &path, &spec);
        let line = check.assert_clean().line("bare: blk-check capacity");
        assert!(
            line.contains("capacity=8192 readonly=false serial=my_disk"),
            "{line}"
        );
        let line = check.line("bare: blk-check reads");
        assert!(line.contains("errors=0 mismatches=0"), "{engine}: {line}");
        // Another machine, that has seen nothing of it, finds the same.
        let verify = run("bare.do=blk-verify bare.ops=2000 bare.seed=7", &path, "ro");
        assert!(
            verify.assert_clean().stdout.contains("mismatches=0"),
            "{verify:#?}"
        );
    }
}

#[test]
fn a_byte_that_the_host_changed_is_noticed() {
    let (_folder, path) = disk();
    run("bare.do=blk-check bare.ops=50", &path, "id=d").assert_clean();
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 12345).unwrap();
    file.write_all_at(&[!byte[0]], 12345).unwrap();
    let verify = run("bare.do=blk-verify bare.ops=50", &path, "ro");
    assert!(!verify.stdout.contains("mismatches=0"), "{verify:#?}");
}

#[test]
fn buffers_in_many_pieces_and_at_odd_addresses_work() {
    for engine in ENGINES {
        let (_folder, path) = disk();
        let outcome = run("bare.do=blk-sg", &path, &format!("engine={engine}"));
        let line = outcome.assert_clean().line("bare: blk-sg ops");
        assert!(line.contains("errors=0 mismatches=0"), "{engine}: {line}");
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for engine in ENGINES {
        let (_folder, path) = disk();
        let outcome = run("bare.do=blk-ro", &path, &format!("ro,engine={engine}"));
        assert_eq!(outcome.status, 0, "{outcome:#?}");
        assert_cases(&outcome, "blk-ro", 6);
        assert!(fs::read(&path).unwrap().iter().all(|&byte| byte == 0x5a));
    }
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes_and_give_space_back() {
    for engine in ENGINES {
        let (_folder, path) = disk();
        let before = fs::metadata(&path).unwrap().blocks();
        let outcome = run("bare.do=blk-discard", &path, &format!("engine={engine}"));
        assert_eq!(outcome.status, 0, "{outcome:#?}");
        assert_cases(&outcome, "blk-discard", 11);
        assert!(
            fs::metadata(&path).unwrap().blocks() < before,
            "{engine}: no hole was made"
        );
        assert_eq!(fs::metadata(&path).unwrap().len(), DISK);
    }
}

#[test]
fn bad_requests_are_answered_with_errors() {
    for engine in ENGINES {
        let (_folder, path) = disk();
        let outcome = run("bare.do=blk-errors", &path, &format!("engine={engine}"));
        assert_eq!(outcome.status, 0, "{outcome:#?}");
        assert_cases(&outcome, "blk-errors", 11);
    }
}

/// Checks that the guest went through at least `least` cases of `step` and liked all of them.
fn assert_cases(outcome: &Outcome, step: &str, least: usize) {
    let start = format!("bare: {step} case=");
    let cases: Vec<_> = outcome
        .stdout
        .lines()
        .filter(|line| line.starts_with(&start))
        .collect();
    assert!(cases.len() >= least, "{} cases: {outcome:#?}", cases.len());
    assert!(
        cases.iter().all(|line| line.contains(" ok=1 ")),
        "{cases:#?}"
    );
}
