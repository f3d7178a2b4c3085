// SPDX-License-Identifier: Apache-2.0

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const BLOCK: u64 = BlockLog::BLOCK;

fn blocks(written: &Written) -> BTreeSet<u64> {
    let ranges = written.ranges();
    ranges
        .flat_map(|range| range.start / BLOCK..range.end.div_ceil(BLOCK))
        .collect()
}

#[test]
fn nothing_is_noted_while_it_is_off() {
    let log = BlockLog::new(100 * BLOCK);
    log.mark(0, BLOCK);
    assert_eq!(log.take(), None);
    log.start();
    assert!(log.take().unwrap().is_empty());
    log.mark(0, 1);
    log.stop();
    log.mark(0, 1);
    assert_eq!(log.take(), None);
    log.start();
    assert!(log.take().unwrap().is_empty(), "it starts anew");
}

#[test]
fn ranges_end_where_the_image_does() {
    let log = BlockLog::new(64 * BLOCK + 512);
    log.start();
    log.mark(64 * BLOCK - 1, 2);
    let written = log.take().unwrap();
    let ranges: Vec<_> = written.ranges().collect();
    let expected = 63 * BLOCK..64 * BLOCK + 512;
    assert_eq!(ranges, vec![expected]);
    assert_eq!(written.bytes(), BLOCK + 512);
    assert!(written.contains(64 * BLOCK) && !written.contains(62 * BLOCK));
    // Past its end, or none at all, or far too long.
    log.mark(65 * BLOCK, 10);
    log.mark(u64::MAX, 10);
    log.mark(5, 0);
    assert!(log.take().unwrap().is_empty());
    log.mark(64 * BLOCK, u64::MAX);
    assert_eq!(blocks(&log.take().unwrap()), [64].into());
}

#[test]
fn an_image_that_is_exchanged_is_written_as_a_whole() {
    let log = BlockLog::new(10 * BLOCK);
    log.all_changed(20 * BLOCK);
    log.start();
    assert!(log.take().unwrap().is_empty());
    for len in [70 * BLOCK, 3 * BLOCK + 1, 0, BLOCK] {
        log.all_changed(len);
        let written = log.take().unwrap();
        assert_eq!(written.bytes(), len);
        assert_eq!(written.ranges().count(), usize::from(len > 0));
    }
}

proptest! {
    #[test]
    fn what_is_taken_is_what_was_marked(
        len in 1..300 * BLOCK,
        rounds in prop::collection::vec(
            prop::collection::vec((0..310 * BLOCK, 0..70 * BLOCK), 0..8),
            1..4,
        ),
    ) {
        let log = BlockLog::new(len);
        log.start();
        for round in rounds {
            let mut expected = BTreeSet::new();
            for (offset, count) in round {
                log.mark(offset, count);
                let end = (offset + count).min(len);
                expected.extend(
                    (0..len.div_ceil(BLOCK))
                        .filter(|block| offset < end.min((block + 1) * BLOCK) && block * BLOCK < end),
                );
            }
            let written = log.take().unwrap();
            prop_assert_eq!(&blocks(&written), &expected);
            prop_assert_eq!(written.is_empty(), expected.is_empty());
            let ranges: Vec<_> = written.ranges().collect();
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
            for range in &ranges {
                prop_assert!(range.start < range.end && range.end <= len);
            }
        }
    }
}
