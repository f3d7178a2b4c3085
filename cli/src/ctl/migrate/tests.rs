// SPDX-License-Identifier: Apache-2.0
//! Arguments, and what is sent for them.

use brume_api::MigrationTls;
use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: MigrateArgs,
}

fn asked(arguments: &str) -> Result<Asked, String> {
    let arguments = arguments.split_whitespace();
    let cli = Cli::try_parse_from(["brume"].into_iter().chain(arguments));
    let cli = cli.map_err(|error| error.to_string())?;
    cli.args.asked().map_err(|failure| failure.text())
}

fn sent(arguments: &str) -> SendMigration {
    match asked(arguments).unwrap() {
        Asked::Send(send) => *send,
        other => panic!("{other:?}"),
    }
}

/// What is not said is what the API takes for it.
#[test]
fn defaults_are_those_of_the_api() {
    let expected: SendMigration =
        serde_json::from_str(r#"{"destination": "tcp:host2:4444"}"#).unwrap();
    assert_eq!(sent("--to tcp:host2:4444"), expected);
}

#[test]
fn all_of_a_move_can_be_said() {
    let send = sent(
        "--to tcp:h:1 --max-downtime 50ms --bandwidth 500M --timeout 5m --on-timeout post-copy \
         --mode hybrid --connections 16 --compression zstd --auto-converge --with-disks \
         --tls-ca /ca --tls-cert /cert --tls-key /key --tls-name h2",
    );
    let expected = SendMigration {
        destination: "tcp:h:1".into(),
        max_downtime_ms: 50,
        timeout_s: 300,
        on_timeout: OnTimeout::PostCopy,
        bandwidth_limit: 500_000_000,
        connections: 16,
        compression: MigrationCompression::Zstd,
        mode: MigrationMode::Hybrid,
        auto_converge: true,
        with_disks: true,
        tls: Some(MigrationTls {
            ca: "/ca".into(),
            certificate: "/cert".into(),
            key: "/key".into(),
            server_name: Some("h2".into()),
        }),
    };
    assert_eq!(send, expected);
}

/// The machine's process may be in another folder than this one.
#[test]
fn a_socket_is_named_from_the_root() {
    let here = std::env::current_dir().unwrap();
    let expected = format!("unix:{}", here.join("move.sock").display());
    assert_eq!(sent("--to unix:move.sock").destination, expected);
    assert_eq!(sent("--to unix:/m").destination, "unix:/m");
}

#[test]
fn a_move_is_steered() {
    let patch = |patch: MigrationPatch| Asked::Patch(Box::new(patch));
    let none = MigrationPatch::default;
    for (arguments, expected) in [
        ("--status", Asked::Status),
        ("--status --report r.html", Asked::Status),
        ("--follow", Asked::Follow),
        ("--cancel", Asked::Cancel),
        (
            "--change --bandwidth 0 --auto-converge=false",
            patch(MigrationPatch {
                bandwidth_limit: Some(0),
                auto_converge: Some(false),
                ..none()
            }),
        ),
        (
            "--change --max-downtime 1s --timeout 0 --on-timeout force",
            patch(MigrationPatch {
                max_downtime_ms: Some(1000),
                timeout_s: Some(0),
                on_timeout: Some(OnTimeout::Force),
                ..none()
            }),
        ),
        (
            "--resume",
            patch(MigrationPatch {
                resume: Some(String::new()),
                ..none()
            }),
        ),
        (
            "--resume tcp:h:2",
            patch(MigrationPatch {
                resume: Some("tcp:h:2".into()),
                ..none()
            }),
        ),
        (
            "--decide abandon",
            patch(MigrationPatch {
                decision: Some(MigrationDecision::Abandon),
                ..none()
            }),
        ),
    ] {
        assert_eq!(asked(arguments), Ok(expected), "{arguments}");
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    for (arguments, text) in [
        ("", "required"),
        ("--to tcp:h:1 --cancel", "cannot be used"),
        ("--status --follow", "cannot be used"),
        ("--change", "change what?"),
        ("--status --bandwidth 1M", "limits belong to --to"),
        ("--change --mode hybrid", "belong to --to"),
        ("--change --bandwidth 1M --connections 2", "belong to --to"),
        ("--follow --with-disks", "belong to --to"),
        ("--status --detach", "belong to --to"),
        ("--to tcp:h:1 --detach --report r", "cannot be used"),
        ("--cancel --report r", "cannot be used"),
        ("--to tcp:h:1 --connections 17", "17"),
        ("--to tcp:h:1 --connections 0", "0"),
        ("--to tcp:h:1 --max-downtime 20", "unit"),
        ("--to tcp:h:1 --tls-ca a", "--tls-cert"),
        ("--to tcp:h:1 --tls-name a", "--tls-ca"),
        (
            "--status --tls-ca a --tls-cert b --tls-key c",
            "belong to --to",
        ),
        ("--decide wait", "abandon"),
        ("--to tcp:h:1 --auto-converge=maybe", "maybe"),
    ] {
        let refusal = asked(arguments).unwrap_err();
        assert!(refusal.contains(text), "{arguments}: {refusal}");
    }
}
