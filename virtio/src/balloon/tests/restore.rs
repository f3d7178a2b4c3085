// SPDX-License-Identifier: Apache-2.0
//! A balloon that goes on from a state that was saved in the middle of its work.

use super::*;
use crate::device::RestoreContext;
use crate::testing::machine::{FREE, Machine};

const INFLATE: usize = 0;
const STATISTICS: usize = 2;
const HINTING: usize = 3;
const INTERRUPT_STATUS: u64 = 0x60;

fn send(machine: &mut Machine, queue: usize, data: &[u8]) -> u16 {
    machine.put(FREE, data);
    let head = machine.drivers[queue].add(&[readable(FREE, data.len() as u32)]);
    machine.drivers[queue].kick();
    head
}

fn field(machine: &mut Machine, index: u64) -> u32 {
    machine.read(0x100 + 4 * index)
}

fn statistic(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

/// The balloon again, with the configuration of the first, and a handle on it.
fn again(machine: Machine, config: BalloonConfig) -> (Machine, BalloonControl) {
    let balloon = Balloon::new(config).unwrap();
    let control = balloon.control();
    (machine.reborn(|| Box::new(balloon)), control)
}

#[test]
fn a_half_inflated_balloon_keeps_its_size_and_goes_on() {
    let balloon = Balloon::new(all()).unwrap();
    let control = balloon.control();
    let mut machine = Machine::new(Box::new(balloon), u64::MAX);
    control.set_target(4).unwrap();
    machine.put(PAGES, &[0xa5; 4 * 4096]);
    send(&mut machine, INFLATE, &page(PAGES).to_le_bytes());
    machine.wait_used(INFLATE, 1);
    machine.write(0x104, 1);
    control.set_statistics_interval_s(7000).unwrap();

    let (mut machine, control) = again(machine, all());
    assert_eq!([0, 1].map(|at| field(&mut machine, at)), [1024, 1]);
    let shown = (control.target_mib(), control.actual_pages());
    assert_eq!(shown, (4, 1));
    assert_eq!(control.statistics_interval_s(), 7000);
    assert_eq!(
        machine.read(INTERRUPT_STATUS) & 2,
        2,
        "of the target, still"
    );
    send(&mut machine, INFLATE, &page(PAGES + 4096).to_le_bytes());
    machine.stays_used(INFLATE, 2);
    machine.write(0x104, 2);
    assert_eq!(machine.get(PAGES, 8192), [0; 8192]);
    assert_eq!(machine.get(PAGES + 8192, 4096), [0xa5; 4096]);
    control.set_target(2).unwrap();
    assert_eq!([0, 1].map(|at| field(&mut machine, at)), [512, 2]);
}

#[test]
fn the_buffer_held_for_statistics_is_used_for_the_next_ones() {
    let balloon = Balloon::new(all()).unwrap();
    let control = balloon.control();
    let mut machine = Machine::new(Box::new(balloon), u64::MAX);
    let head = send(&mut machine, STATISTICS, &statistic(4, 1234));
    eventually("the statistics are taken", || {
        control.statistics().unwrap().values[4] == Some(1234)
    });

    for _ in 0..2 {
        (machine, _) = again(machine, all());
    }
    let (mut machine, control) = again(machine, all());
    assert_eq!(control.statistics().unwrap().values[4], Some(1234));
    machine.stays_used(STATISTICS, 0);
    // A change of the interval asks the guest at once, by giving it its buffer back.
    control.set_statistics_interval_s(1800).unwrap();
    machine.stays_used(STATISTICS, 1);
    assert_eq!(machine.heads(STATISTICS), [u32::from(head)]);
    send(&mut machine, STATISTICS, &statistic(4, 99));
    eventually("the next ones are taken", || {
        control.statistics().unwrap().values[4] == Some(99)
    });
    machine.stays_used(STATISTICS, 1);
}

#[test]
fn a_run_of_hints_is_over_and_the_next_has_another_number() {
    let balloon = Balloon::new(all()).unwrap();
    let control = balloon.control();
    let mut machine = Machine::new(Box::new(balloon), u64::MAX);
    control.start_hinting(false).unwrap();
    let run = field(&mut machine, 2);
    send(&mut machine, HINTING, &run.to_le_bytes());
    machine.wait_used(HINTING, 1);
    machine.write(0x64, 3);
    let generation = machine.read(0xfc);

    let (mut machine, control) = again(machine, all());
    assert_eq!(field(&mut machine, 2), 1, "done");
    assert_eq!(machine.read(INTERRUPT_STATUS) & 2, 2);
    assert_eq!(machine.read(0xfc), generation + 1);
    // A hint that comes late gives nothing back: the driver may use its pages by now.
    machine.put(PAGES, &[0xa5; 4096]);
    machine.drivers[HINTING].add(&[crate::testing::writable(PAGES, 4096)]);
    machine.drivers[HINTING].kick();
    machine.wait_used(HINTING, 2);
    assert_eq!(machine.get(PAGES, 4096), [0xa5; 4096]);
    control.start_hinting(false).unwrap();
    assert_eq!(field(&mut machine, 2), run + 1);
}

#[test]
fn a_target_can_be_set_before_the_machine_goes_on() {
    let balloon = || Balloon::new(all()).unwrap();
    let mut machine = Machine::new(Box::new(balloon()), u64::MAX);
    let (state, _) = machine.save();
    let balloon = balloon();
    let control = balloon.control();
    let (mut transport, _) = crate::testing::machine::transport(Box::new(balloon), &memory());
    assert!(control.set_target(2).is_err());
    transport.restore(state).unwrap();
    control.set_target(2).unwrap();
    assert_eq!(transport.core().signals().interrupt_status() & 2, 2);
}

#[test]
fn a_state_for_another_configuration_is_refused() {
    let restore = |config, change: &[(&str, u16)]| {
        let mut state = Balloon::new(all()).unwrap().save();
        for &(field, value) in change {
            state[field] = value.into();
        }
        let context = RestoreContext {
            memory: memory(),
            signals: DeviceSignals::new(Interrupt::from_fn(|| {})),
            running: false,
        };
        Balloon::new(config).unwrap().restore(state, context)
    };
    restore(all(), &[]).unwrap();
    assert!(
        restore(BalloonConfig::default(), &[]).is_err(),
        "statistics"
    );
    assert!(restore(all(), &[("statistics_interval_s", 0)]).is_err());
    let quiet = [("statistics_interval_s", 0)];
    restore(BalloonConfig::default(), &quiet).unwrap();
    let hints = [quiet[0], ("hint_cmd", 1)];
    assert!(restore(BalloonConfig::default(), &hints).is_err());
    assert!(restore(all(), &[("surplus", 1)]).is_err());
}

#[test]
fn the_format_is_that_of_the_golden_file() {
    crate::testing::golden::<crate::balloon::state::BalloonState>(include_str!(
        "../../../testdata/balloon.json"
    ));
}
