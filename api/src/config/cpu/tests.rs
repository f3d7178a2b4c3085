// SPDX-License-Identifier: Apache-2.0
//! Templates as clients write them.

use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::config::VmConfig;
use crate::request::Section;

const TEMPLATE: &str = r#"{
    "kvm_capabilities": ["!70", "71"],
    "cpuid_modifiers": [{
        "leaf": "0x80000001", "subleaf": "0b11", "flags": 1,
        "modifiers": [
            {"register": "eax", "bitmap": "0b1xx0"},
            {"register": "edx", "bitmap": "x1_00"}
        ]
    }],
    "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b01x"}]
}"#;

fn refusal(body: &Value) -> String {
    serde_json::from_value::<CpuConfig>(body.clone())
        .expect_err(&body.to_string())
        .to_string()
}

#[test]
fn a_template_is_read_with_all_its_parts() {
    let config: CpuConfig = serde_json::from_str(TEMPLATE).unwrap();
    assert_eq!(
        config.kvm_capabilities,
        [KvmCapability::Remove(70), KvmCapability::Add(71)]
    );
    let [leaf] = &config.cpuid_modifiers[..] else {
        panic!("{config:?}");
    };
    assert_eq!((leaf.leaf, leaf.subleaf, leaf.flags), (0x8000_0001, 3, 1));
    let registers: Vec<_> = leaf
        .modifiers
        .iter()
        .map(|modifier| {
            let BitMask { mask, value } = modifier.bitmap;
            (modifier.register, mask, value)
        })
        .collect();
    assert_eq!(
        registers,
        [
            (CpuidRegister::Eax, 0b1001, 0b1000),
            (CpuidRegister::Edx, 0b0111, 0b0100),
        ]
    );
    let msr = config.msr_modifiers[0];
    assert_eq!(msr.addr, 0x10a);
    assert_eq!(msr.bitmap.apply(0b1101), 0b1011);
}

#[test]
fn what_is_shown_is_read_again() {
    let config: CpuConfig = serde_json::from_str(TEMPLATE).unwrap();
    let shown = serde_json::to_value(&config).unwrap();
    assert_eq!(shown["kvm_capabilities"], json!(["!70", "71"]));
    assert_eq!(shown["cpuid_modifiers"][0]["leaf"], "0x80000001");
    let bitmap = shown["cpuid_modifiers"][0]["modifiers"][0]["bitmap"].as_str();
    assert_eq!(bitmap, Some(&*format!("0b{}1xx0", "x".repeat(28))));
    assert_eq!(serde_json::from_value::<CpuConfig>(shown).unwrap(), config);
}

#[test]
fn all_parts_are_optional() {
    let config = serde_json::from_str::<CpuConfig>("{}").unwrap();
    assert_eq!(config, CpuConfig::default());
    let empty = r#"{"kvm_capabilities": [], "cpuid_modifiers": [], "msr_modifiers": []}"#;
    assert_eq!(serde_json::from_str::<CpuConfig>(empty).unwrap(), config);
}

#[test]
fn refusals_have_firecrackers_texts() {
    let msr = |addr: &str, bitmap: &str| {
        refusal(&json!({"msr_modifiers": [{"addr": addr, "bitmap": bitmap}]}))
    };
    let register = |register: &str, bitmap: &str| {
        refusal(
            &json!({"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
            "modifiers": [{"register": register, "bitmap": bitmap}]}]}),
        )
    };
    for (text, expected) in [
        (
            refusal(&json!({"kvm_capabilities": ["!a"]})),
            "Failed to parse string [!a] as a kvm capability - can not convert to numeric: invalid \
             digit found in string",
        ),
        (
            refusal(&json!({"kvm_capabilities": ["4294967296"]})),
            "as a kvm capability - can not convert to numeric: number too large",
        ),
        (
            msr("1", "x"),
            "No supported number system prefix found in value [1].",
        ),
        (
            msr("0xg", "x"),
            "Failed to parse string [0xg] as a number for CPU template - ParseIntError",
        ),
        (
            msr("0x1", &"x".repeat(65)),
            "as a bitmap - string is too long",
        ),
        (
            msr("0x1", "0b2"),
            "Failed to parse string [0b2] as a bitmap - unknown character: 50",
        ),
        (
            register("eax", &"1".repeat(33)),
            "as a bitmap - string is too long",
        ),
        (
            register("esi", "1"),
            "Invalid CPUID register. Must be one of [eax, ebx, ecx, edx]",
        ),
        // Those of the other architecture.
        (
            refusal(&json!({"reg_modifiers": []})),
            "unknown field `reg_modifiers`, expected one of `kvm_capabilities`",
        ),
        (
            refusal(&json!({"vcpu_features": []})),
            "unknown field `vcpu_features`",
        ),
        (
            refusal(&json!({"msr_modifiers": null})),
            "invalid type: null",
        ),
    ] {
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn masks_of_any_length_are_read() {
    assert_eq!(mask("").mask, 0);
    assert_eq!(mask(&"1".repeat(64)).value, u64::MAX);
    assert_eq!(mask(&"0".repeat(64)).apply(u64::MAX), 0);
    assert_eq!(mask(&format!("0b1{}", "_x".repeat(63))).mask, 1 << 63);
}

fn mask(text: &str) -> BitMask<u64> {
    serde_json::from_value(json!(text)).unwrap()
}

fn file(cpu: &Value) -> Result<VmConfig, crate::config::ConfigError> {
    let file = json!({
        "boot-source": {"kernel_image_path": "/k"}, "drives": [], "cpu-config": cpu
    });
    VmConfig::from_json(&file.to_string())
}

#[test]
fn a_file_has_it_inline_or_by_its_path() {
    let inline: Value = serde_json::from_str(TEMPLATE).unwrap();
    let expected = Some(serde_json::from_str::<CpuConfig>(TEMPLATE).unwrap());
    assert_eq!(file(&inline).unwrap().cpu_config, expected);
    assert_eq!(file(&Value::Null).unwrap().cpu_config, None);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("template.json");
    fs::write(&path, TEMPLATE).unwrap();
    assert_eq!(file(&json!(path)).unwrap().cpu_config, expected);

    let refusal = |cpu: Value| format!("{:?}", file(&cpu).unwrap_err());
    fs::write(&path, r#"{"msr": 1}"#).unwrap();
    assert!(refusal(json!(path)).contains("unknown field `msr`"));
    assert!(refusal(json!("/nowhere")).contains("the CPU template /nowhere: No such file"));
    assert!(refusal(json!("/dev/zero")).contains("not a regular file"));
    assert!(refusal(json!(1)).contains("a CPU template or the path of one"));
}

#[test]
fn it_is_shown_and_no_template_takes_it_away() {
    let mut config = VmConfig::default();
    assert_eq!(config.to_full_json().unwrap()["cpu-config"], Value::Null);
    let cpu: CpuConfig = serde_json::from_str(TEMPLATE).unwrap();
    config.apply(Section::Cpu(cpu.clone())).unwrap();
    let shown = config.to_full_json().unwrap();
    assert_eq!(shown["cpu-config"], serde_json::to_value(&cpu).unwrap());
    let machine = |text| Section::MachineConfig(serde_json::from_str(text).unwrap());
    let plain = machine(r#"{"vcpu_count": 1, "mem_size_mib": 128}"#);
    config.apply(plain).unwrap();
    assert_eq!(config.cpu_config, Some(cpu));
    let none = r#"{"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "None"}"#;
    config.apply(machine(none)).unwrap();
    assert_eq!(config.cpu_config, None);
    let shown = config.to_full_json().unwrap();
    assert_eq!(shown["machine-config"].get("cpu_template"), None);
}
