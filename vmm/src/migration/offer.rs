// SPDX-License-Identifier: Apache-2.0
//! What two sides agree on before memory moves: what the machine is made of, and whether the target
//! has all that it needs.

use brume_api::config::{HugePages, VmConfig};
use brume_api::{Fault, MigrationMode, ReceiveMigration};
use brume_snapshot::Saved;
use brume_virtio::block::image_size;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::host_memory;
use super::in_use::InUse;
use super::sections::MetadataSection;
use crate::chipset::ChipsetState;
use crate::cpu::{Known, VcpuState, missing_features, tsc_rates_fit};
use crate::kvm::VmKvmState;
use crate::memory::MachineMemory;
use crate::overrides::{Overrides, Unknown};
use crate::page_set::PAGE_SIZE;
use crate::snapshot::{Prepared, Raw, VirtioSection};

/// What the source tells of the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Offer {
    /// What it is made from, with the files and TAPs of the source. Where its log and its metrics
    /// go is left out.
    pub(super) config: VmConfig,
    /// The size of its memory in bytes.
    pub(super) memory: u64,
    /// How much of its memory is in use, in bytes, as far as is known.
    pub(super) memory_in_use: u64,
    /// The sections of its state, with their versions.
    pub(super) sections: Vec<(String, u32)>,
    /// `struct kvm_cpuid_entry2` for each leaf that its vCPUs answer.
    pub(super) cpuid: Vec<Raw<kvm_cpuid_entry2>>,
    /// The rate of their time stamp counters in kHz, where KVM can tell.
    pub(super) tsc_khz: Option<u32>,
    /// The drives.
    pub(super) drives: Vec<DriveOffer>,
    /// In which order memory and machine move.
    pub(crate) mode: MigrationMode,
    /// Whether memory may follow in the end although it was not to.
    pub(crate) may_follow: bool,
    /// How many connections carry memory.
    pub(crate) connections: u8,
    /// Whether the file that is all of its memory comes next. If the target takes it, no memory
    /// moves, and there is neither another connection nor a follower, whatever else is said here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) shares_memory: bool,
    /// Whether the contents of the drives move too.
    pub(crate) with_disks: bool,
    /// Whether the machine is paused, and is to stay so.
    pub(crate) paused: bool,
}

/// What the target says to an offer that it takes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Acceptance {
    /// Whether it has mapped the memory that was handed over.
    pub(super) shares_memory: bool,
}

/// What is behind a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DriveOffer {
    /// Its id.
    pub(super) id: String,
    /// Its size in bytes, if there is a file behind it.
    pub(super) size: Option<u64>,
}

/// The sections that this version of brume writes.
pub(super) fn own_sections() -> Vec<(String, u32)> {
    fn of<T: Saved>() -> (String, u32) {
        (T::KIND.into(), T::VERSION)
    }
    vec![
        of::<VmKvmState>(),
        of::<VcpuState>(),
        of::<ChipsetState>(),
        of::<VirtioSection>(),
        of::<MetadataSection>(),
    ]
}

/// The drives of a machine, as they are on this host.
pub(super) fn drives_of(config: &VmConfig) -> Vec<DriveOffer> {
    let offer = |drive: &brume_api::config::Drive| DriveOffer {
        id: drive.drive_id.clone(),
        // On a target the path comes from the source: it may lead to anything.
        size: drive
            .path_on_host
            .as_ref()
            .and_then(|path| image_size(path).ok()),
    };
    config.drives.iter().map(offer).collect()
}

impl Offer {
    /// What is told of a machine of `config`, whose first vCPU is `vcpu`; how it moves is still to
    /// be filled in.
    pub(crate) fn of(config: &VmConfig, memory: &MachineMemory, vcpu: Option<&Known>) -> Self {
        let in_use = InUse::of(memory).and_then(|in_use| in_use.pages(memory));
        let cpuid = vcpu.map(|vcpu| vcpu.cpuid.as_slice().to_vec());
        Self {
            config: VmConfig {
                logger: None,
                metrics: None,
                serial: None,
                ..config.clone()
            },
            memory: memory.size,
            memory_in_use: in_use.map_or(0, |pages| pages.count() * PAGE_SIZE),
            sections: own_sections(),
            cpuid: cpuid.unwrap_or_default().into_iter().map(Raw).collect(),
            tsc_khz: vcpu.and_then(|vcpu| vcpu.tsc_khz),
            drives: drives_of(config),
            mode: MigrationMode::PreCopy,
            may_follow: false,
            connections: 1,
            shares_memory: false,
            with_disks: false,
            paused: false,
        }
    }

    /// The drives have these sizes in bytes, by their ids.
    pub(crate) fn set_sizes<'a>(&mut self, sizes: impl Iterator<Item = (&'a str, u64)>) {
        for (id, size) in sizes {
            let drive = self.drives.iter_mut().find(|drive| drive.id == id);
            if let Some(drive) = drive {
                drive.size = Some(size);
            }
        }
    }

    /// The machine as it would be made here.
    ///
    /// # Errors
    ///
    /// What the client wants to be otherwise is not there.
    pub(super) fn config_for(&self, request: &ReceiveMigration) -> Result<VmConfig, Vec<String>> {
        let mut config = self.config.clone();
        let overrides = Overrides {
            network: &request.network_overrides,
            vsock: request.vsock_override.as_ref(),
            drives: &request.drive_overrides,
        };
        let unknown = overrides.apply(&mut config);
        let reasons: Vec<String> = unknown.iter().map(unknown_part).collect();
        config.machine_config.track_dirty_pages = request.track_dirty_pages;
        if reasons.is_empty() {
            Ok(config)
        } else {
            Err(reasons)
        }
    }

    /// What is missing here, before anything is made; `config` is the machine as it would be here.
    pub(super) fn misfits(&self, config: &VmConfig) -> Vec<String> {
        let mut reasons = self.unknown_sections();
        if config.machine_config.memory_bytes() != self.memory {
            reasons.push(format!(
                "the source offers {} bytes of memory for a machine with {}",
                self.memory,
                config.machine_config.memory_bytes()
            ));
        }
        if let Err(error) = config.validate() {
            let why = Fault::from_error(&error).message;
            reasons.push(format!("the machine is none that can be made here: {why}"));
        }
        if self.shares_memory && !config.machine_config.shared_memory {
            reasons.push("the source hands over memory of a machine that does not share it".into());
        }
        // What is handed over is used already, and huge pages are reserved: they are had or not when
        // they are made.
        let huge = self.config.machine_config.huge_pages == HugePages::Size2M;
        let is_new = !self.shares_memory && !huge;
        if let Some(available) = host_memory::available().filter(|_| is_new)
            && available < self.memory_in_use
        {
            reasons.push(format!(
                "the machine uses {} MiB of memory and the target can have {} MiB, by what its host \
                 and its control groups have left",
                self.memory_in_use >> 20,
                available >> 20
            ));
        }
        if !self.with_disks {
            reasons.extend(self.drive_misfits(config));
        }
        reasons
    }

    /// What the target's CPU and KVM cannot do that the guest has seen.
    pub(super) fn cpu_misfits(&self, prepared: &Prepared) -> Vec<String> {
        let mut reasons = Vec::new();
        let guest: Vec<_> = self.cpuid.iter().map(|entry| entry.0).collect();
        let missing = missing_features(&guest, prepared.supported_cpuid());
        if !missing.is_empty() {
            reasons.push(format!(
                "the guest uses CPU features that the target does not have: {}",
                missing.join(", ")
            ));
        }
        if let (Some(guest), Some(host)) = (self.tsc_khz, prepared.tsc_khz())
            && !tsc_rates_fit(guest, host)
            && !prepared.can_scale_tsc()
        {
            reasons.push(format!(
                "the guest's time stamp counter runs at {guest} kHz, the target's at {host} kHz, \
                 and its KVM cannot scale it"
            ));
        }
        reasons
    }

    fn unknown_sections(&self) -> Vec<String> {
        let own = own_sections();
        let misfit = |(kind, version): &(String, u32)| {
            let known = own.iter().find(|(known, _)| known == kind);
            match known {
                Some((_, newest)) if version <= newest => None,
                Some((_, newest)) => Some(format!(
                    "the source writes version {version} of a machine's `{kind}` state and the \
                     target reads up to version {newest}: the target needs a newer brume"
                )),
                None => Some(format!(
                    "the source has `{kind}` state, which the target does not know: it needs a \
                     newer brume"
                )),
            }
        };
        self.sections.iter().filter_map(misfit).collect()
    }

    fn drive_misfits(&self, config: &VmConfig) -> Vec<String> {
        let mut reasons = Vec::new();
        for here in drives_of(config) {
            let there = self.drives.iter().find(|drive| drive.id == here.id);
            let path = config
                .drives
                .iter()
                .find(|drive| drive.drive_id == here.id)
                .and_then(|drive| drive.path_on_host.as_ref());
            let path = path.map(|path| path.display().to_string());
            let path = path.unwrap_or_default();
            match (there.and_then(|there| there.size), here.size) {
                (_, None) => reasons.push(format!(
                    "the target has no file {path} that can be read for drive \"{}\"",
                    here.id
                )),
                (Some(there), Some(here_size)) if there != here_size => reasons.push(format!(
                    "drive \"{}\" has {there} bytes at the source, and {path} has {here_size} at \
                     the target; is it the same disk?",
                    here.id
                )),
                _ => {}
            }
        }
        reasons
    }
}

/// What is said of a part that is to be otherwise here and is not there.
fn unknown_part(unknown: &Unknown) -> String {
    let (what, part) = match unknown {
        Unknown::Interface(id) => ("TAP", format!("network interface \"{id}\"")),
        Unknown::Vsock => ("socket", "the socket device".into()),
        Unknown::Drive(id) => ("file", format!("drive \"{id}\"")),
    };
    format!("the target wants another {what} for {part}, which the machine does not have")
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn size_of(path: &Path) -> Option<u64> {
        let drives = serde_json::json!([{
            "drive_id": "one", "path_on_host": path, "is_root_device": false,
        }]);
        let config = VmConfig {
            drives: serde_json::from_value(drives).unwrap(),
            ..VmConfig::default()
        };
        drives_of(&config)[0].size
    }

    #[test]
    fn a_drive_has_the_size_of_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1234).unwrap();
        assert_eq!(size_of(file.path()), Some(1234));
        assert_eq!(size_of(Path::new("/nowhere")), None);
    }

    #[test]
    fn what_is_no_image_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(
            Command::new("mkfifo")
                .arg(&pipe)
                .status()
                .unwrap()
                .success()
        );
        let (done, sizes) = channel();
        // Who opens a FIFO waits until somebody writes to it.
        thread::spawn(move || done.send(size_of(&pipe)));
        assert_eq!(sizes.recv_timeout(Duration::from_secs(10)), Ok(None));
        assert_eq!(size_of(Path::new("/dev/zero")), None);
        assert_eq!(size_of(dir.path()), None);
    }
}
