// SPDX-License-Identifier: Apache-2.0
//! A machine that is paused and resumed again and again goes on as if nothing had been.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use brume_api::config::VmConfig;
use brume_tests::artefacts;
use brume_vmm::{
    BuildOptions, Description, Ending, Machine, MachineHandle, RequestError, RunError, StopReason,
    VmState,
};
use serde_json::json;

use crate::block::disk;

/// The guest's console as a channel.
struct Output(Sender<Vec<u8>>);

impl io::Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // Nobody may be listening any more.
        let _ = self.0.send(data.to_vec());
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the bare guest with a disk, and `act` with its handle meanwhile.
fn run(
    args: &str,
    disk: &Path,
    engine: &str,
    act: impl FnOnce(&MachineHandle) + Send + 'static,
) -> (Result<Ending, RunError>, String) {
    let config = json!({
        "boot-source": {"kernel_image_path": artefacts::bare(), "boot_args": args},
        "drives": [{
            "drive_id": "d", "is_root_device": false, "path_on_host": disk, "io_engine": engine
        }],
    });
    let config = VmConfig::from_json(&config.to_string()).unwrap();
    let (sender, console) = channel();
    let options = BuildOptions {
        console: Box::new(Output(sender)),
        clock: None,
        always_name_devices: false,
    };
    let description = Description {
        config,
        ..Description::default()
    };
    let machine = Machine::build(description, options).unwrap();
    let handle = machine.handle();
    let actor = thread::spawn(move || act(&handle));
    let end = machine.run(Vec::new());
    actor.join().unwrap();
    let text: Vec<u8> = console.into_iter().flatten().collect();
    (end, String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn a_guest_at_work_does_not_notice_pauses() {
    for engine in ["Sync", "Async"] {
        let (_folder, path) = disk();
        let args = "bare.tsc_khz=2000000 bare.do=blk-check bare.ops=60000";
        let pauses = Arc::<AtomicUsize>::default();
        let counter = pauses.clone();
        let (end, console) = run(args, &path, engine, move |machine| {
            // Until it has done its work.
            while machine.pause().is_ok() {
                // Its end may be waiting to be seen.
                if !matches!(machine.state(), Ok(VmState::Paused)) || machine.resume().is_err() {
                    break;
                }
                counter.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
            }
        });
        assert!(pauses.load(Ordering::Relaxed) > 10);
        assert_eq!(end.unwrap(), Ending::Reset);
        assert!(
            console.contains("errors=0 mismatches=0"),
            "{engine}: {console}"
        );
    }
}

#[test]
fn a_paused_guest_does_nothing() {
    let (_folder, path) = disk();
    let args = "bare.tsc_khz=2000000 bare.do=blk-check bare.ops=1000000000";
    let (end, _) = run(args, &path.clone(), "Sync", move |machine| {
        thread::sleep(Duration::from_millis(300));
        machine.pause().unwrap();
        let before = std::fs::read(&path).unwrap();
        thread::sleep(Duration::from_millis(300));
        assert!(
            std::fs::read(&path).unwrap() == before,
            "the disk has changed"
        );
        machine.resume().unwrap();
        // It goes on: sooner or later the disk changes.
        while std::fs::read(&path).unwrap() == before {
            thread::sleep(Duration::from_millis(10));
        }
        machine.stop(StopReason::Console);
    });
    assert_eq!(end.unwrap(), Ending::Stopped(StopReason::Console));
}

#[test]
fn requests_that_do_not_fit_the_state_are_refused_and_change_nothing() {
    let (_folder, path) = disk();
    let (end, _) = run("bare.do=hello bare.end=spin", &path, "Sync", |machine| {
        assert!(matches!(machine.resume(), Err(RequestError::State(_))));
        assert_eq!(machine.state().unwrap(), VmState::Running);
        machine.pause().unwrap();
        assert!(matches!(machine.pause(), Err(RequestError::State(_))));
        assert_eq!(machine.state().unwrap(), VmState::Paused);
        machine.stop(StopReason::Signal(libc::SIGTERM));
        while machine.state().is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(matches!(machine.pause(), Err(RequestError::Ended)));
    });
    assert_eq!(
        end.unwrap(),
        Ending::Stopped(StopReason::Signal(libc::SIGTERM))
    );
}
