// SPDX-License-Identifier: Apache-2.0
//! Whatever comes in, it is understood or refused with a status that the document names.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::tests::{example, method, path, validator};
use super::*;
use crate::fault::Fault;
use crate::request::Request;
use crate::route::{Parsed, parse};

/// The statuses that the document names for `endpoint`.
fn statuses(endpoint: &Endpoint) -> Vec<String> {
    endpoint
        .operation()
        .responses
        .responses
        .into_keys()
        .collect()
}

/// What the answer to a request would be if all else goes well.
fn status(result: &Result<Parsed, Fault>, endpoint: &Endpoint) -> String {
    match (result, &endpoint.gives) {
        (Err(fault), _) => fault.status.to_string(),
        (Ok(_), Gives::Nothing) => "204".into(),
        (Ok(_), _) => "200".into(),
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.operation_id)
    }
}

fn endpoints() -> impl Strategy<Value = &'static Endpoint> {
    (0..ENDPOINTS.len()).prop_map(|index| &ENDPOINTS[index])
}

/// Endpoints that take a body.
fn taking() -> impl Strategy<Value = &'static Endpoint> {
    let taking = ENDPOINTS
        .iter()
        .filter(|endpoint| !example(endpoint).is_empty());
    select(taking.collect::<Vec<_>>())
}

/// JSON that is likely to be where it should not.
fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0..70_000u32).prop_map(Value::from),
        "\\PC*".prop_map(Value::from),
        select(vec!["", "None", "2M", "Async", "V2", "a\0b", "169.254.1.1"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((keys(), inner), 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Names of fields, most of which some body has.
fn keys() -> impl Strategy<Value = String> {
    let document = serde_json::to_value(document()).unwrap();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let fields = schemas
        .values()
        .filter_map(|schema| schema["properties"].as_object());
    let mut names: Vec<_> = fields.flat_map(|fields| fields.keys().cloned()).collect();
    names.sort();
    names.dedup();
    prop_oneof![9 => select(names), 1 => "[a-z_]{0,8}".boxed()]
}

/// A few fields of an object set to other values.
fn changes() -> impl Strategy<Value = Vec<(String, Value)>> {
    vec((keys(), values()), 0..4)
}

fn changed(endpoint: &Endpoint, changes: Vec<(String, Value)>) -> Value {
    let mut body: Value = serde_json::from_str(example(endpoint)).unwrap();
    body.as_object_mut().unwrap().extend(changes);
    body
}

/// Enough to find what is wrong in most runs, in the time that a unit test may take.
const CASES: u32 = 64;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn nothing_makes_the_router_panic(
        method in prop_oneof![select(vec!["GET", "PUT", "PATCH", "DELETE"]).prop_map(String::from), "[A-Z]*"],
        path in prop_oneof!["(/[a-z_./%-]*){0,4}", "\\PC*", endpoints().prop_map(path)],
        body in vec(any::<u8>(), 0..64),
    ) {
        if let Err(fault) = parse(&method, &path, &body) {
            prop_assert_eq!(fault.status, 400);
            prop_assert!(!fault.message.is_empty());
        }
    }

    #[test]
    fn bytes_of_a_body_that_are_changed_are_answered_as_the_document_says(
        endpoint in endpoints(),
        places in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut body = example(endpoint).as_bytes().to_vec();
        if !body.is_empty() {
            for (place, byte) in places {
                let place = place.index(body.len());
                body[place] = byte;
            }
            body.truncate(cut.index(body.len() * 4));
        }
        let result = parse(&method(endpoint), &path(endpoint), &body);
        if endpoint.path != "/events" {
            prop_assert!(statuses(endpoint).contains(&status(&result, endpoint)));
        }
    }

    #[test]
    fn fields_that_are_changed_are_answered_as_the_document_says(
        endpoint in taking(),
        changes in changes(),
    ) {
        let body = changed(endpoint, changes).to_string();
        let result = parse(&method(endpoint), &path(endpoint), body.as_bytes());
        prop_assert!(statuses(endpoint).contains(&status(&result, endpoint)));
    }
}

/// What the document forbids is refused: by its form, or as a part that cannot be.
#[test]
fn what_is_taken_is_as_the_schemas_say() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(CASES));
    let validators: BTreeMap<String, _> = ENDPOINTS
        .iter()
        .flat_map(Endpoint::types)
        .map(|described| (described.name)().into_owned())
        .map(|name| (name.clone(), validator(&name)))
        .collect();
    let result = runner.run(&(taking(), changes()), |(endpoint, changes)| {
        let value = changed(endpoint, changes);
        let body = value.to_string();
        let taken = match parse(&method(endpoint), &path(endpoint), body.as_bytes()) {
            Ok(Parsed {
                request: Request::Configure(section),
                ..
            }) => {
                let mut config = crate::config::VmConfig::default();
                let interface = r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#;
                config
                    .network_interfaces
                    .push(serde_json::from_str(interface).unwrap());
                config.apply(*section).is_ok()
            }
            result => result.is_ok(),
        };
        // What is carried comes first.
        let described = endpoint.types().next().unwrap();
        let allowed = validators[&*(described.name)()].is_valid(&value);
        prop_assert!(allowed || !taken, "{} {body}", endpoint.path);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
