// SPDX-License-Identifier: Apache-2.0
//! A machine moves to another process: over each kind of connection, back and forth, within limits,
//! from the command line.

use std::fs;
use std::ops::ControlFlow;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{Client, MigrationPhase, MigrationStatus};
use brume_tests::api::{ApiVm, eventually};
use brume_tests::host;
use brume_tests::live::{Live, Snapshot};
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::vm::{SOON, outcome};
use serde_json::{Value, json};

pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// A guest that writes while it moves.
pub(crate) const WRITES: &str = "bare.touch=32 bare.rate=50";
/// A guest that writes so fast that it does not move over a slow connection.
const RESTLESS: &str = "bare.touch=8 bare.rate=max";
/// A connection that is too slow for it, in bytes per second.
const SLOW: u64 = 8_000_000;

/// Whether the pages that are written are noted.
#[track_caller]
pub(crate) fn tracks(api: &ApiVm) -> bool {
    let dirty = api.get("/memory/dirty");
    dirty["tracking"].as_bool().unwrap()
}

/// Checks that a move is over and has left nothing behind: the source has ended well, the guest is
/// whole, and nothing slows it down.
#[track_caller]
pub(crate) fn assert_settled(pair: &mut Pair) {
    assert_eq!(pair.end_of(Side::Source), 0);
    pair.live(Side::Target).hash();
    assert!(!tracks(pair.api(Side::Target)));
    pair.assert_runs_on(Side::Target);
}

#[test]
fn a_guest_moves_over_every_link_and_has_all_its_memory() {
    for link in [Link::Unix, Link::Tcp, Link::TwoHosts, Link::Passed] {
        for args in ["bare.touch=32", WRITES] {
            let mut pair = Pair::start(&Setup {
                args,
                link,
                ..Setup::default()
            });
            pair.assert_runs_on(Side::Source);
            pair.moved(&json!({}), LIMIT);
            assert_settled(&mut pair);
        }
    }
}

#[test]
fn memory_goes_over_several_connections() {
    for (link, connections) in [(Link::Unix, 2), (Link::Tcp, 4), (Link::TwoHosts, 16)] {
        let mut pair = Pair::start(&Setup {
            args: WRITES,
            link,
            ..Setup::default()
        });
        pair.assert_runs_on(Side::Source);
        pair.moved(&json!({"connections": connections}), LIMIT);
        assert_settled(&mut pair);
    }
}

#[test]
fn each_of_the_connections_carries_its_part() {
    let mut pair = Pair::start(&Setup {
        args: "bare.touch=32",
        link: Link::Tcp,
        proxied: true,
        ..Setup::default()
    });
    pair.moved(&json!({"connections": 3, "compression": "None"}), LIMIT);
    let proxy = pair.proxy.as_ref().unwrap();
    let parts: Vec<_> = (0..3).map(|number| proxy.bytes_of(number)).collect();
    assert_eq!(proxy.connections(), 3);
    assert!(parts.iter().all(|&bytes| bytes > 2 << 20), "{parts:?}");
}

/// Options of the `number`th move of many: each mode has its turn.
pub(crate) fn in_turn(number: usize) -> Value {
    match number % 3 {
        0 => json!({}),
        1 => json!({"mode": "PostCopy"}),
        // So little that the rest of the memory follows.
        _ => json!({"mode": "Hybrid", "max_downtime_ms": 1}),
    }
}

/// By how much what is told of the downtime is less or more than what the guest saw, beyond what it
/// sees at rest, in microseconds; and what is told. A guest whose memory follows it may also have
/// stood still for a page.
fn downtime_is_off_by(pair: &mut Pair, body: &Value) -> (u64, u64) {
    pair.live(Side::Source).gap();
    thread::sleep(Duration::from_millis(300));
    let rest = pair.live(Side::Source).gap().max_us;
    let status = pair.moved(body, LIMIT);
    let told = status.downtime.expect("a downtime");
    let seen = pair.live(Side::Target).gap();
    let parts = told.pause_us + told.pages_us + told.state_us + told.load_us + told.resume_us;
    assert!(told.total_us.abs_diff(parts) < 10, "{told:?}");
    let difference = if status.faults > 0 {
        told.total_us.saturating_sub(seen.max_us)
    } else {
        seen.max_us.abs_diff(told.total_us)
    };
    (difference.saturating_sub(2 * rest), told.total_us)
}

#[test]
fn what_is_told_of_the_downtime_is_what_the_guest_saw() {
    // What is left then takes long enough to be seen among all else that stops a guest.
    let forced = json!({"bandwidth_limit": SLOW, "compression": "None", "timeout_s": 1,
        "on_timeout": "Force"});
    let ways = [
        (Link::Unix, in_turn(0), 0),
        (Link::Tcp, in_turn(1), 0),
        (Link::TwoHosts, in_turn(2), 0),
        (Link::Tcp, forced, 15_000),
    ];
    for (link, body, least) in ways {
        let setup = Setup {
            args: "bare.touch=64 bare.rate=20",
            link,
            ..Setup::default()
        };
        let mut pair = Pair::start(&setup);
        let mut differences = Vec::new();
        // A busy machine stops a guest as well, now and then.
        while !differences.iter().any(|&time| time < 4000) {
            assert!(differences.len() < 6, "{body}: {differences:?}");
            let (difference, told) = downtime_is_off_by(&mut pair, &body);
            assert!(told >= least, "{body}: {told}");
            differences.push(difference);
            pair.again(&setup);
        }
    }
}

#[test]
fn a_machine_goes_there_and_back_five_times() {
    let setup = Setup {
        args: WRITES,
        link: Link::TwoHosts,
        ..Setup::default()
    };
    let mut pair = Pair::start(&setup);
    for _ in 0..10 {
        pair.moved(&json!({}), LIMIT);
        assert_eq!(pair.end_of(Side::Source), 0);
        pair.again(&setup);
    }
    pair.assert_runs_on(Side::Source);
    pair.live(Side::Source).hash();
    assert!(!tracks(pair.api(Side::Source)));
}

#[test]
fn four_vcpus_move() {
    let machine = json!({"vcpu_count": 4, "mem_size_mib": 128});
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        parts: &[("/machine-config", machine)],
        ..Setup::default()
    });
    pair.assert_runs_on(Side::Source);
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
    let config = pair.api(Side::Target).get("/machine-config");
    assert_eq!(config["vcpu_count"], 4);
}

#[test]
fn a_paused_machine_stays_paused() {
    let mut pair = Pair::new(WRITES);
    pair.assert_runs_on(Side::Source);
    pair.live(Side::Source).pause();
    pair.send(&json!({}));
    pair.arrived(LIMIT);
    pair.assert_runs_nowhere(Duration::from_millis(200));
    pair.api(Side::Target).assert_alive("Paused");
    assert_eq!(pair.end_of(Side::Source), 0);
    pair.live(Side::Target).resume();
    assert_settled(&mut pair);
}

#[test]
fn a_machine_that_is_not_to_go_on_waits_until_it_is_told() {
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        receive: json!({"resume_vm": false}),
        ..Setup::default()
    });
    pair.assert_runs_on(Side::Source);
    pair.send(&json!({}));
    pair.arrived(LIMIT);
    pair.assert_runs_nowhere(Duration::from_millis(200));
    pair.api(Side::Target).assert_alive("Paused");
    pair.live(Side::Target).resume();
    assert_settled(&mut pair);
}

#[test]
fn a_machine_moves_out_of_the_files_of_a_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let args = format!("bare.touch=32 bare.rate=5 bare.tsc_khz={}", host::tsc_khz());
    let snapshot = Snapshot::named(folder.path(), "s");
    let first = Live::start(&args, &[]);
    first.pause();
    first.save("Full", &snapshot);
    drop(first);
    let mut pair = Pair::start_with(&Setup::default(), |api| {
        Live::restored_in(api, &snapshot, &json!({}))
    });
    let status = pair.moved(&json!({}), LIMIT);
    // What nobody has touched since is in the file.
    assert!(status.pages > 32 * 256, "{status:?}");
    fs::remove_file(&snapshot.memory).unwrap();
    assert_settled(&mut pair);
}

#[test]
fn pages_are_noted_at_the_target_if_that_is_asked() {
    let tracked = json!({"vcpu_count": 1, "mem_size_mib": 64, "track_dirty_pages": true});
    for track in [true, false] {
        let mut pair = Pair::start(&Setup {
            args: WRITES,
            parts: &[("/machine-config", tracked.clone())],
            receive: json!({"track_dirty_pages": track}),
            ..Setup::default()
        });
        assert!(tracks(pair.api(Side::Source)));
        pair.moved(&json!({}), LIMIT);
        let target = pair.api(Side::Target);
        assert_eq!(tracks(target), track);
        assert_eq!(
            target.get("/machine-config")["track_dirty_pages"],
            Value::from(track)
        );
        pair.live(Side::Target).hash();
    }
}

#[test]
fn a_snapshot_can_be_made_of_what_has_arrived() {
    let mut pair = Pair::new(WRITES);
    pair.moved(&json!({}), LIMIT);
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::named(folder.path(), "s");
    let target = pair.live(Side::Target);
    target.pause();
    target.save("Full", &snapshot);
    drop(pair);
    Live::restored(&snapshot, &json!({})).hash();
}

#[test]
fn a_limit_on_the_bandwidth_holds_until_it_is_lifted() {
    let mut pair = Pair::new("bare.touch=96");
    let rate = 10_000_000;
    let begun = Instant::now();
    pair.send(&json!({"bandwidth_limit": rate, "compression": "None"}));
    // How much is left, and for how long, is known before the first pass is over.
    let status = pair.wait_until(Side::Source, LIMIT, |status| {
        status.bytes > 4 << 20 && status.time_left_ms.is_some()
    });
    let allowed = rate as f64 * begun.elapsed().as_secs_f64() + 1e6;
    assert!(status.bytes as f64 <= allowed, "{status:?}");
    assert_eq!(status.phase, MigrationPhase::PreCopy);
    assert_eq!(status.bandwidth_limit, rate);
    let left = status.remaining_pages * 4096;
    assert!((10 << 20..100 << 20).contains(&left), "{status:?}");
    let time = status.time_left_ms.unwrap();
    assert!((1000..60_000).contains(&time), "{status:?}");
    let metrics = pair.api(Side::Source).send("GET", "/metrics", "").body;
    for name in [
        "remaining_pages",
        "left_seconds",
        "bandwidth_bytes_per_second",
    ] {
        let start = format!("brume_migration_{name} ");
        let value = metrics.lines().find_map(|line| line.strip_prefix(&start));
        let value: f64 = value.unwrap().parse().unwrap();
        assert!(value > 0.0, "{metrics}");
    }
    // The target measures it.
    pair.wait_until(Side::Target, LIMIT, |status| {
        (rate / 3..3 * rate).contains(&status.bandwidth)
    });
    // There is no break yet that it could go on after.
    let source = pair.api(Side::Source);
    let reply = source.send("PATCH", "/migration", r#"{"resume": ""}"#);
    assert_eq!(reply.status, 400);
    assert!(reply.body.contains("nothing to resume"), "{}", reply.body);
    pair.patch(
        Side::Source,
        &json!({"bandwidth_limit": 0, "max_downtime_ms": 33}),
    );
    let status = pair.progress(Side::Source);
    if status.phase == MigrationPhase::PreCopy {
        assert_eq!(
            (status.bandwidth_limit, status.max_downtime_us),
            (0, 33_000)
        );
    }
    pair.wait(Side::Source, &[MigrationPhase::Completed], LIMIT);
    // With the limit it would have been ten.
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(8), "{took:?}");
    assert_settled(&mut pair);
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_until_it_moves() {
    // While others have the host's processors it may write too little, and moves as it is.
    assert!((0..5).any(|_| moves_slowed()), "it was never slowed");
}

/// Moves a guest that writes too fast; whether it had to be slowed.
fn moves_slowed() -> bool {
    let mut pair = Pair::new("bare.touch=2 bare.rate=max");
    pair.assert_runs_on(Side::Source);
    pair.send(&json!({"bandwidth_limit": SLOW, "compression": "None", "max_downtime_ms": 1}));
    // It does not get on.
    let status = pair.wait_until(Side::Source, LIMIT, |status| {
        status.pass > 3 || status.phase.is_over()
    });
    assert_eq!(status.throttle_percent, 0);
    let converge = json!({"auto_converge": true}).to_string();
    let source = pair.api(Side::Source);
    if status.phase.is_over() || source.send("PATCH", "/migration", &converge).status != 204 {
        return false;
    }
    let status = pair.wait(Side::Source, &[MigrationPhase::Completed], LIMIT);
    let passes = status.passes.iter();
    let steps: Vec<_> = passes.map(|pass| pass.throttle_percent).collect();
    assert!(steps.is_sorted(), "{steps:?}");
    assert_settled(&mut pair);
    eventually("it is as fast as ever", || {
        speed(pair.live(Side::Target)) * 4096 > 50_000_000
    });
    steps.last() >= Some(&20)
}

#[test]
fn a_guest_that_was_slowed_and_stays_is_as_fast_as_ever() {
    let mut pair = Pair::new("bare.touch=2 bare.rate=max");
    pair.assert_runs_on(Side::Source);
    let before = speed(pair.live(Side::Source));
    // Not one page can be sent in a millisecond, so it never comes to an end.
    pair.send(
        &json!({"bandwidth_limit": SLOW / 8, "compression": "None", "max_downtime_ms": 1,
        "auto_converge": true}),
    );
    pair.wait_until(Side::Source, LIMIT, |status| status.throttle_percent > 60);
    pair.cancel(Side::Source);
    pair.wait(Side::Source, &[MigrationPhase::Cancelled], LIMIT);
    assert!(!tracks(pair.api(Side::Source)));
    eventually("it is as fast as before", || {
        speed(pair.live(Side::Source)) * 2 > before
    });
}

/// How many pages a guest writes per second, that writes as fast as it can.
fn speed(live: &mut Live) -> u64 {
    live.gap();
    thread::sleep(Duration::from_millis(300));
    let gap = live.gap();
    gap.pages * 1_000_000 / gap.us.max(1)
}

#[test]
fn a_machine_that_has_not_moved_in_time_stays_or_is_forced() {
    let slow = |on_timeout: &str| {
        json!({"bandwidth_limit": SLOW, "compression": "None", "timeout_s": 1,
            "max_downtime_ms": 1, "on_timeout": on_timeout})
    };
    let mut pair = Pair::new(RESTLESS);
    pair.assert_runs_on(Side::Source);
    pair.send(&slow("Cancel"));
    let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
    assert!((1000..30_000).contains(&status.elapsed_ms), "{status:?}");
    let error = status.error.unwrap();
    assert!(
        error.contains("it did not come to an end in time"),
        "{error}"
    );
    pair.assert_runs_on(Side::Source);
    pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
    // The same target, once more.
    pair.send(&slow("Force"));
    let status = pair.wait(Side::Source, &[MigrationPhase::Completed], LIMIT);
    assert!((1000..30_000).contains(&status.elapsed_ms), "{status:?}");
    pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_machine_that_is_forced_in_its_first_pass_leaves_behind_what_was_never_touched() {
    for on_timeout in ["Force", "PostCopy"] {
        let mut pair = Pair::new(WRITES);
        pair.assert_runs_on(Side::Source);
        let status = pair.moved(
            &json!({"bandwidth_limit": SLOW, "compression": "None", "timeout_s": 1,
                "on_timeout": on_timeout}),
            LIMIT,
        );
        let pass = &status.passes[0];
        // What the limit allows in a second, and not all of a window of 16 MiB.
        assert!(pass.sent_pages < 14 * 256, "{status:?}");
        // What the pass did not come to is not what was written meanwhile.
        assert!(pass.dirtied_pages < 14 * 256, "{status:?}");
        assert!(status.pages >= 32 * 256, "{status:?}");
        // The guest has 128 MiB and uses 32.
        let looked_at = status.pages + status.zero_pages;
        assert!(looked_at < 64 * 256, "{on_timeout}: {status:?}");
        assert_settled(&mut pair);
    }
}

#[test]
fn a_pass_that_takes_too_long_ends_at_the_timeout() {
    let mut pair = Pair::new("bare.touch=32");
    pair.send(&json!({"bandwidth_limit": 2_000_000, "compression": "None", "timeout_s": 1}));
    let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
    // All of it would have taken 17 s.
    assert!((1000..10_000).contains(&status.elapsed_ms), "{status:?}");
    pair.assert_runs_on(Side::Source);
}

/// The events of one side from now on until it ends or is at rest: names and data.
fn watch(api: &ApiVm) -> thread::JoinHandle<Vec<(String, Value)>> {
    let client = Client::new(&api.socket).unwrap();
    let (told, ready) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        let (mut events, mut name) = (Vec::new(), String::new());
        // The end of the process is the end of its events.
        let _ = client.stream("/events", |line| {
            let _ = told.send(());
            if let Some(text) = line.strip_prefix("event: ") {
                text.clone_into(&mut name);
            }
            if let Some(text) = line.strip_prefix("data: ") {
                let data: Value = serde_json::from_str(text).unwrap();
                let over = data["phase"] == "Completed";
                events.push((name.clone(), data));
                if over {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        });
        events
    });
    ready.recv_timeout(SOON).unwrap();
    thread
}

fn phases(events: &[(String, Value)]) -> Vec<&str> {
    let moves = events.iter().filter(|(name, _)| name == "migration");
    moves
        .map(|(_, data)| data["phase"].as_str().unwrap())
        .collect()
}

#[test]
fn phases_and_passes_are_events() {
    let mut pair = Pair::new(WRITES);
    let [source, target] = [Side::Source, Side::Target].map(|side| watch(pair.api(side)));
    let status = pair.moved(&json!({}), LIMIT);
    let (source, target) = (source.join().unwrap(), target.join().unwrap());
    assert_eq!(
        phases(&source),
        [
            "Connecting",
            "Negotiating",
            "PreCopy",
            "SwitchOver",
            "Completed"
        ]
    );
    assert_eq!(
        phases(&target),
        ["Negotiating", "PreCopy", "SwitchOver", "Completed"]
    );
    let passes = source.iter().filter(|(name, _)| name == "migration_passed");
    let numbers: Vec<_> = passes
        .map(|(_, data)| data["pass"].as_u64().unwrap())
        .collect();
    let expected: Vec<_> = status
        .passes
        .iter()
        .map(|pass| u64::from(pass.pass))
        .collect();
    assert_eq!(numbers, expected);
    assert!(!numbers.is_empty());
    let told = status.downtime.unwrap().total_us;
    assert_eq!(source.last().unwrap().1["downtime_us"], told);
}

#[test]
fn the_numbers_of_a_move_fit_together() {
    let mut pair = Pair::new(WRITES);
    let options = json!({"compression": "None", "connections": 2});
    let status = pair.moved(&options, LIMIT);
    assert_eq!(status.memory_bytes, 128 << 20);
    assert!(status.pages >= 32 * 256, "{status:?}");
    let all = status.pages + status.zero_pages;
    assert!(status.bytes >= status.pages * 4096 && status.bytes < all * 4200 + (1 << 20));
    assert_eq!((status.remaining_pages, status.throttle_percent), (0, 0));
    let sum: u64 = status.passes.iter().map(|pass| pass.sent_pages).sum();
    assert!(sum <= status.pages && sum > 32 * 256, "{status:?}");
    let target = pair.progress(Side::Target);
    assert_eq!(target.pages, status.pages);
    assert!(status.zero_pages > 0, "{status:?}");
    assert_eq!(target.zero_pages, status.zero_pages);
}

fn migrate(pair: &Pair, words: &[&str], json: bool) -> Command {
    let mut command = brume_tests::vm::brume();
    command
        .arg("ctl")
        .arg("--api-sock")
        .arg(&pair.api(Side::Source).socket);
    if json {
        command.arg("--json");
    }
    command.args(["migrate"]).args(words);
    command
}

#[test]
fn the_commands_move_a_machine_and_say_how_it_went() {
    for json in [false, true] {
        let mut pair = Pair::start(&Setup {
            args: WRITES,
            command: Some(&[]),
            ..Setup::default()
        });
        pair.assert_runs_on(Side::Source);
        let report = pair.api(Side::Source).folder().join("report.html");
        let to = pair.destination();
        let words = ["--to", &to, "--report", report.to_str().unwrap()];
        let end = outcome(migrate(&pair, &words, json), SOON);
        assert_eq!(end.status, 0, "{end:?}");
        assert!(end.stderr.starts_with("pass 1: "), "{end:?}");
        if json {
            let status: MigrationStatus = serde_json::from_str(&end.stdout).unwrap();
            assert_eq!(status.phase, MigrationPhase::Completed);
            assert!(status.downtime.is_some(), "{end:?}");
        } else {
            for text in ["completed", &to, "on the wire"] {
                assert!(end.stdout.contains(text), "{text}: {end:?}");
            }
        }
        let page = fs::read_to_string(report).unwrap();
        assert!(page.contains("<svg") && page.contains(&to), "{page}");
        pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
        assert_settled(&mut pair);
        // The terminal is its console, and it ends as `brume run` does.
        let target = pair.live(Side::Target);
        target.api.vm.send(b"p");
        assert_eq!(pair.end_of(Side::Target), 0);
    }
}

#[test]
fn the_command_says_why_a_machine_has_not_moved() {
    let mut pair = Pair::start(&Setup {
        args: "bare.touch=32",
        command: Some(&[]),
        ..Setup::default()
    });
    pair.assert_runs_on(Side::Source);
    let nowhere = pair.api(Side::Source).folder().join("nobody.sock");
    let to = format!("unix:{}", nowhere.display());
    let end = outcome(migrate(&pair, &["--to", &to], false), SOON);
    assert_eq!((end.status, &*end.stdout), (1, ""), "{end:?}");
    assert!(
        end.stderr
            .contains(&format!("nobody can be reached at {to}")),
        "{end:?}"
    );
    let end = outcome(migrate(&pair, &["--to", "nonsense"], false), SOON);
    assert_ne!(end.status, 0);
    assert!(end.stderr.contains("nonsense"), "{end:?}");
    pair.assert_runs_on(Side::Source);
    // One that is called off by another.
    let to = pair.destination();
    let slow = ["--to", &to, "--bandwidth", "1M"];
    let following = brume_tests::vm::Vm::spawn(migrate(&pair, &slow, false));
    eventually("it moves", || {
        pair.progress(Side::Source).phase == MigrationPhase::PreCopy
    });
    let end = outcome(migrate(&pair, &["--cancel"], false), SOON);
    end.assert_clean();
    let end = following.wait(SOON);
    assert_eq!((end.status, &*end.stdout), (1, ""), "{end:?}");
    pair.assert_runs_on(Side::Source);
    eventually("the target waits again", || {
        pair.progress(Side::Target).phase == MigrationPhase::Listening
    });
    let end = outcome(migrate(&pair, &["--status"], false), SOON);
    assert!(end.assert_clean().stdout.contains("called off"), "{end:?}");
}

#[test]
fn a_target_that_was_given_one_connection_ends_with_it() {
    let mut pair = Pair::start(&Setup {
        args: "bare.touch=32",
        link: Link::Passed,
        command: Some(&[]),
        ..Setup::default()
    });
    pair.assert_runs_on(Side::Source);
    pair.send(&json!({"bandwidth_limit": 1_000_000, "compression": "None"}));
    pair.wait(Side::Target, &[MigrationPhase::PreCopy], LIMIT);
    assert_eq!(pair.cancel(Side::Source).status, 204);
    assert_eq!(pair.end_of(Side::Target), 1);
    let told = pair.api(Side::Target).vm.stderr();
    assert!(
        told.contains("no machine can be received") && told.contains("one connection"),
        "{told}"
    );
    pair.wait(Side::Source, &[MigrationPhase::Cancelled], LIMIT);
    pair.assert_runs_on(Side::Source);
}
