// SPDX-License-Identifier: Apache-2.0
//! What a machine counts, and when that is written.

use brume_virtio::balloon::BalloonControl;
use brume_virtio::rng::RngControl;
use brume_virtio::vsock::VsockControl;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::Machine;
use crate::controls::Controls;
use crate::cpu::VcpuHandle;
use crate::event::{Event, EventSender};
use crate::metrics::{Ballooned, Counts};
use crate::telemetry::{METRICS_PERIOD, MetricsError};

impl Machine {
    /// Writes metrics if there is a file for them.
    pub(super) fn write_metrics(&mut self) {
        if self.telemetry.has_file()
            && let Err(error) = self.flush_metrics()
        {
            tracing::warn!("{error}");
        }
    }

    pub(super) fn flush_metrics(&mut self) -> Result<(), MetricsError> {
        let counts = self.counts();
        self.telemetry.write(&self.description.id, &counts)
    }

    /// What was counted so far.
    pub(super) fn counts(&self) -> Counts {
        let Controls {
            drives,
            interfaces,
            serial,
            keyboard_counters,
            ..
        } = &self.controls;
        let controls = &self.controls;
        Counts {
            vcpus: self.vcpus.iter().map(VcpuHandle::counts).collect(),
            drives: drives
                .iter()
                .map(|(id, control)| (id.clone(), control.counts()))
                .collect(),
            interfaces: interfaces
                .iter()
                .map(|(id, control)| (id.clone(), control.counts()))
                .collect(),
            balloon: controls.balloon.as_ref().map(ballooned),
            vsock: controls.vsock.as_ref().map(VsockControl::counts),
            entropy: controls.entropy.as_ref().map(RngControl::counts),
            serial: serial.clone(),
            keyboard: keyboard_counters.clone(),
            ..self.telemetry.counts(&self.description, self.state)
        }
    }
}

fn ballooned(balloon: &BalloonControl) -> Ballooned {
    let bytes = |pages: u32| u64::from(pages) << 12;
    Ballooned {
        counts: balloon.counts(),
        target_bytes: bytes(balloon.target_pages()),
        actual_bytes: bytes(balloon.actual_pages()),
    }
}

/// Says when metrics are to be written.
pub(super) struct MetricsTicker {
    timer: TimerFd,
    sender: EventSender,
}

impl MetricsTicker {
    pub(super) fn new(sender: EventSender) -> std::io::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(METRICS_PERIOD, Some(METRICS_PERIOD))?;
        Ok(Self { timer, sender })
    }
}

impl MutEventSubscriber for MetricsTicker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // It was said to be due, and a failure would be told by the next line that is missing.
        let _ = self.timer.wait();
        self.sender.send(Event::MetricsDue);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // The loop is new and the timer is ours: it is not in it yet.
        let _ = ops.add(Events::new(&self.timer, EventSet::IN));
    }
}
