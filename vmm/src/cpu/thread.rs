// SPDX-License-Identifier: Apache-2.0
//! The thread of a vCPU.
//!
//! Each vCPU has one, called `fc_vcpu N` as Firecracker's clients know it. It owns the vCPU's file
//! descriptor; the buses are shared and unchanging, and the only locks it takes are those of the
//! devices on them, one at a time. It is told what to do by commands, each with a kick after it:
//!
//! ```text
//! held --Continue--> running --Hold--> held      Stop, or the end of the guest, from both
//! ```

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use brume_devices::Bus;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::counters::{VcpuCounters, VcpuCounts};
use super::exit;
use super::kick::{Kickable, install_handler, kick};
use super::place::Place;
use super::report::{FailureReport, VcpuFailure};
use super::state::{Known, VcpuState};
use crate::event::{Event, EventSender};
use crate::kvm::KvmError;

/// The buses that vCPUs exit to.
#[derive(Clone)]
pub(crate) struct VcpuBuses {
    pub(crate) pio: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
}

/// What a vCPU thread is told.
enum Command {
    /// Leave the guest in a consistent state, say so, and wait.
    Hold(Sender<()>),
    /// Tell where it is; only for a vCPU that is held.
    Locate(Sender<Result<Place, KvmError>>),
    /// Tell the state; only for a vCPU that is held.
    Save(Sender<Result<VcpuState, KvmError>>),
    /// Go on.
    Continue,
    /// Leave the guest for so long, or until the next command.
    Nap(Duration),
    /// End.
    Stop,
}

/// How a vCPU came to its end by itself.
#[derive(Debug)]
pub(crate) enum VcpuOutcome {
    /// A triple fault, or a halt that nothing can end.
    Shutdown,
    /// KVM cannot go on.
    Failed(VcpuFailure),
}

/// A vCPU that has run for the last time.
pub(crate) struct VcpuEnd {
    pub(crate) index: u8,
    pub(crate) outcome: VcpuOutcome,
}

/// The owner's side of a vCPU thread. The thread ends when this is dropped.
pub(crate) struct VcpuHandle {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    counters: Arc<VcpuCounters>,
    known: Arc<Known>,
}

impl VcpuHandle {
    /// Starts a thread for `vcpu`, which is held until it is told to continue.
    pub(crate) fn spawn(
        index: u8,
        vcpu: VcpuFd,
        known: Known,
        buses: VcpuBuses,
        events: EventSender,
    ) -> io::Result<Self> {
        install_handler();
        let (commands, receiver) = channel();
        let counters = Arc::<VcpuCounters>::default();
        let counted = counters.clone();
        let known = Arc::new(known);
        let own = known.clone();
        let thread = thread::Builder::new()
            .name(format!("fc_vcpu {index}"))
            // Emulation is shallow; each page of stack counts against every guest.
            .stack_size(256 * 1024)
            .spawn(move || {
                let vcpu = Kickable::on_this_thread(vcpu);
                let outcome = Runner {
                    index,
                    vcpu,
                    known,
                    buses,
                    commands: receiver,
                    counters: counted,
                }
                .run();
                if let Some(outcome) = outcome {
                    events.send(Event::Vcpu(VcpuEnd { index, outcome }));
                }
            })?;
        Ok(Self {
            commands,
            thread: Some(thread),
            counters,
            known: own,
        })
    }

    /// What is known of the vCPU beside KVM's state of it.
    pub(crate) fn known(&self) -> &Known {
        &self.known
    }

    /// Takes the vCPU out of the guest for so long; a command ends that.
    pub(crate) fn nap(&self, time: Duration) {
        self.interrupt_with(Command::Nap(time));
    }

    /// What the vCPU has counted so far.
    pub(crate) fn counts(&self) -> VcpuCounts {
        self.counters.get()
    }

    /// Lets the vCPU run.
    pub(crate) fn proceed(&self) {
        // A vCPU that can continue is waiting for the command, so it needs no kick. One that has
        // ended takes none.
        let _ = self.commands.send(Command::Continue);
    }

    /// Asks the vCPU to leave the guest; the receiver gets word when it has, or is closed if it has
    /// ended. Asking all before waiting for any keeps a pause short.
    pub(crate) fn hold(&self) -> Receiver<()> {
        let (reply, held) = channel();
        self.interrupt_with(Command::Hold(reply));
        held
    }

    /// Asks a vCPU that is held where it is.
    pub(crate) fn locate(&self) -> Receiver<Result<Place, KvmError>> {
        let (reply, place) = channel();
        // One that has ended drops the way to answer.
        let _ = self.commands.send(Command::Locate(reply));
        place
    }

    /// Asks a vCPU that is held for its state.
    pub(crate) fn save(&self) -> Receiver<Result<VcpuState, KvmError>> {
        let (reply, saved) = channel();
        // One that has ended drops the way to answer.
        let _ = self.commands.send(Command::Save(reply));
        saved
    }

    /// Gives a command to a vCPU that may be in the guest.
    fn interrupt_with(&self, command: Command) {
        // A vCPU that has ended takes no commands, and needs none.
        if self.commands.send(command).is_ok()
            && let Some(thread) = &self.thread
        {
            kick(thread);
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.interrupt_with(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// What to do next.
enum Step {
    /// Enter the guest.
    Enter,
    /// See whether there is a command.
    LookForCommand,
    /// The end, with the reason unless it was asked for.
    End(Option<VcpuOutcome>),
}

struct Runner {
    index: u8,
    vcpu: Kickable,
    known: Arc<Known>,
    buses: VcpuBuses,
    commands: Receiver<Command>,
    counters: Arc<VcpuCounters>,
}

impl Runner {
    /// The life of the thread.
    fn run(mut self) -> Option<VcpuOutcome> {
        if !self.wait_to_continue() {
            return None;
        }
        // A command may be there already, with a kick that came before this thread could take it.
        let mut step = Step::LookForCommand;
        loop {
            step = match step {
                Step::Enter => self.enter(),
                Step::LookForCommand => self.obey(),
                Step::End(outcome) => {
                    if let Some(VcpuOutcome::Failed(_)) = outcome {
                        self.counters.failures.add(1);
                    }
                    return outcome;
                }
            };
        }
    }

    /// Waits in the held state; whether to go on.
    fn wait_to_continue(&mut self) -> bool {
        loop {
            match self.commands.recv() {
                Ok(Command::Continue) => return true,
                Ok(Command::Hold(reply)) => drop(reply.send(())),
                Ok(Command::Locate(reply)) => {
                    // Whoever asked may have given up.
                    let _ = reply.send(Place::of(&self.vcpu.vcpu));
                }
                Ok(Command::Save(reply)) => {
                    let state = VcpuState::save(&self.vcpu.vcpu, &self.known);
                    // Whoever asked may have given up.
                    let _ = reply.send(state);
                }
                Ok(Command::Nap(_)) => {}
                Ok(Command::Stop) | Err(_) => return false,
            }
        }
    }

    /// Does what was commanded, after a kick.
    fn obey(&mut self) -> Step {
        // Before the look at the queue: a kick from now on will be for a later command.
        self.vcpu.set_immediate_exit(false);
        let mut command = self.commands.try_recv().ok();
        // Several may have come before the first kick was heeded: none may be left behind a nap.
        while let Some(Command::Nap(time)) = command {
            command = self.nap(time);
        }
        match command {
            Some(Command::Hold(reply)) => {
                // KVM was entered after the last access that was emulated, and finished its
                // instruction before it looked for the kick: the registers are those between two
                // instructions.
                //
                // Whoever asked may have given up.
                let _ = reply.send(());
                if self.wait_to_continue() {
                    Step::Enter
                } else {
                    Step::End(None)
                }
            }
            Some(Command::Stop) => Step::End(None),
            // State and place are only asked for while it is held.
            Some(Command::Continue | Command::Locate(_) | Command::Save(_) | Command::Nap(_))
            | None => Step::Enter,
        }
    }

    /// Sleeps; the command that has ended it.
    fn nap(&self, time: Duration) -> Option<Command> {
        match self.commands.recv_timeout(time) {
            Ok(command) => Some(command),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Command::Stop),
        }
    }

    /// Enters the guest and deals with what it exits for.
    fn enter(&mut self) -> Step {
        let exit = match self.vcpu.vcpu.run() {
            Ok(exit) => exit,
            Err(error) => return self.run_error(error),
        };
        match exit {
            VcpuExit::MmioRead(address, data) => {
                let begun = Instant::now();
                self.buses.mmio.read(address, data);
                self.counters.mmio_read.add(begun.elapsed());
                Step::Enter
            }
            VcpuExit::MmioWrite(address, data) => {
                let begun = Instant::now();
                self.buses.mmio.write(address, data);
                self.counters.mmio_write.add(begun.elapsed());
                Step::Enter
            }
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => self.port_access(),
            VcpuExit::Intr => self.kicked(),
            // An edge that needs no answer from here.
            VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => Step::Enter,
            VcpuExit::Shutdown | VcpuExit::Hlt => Step::End(Some(VcpuOutcome::Shutdown)),
            VcpuExit::FailEntry(reason, cpu) => {
                let report = FailureReport::of(&self.vcpu.vcpu);
                failed(VcpuFailure::Entry {
                    index: self.index,
                    reason,
                    cpu,
                    report,
                })
            }
            VcpuExit::InternalError => self.internal_error(),
            other => {
                let exit = format!("{other:?}");
                let report = FailureReport::of(&self.vcpu.vcpu);
                failed(VcpuFailure::Unexpected {
                    index: self.index,
                    exit,
                    report,
                })
            }
        }
    }

    fn kicked(&self) -> Step {
        self.counters.kicks.add(1);
        Step::LookForCommand
    }

    fn port_access(&mut self) -> Step {
        let Some(access) = exit::port_access(&mut self.vcpu.vcpu) else {
            return Step::Enter;
        };
        let begun = Instant::now();
        let counter = if access.input {
            &self.counters.io_in
        } else {
            &self.counters.io_out
        };
        let (bus, port) = (&self.buses.pio, u64::from(access.port));
        for data in access.data.chunks_mut(access.width.max(1)) {
            if access.input {
                bus.read(port, data);
            } else {
                bus.write(port, data);
            }
        }
        counter.add(begun.elapsed());
        Step::Enter
    }

    fn run_error(&self, error: kvm_ioctls::Error) -> Step {
        match error.errno() {
            // EAGAIN: a vCPU that waited for its start-up interrupt was woken.
            libc::EINTR | libc::EAGAIN => self.kicked(),
            _ => failed(VcpuFailure::Run {
                index: self.index,
                source: error,
            }),
        }
    }

    fn internal_error(&mut self) -> Step {
        let index = self.index;
        let Some(error) = exit::internal_error(&mut self.vcpu.vcpu) else {
            return Step::Enter;
        };
        let suberror = error.suberror;
        let report = FailureReport::of(&self.vcpu.vcpu).with(error);
        failed(VcpuFailure::Internal {
            index,
            suberror,
            report,
        })
    }
}

fn failed(failure: VcpuFailure) -> Step {
    Step::End(Some(VcpuOutcome::Failed(failure)))
}
