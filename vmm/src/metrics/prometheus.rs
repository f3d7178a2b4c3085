// SPDX-License-Identifier: Apache-2.0
//! Metrics in the text form of Prometheus: names with units, help for each, everything since the
//! start.

use std::fmt::Write;
use std::time::Duration;

use brume_api::LATENCY_BOUNDS_US as API_BOUNDS_US;
use brume_devices::{LATENCY_BOUNDS_US, Latency};
use brume_virtio::block::{BlockCounts, KindCounts};
use brume_virtio::net::NetCounts;

use super::{Counts, migration};
use crate::lifecycle::VmState;

/// A text that grows by metrics.
#[derive(Default)]
pub(super) struct Text(String);

impl Text {
    /// Begins a metric.
    pub(super) fn metric(&mut self, name: &str, kind: &str, help: &str) {
        // A string takes all that is written to it.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A value of the metric that was begun.
    pub(super) fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            self.0.push(if index == 0 { '{' } else { ',' });
            let text = escaped(text);
            let _ = write!(self.0, "{label}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    pub(super) fn count(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        self.value(name, labels, value as f64);
    }

    /// A histogram of times, from classes of microseconds.
    fn histogram(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        (bounds, classes): (&[u64], &[u64]),
        sum: Duration,
    ) {
        let bucket = format!("{name}_bucket");
        let mut total = 0;
        let bounds = bounds.iter().map(|&us| (us as f64 / 1e6).to_string());
        for (bound, count) in bounds.chain(["+Inf".to_owned()]).zip(classes) {
            total += count;
            let labels = [labels, &[("le", &bound)]].concat();
            self.count(&bucket, &labels, total);
        }
        self.value(&format!("{name}_sum"), labels, sum.as_secs_f64());
        self.count(&format!("{name}_count"), labels, total);
    }

    fn latency(&mut self, name: &str, labels: &[(&str, &str)], latency: &Latency) {
        let classes = (&LATENCY_BOUNDS_US[..], &latency.classes[..]);
        self.histogram(name, labels, classes, latency.sum);
    }
}

/// `text` as the value of a label.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// The metrics of a machine.
pub(crate) fn text(counts: &Counts) -> String {
    let mut text = Text::default();
    machine(&mut text, counts);
    vcpus(&mut text, counts);
    serial(&mut text, counts);
    drives(&mut text, &counts.drives);
    interfaces(&mut text, &counts.interfaces);
    small_devices(&mut text, counts);
    migration::add(&mut text, &counts.migration);
    api(&mut text, counts);
    text.0
}

/// The devices of which there is one at most.
fn small_devices(text: &mut Text, counts: &Counts) {
    if let Some(balloon) = &counts.balloon {
        let name = "brume_balloon_bytes";
        text.metric(name, "gauge", "Size of the balloon, in bytes.");
        text.count(name, &[("size", "target")], balloon.target_bytes);
        text.count(name, &[("size", "actual")], balloon.actual_bytes);
        let name = "brume_balloon_given_back_bytes_total";
        let help = "Memory of the guest that was given back to the host, in bytes.";
        text.metric(name, "counter", help);
        let counts = &balloon.counts;
        for (way, given) in [
            ("inflate", counts.inflate),
            ("hint", counts.hint),
            ("report", counts.report),
        ] {
            text.count(name, &[("way", way)], given.bytes);
        }
    }
    if let Some(vsock) = &counts.vsock {
        let name = "brume_vsock_packets_total";
        text.metric(name, "counter", "Packets of the socket device.");
        text.count(name, &[("direction", "receive")], vsock.rx_packets);
        text.count(name, &[("direction", "transmit")], vsock.tx_packets);
        let name = "brume_vsock_bytes_total";
        text.metric(name, "counter", "Bytes in these packets.");
        text.count(name, &[("direction", "receive")], vsock.rx_bytes);
        text.count(name, &[("direction", "transmit")], vsock.tx_bytes);
        let name = "brume_vsock_connections_total";
        text.metric(name, "counter", "Connections of the socket device.");
        for (event, value) in [
            ("opened", vsock.connections_added),
            ("refused", vsock.connections_refused),
            ("ended", vsock.connections_removed),
            ("timed_out", vsock.connections_killed),
        ] {
            text.count(name, &[("event", event)], value);
        }
    }
    if let Some(entropy) = &counts.entropy {
        let name = "brume_entropy_bytes_total";
        text.metric(name, "counter", "Random bytes that the guest got.");
        text.count(name, &[], entropy.bytes);
        let name = "brume_entropy_requests_total";
        text.metric(name, "counter", "Requests for random bytes.");
        text.count(name, &[], entropy.requests);
    }
    let name = "brume_mmds_requests_total";
    let help = "Requests of the guest to the metadata service.";
    text.metric(name, "counter", help);
    let mmds = &counts.mmds;
    let refused = mmds.no_token + mmds.invalid_token;
    text.count(name, &[("token", "refused")], refused);
    text.count(name, &[("token", "accepted")], mmds.requests - refused);
}

fn machine(text: &mut Text, counts: &Counts) {
    let name = "brume_state";
    text.metric(name, "gauge", "1 for the state that the machine is in.");
    for state in [VmState::NotStarted, VmState::Running, VmState::Paused] {
        // A machine on its way to another process counts as paused.
        let is = u64::from(state.name() == counts.state.name());
        text.count(name, &[("state", state.name())], is);
    }
    let name = "brume_memory_bytes";
    text.metric(name, "gauge", "Memory of the guest, in bytes.");
    text.count(name, &[], counts.memory_bytes);
    if let Some(resident) = counts.host.resident_bytes {
        let name = "brume_process_resident_memory_bytes";
        let help = "Memory of the host that the process has, the guest's included, in bytes.";
        text.metric(name, "gauge", help);
        text.count(name, &[], resident);
    }
    let name = "brume_thread_cpu_seconds_total";
    let help = "CPU time of each thread, in seconds: fc_vcpu N are the guest's processors.";
    text.metric(name, "counter", help);
    for (thread, time) in &counts.host.threads {
        text.value(name, &[("thread", thread)], time.as_secs_f64());
    }
    let times = &counts.times;
    let all = [
        ("pause", "pause", times.pause),
        ("resume", "resume", times.resume),
        ("full_snapshot", "full snapshot", times.full_snapshot),
        ("diff_snapshot", "diff snapshot", times.diff_snapshot),
        ("load_snapshot", "load of a snapshot", times.load_snapshot),
        (
            "snapshot_pause",
            "pause for a snapshot that was written while the guest ran",
            times.snapshot_pause,
        ),
    ];
    for (what, in_words, time) in all {
        let name = format!("brume_{what}_seconds");
        let help = format!("How long the last {in_words} took, in seconds.");
        text.metric(&name, "gauge", &help);
        text.value(&name, &[], time.as_secs_f64());
    }
}

fn vcpus(text: &mut Text, counts: &Counts) {
    if counts.vcpus.is_empty() {
        return;
    }
    let name = "brume_vcpu_exits_total";
    let help = "Exits of a vCPU from the guest to the VMM, by kind.";
    text.metric(name, "counter", help);
    for (index, vcpu) in counts.vcpus.iter().enumerate() {
        let index = index.to_string();
        for (kind, value) in [
            ("io_in", vcpu.io_in.count()),
            ("io_out", vcpu.io_out.count()),
            ("mmio_read", vcpu.mmio_read.count()),
            ("mmio_write", vcpu.mmio_write.count()),
            ("kick", vcpu.kicks),
            ("failure", vcpu.failures),
        ] {
            text.count(name, &[("vcpu", &index), ("kind", kind)], value);
        }
    }
    let name = "brume_vcpu_exit_seconds_total";
    let help = "Time that the VMM took to answer a vCPU's exits, in seconds.";
    text.metric(name, "counter", help);
    for (index, vcpu) in counts.vcpus.iter().enumerate() {
        let index = index.to_string();
        for (kind, latency) in [
            ("io_in", vcpu.io_in),
            ("io_out", vcpu.io_out),
            ("mmio_read", vcpu.mmio_read),
            ("mmio_write", vcpu.mmio_write),
        ] {
            let labels = [("vcpu", index.as_str()), ("kind", kind)];
            text.value(name, &labels, latency.sum.as_secs_f64());
        }
    }
}

fn serial(text: &mut Text, counts: &Counts) {
    let serial = &counts.serial;
    let name = "brume_serial_bytes_total";
    let help = "Bytes over the serial port, as the guest sees their direction.";
    text.metric(name, "counter", help);
    for (direction, counter) in [("receive", &serial.reads), ("transmit", &serial.writes)] {
        text.count(name, &[("direction", direction)], counter.get());
    }
    let name = "brume_serial_dropped_bytes_total";
    let help = "Bytes of serial output that are lost, by the reason.";
    text.metric(name, "counter", help);
    for (reason, counter) in [
        ("limit", &serial.dropped_bytes),
        ("refused", &serial.missed_writes),
    ] {
        text.count(name, &[("reason", reason)], counter.get());
    }
    let name = "brume_keyboard_accesses_total";
    let help = "Accesses of the guest to its keyboard controller, by kind.";
    text.metric(name, "counter", help);
    let keyboard = &counts.keyboard;
    for (kind, counter) in [
        ("read", &keyboard.reads),
        ("write", &keyboard.writes),
        ("missed_read", &keyboard.missed_reads),
        ("missed_write", &keyboard.missed_writes),
        ("reset", &keyboard.resets),
    ] {
        text.count(name, &[("kind", kind)], counter.get());
    }
}

fn drives(text: &mut Text, drives: &[(String, BlockCounts)]) {
    if drives.is_empty() {
        return;
    }
    let kinds = |counts: &BlockCounts| -> [(&'static str, KindCounts); 5] {
        [
            ("read", counts.reads),
            ("write", counts.writes),
            ("flush", counts.flushes),
            ("discard", counts.discards),
            ("write_zeroes", counts.write_zeroes),
        ]
    };
    let name = "brume_drive_operations_total";
    text.metric(name, "counter", "Requests that a drive has carried out.");
    for (id, counts) in drives {
        for (kind, kind_counts) in kinds(counts) {
            let labels = [("drive", id.as_str()), ("operation", kind)];
            text.count(name, &labels, kind_counts.count);
        }
    }
    let name = "brume_drive_bytes_total";
    text.metric(
        name,
        "counter",
        "Bytes of a drive that requests were about.",
    );
    for (id, counts) in drives {
        for (kind, kind_counts) in kinds(counts)
            .into_iter()
            .filter(|(kind, _)| *kind != "flush")
        {
            let labels = [("drive", id.as_str()), ("operation", kind)];
            text.count(name, &labels, kind_counts.bytes);
        }
    }
    let name = "brume_drive_operation_seconds";
    let help = "Time from taking a request from the queue to its answer, in seconds.";
    text.metric(name, "histogram", help);
    for (id, counts) in drives {
        for (kind, kind_counts) in kinds(counts) {
            let labels = [("drive", id.as_str()), ("operation", kind)];
            text.latency(name, &labels, &kind_counts.latency);
        }
    }
    type Get = fn(&BlockCounts) -> u64;
    let others: [(&str, &str, Get); 4] = [
        (
            "brume_drive_errors_total",
            "Requests that the host failed.",
            |counts| counts.failed,
        ),
        (
            "brume_drive_refused_total",
            "Requests of the guest that are none, or not for this drive.",
            |counts| counts.refused,
        ),
        (
            "brume_drive_throttled_total",
            "Times that the rate limiter made a request wait.",
            |counts| counts.throttled,
        ),
        (
            "brume_drive_updates_total",
            "Changes of the file behind a drive.",
            |counts| counts.updates,
        ),
    ];
    for (name, help, get) in others {
        text.metric(name, "counter", help);
        for (id, counts) in drives {
            text.count(name, &[("drive", id)], get(counts));
        }
    }
}

fn interfaces(text: &mut Text, interfaces: &[(String, NetCounts)]) {
    if interfaces.is_empty() {
        return;
    }
    type Get = fn(&NetCounts) -> [u64; 2];
    let both: [(&str, &str, Get); 5] = [
        (
            "brume_network_packets_total",
            "Frames that an interface has carried.",
            |counts| [counts.rx_frames, counts.tx_frames],
        ),
        (
            "brume_network_bytes_total",
            "Bytes of these frames.",
            |counts| [counts.rx_bytes, counts.tx_bytes],
        ),
        (
            "brume_network_dropped_total",
            "Frames for which there was no room, or that are none.",
            |counts| [counts.rx_dropped, counts.tx_bad_chains],
        ),
        (
            "brume_network_errors_total",
            "Frames that the TAP refused.",
            |counts| [counts.rx_errors, counts.tx_errors],
        ),
        (
            "brume_network_throttled_total",
            "Times that the rate limiter made a frame wait.",
            |counts| [counts.rx_throttled, counts.tx_throttled],
        ),
    ];
    for (name, help, get) in both {
        text.metric(name, "counter", help);
        for (id, counts) in interfaces {
            for (direction, value) in ["receive", "transmit"].into_iter().zip(get(counts)) {
                let labels = [("interface", id.as_str()), ("direction", direction)];
                text.count(name, &labels, value);
            }
        }
    }
}

fn api(text: &mut Text, counts: &Counts) {
    let name = "brume_api_requests_total";
    let help = "Requests to the API, by method and resource, and whether they failed.";
    text.metric(name, "counter", help);
    for request in &counts.api.requests {
        for (result, value) in [
            ("success", request.count - request.fails),
            ("failure", request.fails),
        ] {
            let labels = [
                ("method", request.method.as_str()),
                ("resource", &request.resource),
                ("result", result),
            ];
            text.count(name, &labels, value);
        }
    }
    let name = "brume_api_request_seconds";
    text.metric(name, "histogram", "Time to answer a request, in seconds.");
    let classes = (&API_BOUNDS_US[..], &counts.api.latency[..]);
    let sum = Duration::from_micros(counts.api.latency_sum_us);
    text.histogram(name, &[], classes, sum);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::metrics::tests::counts;

    #[test]
    fn every_value_has_a_type_and_help_before_it_and_none_comes_twice() {
        let text = text(&counts());
        let (mut known, mut seen) = (BTreeSet::new(), BTreeSet::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, _) = rest.split_once(' ').unwrap();
                assert!(known.insert(name), "{name} twice");
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').unwrap();
                value.parse::<f64>().unwrap();
                assert!(seen.insert(series), "{series} twice");
                let name = series.split('{').next().unwrap();
                let base = ["_bucket", "_sum", "_count"];
                let base = base.iter().find_map(|end| name.strip_suffix(end));
                assert!(
                    known.contains(name) || known.contains(base.unwrap()),
                    "{line}"
                );
            }
        }
        for line in [
            "brume_state{state=\"Running\"} 1",
            "brume_drive_bytes_total{drive=\"root\",operation=\"read\"} 512",
            "brume_drive_operation_seconds_bucket{drive=\"root\",operation=\"read\",le=\"+Inf\"} 1",
            "brume_drive_operation_seconds_bucket{drive=\"root\",operation=\"read\",le=\"0.000005\"} 0",
            "brume_network_packets_total{interface=\"eth0\",direction=\"receive\"} 3",
            "brume_migration_disk_bytes 4096",
            "brume_migration_left_seconds 1.5",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}: {text}");
        }
    }

    #[test]
    fn labels_cannot_break_out() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
