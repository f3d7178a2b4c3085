// SPDX-License-Identifier: Apache-2.0
//! A machine that is described by requests before it is started, and what the control API sees of
//! it then.
//!
//! ```text
//!   fc_api thread: ApiController --- Request::Api + way back ---> one queue --> owner's thread
//!                                                                   before the start: Instance
//!                                                                   after it: Machine
//! ```

mod receive;

use std::fs::File;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use brume_api::config::VmConfig;
use brume_api::{
    Answer, ApiMetrics, Controller, EventHub, Fault, InstanceInfo, LoadSnapshot, MachineEvent,
    MigrationRequest, Reply, Request as ApiRequest, Section, VersionInfo,
};
use brume_mmds::SharedMmds;
use brume_virtio::net::Tap;
use event_manager::{Error, EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};

use crate::attach;
use crate::balloon;
use crate::build::{BuildError, BuildOptions};
use crate::event::{
    Event, EventQueue, EventSender, MachineHandle, Request, StopReason, event_queue,
};
use crate::lifecycle::VmState;
use crate::machine::{Machine, MachineParts, RunError, WakeUp};
use crate::metrics::{self, Counts};
use crate::migration::{
    Control, Door, Incoming, IncomingEvent, Progress, Reception, awaiting, load_tls,
};
use crate::mmds;
use crate::snapshot::LoadError;
use crate::telemetry::{SharedState, Telemetry};

/// The version of Firecracker whose interface this is.
pub const FIRECRACKER_VERSION: &str = "1.16.1";

const TOO_LATE: &str = "The requested operation is not supported after starting the microVM.";
const TOO_EARLY: &str = "The requested operation is not supported before starting the microVM.";

/// A request of a client, and the way to answer it.
pub(crate) struct ApiCall {
    request: ApiRequest,
    reply: Reply,
}

impl ApiCall {
    /// What is asked for.
    pub(crate) fn request(&self) -> &ApiRequest {
        &self.request
    }

    /// Answers with what `handle` makes of the request.
    pub(crate) fn answer(self, handle: impl FnOnce(ApiRequest) -> Result<Answer, Fault>) {
        self.reply.send(handle(self.request));
    }
}

/// Passes a client's requests on to the owner of the machine. What can be answered without it is
/// answered here, also while the owner waits for a device.
pub struct ApiController {
    sender: EventSender,
    id: String,
    state: SharedState,
    migration: Progress,
}

impl Controller for ApiController {
    fn call(&self, request: ApiRequest, reply: Reply) {
        match request {
            ApiRequest::GetInstance => reply.send(instance(&self.id, self.state.get())),
            ApiRequest::GetVersion => reply.send(version()),
            ApiRequest::Migration(MigrationRequest::Get) => {
                reply.send(Answer::json(&self.migration.get()));
            }
            request => {
                let call = ApiCall { request, reply };
                self.sender.send(Event::Request(Request::Api(call)));
            }
        }
    }
}

/// The answer to GET /
fn instance(id: &str, state: VmState) -> Result<Answer, Fault> {
    Answer::json(&InstanceInfo {
        app_name: "Firecracker",
        id: id.to_owned(),
        state: state.name(),
        vmm_version: FIRECRACKER_VERSION,
    })
}

/// The answer to GET /version
fn version() -> Result<Answer, Fault> {
    Answer::json(&VersionInfo {
        firecracker_version: FIRECRACKER_VERSION,
    })
}

/// What a machine is called and made from.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// Its name; without one it is nobody's but its owner's.
    pub id: String,
    /// What it is made from.
    pub config: VmConfig,
    /// The data of its metadata service; [`BuildOptions`] have the same.
    pub mmds: SharedMmds,
}

impl Description {
    /// Answers what can be answered at any time; `None` for the rest.
    pub(crate) fn answer(
        &self,
        request: &ApiRequest,
        state: VmState,
    ) -> Option<Result<Answer, Fault>> {
        let answer = match request {
            ApiRequest::GetMachineConfig => Answer::json(&self.config.machine_config),
            ApiRequest::GetConfig => match self.config.to_full_json() {
                Ok(value) => Answer::json(&value),
                Err(error) => Err(Fault::from_error(&error)),
            },
            ApiRequest::Balloon(request) if state == VmState::NotStarted => {
                return balloon::answer_before_start(request, &self.config);
            }
            _ => {
                let late = state != VmState::NotStarted && self.config.mmds_config.is_none();
                return mmds::answer(&self.mmds, request, late);
            }
        };
        Some(answer)
    }
}

/// The fault of a request that comes after the start.
pub(crate) fn too_late() -> Fault {
    Fault::new(TOO_LATE)
}

/// The fault of a snapshot that is to be loaded into something that is no blank page.
fn load_not_allowed() -> Fault {
    Fault::new(
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring \
         boot-specific resources.",
    )
}

/// How the time before the start came to its end.
pub enum Outcome {
    /// There is a machine, which is to be run.
    Machine(Box<Machine>),
    /// It was asked to stop.
    Stopped(StopReason),
    /// A snapshot could not be loaded, which ends a process.
    LoadFailed(LoadError),
    /// No machine can come any more to a process that is there for one; why.
    NotReceived(String),
}

/// Where what a client has asked for has led.
enum Next {
    /// There is a machine.
    Built(Box<MachineParts>),
    /// It was asked to stop.
    Stop(StopReason),
    /// A snapshot could not be loaded.
    LoadFailed(LoadError),
    /// No machine can come any more.
    NotReceived(String),
}

/// Makes what a machine needs besides its configuration, for each try to start one.
pub type MakeOptions = Box<dyn FnMut() -> std::io::Result<BuildOptions>>;

/// What is called on each new configuration of the log.
pub type SetLogger = Box<dyn FnMut(&brume_api::config::Logger) -> Result<(), Fault>>;

/// A machine that is not built yet.
pub struct Instance {
    description: Description,
    telemetry: Telemetry,
    sender: EventSender,
    queue: EventQueue,
    options: MakeOptions,
    set_logger: SetLogger,
    /// Whether clients have begun to describe a machine.
    described: bool,
    /// A machine that is awaited from another process.
    incoming: Option<Incoming>,
    /// The thread that waits for it.
    reception: Option<JoinHandle<()>>,
    /// Whether the process is there for nothing else.
    only_receives: bool,
}

impl Instance {
    /// An instance that is described as `description` so far.
    ///
    /// # Errors
    ///
    /// The host gives no file descriptor, or there is no place for metrics.
    pub fn new(
        description: Description,
        options: MakeOptions,
        set_logger: SetLogger,
    ) -> Result<Self, BuildError> {
        let (sender, queue) = event_queue()?;
        let telemetry = Telemetry::of(&description.config)?;
        telemetry.tell_state(VmState::NotStarted);
        Ok(Self {
            description,
            telemetry,
            sender,
            queue,
            options,
            set_logger,
            described: false,
            incoming: None,
            reception: None,
            only_receives: false,
        })
    }

    /// A way to ask for something from other threads; good for the machine too.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle::new(self.sender.clone())
    }

    /// What an API server takes its answers from; good for the machine too.
    pub fn controller(&self) -> ApiController {
        ApiController {
            sender: self.sender.clone(),
            id: self.description.id.clone(),
            state: self.telemetry.state.clone(),
            migration: self.telemetry.migration.clone(),
        }
    }

    /// Where the machine's events can be watched.
    pub fn events(&self) -> EventHub {
        self.telemetry.events.clone()
    }

    /// What counts the requests of the API.
    pub fn api_metrics(&self) -> Arc<ApiMetrics> {
        self.telemetry.api.clone()
    }

    /// Takes how long it took until clients could connect, and the CPU time of it.
    pub fn started_up(&mut self, wall: Duration, cpu: Duration) {
        self.telemetry.times.startup = Some((wall, cpu));
    }

    /// Builds the machine at once.
    ///
    /// # Errors
    ///
    /// It cannot be built as it is described.
    pub fn build(mut self) -> Result<Machine, BuildError> {
        let options = (self.options)()?;
        let parts = MachineParts::build(&self.description, options, &self.sender)?;
        Ok(self.into_machine(parts))
    }

    /// Takes requests on the calling thread until there is a machine or the wish for an end, and
    /// serves `subscribers` meanwhile, which are given back.
    ///
    /// # Errors
    ///
    /// The event loop does not work.
    pub fn wait_for_start(
        mut self,
        subscribers: Vec<Box<dyn MutEventSubscriber>>,
    ) -> Result<(Outcome, Vec<Box<dyn MutEventSubscriber>>), RunError> {
        let mut manager = EventManager::new().map_err(RunError::EventLoop)?;
        let ids: Vec<SubscriberId> = subscribers
            .into_iter()
            .map(|subscriber| manager.add_subscriber(subscriber))
            .collect();
        manager.add_subscriber(Box::new(WakeUp(self.queue.wake())));
        let next = loop {
            match manager.run() {
                Err(Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
                result => drop(result.map_err(RunError::EventLoop)?),
            }
            let mut next = None;
            while next.is_none()
                && let Some(event) = self.queue.next()
            {
                next = self.take(event);
            }
            if let Some(next) = next {
                break next;
            }
        };
        let subscribers = ids
            .into_iter()
            .filter_map(|id| manager.remove_subscriber(id).ok())
            .collect();
        let outcome = match next {
            Next::Built(parts) => Outcome::Machine(Box::new(self.into_machine(*parts))),
            Next::Stop(reason) => {
                self.end_reception();
                Outcome::Stopped(reason)
            }
            Next::LoadFailed(error) => Outcome::LoadFailed(error),
            Next::NotReceived(why) => Outcome::NotReceived(why),
        };
        Ok((outcome, subscribers))
    }

    fn into_machine(self, parts: MachineParts) -> Machine {
        let queue = (self.sender, self.queue);
        Machine::new(parts, queue, self.description, self.telemetry)
    }

    /// Takes one thing from the queue; `Some` ends the wait.
    fn take(&mut self, event: Event) -> Option<Next> {
        let request = match event {
            Event::Request(request) => request,
            Event::Incoming(event) => return self.arrival(event),
            _ => return None,
        };
        match request {
            Request::Stop(reason) => return Some(Next::Stop(reason)),
            Request::State(reply) => drop(reply.send(VmState::NotStarted)),
            Request::Pause(reply) => drop(reply),
            Request::Resume(reply) => drop(reply),
            Request::Api(call) if call.request == ApiRequest::Stop => {
                call.answer(|_| Ok(Answer::done()));
                return Some(Next::Stop(StopReason::Api));
            }
            Request::Api(call) => {
                let mut next = None;
                call.answer(|request| self.call(request, &mut next));
                return next;
            }
        }
        None
    }

    fn call(&mut self, request: ApiRequest, next: &mut Option<Next>) -> Result<Answer, Fault> {
        if let ApiRequest::Migration(request) = request {
            return self.migration_call(request);
        }
        if let Some(answer) = self.description.answer(&request, VmState::NotStarted) {
            return answer;
        }
        match request {
            ApiRequest::Configure(_) | ApiRequest::Start | ApiRequest::LoadSnapshot(_)
                if self.incoming.is_some() =>
            {
                Err(awaiting())
            }
            ApiRequest::Configure(section) => self.configure(*section),
            ApiRequest::GetMetrics => Ok(Answer::Metrics(metrics::text(&self.counts()))),
            ApiRequest::Start => {
                *next = Some(Next::Built(Box::new(self.start()?)));
                // It is as good as running for whoever hears that it was started.
                self.telemetry.state.set(VmState::Running);
                Ok(Answer::done())
            }
            ApiRequest::LoadSnapshot(_) if self.described => Err(load_not_allowed()),
            ApiRequest::LoadSnapshot(request) => self.load(&request, next),
            _ => Err(Fault::new(TOO_EARLY)),
        }
    }

    /// Makes a machine from a snapshot. If it cannot be made, that is the end, as at Firecracker.
    fn load(&mut self, request: &LoadSnapshot, next: &mut Option<Next>) -> Result<Answer, Fault> {
        match self.try_load(request) {
            Ok(parts) => {
                *next = Some(Next::Built(Box::new(parts)));
                let state = if request.resume_vm {
                    VmState::Running
                } else {
                    VmState::Paused
                };
                self.telemetry.state.set(state);
                Ok(Answer::done())
            }
            Err(error) => {
                // The file may have line breaks in its names.
                let why = Fault::from_error(&error).message.replace('\n', "\\n");
                *next = Some(Next::LoadFailed(error));
                let text = format!("Load snapshot error: Failed to restore from snapshot: {why}");
                Err(Fault::new(text))
            }
        }
    }

    fn try_load(&mut self, request: &LoadSnapshot) -> Result<MachineParts, LoadError> {
        let begun = Instant::now();
        let options = (self.options)().map_err(BuildError::from)?;
        let parts = MachineParts::restore(&mut self.description, request, options, &self.sender)?;
        self.telemetry.times.load_snapshot = begun.elapsed();
        self.telemetry.events.publish(MachineEvent::SnapshotLoaded {
            snapshot_path: request.snapshot_path.clone(),
        });
        Ok(parts)
    }

    /// Makes a machine from a snapshot at once.
    ///
    /// # Errors
    ///
    /// It cannot be made; all that was made for it is gone again then.
    pub fn restore(mut self, request: &LoadSnapshot) -> Result<Machine, LoadError> {
        let parts = self.try_load(request)?;
        Ok(self.into_machine(parts))
    }

    fn configure(&mut self, section: Section) -> Result<Answer, Fault> {
        // What Firecracker does not count either; a snapshot replaces the last of them.
        let own = matches!(
            section,
            Section::Logger(_) | Section::Metrics(_) | Section::Serial(_) | Section::Cpu(_)
        );
        self.described |= !own;
        check_files(&section)?;
        let logger = match &section {
            Section::Logger(logger) => Some(logger.clone()),
            _ => None,
        };
        if let Section::Metrics(metrics) = &section {
            self.telemetry
                .open_file(metrics)
                .map_err(|error| Fault::from_error(&error))?;
        }
        // A log that cannot be written is not to show in the configuration.
        if let Some(logger) = logger {
            (self.set_logger)(&logger)?;
        }
        self.description
            .config
            .apply(section)
            .map_err(|error| Fault::from_error(&error))?;
        Ok(Answer::done())
    }

    fn counts(&self) -> Counts {
        self.telemetry
            .counts(&self.description, VmState::NotStarted)
    }

    fn start(&mut self) -> Result<MachineParts, Fault> {
        let config = &self.description.config;
        if config.boot_source.kernel_image_path.as_os_str().is_empty() {
            return Err(not_started(
                "Cannot start microvm without kernel configuration.",
            ));
        }
        let options = (self.options)();
        let options = options.map_err(|error| not_started(&Fault::from_error(&error).message))?;
        MachineParts::build(&self.description, options, &self.sender)
            .map_err(|error| not_started(&Fault::from_error(&error).message))
    }
}

fn not_started(why: &str) -> Fault {
    Fault::new(format!("Start microvm error: {why}"))
}

/// Opens what a part names, so that a client hears at once of a path that is wrong.
fn check_files(section: &Section) -> Result<(), Fault> {
    match section {
        Section::BootSource(boot) => {
            File::open(&boot.kernel_image_path).map_err(|error| {
                let what = "Boot source error: The kernel file cannot be opened";
                Fault::new(format!("{what}: {error}"))
            })?;
            let initrd = boot.initrd_path.as_ref().map(File::open);
            initrd.transpose().map(drop).map_err(|error| {
                let what = "Boot source error: The initrd file cannot be opened due to invalid \
                            path or invalid permissions.";
                Fault::new(format!("{what} {error}"))
            })
        }
        Section::Drive(drive) => match &drive.path_on_host {
            Some(path) => File::options()
                .read(true)
                .write(!drive.is_read_only)
                .open(path)
                .map(drop)
                .map_err(|error| {
                    let what = "Drive config error: Unable to create the virtio block device: \
                                Virtio backend error: Error manipulating the backing file";
                    Fault::new(format!("{what}: {error} {}", path.display()))
                }),
            None => Ok(()),
        },
        // Opened and let go: the machine opens its own when it starts.
        Section::NetworkInterface(interface) => match &interface.host_dev_name {
            Some(name) => match Tap::open(name) {
                Ok(_) => Ok(()),
                Err(error) => {
                    let reason = Fault::from_error(&error).message;
                    let text = format!("Could not create the network device: {reason}");
                    Err(Fault::new(text))
                }
            },
            None => Ok(()),
        },
        // Made and gone again: the machine makes its own when it starts.
        Section::Vsock(vsock) => match attach::open_vsock(vsock) {
            Ok(_) => Ok(()),
            Err(error) => Err(Fault::from_error(&error)),
        },
        _ => Ok(()),
    }
}
