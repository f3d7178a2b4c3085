// SPDX-License-Identifier: Apache-2.0
//! From a configuration to a machine that can start.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use brume_api::config::{BootSource, ConfigError, Drive, VmConfig};
use brume_boot::{
    BootError, BootRequest, DeviceArguments, KernelProtocol, Registers, UnknownProtocol,
};
use brume_devices::BusError;
use brume_virtio::VirtioDevice;
use brume_virtio::block::Locking;
use brume_virtio::rng::Rng;
use kvm_ioctls::Cap;
use thiserror::Error;

use crate::assemble::{Assembly, Outside};
use crate::attach::{self, AttachError, NamedDevice};
use crate::balloon;
use crate::chipset::StartClock;
use crate::controls::Controls;
use crate::cpu::{CpuError, CpuPlan, VcpuHandle, change_cpuid, check_capabilities, set_up};
use crate::event::{EventSender, event_queue};
use crate::generation::{self, GenerationError};
use crate::instance::Description;
use crate::kvm::KvmError;
use crate::machine::{Machine, MachineParts, Start};
use crate::memory::{self, MemoryError};
use crate::mmds::stack_on;
use crate::serial::SerialError;
use crate::telemetry::{MetricsError, Telemetry};

/// A machine that cannot be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The configuration contradicts itself.
    #[error("the machine cannot be configured")]
    Config(#[from] ConfigError),
    /// The kernel cannot be opened.
    #[error("The kernel file cannot be opened: {source} ({})", path.display())]
    KernelFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The initrd cannot be opened.
    #[error("The initrd file cannot be opened ({})", path.display())]
    InitrdFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel protocol is none.
    #[error("the kernel protocol cannot be used")]
    Protocol(#[from] UnknownProtocol),
    /// There is no such memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd or command line are not good.
    #[error("the guest cannot be loaded")]
    Boot(#[from] BootError),
    /// The guest cannot be told which machine it is.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// A device cannot be used.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The serial output has no place to go.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The vCPUs cannot be as they are to be.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// KVM does not do it.
    #[error("the virtual machine cannot be made")]
    Kvm(#[from] KvmError),
    /// Two devices want the same place.
    #[error("the machine's devices do not fit together")]
    Bus(#[from] BusError),
    /// There is no place for metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The host gives no threads or file descriptors.
    #[error("the host does not give what a machine needs")]
    Host(#[from] io::Error),
}

impl BuildError {
    /// Whether it is the host that does not do what is needed, and not the request that is wrong.
    pub fn is_host_failure(&self) -> bool {
        matches!(
            self,
            Self::Kvm(_)
                | Self::Cpu(CpuError::Kvm(_))
                | Self::Bus(_)
                | Self::Host(_)
                | Self::Generation(_)
                | Self::Memory(MemoryError::Map(_) | MemoryError::NoHugePages { .. })
                | Self::Attach(AttachError::Event(_) | AttachError::Kvm(_) | AttachError::Bus(_))
        )
    }
}

/// What a machine needs besides its configuration.
pub struct BuildOptions {
    /// Where the guest's serial output goes, if its configuration names no file for it.
    pub console: Box<dyn Write + Send>,
    /// Tells the wall time and the CPU time since the start, for a guest with a boot timer in use.
    pub clock: Option<StartClock>,
    /// Whether devices are named on the kernel's command line even when the guest may find them by
    /// ACPI. A kernel without ACPI needs it; one with ACPI complains about each device once.
    pub always_name_devices: bool,
}

impl Machine {
    /// Builds the machine that `description` describes. Nothing of it runs yet.
    ///
    /// # Errors
    ///
    /// Whatever keeps it from being built; all that was made for it is gone again then.
    pub fn build(description: Description, options: BuildOptions) -> Result<Self, BuildError> {
        let (sender, queue) = event_queue()?;
        let telemetry = Telemetry::of(&description.config)?;
        let parts = MachineParts::build(&description, options, &sender)?;
        Ok(Self::new(parts, (sender, queue), description, telemetry))
    }
}

impl MachineParts {
    /// Builds the machine that `description` describes, with parts that report to `sender`.
    pub(crate) fn build(
        description: &Description,
        options: BuildOptions,
        sender: &EventSender,
    ) -> Result<Self, BuildError> {
        let config = &description.config;
        config.validate()?;
        let machine = &config.machine_config;
        let kernel = open_kernel(&config.boot_source)?;
        let initrd = open_initrd(&config.boot_source)?;
        let memory = memory::make(machine)?;
        let outside = Outside {
            console: options.console,
            clock: options.clock,
            locking: Locking::Now,
        };
        let assembly = Assembly::new(description, memory, outside, sender)?;

        let boot = brume_boot::load(
            &assembly.memory.guest,
            &BootRequest {
                kernel: &kernel,
                initrd: initrd.as_ref(),
                cmdline: &command_line(config),
                protocol: protocol(&config.boot_source)?,
                vcpus: machine.vcpu_count,
                devices: &assembly.places,
                device_arguments: if options.always_name_devices {
                    DeviceArguments::Always
                } else {
                    DeviceArguments::WithoutAcpi
                },
            },
        )?;
        generation::init(&assembly.memory.guest)?;
        tracing::debug!("kernel loaded by {:?} at {:x?}", boot.protocol, boot.kernel);

        let vcpus = make_vcpus(&assembly, config, &boot.registers, sender)?;
        Ok(Self {
            vcpus,
            assembly,
            start: Start::Fresh,
        })
    }
}

/// Makes the vCPUs with their threads, held; the first one starts with `registers`.
fn make_vcpus(
    Assembly { vm, buses, .. }: &Assembly,
    config: &VmConfig,
    registers: &Registers,
    sender: &EventSender,
) -> Result<Vec<VcpuHandle>, BuildError> {
    let template = config.cpu_config.clone().unwrap_or_default();
    check_capabilities(&template.kvm_capabilities, |number| vm.has_number(number))?;
    let mut cpuid = vm.cpuid.clone();
    change_cpuid(&mut cpuid, &template.cpuid_modifiers)?;
    let plan = CpuPlan {
        supported: &cpuid,
        vcpus: config.machine_config.vcpu_count,
        smt: config.machine_config.smt,
        tsc_deadline: vm.has(Cap::TscDeadlineTimer),
        msrs: &template.msr_modifiers,
    };
    let mut vcpus = Vec::new();
    for index in 0..plan.vcpus {
        let vcpu = vm.create_vcpu(index)?;
        let cpuid = set_up(&vcpu, index, &plan, (index == 0).then_some(registers))?;
        let known = vm.known(&vcpu, cpuid);
        let handle = VcpuHandle::spawn(index, vcpu, known, buses.clone(), sender.clone())?;
        vcpus.push(handle);
    }
    Ok(vcpus)
}

fn open_kernel(boot: &BootSource) -> Result<File, BuildError> {
    let path = &boot.kernel_image_path;
    open_file(path).map_err(|source| BuildError::KernelFile {
        path: path.clone(),
        source,
    })
}

fn open_initrd(boot: &BootSource) -> Result<Option<File>, BuildError> {
    let Some(path) = &boot.initrd_path else {
        return Ok(None);
    };
    match open_file(path) {
        Ok(file) => Ok(Some(file)),
        Err(source) => Err(BuildError::InitrdFile {
            path: path.clone(),
            source,
        }),
    }
}

/// Opens a file to read, and nothing that is not one: a FIFO would make us wait for its writer.
fn open_file(path: &Path) -> io::Result<File> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    File::open(path)
}

fn protocol(boot: &BootSource) -> Result<Option<KernelProtocol>, UnknownProtocol> {
    boot.kernel_protocol.as_deref().map(str::parse).transpose()
}

/// The drives in the order in which the guest finds them: the root disk is the first.
fn drives_in_order(config: &VmConfig) -> impl Iterator<Item = &Drive> {
    let (root, others): (Vec<_>, Vec<_>) =
        config.drives.iter().partition(|drive| drive.is_root_device);
    root.into_iter().chain(others)
}

/// The devices, in the order in which the guest finds them, and the handles on them.
pub(crate) fn open_devices(
    description: &Description,
    locking: Locking,
) -> Result<(Vec<NamedDevice>, Controls), AttachError> {
    let Description { config, mmds, .. } = description;
    let mut devices = Vec::new();
    let mut add = |name: &str, device: Box<dyn VirtioDevice>| {
        let name = name.to_owned();
        devices.push(NamedDevice { name, device });
    };
    let mut controls = Controls::default();
    for drive in drives_in_order(config) {
        let block = attach::open_drive(drive, locking)?;
        let control = (drive.drive_id.clone(), block.control());
        controls.drives.push(control);
        add(&drive.drive_id, Box::new(block));
    }
    for interface in &config.network_interfaces {
        let id = &interface.iface_id;
        let metadata = stack_on(id, config.mmds_config.as_ref(), mmds);
        let metadata = metadata.map_err(|source| AttachError::Metadata {
            id: id.clone(),
            source,
        })?;
        let net = attach::open_interface(interface, metadata)?;
        let control = (id.clone(), net.control());
        controls.interfaces.push(control);
        add(id, Box::new(net));
    }
    if let Some(config) = &config.balloon {
        let balloon = balloon::open(config)?;
        controls.balloon = Some(balloon.control());
        add("balloon", Box::new(balloon));
    }
    if let Some(config) = &config.vsock {
        let vsock = attach::open_vsock(config)?;
        controls.vsock = Some(vsock.control());
        add("vsock", Box::new(vsock));
    }
    if let Some(config) = &config.entropy {
        let rng = Rng::new(attach::limits(config.rate_limiter))?;
        controls.entropy = Some(rng.control());
        add("entropy", Box::new(rng));
    }
    Ok((devices, controls))
}

/// The kernel's command line, with the root disk named if there is one.
fn command_line(config: &VmConfig) -> String {
    let args = config.boot_source.args();
    let Some(drive) = config.drives.iter().find(|drive| drive.is_root_device) else {
        return args.into();
    };
    let device = match &drive.partuuid {
        Some(partuuid) => format!("PARTUUID={partuuid}"),
        None => "/dev/vda".into(),
    };
    let access = if drive.is_read_only { "ro" } else { "rw" };
    let root = format!("root={device} {access}");
    // What follows `--` is for init.
    match args.split_once(" -- ") {
        Some((kernel, init)) => format!("{kernel} {root} -- {init}"),
        None => format!("{args} {root}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &str, root: Option<&str>) -> VmConfig {
        let drives = root.map(|rest| {
            format!(r#"{{"drive_id": "r", "is_root_device": true, "path_on_host": "/d"{rest}}}"#)
        });
        VmConfig::from_json(&format!(
            r#"{{"boot-source": {{"kernel_image_path": "/k", "boot_args": "{args}"}},
                "drives": [{}]}}"#,
            drives.unwrap_or_default()
        ))
        .unwrap()
    }

    #[test]
    fn the_root_disk_is_named_before_the_arguments_of_init() {
        assert_eq!(command_line(&config("a b", None)), "a b");
        assert_eq!(command_line(&config("a", Some(""))), "a root=/dev/vda rw");
        assert_eq!(
            command_line(&config("a -- b", Some(r#", "is_read_only": true"#))),
            "a root=/dev/vda ro -- b"
        );
        assert_eq!(
            command_line(&config("a", Some(r#", "partuuid": "12ab-01""#))),
            "a root=PARTUUID=12ab-01 rw"
        );
    }

    #[test]
    fn a_directory_or_a_device_is_no_kernel() {
        for path in ["/", "/dev/null"] {
            assert!(open_file(Path::new(path)).is_err(), "{path}");
        }
    }
}
