// SPDX-License-Identifier: Apache-2.0
//! What has to be built before the tests, and what has to be there.

use std::env;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

/// The folder of the whole project.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .expect("the project's folder")
}

/// The program under test: `$BRUME_BIN`, or the one that `make build` leaves.
///
/// # Panics
///
/// It is not there, or this machine has no /dev/kvm for it.
pub fn brume() -> PathBuf {
    require_kvm();
    let built = root().join("target/release/brume");
    existing(
        env::var_os("BRUME_BIN").map_or(built, PathBuf::from),
        "build",
    )
}

/// The bare guest, an ELF file.
pub fn bare() -> PathBuf {
    existing(guest("bare.elf"), "bare")
}

/// The Linux kernel as an ELF file.
pub fn vmlinux() -> PathBuf {
    existing(guest("vmlinux"), "guest")
}

/// The Linux kernel as a bzImage.
pub fn bzimage() -> PathBuf {
    existing(guest("bzImage"), "guest")
}

/// The Linux guest's initramfs.
pub fn initramfs() -> PathBuf {
    existing(guest("initramfs.cpio"), "guest")
}

/// The Linux guest's root file system, not to be written to.
pub fn rootfs() -> PathBuf {
    existing(guest("rootfs.ext4"), "guest")
}

/// The kernel arguments that Linux needs on this host.
pub fn linux_args() -> String {
    let file = root().join("resources/guest/cmdline.txt");
    fs::read_to_string(file)
        .expect("cmdline.txt")
        .trim()
        .to_owned()
}

fn guest(name: &str) -> PathBuf {
    root().join("target/guest").join(name)
}

fn existing(path: PathBuf, target: &str) -> PathBuf {
    assert!(
        path.is_file(),
        "{} is missing; run `make {target}`",
        path.display()
    );
    path
}

fn require_kvm() {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        panic!("the end-to-end tests need /dev/kvm, which cannot be opened: {error}");
    }
}
