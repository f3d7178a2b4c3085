// SPDX-License-Identifier: Apache-2.0
//! The control API: how soon it is there, how fast it answers, how fast it starts a guest.

use std::io::{self, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::program::{MEMORY_MIB, Programs};
use crate::session::Session;
use crate::table::{Better, Table};

const REQUESTS: usize = 2000;
/// Pauses and resumes.
const CHANGES: usize = 200;

/// Takes the rows.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(programs: &Programs, table: &mut Table) -> io::Result<()> {
    let monitors = programs.monitors();
    let mut take = |name: &str, unit, better, measure: fn(&mut Api) -> io::Result<f64>| {
        table.take(name, unit, better, &monitors, |monitor| {
            measure(&mut Api::start(programs, monitor)?)
        })
    };
    take("API, exec to socket", "ms", Better::Lower, |api| {
        Ok(api.session.ready.as_secs_f64() * 1e3)
    })?;
    take("API, GET / requests", "1/s", Better::Higher, |api| {
        let times = api.many(REQUESTS, |_| ("GET", "/", String::new()))?;
        let sum: Duration = times.iter().sum();
        Ok(REQUESTS as f64 / sum.as_secs_f64())
    })?;
    take("API, GET /, median", "us", Better::Lower, |api| {
        let times = api.many(REQUESTS, |_| ("GET", "/", String::new()))?;
        Ok(percentile(times, 50))
    })?;
    take("API, GET /, 99th percentile", "us", Better::Lower, |api| {
        let times = api.many(REQUESTS, |_| ("GET", "/", String::new()))?;
        Ok(percentile(times, 99))
    })?;
    take("API, PATCH /vm, median", "us", Better::Lower, |api| {
        Ok(percentile(api.pauses()?, 50))
    })?;
    take(
        "API, PATCH /vm, 99th percentile",
        "us",
        Better::Lower,
        |api| Ok(percentile(api.pauses()?, 99)),
    )?;
    take(
        "API, InstanceStart to first byte",
        "ms",
        Better::Lower,
        |api| {
            let start = api.start_guest()?;
            Ok(start.as_secs_f64() * 1e3)
        },
    )
}

/// The time in microseconds that `percent` of `times` do not exceed.
fn percentile(mut times: Vec<Duration>, percent: usize) -> f64 {
    times.sort();
    let at = (times.len() * percent / 100).min(times.len().saturating_sub(1));
    times
        .get(at)
        .map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}

/// A monitor whose requests are timed.
struct Api {
    session: Session,
    guest: PathBuf,
}

impl Api {
    fn start(programs: &Programs, monitor: &str) -> io::Result<Self> {
        Ok(Self {
            session: Session::start(programs, monitor, "api")?,
            guest: programs.guest().to_owned(),
        })
    }

    /// How long each of `count` requests takes.
    fn many(
        &mut self,
        count: usize,
        request: impl Fn(usize) -> (&'static str, &'static str, String),
    ) -> io::Result<Vec<Duration>> {
        let mut times = Vec::with_capacity(count);
        for number in 0..count {
            let request = request(number);
            let begun = Instant::now();
            self.session.send(request)?;
            times.push(begun.elapsed());
        }
        Ok(times)
    }

    fn pauses(&mut self) -> io::Result<Vec<Duration>> {
        self.start_guest()?;
        self.many(CHANGES, |number| {
            let state = if number % 2 == 0 { "Paused" } else { "Resumed" };
            ("PATCH", "/vm", json!({ "state": state }).to_string())
        })
    }

    /// Configures a guest that says something and goes on, and starts it; the time from the start
    /// to its first byte.
    fn start_guest(&mut self) -> io::Result<Duration> {
        let boot = json!({
            "kernel_image_path": self.guest,
            "boot_args": "bare.do=hello bare.end=spin",
        });
        let machine = json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB});
        self.session
            .send(("PUT", "/boot-source", boot.to_string()))?;
        self.session
            .send(("PUT", "/machine-config", machine.to_string()))?;
        let begun = Instant::now();
        let start = json!({"action_type": "InstanceStart"});
        self.session.send(("PUT", "/actions", start.to_string()))?;
        self.session.monitor.stdout()?.read_exact(&mut [0])?;
        Ok(begun.elapsed())
    }
}
