// SPDX-License-Identifier: Apache-2.0
//! States as text, and devices that go on from them.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use serde::de::DeserializeOwned;

use super::*;
use crate::{BusDevice, EventSink, GuestEvent, I8042, Interrupt, PvPanic, Serial};

/// A port or controller with the counts of what its lines were raised.
struct Lines {
    irqs: Arc<AtomicU32>,
    rooms: Arc<AtomicU32>,
}

fn counted() -> (Arc<AtomicU32>, Interrupt) {
    let count = Arc::new(AtomicU32::new(0));
    let raised = count.clone();
    let line = Interrupt::from_fn(move || {
        raised.fetch_add(1, Ordering::Relaxed);
    });
    (count, line)
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn port() -> (Serial, Sink, Lines) {
    let [(irqs, irq), (rooms, room)] = [counted(), counted()];
    let sink = Sink::default();
    let serial = Serial::new(irq, Box::new(sink.clone()), room, Arc::default());
    (serial, sink, Lines { irqs, rooms })
}

fn get(device: &mut dyn BusDevice, offset: u64) -> u8 {
    let mut data = [0];
    device.read(offset, &mut data);
    data[0]
}

/// `state` after a way through text.
fn carried<T: Serialize + DeserializeOwned>(state: &T) -> T {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

#[test]
fn input_that_waits_and_registers_survive() {
    const IER: u64 = 1;
    const LCR: u64 = 3;
    const LSR: u64 = 5;
    const SCRATCH: u64 = 7;
    let (mut serial, ..) = port();
    serial.write(IER, &[1]);
    serial.write(SCRATCH, &[0x5a]);
    serial.write(LCR, &[0x83]);
    serial.write(0, &[0x34]);
    serial.write(1, &[0x12]);
    serial.write(LCR, &[0x1b]);
    let text: Vec<u8> = (0..5000_u32).map(|at| (at % 251) as u8).collect();
    let taken = serial.push_input(&text);
    assert!(taken < text.len(), "some has to wait outside");
    let mut read: Vec<u8> = (0..100).map(|_| get(&mut serial, 0)).collect();

    let state = carried(&serial.save());
    drop(serial);
    let (mut serial, sink, lines) = port();
    serial.restore(state.clone()).unwrap();
    assert_eq!(serial.save(), state);
    assert!(lines.irqs.load(Ordering::Relaxed) > 0, "there is input");
    while get(&mut serial, LSR) & 1 != 0 {
        read.push(get(&mut serial, 0));
    }
    assert_eq!(read, text[..taken]);
    assert_eq!(
        lines.rooms.load(Ordering::Relaxed),
        0,
        "nobody was refused here"
    );
    assert_eq!(
        (get(&mut serial, SCRATCH), get(&mut serial, LCR)),
        (0x5a, 0x1b)
    );
    serial.write(0, b"x");
    assert_eq!(
        *sink.0.lock().unwrap(),
        b"x",
        "the output is that of the new port"
    );
    serial.write(LCR, &[0x83]);
    assert_eq!((get(&mut serial, 0), get(&mut serial, 1)), (0x34, 0x12));
}

#[test]
fn input_past_the_limit_is_refused_and_announced_after_a_restore_too() {
    let (mut serial, ..) = port();
    serial.push_input(&[b'a'; 8192]);
    let state = carried(&serial.save());
    let (mut serial, _, lines) = port();
    serial.restore(state).unwrap();
    // The FIFO's worth went to the FIFO.
    let taken = serial.push_input(&[b'b'; 8192]);
    assert!(taken <= 64, "{taken}");
    while lines.rooms.load(Ordering::Relaxed) == 0 {
        assert_eq!(get(&mut serial, 0), b'a');
    }
    assert!(serial.push_input(b"c") == 1);
}

fn controller() -> (I8042, Arc<AtomicU32>) {
    let (irqs, irq) = counted();
    (I8042::new(EventSink::new(|_| {}), irq), irqs)
}

#[test]
fn a_keyboard_goes_on_in_the_middle_of_a_command_and_of_keys() {
    let (mut first, _) = controller();
    assert!(first.press_ctrl_alt_del());
    let keys: Vec<u8> = (0..4).map(|_| get(&mut first, 0)).collect();
    first.write(4, &[0x60]);
    let state = carried(&first.save());
    assert_eq!(state.expects, I8042Expects::Configuration);
    let (mut second, irqs) = controller();
    second.restore(state.clone()).unwrap();
    assert_eq!(second.save(), state);
    assert_eq!(irqs.load(Ordering::Relaxed), 1, "there are keys to read");
    // The byte of configuration, and not a command.
    second.write(0, &[0x14]);
    assert_eq!(second.save().configuration, 0x14);
    let mut expected = Vec::new();
    while get(&mut first, 4) & 1 != 0 {
        expected.push(get(&mut first, 0));
    }
    let mut rest = Vec::new();
    while get(&mut second, 4) & 1 != 0 {
        rest.push(get(&mut second, 0));
    }
    assert_eq!((rest.len() + keys.len(), &rest), (11, &expected));
}

#[test]
fn a_panic_is_not_reported_again_by_a_copy() {
    let device = || {
        let count = Arc::<AtomicU32>::default();
        let reported = count.clone();
        let events = EventSink::new(move |event| {
            assert_eq!(event, GuestEvent::Panicked);
            reported.fetch_add(1, Ordering::Relaxed);
        });
        (PvPanic::new(events), count)
    };
    for (panicked, reports) in [(true, 0), (false, 1)] {
        let (mut first, _) = device();
        if panicked {
            first.write(0, &[1]);
        }
        let (mut second, count) = device();
        second.restore(&carried(&first.save()));
        second.write(0, &[1]);
        assert_eq!(count.load(Ordering::Relaxed), reports);
    }
}

#[test]
fn more_than_a_device_holds_is_refused_and_changes_nothing() {
    let (mut serial, ..) = port();
    let good = serial.save();
    let long = |fifo, waiting| SerialState {
        fifo: vec![7; fifo],
        waiting: vec![7; waiting],
        ..good.clone()
    };
    for state in [long(65, 0), long(0, 4097), long(1 << 20, 1 << 20)] {
        let error = serial.restore(state).unwrap_err().to_string();
        assert!(error.contains("the device holds"), "{error}");
        assert_eq!(serial.save(), good);
    }
    serial.restore(long(64, 4096)).unwrap();
    let (mut i8042, _) = controller();
    let state = I8042State {
        waiting: vec![0; 33],
        ..i8042.save()
    };
    assert!(i8042.restore(state).is_err());
    assert!(i8042.save().waiting.is_empty());
}

#[test]
fn a_surplus_or_missing_field_is_refused() {
    for text in [
        r#"{"reported": true, "surplus": 1}"#,
        r#"{}"#,
        r#"{"reported": 1}"#,
        "null",
    ] {
        assert!(
            serde_json::from_str::<PvPanicState>(text).is_err(),
            "{text}"
        );
    }
}

/// What is written for the state in `text` has to be `text` again.
#[track_caller]
fn golden<T: Serialize + DeserializeOwned>(text: &str) {
    let state: T = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string_pretty(&state).unwrap() + "\n", text);
}

/// The format of what is saved does not change unless somebody wants it to. One that has to needs
/// another version of the state, and a way from this one.
#[test]
fn the_format_is_that_of_the_golden_files() {
    golden::<SerialState>(include_str!("../../testdata/serial.json"));
    golden::<I8042State>(include_str!("../../testdata/i8042.json"));
    golden::<PvPanicState>(include_str!("../../testdata/pvpanic.json"));
}

proptest! {
    /// Whatever the registers hold and the guest does then.
    #[test]
    fn no_state_makes_a_port_panic(
        registers in any::<[u8; 9]>(),
        fifo in prop::collection::vec(any::<u8>(), 0..70),
        waiting in 0_usize..5000,
        accesses in prop::collection::vec((0_u64..9, any::<u8>(), any::<bool>()), 0..200),
    ) {
        let [low, high, enable, identification, line, status, modem, lines, scratch] = registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status: status,
            modem_control: modem,
            modem_status: lines,
            scratch,
            fifo,
            waiting: vec![b'w'; waiting],
        };
        let (mut serial, ..) = port();
        let fits = state.fifo.len() <= 64 && waiting <= 4096;
        prop_assert_eq!(serial.restore(state).is_ok(), fits);
        for (offset, value, write) in accesses {
            if write {
                serial.write(offset, &[value]);
            } else {
                get(&mut serial, offset);
            }
            serial.push_input(&[value]);
        }
    }

    #[test]
    fn no_state_makes_a_keyboard_panic(
        configuration: u8,
        last: u8,
        expects in 0..4_usize,
        waiting in prop::collection::vec(any::<u8>(), 0..40),
        accesses in prop::collection::vec((0_u64..6, any::<u8>(), any::<bool>()), 0..200),
    ) {
        use I8042Expects::{Configuration, KeyboardArgument, KeyboardCommand, OutputPort};
        let all = [Configuration, KeyboardArgument, KeyboardCommand, OutputPort];
        let fits = waiting.len() <= 32;
        let (mut i8042, _) = controller();
        let state = I8042State {
            configuration,
            expects: all[expects],
            waiting,
            last,
        };
        prop_assert_eq!(i8042.restore(state).is_ok(), fits);
        for (offset, value, write) in accesses {
            if write {
                i8042.write(offset, &[value]);
            } else {
                get(&mut i8042, offset);
            }
        }
        prop_assert!(i8042.save().waiting.len() <= 32);
    }
}
