// SPDX-License-Identifier: Apache-2.0
//! Memory that is made smaller on its way over a slow network between two hosts.

use brume_api::MigrationStatus;
use brume_tests::lan::Lan;
use brume_tests::migration::{Link, Pair, Setup, Side};
use serde_json::json;

use crate::migration::{LIMIT, assert_settled};

/// What the guest has written, in bytes.
const TOUCHED: u64 = 32 << 20;
/// Words of it come in eights.
const ARGS: &str = "bare.touch=32 bare.alike=8";
/// Of what a network carries some are headers.
const HEADERS: u64 = 20;

/// Moves a guest over a slow line; how it went, and how many bytes the line has carried.
fn moved(compression: &str, mode: &str, connections: u32) -> (MigrationStatus, u64) {
    let mut pair = Pair::start(&Setup {
        args: ARGS,
        link: Link::TwoHosts,
        ..Setup::default()
    });
    let hash = pair.live(Side::Source).hash();
    let lan = |pair: &Pair| pair.lan.as_ref().map(Lan::sent_by_first).unwrap();
    pair.lan.as_ref().unwrap().slow_down("100mbit");
    let before = lan(&pair);
    let body = json!({
        "compression": compression, "mode": mode, "connections": connections,
    });
    let status = pair.moved(&body, LIMIT);
    let carried = lan(&pair) - before;
    assert_eq!(pair.live(Side::Target).hash(), hash);
    assert_settled(&mut pair);
    println!("{compression} {mode} {connections}: {carried} {status:?}");
    (status, carried)
}

/// Checks that what is told of a move is what the line has seen.
#[track_caller]
fn assert_fits(status: &MigrationStatus, carried: u64) {
    let least = status.bytes;
    let most = least + least / HEADERS * 2 + (1 << 20);
    assert!((least..most).contains(&carried), "{carried} for {status:?}");
    let ratio = status.pages * 4096 * 100 / status.bytes;
    let told = u64::from(status.compression_ratio_percent);
    // Headers of frames are no pages, and pages of the last pass are none of a pass before.
    assert!(
        (ratio..ratio + ratio / 5).contains(&told),
        "{ratio}% for {status:?}"
    );
}

#[test]
fn memory_as_it_is_takes_all_its_bytes() {
    let (status, carried) = moved("None", "PreCopy", 1);
    assert!(carried > TOUCHED, "{carried} for {status:?}");
    assert_eq!(status.compression_ratio_percent, 100);
}

#[test]
fn memory_that_is_compressed_takes_a_part_of_its_bytes() {
    for (compression, part) in [("Lz4", 4), ("Zstd", 4), ("Auto", 2)] {
        let (status, carried) = moved(compression, "PreCopy", 1);
        assert!(carried < TOUCHED / part, "{carried} for {status:?}");
        assert!(status.pages * 4096 >= TOUCHED, "{status:?}");
        assert_fits(&status, carried);
    }
}

#[test]
fn memory_is_compressed_on_every_connection_and_when_it_follows() {
    for (compression, mode, connections) in [("Lz4", "PreCopy", 4), ("Zstd", "PostCopy", 2)] {
        let (status, carried) = moved(compression, mode, connections);
        assert!(carried < TOUCHED / 4, "{carried} for {status:?}");
        assert_fits(&status, carried);
    }
}
