// SPDX-License-Identifier: Apache-2.0
//! Disks that are filled at the target.

use std::os::unix::fs::MetadataExt;

use brume_api::config::Drive;

use super::*;

fn config(paths: &[&Path]) -> VmConfig {
    let drive = |(number, path): (usize, &&Path)| Drive {
        drive_id: format!("d{number}"),
        path_on_host: Some(path.to_path_buf()),
        ..Drive::default()
    };
    VmConfig {
        drives: paths.iter().enumerate().map(drive).collect(),
        ..VmConfig::default()
    }
}

fn offers(sizes: &[u64]) -> Vec<DriveOffer> {
    let offer = |(number, size): (usize, &u64)| DriveOffer {
        id: format!("d{number}"),
        size: Some(*size),
    };
    sizes.iter().enumerate().map(offer).collect()
}

fn reasons(drives: &[DriveOffer], config: &VmConfig) -> String {
    match DisksIn::prepare(drives, config) {
        Ok(_) => panic!("it is taken"),
        Err(reasons) => reasons.join("; "),
    }
}

#[test]
fn a_file_that_was_made_goes_unless_the_machine_arrives() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["made", "there"].map(|name| folder.path().join(name));
    fs::write(&paths[1], [7; 8192]).unwrap();
    let (drives, config) = (offers(&[1 << 40, 8192]), config(&[&paths[0], &paths[1]]));

    let mut disks = DisksIn::prepare(&drives, &config).unwrap();
    let made = fs::metadata(&paths[0]).unwrap();
    assert_eq!(
        (made.len(), made.blocks(), made.mode() & 0o777),
        (1 << 40, 0, 0o600)
    );
    // It is not touched before something comes.
    assert_eq!(fs::read(&paths[1]).unwrap(), [7; 8192]);
    let progress = Progress::default();
    disks.write((0, 1 << 39), &[1; 512], &progress).unwrap();
    disks.zero(1, 0, 8192).unwrap();
    disks.synced().unwrap();
    drop(disks);
    assert!(!paths[0].exists());
    assert_eq!(fs::read(&paths[1]).unwrap(), [0; 8192]);

    let mut disks = DisksIn::prepare(&drives, &config).unwrap();
    disks.keep();
    drop(disks);
    assert!(paths.iter().all(|path| path.exists()));
}

#[test]
fn what_somebody_else_has_put_there_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made");
    let disks = DisksIn::prepare(&offers(&[512]), &config(&[&path])).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "mine").unwrap();
    drop(disks);
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}

#[test]
fn what_does_not_fit_is_told_drive_by_drive() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("larger"), [7; 8192]).unwrap();
    fs::write(path("locked"), [7; 4096]).unwrap();
    let locked = CopiedImage::open(&path("locked")).unwrap();
    let paths = ["new", "larger", "locked", "no/folder"].map(path);
    let [new, larger, locked_path, nowhere] = &paths;
    let config = config(&[new, larger, locked_path, nowhere, folder.path()]);
    let told = reasons(&offers(&[4096; 5]), &config);
    for words in [
        "drive \"d1\" has 4096 bytes at the source",
        "larger has 8192 at the target",
        "locked is in use by another machine",
        "no/folder cannot be made",
        "is a directory",
    ] {
        assert!(told.contains(words), "{told}");
    }
    assert!(!told.contains("d0"), "{told}");
    assert!(!new.exists());
    assert_eq!(fs::read(larger).unwrap(), [7; 8192]);
    drop(locked);
}

#[test]
fn a_source_that_tells_of_other_drives_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let config = config(&[&one, &two]);
    for offers in [&offers(&[512])[..], &offers(&[512; 3]), &[]] {
        reasons(offers, &config);
    }
    let twice = [offers(&[512; 1]), offers(&[512; 1])].concat();
    let told = reasons(&twice, &config);
    assert!(told.contains("in use"), "{told}");
    let mut unknown = offers(&[512; 2]);
    unknown[1].size = None;
    reasons(&unknown, &config);
    assert!(!one.exists() && !two.exists());
}

#[test]
fn nothing_is_written_where_there_is_no_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made");
    let mut disks = DisksIn::prepare(&offers(&[4096]), &config(&[&path])).unwrap();
    let progress = Progress::default();
    for (drive, offset) in [(1, 0), (u32::MAX, 0), (0, 4095), (0, u64::MAX)] {
        let told = disks
            .write((drive, offset), &[1; 2], &progress)
            .unwrap_err();
        assert!(told.starts_with("the source has sent blocks "), "{told}");
        disks.zero(drive, offset, u64::MAX).unwrap_err();
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
    assert_eq!(progress.get().disk_bytes, 0);
}
