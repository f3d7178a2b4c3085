// SPDX-License-Identifier: Apache-2.0
//! A client of Firecracker that was not written here, `fctools`, drives brume as if it were that.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use brume_tests::netns::NetNs;
use brume_tests::vm::{LINUX, SOON, outcome};
use brume_tests::{artefacts, linux_slot};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BalloonDevice, BootSource, Drive, EntropyDevice, LoggerSystem, MachineConfiguration,
    MetricsSystem, MmdsConfiguration, MmdsVersion, NetworkInterface, RateLimiter, TokenBucket,
    UpdateBalloonDevice, UpdateBalloonStatistics, UpdateDrive, UpdateNetworkInterface, VsockDevice,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::command_modifier::CommandModifier;
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use serde_json::{Value, json};
use tempfile::TempDir;

type Sdk = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

/// A file that is there already; nothing of it is copied, as there is no jail.
const PRESENT: ResourceType = ResourceType::Moved(MovedResourceType::Copied);
const CREATED: ResourceType = ResourceType::Created(CreatedResourceType::File);

/// Runs the program in a network namespace, and lets the kernel end it with the test.
#[derive(Debug)]
struct Inside(Vec<OsString>);

impl CommandModifier for Inside {
    fn apply(&self, program: &mut PathBuf, arguments: &mut Vec<OsString>) {
        let mut all = self.0.clone();
        let outer = std::mem::replace(program, all.remove(0).into());
        all.push(outer.into());
        all.append(arguments);
        *arguments = all;
    }
}

/// What a machine of the SDK needs, gone with it.
struct Place {
    network: NetNs,
    folder: TempDir,
    resources: ResourceSystem<DirectProcessSpawner, TokioRuntime>,
}

impl Place {
    fn new() -> Self {
        let network = NetNs::new();
        network.sh("ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 up");
        let folder = tempfile::tempdir().unwrap();
        symlink(artefacts::brume(), folder.path().join("firecracker")).unwrap();
        let ownership = VmmOwnershipModel::Shared;
        Self {
            network,
            folder,
            resources: ResourceSystem::new(DirectProcessSpawner, TokioRuntime, ownership),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn resource(&mut self, path: impl Into<PathBuf>, kind: ResourceType) -> Resource {
        self.resources.create_resource(path, kind).unwrap()
    }

    /// A file of so many bytes.
    fn disk(&mut self, name: &str, len: u64) -> Resource {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(len).unwrap();
        self.resource(path, PRESENT)
    }

    /// A machine with no device.
    fn data(&mut self, kernel: &Path, boot_args: String) -> VmConfigurationData {
        VmConfigurationData {
            boot_source: BootSource {
                kernel_image: self.resource(kernel, PRESENT),
                boot_args: Some(boot_args),
                initrd: None,
            },
            drives: Vec::new(),
            machine_configuration: MachineConfiguration {
                vcpu_count: 1,
                mem_size_mib: 256,
                smt: Some(false),
                track_dirty_pages: Some(false),
                huge_pages: None,
            },
            cpu_template: None,
            network_interfaces: Vec::new(),
            balloon_device: None,
            vsock_device: None,
            logger_system: None,
            metrics_system: None,
            mmds_configuration: None,
            entropy_device: None,
        }
    }

    /// Configures and starts it; and what has to live as long.
    async fn start(self, data: VmConfigurationData) -> (Sdk, NetNs, TempDir) {
        let mut outer = self.network.wrap(&Command::new("setpriv"));
        outer.args(["--pdeathsig", "KILL", "--"]);
        let words = std::iter::once(outer.get_program()).chain(outer.get_args());
        let words = words.map(OsString::from).collect();
        let socket = VmmApiSocket::Enabled(self.path("api.sock"));
        let executor = UnrestrictedVmmExecutor::new(VmmArguments::new(socket))
            .command_modifier(Inside(words))
            .id(VmmId::new("a-machine").unwrap());
        // There is no jailer and no editor, and neither is asked for.
        let program = self.path("firecracker");
        let installation = VmmInstallation::new(program.clone(), program.clone(), program);
        let configuration = VmConfiguration::New {
            init_method: InitMethod::ViaApiCalls,
            data,
        };
        let vm = Vm::prepare(executor, self.resources, installation, configuration).await;
        let mut vm = vm.unwrap();
        vm.start(SOON).await.unwrap();
        (vm, self.network, self.folder)
    }
}

/// The guest's console.
struct Console {
    input: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Console {
    fn of(vm: &mut Sdk) -> Self {
        let pipes = vm.take_pipes().unwrap();
        let input = pipes.stdin.into_inner().into_owned_fd().unwrap();
        let output = pipes.stdout.into_inner().into_owned_fd().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut output, all) = (File::from(output), seen.clone());
        // It ends with the program.
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut chunk) {
                all.lock().unwrap().extend_from_slice(&chunk[..count]);
            }
        });
        let input = File::from(input);
        Self { input, seen }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    fn send(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        let start = Instant::now();
        while !self.text().contains(text) {
            assert!(
                start.elapsed() < LINUX,
                "`{text}` did not come: {}",
                self.text()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(test);
}

fn limiter() -> RateLimiter {
    let bucket = TokenBucket {
        size: 1 << 30,
        one_time_burst: Some(1 << 20),
        refill_time: 100,
    };
    RateLimiter {
        bandwidth: bucket.clone(),
        ops: bucket,
    }
}

/// The configuration of a machine that has one of everything.
fn with_everything(place: &mut Place) -> VmConfigurationData {
    let boot_args = format!("{} quiet brume.ip=169.254.1.2/16", artefacts::linux_args());
    let mut data = place.data(&artefacts::vmlinux(), boot_args);
    data.boot_source.initrd = Some(place.resource(artefacts::initramfs(), PRESENT));
    data.drives.push(Drive {
        drive_id: "data".into(),
        is_root_device: false,
        cache_type: None,
        partuuid: None,
        is_read_only: Some(false),
        block: Some(place.disk("disk", 8 << 20)),
        rate_limiter: Some(limiter()),
        io_engine: None,
        socket: None,
    });
    data.network_interfaces.push(NetworkInterface {
        iface_id: "eth0".into(),
        host_dev_name: "tap0".into(),
        guest_mac: Some("06:00:00:00:00:01".into()),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    });
    data.balloon_device = Some(BalloonDevice {
        amount_mib: 0,
        deflate_on_oom: true,
        stats_polling_interval_s: Some(1),
    });
    let uds = place.path("v.sock");
    data.vsock_device = Some(VsockDevice {
        guest_cid: 3,
        uds: place.resource(uds, ResourceType::Produced),
    });
    let [logs, metrics] = ["log", "metrics"].map(|name| place.path(name));
    data.logger_system = Some(LoggerSystem {
        logs: Some(place.resource(logs, CREATED)),
        ..LoggerSystem::default()
    });
    data.metrics_system = Some(MetricsSystem {
        metrics: place.resource(metrics, CREATED),
    });
    data.mmds_configuration = Some(MmdsConfiguration {
        version: MmdsVersion::V2,
        network_interfaces: vec!["eth0".into()],
        ipv4_address: Some([169, 254, 170, 2].into()),
    });
    data.entropy_device = Some(EntropyDevice { rate_limiter: None });
    data
}

#[test]
fn it_is_called_firecracker_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("firecracker");
    symlink(artefacts::brume(), &program).unwrap();
    let mut command = Command::new(program);
    command.arg("--version");
    let version = format!("Firecracker v{}", brume_vmm::FIRECRACKER_VERSION);
    let told = outcome(command, SOON);
    assert_eq!(told.stdout.lines().next(), Some(&*version), "{told:#?}");
}

#[test]
fn linux_lives_its_whole_life() {
    let _slot = linux_slot(1);
    run(async {
        let mut place = Place::new();
        let data = with_everything(&mut place);
        let (mut vm, _network, folder) = place.start(data).await;
        let mut console = Console::of(&mut vm);
        asked_for_itself(&mut vm).await;
        stored_metadata(&mut vm).await;
        paused_and_resumed(&mut vm).await;

        // The shell is there: drivers are, too.
        console.wait_for("`help` lists what there is");
        console.send("net");
        console.send("mmds=169.254.170.2/key");
        // JSON has quotation marks around it.
        console.wait_for("mmds ok without=401 token=200 status=200 bytes=7");
        changed_devices(&mut vm, folder.path(), &mut console).await;
        changed_balloon(&mut vm).await;
        vm.flush_metrics().await.unwrap();
        let metrics = fs::read_to_string(folder.path().join("metrics")).unwrap();
        let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        assert_eq!(last["balloon"]["activate_fails"], 0);
        nobody_listens(&folder.path().join("v.sock"));

        assert_eq!(vm.get_state(), VmState::Running);
        console.send("poweroff");
        let start = Instant::now();
        while vm.get_state() != VmState::Exited {
            assert!(
                start.elapsed() < SOON,
                "{:?}: {}",
                vm.get_state(),
                console.text()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        vm.cleanup().await.unwrap();
        assert!(
            !folder.path().join("v.sock").exists(),
            "a socket is left behind"
        );
    });
}

async fn asked_for_itself(vm: &mut Sdk) {
    let info = vm.get_info().await.unwrap();
    assert_eq!((&*info.id, info.is_paused), ("a-machine", false));
    assert_eq!(info.app_name, "Firecracker");
    assert_eq!(info.vmm_version, brume_vmm::FIRECRACKER_VERSION);
    let version = vm.get_firecracker_version().await.unwrap();
    assert_eq!(version, brume_vmm::FIRECRACKER_VERSION);
    let machine = vm.get_machine_configuration().await.unwrap();
    assert_eq!((machine.vcpu_count, machine.mem_size_mib), (1, 256));
}

async fn stored_metadata(vm: &mut Sdk) {
    vm.create_mmds(json!({"key": "old", "other": {"a": 1}}))
        .await
        .unwrap();
    vm.update_mmds(json!({"key": "value", "other": null}))
        .await
        .unwrap();
    assert_eq!(
        vm.get_mmds::<Value>().await.unwrap(),
        json!({"key": "value"})
    );
}

async fn paused_and_resumed(vm: &mut Sdk) {
    for _ in 0..3 {
        vm.pause().await.unwrap();
        assert_eq!(vm.get_state(), VmState::Paused);
        assert!(vm.get_info().await.unwrap().is_paused);
        vm.resume().await.unwrap();
        assert!(!vm.get_info().await.unwrap().is_paused);
    }
}

/// Another disk of another size, which the guest is told of, and other limits.
async fn changed_devices(vm: &mut Sdk, folder: &Path, console: &mut Console) {
    let path = folder.join("larger");
    File::create(&path).unwrap().set_len(24 << 20).unwrap();
    let resources = vm.get_resource_system_mut();
    let larger = resources.create_resource(path, PRESENT).unwrap();
    larger.start_initialization_with_same_path().unwrap();
    resources.synchronize().await.unwrap();
    let update = UpdateDrive {
        drive_id: "data".into(),
        block: Some(larger),
        rate_limiter: Some(limiter()),
    };
    vm.update_drive(update).await.unwrap();
    console.send("blkid");
    console.wait_for(&format!("bytes={}", 24 << 20));
    let update = UpdateNetworkInterface {
        iface_id: "eth0".into(),
        rx_rate_limiter: Some(limiter()),
        tx_rate_limiter: Some(limiter()),
    };
    vm.update_network_interface(update).await.unwrap();
}

async fn changed_balloon(vm: &mut Sdk) {
    let balloon = vm.get_balloon_device().await.unwrap();
    assert_eq!((balloon.amount_mib, balloon.deflate_on_oom), (0, true));
    let amount = UpdateBalloonDevice { amount_mib: 8 };
    vm.update_balloon_device(amount).await.unwrap();
    let start = Instant::now();
    loop {
        let statistics = vm.get_balloon_statistics().await.unwrap();
        assert_eq!(statistics.target_mib, 8);
        if statistics.actual_mib == 8 && statistics.free_memory.is_some() {
            break;
        }
        assert!(start.elapsed() < LINUX, "{statistics:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let pace = UpdateBalloonStatistics {
        stats_polling_interval_s: 5,
    };
    vm.update_balloon_statistics(pace).await.unwrap();
    assert_eq!(
        vm.get_balloon_device()
            .await
            .unwrap()
            .stats_polling_interval_s,
        Some(5)
    );
}

/// The guest's driver refuses a connection, which is closed then.
fn nobody_listens(socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    writeln!(stream, "CONNECT 52").unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn each_way_to_shut_down_works() {
    let typed = VmShutdownMethod::WriteToSerial(b"end\n".to_vec());
    for (method, graceful) in [
        (typed, true),
        (VmShutdownMethod::PauseThenKill, false),
        (VmShutdownMethod::Kill, false),
    ] {
        run(async {
            let mut place = Place::new();
            let args = "bare.tsc_khz=2000000 bare.do=echo bare.end=poweroff";
            let data = place.data(&artefacts::bare(), args.into());
            let (mut vm, _network, _folder) = place.start(data).await;
            let action = VmShutdownAction {
                method: method.clone(),
                timeout: Some(SOON),
                graceful,
            };
            let end = vm.shutdown([action]).await.unwrap();
            assert_eq!(end.is_fully_graceful(), graceful, "{method:?}: {end:?}");
            assert!(end.errors.is_empty(), "{method:?}: {end:?}");
            vm.cleanup().await.unwrap();
        });
    }
}
