// SPDX-License-Identifier: Apache-2.0
//! What a configuration may say.

use std::error::Error;

use super::*;

const MINIMAL: &str = r#"{"boot-source": {"kernel_image_path": "/k"}, "drives": []}"#;

/// A whole configuration around one part.
fn with(key: &str, value: &str) -> Result<VmConfig, ConfigError> {
    let mut config: serde_json::Map<String, Value> = serde_json::from_str(MINIMAL).unwrap();
    config.insert(key.into(), serde_json::from_str(value).unwrap());
    VmConfig::from_json(&serde_json::to_string(&config).unwrap())
}

/// The error with its sources, as it is shown.
fn refusal(key: &str, value: &str) -> String {
    let error = with(key, value).expect_err(value);
    error
        .source()
        .map_or(error.to_string(), |source| format!("{error}: {source}"))
}

#[test]
fn what_is_left_out_has_firecrackers_defaults() {
    let config = VmConfig::from_json(MINIMAL).unwrap();
    assert_eq!(config.machine_config.vcpu_count, 1);
    assert_eq!(config.machine_config.mem_size_mib, 128);
    assert_eq!(config.boot_source.args(), BootSource::DEFAULT_ARGS);
    assert!(config.network_interfaces.is_empty());
    let config = with(
        "drives",
        r#"[{"drive_id": "root", "is_root_device": true, "path_on_host": "/d", "partuuid": null,
             "rate_limiter": null, "socket": null, "cache_type": null}]"#,
    )
    .unwrap();
    assert_eq!(config.drives[0].cache_type, CacheType::Unsafe);
    assert_eq!(config.drives[0].io_engine, IoEngine::Sync);
    assert!(!config.drives[0].is_read_only);
}

#[test]
fn a_configuration_survives_being_written_and_read() {
    let config = with(
        "network-interfaces",
        r#"[{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:AC:10:00:02",
             "mtu": 1400}]"#,
    )
    .unwrap();
    assert_eq!(
        config.network_interfaces[0].mac(),
        Some([6, 0, 0xac, 0x10, 0, 2])
    );
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(VmConfig::from_json(&text).unwrap(), config);
}

#[test]
fn keys_at_the_top_that_mean_nothing_are_named_but_taken() {
    let config = with("colour", "1").unwrap();
    assert_eq!(config.unknown_keys, ["colour"]);
    with("vsock", "null").unwrap();
    with("pmem", "[]").unwrap();
}

#[test]
fn what_is_not_there_yet_is_refused_by_name() {
    let drive = r#"[{"drive_id": "d", "is_root_device": false, "path_on_host": "/d", "#;
    let drive = |rest: &str| refusal("drives", &format!("{drive}{rest}}}]"));
    assert!(drive(r#""socket": "/s""#).contains("`socket`"));
}

#[test]
fn unknown_keys_and_wrong_types_are_refused_by_name_and_place() {
    let machine = |value: &str| refusal("machine-config", value);
    assert!(machine(r#"{"vcpu_count": 1, "mem_size_mib": 8, "cores": 2}"#).contains("`cores`"));
    assert!(machine(r#"{"vcpu_count": 1}"#).contains("missing field `mem_size_mib`"));
    assert!(machine(r#"{"vcpu_count": "1", "mem_size_mib": 8}"#).contains("invalid type: string"));
    assert!(machine(r#"{"vcpu_count": 300, "mem_size_mib": 8}"#).contains("300"));
    assert!(machine(r#"{"vcpu_count": -1, "mem_size_mib": 8}"#).contains("-1"));
    let drives = r#"[{"drive_id": "d", "is_root_device": true, "path": "/d"}]"#;
    assert!(refusal("drives", drives).contains("`path`"));
    assert!(refusal("drives", "{}").contains("line 1"));
    assert!(VmConfig::from_json("{").is_err());
    assert!(VmConfig::from_json("[]").is_err());
}

#[test]
fn machines_that_cannot_be_are_refused() {
    let machine = |vcpus: u8, mib: u64, rest: &str| {
        let value = format!(r#"{{"vcpu_count": {vcpus}, "mem_size_mib": {mib}{rest}}}"#);
        with("machine-config", &value)
    };
    assert!(matches!(machine(0, 8, ""), Err(ConfigError::VcpuCount(0))));
    assert!(matches!(
        machine(33, 8, ""),
        Err(ConfigError::VcpuCount(33))
    ));
    assert!(matches!(machine(1, 0, ""), Err(ConfigError::MemorySize)));
    assert!(matches!(
        machine(1, u64::MAX, ""),
        Err(ConfigError::MemorySize)
    ));
    for pages in ["Transparent", "2M"] {
        let pages = format!(r#", "huge_pages": "{pages}""#);
        assert!(matches!(
            machine(1, 7, &pages),
            Err(ConfigError::MemorySize)
        ));
        machine(1, 8, &pages).unwrap();
    }
    machine(1, 7, r#", "huge_pages": null"#).unwrap();
    assert!(matches!(
        machine(1, 8, r#", "huge_pages": "2M", "shared_memory": true"#),
        Err(ConfigError::SharedHugePages)
    ));
    machine(
        1,
        8,
        r#", "huge_pages": "Transparent", "shared_memory": true"#,
    )
    .unwrap();
    machine(1, 8, r#", "huge_pages": "1G""#).unwrap_err();
    assert!(matches!(
        machine(3, 8, r#", "smt": true"#),
        Err(ConfigError::OddSmt(3))
    ));
    machine(32, 8, "").unwrap();
    machine(1, 8, r#", "smt": true, "cpu_template": "None""#).unwrap();
    for template in ["C3", "T2", "T2A", "T2CL", "T2S"] {
        let error = machine(1, 8, &format!(r#", "cpu_template": "{template}""#)).unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&format!("template {template} is not supported"))
        );
    }
    let unknown = r#"{"vcpu_count": 1, "mem_size_mib": 8, "cpu_template": "T3"}"#;
    assert!(refusal("machine-config", unknown).contains("unknown variant `T3`"));
}

#[test]
fn drives_that_cannot_be_are_refused() {
    let drive = |id: &str, root: bool, rest: &str| {
        format!(r#"{{"drive_id": "{id}", "is_root_device": {root}, "path_on_host": "/d"{rest}}}"#)
    };
    let two = |a: &str, b: &str| with("drives", &format!("[{a},{b}]"));
    let root = |id| drive(id, true, "");
    assert!(matches!(
        two(&root("a"), &root("b")),
        Err(ConfigError::TwoRoots)
    ));
    let plain = |id| drive(id, false, "");
    assert!(matches!(
        two(&plain("a"), &plain("a")),
        Err(ConfigError::IdInUse { .. })
    ));
    two(&plain("a"), &plain("b")).unwrap();
    let bad_uuid = drive("a", true, r#", "partuuid": "x y""#);
    assert!(matches!(
        two(&bad_uuid, &plain("b")),
        Err(ConfigError::PartUuid { .. })
    ));
    for id in ["", "a/b", "a b", "ü"] {
        assert!(
            matches!(two(&plain(id), &plain("b")), Err(ConfigError::BadId { .. })),
            "{id}"
        );
    }
}

#[test]
fn a_vsock_device_has_a_guests_cid_and_a_path() {
    let vsock = |cid: &str| {
        with(
            "vsock",
            &format!(r#"{{"guest_cid": {cid}, "uds_path": "/s"}}"#),
        )
    };
    assert_eq!(vsock("3").unwrap().vsock.unwrap().guest_cid, 3);
    vsock("4294967294").unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let error = vsock(&cid.to_string()).unwrap_err();
        assert!(matches!(error, ConfigError::GuestCid(refused) if refused == cid));
    }
    assert!(matches!(vsock("4294967296"), Err(ConfigError::Json(_))));
    assert!(refusal("vsock", r#"{"guest_cid": 3}"#).contains("`uds_path`"));
    assert!(refusal("vsock", r#"{"guest_cid": 3, "uds_path": "/s", "x": 1}"#).contains("`x`"));
}

#[test]
fn a_vsock_id_is_taken_and_not_shown() {
    let value = r#"{"vsock_id": "v", "guest_cid": 3, "uds_path": "/s"}"#;
    let shown = with("vsock", value).unwrap().to_full_json().unwrap();
    let expected = serde_json::json!({"guest_cid": 3, "uds_path": "/s"});
    assert_eq!(shown["vsock"], expected);
    let shown = VmConfig::from_json(MINIMAL)
        .unwrap()
        .to_full_json()
        .unwrap();
    assert_eq!(shown["vsock"], Value::Null);
}

#[test]
fn network_interfaces_that_cannot_be_are_refused() {
    let net = |id: &str, rest: &str| format!(r#"{{"iface_id": "{id}"{rest}}}"#);
    let one = |rest: &str| with("network-interfaces", &format!("[{}]", net("a", rest)));
    assert!(matches!(one(""), Err(ConfigError::NetworkBackend(_))));
    let both = r#", "host_dev_name": "t", "bridge": "b""#;
    assert!(matches!(one(both), Err(ConfigError::NetworkBackend(_))));
    for mac in [
        "",
        "1",
        "06:00:00:00:00",
        "06:00:00:00:00:00:00",
        "+6:00:00:00:00:00",
        "01:00:00:00:00:00",
        "06-00-00-00-00-00",
    ] {
        let result = one(&format!(r#", "bridge": "b", "guest_mac": "{mac}""#));
        assert!(matches!(result, Err(ConfigError::Mac { .. })), "{mac}");
    }
    assert!(matches!(
        one(r#", "bridge": "b", "mtu": 67"#),
        Err(ConfigError::Mtu { .. })
    ));
    let same = |case: &str| format!(r#", "bridge": "b", "guest_mac": "06:00:00:00:00:{case}""#);
    let pair = format!("[{},{}]", net("a", &same("aB")), net("b", &same("Ab")));
    assert!(matches!(
        with("network-interfaces", &pair),
        Err(ConfigError::MacInUse(_))
    ));
}
