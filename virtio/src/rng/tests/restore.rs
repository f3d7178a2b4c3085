// SPDX-License-Identifier: Apache-2.0
//! A device that goes on from a state that was saved in the middle of its work.

use std::time::Duration;

use super::super::Rng;
use crate::limiter::{BucketLimits, BucketUpdate, LimiterUpdate};
use crate::testing::machine::{FREE, Machine};
use crate::testing::writable;

#[test]
fn a_debt_is_not_forgotten_and_each_request_is_answered_once() {
    let limits = LimiterUpdate {
        bandwidth: BucketUpdate::Set(BucketLimits {
            size: 1000,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 500,
        }),
        ..LimiterUpdate::default()
    };
    let mut machine = Machine::new(Box::new(Rng::new(limits).unwrap()), u64::MAX);
    for number in 0..3 {
        machine.drivers[0].add(&[writable(FREE + 0x2000 * number, 5000)]);
    }
    machine.drivers[0].kick();
    machine.stays_used(0, 1);
    let mut shared = None;
    machine = machine.reborn(|| {
        let rng = Rng::new(LimiterUpdate::default()).unwrap();
        shared = Some(rng.shared.clone());
        Box::new(rng)
    });
    machine.stays_used(0, 1);
    let limiter = &shared.unwrap().limiter;
    let bucket = limiter.save().bandwidth.unwrap();
    assert_eq!((bucket.tokens, bucket.burst_left), (0, 0));
    assert!((3490..=3500).contains(&bucket.debt), "{bucket:?}");
    limiter.update(LimiterUpdate {
        bandwidth: BucketUpdate::Remove,
        ..LimiterUpdate::default()
    });
    machine.wait_used(0, 3);
    assert_eq!(machine.heads(0), [0, 1, 2]);
    for number in 0..3 {
        assert!(
            machine
                .get(FREE + 0x2000 * number, 64)
                .iter()
                .any(|&b| b != 0)
        );
    }
}

#[test]
fn the_format_is_that_of_the_golden_file() {
    crate::testing::golden::<crate::rng::RngState>(include_str!("../../../testdata/rng.json"));
}
