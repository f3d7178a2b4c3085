// SPDX-License-Identifier: Apache-2.0
//! Hostile cases in the registers and the configuration space.

use crate::hostile::{Case, Entry, SIZE, reg, state};
use crate::rng::Rng;
use crate::{mmio, params};

const PAGE: u64 = 0x1000;

/// The cases.
pub const CASES: &[Entry] = &[
    ("features-all", features_all),
    ("features-while-running", features_while_running),
    ("status-all", |c| c.set(reg::STATUS, u32::MAX)),
    ("status-failed", status_failed),
    ("status-backwards", status_backwards),
    ("driver-ok-first", driver_ok_first),
    ("running-without-queues", running_without_queues),
    ("notify-before-running", notify_before_running),
    ("notify-unknown", notify_unknown),
    ("notify-storm", notify_storm),
    ("queue-far", queue_far),
    ("ready-odd-values", ready_odd_values),
    ("read-everywhere", read_everywhere),
    ("read-everywhere-running", read_everywhere_running),
    ("write-configuration", write_configuration),
    ("write-everywhere", write_everywhere),
];

/// Features that nobody offered must not be accepted.
fn features_all(case: &mut Case) {
    case.set(reg::STATUS, 0);
    case.set_status(state::FOUND);
    for word in [0, 1] {
        case.set(reg::DRIVER_FEATURES_SEL, word);
        case.set(reg::DRIVER_FEATURES, u32::MAX);
    }
    case.set(reg::STATUS, state::FEATURES);
    case.ok = case.get(reg::STATUS) & state::FEATURES_OK == 0;
    case.set(reg::STATUS, state::RUNNING);
    case.notify();
}

fn features_while_running(case: &mut Case) {
    case.start();
    for word in [0, 1, 2, u32::MAX] {
        case.set(reg::DRIVER_FEATURES_SEL, word);
        case.set(reg::DRIVER_FEATURES, u32::MAX);
        case.set(reg::DEVICE_FEATURES_SEL, word);
        case.get(reg::DEVICE_FEATURES);
    }
    let pieces = case.good();
    case.send(&pieces);
}

fn status_failed(case: &mut Case) {
    case.start();
    case.set(reg::STATUS, state::RUNNING | 128);
    let pieces = case.good();
    case.send(&pieces);
}

fn status_backwards(case: &mut Case) {
    case.start();
    for status in [state::FEATURES, state::FOUND, 1, state::RUNNING] {
        case.set(reg::STATUS, status);
    }
    let pieces = case.good();
    case.send(&pieces);
}

fn driver_ok_first(case: &mut Case) {
    case.set(reg::STATUS, 0);
    case.set(reg::STATUS, 4);
    case.place(case.queue, case.rings, SIZE.into());
    case.set(reg::QUEUE_READY, 1);
    let pieces = case.good();
    case.send(&pieces);
}

fn running_without_queues(case: &mut Case) {
    case.begin();
    case.set_status(state::RUNNING);
    case.notify();
}

/// Requests that were offered before DRIVER_OK may be served after it.
fn notify_before_running(case: &mut Case) {
    case.begin();
    case.place_others();
    case.place(case.queue, case.rings, SIZE.into());
    case.set(reg::QUEUE_READY, 1);
    let pieces = case.good();
    case.send(&pieces);
    crate::clock::wait(20, || false);
    // A device must not touch a queue before DRIVER_OK (virtio 1.2, 3.1.1).
    case.ok = case.used() == 0;
    case.set_status(state::RUNNING);
    case.notify();
}

fn notify_unknown(case: &mut Case) {
    case.start();
    for queue in [2, 3, 7, 0xffff, 0x1_0000, u32::MAX] {
        case.set(reg::QUEUE_NOTIFY, queue);
    }
}

fn notify_storm(case: &mut Case) {
    case.start();
    for _ in 0..5000 {
        case.notify();
    }
}

/// A queue that is not there has no room.
fn queue_far(case: &mut Case) {
    case.begin();
    for queue in [8, 0xffff, 0x1_0000, u32::MAX] {
        case.place(queue, case.rings, SIZE.into());
        case.set(reg::QUEUE_READY, 1);
        case.ok &= case.get(reg::QUEUE_NUM_MAX) == 0;
    }
    case.set_status(state::RUNNING);
    case.notify();
}

fn ready_odd_values(case: &mut Case) {
    case.begin();
    for ready in [2, u32::MAX, 0, 1, 1] {
        case.place(case.queue, case.rings, SIZE.into());
        case.set(reg::QUEUE_READY, ready);
    }
    case.set_status(state::RUNNING);
    let pieces = case.good();
    case.send(&pieces);
}

fn read_everywhere(case: &mut Case) {
    let mut sum = 0_u64;
    for at in case.base..case.base + PAGE {
        for width in [1, 2, 4, 8] {
            sum ^= mmio::read(at, width);
        }
    }
    core::hint::black_box(sum);
}

fn read_everywhere_running(case: &mut Case) {
    case.start();
    read_everywhere(case);
}

/// Writes of every width all over the configuration space of a running device.
fn write_configuration(case: &mut Case) {
    case.start();
    write_range(case.base + 0x100, case.base + PAGE - 8);
    let pieces = case.good();
    case.send(&pieces);
}

/// Writes of every width all over the registers.
fn write_everywhere(case: &mut Case) {
    case.start();
    write_range(case.base, case.base + 0x200);
}

fn write_range(from: u64, to: u64) {
    let mut rng = Rng::new(params::number("bare.seed", 1));
    for at in from..to {
        for width in [1, 2, 4, 8] {
            mmio::write(at, width, rng.next());
        }
    }
}
