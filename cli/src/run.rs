// SPDX-License-Identifier: Apache-2.0
//! `brume run`: a machine from the command line, with the terminal as its console.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use brume_api::config::{BootSource, MachineConfig, VmConfig};
use brume_vmm::Description;

use crate::args::{DEFAULT_ID, RunArgs};
use crate::exit::Failure;
use crate::firecracker::process_clock;
use crate::launch::{Launch, Origin};
use crate::log::{Log, Style};

/// The command line of a kernel that is given none: the serial console, and an end of the process
/// at a restart or panic.
const DEFAULT_ARGS: &str = "console=ttyS0 reboot=k panic=-1";

/// Runs the machine that `args` describe.
///
/// # Errors
///
/// There is no such machine, or it came to a bad end.
pub(crate) fn run(args: RunArgs, started: Instant) -> Result<ExitCode, Failure> {
    Log {
        style: Style::Plain,
        level: args.log_level,
        module: None,
    }
    .start_on_stderr();
    let (boot_timer, socket) = (args.boot_timer, args.api_sock.clone());
    let config = config_of(args)?;
    let MachineConfig {
        vcpu_count,
        mem_size_mib,
        ..
    } = config.machine_config;
    let kernel = config.boot_source.kernel_image_path.display().to_string();
    let plural = if vcpu_count == 1 { "" } else { "s" };
    let text = format!("brume: starting {kernel}, {vcpu_count} vCPU{plural}, {mem_size_mib} MiB");
    let launch = Launch {
        started,
        progress: Some(text),
        clock: Rc::new(move || boot_timer.then(|| process_clock(started))),
        as_firecracker: false,
    };
    let description = Description {
        id: DEFAULT_ID.into(),
        config,
        ..Description::default()
    };
    launch.run_with_socket(description, Origin::Description, socket.as_deref())
}

fn config_of(args: RunArgs) -> Result<VmConfig, Failure> {
    let has_root = args.disk.iter().any(crate::spec::DiskSpec::is_root);
    let mut boot_source = boot_source(args.kernel, args.initrd, has_root)?;
    boot_source.kernel_protocol = args.kernel_protocol;
    let default_args = boot_source.boot_args.take();
    let mut boot_args = args
        .cmdline
        .or(default_args)
        .unwrap_or_else(|| DEFAULT_ARGS.into());
    if let Some(append) = args.append {
        boot_args = format!("{boot_args} {append}");
    }
    boot_source.boot_args = Some(boot_args);
    let config = VmConfig {
        boot_source,
        drives: args
            .disk
            .into_iter()
            .zip(0..)
            .map(|(disk, n)| disk.into_drive(n))
            .collect(),
        machine_config: MachineConfig {
            vcpu_count: args.cpus,
            mem_size_mib: args.memory.0,
            smt: args.smt,
            huge_pages: args.huge_pages,
            shared_memory: args.shared_memory,
            track_dirty_pages: args.track_dirty_pages,
            ..MachineConfig::default()
        },
        network_interfaces: args
            .net
            .into_iter()
            .zip(0..)
            .map(|(net, n)| net.into_interface(n))
            .collect(),
        ..VmConfig::default()
    };
    config.validate()?;
    Ok(config)
}

/// The kernel that was asked for, or the guest that the project builds, with its own initrd and
/// command line.
fn boot_source(
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    has_root: bool,
) -> Result<BootSource, Failure> {
    if let Some(kernel_image_path) = kernel {
        let initrd_path = initrd;
        return Ok(BootSource {
            kernel_image_path,
            initrd_path,
            ..BootSource::default()
        });
    }
    let guest = built_guest().ok_or_else(|| {
        let text = "no kernel was given and none is built; use --kernel FILE, set BRUME_KERNEL, \
                    or run `make guest`";
        Failure::Arguments(text.into())
    })?;
    let own_initrd = || Some(guest.join("initramfs.cpio")).filter(|_| !has_root);
    let args = fs::read_to_string(guest.join("cmdline.txt")).ok();
    Ok(BootSource {
        kernel_image_path: guest.join("vmlinux"),
        initrd_path: initrd.or_else(own_initrd),
        boot_args: args.map(|args| args.trim().to_owned()),
        kernel_protocol: None,
    })
}

/// The folder of the guest that `make guest` builds: beside the program's own build folder, or
/// below the current one.
fn built_guest() -> Option<PathBuf> {
    let program = env::current_exe().ok();
    let beside = program
        .as_deref()
        .and_then(Path::parent)
        .and_then(Path::parent);
    let folders = [
        beside.map(|target| target.join("guest")),
        Some("target/guest".into()),
    ];
    folders
        .into_iter()
        .flatten()
        .find(|folder| folder.join("vmlinux").is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_was_given_is_taken_as_it_is() {
        let boot = boot_source(Some("k".into()), None, false).unwrap();
        assert_eq!(
            boot,
            BootSource {
                kernel_image_path: "k".into(),
                ..BootSource::default()
            }
        );
    }
}
