// SPDX-License-Identifier: Apache-2.0
//! Files that are damaged, cut, mixed up or of another time: refused by name.

use std::fs::{self, File};

use brume_tests::forge::{Forged, Random, Section, borders};
use brume_tests::live::{Live, Snapshot};
use brume_tests::memory_files::merge;
use serde_json::{Value, json};

use super::{Saved, assert_refused, assert_works, refusal};

/// How many bits are flipped, each in a file of its own.
const FLIPS: usize = 30;

fn devices() -> Vec<(&'static str, Value)> {
    vec![
        ("/entropy", json!({})),
        ("/balloon", json!({"amount_mib": 0, "deflate_on_oom": true})),
    ]
}

#[test]
fn a_state_file_cut_anywhere_or_with_a_bit_flipped_is_refused() {
    let saved = Saved::new("", &devices());
    let good = saved.state();
    let borders = borders(&good);
    assert!(borders.len() >= 7, "{} sections", borders.len());
    let mut cuts = vec![0, 1, 63, good.len() - 1];
    cuts.extend(borders.iter().flat_map(|&border| [border, border + 32]));
    for cut in cuts {
        let words = if cut < 64 {
            "too short"
        } else {
            "it is cut off"
        };
        assert_refused(
            &format!("cut at {cut} of {}", good.len()),
            &saved.with_state(&good[..cut]),
            words,
        );
    }
    let longer = [&good[..], b"\0"].concat();
    assert_refused(
        "a byte more",
        &saved.with_state(&longer),
        "1 more bytes follow",
    );
    let mut random = Random::seeded("flips", 2);
    for _ in 0..FLIPS {
        let bit = random.below(good.len() * 8);
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let fault = refusal(&saved.with_state(&bytes));
        println!("bit {bit}: expected a refusal, got `{fault}`");
    }
    assert_works(&saved.with_state(&good));
}

/// The number that `0x` and digits stand for.
fn number(text: &Value) -> u64 {
    let digits = text.as_str().unwrap().strip_prefix("0x").unwrap();
    u64::from_str_radix(digits, 16).unwrap()
}

#[test]
fn a_file_of_the_version_before_is_loaded() {
    let saved = Saved::new("", &devices());
    let mut old = Forged::of(&saved.state()).with("vcpu", |vcpu| {
        let order = [
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15", "rip", "rflags",
        ];
        let registers = vcpu["registers"].take();
        let bytes = order.map(|name| number(&registers[name]).to_le_bytes());
        let bytes = bytes.as_flattened().iter();
        let digits: String = bytes.map(|byte| format!("{byte:02x}")).collect();
        vcpu["regs"] = json!(digits);
        let msrs = vcpu["msrs"].take();
        vcpu["msrs"] = msrs
            .as_object()
            .unwrap()
            .iter()
            .map(|(index, value)| (number(&json!(index)).to_string(), json!(number(value))))
            .collect();
        vcpu.as_object_mut().unwrap().remove("registers");
    });
    let vcpu = old
        .sections
        .iter_mut()
        .find(|section| section.kind == "vcpu");
    let vcpu = vcpu.unwrap();
    assert_eq!(vcpu.version, 2, "there is a newer version to test");
    vcpu.version = 1;
    assert_works(&saved.with_state(&old.bytes()));
}

#[test]
fn sections_are_in_any_order_once_and_known() {
    let saved = Saved::new("", &devices());
    let good = Forged::of(&saved.state());
    assert!(
        good.bytes() == saved.state(),
        "the forger makes other files"
    );
    let check = |what: &str, forged: &Forged, words: &str| {
        assert_refused(what, &saved.with_state(&forged.bytes()), words);
    };
    let mut reversed = good.clone();
    reversed.sections.reverse();
    assert_works(&saved.with_state(&reversed.bytes()));
    for (index, section) in good.sections.iter().enumerate() {
        let name = format!("section \"{}\" {}", section.kind, section.id);
        let mut twice = good.clone();
        twice.sections.push(section.clone());
        check("repeated", &twice, &format!("{name} is there twice"));
        let mut missing = good.clone();
        missing.sections.remove(index);
        let words = match &*section.kind {
            "vcpu" => "it has the state of 0 vCPUs and is of a machine with 1".to_owned(),
            // Of the last one it is the count that tells.
            "virtio" if section.id == 1 => "virtio devices and is of a machine with 2".to_owned(),
            _ => format!("{name} is missing"),
        };
        check("missing", &missing, &words);
        let known = section.version;
        let mut newer = good.clone();
        newer.sections[index].version = 99;
        check(
            "newer",
            &newer,
            &format!("{name} has version 99, and this brume knows up to {known}"),
        );
        let mut older = good.clone();
        older.sections[index].version = 0;
        check(
            "older",
            &older,
            &format!("{name} has version 0, which cannot be read any more"),
        );
    }
    let mut more = good.clone();
    more.sections.push(Section {
        kind: "novelty".into(),
        id: 3,
        version: 1,
        payload: b"{}".to_vec(),
    });
    check("unknown", &more, "unknown section \"novelty\" 3");
    let future = Forged {
        format: 2,
        ..good.clone()
    };
    check(
        "format",
        &future,
        "its format has version 2, and this brume knows up to 1",
    );
    let arm = Forged {
        architecture: 183,
        ..good.clone()
    };
    check(
        "architecture",
        &arm,
        "it is of a machine for aarch64, and this brume is for x86_64",
    );
    let none = Forged {
        sections: Vec::new(),
        ..good
    };
    check("nothing", &none, "section \"machine\" 0 is missing");
}

#[test]
fn a_memory_file_that_is_not_the_one_is_refused() {
    let saved = Saved::new("", &[]);
    let check = |what, path, words: &str| assert_refused(what, &saved.with_memory(path), words);
    let size = saved.files.memory.metadata().unwrap().len();
    for (what, length) in [("short", size - 4096), ("long", size + 4096), ("empty", 0)] {
        let path = saved.path(what);
        fs::copy(&saved.files.memory, &path).unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(length)
            .unwrap();
        let words = format!("the memory file has {length} bytes and the machine {size}");
        check(what, path, &words);
    }
    check("missing", saved.path("none"), "No such file or directory");
    check(
        "a folder",
        saved.folder.path().to_owned(),
        "it is not a regular file",
    );
    check("a device", "/dev/zero".into(), "it is not a regular file");
    let pipe = saved.path("pipe");
    super::run("mkfifo", &[pipe.as_os_str()]);
    check("a pipe", pipe.clone(), "it is not a regular file");
    let zeros = saved.path("zeros");
    File::create(&zeros).unwrap().set_len(size).unwrap();
    check(
        "zeros",
        zeros,
        "is not the one that was written with this state file",
    );
    let other = Saved::new("", &[]);
    check(
        "another's",
        other.files.memory.clone(),
        "is not the one that was written with",
    );
    // A state that is no file.
    for (what, state, words) in [
        ("a pipe", pipe, "it is not a regular file"),
        (
            "a folder",
            saved.folder.path().to_owned(),
            "it is not a regular file",
        ),
        ("missing", saved.path("none"), "No such file or directory"),
        (
            "the memory",
            saved.files.memory.clone(),
            "a state file has at most",
        ),
    ] {
        let files = Snapshot {
            state,
            ..saved.files.clone()
        };
        assert_refused(what, &files, words);
    }
}

#[test]
fn a_diff_that_is_not_merged_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let [base, diff] = ["base", "diff"].map(|name| Snapshot::named(folder.path(), name));
    let tracking = json!({"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": true});
    let mut live = Live::start("", &[("/machine-config", tracking)]);
    live.pause();
    live.save("Full", &base);
    live.resume();
    live.write_round();
    live.pause();
    live.save("Diff", &diff);
    drop(live);
    assert_refused("the diff alone", &diff, "is a diff without its base");
    assert_works(&base);
    let merged = Snapshot {
        memory: base.memory.clone(),
        ..diff.clone()
    };
    let wanted = "a diff was not merged into it";
    assert_refused("the base with the diff's state", &merged, wanted);
    merge(&base.memory, &diff.memory, &base.memory);
    assert_works(&merged);
    assert_refused("the base's state after the merge", &base, wanted);
}
