// SPDX-License-Identifier: Apache-2.0
//! Network namespaces of a test's own.
//!
//! This is a module with unsafe code: a thread changes its namespace.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::panic::resume_unwind;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use crate::host::FrameSocket;
use crate::vm::{inside, output_of};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A namespace with a name, removed when this is dropped.
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes one, with nothing in it but a loopback interface.
    ///
    /// # Panics
    ///
    /// It is not allowed.
    #[allow(clippy::new_without_default, reason = "it makes something on the host")]
    pub fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("brume-test-{}-{number}", std::process::id());
        let made = Command::new("ip")
            .args(["netns", "add", &name])
            .status()
            .expect("ip");
        assert!(
            made.success(),
            "network tests need root, to make a network namespace"
        );
        Self { name }
    }

    /// What ip(8) calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `command`, inside the namespace.
    pub fn wrap(&self, command: &Command) -> Command {
        inside("ip", &["netns", "exec", &self.name], command)
    }

    /// Runs a shell script inside.
    ///
    /// # Panics
    ///
    /// It fails.
    #[track_caller]
    pub fn sh(&self, script: &str) {
        let args = ["netns", "exec", &self.name, "sh", "-ec", script];
        let status = Command::new("ip").args(args).status().expect("ip");
        assert!(status.success(), "`{script}` failed");
    }

    /// The interfaces in it, one a line.
    pub fn links(&self) -> String {
        output_of("ip", &["-n", &self.name, "-o", "link"])
    }

    /// Does `work` inside, on a thread of its own.
    ///
    /// # Panics
    ///
    /// It is gone, or the work panics.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let entered = || {
            self.enter();
            work()
        };
        thread::scope(|scope| match scope.spawn(entered).join() {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        })
    }

    /// A socket for test frames on its interface `name`. It hears from now on, whichever thread
    /// it is given to.
    ///
    /// # Panics
    ///
    /// There is no such interface.
    pub fn frame_socket(&self, name: &str) -> FrameSocket {
        self.within(|| FrameSocket::open(name).expect("a socket for frames"))
    }

    /// Moves the calling thread into it, for good.
    ///
    /// # Panics
    ///
    /// It is gone.
    pub fn enter(&self) {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("the namespace");
        // SAFETY: it takes no pointer.
        let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "the namespace cannot be entered");
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        // Nothing more can be done if it fails, and a test may be failing already.
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}
