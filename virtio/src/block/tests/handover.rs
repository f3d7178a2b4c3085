// SPDX-License-Identifier: Apache-2.0
//! What a device does for a machine that goes on in another process: its lock is handed over, and
//! what is written meanwhile is noted.

use std::collections::BTreeSet;

use super::*;

const BLOCK: u64 = BlockLog::BLOCK;

fn open(file: &NamedTempFile, locking: Locking, read_only: bool) -> Result<Block, BlockError> {
    Block::open(BlockConfig {
        locking,
        read_only,
        ..config(file.path(), Engine::Sync)
    })
}

fn is_in_use(result: &Result<(), BlockError>) -> bool {
    matches!(result, Err(BlockError::InUse { .. }))
}

#[test]
fn a_lock_goes_from_one_to_the_other_and_back() {
    let file = image(4096);
    let source = open(&file, Locking::Now, false).unwrap().control();
    let target = open(&file, Locking::Later, false).unwrap().control();
    source.take_lock().expect("it has the lock");
    assert!(is_in_use(&target.take_lock()), "the source still has it");
    source.release_lock().unwrap();
    source.release_lock().expect("there is nothing left to do");
    target.take_lock().unwrap();
    target.take_lock().unwrap();
    assert!(is_in_use(&source.take_lock()), "the target has it now");
    // The move is called off.
    target.release_lock().unwrap();
    source.take_lock().unwrap();
    assert!(is_in_use(&target.take_lock()));
}

#[test]
fn readers_need_not_wait_for_each_other() {
    let file = image(4096);
    let _source = open(&file, Locking::Now, true).unwrap();
    let target = open(&file, Locking::Later, true).unwrap().control();
    target.take_lock().unwrap();
    let writer = open(&file, Locking::Later, false).unwrap().control();
    assert!(is_in_use(&writer.take_lock()));
}

#[test]
fn a_device_without_a_lock_takes_none() {
    let file = image(4096);
    let first = open(&file, Locking::Off, false).unwrap().control();
    first.take_lock().unwrap();
    open(&file, Locking::Now, false).expect("nobody has the lock");
    first.release_lock().unwrap();
}

#[test]
fn an_image_that_is_exchanged_is_locked_as_the_one_before() {
    let (first, second) = (image(4096), image(8192));
    let control = open(&first, Locking::Now, false).unwrap().control();
    control.release_lock().unwrap();
    control.set_image(second.path()).unwrap();
    let other = open(&second, Locking::Now, false).expect("the lock was given up");
    assert!(is_in_use(&control.take_lock()));
    other.control().release_lock().unwrap();
    control.take_lock().unwrap();
    assert!(is_in_use(&other.control().take_lock()));
    // The same one again, with another size, and the lock that it has.
    second.as_file().set_len(16384).unwrap();
    control.set_image(second.path()).unwrap();
    assert!(is_in_use(&other.control().take_lock()));
    control.release_lock().unwrap();
    other.control().take_lock().unwrap();
}

#[test]
fn what_was_written_is_there_after_a_flush_and_after_the_cache_is_dropped() {
    let file = image(1 << 20);
    let mut guest = Guest::new(config(file.path(), Engine::Sync));
    let data = pattern(4096, 9);
    assert_eq!(guest.write_sectors(8, &data), (OK, 1));
    guest.block.control().flush().unwrap();
    guest.block.control().drop_cache().unwrap();
    assert!(guest.read_sectors(8, 4096) == data);
}

/// The blocks that hold a byte that differs.
fn differing(one: &[u8], other: &[u8]) -> BTreeSet<u64> {
    let pairs = one.iter().zip(other).enumerate();
    pairs
        .filter(|(_, (one, other))| one != other)
        .map(|(at, _)| at as u64 / BLOCK)
        .collect()
}

#[test]
fn every_change_is_noted_and_nothing_else() {
    const SECTORS: u64 = (2 << 20) / 512;
    for engine in BOTH {
        for cache in [CacheType::Unsafe, CacheType::Writeback] {
            let file = image(2 << 20);
            let mut guest = Guest::new(BlockConfig {
                cache,
                ..config(file.path(), engine)
            });
            let control = guest.block.control();
            assert_eq!(guest.write_sectors(0, &pattern(512, 3)), (OK, 1));
            control.log().start();
            let mut copy = std::fs::read(file.path()).unwrap();
            let mut noise = pattern(4096, 77).into_iter().map(u64::from);
            let mut next = |end: u64| noise.next().unwrap() * 0x1_0001 % end;
            for round in 0..40 {
                let mut expected = BTreeSet::new();
                for _ in 0..next(4) {
                    let sector = next(SECTORS - 128);
                    let count = 1 + next(127);
                    let answer = match next(6) {
                        0 => guest.request_range(DISCARD, sector, count as u32, 0),
                        1 => guest.request_range(WRITE_ZEROES, sector, count as u32, 1),
                        2 => {
                            guest.read_sectors(sector, 512);
                            if cache == CacheType::Writeback {
                                assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
                            }
                            continue;
                        }
                        _ => guest.write_sectors(sector, &pattern(count as usize * 512, round)),
                    };
                    assert_eq!(answer, (OK, 1));
                    expected.extend(sector * 512 / BLOCK..=((sector + count) * 512 - 1) / BLOCK);
                }
                let written = control.log().take().unwrap();
                let noted = written.ranges();
                let noted: BTreeSet<_> = noted
                    .flat_map(|range| range.start / BLOCK..range.end / BLOCK)
                    .collect();
                assert_eq!(noted, expected, "{engine:?}, {cache:?}");
                let now = std::fs::read(file.path()).unwrap();
                assert!(differing(&copy, &now).is_subset(&noted));
                for range in written.ranges() {
                    let range = range.start as usize..range.end as usize;
                    copy[range.clone()].copy_from_slice(&now[range]);
                }
                assert!(copy == now);
            }
            control.log().stop();
        }
    }
}

#[test]
fn writes_in_flight_and_a_copier_beside_them_end_up_the_same() {
    for engine in BOTH {
        let file = image(4 << 20);
        let mut guest = Guest::new(config(file.path(), engine));
        let control = guest.block.control();
        control.log().start();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (path, stopped, log) = (file.path().to_owned(), stop.clone(), control.clone());
        let copier = thread::spawn(move || {
            let mut copy = std::fs::read(&path).unwrap();
            let image = File::open(&path).unwrap();
            loop {
                let last = stopped.load(Ordering::SeqCst);
                for range in log.log().take().unwrap().ranges() {
                    let range = range.start as usize..range.end as usize;
                    let offset = range.start as u64;
                    image.read_exact_at(&mut copy[range], offset).unwrap();
                }
                if last {
                    return copy;
                }
            }
        });
        for round in 0..400_u64 {
            let sector = round * 1237 % (8192 - 64);
            assert_eq!(guest.write_sectors(sector, &pattern(32768, round)), (OK, 1));
        }
        guest.stop();
        stop.store(true, Ordering::SeqCst);
        let copy = copier.join().unwrap();
        assert!(copy == std::fs::read(file.path()).unwrap(), "{engine:?}");
    }
}
