// SPDX-License-Identifier: Apache-2.0
//! The document says what the program does, and the file beside it says what the document says.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use jsonschema::Validator;
use serde_json::json;

use super::*;
use crate::balloon::{BalloonHinting, BalloonRequest, BalloonStatistics};
use crate::client::Client;
use crate::config::VmConfig;
use crate::events::{EventHub, MachineEvent};
use crate::fault::Fault;
use crate::instance::{InstanceInfo, VersionInfo};
use crate::memory::{
    DirtyForm, DirtyPages, DirtyRate, DirtyRegion, Mapping, Mappings, MemoryRequest, ResidentPages,
};
use crate::migration::{
    MigrationDowntime, MigrationPass, MigrationPhase, MigrationRequest, MigrationRole,
    MigrationStatus,
};
use crate::request::{Answer, Controller, Reply, Request};
use crate::route::parse;
use crate::server::Server;

/// What is sent to `endpoint` as an example; empty if it takes nothing.
pub(super) fn example(endpoint: &Endpoint) -> &'static str {
    match endpoint.carries {
        Carries::Nothing => "",
        Carries::Value(_, example) | Carries::Optional(_, example) => example,
    }
}

/// The path of `endpoint` with the id of its example.
pub(super) fn path(endpoint: &Endpoint) -> String {
    let Some((before, _)) = endpoint.path.split_once('{') else {
        return endpoint.path.into();
    };
    let body: Value = serde_json::from_str(example(endpoint)).unwrap_or_default();
    let id = body["drive_id"].as_str().or(body["iface_id"].as_str());
    format!("{before}{}", id.unwrap_or("id"))
}

pub(super) fn method(endpoint: &Endpoint) -> String {
    let method = serde_json::to_value(&endpoint.method).unwrap();
    method.as_str().unwrap().to_uppercase()
}

/// Checks values against the schema `name` of the document.
pub(super) fn validator(name: &str) -> Validator {
    let document = serde_json::to_value(document()).unwrap();
    let schema = json!({
        "$ref": format!("#/components/schemas/{name}"),
        "components": document["components"],
    });
    jsonschema::draft202012::new(&schema).unwrap()
}

#[test]
fn the_files_are_the_document() {
    let head = "# SPDX-License-Identifier: Apache-2.0\n# Made from the types of the control API.\n";
    let yaml = format!("{head}{}", yaml_serde::to_string(&document()).unwrap());
    // To older readers of YAML they are booleans.
    let yaml = yaml.replace("- On\n", "- 'On'\n");
    let yaml = yaml.replace("- Off\n", "- 'Off'\n");
    let json = serde_json::to_string(&document()).unwrap();
    let files = [
        ("../resources/openapi.yaml", yaml),
        ("src/openapi/document.json", json),
    ];
    for (name, text) in files {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(&file, &text).unwrap();
        }
        assert!(
            std::fs::read_to_string(&file).unwrap_or_default() == text,
            "{name} is not what the types say: run `UPDATE_OPENAPI=1 cargo test -p brume-api \
             the_files_are_the_document`"
        );
    }
}

#[test]
fn every_endpoint_is_routed_or_refused_as_it_says() {
    for endpoint in &ENDPOINTS {
        let (method, path) = (method(endpoint), path(endpoint));
        if path == "/events" {
            // It is answered before it is looked at.
            continue;
        }
        let result = parse(&method, &path, example(endpoint).as_bytes());
        match endpoint.gives {
            Gives::Refusal => {
                let text = result.unwrap_err().message;
                assert!(text.contains("is not supported by this version"), "{text}");
            }
            _ => assert!(result.is_ok(), "{method} {path}: {result:?}"),
        }
        if let Carries::Optional(..) = endpoint.carries {
            parse(&method, &path, b"").unwrap();
        }
    }
}

#[test]
fn what_is_not_in_the_document_is_unknown() {
    let listed: Vec<_> = ENDPOINTS.iter().map(|e| (method(e), path(e))).collect();
    for method in ["GET", "PUT", "PATCH", "DELETE", "POST", "HEAD", "OPTIONS"] {
        for (_, path) in &listed {
            if listed.contains(&(method.into(), path.clone())) {
                continue;
            }
            // As with Firecracker, parts that mean nothing behind a path that is known are nothing.
            let first = path.split('/').nth(1).unwrap();
            let short = format!("/{first}");
            let known = listed.contains(&(method.into(), short.clone()));
            for body in ENDPOINTS.iter().map(example).chain(["", "{}"]) {
                let result = parse(method, path, body.as_bytes());
                let same = known && result == parse(method, &short, body.as_bytes());
                assert!(
                    result.is_err() || same,
                    "{method} {path} {body}: {result:?}"
                );
            }
        }
    }
}

#[test]
fn examples_are_as_their_schemas_say() {
    for endpoint in &ENDPOINTS {
        if let Carries::Value(described, example) | Carries::Optional(described, example) =
            endpoint.carries
        {
            let value = serde_json::from_str(example).unwrap();
            let validator = validator(&(described.name)());
            if let Err(error) = validator.validate(&value) {
                panic!("{} {example}: {error}", endpoint.path);
            }
        }
    }
}

#[test]
fn each_operation_has_a_name_of_its_own() {
    let mut names: Vec<_> = ENDPOINTS
        .iter()
        .map(|endpoint| endpoint.operation_id)
        .collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ENDPOINTS.len());
}

/// Answers with a configuration as it is after requests for parts of it.
#[derive(Default)]
struct Machine(RefCell<VmConfig>);

impl Controller for Machine {
    fn call(&self, request: Request, reply: Reply) {
        reply.send(self.answer(request));
    }
}

impl Machine {
    fn answer(&self, request: Request) -> Result<Answer, Fault> {
        match request {
            Request::Configure(section) => {
                let applied = self.0.borrow_mut().apply(*section);
                applied.map_err(|error| Fault::from_error(&error))?;
                Ok(Answer::done())
            }
            Request::GetInstance => Answer::json(&InstanceInfo {
                app_name: "Firecracker",
                id: "i".into(),
                state: "Not started",
                vmm_version: "1",
            }),
            Request::GetVersion => Answer::json(&VersionInfo {
                firecracker_version: "1",
            }),
            Request::GetMachineConfig => Answer::json(&self.0.borrow().machine_config),
            Request::GetConfig => Answer::json(&self.0.borrow().to_full_json().unwrap()),
            Request::Balloon(BalloonRequest::GetStatistics) => {
                Answer::json(&BalloonStatistics::new(1, 2, [Some(3); 16]))
            }
            Request::Balloon(BalloonRequest::GetHinting) => Answer::json(&BalloonHinting {
                host_cmd: 1,
                guest_cmd: None,
            }),
            Request::Memory(request) => match request {
                MemoryRequest::GetDirty { form } => Answer::json(&dirty_pages(form)),
                MemoryRequest::GetDirtyRate { window_ms } => Answer::json(&DirtyRate {
                    window_ms: window_ms.into(),
                    pages_per_second: 1,
                    bytes_per_second: 4096,
                    vcpus: Some(vec![1, 0]),
                }),
                MemoryRequest::GetMappings => Answer::json(&Mappings {
                    mappings: vec![Mapping {
                        base_host_virt_addr: 0x7fff_0000_0000,
                        size: 1 << 27,
                        offset: 0,
                        page_size: 4096,
                    }],
                }),
                MemoryRequest::GetMemory => Answer::json(&ResidentPages {
                    resident: vec![3],
                    empty: vec![1],
                }),
                _ => Ok(Answer::done()),
            },
            Request::Migration(MigrationRequest::Get) => Answer::json(&moved()),
            Request::Migration(MigrationRequest::Cancel) => Ok(Answer::done()),
            _ => Err(Fault::new("Not here.")),
        }
    }
}

fn moved() -> MigrationStatus {
    MigrationStatus {
        role: MigrationRole::Source,
        phase: MigrationPhase::Completed,
        peer: Some("tcp:h:1".into()),
        expected_downtime_us: Some(1),
        time_left_ms: Some(0),
        downtime: Some(MigrationDowntime::default()),
        passes: vec![MigrationPass::default()],
        ..MigrationStatus::default()
    }
}

fn dirty_pages(form: DirtyForm) -> DirtyPages {
    let ranges = form == DirtyForm::Ranges;
    DirtyPages {
        tracking: true,
        page_size: 4096,
        dirty_pages: 2,
        bitmap: (!ranges).then(|| vec![0b110, 0]),
        regions: vec![DirtyRegion {
            guest_address: 0,
            size: 1 << 19,
            offset: 0,
            dirty_pages: 2,
            ranges: ranges.then(|| vec![[1, 2]]),
        }],
    }
}

#[test]
fn answers_are_as_their_schemas_say() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let server = Server::bind(&socket, 1000).unwrap();
    let controller = Box::<Machine>::default();
    let _serving = server
        .spawn(controller, EventHub::default(), Arc::default())
        .unwrap();
    let client = Client::new(&socket).unwrap();
    let check = |method: &str, path: &str, body: &str, status: u16, schema: &str| {
        let reply = client.send(method, path, body).unwrap();
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.body);
        let value = serde_json::from_str(&reply.body).unwrap();
        if let Err(error) = validator(schema).validate(&value) {
            panic!("{method} {path} {value}: {error}");
        }
        value
    };
    let get = |path: &str, schema: &str| check("GET", path, "", 200, schema);
    // Before anything is set, and after everything is.
    get("/vm/config", "VmConfig");
    let parts = ENDPOINTS
        .iter()
        .filter(|endpoint| matches!(endpoint.when, When::BeforeStart));
    // The metadata service needs an interface, which is behind it in the table.
    for endpoint in parts.clone().chain(parts) {
        client
            .send(&method(endpoint), &path(endpoint), example(endpoint))
            .unwrap();
    }
    let shown = get("/vm/config", "VmConfig");
    assert!(shown["mmds-config"].is_object(), "{shown}");
    assert!(shown["balloon"].is_object(), "{shown}");
    get("/", "InstanceInfo");
    get("/version", "VersionInfo");
    get("/machine-config", "MachineConfig");
    get("/balloon/statistics", "BalloonStatistics");
    get("/balloon/hinting/status", "BalloonHinting");
    let pages = get("/memory/dirty", "DirtyPages");
    assert_eq!(pages["bitmap"], json!([6, 0]));
    let pages = get("/memory/dirty?form=ranges", "DirtyPages");
    assert_eq!(pages["regions"][0]["ranges"], json!([[1, 2]]));
    let rate = get("/memory/dirty/rate?window_ms=20", "DirtyRate");
    assert_eq!(rate["window_ms"], 20);
    get("/memory/mappings", "Mappings");
    get("/memory", "ResidentPages");
    let shown = get("/migration", "MigrationStatus");
    let read: MigrationStatus = serde_json::from_value(shown).unwrap();
    assert_eq!(read, moved());
    assert_eq!(client.send("DELETE", "/migration", "").unwrap().status, 204);
    check("DELETE", "/migration", "{}", 400, "Fault");
    // A query means nothing elsewhere.
    get("/?form=none", "InstanceInfo");
    check("GET", "/memory/dirty?form=none", "", 400, "Fault");
    check("GET", "/nothing", "", 400, "Fault");
    check("PUT", "/drives/a", &" ".repeat(1001), 413, "Fault");
    let answered = get("/openapi.json", "AnyJson");
    assert_eq!(answered, serde_json::to_value(document()).unwrap());
}

#[test]
fn events_are_as_their_schema_says() {
    let validator = validator("Event");
    for event in [
        MachineEvent::State { state: "Running" },
        MachineEvent::Migration {
            role: MigrationRole::Target,
            phase: MigrationPhase::Completed,
            downtime_us: Some(1),
            error: None,
        },
        MachineEvent::MigrationPassed(MigrationPass::default()),
    ] {
        let value = serde_json::to_value(Stamped {
            time_ms: 1,
            event: &event,
        });
        let value = value.unwrap();
        assert!(validator.is_valid(&value), "{value}");
    }
    assert!(!validator.is_valid(&json!({"time_ms": 1, "event": "unheard_of"})));
}
