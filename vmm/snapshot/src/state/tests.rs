// SPDX-License-Identifier: Apache-2.0
//! What goes in comes out, and of what nobody wrote nothing does.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::process::Command;

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::json;

use super::*;
use crate::Inspection;

const GOLDEN: &[u8] = include_bytes!("../../testdata/state-v1-x86_64.bin");

/// A kind of section that holds anything.
macro_rules! any_section {
    ($name:ident, $kind:literal) => {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        #[serde(transparent)]
        struct $name(Value);

        impl Saved for $name {
            const KIND: &'static str = $kind;
            const VERSION: u32 = 1;
        }
    };
}
any_section!(Machine, "machine");
any_section!(Disk, "virtio-block");
any_section!(Longest, "a-kind-of-16-let");

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vcpu {
    rip: u64,
    halted: bool,
}

impl Saved for Vcpu {
    const KIND: &'static str = "vcpu";
    const VERSION: u32 = 3;

    fn upgrade(version: u32, value: Value) -> Result<Value, UpgradeError> {
        match (version, value) {
            // Version 2 had only a number.
            (2, Value::Number(rip)) => Ok(json!({"rip": rip, "halted": false})),
            (2, _) => Err(UpgradeError::Malformed("not a number".into())),
            _ => Err(UpgradeError::TooOld),
        }
    }
}

fn vcpu(rip: u64) -> Vcpu {
    Vcpu { rip, halted: true }
}

/// The file that is kept in testdata.
fn golden() -> Vec<u8> {
    let mut writer = StateWriter::new();
    writer
        .push(0, &Machine(json!({"memory_mib": 128, "text": "é\n\""})))
        .unwrap();
    writer.push(1, &vcpu(u64::MAX)).unwrap();
    writer.push(0, &vcpu(0x10_0000)).unwrap();
    writer.push(u32::MAX, &Longest(json!([null]))).unwrap();
    writer.finish()
}

/// A file with these sections, checksum and all, whatever is in them.
fn raw(sections: &[(&[u8], u32, u32, &[u8])]) -> Vec<u8> {
    let mut file = StateWriter::new().finish();
    for (kind, id, version, payload) in sections {
        let mut padded = [0; 16];
        padded[..kind.len()].copy_from_slice(kind);
        file.extend(padded);
        file.extend(id.to_le_bytes());
        file.extend(version.to_le_bytes());
        file.extend((payload.len() as u64).to_le_bytes());
        file.extend(*payload);
    }
    file[16..20].copy_from_slice(&u32::try_from(sections.len()).unwrap().to_le_bytes());
    let length = file.len() as u64;
    file[24..32].copy_from_slice(&length.to_le_bytes());
    seal(&mut file);
    file
}

/// Makes the checksum right for what is there, as an attacker would.
fn seal(file: &mut [u8]) {
    if let Ok((header, rest)) = Header::read_from_prefix(file) {
        let checksum = checksum(&header, rest);
        file[32..64].copy_from_slice(&checksum);
    }
}

/// Does everything that can be done with a file.
fn use_all(bytes: &[u8]) {
    if let Ok(mut file) = StateFile::parse(bytes) {
        for section in file.sections() {
            let _ = (section.content(), section.length());
        }
        let _ = file.take_optional::<Machine>(0);
        let _ = file.take::<Vcpu>(1);
        let _ = file.take_all::<Disk>();
        let _ = file.take_all::<Vcpu>();
        let _ = file.finish();
    }
    if let Ok(inspection) = Inspection::of(bytes) {
        let _ = (inspection.to_json(), inspection.to_text());
    }
}

fn error(bytes: &[u8]) -> String {
    StateFile::parse(bytes).unwrap_err().to_string()
}

#[test]
fn the_golden_file_is_made_again_and_read() {
    assert_eq!(golden(), GOLDEN, "files that exist would not be read");
    let mut file = StateFile::parse(GOLDEN).unwrap();
    assert_eq!(file.sections().count(), 4);
    assert_eq!(
        file.take_all::<Vcpu>().unwrap(),
        [vcpu(0x10_0000), vcpu(u64::MAX)]
    );
    let machine = file.take::<Machine>(0).unwrap();
    assert_eq!(machine.0["text"], "é\n\"");
    assert_eq!(
        file.take::<Longest>(u32::MAX).unwrap(),
        Longest(json!([null]))
    );
    file.finish().unwrap();
}

#[test]
fn each_section_is_taken_once_and_none_is_left() {
    let mut file = StateFile::parse(&golden()).unwrap();
    assert!(file.take_optional::<Disk>(0).unwrap().is_none());
    assert!(file.take_all::<Disk>().unwrap().is_empty());
    file.take::<Machine>(0).unwrap();
    let again = file.take::<Machine>(0).unwrap_err();
    assert_eq!(again.to_string(), "section \"machine\" 0 is missing");
    let left = file.finish().unwrap_err().to_string();
    assert!(left.starts_with("unknown section \"vcpu\" 1 at byte "));
    assert!(left.contains("newer brume"), "{left}");
}

#[test]
fn ids_have_no_gap() {
    let mut writer = StateWriter::new();
    writer.push(2, &vcpu(2)).unwrap();
    writer.push(0, &vcpu(0)).unwrap();
    let mut file = StateFile::parse(&writer.finish()).unwrap();
    let gap = file.take_all::<Vcpu>().unwrap_err();
    assert_eq!(gap.to_string(), "section \"vcpu\" 1 is missing");
}

#[test]
fn a_writer_refuses_a_name_twice_and_a_file_too_big() {
    let mut writer = StateWriter::new();
    writer.push(0, &vcpu(0)).unwrap();
    let twice = writer.push(0, &vcpu(0));
    assert!(matches!(twice, Err(StateError::Repeated { id: 0, .. })));
    let big = Machine(Value::String("x".repeat(64 << 20)));
    assert!(matches!(
        writer.push(0, &big),
        Err(StateError::TooBig { .. })
    ));
    let mut file = StateFile::parse(&writer.finish()).unwrap();
    file.take::<Vcpu>(0).unwrap();
    file.finish().unwrap();
}

#[test]
fn versions_are_brought_up_to_date_or_refused_by_name() {
    let take = |version: u32, payload: &[u8]| {
        let bytes = raw(&[(b"vcpu", 0, version, payload)]);
        StateFile::parse(&bytes).unwrap().take::<Vcpu>(0)
    };
    let upgraded = Vcpu {
        rip: 7,
        halted: false,
    };
    assert_eq!(take(2, b"7").unwrap(), upgraded);
    assert_eq!(
        take(4, b"{}").unwrap_err().to_string(),
        "section \"vcpu\" 0 has version 4, and this brume knows up to 3: it was made by a newer \
         brume"
    );
    assert_eq!(
        take(1, b"{}").unwrap_err().to_string(),
        "section \"vcpu\" 0 has version 1, which cannot be read any more"
    );
    assert!(matches!(
        take(2, b"true"),
        Err(StateError::Upgrade {
            source: UpgradeError::Malformed(_),
            ..
        })
    ));
    assert!(take(0, b"7").is_err());
}

#[test]
fn what_is_in_a_section_is_read_strictly() {
    for payload in [
        &b""[..],
        b"{}",
        b"{\"rip\": 1, \"halted\": true} x",
        b"{\"rip\": 1, \"rip\": 1, \"halted\": true}",
        b"{\"rip\": -1, \"halted\": true}",
        b"{\"rip\": 1e999, \"halted\": true}",
        b"{\"rip\": 1, \"halted\": true, \"new\": 0}",
        b"{\"rip\": 1, \"halted\": true, \"\xff\": 0}",
    ] {
        let bytes = raw(&[(b"vcpu", 0, 3, payload)]);
        let taken = StateFile::parse(&bytes).unwrap().take::<Vcpu>(0);
        let error = taken.unwrap_err().to_string();
        let expected = "section \"vcpu\" 0, whose content starts at byte 96, is malformed";
        assert_eq!(error, expected);
        use_all(&bytes);
    }
    let deep = "[".repeat(1 << 20);
    let bytes = raw(&[(b"machine", 0, 1, deep.as_bytes())]);
    let deep = StateFile::parse(&bytes).unwrap().take::<Machine>(0);
    assert!(matches!(deep, Err(StateError::Content { .. })));
    use_all(&bytes);
}

#[test]
fn each_cut_is_refused_by_its_length() {
    let whole = golden();
    for length in 0..64 {
        let error = error(&whole[..length]);
        assert!(error.starts_with("IO Error: File too short to contain CRC"));
    }
    for length in 64..whole.len() {
        let missing = whole.len() - length;
        assert_eq!(
            error(&whole[..length]),
            format!(
                "it is cut off: {missing} bytes are missing of {}",
                whole.len()
            )
        );
        // Nor does a file pass whose length and checksum were made right for the cut.
        let mut cut = whole[..length].to_vec();
        cut[24..32].copy_from_slice(&(length as u64).to_le_bytes());
        seal(&mut cut);
        assert!(matches!(
            StateFile::parse(&cut),
            Err(StateError::Malformed { .. })
        ));
    }
    let mut more = whole;
    more.push(0);
    assert!(matches!(
        StateFile::parse(&more),
        Err(StateError::Excess { .. })
    ));
}

#[test]
fn what_has_no_checksum_is_never_taken_for_a_file() {
    let mut writer = StateWriter::new();
    writer.push(0, &vcpu(5)).unwrap();
    let unsealed = writer.finish_unsealed();
    let mut read = StateFile::parse_unsealed(&unsealed).unwrap();
    assert_eq!(read.take::<Vcpu>(0).unwrap(), vcpu(5));
    read.finish().unwrap();
    let refused = StateFile::parse(&unsealed).unwrap_err();
    assert!(matches!(refused, StateError::Checksum { .. }), "{refused}");
    let refused = StateFile::parse_unsealed(&golden()).unwrap_err();
    assert!(matches!(refused, StateError::Checksum { .. }), "{refused}");
    let cut = &unsealed[..unsealed.len() - 1];
    let refused = StateFile::parse_unsealed(cut).unwrap_err();
    assert!(matches!(refused, StateError::Cut { .. }), "{refused}");
}

#[test]
fn each_flipped_bit_is_noticed() {
    let mut bytes = golden();
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(StateFile::parse(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    StateFile::parse(&bytes).unwrap();
}

#[test]
fn a_thousand_flips_in_a_large_file_are_noticed() {
    let mut writer = StateWriter::new();
    for id in 0..16 {
        let registers = (0..200).map(|n| json!({"index": n, "data": n * id}));
        let section = Machine(registers.collect());
        writer.push(id, &section).unwrap();
    }
    let mut bytes = writer.finish();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..1000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let bit = usize::try_from(random).unwrap() % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(StateFile::parse(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    StateFile::parse(&bytes).unwrap();
}

#[test]
fn files_of_others_are_refused_by_name() {
    let patched = |offset: usize, with: &[u8]| {
        let mut bytes = golden();
        bytes[offset..offset + with.len()].copy_from_slice(with);
        seal(&mut bytes);
        bytes
    };
    assert!(error(&[0; 64]).starts_with("it is not a snapshot of brume"));
    let firecracker = patched(0, &[8, 0, 0, 0, 0, 0, 0x64, 0x86, 0x84, 0x19, 0x10, 0x07]);
    assert!(error(&firecracker).contains("snapshot of Firecracker's"));
    let future = error(&patched(8, &[2]));
    let expected = "its format has version 2, and this brume knows up to 1: it was made by a newer \
                    brume";
    assert_eq!(future, expected);
    assert!(error(&patched(8, &[0])).ends_with("it is damaged"));
    let arm = "it is of a machine for aarch64, and this brume is for x86_64";
    assert_eq!(error(&patched(12, &[183])), arm);
    assert!(error(&patched(12, &[99])).contains("for ELF machine 99"));
    assert!(error(&patched(20, &[1])).contains("malformed at byte 20"));
    let mut damaged = golden();
    damaged[100] ^= 1;
    assert!(error(&damaged).starts_with("it is damaged: its SHA-256 is "));
}

#[test]
fn sections_are_in_any_order_but_not_twice() {
    let (a, b) = (
        (&b"vcpu"[..], 0, 3, &b"1"[..]),
        (&b"x"[..], 0, 1, &b"2"[..]),
    );
    for order in [[a, b], [b, a]] {
        StateFile::parse(&raw(&order)).unwrap();
    }
    let repeated = "section \"vcpu\" 0 is there twice, the second time at byte 97";
    assert_eq!(error(&raw(&[a, a])), repeated);
}

#[test]
fn hostile_sections_with_a_right_checksum_are_refused() {
    for kind in [
        &b""[..],
        b"a b",
        b"\x1b[2J",
        b"a\0b",
        b"\xc3\xa9",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let error = error(&raw(&[(kind, 0, 1, b"1")]));
        let expected = "it is malformed at byte 64: a section has no proper name";
        assert_eq!(error, expected, "{kind:?}");
    }
    for (offset, count) in [(16, u32::MAX), (16, 0), (16, 2)] {
        let mut bytes = raw(&[(b"vcpu", 0, 3, b"1")]);
        bytes[offset..offset + 4].copy_from_slice(&count.to_le_bytes());
        seal(&mut bytes);
        assert!(error(&bytes).contains("malformed"), "{count}");
    }
    for length in [0, 2, u64::MAX, u64::MAX - 95, 1 << 63] {
        let mut bytes = raw(&[(b"vcpu", 0, 3, b"1")]);
        bytes[88..96].copy_from_slice(&length.to_le_bytes());
        seal(&mut bytes);
        assert!(error(&bytes).contains("malformed"), "{length}");
    }
}

#[test]
fn only_a_regular_file_of_a_sane_size_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("state"), golden()).unwrap();
    StateFile::read(&path("state")).unwrap();
    assert!(matches!(
        StateFile::read(&path("none")),
        Err(StateError::Read(_))
    ));
    let pipe = path("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    for other in [folder.path(), &pipe, Path::new("/dev/zero")] {
        assert!(matches!(StateFile::read(other), Err(StateError::NotAFile)));
    }
    let _socket = UnixListener::bind(path("socket")).unwrap();
    assert!(StateFile::read(&path("socket")).is_err());
    let huge = File::create(path("huge")).unwrap();
    huge.set_len(u64::from(u32::MAX) << 8).unwrap();
    assert!(matches!(
        StateFile::read(&path("huge")),
        Err(StateError::TooBig { .. })
    ));
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_set_of_sections_comes_back(
        machines in prop::collection::btree_map(any::<u32>(), any_value(), 0..6),
        disks in prop::collection::vec(any_value(), 0..6),
    ) {
        let mut writer = StateWriter::new();
        // In the wrong order.
        for (id, disk) in (0..).zip(&disks).collect::<Vec<_>>().into_iter().rev() {
            writer.push(id, &Disk(disk.clone())).unwrap();
        }
        for (&id, machine) in &machines {
            writer.push(id, &Machine(machine.clone())).unwrap();
        }
        let bytes = writer.finish();
        let mut file = StateFile::parse(&bytes).unwrap();
        let disks_found = file.take_all::<Disk>().unwrap();
        prop_assert_eq!(disks_found, disks.into_iter().map(Disk).collect::<Vec<_>>());
        let mut found = BTreeMap::new();
        for &id in machines.keys() {
            found.insert(id, file.take::<Machine>(id).unwrap().0);
        }
        prop_assert_eq!(found, machines);
        file.finish().unwrap();
        prop_assert!(Inspection::of(&bytes).unwrap().into_damage().is_none());
    }

    #[test]
    fn random_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        use_all(&bytes);
        let mut named = MAGIC.to_vec();
        named.extend([1, 0, 0, 0, 62, 0, 0, 0]);
        named.extend(&bytes);
        prop_assert!(StateFile::parse(&named).is_err());
        use_all(&named);
    }

    #[test]
    fn mutated_files_do_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = golden();
        if let Some(cut) = cut {
            let length = 64 + cut.index(bytes.len() - 64);
            bytes.truncate(length);
            bytes[24..32].copy_from_slice(&(length as u64).to_le_bytes());
        }
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        prop_assert!(bytes == GOLDEN || StateFile::parse(&bytes).is_err());
        use_all(&bytes);
        seal(&mut bytes);
        use_all(&bytes);
    }
}
