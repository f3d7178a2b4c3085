// SPDX-License-Identifier: Apache-2.0
//! A device that goes on from a state that was saved in the middle of its work.

use super::*;
use crate::testing::machine::{FREE, Machine};

/// Without a lock: a program that a test beside this one starts has all open files for a moment,
/// and with them the lock of an image that was closed here.
fn config(path: &Path, engine: Engine) -> BlockConfig {
    BlockConfig {
        locking: Locking::Off,
        ..super::config(path, engine)
    }
}

fn ops(size: u64) -> LimiterUpdate {
    LimiterUpdate {
        ops: BucketUpdate::Set(BucketLimits {
            size,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 0,
        }),
        ..LimiterUpdate::default()
    }
}

/// Where request `number` has its parts: header, status, data.
fn parts(number: u64) -> [u64; 3] {
    let at = FREE + number * 0x2000;
    [at, at + STATUS, at + DATA]
}

/// Offers request `number`, of one sector.
fn offer(machine: &mut Machine, kind: u32, number: u64, sector: u64) {
    let [header, status, data] = parts(number);
    machine.put(header, &u64::from(kind).to_le_bytes());
    machine.put(header + 8, &sector.to_le_bytes());
    machine.put(status, &[NONE]);
    let data = Piece {
        address: data,
        len: 512,
        write: kind == IN,
    };
    machine.drivers[0].add(&[readable(header, 16), data, writable(status, 1)]);
}

#[test]
fn requests_that_wait_for_the_limit_go_on_waiting_and_are_served_once() {
    for (engine, accepted) in BOTH.into_iter().zip([0, u64::MAX]) {
        let image = image(64 * 512);
        let config = BlockConfig {
            limits: ops(6),
            ..config(image.path(), engine)
        };
        let mut machine = Machine::new(Box::new(Block::open(config.clone()).unwrap()), accepted);
        for number in 0..10 {
            offer(&mut machine, IN, number, 3 * number);
        }
        machine.drivers[0].kick();
        machine.stays_used(0, 6);
        let mut control = None;
        machine = machine.reborn(|| {
            // Made with a full bucket, which the state empties again.
            let block = Block::open(config).unwrap();
            control = Some(block.control());
            Box::new(block)
        });
        machine.drivers[0].kick();
        machine.stays_used(0, 6);
        let control = control.unwrap();
        control.limit(LimiterUpdate {
            ops: BucketUpdate::Remove,
            ..LimiterUpdate::default()
        });
        machine.wait_used(0, 10);
        let mut heads = machine.heads(0);
        heads.sort_unstable();
        assert_eq!(heads, (0..10).map(|n| 3 * n).collect::<Vec<_>>());
        assert_eq!(
            control.counts().reads.count,
            4,
            "the others were served before"
        );
        let expected = pattern(64 * 512, 1);
        for number in 0..10 {
            let [_, status, data] = parts(number);
            assert_eq!(machine.get(status, 1), [OK]);
            let at = 3 * number as usize * 512;
            assert_eq!(machine.get(data, 512), expected[at..at + 512], "{number}");
        }
    }
}

#[test]
fn a_queue_full_of_writes_loses_none_of_them() {
    for (engine, accepted) in BOTH.into_iter().zip([u64::MAX, 0]) {
        let image = image(128 * 512);
        let config = config(image.path(), engine);
        let open = || Box::new(Block::open(config.clone()).unwrap());
        let mut machine = Machine::new(open(), accepted);
        for number in 0..80 {
            machine.put(parts(number)[2], &pattern(512, 1000 + number));
            offer(&mut machine, OUT, number, 127 - number);
            machine.drivers[0].kick();
            if number % 20 == 10 {
                machine = machine.reborn(|| open());
            }
        }
        machine.wait_used(0, 80);
        assert_eq!(machine.heads(0).len(), 80);
        for number in 0..80 {
            assert_eq!(machine.get(parts(number)[1], 1), [OK]);
            let mut data = [0; 512];
            let offset = (127 - number) * 512;
            image.as_file().read_exact_at(&mut data, offset).unwrap();
            assert_eq!(data[..], pattern(512, 1000 + number), "{number}");
        }
    }
}

#[test]
fn the_driver_is_told_of_an_image_of_another_size_and_of_no_other() {
    const INTERRUPT_STATUS: u64 = 0x60;
    const CONFIG_GENERATION: u64 = 0xfc;
    let image = image(64 * 512);
    let config = config(image.path(), Engine::Sync);
    let open = || Box::new(Block::open(config.clone()).unwrap());
    let mut machine = Machine::new(open(), u64::MAX).reborn(|| open());
    assert_eq!(machine.read(INTERRUPT_STATUS) & 2, 0);
    assert_eq!(
        (machine.read(0x100), machine.read(CONFIG_GENERATION)),
        (64, 0)
    );
    machine = machine.reborn(|| {
        image.as_file().set_len(96 * 512).unwrap();
        open()
    });
    assert_eq!(machine.read(INTERRUPT_STATUS) & 2, 2);
    assert_eq!(
        (machine.read(0x100), machine.read(CONFIG_GENERATION)),
        (96, 1)
    );
    assert!(machine.interrupts.load(Ordering::SeqCst) > 0);
    offer(&mut machine, IN, 0, 95);
    machine.drivers[0].kick();
    machine.wait_used(0, 1);
    assert_eq!(machine.get(parts(0)[1], 1), [OK]);
}

#[test]
fn an_image_can_be_exchanged_before_the_device_goes_on() {
    let (first, second) = (image(64 * 512), image(32 * 512));
    let open = || Block::open(config(first.path(), Engine::Sync)).unwrap();
    let mut machine = Machine::new(Box::new(open()), u64::MAX);
    let (state, _) = machine.save();
    drop(machine);
    let block = open();
    let control = block.control();
    let (mut transport, interrupts) =
        crate::testing::machine::transport(Box::new(block), &memory());
    transport.restore(state).unwrap();
    control.set_image(second.path()).unwrap();
    assert_eq!(transport.core().signals().interrupt_status(), 2);
    assert_eq!(interrupts.load(Ordering::SeqCst), 1);
}

#[test]
fn the_format_is_that_of_the_golden_file() {
    crate::testing::golden::<BlockState>(include_str!("../../../testdata/block.json"));
}
