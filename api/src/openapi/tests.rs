// SPDX-License-Identifier: Apache-2.0
//! The document says what the program does, and the file beside it says what the document says.

use std::path::Path;

use jsonschema::Validator;
use serde_json::json;

use super::*;
use crate::route::parse;

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
fn the_file_is_the_document() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/openapi.yaml");
    let head = "# SPDX-License-Identifier: Apache-2.0\n# Made from the types of the control API.\n";
    let text = format!("{head}{}", yaml_serde::to_string(&document()).unwrap());
    // To older readers of YAML it is a boolean.
    let text = text.replace("- Off\n", "- 'Off'\n");
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    assert!(
        std::fs::read_to_string(&file).unwrap_or_default() == text,
        "resources/openapi.yaml is not what the types say: run `UPDATE_OPENAPI=1 cargo test -p \
         brume-api the_file_is_the_document`"
    );
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
