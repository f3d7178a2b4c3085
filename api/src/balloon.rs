// SPDX-License-Identifier: Apache-2.0
//! Requests to the balloon, and their answers.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::fault::Fault;
use crate::request::{Request, Section};
use crate::route::{Parsed, configure, json};

/// Names of the statistics, in the order of their tags (virtio 1.3, section 5.5.6.3, and Linux).
const STATISTICS: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];

/// Pages of a balloon have 4 KiB.
const PAGES_PER_MIB: u32 = 256;

/// A request to the balloon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BalloonRequest {
    /// GET /balloon
    Get,
    /// PATCH /balloon
    SetAmount(BalloonPatch),
    /// GET /balloon/statistics
    GetStatistics,
    /// PATCH /balloon/statistics
    SetStatistics(BalloonStatisticsPatch),
    /// PATCH /balloon/hinting/start
    StartHinting(HintingStart),
    /// GET /balloon/hinting/status
    GetHinting,
    /// PATCH /balloon/hinting/stop
    StopHinting,
}

/// A new size of the balloon.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// How much memory it is to take from the guest, in MiB.
    pub amount_mib: u32,
}

/// A new pace of the statistics.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsPatch {
    /// How often the guest is asked, in seconds.
    pub stats_polling_interval_s: u16,
}

/// How a run of hints is to end.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct HintingStart {
    /// Whether the guest may use its free pages again as soon as it has named them all.
    #[serde(default = "default_acknowledge")]
    pub acknowledge_on_stop: bool,
}

impl Default for HintingStart {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: default_acknowledge(),
        }
    }
}

fn default_acknowledge() -> bool {
    true
}

/// The answer to [`BalloonRequest::GetStatistics`]. What the guest has not told is left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BalloonStatistics {
    target_pages: u32,
    actual_pages: u32,
    target_mib: u32,
    actual_mib: u32,
    #[serde(flatten)]
    told: Map<String, Value>,
}

impl BalloonStatistics {
    /// Sizes are in pages of 4 KiB; `values` are the guest's, by their tag.
    pub fn new(target_pages: u32, actual_pages: u32, values: [Option<u64>; 16]) -> Self {
        let told = STATISTICS
            .iter()
            .zip(values)
            .filter_map(|(name, value)| Some(((*name).into(), value?.into())));
        Self {
            target_pages,
            actual_pages,
            target_mib: target_pages / PAGES_PER_MIB,
            actual_mib: actual_pages / PAGES_PER_MIB,
            told: told.collect(),
        }
    }
}

/// The answer to [`BalloonRequest::GetHinting`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BalloonHinting {
    /// What the guest was told last: 0 nothing yet, 1 done, others the number of a run.
    pub host_cmd: u32,
    /// What the guest has confirmed last: 0 is the end of a run.
    pub guest_cmd: Option<u32>,
}

/// Understands a request to a path of the balloon; `rest` is what follows `/balloon`.
pub(crate) fn parse_balloon<'a>(
    method: &str,
    mut rest: impl Iterator<Item = &'a str>,
    body: &[u8],
) -> Result<Parsed, Fault> {
    let request = match (method, rest.next()) {
        ("PUT", _) => return Ok(configure(Section::Balloon(json(body)?))),
        (_, Some("hinting")) => parse_hinting(method, rest.next(), body)?,
        ("GET", None) => BalloonRequest::Get,
        ("GET", Some("statistics")) => BalloonRequest::GetStatistics,
        ("GET", Some(other)) => return Err(unrecognized(method, other)),
        _ if body.is_empty() => return Err(Fault::new("Empty PATCH request.")),
        (_, Some("statistics")) => BalloonRequest::SetStatistics(json(body)?),
        _ => BalloonRequest::SetAmount(json(body)?),
    };
    Ok(Request::Balloon(request).into())
}

fn parse_hinting(method: &str, action: Option<&str>, body: &[u8]) -> Result<BalloonRequest, Fault> {
    match (method, action) {
        ("GET", Some("status")) => Ok(BalloonRequest::GetHinting),
        ("PATCH", Some("start")) if body.is_empty() => {
            Ok(BalloonRequest::StartHinting(HintingStart::default()))
        }
        ("PATCH", Some("start")) => Ok(BalloonRequest::StartHinting(json(body)?)),
        ("PATCH", Some("stop")) => Ok(BalloonRequest::StopHinting),
        _ => {
            let path = format!("/hinting/{}", action.unwrap_or_default());
            Err(unrecognized(method, &path))
        }
    }
}

fn unrecognized(method: &str, path: &str) -> Fault {
    Fault::new(format!("Unrecognized {method} request path `{path}`."))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::route::parse;

    fn understood(method: &str, path: &str, body: &str) -> BalloonRequest {
        match parse(method, path, body.as_bytes()).unwrap().request {
            Request::Balloon(request) => request,
            other => panic!("{method} {path}: {other:?}"),
        }
    }

    #[test]
    fn each_path_is_its_request() {
        let hints = |acknowledge_on_stop| {
            BalloonRequest::StartHinting(HintingStart {
                acknowledge_on_stop,
            })
        };
        let amount = BalloonRequest::SetAmount(BalloonPatch { amount_mib: 5 });
        let pace = BalloonRequest::SetStatistics(BalloonStatisticsPatch {
            stats_polling_interval_s: 2,
        });
        for (method, path, body, expected) in [
            ("GET", "", "", BalloonRequest::Get),
            ("GET", "/statistics", "", BalloonRequest::GetStatistics),
            ("GET", "/hinting/status", "", BalloonRequest::GetHinting),
            ("PATCH", "", r#"{"amount_mib": 5}"#, amount),
            (
                "PATCH",
                "/statistics",
                r#"{"stats_polling_interval_s": 2}"#,
                pace,
            ),
            ("PATCH", "/hinting/start", "", hints(true)),
            ("PATCH", "/hinting/start", "{}", hints(true)),
            (
                "PATCH",
                "/hinting/start",
                r#"{"acknowledge_on_stop": false}"#,
                hints(false),
            ),
            ("PATCH", "/hinting/stop", "", BalloonRequest::StopHinting),
            ("PATCH", "/hinting/stop", "{}", BalloonRequest::StopHinting),
        ] {
            let path = format!("/balloon{path}");
            assert_eq!(understood(method, &path, body), expected, "{method} {path}");
        }
        let body = r#"{"amount_mib": 1, "deflate_on_oom": true}"#;
        let parsed = parse("PUT", "/balloon", body.as_bytes()).unwrap();
        assert!(matches!(parsed.request, Request::Configure(_)));
    }

    #[test]
    fn refusals_have_firecrackers_texts() {
        for (method, path, text) in [
            ("GET", "/other", "Unrecognized GET request path `other`."),
            (
                "GET",
                "/hinting",
                "Unrecognized GET request path `/hinting/`.",
            ),
            (
                "GET",
                "/hinting/other",
                "Unrecognized GET request path `/hinting/other`.",
            ),
            (
                "PATCH",
                "/hinting",
                "Unrecognized PATCH request path `/hinting/`.",
            ),
            (
                "PATCH",
                "/hinting/other",
                "Unrecognized PATCH request path `/hinting/other`.",
            ),
            ("PATCH", "", "Empty PATCH request."),
            ("PATCH", "/statistics", "Empty PATCH request."),
            ("PUT", "", "Empty PUT request."),
            (
                "DELETE",
                "",
                "Invalid request method and/or path: DELETE balloon.",
            ),
        ] {
            let fault = parse(method, &format!("/balloon{path}"), b"").unwrap_err();
            assert_eq!(
                (fault.status, &*fault.message),
                (400, text),
                "{method} {path}"
            );
        }
        for (path, body) in [
            ("", r#"{"amount_mib": -1}"#),
            ("", r#"{"amount_mib": 1, "stats_polling_interval_s": 1}"#),
            ("", "{}"),
            ("/statistics", r#"{"amount_mib": 1}"#),
            ("/statistics", r#"{"stats_polling_interval_s": 65536}"#),
            ("/hinting/start", r#"{"acknowledge_on_stop": "yes"}"#),
        ] {
            let fault = parse("PATCH", &format!("/balloon{path}"), body.as_bytes());
            let text = fault.unwrap_err().message;
            assert!(
                text.starts_with("An error occurred when deserializing"),
                "{text}"
            );
        }
    }

    #[test]
    fn only_what_the_guest_told_is_shown() {
        let mut values = [None; 16];
        (values[0], values[4], values[15]) = (Some(1), Some(u64::MAX), Some(3));
        let shown = serde_json::to_value(BalloonStatistics::new(513, 255, values)).unwrap();
        let expected = json!({
            "target_pages": 513, "actual_pages": 255, "target_mib": 2, "actual_mib": 0,
            "swap_in": 1, "free_memory": u64::MAX, "direct_reclaim": 3,
        });
        assert_eq!(shown, expected);
    }
}
