// SPDX-License-Identifier: Apache-2.0
//! The contract: each method, path and body, and what becomes of it.

use super::*;

fn refusal(method: &str, path: &str, body: &str) -> String {
    parse(method, path, body.as_bytes())
        .expect_err(&format!("{method} {path} {body}"))
        .message
}

#[test]
fn what_clients_send_is_understood() {
    for (method, path, body, expected) in [
        ("GET", "/", "", Request::GetInstance),
        ("GET", "/version", "", Request::GetVersion),
        ("GET", "/mmds", "", Request::GetMmds),
        // Firecracker shows the data there too.
        ("GET", "/mmds/config", "", Request::GetMmds),
        ("GET", "/vm/config", "", Request::GetConfig),
        ("GET", "/machine-config", "", Request::GetMachineConfig),
        (
            "PUT",
            "/actions",
            r#"{"action_type": "InstanceStart"}"#,
            Request::Start,
        ),
        ("PATCH", "/vm", r#"{"state": "Paused"}"#, Request::Pause),
        ("PATCH", "/vm", r#"{"state": "Resumed"}"#, Request::Resume),
        ("PATCH", "/vm", r#"{"state": "Stopped"}"#, Request::Stop),
    ] {
        let parsed = parse(method, path, body.as_bytes()).unwrap();
        assert_eq!(parsed, expected.into(), "{method} {path} {body}");
    }
}

#[test]
fn the_data_of_the_metadata_service_is_any_json() {
    for (body, value) in [
        (
            r#"{"a": {"b": null}}"#,
            serde_json::json!({"a": {"b": null}}),
        ),
        ("[1]", serde_json::json!([1])),
        ("null", serde_json::json!(null)),
    ] {
        let put = parse("PUT", "/mmds", body.as_bytes()).unwrap();
        assert_eq!(put, Request::PutMmds(value.clone()).into());
        let patch = parse("PATCH", "/mmds", body.as_bytes()).unwrap();
        assert_eq!(patch, Request::PatchMmds(value).into());
    }
    // So deep that it would be a danger to whoever walks through it.
    let deep = "[".repeat(200) + &"]".repeat(200);
    assert!(refusal("PUT", "/mmds", &deep).contains("recursion limit exceeded"));
}

#[test]
fn version_1_of_the_metadata_service_is_deprecated() {
    for (body, deprecated) in [
        (r#"{"network_interfaces": ["e"], "version": "V2"}"#, false),
        (r#"{"network_interfaces": ["e"], "version": "V1"}"#, true),
        (r#"{"network_interfaces": ["e"]}"#, true),
    ] {
        let parsed = parse("PUT", "/mmds/config", body.as_bytes()).unwrap();
        assert!(matches!(parsed.request, Request::Configure(_)));
        assert_eq!(parsed.deprecated, deprecated, "{body}");
    }
}

#[test]
fn parts_of_the_configuration_are_understood() {
    for (method, path, body) in [
        (
            "PUT",
            "/boot-source",
            r#"{"kernel_image_path": "/k", "boot_args": null}"#,
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": 2, "mem_size_mib": 256}"#,
        ),
        ("PATCH", "/machine-config", r#"{"smt": true}"#),
        (
            "PUT",
            "/drives/a_1",
            r#"{"drive_id": "a_1", "is_root_device": true, "path_on_host": "/d"}"#,
        ),
        (
            "PUT",
            "/network-interfaces/e",
            r#"{"iface_id": "e", "host_dev_name": "tap0"}"#,
        ),
        (
            "PUT",
            "/balloon",
            r#"{"amount_mib": 1, "deflate_on_oom": false}"#,
        ),
        ("PUT", "/entropy", "{}"),
        ("PUT", "/cpu-config", "{}"),
        ("PUT", "/serial", r#"{"serial_out_path": "/s"}"#),
        (
            "PUT",
            "/vsock",
            r#"{"guest_cid": 3, "uds_path": "./v.sock"}"#,
        ),
        ("PUT", "/logger", r#"{"level": "debug"}"#),
    ] {
        let parsed = parse(method, path, body.as_bytes()).unwrap();
        assert!(matches!(parsed.request, Request::Configure(_)), "{path}");
        assert!(!parsed.deprecated, "{path}");
    }
}

#[test]
fn refusals_have_firecrackers_texts() {
    let json = "An error occurred when deserializing the json body of a request: ";
    for (method, path, body, expected) in [
        ("GET", "/", "{}", "GET request cannot have a body."),
        ("PUT", "/drives/a", "", "Empty PUT request."),
        ("PATCH", "/vm", "", "Empty PATCH request."),
        ("PATCH", "/machine-config", "{}", "Empty PATCH request."),
        (
            "GET",
            "/nothing",
            "",
            "Invalid request method and/or path: GET nothing.",
        ),
        (
            "DELETE",
            "/",
            "",
            "Invalid request method and/or path: DELETE .",
        ),
        (
            "POST",
            "/actions",
            "{}",
            "Invalid request method and/or path: POST actions.",
        ),
        (
            "GET",
            "/vm",
            "",
            "Invalid request method and/or path: GET vm.",
        ),
        ("PUT", "/mmds/x", "{}", "Unrecognized PUT request path `x`."),
        ("PUT", "/drives/", "{}", "The ID cannot be empty."),
        (
            "PUT",
            "/drives/a-b",
            "{}",
            "API Resource IDs can only contain alphanumeric characters and underscores.",
        ),
        (
            "PUT",
            "/drives/a",
            r#"{"drive_id": "b", "is_root_device": true}"#,
            "The id from the path does not match the id from the body!",
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"mem_size_mib": 256}"#,
            &format!("{json}missing field `vcpu_count` at line 1 column 21."),
        ),
    ] {
        assert_eq!(
            refusal(method, path, body),
            expected,
            "{method} {path} {body}"
        );
    }
    for (path, body, part) in [
        (
            "/boot-source",
            r#"{"kernel_image_path": "/k", "x": 1}"#,
            "unknown field `x`",
        ),
        (
            "/actions",
            r#"{"action_type": "Dance"}"#,
            "unknown variant `Dance`",
        ),
        (
            "/machine-config",
            r#"{"vcpu_count": 256, "mem_size_mib": 1}"#,
            "invalid value",
        ),
        (
            "/machine-config",
            r#"{"vcpu_count": "1", "mem_size_mib": 1}"#,
            "invalid type",
        ),
        (
            "/machine-config",
            r#"{"vcpu_count": 1, "vcpu_count": 2}"#,
            "duplicate field",
        ),
        (
            "/vsock",
            r#"{"guest_cid": 42, "invalid_field": false}"#,
            "unknown field `invalid_field`",
        ),
        ("/vsock", r#"{"guest_cid": 3}"#, "missing field `uds_path`"),
        (
            "/vsock",
            r#"{"guest_cid": -1, "uds_path": "v"}"#,
            "invalid value",
        ),
        ("/entropy", " [null]", "invalid type: sequence"),
        ("/logger", "\u{fffd}", "expected value"),
        ("/logger", &"[".repeat(5000), "invalid type: sequence"),
    ] {
        let text = refusal("PUT", path, body);
        assert!(
            text.starts_with(json) && text.contains(part),
            "{path} {body}: {text}"
        );
    }
    assert!(parse("PUT", "/logger", b"{\"level\": \"\xff\"}").is_err());
}

#[test]
fn what_is_not_there_yet_says_so() {
    for (method, path) in [
        ("PUT", "/pmem/a"),
        ("GET", "/hotplug/memory"),
        ("PATCH", "/hotplug/memory"),
    ] {
        let body = if method == "GET" { "" } else { "{}" };
        let text = refusal(method, path, body);
        assert!(text.contains("is not supported by this version"), "{text}");
    }
}

#[test]
fn a_vsock_id_is_deprecated() {
    let body = br#"{"vsock_id": "v", "guest_cid": 3, "uds_path": "/v"}"#;
    assert!(parse("PUT", "/vsock", body).unwrap().deprecated);
}

#[test]
fn other_requests_to_the_vsock_device_are_unknown() {
    for (method, path, body) in [("GET", "/vsock", ""), ("PATCH", "/vsock", "{}")] {
        let expected = format!("Invalid request method and/or path: {method} vsock.");
        assert_eq!(refusal(method, path, body), expected);
    }
}

#[test]
fn a_cpu_template_is_deprecated() {
    let body = br#"{"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "None"}"#;
    assert!(parse("PUT", "/machine-config", body).unwrap().deprecated);
}
