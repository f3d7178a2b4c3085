// SPDX-License-Identifier: Apache-2.0
//! The metadata service between the control API, which sets its data at any time, and the network
//! interfaces, which get their stacks when the machine is built.

use std::sync::PoisonError;

use brume_api::config::{MmdsConfig, MmdsVersion};
use brume_api::{Answer, Fault, Request};
use brume_mmds::{Mmds, MmdsCounts, MmdsError, SharedMmds, Stack, StackConfig, StackError};
use serde_json::json;

/// Answers what a client asks about the data; `None` if it asks for something else. With `late`
/// there is a machine that has no service, and no data was ever set: it is too late for it then.
pub(crate) fn answer(
    mmds: &SharedMmds,
    request: &Request,
    late: bool,
) -> Option<Result<Answer, Fault>> {
    let mut mmds = mmds.lock().unwrap_or_else(PoisonError::into_inner);
    let is_ours = matches!(
        request,
        Request::GetMmds | Request::PutMmds(_) | Request::PatchMmds(_)
    );
    if is_ours && late && !mmds.is_initialized() {
        return Some(Err(fault(MmdsError::NotInitialized)));
    }
    let done = match request {
        Request::GetMmds => return Some(show(&mmds)),
        Request::PutMmds(data) => mmds.put(data.clone()),
        Request::PatchMmds(patch) => mmds.patch(patch.clone()),
        _ => return None,
    };
    Some(done.map(|()| Answer::done()).map_err(fault))
}

/// All the data, and an empty object where there is none.
fn show(mmds: &Mmds) -> Result<Answer, Fault> {
    match mmds.data() {
        Some(data) if !data.is_null() => Answer::json(data),
        _ => Answer::json(&json!({})),
    }
}

fn fault(error: MmdsError) -> Fault {
    match error {
        MmdsError::LimitExceeded => {
            Fault::over_limit(format!("MMDS limit exceeded error: {error}"))
        }
        _ => Fault::new(format!("MMDS error: {error}")),
    }
}

/// The service on the interface `id`, if it is to be there.
pub(crate) fn stack_on(
    id: &str,
    config: Option<&MmdsConfig>,
    mmds: &SharedMmds,
) -> Result<Option<Stack>, StackError> {
    let Some(config) = config.filter(|config| config.is_on(id)) else {
        return Ok(None);
    };
    let config = StackConfig {
        address: config.ipv4_address,
        needs_token: config.version == MmdsVersion::V2,
        imds_compat: config.imds_compat,
    };
    Stack::new(config, mmds.clone()).map(Some)
}

/// What the service of all interfaces has counted so far.
pub(crate) fn counts(mmds: &SharedMmds) -> MmdsCounts {
    mmds.lock().unwrap_or_else(PoisonError::into_inner).counts()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn shared(limit: usize) -> SharedMmds {
        Arc::new(Mutex::new(Mmds::new(limit)))
    }

    fn call(mmds: &SharedMmds, request: &Request, late: bool) -> Result<Answer, Fault> {
        answer(mmds, request, late).expect("a request for the service")
    }

    #[test]
    fn data_is_put_patched_and_shown() {
        let mmds = shared(1000);
        let shown = |value| Ok(Answer::json(&value).unwrap());
        let get = |late| call(&mmds, &Request::GetMmds, late);
        assert_eq!(get(false), shown(json!({})));
        let patch = Request::PatchMmds(json!({"b": 1}));
        let early = call(&mmds, &patch, false).unwrap_err();
        assert_eq!(early.status, 400);
        assert!(
            early
                .message
                .ends_with("The MMDS data store is not initialized.")
        );
        call(&mmds, &Request::PutMmds(json!({"a": 1})), false).unwrap();
        for late in [false, true] {
            assert_eq!(call(&mmds, &patch, late), Ok(Answer::done()));
            assert_eq!(get(late), shown(json!({"a": 1, "b": 1})));
        }
        call(&mmds, &Request::PutMmds(json!(null)), true).unwrap();
        assert_eq!(get(true), shown(json!({})));
    }

    #[test]
    fn what_is_too_large_has_its_own_status() {
        let mmds = shared(4);
        for request in [
            Request::PutMmds(json!({"a": 1})),
            Request::PatchMmds(json!({"a": 1})),
        ] {
            call(&mmds, &Request::PutMmds(json!({})), false).unwrap();
            assert_eq!(call(&mmds, &request, false).unwrap_err().status, 413);
        }
    }

    #[test]
    fn a_machine_without_the_service_never_gets_it() {
        let mmds = shared(100);
        for request in [
            Request::GetMmds,
            Request::PutMmds(json!({})),
            Request::PatchMmds(json!({})),
        ] {
            let fault = call(&mmds, &request, true).unwrap_err();
            assert!(
                fault
                    .message
                    .contains("The MMDS data store is not initialized.")
            );
        }
    }

    #[test]
    fn only_the_interfaces_that_were_named_get_a_stack() {
        let config: MmdsConfig =
            serde_json::from_str(r#"{"network_interfaces": ["eth1"]}"#).unwrap();
        let has = |id, config| stack_on(id, config, &shared(10)).unwrap().is_some();
        assert!(has("eth1", Some(&config)));
        assert!(!has("eth0", Some(&config)));
        assert!(!has("eth1", None));
    }
}
