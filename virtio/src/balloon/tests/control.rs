// SPDX-License-Identifier: Apache-2.0
//! What the machine's owner asks for.

use std::sync::atomic::Ordering;

use super::*;
use crate::balloon::BalloonError;

#[test]
fn nothing_can_be_asked_for_without_a_driver() {
    let balloon = Balloon::new(all()).unwrap();
    let control = balloon.control();
    assert_eq!(control.set_target(1), Err(BalloonError::NotActive));
    assert_eq!(control.start_hinting(true), Err(BalloonError::NotActive));
    assert_eq!(control.stop_hinting(), Err(BalloonError::NotActive));
    control.hinting_status().unwrap();
    control.set_statistics_interval_s(5).unwrap();
}

#[test]
fn a_new_target_is_shown_and_signalled() {
    let rig = Rig::new(all());
    let before = (
        rig.interrupts.load(Ordering::SeqCst),
        rig.signals.config_generation(),
    );
    rig.control.set_target(8).unwrap();
    assert_eq!((rig.config(0), rig.control.target_mib()), (2048, 8));
    assert!(rig.interrupts.load(Ordering::SeqCst) > before.0);
    assert!(rig.signals.config_generation() > before.1);
    assert_eq!(rig.signals.interrupt_status() & 2, 2);
    // Guest memory has 8 MiB.
    for amount in [9, 1 << 24, u32::MAX] {
        let error = rig.control.set_target(amount);
        assert_eq!(error, Err(BalloonError::TooLarge(amount)));
    }
    assert_eq!(rig.config(0), 2048);
}

#[test]
fn statistics_and_hinting_are_there_from_the_start_or_never() {
    let rig = Rig::new(BalloonConfig::default());
    let control = &rig.control;
    assert_eq!(control.statistics(), Err(BalloonError::NoStatistics));
    assert_eq!(control.start_hinting(true), Err(BalloonError::NoHinting));
    assert_eq!(control.stop_hinting(), Err(BalloonError::NoHinting));
    assert_eq!(control.hinting_status(), Err(BalloonError::NoHinting));
    let switch = Err(BalloonError::StatisticsSwitch);
    assert_eq!(control.set_statistics_interval_s(1), switch);
    control.set_statistics_interval_s(0).unwrap();

    let rig = Rig::new(all());
    assert_eq!(rig.control.set_statistics_interval_s(0), switch);
    rig.control.set_statistics_interval_s(2).unwrap();
    assert_eq!(rig.control.statistics_interval_s(), 2);
}

#[test]
fn a_pause_forgets_nothing_and_a_reset_all_that_the_driver_told() {
    let mut rig = Rig::new(all());
    rig.balloon.write_config(4, &7_u32.to_le_bytes());
    rig.control.set_target(2).unwrap();
    rig.control.start_hinting(true).unwrap();
    rig.stop();
    rig.control.set_target(3).unwrap();
    rig.start();
    assert_eq!([0, 1, 2].map(|at| rig.config(at)), [768, 7, 2]);
    rig.stop();
    rig.balloon.reset();
    assert_eq!([0, 1, 2].map(|at| rig.config(at)), [768, 0, 0]);
    assert_eq!(rig.control.set_target(1), Err(BalloonError::NotActive));
    assert_eq!(rig.control.hinting_status().unwrap(), Default::default());
}

#[test]
fn run_numbers_skip_those_that_mean_something_else() {
    let rig = Rig::new(all());
    rig.control.0.set_last_run(u32::MAX - 1);
    for expected in [u32::MAX, 2, 3] {
        rig.control.start_hinting(false).unwrap();
        assert_eq!(rig.config(2), expected);
    }
}
