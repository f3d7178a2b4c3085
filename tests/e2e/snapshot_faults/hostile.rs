// SPDX-License-Identifier: Apache-2.0
//! State files whose checksum holds and whose contents were made up: each is refused with a reason,
//! or makes a machine that runs or ends. Nothing panics and nothing hangs.

use std::time::{Duration, Instant};

use brume_tests::forge::{Forged, Random};
use brume_tests::live::Live;
use brume_tests::vm::SOON;
use serde_json::{Map, Number, Value, json};

use super::{Load, Saved, load};

/// How many are made up.
const MUTANTS: usize = 300;
/// How long a machine may do what its state has it do before it is looked at.
const A_MOMENT: Duration = Duration::from_millis(10);

/// A machine with one of each device that needs nothing of the host; one at rest, one at work.
fn saved(args: &str) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let drive = json!({"drive_id": "d", "is_root_device": false, "path_on_host": disk});
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1});
    let parts = [
        ("/drives/d", drive),
        ("/balloon", balloon),
        ("/entropy", json!({})),
        // Its socket is made in the folder of each process.
        ("/vsock", json!({"guest_cid": 3, "uds_path": "v.sock"})),
    ];
    let files = brume_tests::live::Snapshot::named(folder.path(), "good");
    let api = super::fresh();
    api.start_bare(args, &parts);
    api.vm.wait_for("bare: ", SOON);
    std::thread::sleep(Duration::from_millis(50));
    let live = Live { api };
    live.pause();
    live.save("Full", &files);
    Saved { folder, files }
}

/// Loads it; whether there was a machine. It is ended then, if it has not ended by itself.
#[track_caller]
fn harmless(saved: &Saved, forged: &Forged, what: &str) -> bool {
    let live = match load(&saved.with_state(&forged.bytes())) {
        Load::Refused(fault) => {
            let plain = fault.chars().all(|c| !c.is_control()) && fault.len() < 2000;
            assert!(plain, "{what}: {fault}");
            println!("{what}: {fault}");
            return false;
        }
        Load::Works(live) => live,
    };
    std::thread::sleep(A_MOMENT);
    let vm = live.api.vm;
    vm.signal(libc::SIGTERM);
    let begun = Instant::now();
    let outcome = vm.wait(SOON);
    let took = begun.elapsed();
    println!(
        "{what}: a machine, which ended with status {}",
        outcome.status
    );
    assert!(took < super::REFUSAL, "{what}: it ended after {took:?}");
    let signalled = outcome.status == 128 + libc::SIGTERM || outcome.status < 128;
    assert!(
        signalled && !outcome.stderr.contains("panicked"),
        "{what}: {outcome:#?}"
    );
    true
}

/// The places of all values in `value`, as JSON pointers.
fn places(value: &Value, at: &str, into: &mut Vec<String>) {
    into.push(at.to_owned());
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                places(item, &format!("{at}/{index}"), into);
            }
        }
        Value::Object(members) => {
            for (key, member) in members {
                places(member, &format!("{at}/{key}"), into);
            }
        }
        _ => {}
    }
}

/// Another number.
fn number(random: &mut Random, old: &Number) -> Value {
    let near = old.as_u64().unwrap_or(0);
    let bit = 1_u64 << random.below(64);
    let edges = [
        0,
        1,
        255,
        256,
        4095,
        0xffff,
        1 << 31,
        u64::from(u32::MAX),
        1 << 40,
        u64::MAX,
    ];
    match random.below(7) {
        0 => json!(near.wrapping_add(1)),
        1 => json!(near.wrapping_sub(1)),
        2 => json!(near ^ bit),
        3 => json!(random.next()),
        4 => json!(-1_i64),
        5 => json!(1e300),
        _ => json!(edges[random.below(edges.len())]),
    }
}

/// Other text: of the same alphabet and length, if it is bytes in hexadecimal digits.
fn text(random: &mut Random, old: &str) -> Value {
    let is_bytes = old.len() >= 8 && old.bytes().all(|byte| byte.is_ascii_hexdigit());
    let other = match random.below(if is_bytes { 10 } else { 6 }) {
        0 => String::new(),
        1 => "x".repeat(100_000),
        2 => format!("{old}0"),
        3 => "no\u{0}\n\u{1b}[2J\u{202e}é".to_owned(),
        4 => "none".to_owned(),
        5 => old.chars().rev().collect(),
        6 => "f".repeat(old.len()),
        7 => "0".repeat(old.len()),
        8 => {
            let digits = old.bytes().map(|_| format!("{:x}", random.below(16)));
            digits.collect()
        }
        _ => {
            let mut digits = old.as_bytes().to_vec();
            let at = random.below(digits.len());
            digits[at] = if digits[at] == b'f' { b'0' } else { b'f' };
            String::from_utf8(digits).unwrap()
        }
    };
    Value::from(other)
}

/// Another value, and what was done to the old one.
fn other(random: &mut Random, old: &Value) -> Value {
    if random.below(8) == 0 {
        let kinds = [
            json!(null),
            json!([]),
            json!({}),
            json!(7),
            json!("7"),
            json!(true),
        ];
        return kinds[random.below(kinds.len())].clone();
    }
    match old {
        Value::Null => json!({"size": 0, "ops": null}),
        Value::Bool(old) => json!(!old),
        Value::Number(old) => number(random, old),
        Value::String(old) => text(random, old),
        Value::Array(items) => {
            let mut items = items.clone();
            match random.below(4) {
                0 => drop(items.pop()),
                1 => items.reverse(),
                2 => items.extend(items.clone()),
                _ => {
                    let one = items.first().cloned().unwrap_or(json!(0));
                    items.resize(20_000, one);
                }
            }
            Value::from(items)
        }
        Value::Object(members) => {
            let mut members: Map<_, _> = members.clone();
            let key = members
                .keys()
                .nth(random.below(members.len().max(1)))
                .cloned();
            match (random.below(2), key) {
                (0, Some(key)) => drop(members.remove(&key)),
                _ => drop(members.insert("novelty".into(), json!(1))),
            }
            Value::from(members)
        }
    }
}

/// Changes one value somewhere; what was done.
fn mutate(random: &mut Random, forged: &mut Forged) -> String {
    let index = random.below(forged.sections.len());
    let section = &mut forged.sections[index];
    let mut value = section.value();
    let mut found = Vec::new();
    places(&value, "", &mut found);
    let place = found[random.below(found.len())].clone();
    let slot = value.pointer_mut(&place).unwrap();
    let new = other(random, slot);
    let mut shown = format!("{slot} -> {new}");
    shown.truncate(shown.floor_char_boundary(120));
    *slot = new;
    section.payload = value.to_string().into_bytes();
    format!("{} {}{place}: {shown}", section.kind, section.id)
}

#[test]
fn made_up_contents_do_no_harm() {
    let mut random = Random::seeded("mutants", 3);
    let bases = [
        saved("bare.do=live"),
        saved("bare.do=blk-check bare.ops=1000000000"),
    ];
    let good = bases.each_ref().map(|saved| Forged::of(&saved.state()));
    let mut machines = 0;
    for mutant in 0..MUTANTS {
        let base = mutant % bases.len();
        let mut forged = good[base].clone();
        let changes = 1 + random.below(3);
        let what: Vec<_> = (0..changes)
            .map(|_| mutate(&mut random, &mut forged))
            .collect();
        let what = format!("mutant {mutant}: {}", what.join("; "));
        machines += usize::from(harmless(&bases[base], &forged, &what));
    }
    println!("{machines} of {MUTANTS} were machines");
    assert!(machines > 0 && machines < MUTANTS);
}

#[test]
fn contents_made_up_on_purpose_are_refused() {
    let saved = saved("bare.do=blk-check bare.ops=1000000000");
    let good = Forged::of(&saved.state());
    let config = |path: &str, value: Value| {
        good.clone().with("machine", |section| {
            *section.pointer_mut(&format!("/config{path}")).unwrap() = value;
        })
    };
    let queue = |field: &str, value: u64| {
        good.clone().with("virtio", |section| {
            section["transport"]["queues"][0][field] = json!(value);
        })
    };
    let size = |mib: u64| {
        let forged = config("/machine-config/mem_size_mib", json!(mib));
        forged.with("memory", |section| section["size"] = json!(mib << 20))
    };
    let mut cases = vec![
        ("no vCPU", config("/machine-config/vcpu_count", json!(0))),
        (
            "255 vCPUs",
            config("/machine-config/vcpu_count", json!(255)),
        ),
        ("2 vCPUs", config("/machine-config/vcpu_count", json!(2))),
        (
            "memory of another size",
            config("/machine-config/mem_size_mib", json!(256)),
        ),
        ("twice the memory", size(256)),
        ("half the memory", size(64)),
        ("4 TiB of memory", size(4 << 20)),
        ("no memory", size(0)),
        (
            "a disk that is not there",
            config("/drives/0/path_on_host", json!("/none/disk")),
        ),
        (
            "a folder for a disk",
            config("/drives/0/path_on_host", json!("/proc")),
        ),
        (
            "a disk without a file",
            config("/drives/0/path_on_host", Value::Null),
        ),
        ("no disk", config("/drives", json!([]))),
        (
            "two disks of one id",
            config("/drives", {
                let drive = good.sections[0].value()["config"]["drives"][0].clone();
                json!([drive, drive])
            }),
        ),
        (
            "a device without its section",
            config("/entropy", Value::Null),
        ),
        (
            "a socket that cannot be made",
            config("/vsock/uds_path", json!("/none/v.sock")),
        ),
        (
            "a mark that is too long",
            good.clone().with("memory", |section| {
                section["mark"] = json!("0".repeat(1 << 20));
            }),
        ),
        (
            "another device",
            good.clone()
                .with("virtio", |section| section["name"] = json!("e")),
        ),
        (
            "a disk of another type",
            good.clone().with("virtio", |section| {
                section["transport"]["device_type"] = json!(1);
            }),
        ),
        (
            "more queues",
            good.clone().with("virtio", |section| {
                let queues = &mut section["transport"]["queues"];
                let one = queues[0].clone();
                queues.as_array_mut().unwrap().push(one);
            }),
        ),
    ];
    for field in ["desc_table", "avail_ring", "used_ring"] {
        for value in [128 << 20, u64::MAX - 15, 0xd000_0000, 1 << 63] {
            cases.push(("a ring outside the memory", queue(field, value)));
        }
        cases.push(("a ring that is not aligned", queue(field, 0x1001)));
    }
    for value in [0, 3, 512, 32768, 65535] {
        cases.push((
            "a queue of a size that it cannot have",
            queue("size", value),
        ));
    }
    let mut deep = good.clone();
    deep.sections[0].payload = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    cases.push(("deep nesting", deep));
    let mut wide = good.clone();
    wide.sections[0].payload = b"["
        .iter()
        .copied()
        .chain([b'1', b','].repeat(5_000_000))
        .collect();
    cases.push(("10 MB of a list", wide));
    for (what, forged) in &cases {
        let machine = harmless(&saved, forged, what);
        assert!(!machine, "{what}: a machine came of it");
    }
}
