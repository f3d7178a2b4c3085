// SPDX-License-Identifier: Apache-2.0
//! Metrics as Firecracker writes them: a line of JSON with every group and every key that it has,
//! whether or not there is such a device here. Collectors insist on the keys.
//!
//! What counts something is told as the difference to the line before, what tells a time or a
//! state as it is.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use brume_api::ApiCounts;
use brume_api::config::MetricsConfig;
use brume_devices::{I8042Counters, Latency, SerialCounters};
use brume_mmds::MmdsCounts;
use brume_virtio::balloon::BalloonCounts;
use brume_virtio::block::BlockCounts;
use brume_virtio::net::NetCounts;
use brume_virtio::rng::RngCounts;
use brume_virtio::vsock::VsockCounts;
use serde_json::{Map, Value, json};

use super::{Counts, micros};
use crate::cpu::VcpuCounts;

/// The keys of each group, with blanks between. A key that ends in `_agg` has three of its own.
const GROUPS: [(&str, &str); 22] = [
    (
        "api_server",
        "process_startup_time_us process_startup_time_cpu_us",
    ),
    (
        "balloon",
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count \
         event_fails free_page_report_count free_page_report_freed free_page_report_fails \
         free_page_hint_count free_page_hint_freed free_page_hint_fails",
    ),
    ("block", BLOCK),
    ("deprecated_api", "deprecated_http_api_calls"),
    (
        "get_api_requests",
        "instance_info_count machine_cfg_count mmds_count vmm_version_count hotplug_memory_count",
    ),
    (
        "i8042",
        "error_count missed_read_count missed_write_count read_count reset_count write_count",
    ),
    (
        "latencies_us",
        "full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm \
         vmm_full_create_snapshot vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm \
         vmm_resume_vm",
    ),
    (
        "logger",
        "missed_metrics_count metrics_fails missed_log_count rate_limited_log_count",
    ),
    (
        "mmds",
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token rx_no_token \
         rx_count tx_bytes tx_count tx_errors tx_frames connections_created connections_destroyed",
    ),
    ("net", NET),
    (
        "patch_api_requests",
        "drive_count drive_fails network_count network_fails machine_cfg_count machine_cfg_fails \
         mmds_count mmds_fails hotplug_memory_count hotplug_memory_fails pmem_count pmem_fails",
    ),
    (
        "put_api_requests",
        "actions_count actions_fails boot_source_count boot_source_fails drive_count drive_fails \
         logger_count logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count \
         cpu_cfg_fails metrics_count metrics_fails network_count network_fails mmds_count \
         mmds_fails vsock_count vsock_fails pmem_count pmem_fails serial_count serial_fails \
         hotplug_memory_count hotplug_memory_fails",
    ),
    ("seccomp", "num_faults"),
    (
        "vcpu",
        "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures kvmclock_ctrl_fails \
         exit_io_in_agg exit_io_out_agg exit_mmio_read_agg exit_mmio_write_agg",
    ),
    ("vmm", "panic_count"),
    (
        "uart",
        "error_count flush_count missed_read_count missed_write_count read_count write_count \
         rate_limiter_dropped_bytes",
    ),
    (
        "signals",
        "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill",
    ),
    (
        "vsock",
        "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails \
         muxer_event_fails conn_event_fails rx_queue_event_count tx_queue_event_count \
         rx_bytes_count tx_bytes_count rx_packets_count tx_packets_count conns_added \
         conns_killed conns_removed killq_resync tx_flush_fails tx_write_fails rx_read_fails",
    ),
    (
        "entropy",
        "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails \
         entropy_rate_limiter_throttled rate_limiter_event_count",
    ),
    ("interrupts", "triggers config_updates"),
    (
        "pmem",
        "activate_fails cfg_fails event_fails queue_event_count rate_limiter_throttled_events \
         rate_limiter_event_count",
    ),
    (
        "memory_hotplug",
        "activate_fails queue_event_fails queue_event_count plug_count plug_bytes plug_fails \
         plug_agg unplug_count unplug_bytes unplug_fails unplug_discard_fails unplug_agg \
         state_count state_fails state_agg unplug_all_count unplug_all_fails unplug_all_agg",
    ),
];

const BLOCK: &str = "activate_fails cfg_fails no_avail_buffer event_fails execute_fails \
    invalid_reqs_count flush_count queue_event_count rate_limiter_event_count update_count \
    update_fails read_bytes write_bytes read_count write_count rate_limiter_throttled_events \
    io_engine_throttled_events remaining_reqs_count read_agg write_agg";

const NET: &str = "activate_fails cfg_fails no_rx_avail_buffer no_tx_avail_buffer event_fails \
    rx_queue_event_count rx_event_rate_limiter_count rx_rate_limiter_throttled \
    rx_tap_event_count rx_bytes_count rx_packets_count rx_fails rx_count tap_read_fails \
    tap_write_fails tx_bytes_count tx_malformed_frames tx_fails tx_count tx_packets_count \
    tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled \
    tx_spoofed_mac_count tx_remaining_reqs_count tap_write_agg";

/// Groups whose values are told as they are.
const STORED: [&str; 5] = ["api_server", "latencies_us", "seccomp", "signals", "vmm"];

/// What an aggregate consists of; only the sum counts.
const AGGREGATE: [&str; 3] = ["min_us", "max_us", "sum_us"];

/// The values by group and key; those of an aggregate as `key.min_us` and so on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sheet(BTreeMap<String, BTreeMap<String, u64>>);

impl Sheet {
    /// What was counted, in Firecracker's terms.
    pub(crate) fn of(counts: &Counts, missed_metrics: u64) -> Self {
        let mut sheet = Self::default();
        for (group, keys) in &GROUPS {
            sheet.open(group, keys);
        }
        sheet.set("logger", "missed_metrics_count", missed_metrics);
        let times = &counts.times;
        let all = [
            ("pause_vm", times.pause),
            ("resume_vm", times.resume),
            ("full_create_snapshot", times.full_snapshot),
            ("diff_create_snapshot", times.diff_snapshot),
            ("load_snapshot", times.load_snapshot),
        ];
        for (key, value) in all.map(|(key, time)| (key, micros(time))) {
            sheet.set("latencies_us", key, value);
            sheet.set("latencies_us", &format!("vmm_{key}"), value);
        }
        if let Some((wall, cpu)) = counts.times.startup {
            sheet.set("api_server", "process_startup_time_us", micros(wall));
            sheet.set("api_server", "process_startup_time_cpu_us", micros(cpu));
        }
        sheet.requests(&counts.api);
        counts.vcpus.iter().for_each(|vcpu| sheet.vcpu(vcpu));
        sheet.ports(&counts.serial, &counts.keyboard);
        for (id, drive) in &counts.drives {
            sheet.open(&format!("block_{id}"), BLOCK);
            sheet.drive(&format!("block_{id}"), drive);
            sheet.drive("block", drive);
        }
        for (id, interface) in &counts.interfaces {
            sheet.open(&format!("net_{id}"), NET);
            sheet.interface(&format!("net_{id}"), interface);
            sheet.interface("net", interface);
        }
        if let Some(balloon) = &counts.balloon {
            sheet.balloon(&balloon.counts);
        }
        if let Some(vsock) = &counts.vsock {
            sheet.vsock(vsock);
        }
        if let Some(entropy) = &counts.entropy {
            sheet.entropy(entropy);
        }
        sheet.mmds(&counts.mmds);
        sheet
    }

    fn add_all<const N: usize>(&mut self, group: &str, values: [(&str, u64); N]) {
        for (key, value) in values {
            self.add(group, key, value);
        }
    }

    fn balloon(&mut self, balloon: &BalloonCounts) {
        self.add_all(
            "balloon",
            [
                ("inflate_count", balloon.inflates),
                ("deflate_count", balloon.deflates),
                ("stats_updates_count", balloon.statistics),
                ("stats_update_fails", balloon.statistics_fails),
                ("free_page_report_count", balloon.report.ranges),
                ("free_page_report_freed", balloon.report.bytes),
                ("free_page_report_fails", balloon.report.fails),
                ("free_page_hint_count", balloon.hint.ranges),
                ("free_page_hint_freed", balloon.hint.bytes),
                ("free_page_hint_fails", balloon.hint.fails),
            ],
        );
    }

    fn vsock(&mut self, vsock: &VsockCounts) {
        self.add_all(
            "vsock",
            [
                ("rx_bytes_count", vsock.rx_bytes),
                ("tx_bytes_count", vsock.tx_bytes),
                ("rx_packets_count", vsock.rx_packets),
                ("tx_packets_count", vsock.tx_packets),
                ("conns_added", vsock.connections_added),
                ("conns_killed", vsock.connections_killed),
                ("conns_removed", vsock.connections_removed),
                ("tx_queue_event_fails", vsock.bad_chains + vsock.bad_packets),
            ],
        );
    }

    fn entropy(&mut self, entropy: &RngCounts) {
        self.add_all(
            "entropy",
            [
                ("entropy_event_count", entropy.requests),
                ("entropy_bytes", entropy.bytes),
                ("host_rng_fails", entropy.failed),
                ("entropy_rate_limiter_throttled", entropy.throttled),
            ],
        );
    }

    fn mmds(&mut self, mmds: &MmdsCounts) {
        self.add_all(
            "mmds",
            [
                ("rx_accepted", mmds.rx_frames - mmds.rx_bad),
                ("rx_accepted_err", mmds.rx_bad),
                ("rx_count", mmds.rx_frames),
                ("rx_invalid_token", mmds.invalid_token),
                ("rx_no_token", mmds.no_token),
                ("tx_bytes", mmds.tx_bytes),
                ("tx_count", mmds.tx_frames),
                ("tx_frames", mmds.tx_frames),
                ("connections_created", mmds.connections_opened),
                ("connections_destroyed", mmds.connections_ended),
            ],
        );
    }

    /// Adds a group with all its keys at zero.
    fn open(&mut self, group: &str, keys: &str) {
        let values = self.0.entry(group.to_owned()).or_default();
        for key in keys.split_whitespace() {
            if key.ends_with("_agg") {
                values.extend(AGGREGATE.map(|part| (format!("{key}.{part}"), 0)));
            } else {
                values.insert(key.to_owned(), 0);
            }
        }
    }

    fn set(&mut self, group: &str, key: &str, value: u64) {
        if let Some(old) = self.value(group, key) {
            *old = value;
        }
    }

    fn add(&mut self, group: &str, key: &str, value: u64) {
        if let Some(old) = self.value(group, key) {
            *old = old.saturating_add(value);
        }
    }

    /// The value of a key that Firecracker has; there is no other.
    fn value(&mut self, group: &str, key: &str) -> Option<&mut u64> {
        self.0.get_mut(group)?.get_mut(key)
    }

    fn latency(&mut self, group: &str, key: &str, latency: &Latency) {
        if latency.count() == 0 {
            return;
        }
        self.add(group, &format!("{key}.sum_us"), micros(latency.sum));
        if let Some(max) = self.value(group, &format!("{key}.max_us")) {
            *max = micros(latency.max).max(*max);
        }
        if let Some(min) = self.value(group, &format!("{key}.min_us")) {
            let new = micros(latency.min);
            *min = if *min == 0 { new } else { new.min(*min) };
        }
    }

    fn requests(&mut self, api: &ApiCounts) {
        self.set(
            "deprecated_api",
            "deprecated_http_api_calls",
            api.deprecated,
        );
        for request in &api.requests {
            let group = format!("{}_api_requests", request.method.to_ascii_lowercase());
            let key = match request.resource.as_str() {
                "instance" => "instance_info",
                "version" => "vmm_version",
                "machine-config" => "machine_cfg",
                "boot-source" => "boot_source",
                "cpu-config" => "cpu_cfg",
                "drives" => "drive",
                "hotplug" => "hotplug_memory",
                "mmds/config" => "mmds",
                "network-interfaces" => "network",
                same => same,
            };
            self.add(&group, &format!("{key}_count"), request.count);
            self.add(&group, &format!("{key}_fails"), request.fails);
        }
    }

    fn vcpu(&mut self, vcpu: &VcpuCounts) {
        self.add("vcpu", "failures", vcpu.failures);
        for (key, latency) in [
            ("exit_io_in", &vcpu.io_in),
            ("exit_io_out", &vcpu.io_out),
            ("exit_mmio_read", &vcpu.mmio_read),
            ("exit_mmio_write", &vcpu.mmio_write),
        ] {
            self.add("vcpu", key, latency.count());
            self.latency("vcpu", &format!("{key}_agg"), latency);
        }
    }

    fn ports(&mut self, serial: &SerialCounters, keyboard: &I8042Counters) {
        for (group, key, counter) in [
            ("uart", "read_count", &serial.reads),
            ("uart", "write_count", &serial.writes),
            ("uart", "missed_read_count", &serial.missed_reads),
            ("uart", "missed_write_count", &serial.missed_writes),
            ("uart", "error_count", &serial.errors),
            ("uart", "rate_limiter_dropped_bytes", &serial.dropped_bytes),
            ("i8042", "read_count", &keyboard.reads),
            ("i8042", "write_count", &keyboard.writes),
            ("i8042", "missed_read_count", &keyboard.missed_reads),
            ("i8042", "missed_write_count", &keyboard.missed_writes),
            ("i8042", "reset_count", &keyboard.resets),
        ] {
            self.set(group, key, counter.get());
        }
    }

    fn drive(&mut self, group: &str, drive: &BlockCounts) {
        let values = [
            ("execute_fails", drive.failed),
            ("invalid_reqs_count", drive.refused),
            ("flush_count", drive.flushes.count),
            ("queue_event_count", drive.kicks),
            ("update_count", drive.updates),
            ("update_fails", drive.update_fails),
            ("read_bytes", drive.reads.bytes),
            ("write_bytes", drive.writes.bytes),
            ("read_count", drive.reads.count),
            ("write_count", drive.writes.count),
            ("rate_limiter_throttled_events", drive.throttled),
        ];
        self.add_all(group, values);
        self.latency(group, "read_agg", &drive.reads.latency);
        self.latency(group, "write_agg", &drive.writes.latency);
    }

    fn interface(&mut self, group: &str, net: &NetCounts) {
        let values = [
            ("rx_rate_limiter_throttled", net.rx_throttled),
            ("rx_bytes_count", net.rx_bytes),
            ("rx_packets_count", net.rx_frames),
            ("rx_count", net.rx_frames),
            ("rx_fails", net.rx_dropped + net.rx_bad_chains),
            ("no_rx_avail_buffer", net.rx_dropped),
            ("tap_read_fails", net.rx_errors),
            ("tap_write_fails", net.tx_errors),
            ("tx_bytes_count", net.tx_bytes),
            ("tx_malformed_frames", net.tx_bad_chains),
            ("tx_fails", net.tx_errors),
            ("tx_count", net.tx_frames),
            ("tx_packets_count", net.tx_frames),
            ("tx_rate_limiter_throttled", net.tx_throttled),
        ];
        self.add_all(group, values);
    }
}

/// The line for `sheet`, after a line for `last`.
pub(crate) fn json_line(sheet: &Sheet, last: &Sheet, config: &MetricsConfig, id: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = since.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(0));
    let mut line = Map::new();
    line.insert("utc_timestamp_ms".into(), json!(now));
    if config.emit_id {
        line.insert("id".into(), json!(id));
    }
    if !config.properties.is_empty() {
        line.insert("properties".into(), json!(config.properties));
    }
    for (group, values) in &sheet.0 {
        let mut object = Map::new();
        for (key, &value) in values {
            let told = if is_stored(group, key) {
                value
            } else {
                let before = last.0.get(group).and_then(|values| values.get(key));
                value.saturating_sub(before.copied().unwrap_or(0))
            };
            insert(&mut object, key, told);
        }
        line.insert(group.clone(), Value::Object(object));
    }
    let mut text = Value::Object(line).to_string();
    text.push('\n');
    text
}

fn is_stored(group: &str, key: &str) -> bool {
    STORED.contains(&group) || key.ends_with(".min_us") || key.ends_with(".max_us")
}

fn insert(object: &mut Map<String, Value>, key: &str, value: u64) {
    match key.split_once('.') {
        None => drop(object.insert(key.to_owned(), json!(value))),
        Some((aggregate, part)) => {
            let parts = object.entry(aggregate).or_insert_with(|| json!({}));
            if let Some(parts) = parts.as_object_mut() {
                parts.insert(part.to_owned(), json!(value));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use brume_api::RequestCount;

    use super::*;
    use crate::metrics::tests::counts;

    fn line(counts: &Counts, last: &Sheet) -> (Value, Sheet) {
        let sheet = Sheet::of(counts, 0);
        let text = json_line(&sheet, last, &MetricsConfig::default(), "id");
        assert!(text.ends_with("}\n"));
        (serde_json::from_str(&text).unwrap(), sheet)
    }

    #[test]
    fn every_group_is_there_with_every_key() {
        let (line, _) = line(&counts(), &Sheet::default());
        for (group, keys) in &GROUPS {
            for key in keys.split_whitespace() {
                let value = &line[group][key];
                let number = if key.ends_with("_agg") {
                    &value["sum_us"]
                } else {
                    value
                };
                assert!(number.is_u64(), "{group}.{key}: {value}");
            }
        }
        assert_eq!(line["block_root"]["read_bytes"], 512);
        assert_eq!(line["block"]["read_bytes"], 512);
        assert_eq!(line["net_eth0"]["rx_packets_count"], 3);
        assert_eq!(line["entropy"]["entropy_bytes"], 7);
    }

    #[test]
    fn the_ports_of_the_chipset_are_counted() {
        let counts = counts();
        counts.serial.writes.add(5);
        counts.serial.dropped_bytes.add(2);
        counts.keyboard.resets.add(1);
        let (line, _) = line(&counts, &Sheet::default());
        assert_eq!(line["uart"]["write_count"], 5);
        assert_eq!(line["uart"]["rate_limiter_dropped_bytes"], 2);
        assert_eq!(line["i8042"]["reset_count"], 1);
    }

    #[test]
    fn counters_start_again_with_each_line_and_times_stay() {
        let mut counts = counts();
        counts.api.requests = vec![RequestCount {
            method: "PUT".into(),
            resource: "drives".into(),
            count: 4,
            fails: 1,
        }];
        let (first, sheet) = line(&counts, &Sheet::default());
        assert_eq!(first["put_api_requests"]["drive_count"], 4);
        assert_eq!(first["put_api_requests"]["drive_fails"], 1);
        let (second, _) = line(&counts, &sheet);
        assert_eq!(second["put_api_requests"]["drive_count"], 0);
        assert_eq!(second["block"]["read_agg"]["sum_us"], 0);
        for line in [&first, &second] {
            assert_eq!(line["latencies_us"]["pause_vm"], 5);
            assert_eq!(line["block"]["read_agg"]["max_us"], 40);
        }
    }

    #[test]
    fn the_name_and_the_properties_are_told_if_they_are_wanted() {
        let config = MetricsConfig {
            emit_id: true,
            properties: [("az".to_owned(), "1".to_owned())].into(),
            ..MetricsConfig::default()
        };
        let sheet = Sheet::of(&counts(), 0);
        let text = json_line(&sheet, &Sheet::default(), &config, "vm-1");
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["id"], "vm-1");
        assert_eq!(line["properties"]["az"], "1");
    }
}
