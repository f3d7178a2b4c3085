// SPDX-License-Identifier: Apache-2.0
//! The device with its worker thread, on a real file.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{BUFFERS, Driver, Used, memory, readable, writable};

fn config(path: &std::path::Path, engine: Engine) -> BlockConfig {
    BlockConfig {
        id: "rootfs".into(),
        path: path.into(),
        read_only: false,
        engine,
        cache: CacheType::Writeback,
        lock: true,
    }
}

fn wait_used(driver: &mut Driver) -> Used {
    let start = Instant::now();
    loop {
        if let Some(used) = driver.take_used() {
            return used;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "no answer");
        std::thread::yield_now();
    }
}

#[test]
fn smoke() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file.as_file().write_all_at(&[7; 512], 512).unwrap();
    let mut block = Block::open(config(file.path(), Engine::Sync)).unwrap();
    let mut driver = Driver::new(memory(), 256);
    let interrupts = Arc::new(AtomicU32::new(0));
    block
        .start(driver.context(block.features(), &interrupts))
        .unwrap();
    let header = GuestAddress(BUFFERS);
    driver.memory.write_obj(0u64, header).unwrap();
    driver
        .memory
        .write_obj(1u64, GuestAddress(BUFFERS + 8))
        .unwrap();
    driver.add(&[
        readable(BUFFERS, 16),
        writable(BUFFERS + 0x1000, 512),
        writable(BUFFERS + 32, 1),
    ]);
    driver.kick();
    assert_eq!(wait_used(&mut driver), Used { head: 0, len: 513 });
    let mut data = [0; 512];
    driver
        .memory
        .read_slice(&mut data, GuestAddress(BUFFERS + 0x1000))
        .unwrap();
    assert_eq!(data, [7; 512]);
    assert!(fs::metadata(file.path()).is_ok());
    block.stop();
}
