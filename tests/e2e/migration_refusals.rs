// SPDX-License-Identifier: Apache-2.0
//! Moves that are refused before memory moves, each with its reason.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use brume_api::MigrationPhase;
use brume_tests::api::ApiVm;
use brume_tests::migration::{Link, Pair, Setup, Side};
use serde_json::{Value, json};

use crate::block::disk;
use crate::migration::{LIMIT, WRITES, assert_settled, tracks};

/// Asks for a move that does not begin; why.
#[track_caller]
pub(crate) fn refused(pair: &mut Pair, body: &Value) -> String {
    pair.send(body);
    let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
    assert_eq!((status.pass, status.pages), (0, 0), "{status:?}");
    pair.assert_runs_on(Side::Source);
    assert!(!tracks(pair.api(Side::Source)));
    status.error.unwrap()
}

/// The same of a target that says the same of it, and waits for another machine.
#[track_caller]
fn refused_by_target(pair: &mut Pair, text: &str) {
    let error = refused(pair, &json!({}));
    assert!(error.contains(text), "{error}");
    let status = pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
    let told = status.error.unwrap();
    assert!(told.contains(text), "{told}");
}

#[test]
fn a_request_that_cannot_be_is_refused_at_once() {
    let mut pair = Pair::new("");
    for (body, text) in [
        (json!({"destination": "here"}), "`destination` is `here`"),
        (
            json!({"destination": "tcp:host"}),
            "`destination` is `tcp:host`",
        ),
        (
            json!({"destination": "tcp:[::1:7000"}),
            "is no place to move a machine to",
        ),
        (json!({"connections": 0}), "`connections` is 0"),
        (json!({"connections": 17}), "`connections` is 17"),
        (json!({"max_downtime_ms": 0}), "max_downtime_ms"),
        (
            json!({"destination": "fd:0", "connections": 2}),
            "is one connection",
        ),
        (
            json!({"destination": "fd:0", "on_timeout": "PostCopy"}),
            "is one connection",
        ),
        (json!({"speed": 1}), "speed"),
    ] {
        let reply = pair.try_send(&body);
        assert_eq!(reply.status, 400, "{body}: {}", reply.body);
        assert!(reply.body.contains(text), "{body}: {}", reply.body);
    }
    let source = pair.api(Side::Source);
    let reply = source.send("PUT", "/migration/receive", r#"{"listen": "unix:/x"}"#);
    assert!(
        reply.status == 400 && reply.body.contains("a machine already"),
        "{}",
        reply.body
    );
    for (method, body) in [("DELETE", ""), ("PATCH", r#"{"bandwidth_limit": 1}"#)] {
        let reply = source.send(method, "/migration", body);
        assert!(
            reply.status == 400 && reply.body.contains("not being moved"),
            "{}",
            reply.body
        );
    }
    let target = pair.api(Side::Target);
    let reply = target.send("PUT", "/migration/send", r#"{"destination": "unix:/x"}"#);
    assert!(
        reply.status == 400 && reply.body.contains("no machine yet"),
        "{}",
        reply.body
    );
    let reply = target.send("PUT", "/migration/receive", r#"{"listen": "unix:/x"}"#);
    assert!(
        reply.status == 400 && reply.body.contains("awaited already"),
        "{}",
        reply.body
    );
    let reply = target.send("PATCH", "/migration", r#"{"bandwidth_limit": 1}"#);
    assert!(
        reply.status == 400 && reply.body.contains("at the source"),
        "{}",
        reply.body
    );
    pair.moved(&json!({}), LIMIT);
}

#[test]
fn a_place_where_nobody_can_wait_is_refused() {
    let api = ApiVm::new();
    let file = api.folder().join("file");
    fs::write(&file, "mine").unwrap();
    let unix = format!("unix:{}", file.display());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = format!("tcp:{}", taken.local_addr().unwrap());
    for (listen, text) in [
        (&*unix, "is in use"),
        (&tcp, "nobody can be waited for"),
        ("tcp:192.0.2.77:1", "nobody can be waited for"),
        ("unix:/nowhere/at/all", "nobody can be waited for"),
        ("fd:0", "descriptor 0 is no connected stream socket"),
        ("fd:77", "descriptor 77 is no connected stream socket"),
        ("everywhere", "`listen` is `everywhere`"),
    ] {
        let body = json!({"listen": listen}).to_string();
        let reply = api.send("PUT", "/migration/receive", &body);
        assert_eq!(reply.status, 400, "{listen}: {}", reply.body);
        assert!(reply.body.contains(text), "{listen}: {}", reply.body);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    // It can still become a machine of its own.
    api.start_bare("bare.do=live", &[]);
}

#[test]
fn who_is_not_there_or_is_somebody_else_is_told() {
    let mut pair = Pair::new(WRITES);
    let to = |address: &str| json!({"destination": address});
    for (address, text) in [
        (
            "unix:/nowhere/at/all",
            "nobody can be reached at unix:/nowhere/at/all",
        ),
        (
            "tcp:127.0.0.1:1",
            "nobody can be reached at tcp:127.0.0.1:1",
        ),
        ("fd:88", "descriptor 88 is no connected stream socket"),
    ] {
        let error = refused(&mut pair, &to(address));
        assert!(error.contains(text), "{error}");
    }
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", web.local_addr().unwrap());
    let answers: [(&[u8], &str); 3] = [
        (
            b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
            "does not speak brume's",
        ),
        (b"", "closed the connection"),
        (
            b"BRMG\0\0\0\0\xff\xff\xff\xff and much more than that would follow",
            "announced",
        ),
    ];
    for (answer, text) in answers {
        let listener = web.try_clone().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; 64];
            stream.read_exact(&mut hello).unwrap();
            stream.write_all(answer).unwrap();
            // A reset would take the answer along.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let error = refused(&mut pair, &to(&address));
        assert!(error.contains(text), "{error}");
        server.join().unwrap();
    }
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}

fn drive(path: &std::path::Path) -> Value {
    json!({"drive_id": "d", "is_root_device": false, "path_on_host": path})
}

#[test]
fn a_disk_that_is_missing_or_another_is_told() {
    let (folder, path) = disk();
    let (other, missing) = (folder.path().join("other"), folder.path().join("missing"));
    fs::write(&other, [0; 1 << 20]).unwrap();
    for (there, text) in [
        (
            &missing,
            format!(
                "no file {} that can be read for drive \"d\"",
                missing.display()
            ),
        ),
        (
            &other,
            "drive \"d\" has 4194304 bytes at the source".to_owned(),
        ),
    ] {
        let setup = Setup {
            args: WRITES,
            parts: &[("/drives/d", drive(&path))],
            receive: json!({"drive_overrides": [{"drive_id": "d", "path_on_host": there}]}),
            ..Setup::default()
        };
        let mut pair = Pair::start(&setup);
        refused_by_target(&mut pair, &text);
        pair.live(Side::Source).hash();
    }
}

#[test]
fn an_override_for_what_the_machine_does_not_have_is_told() {
    for (receive, text) in [
        (
            json!({"network_overrides": [{"iface_id": "e9", "host_dev_name": "tap0"}]}),
            "another TAP for network interface \"e9\"",
        ),
        (
            json!({"drive_overrides": [{"drive_id": "d9", "path_on_host": "/x"}]}),
            "another file for drive \"d9\"",
        ),
        (
            json!({"vsock_override": {"uds_path": "/x"}}),
            "another socket for the socket device",
        ),
    ] {
        let setup = Setup {
            args: WRITES,
            receive,
            ..Setup::default()
        };
        refused_by_target(&mut Pair::start(&setup), text);
    }
}

#[test]
fn a_tap_that_is_missing_is_told() {
    let interface = json!({"iface_id": "e", "host_dev_name": "tap0"});
    let setup = |receive| Setup {
        args: WRITES,
        link: Link::TwoHosts,
        receive,
        ..Setup::default()
    };
    // Nobody may make one where the target is.
    let overrides = json!({"network_overrides": [
        {"iface_id": "e", "host_dev_name": "a_name_too_long_for_one"}]});
    let parts = [("/network-interfaces/e", interface)];
    let mut pair = Pair::start(&Setup {
        parts: &parts,
        ..setup(overrides)
    });
    refused_by_target(&mut pair, "a_name_too_long_for_one");
    pair.replace_target(&setup(json!({})));
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_process_with_parts_of_a_machine_receives_none() {
    let api = ApiVm::new();
    api.done(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 64}),
    );
    let listen = format!("unix:{}", api.folder().join("m").display());
    let body = json!({"listen": listen}).to_string();
    let reply = api.send("PUT", "/migration/receive", &body);
    assert!(
        reply.status == 400 && reply.body.contains("none was described"),
        "{}",
        reply.body
    );
    // And one that waits takes no parts.
    let pair = Pair::new("");
    let target = pair.api(Side::Target);
    let reply = target.send(
        "PUT",
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 64}"#,
    );
    assert!(
        reply.status == 400 && reply.body.contains("is awaited"),
        "{}",
        reply.body
    );
}
