// SPDX-License-Identifier: Apache-2.0

use super::*;
use crate::route::parse;

fn understood(method: &str, path: &str, body: &str) -> MigrationRequest {
    match parse(method, path, body.as_bytes()).unwrap().request {
        Request::Migration(request) => request,
        other => panic!("{method} {path}: {other:?}"),
    }
}

fn refusal(method: &str, path: &str, body: &str) -> String {
    let fault = parse(method, path, body.as_bytes())
        .expect_err(&format!("{method} {path} {body} is taken"));
    assert_eq!(fault.status, 400, "{method} {path}");
    fault.message
}

fn plain(destination: &str) -> SendMigration {
    SendMigration {
        destination: destination.into(),
        max_downtime_ms: 20,
        timeout_s: 0,
        on_timeout: OnTimeout::Cancel,
        bandwidth_limit: 0,
        connections: 1,
        compression: MigrationCompression::Auto,
        mode: MigrationMode::PreCopy,
        auto_converge: false,
        with_disks: false,
        tls: None,
    }
}

fn tls() -> MigrationTls {
    MigrationTls {
        ca: "ca".into(),
        certificate: "cert".into(),
        key: "key".into(),
        server_name: Some("host".into()),
    }
}

#[test]
fn a_move_needs_no_more_than_a_place_to_go_to() {
    for destination in ["unix:a", "tcp:host:1", "tcp:[::1]:65535", "fd:3"] {
        let body = format!(r#"{{"destination": "{destination}"}}"#);
        assert_eq!(
            understood("PUT", "/migration/send", &body),
            MigrationRequest::Send(Box::new(plain(destination))),
        );
    }
    let expected = ReceiveMigration {
        listen: "unix:a".into(),
        network_overrides: Vec::new(),
        vsock_override: None,
        drive_overrides: Vec::new(),
        resume_vm: true,
        track_dirty_pages: false,
        tls: None,
    };
    assert_eq!(
        understood("PUT", "/migration/receive", r#"{"listen": "unix:a"}"#),
        MigrationRequest::Receive(Box::new(expected)),
    );
}

/// A client that is made from the same types says what the server understands.
#[test]
fn what_is_written_is_read_again() {
    let send = SendMigration {
        max_downtime_ms: 1,
        timeout_s: 60,
        on_timeout: OnTimeout::PostCopy,
        bandwidth_limit: 1 << 40,
        connections: MAX_CONNECTIONS,
        compression: MigrationCompression::Zstd,
        mode: MigrationMode::Hybrid,
        auto_converge: true,
        with_disks: true,
        tls: Some(tls()),
        ..plain("tcp:host:1")
    };
    let body = serde_json::to_string(&send).unwrap();
    assert_eq!(
        understood("PUT", "/migration/send", &body),
        MigrationRequest::Send(Box::new(send)),
    );
    let receive = ReceiveMigration {
        listen: "tcp:0.0.0.0:1".into(),
        network_overrides: vec![NetworkOverride {
            iface_id: "eth0".into(),
            host_dev_name: "tap1".into(),
        }],
        vsock_override: Some(VsockOverride {
            uds_path: "v".into(),
        }),
        drive_overrides: vec![DriveOverride {
            drive_id: "root".into(),
            path_on_host: "d".into(),
        }],
        resume_vm: false,
        track_dirty_pages: true,
        tls: Some(tls()),
    };
    let body = serde_json::to_string(&receive).unwrap();
    assert_eq!(
        understood("PUT", "/migration/receive", &body),
        MigrationRequest::Receive(Box::new(receive)),
    );
    let patch = MigrationPatch {
        max_downtime_ms: Some(5),
        timeout_s: Some(0),
        on_timeout: Some(OnTimeout::Force),
        bandwidth_limit: Some(0),
        auto_converge: Some(false),
        resume: Some(String::new()),
        decision: None,
    };
    let body = serde_json::to_string(&patch).unwrap();
    assert_eq!(
        understood("PATCH", "/migration", &body),
        MigrationRequest::Patch(Box::new(patch)),
    );
}

#[test]
fn a_move_is_shown_and_called_off() {
    assert_eq!(understood("GET", "/migration", ""), MigrationRequest::Get);
    let cancel = understood("DELETE", "/migration", "");
    assert_eq!(cancel, MigrationRequest::Cancel);
    let decision = understood("PATCH", "/migration", r#"{"decision": "Abandon"}"#);
    let expected = MigrationPatch {
        decision: Some(MigrationDecision::Abandon),
        ..MigrationPatch::default()
    };
    assert_eq!(decision, MigrationRequest::Patch(Box::new(expected)));
}

#[test]
fn values_that_cannot_be_are_refused_by_name() {
    let send = "/migration/send";
    let receive = "/migration/receive";
    for (method, path, body, text) in [
        (
            "PUT",
            send,
            r#"{"destination": "unix:a", "connections": 0}"#,
            "`connections` is 0: 1 to 16 are possible.",
        ),
        (
            "PUT",
            send,
            r#"{"destination": "unix:a", "connections": 17}"#,
            "`connections` is 17: 1 to 16 are possible.",
        ),
        (
            "PUT",
            send,
            r#"{"destination": "unix:a", "max_downtime_ms": 0}"#,
            "`max_downtime_ms` is 0: a guest stands still for 1 millisecond at least.",
        ),
        (
            "PUT",
            send,
            r#"{"destination": "unix:a", "tls": {"ca": "a", "certificate": "", "key": "k"}}"#,
            "`certificate` of `tls` names no file.",
        ),
        (
            "PUT",
            receive,
            r#"{"listen": "unix:a", "drive_overrides":
                [{"drive_id": "a/b", "path_on_host": "d"}]}"#,
            "API Resource IDs can only contain alphanumeric characters and underscores.",
        ),
        (
            "PUT",
            receive,
            r#"{"listen": "unix:a", "network_overrides":
                [{"iface_id": "", "host_dev_name": "t"}]}"#,
            "The ID cannot be empty.",
        ),
        (
            "PUT",
            receive,
            r#"{"listen": "unix:a", "drive_overrides":
                [{"drive_id": "a", "path_on_host": "d"}, {"drive_id": "a", "path_on_host": "e"}]}"#,
            "`a` is in `drive_overrides` twice.",
        ),
        (
            "PATCH",
            "/migration",
            "{}",
            "The request changes nothing: give a limit, `resume` or `decision`.",
        ),
        (
            "PATCH",
            "/migration",
            r#"{"decision": "Run", "timeout_s": 1}"#,
            "`decision` stands alone: a machine whose other side is lost has no limits.",
        ),
        (
            "PATCH",
            "/migration",
            r#"{"max_downtime_ms": 0}"#,
            "`max_downtime_ms` is 0: a guest stands still for 1 millisecond at least.",
        ),
        (
            "PATCH",
            "/migration",
            r#"{"resume": "there"}"#,
            "`resume` is `there`: `unix:PATH`, `tcp:HOST:PORT` or `fd:N` is possible.",
        ),
        (
            "DELETE",
            "/migration",
            "{}",
            "DELETE request cannot have a body.",
        ),
    ] {
        assert_eq!(refusal(method, path, body), text, "{method} {path} {body}");
    }
}

#[test]
fn an_address_has_one_of_three_forms() {
    for address in [
        "",
        "here",
        "unix:",
        "tcp:host",
        "tcp::1",
        "tcp:host:65536",
        "tcp:host:",
        "fd:",
        "fd:-1",
        "fd:99999",
        "http:host:1",
    ] {
        let body = serde_json::json!({ "destination": address }).to_string();
        let text = refusal("PUT", "/migration/send", &body);
        assert!(
            text.starts_with(&format!("`destination` is `{address}`: ")),
            "{text}"
        );
        let body = serde_json::json!({ "listen": address }).to_string();
        let text = refusal("PUT", "/migration/receive", &body);
        assert!(text.starts_with("`listen` is "), "{text}");
    }
}

#[test]
fn bodies_of_another_form_are_refused() {
    for (path, body) in [
        ("/migration/send", "{}"),
        ("/migration/send", r#"["unix:a"]"#),
        (
            "/migration/send",
            r#"{"destination": "unix:a", "tls": ["a", "b", "c"]}"#,
        ),
        (
            "/migration/send",
            r#"{"destination": "unix:a", "mode": "precopy"}"#,
        ),
        (
            "/migration/send",
            r#"{"destination": "unix:a", "other": 1}"#,
        ),
        ("/migration/receive", "{}"),
        (
            "/migration/receive",
            r#"{"listen": "unix:a", "drive_overrides": [["a", "b"]]}"#,
        ),
    ] {
        let text = refusal("PUT", path, body);
        assert!(text.contains("deserializing the json body"), "{text}");
    }
}

#[test]
fn no_other_path_is_there() {
    for (method, path) in [
        ("PUT", "/migration"),
        ("PUT", "/migration/other"),
        ("PUT", "/migration/send/more"),
        ("GET", "/migration/send"),
        ("PATCH", "/migration/send"),
        ("DELETE", "/migration/receive"),
    ] {
        let body = if method == "PUT" || method == "PATCH" {
            "{}"
        } else {
            ""
        };
        assert_eq!(
            refusal(method, path, body),
            format!("Invalid request method and/or path: {method} migration.")
        );
    }
}

#[test]
fn a_move_is_over_when_nothing_more_comes_of_it() {
    use MigrationPhase as P;
    for (phase, over) in [
        (P::None, true),
        (P::Listening, false),
        (P::InDoubt, false),
        (P::PostCopyInterrupted, false),
        (P::Completed, true),
        (P::Cancelled, true),
        (P::Failed, true),
    ] {
        assert_eq!(phase.is_over(), over, "{phase:?}");
    }
}
