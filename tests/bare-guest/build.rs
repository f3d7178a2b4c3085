// SPDX-License-Identifier: Apache-2.0
//! Links the guest as a static image at a fixed address instead of a Linux program.
//!
//! The flags are here and not in `.cargo/config.toml`, so that the one command builds it from any
//! directory and whatever `RUSTFLAGS` holds.

fn main() {
    let dir = env!("CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=src/boot.s");
    for flag in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,--gc-sections",
    ] {
        println!("cargo:rustc-link-arg-bins={flag}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{dir}/link.ld");
}
