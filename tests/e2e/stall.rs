// SPDX-License-Identifier: Apache-2.0
//! A disk of the host that hangs: the machine, its API and its other disks go on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use brume_tests::api::{ApiVm, eventually};
use brume_tests::vm::SOON;
use serde_json::json;
use tempfile::TempDir;

/// A file system whose writes can be made to hang.
struct HangingFs {
    folder: TempDir,
    mount: PathBuf,
}

/// Writes hang for as long as this lives.
struct Hang<'a>(&'a Path);

impl HangingFs {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(32 << 20).unwrap();
        std::fs::create_dir(&mount).unwrap();
        let made = Self { folder, mount };
        run("mkfs.ext4", &["-q".as_ref(), image.as_ref()]);
        let mount = [
            "-o".as_ref(),
            "loop".as_ref(),
            image.as_ref(),
            made.mount.as_ref(),
        ];
        run("mount", &mount);
        made
    }

    fn disk(&self) -> PathBuf {
        let path = self.mount.join("disk");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        path
    }

    fn hang(&self) -> Hang<'_> {
        run("fsfreeze", &["-f".as_ref(), self.mount.as_ref()]);
        Hang(&self.mount)
    }
}

impl Drop for HangingFs {
    fn drop(&mut self) {
        // It fails if it was never mounted.
        let _ = Command::new("umount").arg(&self.mount).output();
        debug_assert!(self.folder.path().exists());
    }
}

impl Drop for Hang<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.0).output();
    }
}

#[track_caller]
fn run(program: &str, args: &[&std::ffi::OsStr]) {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "this test needs root and a loop device: {program} failed: {said}"
    );
}

/// How many writes to the first disk are done, how many of those failed, how many to the second.
fn progress(api: &ApiVm) -> Option<[u64; 3]> {
    let text = api.vm.stdout();
    let line = text
        .lines()
        .rfind(|line| line.starts_with("bare: blk-two") && line.ends_with(" end"))?;
    let number = |name: &str| {
        let word = line.split(' ').find_map(|word| word.strip_prefix(name));
        word.unwrap().parse().unwrap()
    };
    Some(["first=", "bad=", "second="].map(number))
}

#[test]
fn the_api_and_another_disk_go_on_while_a_disk_hangs() {
    for engine in ["Sync", "Async"] {
        // In this order: the machine can be ended only when nothing hangs any more.
        let hanging = HangingFs::new();
        let api = ApiVm::new();
        let other = api.folder().join("other");
        std::fs::write(&other, vec![0; 1 << 20]).unwrap();
        let drive = |id: &str, path: &Path| {
            json!({
                "drive_id": id, "is_root_device": false, "path_on_host": path,
                "io_engine": engine, "cache_type": "Writeback",
            })
        };
        api.start_bare(
            "bare.do=blk-two bare.ms=60000",
            &[
                ("/drives/first", drive("first", &hanging.disk())),
                ("/drives/second", drive("second", &other)),
            ],
        );
        eventually("both disks are written", || {
            progress(&api).is_some_and(|[first, _, second]| first > 0 && second > 0)
        });
        let hang = hanging.hang();
        // The first stands still while the second goes on, and not because the host does.
        let mut before = progress(&api).unwrap();
        let mut looks = 0;
        eventually("the first disk hangs", || {
            thread::sleep(Duration::from_millis(100));
            let now = progress(&api).unwrap();
            let hangs = now[0] == before[0] && now[2] > before[2];
            looks = if hangs { looks + 1 } else { 0 };
            before = now;
            looks == 5
        });
        for _ in 0..20 {
            api.assert_alive("Running");
            assert_eq!(api.send("GET", "/metrics", "").status, 200);
            let limiter = json!({"ops": {"size": 100_000, "refill_time": 100}});
            for id in ["first", "second"] {
                let patch = json!({"drive_id": id, "rate_limiter": limiter});
                api.done("PATCH", &format!("/drives/{id}"), &patch);
            }
        }
        let meanwhile = progress(&api).unwrap();
        assert_eq!(
            meanwhile[0], before[0],
            "{engine}: it did not hang all the time"
        );
        eventually("the second disk goes on", || {
            progress(&api).unwrap()[2] > meanwhile[2]
        });
        drop(hang);
        eventually("the first disk goes on", || {
            progress(&api).unwrap()[0] > meanwhile[0]
        });
        assert_eq!(progress(&api).unwrap()[1], 0, "{engine}: writes failed");
        api.done("PATCH", "/vm", &json!({"state": "Stopped"}));
        let ApiVm { vm, .. } = api;
        assert_eq!(vm.wait(SOON).status, 0);
    }
}
