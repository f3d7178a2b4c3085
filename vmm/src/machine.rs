// SPDX-License-Identifier: Apache-2.0
//! A machine and the thread that owns it.
//!
//! [`Machine::run`] turns the calling thread into the owner: it runs the event loop, takes what
//! arrives in the queue, and is the only one to change the machine's state. Lock order: the owner
//! takes one transport's lock at a time, and only when all vCPUs are held or gone.

mod counts;
mod handler;
mod locks;
mod memory;
mod migrate;
mod pre_copy;
mod serve;
mod snapshot;
mod throttle;

use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use brume_api::{Answer, Fault, MachineEvent, MemoryRequest, Request as ApiRequest};
use brume_devices::GuestEvent;
use brume_virtio::transport::{RunningQueues, TransportCore};
use event_manager::{Error, EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::assemble::Assembly;
use crate::attach::NamedTransport;
use crate::balloon;
use crate::chipset::Chipset;
use crate::controls::Controls;
use crate::cpu::{VcpuEnd, VcpuFailure, VcpuHandle, VcpuOutcome};
use crate::dirty::DirtyTracker;
use crate::event::{Console, Event, EventQueue, EventSender, MachineHandle, Request, StopReason};
use crate::instance::{ApiCall, Description, too_late};
use crate::kvm::Vm;
use crate::lifecycle::{IllegalTransition, VmEvent, VmState};
use crate::memory::MachineMemory;
use crate::metrics;
use crate::telemetry::{Telemetry, timed};

use counts::MetricsTicker;
pub use handler::PauseError;
pub(crate) use pre_copy::{Pass, PreCopied};

/// How a machine came to an orderly end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a restart.
    Reset,
    /// A vCPU shut down: a triple fault, by intent or by accident.
    Shutdown,
    /// It was asked to stop from outside.
    Stopped(StopReason),
    /// It runs in another process now.
    Moved,
    /// It was lost with the process that it had moved to, or given up.
    Lost,
}

/// A machine that came to a bad end.
#[derive(Debug, Error)]
pub enum RunError {
    /// A vCPU cannot go on.
    #[error(transparent)]
    Vcpu(VcpuFailure),
    /// The event loop does not work.
    #[error("the event loop does not work")]
    EventLoop(#[source] Error),
    /// There is no timer.
    #[error("the host gives no timer for metrics")]
    Timer(#[source] std::io::Error),
    /// A device waits for a page that does not come.
    #[error(
        "a device cannot be stopped: it waits for a page of the guest's memory, which the program \
         that serves it does not bring"
    )]
    Memory,
}

/// How a machine begins.
pub(crate) enum Start {
    /// With a kernel.
    Fresh,
    /// Where another one was paused.
    Restored {
        /// What its devices had in hand, in the order of the transports.
        queues: Vec<RunningQueues>,
        /// Whether it goes on at once.
        resume: bool,
        /// Who is to be told when it went on, if it comes from another process.
        arrived: Option<Sender<Instant>>,
    },
}

/// What a machine is built of.
pub(crate) struct MachineParts {
    // In the order in which they have to go: vCPUs before what they use.
    pub(crate) vcpus: Vec<VcpuHandle>,
    pub(crate) assembly: Assembly,
    pub(crate) start: Start,
}

/// A machine: vCPUs, memory and devices.
pub struct Machine {
    // In the order in which they have to go: vCPUs before what they use.
    pub(crate) vcpus: Vec<VcpuHandle>,
    pub(crate) transports: Vec<NamedTransport>,
    pub(crate) controls: Controls,
    pub(crate) chipset: Chipset,
    /// The queues of paused devices, in the order of `transports`.
    pub(crate) paused: Vec<RunningQueues>,
    pub(crate) state: VmState,
    pub(crate) description: Description,
    pub(crate) telemetry: Telemetry,
    console: Console,
    pub(crate) sender: EventSender,
    queue: EventQueue,
    end: Option<Result<Ending, RunError>>,
    tracker: Arc<Mutex<DirtyTracker>>,
    pub(crate) vm: Arc<Vm>,
    pub(crate) memory: Arc<MachineMemory>,
    begin: Start,
    /// A rate that a client waits for.
    rate: Option<memory::RateWindow>,
    /// Whether a snapshot is being written while the machine runs.
    saving: bool,
    /// Whether it moves to another process.
    moving: Option<migrate::Moving>,
    throttle: throttle::Throttle,
    locks: locks::Locks,
}

impl Machine {
    /// A machine of `parts`, which report to the queue.
    pub(crate) fn new(
        parts: MachineParts,
        (sender, queue): (EventSender, EventQueue),
        description: Description,
        telemetry: Telemetry,
    ) -> Self {
        let assembly = parts.assembly;
        Self {
            vcpus: parts.vcpus,
            transports: assembly.transports,
            controls: assembly.controls,
            chipset: assembly.chipset,
            paused: Vec::new(),
            state: VmState::NotStarted,
            description,
            telemetry,
            console: assembly.console,
            sender,
            queue,
            end: None,
            tracker: Arc::new(Mutex::new(assembly.tracker)),
            vm: assembly.vm,
            memory: Arc::new(assembly.memory),
            begin: parts.start,
            rate: None,
            saving: false,
            moving: None,
            throttle: throttle::Throttle::default(),
            locks: locks::Locks::default(),
        }
    }

    /// A way to ask for something from other threads.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle::new(self.sender.clone())
    }

    /// The input side of the serial console; there is none if the output goes to a file.
    pub fn console(&self) -> Option<Console> {
        let serial = self.description.config.serial.as_ref();
        let to_file = serial.is_some_and(|serial| serial.serial_out_path.is_some());
        (!to_file).then(|| self.console.clone())
    }

    /// Starts the machine and runs it to its end on the calling thread, which serves the given
    /// subscribers meanwhile.
    ///
    /// # Errors
    ///
    /// A vCPU fails, or the event loop does. vCPUs, device workers and what they held are gone in
    /// any case when this returns.
    pub fn run(
        mut self,
        subscribers: Vec<Box<dyn MutEventSubscriber>>,
    ) -> Result<Ending, RunError> {
        let mut manager = EventManager::new().map_err(RunError::EventLoop)?;
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        manager.add_subscriber(Box::new(WakeUp(self.queue.wake())));
        if self.telemetry.has_file() {
            let ticker = MetricsTicker::new(self.sender.clone()).map_err(RunError::Timer)?;
            manager.add_subscriber(Box::new(ticker));
        }
        if let Some(watch) = self.memory_watch() {
            manager.add_subscriber(watch);
        }
        self.start();
        loop {
            match manager.run() {
                // A stopped process that goes on, or a debugger.
                Err(Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
                result => drop(result.map_err(RunError::EventLoop)?),
            }
            while let Some(event) = self.queue.next() {
                self.take(event);
            }
            if let Some(end) = self.end.take() {
                return end;
            }
        }
    }

    fn start(&mut self) {
        // From now on it is for the clients of the machine to remove, as at Firecracker.
        if let Some(vsock) = &self.controls.vsock {
            vsock.leave_socket();
        }
        // Only a machine that was never started is run, so no transition here is refused.
        match std::mem::replace(&mut self.begin, Start::Fresh) {
            Start::Fresh => {
                if let Ok(next) = self.state.next(VmEvent::Start) {
                    self.enter(next);
                    self.vcpus.iter().for_each(VcpuHandle::proceed);
                }
            }
            Start::Restored {
                queues,
                resume,
                arrived,
            } => {
                if let Ok(next) = self.state.next(VmEvent::Restore) {
                    self.paused = queues;
                    self.enter(next);
                }
                let resumed = if resume { self.resume().ok() } else { None };
                if let Some(arrived) = arrived {
                    let _ = arrived.send(resumed.unwrap_or_else(Instant::now));
                    // Switches still send the guest's frames to where it was.
                    let interfaces = &self.controls.interfaces;
                    interfaces.iter().for_each(|(_, net)| net.announce());
                }
            }
        }
        self.write_metrics();
    }

    /// Which pages were written. A machine that moves shares it with the thread that sends it.
    fn tracker(&self) -> MutexGuard<'_, DirtyTracker> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes on a state and tells it.
    fn enter(&mut self, state: VmState) {
        self.state = state;
        self.telemetry.tell_state(state);
    }

    /// Holds the vCPUs first, so that no device is used any more, then stops the devices, which
    /// finish what is in flight.
    fn pause(&mut self) -> Result<(), PauseError> {
        let next = self.state.next(VmEvent::Pause)?;
        if self.is_followed() {
            return Err(PauseError::Follows);
        }
        let held: Vec<Receiver<()>> = self.vcpus.iter().map(VcpuHandle::hold).collect();
        self.wait_held(held)?;
        self.paused = self.pause_devices()?;
        self.enter(next);
        Ok(())
    }

    /// The reverse of a pause; when the vCPUs went on. A host that is busy with them may come back
    /// here much later.
    fn resume(&mut self) -> Result<Instant, IllegalTransition> {
        let next = self.state.next(VmEvent::Resume)?;
        let mut queues = std::mem::take(&mut self.paused).into_iter();
        self.each_transport(|core| queues.next().map(|queues| core.resume(queues)));
        let resumed = Instant::now();
        self.vcpus.iter().for_each(VcpuHandle::proceed);
        self.enter(next);
        Ok(resumed)
    }

    fn each_transport<T>(&self, mut action: impl FnMut(&mut TransportCore) -> T) -> Vec<T> {
        let act = |named: &NamedTransport| {
            action(
                named
                    .transport
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .core(),
            )
        };
        self.transports.iter().map(act).collect()
    }

    /// Ends the vCPUs, then the devices.
    fn stop(&mut self, end: Result<Ending, RunError>) {
        let Ok(next) = self.state.next(VmEvent::Stop) else {
            return;
        };
        self.call_off_move();
        self.write_metrics();
        self.tear_down();
        self.enter(next);
        self.end = Some(end);
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Guest(GuestEvent::Reset) => {
                self.tell(MachineEvent::Reset);
                self.stop(Ok(Ending::Reset));
            }
            Event::Guest(GuestEvent::PowerOff) => {
                self.tell(MachineEvent::PowerOff);
                self.stop(Ok(Ending::PowerOff));
            }
            Event::DeviceFailed(device) => self.tell(MachineEvent::DeviceNeedsReset { device }),
            Event::Guest(GuestEvent::Panicked) => {
                tracing::error!("the guest's kernel has panicked");
                self.tell(MachineEvent::GuestPanicked);
            }
            Event::MetricsDue => self.write_metrics(),
            Event::RateDue => self.end_rate(),
            Event::Copied(pass) => self.copied(*pass),
            Event::Saved(saved) => self.saved(*saved),
            Event::NapDue => self.nap(),
            Event::LocksDue => self.locks_due(),
            Event::StopDue => self.stop_due(),
            Event::Migration(event) => self.departure(event),
            // It has arrived; there is nothing more to do for it.
            Event::Incoming(_) => {}
            Event::MemoryHandlerGone => self.memory_handler_gone(),
            Event::Vcpu(VcpuEnd { index, outcome }) => self.vcpu_ended(index, outcome),
            Event::Request(request) => self.answer(request),
        }
    }

    fn vcpu_ended(&mut self, index: u8, outcome: VcpuOutcome) {
        match outcome {
            VcpuOutcome::Shutdown => {
                tracing::info!("vCPU {index} shut down");
                self.tell(MachineEvent::Shutdown);
                self.stop(Ok(Ending::Shutdown));
            }
            VcpuOutcome::Failed(failure) => {
                let error = failure.to_string();
                let error = error.lines().next().unwrap_or_default().to_owned();
                self.tell(MachineEvent::VcpuFailed { error });
                self.stop(Err(RunError::Vcpu(failure)));
            }
        }
    }

    fn tell(&self, event: MachineEvent) {
        self.telemetry.events.publish(event);
    }

    fn answer(&mut self, request: Request) {
        // Whoever asked may have stopped waiting; that is no matter of ours.
        match request {
            Request::Pause(reply) => drop(reply.send(self.pause())),
            Request::Resume(reply) => drop(reply.send(self.resume().map(drop))),
            Request::State(reply) => drop(reply.send(self.state)),
            Request::Stop(reason) => self.stop_for(reason),
            Request::Api(call) => self.api_call(call),
        }
    }

    fn api_call(&mut self, call: ApiCall) {
        if let Err(fault) = self.refuse_while_moving(call.request()) {
            return call.answer(|_| Err(fault));
        }
        match call.request() {
            ApiRequest::Memory(MemoryRequest::GetDirtyRate { window_ms }) => {
                let window = Duration::from_millis((*window_ms).into());
                self.begin_rate(call, window);
            }
            ApiRequest::CreateSnapshot(request) if request.pre_copy => {
                let request = request.clone();
                self.begin_pre_copy(call, request);
            }
            _ => call.answer(|request| self.call(request)),
        }
    }

    /// Carries out a client's request.
    fn call(&mut self, request: ApiRequest) -> Result<Answer, Fault> {
        if let Some(answer) = self.description.answer(&request, self.state) {
            return answer;
        }
        match request {
            ApiRequest::Pause | ApiRequest::Resume => self.change_state(&request)?,
            ApiRequest::CreateSnapshot(request) => self.create_snapshot(&request)?,
            ApiRequest::Memory(request) => return self.memory_call(&request),
            ApiRequest::Migration(request) => return self.migration_call(request),
            ApiRequest::Stop => {
                // The answer has to be out before the process is gone.
                self.sender
                    .send(Event::Request(Request::Stop(StopReason::Api)));
            }
            ApiRequest::GetMetrics => return Ok(Answer::Metrics(metrics::text(&self.counts()))),
            ApiRequest::FlushMetrics => self
                .flush_metrics()
                .map_err(|error| Fault::from_error(&error))?,
            ApiRequest::SendCtrlAltDel => self.controls.press_ctrl_alt_del()?,
            ApiRequest::PatchDrive(patch) => {
                let config = &mut self.description.config;
                self.controls.patch_drive(config, &patch)?;
                self.tell_changed(patch.drive_id);
            }
            ApiRequest::PatchNetworkInterface(patch) => {
                let config = &mut self.description.config;
                self.controls.patch_interface(config, &patch)?;
                self.tell_changed(patch.iface_id);
            }
            ApiRequest::Balloon(request) => {
                let config = &mut self.description.config;
                let answer = balloon::call(&request, &self.controls, config)?;
                if answer == Answer::Nothing {
                    self.tell_changed("balloon".into());
                }
                return Ok(answer);
            }
            _ => return Err(too_late()),
        }
        Ok(Answer::done())
    }

    fn tell_changed(&self, device: String) {
        self.tell(MachineEvent::DeviceChanged { device });
    }

    /// Pauses or resumes. What is so already is as good as done, as it is for Firecracker.
    fn change_state(&mut self, request: &ApiRequest) -> Result<(), Fault> {
        let mut time = Duration::ZERO;
        let pause = *request == ApiRequest::Pause;
        let done = match (pause, self.state) {
            (true, VmState::Paused) | (false, VmState::Running) => return Ok(()),
            (true, _) => timed(&mut time, || self.pause()),
            (false, _) => timed(&mut time, || Ok(self.resume().map(drop)?)),
        };
        done.map_err(|error| Fault::from_error(&error))?;
        if pause {
            self.telemetry.times.pause = time;
        } else {
            self.telemetry.times.resume = time;
        }
        Ok(())
    }
}

/// Gets the event loop out of its wait when something was queued.
pub(crate) struct WakeUp(pub(crate) Arc<EventFd>);

impl MutEventSubscriber for WakeUp {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // Nothing to read means that somebody else was faster, which is as good.
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // The loop is new and the event is ours: it is not in it yet.
        let _ = ops.add(Events::new(self.0.as_ref(), EventSet::IN));
    }
}
