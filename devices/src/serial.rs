// SPDX-License-Identifier: Apache-2.0
//! The 16550A serial port at COM1.
//!
//! The register model is `vm-superio`'s. What is added is the way in: the UART's FIFO has 64
//! bytes, a paste or a pipe has more, so input waits in a bounded queue until the guest has read
//! what was before it, and the console is told when there is room again.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;

use crate::bus::BusDevice;
use crate::counter::Counter;
use crate::interrupt::Interrupt;
use crate::state::{SerialState, StateError};

/// How many bytes of input wait for the guest before the console has to stop reading.
const INPUT_LIMIT: usize = 4096;
/// How many bytes the UART holds itself.
const FIFO_SIZE: usize = 64;

struct Line(Interrupt);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.raise();
        Ok(())
    }
}

/// What goes over the port.
#[derive(Debug, Default)]
pub struct SerialCounters {
    /// Bytes of input that the guest has read.
    pub reads: Counter,
    /// Bytes of output that the sink has taken.
    pub writes: Counter,
    /// Reads of a width that the port does not have.
    pub missed_reads: Counter,
    /// Bytes of output that the sink refused, and writes of a width that the port does not have.
    pub missed_writes: Counter,
    /// Accesses that failed.
    pub errors: Counter,
    /// Bytes of output that a sink with a limit has dropped.
    pub dropped_bytes: Counter,
}

/// Counts what the UART tells.
struct Tally(Arc<SerialCounters>);

impl SerialEvents for Tally {
    fn buffer_read(&self) {
        self.0.reads.add(1);
    }

    fn out_byte(&self) {
        self.0.writes.add(1);
    }

    fn tx_lost_byte(&self) {
        self.0.missed_writes.add(1);
    }

    fn in_buffer_empty(&self) {}
}

/// A serial port that writes what the guest sends to a sink and hands it what is typed.
pub struct Serial {
    uart: vm_superio::Serial<Line, Tally, Box<dyn Write + Send>>,
    waiting: VecDeque<u8>,
    /// Raised when input was refused and there is room again.
    room: Interrupt,
    refused: bool,
    lost_output: bool,
    counters: Arc<SerialCounters>,
}

impl Serial {
    /// How many ports the device takes.
    pub const PORTS: u64 = 8;

    /// A port on line `irq` with its output going to `output`.
    ///
    /// `room` is raised when [`Serial::push_input`] had refused bytes and takes them again.
    pub fn new(
        irq: Interrupt,
        output: Box<dyn Write + Send>,
        room: Interrupt,
        counters: Arc<SerialCounters>,
    ) -> Self {
        let tally = Tally(counters.clone());
        Self {
            uart: vm_superio::Serial::with_events(Line(irq), tally, output),
            waiting: VecDeque::new(),
            room,
            refused: false,
            lost_output: false,
            counters,
        }
    }

    /// Takes input for the guest and returns how many bytes of it were taken.
    ///
    /// If that is fewer than given, the rest has to be offered again after `room` was raised.
    pub fn push_input(&mut self, input: &[u8]) -> usize {
        let taken = input
            .len()
            .min(INPUT_LIMIT - self.waiting.len().min(INPUT_LIMIT));
        self.waiting.extend(input.iter().take(taken));
        self.refused |= taken < input.len();
        self.fill_fifo();
        taken
    }

    /// What the guest could miss of the port.
    pub fn save(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            waiting: self.waiting.iter().copied().collect(),
        }
    }

    /// Takes on a state. An interrupt that is pending in it is raised, so the interrupt controller
    /// has to have its own state by then.
    ///
    /// # Errors
    ///
    /// There is more input than the port holds; it is as it was then.
    pub fn restore(&mut self, state: SerialState) -> Result<(), StateError> {
        StateError::check("receive FIFO", &state.fifo, FIFO_SIZE)?;
        StateError::check("input of the serial port", &state.waiting, INPUT_LIMIT)?;
        let registers = vm_superio::serial::SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo,
        };
        let ends = || {
            let line = Line(self.uart.interrupt_evt().0.clone());
            (line, Tally(self.counters.clone()))
        };
        let [(line, tally), (idle_line, idle_tally)] = [ends(), ends()];
        // A UART cannot change its state, so a new one takes over the output.
        let idle: Box<dyn Write + Send> = Box::new(io::sink());
        let idle = vm_superio::Serial::with_events(idle_line, idle_tally, idle);
        let output = std::mem::replace(&mut self.uart, idle).into_writer();
        // It fails for a FIFO that is too long and a line that cannot be raised, and ours always can.
        if let Ok(uart) = vm_superio::Serial::from_state(&registers, line, tally, output) {
            self.uart = uart;
        }
        self.waiting = state.waiting.into();
        self.fill_fifo();
        Ok(())
    }

    /// Moves waiting input to the UART, as much as it takes.
    fn fill_fifo(&mut self) {
        let mut chunk = [0; FIFO_SIZE];
        let count = self
            .waiting
            .len()
            .min(self.uart.fifo_capacity())
            .min(FIFO_SIZE);
        for (slot, byte) in chunk.iter_mut().zip(&self.waiting) {
            *slot = *byte;
        }
        let Some(chunk) = chunk.get(..count).filter(|chunk| !chunk.is_empty()) else {
            return;
        };
        // In loopback mode nothing is taken and the input goes on waiting.
        let taken = self.uart.enqueue_raw_bytes(chunk).unwrap_or(0);
        self.waiting.drain(..taken);
        if self.refused && self.waiting.len() < INPUT_LIMIT / 2 {
            self.refused = false;
            self.room.raise();
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.uart.read(offset);
            self.fill_fifo();
        } else {
            self.counters.missed_reads.add(1);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) else {
            return self.counters.missed_writes.add(1);
        };
        if let Err(error) = self.uart.write(offset, byte) {
            self.counters.errors.add(1);
            // Once is enough: the guest decides how much it prints.
            if !std::mem::replace(&mut self.lost_output, true) {
                tracing::warn!("the guest's serial output is being lost: {error:?}");
            }
        }
        self.fill_fifo();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const MCR: u64 = 4;
    const LSR: u64 = 5;

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

    fn counter() -> (Arc<AtomicU32>, Interrupt) {
        let count = Arc::new(AtomicU32::new(0));
        let raised = count.clone();
        let line = Interrupt::from_fn(move || {
            raised.fetch_add(1, Ordering::Relaxed);
        });
        (count, line)
    }

    fn port() -> (Serial, Sink, Arc<AtomicU32>, Arc<AtomicU32>) {
        let (irqs, irq) = counter();
        let (rooms, room) = counter();
        let sink = Sink::default();
        (
            Serial::new(irq, Box::new(sink.clone()), room, Arc::default()),
            sink,
            irqs,
            rooms,
        )
    }

    fn get(serial: &mut Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_sink() {
        let (mut serial, sink, ..) = port();
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let (mut serial, _, irqs, rooms) = port();
        serial.write(IER, &[1]);
        let text: Vec<u8> = (0..3000u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(serial.push_input(&text), text.len());
        assert!(irqs.load(Ordering::Relaxed) > 0);
        let mut read = Vec::new();
        while get(&mut serial, LSR) & 1 != 0 {
            read.push(get(&mut serial, DATA));
        }
        assert_eq!(read, text);
        assert_eq!(rooms.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn input_past_the_limit_is_refused_until_there_is_room() {
        let (mut serial, _, _, rooms) = port();
        let text = vec![b'x'; 2 * INPUT_LIMIT];
        let mut taken = serial.push_input(&text);
        assert!(taken < text.len());
        taken += serial.push_input(&text[taken..]);
        assert!(taken <= INPUT_LIMIT + FIFO_SIZE);
        let mut read = 0;
        while rooms.load(Ordering::Relaxed) == 0 {
            assert_ne!(get(&mut serial, LSR) & 1, 0, "room was never announced");
            get(&mut serial, DATA);
            read += 1;
        }
        assert!(read >= INPUT_LIMIT / 2);
        assert!(serial.push_input(&text[taken..]) > 0);
    }

    #[test]
    fn input_survives_loopback_mode() {
        let (mut serial, ..) = port();
        serial.write(MCR, &[0x10]);
        assert_eq!(serial.push_input(b"ab"), 2);
        assert_eq!(get(&mut serial, LSR) & 1, 0);
        serial.write(MCR, &[0]);
        assert_eq!(get(&mut serial, DATA), b'a');
        assert_eq!(get(&mut serial, DATA), b'b');
    }

    #[test]
    fn absurd_accesses_are_harmless() {
        let (mut serial, sink, ..) = port();
        let mut wide = [0xff; 8];
        serial.read(0, &mut wide);
        assert_eq!(wide, [0; 8]);
        serial.write(0, &[1, 2, 3, 4]);
        serial.write(u64::MAX, &[1]);
        serial.read(0, &mut []);
        assert!(sink.0.lock().unwrap().is_empty());
        let counters = &serial.counters;
        let missed = (counters.missed_reads.get(), counters.missed_writes.get());
        assert_eq!(missed, (2, 2));
    }

    #[test]
    fn what_goes_over_the_port_is_counted() {
        struct Refusing;
        impl Write for Refusing {
            fn write(&mut self, _data: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::WouldBlock.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let counts = |serial: &Serial| {
            let all = &serial.counters;
            [&all.reads, &all.writes, &all.missed_writes, &all.errors].map(Counter::get)
        };
        let (mut serial, ..) = port();
        serial.write(DATA, b"a");
        serial.push_input(b"bc");
        get(&mut serial, DATA);
        get(&mut serial, LSR);
        assert_eq!(counts(&serial), [1, 1, 0, 0]);
        let [(_, irq), (_, room)] = [counter(), counter()];
        let mut serial = Serial::new(irq, Box::new(Refusing), room, Arc::default());
        serial.write(DATA, b"a");
        assert_eq!(counts(&serial), [0, 0, 1, 1]);
    }
}
