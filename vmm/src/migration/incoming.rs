// SPDX-License-Identifier: Apache-2.0
//! A machine that arrives, as the owner of the process sees it.

use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use brume_api::{Fault, ReceiveMigration, with_causes};
use brume_snapshot::StateFile;
use brume_virtio::GuestMemory;
use brume_virtio::block::Locking;

use super::control::Control;
use super::disks_in::DisksIn;
use super::offer::Offer;
use super::sections::MetadataSection;
use crate::build::BuildOptions;
use crate::event::EventSender;
use crate::instance::Description;
use crate::machine::{MachineParts, Start};
use crate::memory::{self, Following, shared};
use crate::snapshot::{GoOn, Identity, MachineState, Prepared};

/// What the thread that receives wants of the owner.
pub(crate) enum IncomingEvent {
    /// Make all that the machine needs; the memory, or what does not fit.
    Prepare {
        offer: Box<Offer>,
        /// Its memory, if the source has handed it over.
        handed: Option<OwnedFd>,
        reply: Sender<Result<(GuestMemory, DisksIn), Vec<String>>>,
    },
    /// Give the machine its state.
    Load {
        state: Vec<u8>,
        stopped: Stopped,
        /// Whether the source may be on another host, which the disks were written from.
        other_host: bool,
        /// What is to follow of the memory.
        following: Option<Arc<Following>>,
        reply: Sender<Result<(), String>>,
    },
    /// Let it go on, and say so when it does.
    Run(Sender<Instant>),
    /// Forget it: it does not come.
    Drop,
    /// Nobody is waited for any more; why nobody can be, if that is so.
    Ended(Option<String>),
}

/// Since when the guest's clocks have stood still, as both sides know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopped {
    /// How long, when its state was sent.
    pub(super) before: Duration,
    /// The source's time of day then, in nanoseconds since 1970.
    pub(super) sent_unix_ns: u64,
    /// When it arrived here.
    pub(super) arrived: Instant,
}

/// How far apart two clocks may seem to be, and count as set by the same time.
const CLOCKS_AGREE: Duration = Duration::from_secs(1);

impl Stopped {
    /// How long they have stood still by now.
    pub(super) fn time(&self) -> Duration {
        let here = self.arrived.elapsed();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        // On its way it took as long as both clocks say, if they can be believed.
        let since = now.checked_sub(Duration::from_nanos(self.sent_unix_ns));
        let since = since.filter(|since| (here..here + CLOCKS_AGREE).contains(since));
        self.before + since.unwrap_or(here)
    }
}

/// A machine that is awaited.
pub(crate) struct Incoming {
    pub(crate) control: Control,
    request: ReceiveMigration,
    /// What it was described as before.
    blank: Description,
    paused: bool,
    /// Whether its memory is the source's.
    shares_memory: bool,
    stage: Stage,
}

enum Stage {
    /// Nobody has come yet.
    Awaited,
    /// All is there but the state.
    Prepared(Box<Prepared>),
    /// It could go on.
    Loaded(Box<MachineParts>),
}

impl Incoming {
    pub(crate) fn new(request: ReceiveMigration, control: Control, blank: Description) -> Self {
        Self {
            control,
            request,
            blank,
            paused: false,
            shares_memory: false,
            stage: Stage::Awaited,
        }
    }

    /// Makes what the machine of `offer` needs; `description` becomes that machine's.
    pub(crate) fn prepare(
        &mut self,
        (offer, handed): (&Offer, Option<OwnedFd>),
        description: &mut Description,
        options: BuildOptions,
        sender: &EventSender,
    ) -> Result<(GuestMemory, DisksIn), Vec<String>> {
        self.forget(description);
        let mut config = offer.config_for(&self.request)?;
        let reasons = offer.misfits(&config);
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let disks = match offer.with_disks {
            true => DisksIn::prepare(&offer.drives, &config)?,
            false => DisksIn::default(),
        };
        let own = &self.blank.config;
        config.logger.clone_from(&own.logger);
        config.metrics.clone_from(&own.metrics);
        config.serial.clone_from(&own.serial);
        description.config = config;
        let prepared = make(description, handed, options, sender).and_then(|prepared| {
            let reasons = offer.cpu_misfits(&prepared);
            if reasons.is_empty() {
                Ok(prepared)
            } else {
                Err(reasons)
            }
        });
        match prepared {
            Ok(prepared) => {
                let memory = prepared.memory().guest.clone();
                self.paused = offer.paused;
                self.shares_memory = offer.shares_memory;
                self.stage = Stage::Prepared(Box::new(prepared));
                Ok((memory, disks))
            }
            Err(reasons) => {
                description.config.clone_from(&self.blank.config);
                Err(reasons)
            }
        }
    }

    /// Gives the machine its state.
    pub(crate) fn load(
        &mut self,
        state: &[u8],
        (stopped, other_host): (Stopped, bool),
        following: Option<Arc<Following>>,
        description: &Description,
    ) -> Result<(), String> {
        let Stage::Prepared(prepared) = std::mem::replace(&mut self.stage, Stage::Awaited) else {
            return Err("there is no machine yet that could take a state".into());
        };
        if let Some(following) = following {
            // It is the first for this memory.
            let _ = prepared.memory().following.set(following);
        }
        let read = || {
            let mut file = StateFile::parse_unsealed(state)?;
            let metadata: MetadataSection = file.take(0)?;
            let state = MachineState::take(&mut file)?;
            file.finish()?;
            Ok((state, metadata))
        };
        let read: Result<_, brume_snapshot::StateError> = read();
        let (mut state, metadata) = read.map_err(|error| with_causes(&error))?;
        metadata
            .restore(&description.mmds)
            .map_err(|error| with_causes(&error))?;
        let go_on = GoOn {
            clock_realtime: false,
            identity: Identity::Same,
            resume: self.request.resume_vm && !self.paused,
        };
        if self.shares_memory && description.config.machine_config.track_dirty_pages {
            // As if it had been copied: the first diff that is made here is since nothing.
            let marked = prepared.memory().mark_written();
            marked.map_err(|error| format!("the memory that was handed over: {error}"))?;
        }
        state.advance(stopped.time());
        let parts = prepared.load(state, &go_on);
        let parts = parts.map_err(|error| with_causes(&error))?;
        take_disks(&parts, other_host)?;
        self.stage = Stage::Loaded(Box::new(parts));
        Ok(())
    }

    /// The machine, which goes on when it is run; when that was is told to `started`.
    pub(crate) fn run(self, started: Sender<Instant>) -> Option<Box<MachineParts>> {
        let Stage::Loaded(mut parts) = self.stage else {
            return None;
        };
        if let Start::Restored { arrived, .. } = &mut parts.start {
            *arrived = Some(started);
        }
        Some(parts)
    }

    /// Whether it would go on at once.
    pub(crate) fn resumes(&self) -> bool {
        self.request.resume_vm && !self.paused
    }

    /// Forgets a machine that does not come.
    pub(crate) fn forget(&mut self, description: &mut Description) {
        self.stage = Stage::Awaited;
        description.config.clone_from(&self.blank.config);
        let mut mmds = description
            .mmds
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // What is empty is always taken.
        let _ = mmds
            .is_initialized()
            .then(|| mmds.put(serde_json::json!({})));
    }
}

/// How long the kernel may take to free the locks of a process that has ended.
const LOCK_LIMIT: Duration = Duration::from_secs(1);

/// Takes the locks that the source has let go of.
fn take_disks(parts: &MachineParts, other_host: bool) -> Result<(), String> {
    let end = Instant::now() + LOCK_LIMIT;
    for (id, drive) in &parts.assembly.controls.drives {
        let mut taken = drive.take_lock();
        while taken.is_err() && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
            taken = drive.take_lock();
        }
        let ready = taken.and_then(|()| {
            if other_host {
                drive.drop_cache()
            } else {
                Ok(())
            }
        });
        ready.map_err(|error| format!("drive \"{id}\": {}", with_causes(&error)))?;
    }
    Ok(())
}

/// Makes all but the state. Of memory that was handed over nothing is touched: its guest still runs
/// at the source. Nor does giving it its state touch it, as far as we do that. KVM writes to it what
/// the guest has asked it for: the time of day when that register is set (which is read only by who
/// has just set it), and the clock and the steal time of a vCPU before it runs for the first time.
/// If the machine stays at the source after all, its KVM writes the same places anew.
fn make(
    description: &Description,
    handed: Option<OwnedFd>,
    options: BuildOptions,
    sender: &EventSender,
) -> Result<Prepared, Vec<String>> {
    let machine = &description.config.machine_config;
    let told = |why: String| vec![format!("the target: {why}")];
    let memory = match handed {
        Some(fd) => shared::adopt(machine, fd).map_err(|error| told(with_causes(&error)))?,
        None => memory::make(machine).map_err(|error| told(with_causes(&error)))?,
    };
    Prepared::new(description, memory, options, sender, Locking::Later)
        .map_err(|error| told(with_causes(&error)))
}

/// The fault of a request that has no place while a machine is awaited.
pub(crate) fn awaiting() -> Fault {
    Fault::new(
        "A machine is awaited from another process: call that off with DELETE /migration first.",
    )
}
