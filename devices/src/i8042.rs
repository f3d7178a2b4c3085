// SPDX-License-Identifier: Apache-2.0
//! The keyboard controller: a line that resets the machine, and a keyboard that can press one
//! combination of keys, by which a guest is asked to shut down.
//!
//! It has no mouse. Scan codes are of set 2 and not translated, as its configuration byte says.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::bus::BusDevice;
use crate::counter::Counter;
use crate::event::{EventSink, GuestEvent};
use crate::interrupt::Interrupt;
use crate::state::{I8042Expects as Expects, I8042State, StateError};

/// Offset of the data port.
const DATA: u64 = 0;
/// Offset of the port that reads as the status and takes commands.
const COMMAND: u64 = 4;

/// Status: there is a byte to read.
const OUTPUT_FULL: u8 = 1;
/// Status: the self test has passed.
const SYSTEM: u8 = 1 << 2;
/// Status: the keyboard is not locked.
const UNLOCKED: u8 = 1 << 4;

/// Configuration: the keyboard interrupts.
const KEYBOARD_INTERRUPT: u8 = 1;
/// Configuration: the keyboard's clock stands still.
const KEYBOARD_OFF: u8 = 1 << 4;

/// The most bytes that wait for the guest to read them.
const MAX_WAITING: usize = 32;

/// A keyboard's answer to what it was told.
const ACK: u8 = 0xfa;
/// Make codes of Control, Alt and Delete, then their break codes.
const CTRL_ALT_DEL: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];

/// What the guest does with the controller.
#[derive(Debug, Default)]
pub struct I8042Counters {
    /// Bytes read.
    pub reads: Counter,
    /// Bytes written.
    pub writes: Counter,
    /// Reads of a port that is none, or of another width.
    pub missed_reads: Counter,
    /// Writes that mean nothing: to a port that is none, or of another width.
    pub missed_writes: Counter,
    /// Resets that the guest asked for.
    pub resets: Counter,
}

/// The i8042 at ports 0x60 to 0x64.
pub struct I8042 {
    events: EventSink,
    irq: Interrupt,
    configuration: u8,
    expects: Expects,
    waiting: VecDeque<u8>,
    /// What was read last; it stays at the data port.
    last: u8,
    counters: Arc<I8042Counters>,
}

impl I8042 {
    /// How many ports the device takes.
    pub const PORTS: u64 = 5;

    /// A controller that reports a reset to `events` and raises `irq` for keys.
    pub fn new(events: EventSink, irq: Interrupt) -> Self {
        Self {
            events,
            irq,
            configuration: KEYBOARD_INTERRUPT | SYSTEM,
            expects: Expects::KeyboardCommand,
            waiting: VecDeque::new(),
            last: 0,
            counters: Arc::default(),
        }
    }

    /// What the guest does with it.
    pub fn counters(&self) -> Arc<I8042Counters> {
        self.counters.clone()
    }

    /// What the guest could miss of the controller.
    pub fn save(&self) -> I8042State {
        I8042State {
            configuration: self.configuration,
            expects: self.expects,
            waiting: self.waiting.iter().copied().collect(),
            last: self.last,
        }
    }

    /// Takes on a state. If there is a byte to read the guest is told so again, so the interrupt
    /// controller has to have its own state by then.
    ///
    /// # Errors
    ///
    /// There are more bytes than the controller holds; it is as it was then.
    pub fn restore(&mut self, state: I8042State) -> Result<(), StateError> {
        StateError::check("keyboard controller", &state.waiting, MAX_WAITING)?;
        self.configuration = state.configuration;
        self.expects = state.expects;
        self.waiting = state.waiting.into();
        self.last = state.last;
        self.announce();
        Ok(())
    }

    /// Presses and releases Control, Alt and Delete. Whether the guest was told: it is not while
    /// it has switched the keyboard off or reads no keys.
    pub fn press_ctrl_alt_del(&mut self) -> bool {
        let off = self.configuration & KEYBOARD_OFF != 0;
        if off || self.waiting.len() + CTRL_ALT_DEL.len() > MAX_WAITING {
            return false;
        }
        self.put(&CTRL_ALT_DEL);
        true
    }

    /// Queues bytes for the guest; what it does not read is lost at some point.
    fn put(&mut self, bytes: &[u8]) {
        let room = MAX_WAITING - self.waiting.len().min(MAX_WAITING);
        self.waiting.extend(bytes.iter().take(room));
        self.announce();
    }

    /// Tells the guest of the byte that it can read, if there is one.
    fn announce(&self) {
        if !self.waiting.is_empty() && self.configuration & KEYBOARD_INTERRUPT != 0 {
            self.irq.raise();
        }
    }

    fn command(&mut self, command: u8) {
        self.expects = Expects::KeyboardCommand;
        match command {
            0x20 => self.put(&[self.configuration]),
            0x60 => self.expects = Expects::Configuration,
            // Self test: passed.
            0xaa => self.put(&[0x55]),
            // Test of the keyboard's line: good.
            0xab => self.put(&[0]),
            0xad => self.configuration |= KEYBOARD_OFF,
            0xae => self.configuration &= !KEYBOARD_OFF,
            // The output port: no reset, address line 20 on.
            0xd0 => self.put(&[3]),
            0xd1 => self.expects = Expects::OutputPort,
            0xfe => {
                self.counters.resets.add(1);
                self.events.report(GuestEvent::Reset);
            }
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        let expects = std::mem::replace(&mut self.expects, Expects::KeyboardCommand);
        match expects {
            Expects::Configuration => {
                self.configuration = byte;
                self.announce();
            }
            Expects::OutputPort => {}
            Expects::KeyboardArgument => self.put(&[ACK]),
            Expects::KeyboardCommand => self.keyboard_command(byte),
        }
    }

    fn keyboard_command(&mut self, command: u8) {
        match command {
            // Lamps, scan code set, repeat rate: each has an argument.
            0xed | 0xf0 | 0xf3 => {
                self.expects = Expects::KeyboardArgument;
                self.put(&[ACK]);
            }
            // Who are you: a keyboard of the usual kind.
            0xf2 => self.put(&[ACK, 0xab, 0x83]),
            0xee => self.put(&[0xee]),
            // Reset and self test: passed.
            0xff => self.put(&[ACK, 0xaa]),
            _ => self.put(&[ACK]),
        }
    }

    /// `None` for a port that is none.
    fn read_byte(&mut self, offset: u64) -> Option<u8> {
        Some(match offset {
            DATA => {
                if let Some(byte) = self.waiting.pop_front() {
                    self.last = byte;
                    self.announce();
                }
                self.last
            }
            COMMAND if self.waiting.is_empty() => SYSTEM | UNLOCKED,
            COMMAND => SYSTEM | UNLOCKED | OUTPUT_FULL,
            _ => return None,
        })
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data
            && let Some(value) = self.read_byte(offset)
        {
            *byte = value;
            self.counters.reads.add(1);
        } else {
            self.counters.missed_reads.add(1);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (DATA, &[byte]) => self.data(byte),
            (COMMAND, &[command]) => self.command(command),
            _ => return self.counters.missed_writes.add(1),
        }
        self.counters.writes.add(1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Rig {
        i8042: I8042,
        resets: Arc<AtomicU32>,
        irqs: Arc<AtomicU32>,
    }

    fn rig() -> Rig {
        let (resets, irqs) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
        let (count, raised) = (resets.clone(), irqs.clone());
        let events = EventSink::new(move |event| {
            assert_eq!(event, GuestEvent::Reset);
            count.fetch_add(1, Ordering::Relaxed);
        });
        let irq = Interrupt::from_fn(move || {
            raised.fetch_add(1, Ordering::Relaxed);
        });
        Rig {
            i8042: I8042::new(events, irq),
            resets,
            irqs,
        }
    }

    impl Rig {
        fn read(&mut self, offset: u64) -> u8 {
            let mut data = [0xff];
            self.i8042.read(offset, &mut data);
            data[0]
        }

        /// All that there is to read.
        fn drain(&mut self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.read(COMMAND) & OUTPUT_FULL != 0 {
                bytes.push(self.read(DATA));
            }
            bytes
        }
    }

    #[test]
    fn only_the_reset_command_resets() {
        let mut rig = rig();
        rig.i8042.write(DATA, &[0xfe]);
        rig.i8042.write(COMMAND, &[0xff]);
        rig.i8042.write(COMMAND, &[0xfe, 0xfe]);
        rig.i8042.write(u64::MAX, &[0xfe]);
        assert_eq!(rig.resets.load(Ordering::Relaxed), 0);
        rig.i8042.write(COMMAND, &[0xfe]);
        assert_eq!(rig.resets.load(Ordering::Relaxed), 1);
        let counters = rig.i8042.counters();
        let counts = [&counters.writes, &counters.missed_writes, &counters.resets];
        assert_eq!(counts.map(Counter::get), [3, 2, 1]);
    }

    #[test]
    fn the_keys_are_pressed_and_released_with_an_interrupt_for_each_byte() {
        let mut rig = rig();
        assert!(rig.i8042.press_ctrl_alt_del());
        assert_eq!(rig.drain(), CTRL_ALT_DEL);
        assert_eq!(rig.irqs.load(Ordering::Relaxed), 11);
        rig.i8042.write(COMMAND, &[0xad]);
        assert!(!rig.i8042.press_ctrl_alt_del());
    }

    #[test]
    fn a_guest_that_reads_nothing_costs_nothing() {
        let mut rig = rig();
        assert!(rig.i8042.press_ctrl_alt_del() && rig.i8042.press_ctrl_alt_del());
        assert!(!rig.i8042.press_ctrl_alt_del());
        for byte in 0..=255 {
            for offset in [DATA, COMMAND] {
                if (offset, byte) != (COMMAND, 0xfe) {
                    rig.i8042.write(offset, &[byte]);
                }
            }
        }
        assert!(rig.drain().len() <= MAX_WAITING);
    }

    #[test]
    fn a_driver_finds_a_keyboard_that_works() {
        let mut rig = rig();
        let commands: [(u64, u8, &[u8]); 7] = [
            (COMMAND, 0xaa, &[0x55]),
            (COMMAND, 0xab, &[0]),
            (COMMAND, 0x20, &[KEYBOARD_INTERRUPT | SYSTEM]),
            (DATA, 0xff, &[ACK, 0xaa]),
            (DATA, 0xf2, &[ACK, 0xab, 0x83]),
            (DATA, 0xed, &[ACK]),
            (DATA, 0x07, &[ACK]),
        ];
        for (offset, byte, answer) in commands {
            rig.i8042.write(offset, &[byte]);
            assert_eq!(rig.drain(), answer, "{byte:#x}");
        }
        // The configuration is what was written, and without its bit there is no interrupt.
        rig.i8042.write(COMMAND, &[0x60]);
        rig.i8042.write(DATA, &[0]);
        let before = rig.irqs.load(Ordering::Relaxed);
        rig.i8042.write(COMMAND, &[0x20]);
        assert_eq!(rig.drain(), [0]);
        assert_eq!(rig.irqs.load(Ordering::Relaxed), before);
    }

    #[test]
    fn absurd_accesses_are_harmless() {
        let mut rig = rig();
        let mut wide = [0xff; 8];
        rig.i8042.read(0, &mut wide);
        assert_eq!(wide, [0; 8]);
        rig.i8042.read(DATA, &mut []);
        assert_eq!(rig.read(2), 0);
        assert_eq!(rig.read(u64::MAX), 0);
        rig.read(COMMAND);
        let counters = rig.i8042.counters();
        assert_eq!((counters.reads.get(), counters.missed_reads.get()), (1, 4));
    }
}
