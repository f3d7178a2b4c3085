// SPDX-License-Identifier: Apache-2.0
//! The command line.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use brume_api::config::{HugePages, Level};
use brume_vmm::FIRECRACKER_VERSION;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

use crate::clone::CloneArgs;
use crate::ctl::CtlArgs;
use crate::exit::{BAD_ARGUMENTS, STATUS_HELP};
use crate::receive::ReceiveArgs;
use crate::restore::RestoreArgs;
use crate::size::MemorySize;
use crate::snapshot::SnapshotArgs;
use crate::snapshot_files::{InspectArgs, RebaseArgs};
use crate::spec::{DiskSpec, NetSpec};

/// Where Firecracker has its socket if nobody says otherwise.
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";

/// What a machine is called if nobody says otherwise.
pub(crate) const DEFAULT_ID: &str = "anonymous-instance";
/// The largest body of a request to the API, in bytes, if nobody says otherwise.
pub(crate) const DEFAULT_BODY_LIMIT: usize = 51200;

/// What the program was asked to do.
pub(crate) enum Invocation {
    /// `brume run`.
    Run(Box<RunArgs>),
    /// `brume ctl`.
    Ctl(Box<CtlArgs>),
    /// `brume inspect`.
    Inspect(InspectArgs),
    /// `brume rebase`.
    Rebase(RebaseArgs),
    /// `brume snapshot`.
    Snapshot(Box<SnapshotArgs>),
    /// `brume restore`.
    Restore(Box<RestoreArgs>),
    /// `brume receive`.
    Receive(Box<ReceiveArgs>),
    /// `brume clone`.
    Clone(Box<CloneArgs>),
    /// Firecracker's flags.
    Firecracker(Box<FirecrackerArgs>),
}

/// Starts microVMs on Linux KVM.
///
/// `brume run` starts one from the command line, with this terminal as its console. Without a
/// command, brume takes Firecracker's flags, its configuration file and the requests of its API.
#[derive(Parser)]
#[command(name = "brume", version, after_help = STATUS_HELP, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    firecracker: FirecrackerArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Start a microVM with this terminal as its serial console.
    Run(RunArgs),
    /// Control a machine that runs, by the socket of its API.
    #[command(after_help = CTL_EXAMPLES)]
    Ctl(CtlArgs),
    /// Show what is in the state file of a snapshot.
    Inspect(InspectArgs),
    /// Merge the memory file of a diff snapshot into that of the snapshot before it.
    Rebase(RebaseArgs),
    /// Write a machine that runs to files, by the socket of its API.
    ///
    /// The guest stands still while they are written (with --pre-copy, while the rest of them is), and
    /// then does what it did before.
    #[command(after_help = SNAPSHOT_EXAMPLES)]
    Snapshot(SnapshotArgs),
    /// Start a machine from a snapshot, with this terminal as its serial console.
    ///
    /// It goes on where the machine of the snapshot stood still. Many can be made from one
    /// snapshot; `brume clone` does that at once.
    #[command(after_help = format!("{RESTORE_EXAMPLES}\n\n{STATUS_HELP}"))]
    Restore(RestoreArgs),
    /// Wait for a machine that another process sends, and go on with it.
    ///
    /// The other side is `brume ctl migrate`. The guest goes on here where it stood still there,
    /// with this terminal as its serial console; what its TAPs, sockets and disks are called here
    /// can be said.
    #[command(after_help = format!("{RECEIVE_EXAMPLES}\n\n{STATUS_HELP}"))]
    Receive(ReceiveArgs),
    /// Start many machines from one snapshot, each a process of its own.
    ///
    /// `{}` in a name stands for the number of the clone, from 0 on; `{:03}` for the same in three
    /// digits. Clones share the pages of the snapshot that they do not write. Unless --detach is
    /// given, Ctrl-C ends all of them, and this ends when all have ended.
    #[command(after_help = CLONE_EXAMPLES)]
    Clone(CloneArgs),
    /// Print a script that completes commands and flags in a shell.
    Completions {
        /// The shell
        shell: Shell,
    },
}

const CTL_EXAMPLES: &str = "\
Examples:
  brume run --api-sock vm.sock            a machine that can be controlled
  brume ctl --api-sock vm.sock info
  brume ctl --api-sock vm.sock pause
  brume ctl --api-sock vm.sock --json events
  brume ctl --api-sock vm.sock memory dirty
  brume ctl --api-sock vm.sock migrate --to tcp:host2:4444
  brume ctl --api-sock vm.sock request PUT /mmds '{\"key\": \"value\"}'";

const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  brume snapshot --api-sock vm.sock --out base
  brume snapshot --api-sock vm.sock --out base --stop       and end the machine
  brume snapshot --api-sock vm.sock --state s1 --memory m1 --diff
  brume snapshot --api-sock vm.sock --out base --pre-copy   with the shortest pause

With --diff, a machine that notes which pages are written (`brume run --track-dirty-pages`, or
`track_dirty_pages` in its configuration) writes those since its last snapshot; another one, all
since its start or its restore.";

const RESTORE_EXAMPLES: &str = "\
Examples:
  brume restore --from base
  brume restore --state s1 --memory m1 --api-sock vm.sock
  brume restore --from base --net eth0=tap7 --vsock v7.sock --disk data=copy.img
  brume restore --from base --working-set base/pages     without waits for what it needs first

On the console, Ctrl-A x ends the machine, Ctrl-A h lists the keys.";

const RECEIVE_EXAMPLES: &str = "\
Examples:
  brume receive --listen unix:move.sock                      on one host, then elsewhere:
  brume ctl --api-sock vm.sock migrate --to unix:move.sock
  brume receive --listen tcp:0.0.0.0:4444 --api-sock vm.sock --net eth0=tap7 \\
                --tls-ca ca.pem --tls-cert host2.pem --tls-key host2.key

Disks have to be on storage that both sides reach, or be sent along (`migrate --with-disks`): into
files that are made for them, or into files or devices of the same size that are there already, which
are overwritten, unless another machine has locked them. TAPs, disks and sockets have the names that
they have at the source, unless --net, --disk and --vsock say otherwise; relative ones begin here.

One machine comes at a time. If a move comes to nothing the next one is waited for, except at fd:N,
which is one connection. Before the guest runs here, to end this process leaves the guest at its
source. Without TLS, whoever reaches the address can send a machine or read this one: use it on a
network that nobody else is on.
On the console, Ctrl-A x ends the machine, Ctrl-A h lists the keys.";

const CLONE_EXAMPLES: &str = "\
Examples:
  brume clone --from base --count 3
  brume clone --from base --count 100 --api-sock 'run/vm{:03}.sock' --log 'log/vm{:03}.log'
  brume clone --from base --count 8 --net 'eth0=tap{}' --vsock 'vsock{}.sock'
  brume clone --from base --count 8 --disk 'data=copy{}.img' --detach --json

Each clone needs TAPs, vsock sockets and writable disks of its own, which have to be there
already (the sockets must not). What goes to the console of a clone is in its --log.";

const RUN_EXAMPLES: &str = "\
Examples:
  brume run                              the guest of `make guest`, with a shell
  brume run --kernel vmlinux --initrd initramfs.cpio --cpus 2 --memory 256M
  brume run --kernel vmlinux --disk rootfs.ext4,root --net bridge=br0
  brume run --kernel bzImage --disk data.img,ro,engine=async --net tap=tap0,mtu=1400

A kernel without ACPI finds its devices with --append acpi=off.
On the console, Ctrl-A x ends the machine, Ctrl-A h lists the keys.";

/// Arguments of `brume run`.
#[derive(Args)]
#[command(after_help = format!("{RUN_EXAMPLES}\n\n{STATUS_HELP}"))]
pub(crate) struct RunArgs {
    /// Kernel to boot: an ELF vmlinux or a bzImage [default: the one that `make guest` built]
    #[arg(long, value_name = "FILE", env = "BRUME_KERNEL")]
    pub(crate) kernel: Option<PathBuf>,
    /// How to enter the kernel: elf64, pvh or bzimage [default: what the file offers]
    #[arg(long, value_name = "NAME")]
    pub(crate) kernel_protocol: Option<String>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line, instead of the default one
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// Arguments to add to the kernel's command line
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    pub(crate) append: Option<String>,
    /// Number of vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u8,
    /// Make two vCPUs the threads of one core
    #[arg(long)]
    pub(crate) smt: bool,
    /// Memory: MiB, or with a unit such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    pub(crate) memory: MemorySize,
    /// Pages that the memory is of: none (ordinary ones), transparent (huge ones where the host
    /// finds some), or 2M (reserved huge ones)
    #[arg(long, value_name = "KIND", default_value = "none", value_parser = parse_huge_pages)]
    pub(crate) huge_pages: HugePages,
    /// Have memory that another process of this host can be given, so that a move there over a unix
    /// socket, without TLS, copies nothing
    #[arg(long)]
    pub(crate) shared_memory: bool,
    /// Note which pages are written, for `brume snapshot --diff`
    #[arg(long)]
    pub(crate) track_dirty_pages: bool,
    /// A disk: FILE[,root][,ro][,engine=sync|async][,cache=writeback|unsafe][,id=NAME]
    /// [,partuuid=UUID][,nolock]; may be given several times
    #[arg(long, value_name = "SPEC")]
    pub(crate) disk: Vec<DiskSpec>,
    /// A network interface: tap=NAME for a TAP that exists, or bridge=NAME to make a TAP and join
    /// it to that bridge; then [,mac=MAC][,mtu=N][,id=NAME]; may be given several times
    #[arg(long, value_name = "SPEC")]
    pub(crate) net: Vec<NetSpec>,
    /// Unix socket of a control API for the machine, which must not exist yet
    #[arg(long, value_name = "PATH")]
    pub(crate) api_sock: Option<PathBuf>,
    /// Watch the boot timer at 0xc0000000 and log when the guest writes 123 to it
    #[arg(long)]
    pub(crate) boot_timer: bool,
    /// How much to log on stderr: off, error, warning, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warning", value_parser = parse_level)]
    pub(crate) log_level: Level,
}

/// Firecracker's flags.
#[derive(Args)]
pub(crate) struct FirecrackerArgs {
    /// Unix socket of the control API, which must not exist yet
    #[arg(long, value_name = "PATH", conflicts_with = "no_api")]
    pub(crate) api_sock: Option<PathBuf>,
    /// Run without the control API; needs --config-file
    #[arg(long, requires = "config_file")]
    pub(crate) no_api: bool,
    /// The largest body of a request to the API, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_BODY_LIMIT)]
    pub(crate) http_api_max_payload_size: usize,
    /// Configuration of a machine to start at once, in Firecracker's JSON form
    #[arg(long, value_name = "FILE")]
    pub(crate) config_file: Option<PathBuf>,
    /// JSON file with the data that the metadata service has from the start
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata: Option<PathBuf>,
    /// The most data that the metadata service takes, in bytes of JSON [default: as
    /// --http-api-max-payload-size]
    #[arg(long, value_name = "BYTES")]
    pub(crate) mmds_size_limit: Option<usize>,
    /// Name of the machine: letters, digits and `-`, up to 64
    #[arg(long, value_name = "NAME", default_value = DEFAULT_ID)]
    pub(crate) id: String,
    /// Watch the boot timer at 0xc0000000 and log when the guest writes 123 to it
    #[arg(long)]
    pub(crate) boot_timer: bool,
    /// File or named pipe for the log [default: stdout]
    #[arg(long, value_name = "FILE")]
    pub(crate) log_path: Option<PathBuf>,
    /// How much to log: Off, Error, Warning, Info, Debug or Trace [default: Info]
    #[arg(long, value_name = "LEVEL", value_parser = parse_level)]
    pub(crate) level: Option<Level>,
    /// Log only what comes from this module
    #[arg(long, value_name = "MODULE")]
    pub(crate) module: Option<String>,
    /// Name the level in each line of the log
    #[arg(long)]
    pub(crate) show_level: bool,
    /// Name file and line of origin in each line of the log
    #[arg(long)]
    pub(crate) show_log_origin: bool,
    /// File or named pipe that takes metrics: a line of JSON each minute and at the end
    #[arg(long, value_name = "FILE")]
    pub(crate) metrics_path: Option<PathBuf>,
    /// Do not filter system calls; accepted for compatibility, as there is no filter yet
    #[arg(long)]
    pub(crate) no_seccomp: bool,
    /// Filter system calls as this file says; accepted with a warning, as there is no filter yet
    #[arg(long, value_name = "FILE", conflicts_with = "no_seccomp")]
    pub(crate) seccomp_filter: Option<PathBuf>,
    /// Put devices on a PCI bus; refused, as there is none yet
    #[arg(long)]
    pub(crate) enable_pci: bool,
    /// Print the version of the form of snapshots that this program writes
    #[arg(long)]
    pub(crate) snapshot_version: bool,
    /// Print the version of the form of this state file of a snapshot
    #[arg(long, value_name = "FILE")]
    pub(crate) describe_snapshot: Option<PathBuf>,
    /// Monotonic time at which the jailer started, in microseconds
    #[arg(long, value_name = "US")]
    pub(crate) start_time_us: Option<u64>,
    /// CPU time at which the jailer started this process, in microseconds
    #[arg(long, value_name = "US")]
    pub(crate) start_time_cpu_us: Option<u64>,
    /// CPU time of the parent until then, in microseconds
    #[arg(long, value_name = "US")]
    pub(crate) parent_cpu_time_us: Option<u64>,
}

pub(crate) fn parse_level(name: &str) -> Result<Level, String> {
    Level::from_name(name).ok_or_else(|| "use off, error, warning, info, debug or trace".to_owned())
}

impl FirecrackerArgs {
    /// The first flag that stands for something which is not there yet.
    pub(crate) fn unsupported(&self) -> Option<&'static str> {
        self.enable_pci.then_some("--enable-pci")
    }
}

fn parse_huge_pages(name: &str) -> Result<HugePages, String> {
    match name.to_ascii_lowercase().as_str() {
        "none" => Ok(HugePages::None),
        "transparent" => Ok(HugePages::Transparent),
        "2m" => Ok(HugePages::Size2M),
        _ => Err("use none, transparent or 2M".into()),
    }
}

/// Reads the command line; on the error side is the status to exit with, all being said.
pub(crate) fn parse() -> Result<Invocation, ExitCode> {
    let as_firecracker = is_called_firecracker();
    let mut command = if as_firecracker {
        Cli::command().name("Firecracker").bin_name("firecracker")
    } else {
        Cli::command()
    };
    command = command.version(version(as_firecracker));
    let parsed = command
        .try_get_matches()
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = parsed.map_err(|error| {
        // Nobody is left to tell if this fails.
        let _ = error.print();
        match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
            _ => ExitCode::from(BAD_ARGUMENTS),
        }
    })?;
    Ok(match cli.command {
        Some(Command::Run(args)) => Invocation::Run(Box::new(args)),
        Some(Command::Ctl(args)) => Invocation::Ctl(Box::new(args)),
        Some(Command::Inspect(args)) => Invocation::Inspect(args),
        Some(Command::Rebase(args)) => Invocation::Rebase(args),
        Some(Command::Snapshot(args)) => Invocation::Snapshot(Box::new(args)),
        Some(Command::Restore(args)) => Invocation::Restore(Box::new(args)),
        Some(Command::Receive(args)) => Invocation::Receive(Box::new(args)),
        Some(Command::Clone(args)) => Invocation::Clone(Box::new(args)),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "brume", &mut io::stdout());
            return Err(ExitCode::SUCCESS);
        }
        None => {
            let mut args = cli.firecracker;
            if as_firecracker && !args.no_api && args.api_sock.is_none() {
                args.api_sock = Some(DEFAULT_SOCKET.into());
            }
            Invocation::Firecracker(Box::new(args))
        }
    })
}

/// Whether the program goes by the name of the one whose interface it has.
fn is_called_firecracker() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    Path::new(&name).file_name() == Some("firecracker".as_ref())
}

/// What follows the name in the answer to --version: clients read the first line.
fn version(as_firecracker: bool) -> String {
    let own = env!("CARGO_PKG_VERSION");
    if as_firecracker {
        format!("v{FIRECRACKER_VERSION}\nbrume {own}")
    } else {
        format!("{own}\nFirecracker v{FIRECRACKER_VERSION}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn huge_pages_have_firecrackers_names() {
        for (name, expected) in [
            ("None", HugePages::None),
            ("Transparent", HugePages::Transparent),
            ("2M", HugePages::Size2M),
        ] {
            assert_eq!(parse_huge_pages(name), Ok(expected));
        }
        assert!(parse_huge_pages("1G").is_err());
    }

    #[test]
    fn firecrackers_flags_are_all_known() {
        let flags = [
            "--api-sock=s --id=a --config-file=f --metadata=m --mmds-size-limit=1",
            "--no-api --config-file=f --seccomp-filter=s --boot-timer --http-api-max-payload-size=1",
            "--no-seccomp --log-path=l --level=Info --module=m --show-level --show-log-origin",
            "--metrics-path=m --start-time-us=1 --start-time-cpu-us=2 --parent-cpu-time-us=3",
            "--snapshot-version --describe-snapshot=s",
        ];
        let parse = |flags: &str| {
            let args = ["firecracker"].into_iter().chain(flags.split(' '));
            Cli::try_parse_from(args).map(|cli| cli.firecracker)
        };
        for flags in flags {
            assert_eq!(parse(flags).unwrap().unsupported(), None, "{flags}");
        }
        assert!(parse("--seccomp-filter=s --no-seccomp").is_err());
        let args = parse("--enable-pci").unwrap();
        assert_eq!(args.unsupported(), Some("--enable-pci"));
    }

    #[test]
    fn the_version_begins_with_the_name_that_the_program_goes_by() {
        let firecracker = format!("v{FIRECRACKER_VERSION}\n");
        assert!(version(true).starts_with(&firecracker));
        assert!(version(false).starts_with(env!("CARGO_PKG_VERSION")));
        assert!(version(false).ends_with(&format!("Firecracker v{FIRECRACKER_VERSION}")));
    }

    #[test]
    fn the_config_file_belongs_to_no_api() {
        assert!(Cli::try_parse_from(["brume", "--no-api"]).is_err());
        assert!(Cli::try_parse_from(["brume", "--no-api", "--config-file", "f"]).is_ok());
        assert!(Cli::try_parse_from(["brume", "--no-api", "run"]).is_err());
    }
}
