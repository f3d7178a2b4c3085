// SPDX-License-Identifier: Apache-2.0
//! A machine with any guest on one of two hosts, and its move to the other.

use std::thread;
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, MigrationStatus};
use serde_json::{Value, json};

use crate::api::{ApiVm, eventually, with};
use crate::lan::Lan;
use crate::vm::{SOON, brume};

/// Where a host waits for a machine.
const PORT: u16 = 7000;
/// How often the source is asked how far it is.
const POLL: Duration = Duration::from_millis(5);

/// A process on a host.
pub struct Placed {
    /// The program behind its API socket.
    pub api: ApiVm,
    /// The number of its host.
    pub host: usize,
}

impl Placed {
    /// Starts a fresh one.
    ///
    /// # Panics
    ///
    /// It does not start.
    pub fn start(lan: &Lan, host: usize) -> Self {
        let on_host = |command| match lan.hosts.get(host) {
            Some(host) => host.wrap(&command),
            None => panic!("there is no host {host}"),
        };
        Self {
            api: ApiVm::start_with(brume(), on_host),
            host,
        }
    }

    /// Starts one on the other host, which waits for this machine. `overrides` are members of the
    /// request.
    ///
    /// # Panics
    ///
    /// It does not wait.
    pub fn other(&self, lan: &Lan, overrides: &Value) -> Self {
        let other = Self::start(lan, 1 - self.host);
        let mut body = json!({"listen": other.address()});
        if let (Some(body), Some(overrides)) = (body.as_object_mut(), overrides.as_object()) {
            body.extend(overrides.clone());
        }
        other.api.done("PUT", "/migration/receive", &body);
        other
    }

    fn address(&self) -> String {
        format!("tcp:{}:{PORT}", Lan::address(self.host))
    }

    fn progress(&self) -> MigrationStatus {
        serde_json::from_value(self.api.get("/migration")).expect("a status")
    }

    /// Moves to `target`, over two connections; how that went.
    ///
    /// # Panics
    ///
    /// It does not get there.
    #[track_caller]
    pub fn move_to(&self, target: &Self, options: &Value) -> MigrationStatus {
        let body = json!({"destination": target.address(), "connections": 2});
        let body = with(body, options);
        self.api.done("PUT", "/migration/send", &body);
        let begun = Instant::now();
        let status = loop {
            let status = self.progress();
            if status.phase.is_over() {
                break status;
            }
            assert!(begun.elapsed() < SOON, "{status:#?}");
            thread::sleep(POLL);
        };
        let done = MigrationPhase::Completed;
        let (log, there) = (self.api.log(), target.api.log());
        assert_eq!(status.phase, done, "{status:#?}\n{log}\n{there}");
        eventually("the target says so, too", || {
            target.progress().phase == done
        });
        status
    }
}
