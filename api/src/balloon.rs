// SPDX-License-Identifier: Apache-2.0
//! Requests to the balloon, and their answers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fault::Fault;
use crate::request::{Request, Section};
use crate::route::{Parsed, configure, json};

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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// How much memory it is to take from the guest, in MiB.
    #[schema(format = Int64, maximum = 4_294_967_295u32)]
    pub amount_mib: u32,
}

/// A new pace of the statistics.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsPatch {
    /// How often the guest is asked, in seconds.
    #[schema(maximum = 65_535)]
    pub stats_polling_interval_s: u16,
}

/// How a run of hints is to end.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
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

/// The answer to GET /balloon/statistics. What the guest has not told is left out.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct BalloonStatistics {
    /// Pages of 4 KiB that the balloon is to have.
    #[schema(format = Int64)]
    target_pages: u32,
    /// Pages of 4 KiB that it has.
    #[schema(format = Int64)]
    actual_pages: u32,
    /// The same as `target_pages` in MiB.
    target_mib: u32,
    /// The same as `actual_pages` in MiB.
    actual_mib: u32,
    #[serde(flatten)]
    told: GuestStatistics,
}

/// What the guest tells, in the order of the tags (virtio 1.3, section 5.5.6.3, and Linux).
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
struct GuestStatistics {
    /// Memory swapped in, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_in: Option<u64>,
    /// Memory swapped out, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_out: Option<u64>,
    /// Page faults that read from a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    major_faults: Option<u64>,
    /// Page faults that did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    minor_faults: Option<u64>,
    /// Memory that is not used, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    free_memory: Option<u64>,
    /// All memory, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    total_memory: Option<u64>,
    /// Memory that a program could get without swapping, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    available_memory: Option<u64>,
    /// Memory that caches of disks hold, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_caches: Option<u64>,
    /// Huge pages that were given out.
    #[serde(skip_serializing_if = "Option::is_none")]
    hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be given out.
    #[serde(skip_serializing_if = "Option::is_none")]
    hugetlb_failures: Option<u64>,
    /// Processes that were ended for want of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    oom_kill: Option<u64>,
    /// Times a process had to wait for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    alloc_stall: Option<u64>,
    /// Pages that were looked at in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    async_scan: Option<u64>,
    /// Pages that were looked at while a process waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    direct_scan: Option<u64>,
    /// Pages that were taken back in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    async_reclaim: Option<u64>,
    /// Pages that were taken back while a process waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    direct_reclaim: Option<u64>,
}

impl BalloonStatistics {
    /// Sizes are in pages of 4 KiB; `values` are the guest's, by their tag.
    pub fn new(target_pages: u32, actual_pages: u32, values: [Option<u64>; 16]) -> Self {
        let [
            swap_in,
            swap_out,
            major_faults,
            minor_faults,
            free_memory,
            total_memory,
            available_memory,
            disk_caches,
            hugetlb_allocations,
            hugetlb_failures,
            oom_kill,
            alloc_stall,
            async_scan,
            direct_scan,
            async_reclaim,
            direct_reclaim,
        ] = values;
        let told = GuestStatistics {
            swap_in,
            swap_out,
            major_faults,
            minor_faults,
            free_memory,
            total_memory,
            available_memory,
            disk_caches,
            hugetlb_allocations,
            hugetlb_failures,
            oom_kill,
            alloc_stall,
            async_scan,
            direct_scan,
            async_reclaim,
            direct_reclaim,
        };
        Self {
            target_pages,
            actual_pages,
            target_mib: target_pages / PAGES_PER_MIB,
            actual_mib: actual_pages / PAGES_PER_MIB,
            told,
        }
    }
}

/// The answer to GET /balloon/hinting/status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct BalloonHinting {
    /// What the guest was told last: 0 nothing yet, 1 done, others the number of a run.
    #[schema(format = Int64)]
    pub host_cmd: u32,
    /// What the guest has confirmed last: 0 is the end of a run.
    #[schema(format = Int64)]
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
