// SPDX-License-Identifier: Apache-2.0
//! Block requests of every kind beside plain reads and writes: scattered buffers, discard, zeroes,
//! a read-only disk, and requests that must fail. One line for each case, `ok=1` or `ok=0`.

use crate::blk::{self, Blk, SECTOR, kind, status};
use crate::console::say;
use crate::params;
use crate::pattern;
use crate::ring::MAX_PIECES;
use crate::rng::Rng;
use alloc::vec::Vec;

/// Tells how a case came out.
fn verdict(step: &str, case: &str, ok: bool, detail: core::fmt::Arguments<'_>) {
    say!("{step} case={case} ok={} {detail}", u8::from(ok));
}

/// Fills whole sectors from `sector` on with the pattern of a generation.
fn fill(bytes: &mut [u8], sector: u64, generation: u64) {
    let seed = params::number("bare.seed", 1);
    for (at, bytes) in (sector..).zip(bytes.chunks_mut(SECTOR)) {
        pattern::fill(bytes, seed, at, generation);
    }
}

fn holds(bytes: &[u8], sector: u64, generation: u64) -> bool {
    let seed = params::number("bare.seed", 1);
    (sector..)
        .zip(bytes.chunks(SECTOR))
        .all(|(at, bytes)| pattern::matches(bytes, seed, at, generation))
}

/// Cuts `bytes` at random into `pieces` parts of at least one byte.
fn cut<'a>(mut bytes: &'a mut [u8], pieces: usize, rng: &mut Rng) -> Vec<&'a mut [u8]> {
    let mut parts = Vec::with_capacity(pieces);
    for left in (1..pieces).rev() {
        let room = bytes.len() - left;
        let (part, rest) = bytes.split_at_mut(1 + rng.below(room as u64) as usize);
        parts.push(part);
        bytes = rest;
    }
    parts.push(bytes);
    parts
}

/// `blk-sg`: `bare.ops` writes and reads whose data lies in many pieces of any length, with the
/// header in one or two pieces.
pub fn scattered() {
    let mut blk = Blk::open();
    let mut rng = Rng::new(params::number("bare.seed", 1));
    let ops = params::number("bare.ops", 500);
    let seg_max = if blk.features & blk::SEG_MAX != 0 {
        blk.config(12)
    } else {
        1
    };
    let most = (seg_max as usize).clamp(1, MAX_PIECES - 4);
    let window = params::number("bare.sectors", 32768).min(blk.capacity);
    let memory = blk::buffer(64 * SECTOR);
    let (mut errors, mut mismatches) = (0, 0);
    for generation in 1..=ops {
        let count = 1 + rng.below(64.min(window));
        let sector = rng.below(window - count + 1);
        let data = &mut memory[..count as usize * SECTOR];
        blk.split_header = rng.below(2) == 1;
        let pieces = 1 + rng.below(most as u64) as usize;
        fill(data, sector, generation);
        let parts: Vec<&[u8]> = cut(data, pieces, &mut rng)
            .into_iter()
            .map(|p| &*p)
            .collect();
        let written = blk.request(kind::OUT, sector, &parts, &mut []);
        data.fill(0xa5);
        let pieces = 1 + rng.below(most as u64) as usize;
        let mut parts = cut(data, pieces, &mut rng);
        let read = blk.request(kind::IN, sector, &[], &mut parts);
        let expected = (status::OK, count as u32 * SECTOR as u32 + 1);
        errors += u64::from(written != (status::OK, 1)) + u64::from(read != expected);
        mismatches += u64::from(!holds(data, sector, generation));
    }
    say!(
        "blk-sg ops={ops} errors={errors} mismatches={mismatches} seg_max={seg_max} pieces={most}"
    );
}

/// `blk-ro`: a read-only disk says so, reads, and refuses to change.
pub fn read_only() {
    let step = "blk-ro";
    let mut blk = Blk::open();
    let data = blk::buffer(SECTOR);
    let flag = blk.features & blk::RO != 0;
    verdict(
        step,
        "flag",
        flag,
        format_args!("features={:#x}", blk.features),
    );
    let before = (blk.read(0, data), pattern_sum(data));
    verdict(
        step,
        "read",
        before.0 == status::OK,
        format_args!("status={}", before.0),
    );
    data.fill(0x5a);
    let code = blk.write(0, data);
    verdict(
        step,
        "write",
        code == status::IO_ERROR,
        format_args!("status={code}"),
    );
    for (case, kind) in [
        ("discard", kind::DISCARD),
        ("write-zeroes", kind::WRITE_ZEROES),
    ] {
        let code = blk.request(kind, 0, &[&segment(0, 1, 0)], &mut []).0;
        let ok = code == status::IO_ERROR || code == status::UNSUPPORTED;
        verdict(step, case, ok, format_args!("status={code}"));
    }
    let after = (blk.read(0, data), pattern_sum(data));
    verdict(
        step,
        "unchanged",
        before == after,
        format_args!("status={}", after.0),
    );
}

/// A number that two equal buffers share.
fn pattern_sum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |sum, &byte| pattern::mix(sum ^ u64::from(byte)))
}

/// `struct virtio_blk_discard_write_zeroes`.
fn segment(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&count.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// `blk-discard`: discard and write-zeroes, in one range and in two, with what they must leave
/// alone, and with what they must refuse.
pub fn discard() {
    let step = "blk-discard";
    let mut blk = Blk::open();
    let offered = blk::DISCARD | blk::WRITE_ZEROES;
    verdict(
        step,
        "offered",
        blk.features & offered == offered,
        format_args!(
            "max_discard={} discard_segments={} max_zeroes={} zeroes_segments={} unmap={}",
            blk.config(36),
            blk.config(40),
            blk.config(48),
            blk.config(52),
            blk.config(56) & 0xff
        ),
    );
    if blk.features & offered != offered {
        return;
    }
    const UNMAP: u32 = 1;
    for (case, kind, flags) in [
        ("discard", kind::DISCARD, 0),
        ("zeroes", kind::WRITE_ZEROES, 0),
        ("zeroes-unmap", kind::WRITE_ZEROES, UNMAP),
    ] {
        zero_case(&mut blk, case, kind, flags);
    }
    let last = blk.capacity;
    let too_many = blk.config(48).saturating_add(1);
    for (case, kind, data, expected) in [
        (
            "discard-unmap-flag",
            kind::DISCARD,
            segment(0, 8, UNMAP),
            status::UNSUPPORTED,
        ),
        (
            "zeroes-unknown-flag",
            kind::WRITE_ZEROES,
            segment(0, 8, 4),
            status::UNSUPPORTED,
        ),
        (
            "discard-past-end",
            kind::DISCARD,
            segment(last - 4, 8, 0),
            status::IO_ERROR,
        ),
        (
            "zeroes-past-end",
            kind::WRITE_ZEROES,
            segment(last, 1, 0),
            status::IO_ERROR,
        ),
        (
            "zeroes-overflow",
            kind::WRITE_ZEROES,
            segment(u64::MAX, 8, 0),
            status::IO_ERROR,
        ),
        (
            "zeroes-too-many",
            kind::WRITE_ZEROES,
            segment(0, too_many, 0),
            status::IO_ERROR,
        ),
    ] {
        let code = blk.request(kind, 0, &[&data], &mut []).0;
        verdict(
            step,
            case,
            code == expected,
            format_args!("status={code} expected={expected}"),
        );
    }
    let code = blk
        .request(kind::DISCARD, 0, &[&segment(0, 8, 0)[..15]], &mut [])
        .0;
    verdict(
        step,
        "discard-short",
        code == status::IO_ERROR,
        format_args!("status={code}"),
    );
}

/// Fills a stretch, zeroes one range of it and (if the device takes two segments) another, and
/// looks at all of it.
fn zero_case(blk: &mut Blk, case: &str, kind: u32, flags: u32) {
    const SECTORS: usize = 512;
    let data = blk::buffer(SECTORS * SECTOR);
    fill(data, 0, 7);
    let written = blk.write(0, data);
    let limits = if kind == kind::DISCARD {
        blk.config(40)
    } else {
        blk.config(52)
    };
    let two = limits >= 2;
    // The first begins and ends on no page's boundary.
    let segments = [segment(3, 101, flags), segment(200, 64, flags)].concat();
    let segments = if two { &segments[..] } else { &segments[..16] };
    let code = blk.request(kind, 0, &[segments], &mut []).0;
    data.fill(0xa5);
    let read = blk.read(0, data);
    let zeroed = |sector: usize| (3..104).contains(&sector) || two && (200..264).contains(&sector);
    let mut wrong = 0;
    for (sector, bytes) in data.chunks(SECTOR).enumerate() {
        let right = if zeroed(sector) {
            bytes.iter().all(|&byte| byte == 0)
        } else {
            holds(bytes, sector as u64, 7)
        };
        wrong += usize::from(!right);
    }
    let ok = [written, code, read] == [status::OK; 3] && wrong == 0;
    verdict(
        "blk-discard",
        case,
        ok,
        format_args!("status={code} wrong_sectors={wrong}"),
    );
}

/// `blk-errors`: requests that must fail, and a good one at the end.
pub fn errors() {
    let step = "blk-errors";
    let mut blk = Blk::open();
    let end = blk.capacity;
    let data = blk::buffer(8 * SECTOR);
    for (case, sector) in [
        ("read-at-end", end),
        ("read-over-end", end - 4),
        ("read-far", u64::MAX / SECTOR as u64),
        ("read-overflow", u64::MAX),
    ] {
        let code = blk.read(sector, data);
        verdict(
            step,
            case,
            code == status::IO_ERROR,
            format_args!("status={code}"),
        );
    }
    for (case, sector) in [
        ("write-at-end", end),
        ("write-over-end", end - 4),
        ("write-overflow", u64::MAX),
    ] {
        let code = blk.write(sector, data);
        verdict(
            step,
            case,
            code == status::IO_ERROR,
            format_args!("status={code}"),
        );
    }
    let code = blk.read(0, &mut data[..SECTOR + 1]);
    verdict(
        step,
        "read-part-of-sector",
        code == status::IO_ERROR,
        format_args!("status={code}"),
    );
    let code = blk.request(99, 0, &[], &mut [&mut data[..SECTOR]]).0;
    verdict(
        step,
        "unknown-type",
        code == status::UNSUPPORTED,
        format_args!("status={code}"),
    );
    let (code, len) = blk.request(kind::GET_ID, 0, &[], &mut [&mut data[..20]]);
    verdict(
        step,
        "get-id",
        code == status::OK,
        format_args!("status={code} len={len}"),
    );
    let code = blk.read(end - 8, data);
    verdict(
        step,
        "last-sectors",
        code == status::OK,
        format_args!("status={code}"),
    );
}
