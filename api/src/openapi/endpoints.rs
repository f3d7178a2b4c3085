// SPDX-License-Identifier: Apache-2.0
//! The endpoints, in the order of their paths.

use utoipa::openapi::path::HttpMethod::{Delete, Get, Patch, Put};
use utoipa::openapi::schema::{ObjectBuilder, Type};

use super::{AnyJson, Endpoint, Query};
use crate::balloon::{
    BalloonHinting, BalloonPatch, BalloonStatistics, BalloonStatisticsPatch, HintingStart,
};
use crate::config::{
    Balloon, BootSource, CpuConfig, Drive, DrivePatch, Entropy, Logger, MachineConfig,
    MachineConfigPatch, MetricsConfig, MmdsConfig, NetworkInterface, NetworkInterfacePatch, Serial,
    VmConfig, Vsock,
};
use crate::instance::{InstanceInfo, VersionInfo};
use crate::memory::{DirtyPages, DirtyRate, DirtyTracking, Mappings, ResidentPages, WorkingSet};
use crate::migration::{MigrationPatch, MigrationStatus, ReceiveMigration, SendMigration};
use crate::route::{Action, VmPatch};
use crate::snapshot::{CreateSnapshot, LoadSnapshotBody};

const fn get(path: &'static str, id: &'static str, summary: &'static str) -> Endpoint {
    Endpoint::new(Get, path, id, summary)
}

const fn put(path: &'static str, id: &'static str, summary: &'static str) -> Endpoint {
    Endpoint::new(Put, path, id, summary)
}

const fn patch(path: &'static str, id: &'static str, summary: &'static str) -> Endpoint {
    Endpoint::new(Patch, path, id, summary)
}

const fn delete(path: &'static str, id: &'static str, summary: &'static str) -> Endpoint {
    Endpoint::new(Delete, path, id, summary).refused()
}

/// How pages that were written are named.
const FORM: Query = Query {
    name: "form",
    description: "Whether pages are named by a bitmap or by ranges.",
    schema: || {
        let values = ["bitmap", "ranges"];
        let text = ObjectBuilder::new().schema_type(Type::String);
        text.enum_values(Some(values))
            .default(Some("bitmap".into()))
            .into()
    },
};

/// How long pages that are written are counted.
const WINDOW: Query = Query {
    name: "window_ms",
    description: "How long to count, in milliseconds.",
    schema: || {
        let number = ObjectBuilder::new().schema_type(Type::Integer);
        let number = number.minimum(Some(1)).maximum(Some(60_000));
        number.default(Some(1000.into())).into()
    },
};

pub(super) static ENDPOINTS: [Endpoint; 55] = [
    get(
        "/",
        "describeInstance",
        "What the machine is called and does",
    )
    .gives::<InstanceInfo>(),
    put(
        "/actions",
        "createSyncAction",
        "Start the machine, or ask something of it",
    )
    .takes::<Action>(r#"{"action_type": "FlushMetrics"}"#),
    get("/balloon", "describeBalloonConfig", "The balloon").gives::<Balloon>(),
    put("/balloon", "putBalloon", "Set the balloon")
        .takes::<Balloon>(r#"{"amount_mib": 16, "deflate_on_oom": true}"#)
        .before_start(),
    patch("/balloon", "patchBalloon", "Change the size of the balloon")
        .takes::<BalloonPatch>(r#"{"amount_mib": 32}"#)
        .after_start(),
    patch(
        "/balloon/hinting/start",
        "startBalloonHinting",
        "Begin a run of free page hints",
    )
    .may_take::<HintingStart>(r#"{"acknowledge_on_stop": true}"#)
    .after_start(),
    get(
        "/balloon/hinting/status",
        "describeBalloonHinting",
        "How far a run of hints is",
    )
    .gives::<BalloonHinting>()
    .after_start(),
    patch(
        "/balloon/hinting/stop",
        "stopBalloonHinting",
        "End a run of free page hints",
    )
    .after_start(),
    get(
        "/balloon/statistics",
        "describeBalloonStats",
        "What the guest tells of its memory",
    )
    .gives::<BalloonStatistics>()
    .after_start(),
    patch(
        "/balloon/statistics",
        "patchBalloonStatsInterval",
        "Change how often the guest is asked",
    )
    .takes::<BalloonStatisticsPatch>(r#"{"stats_polling_interval_s": 5}"#)
    .after_start(),
    put(
        "/boot-source",
        "putGuestBootSource",
        "Set kernel, initrd and command line",
    )
    .takes::<BootSource>(r#"{"kernel_image_path": "/vmlinux", "boot_args": "console=ttyS0"}"#)
    .before_start(),
    put(
        "/cpu-config",
        "putCpuConfiguration",
        "Change what the guest's CPUs can do",
    )
    .takes::<CpuConfig>(r#"{"kvm_capabilities": ["!70"]}"#)
    .before_start(),
    put("/drives/{drive_id}", "putGuestDriveByID", "Set a drive")
        .takes::<Drive>(
            r#"{"drive_id": "root", "is_root_device": true, "path_on_host": "/root.ext4"}"#,
        )
        .before_start(),
    patch(
        "/drives/{drive_id}",
        "patchGuestDriveByID",
        "Change a drive",
    )
    .takes::<DrivePatch>(r#"{"drive_id": "root", "path_on_host": "/other.ext4"}"#)
    .after_start(),
    delete(
        "/drives/{drive_id}",
        "deleteGuestDriveByID",
        "Take a drive away",
    ),
    put(
        "/entropy",
        "putEntropyDevice",
        "Set the source of random bytes",
    )
    .takes::<Entropy>(r#"{"rate_limiter": {"bandwidth": {"size": 1000, "refill_time": 100}}}"#)
    .before_start(),
    get(
        "/events",
        "watchEvents",
        "brume only: the machine's life, event by event",
    )
    .gives_text("text/event-stream"),
    get(
        "/hotplug/memory",
        "getMemoryHotplug",
        "The memory that can be plugged",
    )
    .refused(),
    put(
        "/hotplug/memory",
        "putMemoryHotplug",
        "Set the memory that can be plugged",
    )
    .takes::<AnyJson>("{}")
    .refused(),
    patch("/hotplug/memory", "patchMemoryHotplug", "Plug memory")
        .takes::<AnyJson>("{}")
        .refused(),
    put("/logger", "putLogger", "Set the log")
        .takes::<Logger>(r#"{"level": "Info", "show_level": true}"#)
        .before_start(),
    get(
        "/machine-config",
        "getMachineConfiguration",
        "vCPUs and memory",
    )
    .gives::<MachineConfig>(),
    put(
        "/machine-config",
        "putMachineConfiguration",
        "Set vCPUs and memory",
    )
    .takes::<MachineConfig>(r#"{"vcpu_count": 2, "mem_size_mib": 256}"#)
    .before_start()
    .deprecates(),
    patch(
        "/machine-config",
        "patchMachineConfiguration",
        "Change vCPUs and memory",
    )
    .takes::<MachineConfigPatch>(r#"{"vcpu_count": 4}"#)
    .before_start()
    .deprecates(),
    get(
        "/memory",
        "getMemory",
        "brume and E2B only: pages that the host holds, while paused",
    )
    .gives::<ResidentPages>()
    .after_start(),
    get(
        "/memory/dirty",
        "getMemoryDirty",
        "brume and E2B only: pages that were written",
    )
    .may_ask(FORM)
    .gives::<DirtyPages>()
    .after_start(),
    put(
        "/memory/dirty",
        "putMemoryDirty",
        "brume only: note which pages are written, or forget it",
    )
    .takes::<DirtyTracking>(r#"{"tracking": "Reset"}"#)
    .after_start(),
    get(
        "/memory/dirty/rate",
        "getMemoryDirtyRate",
        "brume only: how fast pages are written",
    )
    .may_ask(WINDOW)
    .gives::<DirtyRate>()
    .after_start(),
    get(
        "/memory/mappings",
        "getMemoryMappings",
        "brume and E2B only: where the memory is in the machine's process",
    )
    .gives::<Mappings>()
    .after_start(),
    put(
        "/memory/working-set",
        "putMemoryWorkingSet",
        "brume only: write down which pages are in use, to read them first at a restore",
    )
    .takes::<WorkingSet>(r#"{"path": "/snapshot/working-set"}"#)
    .after_start(),
    get(
        "/metrics",
        "getMetrics",
        "brume only: what was counted, for Prometheus",
    )
    .gives_text("text/plain; version=0.0.4"),
    put("/metrics", "putMetrics", "Set where metrics go")
        .takes::<MetricsConfig>(r#"{"metrics_path": "/metrics.fifo"}"#)
        .before_start(),
    get(
        "/migration",
        "getMigration",
        "brume only: how far a move to another process is",
    )
    .gives::<MigrationStatus>(),
    patch(
        "/migration",
        "patchMigration",
        "brume only: change the limits of a move, or help one that does not get on",
    )
    .takes::<MigrationPatch>(r#"{"max_downtime_ms": 50, "bandwidth_limit": 100000000}"#),
    Endpoint::new(
        Delete,
        "/migration",
        "deleteMigration",
        "brume only: call a move off; the machine stays where it is",
    ),
    put(
        "/migration/receive",
        "receiveMigration",
        "brume only: wait for a machine to come from another process",
    )
    .takes::<ReceiveMigration>(r#"{"listen": "tcp:0.0.0.0:4444"}"#)
    .before_start(),
    put(
        "/migration/send",
        "sendMigration",
        "brume only: move the machine to another process while it runs",
    )
    .takes::<SendMigration>(r#"{"destination": "tcp:host2:4444", "max_downtime_ms": 20}"#)
    .after_start(),
    get("/mmds", "getMmds", "The data of the metadata service").gives::<AnyJson>(),
    put(
        "/mmds",
        "putMmds",
        "Replace the data of the metadata service",
    )
    .takes::<AnyJson>(r#"{"latest": {"meta-data": {"ami-id": "ami-1"}}}"#),
    patch(
        "/mmds",
        "patchMmds",
        "Merge into the data of the metadata service (RFC 7396)",
    )
    .takes::<AnyJson>(r#"{"latest": {"meta-data": {"ami-id": null}}}"#),
    put(
        "/mmds/config",
        "putMmdsConfig",
        "Set how the guest finds the metadata service",
    )
    .takes::<MmdsConfig>(r#"{"network_interfaces": ["eth0"], "version": "V2"}"#)
    .before_start()
    .deprecates(),
    put(
        "/network-interfaces/{iface_id}",
        "putGuestNetworkInterfaceByID",
        "Set a network interface",
    )
    .takes::<NetworkInterface>(r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#)
    .before_start(),
    patch(
        "/network-interfaces/{iface_id}",
        "patchGuestNetworkInterfaceByID",
        "Change a network interface",
    )
    .takes::<NetworkInterfacePatch>(
        r#"{"iface_id": "eth0", "tx_rate_limiter": {"ops": {"size": 0, "refill_time": 0}}}"#,
    )
    .after_start(),
    delete(
        "/network-interfaces/{iface_id}",
        "deleteGuestNetworkInterfaceByID",
        "Take a network interface away",
    ),
    get("/openapi.json", "getOpenApi", "brume only: this document").gives::<AnyJson>(),
    put("/pmem/{id}", "putGuestPmemByID", "Set a pmem device")
        .takes::<AnyJson>("{}")
        .refused(),
    patch("/pmem/{id}", "patchGuestPmemByID", "Change a pmem device")
        .takes::<AnyJson>("{}")
        .refused(),
    delete(
        "/pmem/{id}",
        "deleteGuestPmemByID",
        "Take a pmem device away",
    ),
    put(
        "/serial",
        "putSerialDevice",
        "Set where the serial console goes",
    )
    .takes::<Serial>(r#"{"serial_out_path": "/serial.log"}"#)
    .before_start(),
    put(
        "/snapshot/create",
        "createSnapshot",
        "Write a machine to files, that is paused or (brume only, with pre_copy) runs",
    )
    .takes::<CreateSnapshot>(
        r#"{"snapshot_path": "/snapshot/state", "mem_file_path": "/snapshot/memory"}"#,
    )
    .after_start(),
    put(
        "/snapshot/load",
        "loadSnapshot",
        "Make a machine from the files of another",
    )
    .takes::<LoadSnapshotBody>(
        r#"{"snapshot_path": "/snapshot/state", "mem_backend": {"backend_type": "File",
            "backend_path": "/snapshot/memory"}, "resume_vm": true}"#,
    )
    .before_start()
    .deprecates(),
    get("/version", "getFirecrackerVersion", "The version").gives::<VersionInfo>(),
    patch(
        "/vm",
        "patchVm",
        "Pause, resume, or (brume only, unless another process still needs its memory) end the machine",
    )
    .takes::<VmPatch>(r#"{"state": "Paused"}"#)
    .after_start(),
    get("/vm/config", "getExportVmConfig", "The whole configuration").gives::<VmConfig>(),
    put("/vsock", "putGuestVsock", "Set the socket device")
        .takes::<Vsock>(r#"{"guest_cid": 3, "uds_path": "/v.sock"}"#)
        .before_start()
        .deprecates(),
];
