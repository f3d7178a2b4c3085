// SPDX-License-Identifier: Apache-2.0
//! Requests about the guest's memory, and their answers: which pages were written, which the host
//! holds, and where they are. Firecracker has none of them; E2B's clients use some.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fault::Fault;
use crate::request::Request;
use crate::route::{Parsed, json};

/// How long the pages that are written are counted if nobody says otherwise, in milliseconds.
const DEFAULT_WINDOW_MS: u32 = 1000;
/// The longest time that they are counted, in milliseconds.
const MAX_WINDOW_MS: u32 = 60_000;

/// A request about the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryRequest {
    /// GET /memory/dirty
    GetDirty {
        /// How the pages are to be named.
        form: DirtyForm,
    },
    /// PUT /memory/dirty
    SetTracking(Tracking),
    /// GET /memory/dirty/rate
    GetDirtyRate {
        /// How long to count, in milliseconds: 1 to 60000.
        window_ms: u32,
    },
    /// GET /memory/mappings
    GetMappings,
    /// GET /memory
    GetMemory,
    /// PUT /memory/working-set
    SaveWorkingSet {
        /// The file to write.
        path: PathBuf,
    },
}

/// How pages that were written are named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyForm {
    /// One bit for each page.
    #[default]
    Bitmap,
    /// The first page and the number of pages of each run.
    Ranges,
}

/// What becomes of the notes of which pages were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Tracking {
    /// They are taken from now on.
    On,
    /// They are taken no more.
    Off,
    /// They go on being taken, and those of before are forgotten.
    Reset,
}

/// The body of PUT /memory/dirty.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DirtyTracking {
    /// What becomes of the notes of which pages were written.
    tracking: Tracking,
}

/// The body of PUT /memory/working-set.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorkingSet {
    /// The file to write: a name for each page that the host holds now.
    #[schema(value_type = String)]
    path: PathBuf,
}

/// The answer to GET /memory/dirty: pages that were written since the last snapshot or the last
/// reset, whoever wrote them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DirtyPages {
    /// Whether each page that is written is noted. If not, every page that the host holds counts
    /// as written.
    pub tracking: bool,
    /// The size of a page in bytes: 4096.
    pub page_size: u64,
    /// How many pages were written.
    pub dirty_pages: u64,
    /// A bit for each page, from the lowest of each number on, in the order of the memory file:
    /// region after region, each of whole numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<Vec<u64>>,
    /// The parts of the guest's memory.
    pub regions: Vec<DirtyRegion>,
}

/// A part of the guest's memory without gaps, and what was written in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DirtyRegion {
    /// Where the guest has it.
    pub guest_address: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where the memory file has it.
    pub offset: u64,
    /// How many of its pages were written.
    pub dirty_pages: u64,
    /// Runs of pages that were written: the first, counted from the beginning of the region, and
    /// how many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranges: Option<Vec<[u64; 2]>>,
}

/// The answer to GET /memory/dirty/rate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DirtyRate {
    /// How long it was counted, in milliseconds.
    pub window_ms: u64,
    /// Pages of 4 KiB that were written at least once, per second.
    pub pages_per_second: u64,
    /// The same in bytes.
    pub bytes_per_second: u64,
    /// The same by vCPU, in pages, if the host can tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<Vec<u64>>,
}

/// The answer to GET /memory/mappings: where the guest's memory is in the address space of the
/// machine's process, for who reads it there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Mappings {
    /// The parts of the guest's memory.
    pub mappings: Vec<Mapping>,
}

/// Where a part of the guest's memory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Mapping {
    /// Its address in the machine's process.
    pub base_host_virt_addr: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where the memory file has it.
    pub offset: u64,
    /// The size of its pages in bytes.
    pub page_size: u64,
}

/// The answer to GET /memory: a bit for each page, in the order of the memory file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ResidentPages {
    /// Pages that the host holds.
    pub resident: Vec<u64>,
    /// Those of them that are all zeros.
    pub empty: Vec<u64>,
}

/// Understands a request to a path of the memory; `rest` is what follows `/memory`. `None` if
/// there is no such path.
pub(crate) fn parse_memory<'a>(
    method: &str,
    rest: impl Iterator<Item = &'a str>,
    query: &str,
    body: &[u8],
) -> Result<Option<Parsed>, Fault> {
    let rest: Vec<_> = rest.collect();
    let request = match (method, rest.as_slice()) {
        ("GET", []) => MemoryRequest::GetMemory,
        ("GET", ["mappings"]) => MemoryRequest::GetMappings,
        ("GET", ["dirty"]) => MemoryRequest::GetDirty {
            form: parameter(query, "form", dirty_form)?.unwrap_or_default(),
        },
        ("GET", ["dirty", "rate"]) => MemoryRequest::GetDirtyRate {
            window_ms: parameter(query, "window_ms", window)?.unwrap_or(DEFAULT_WINDOW_MS),
        },
        ("PUT", ["dirty"]) => {
            let DirtyTracking { tracking } = json(body)?;
            MemoryRequest::SetTracking(tracking)
        }
        ("PUT", ["working-set"]) => {
            let WorkingSet { path } = json(body)?;
            MemoryRequest::SaveWorkingSet { path }
        }
        _ => return Ok(None),
    };
    Ok(Some(Request::Memory(request).into()))
}

/// The value of the parameter `name`, which is the only one that there may be in `query`.
fn parameter<T>(
    query: &str,
    name: &str,
    read: fn(&str) -> Result<T, Fault>,
) -> Result<Option<T>, Fault> {
    let mut value = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, text) = pair.split_once('=').unwrap_or((pair, ""));
        if key != name {
            return Err(Fault::new(format!(
                "Unknown parameter `{key}` in the path: only `{name}` is possible."
            )));
        }
        if value.replace(read(text)?).is_some() {
            return Err(Fault::new(format!("`{name}` is in the path twice.")));
        }
    }
    Ok(value)
}

fn dirty_form(text: &str) -> Result<DirtyForm, Fault> {
    match text {
        "bitmap" => Ok(DirtyForm::Bitmap),
        "ranges" => Ok(DirtyForm::Ranges),
        _ => Err(Fault::new(format!(
            "`form` is `{text}`: `bitmap` or `ranges` is possible."
        ))),
    }
}

fn window(text: &str) -> Result<u32, Fault> {
    let window = text.parse().ok();
    window
        .filter(|window| (1..=MAX_WINDOW_MS).contains(window))
        .ok_or_else(|| {
            Fault::new(format!(
                "`window_ms` is `{text}`: 1 to {MAX_WINDOW_MS} milliseconds are possible."
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::parse;

    fn understood(method: &str, path: &str, body: &str) -> MemoryRequest {
        match parse(method, path, body.as_bytes()).unwrap().request {
            Request::Memory(request) => request,
            other => panic!("{method} {path}: {other:?}"),
        }
    }

    fn refusal(method: &str, path: &str, body: &str) -> String {
        let fault = parse(method, path, body.as_bytes()).unwrap_err();
        assert_eq!(fault.status, 400, "{method} {path}");
        fault.message
    }

    #[test]
    fn each_path_is_its_request() {
        let dirty = |form| MemoryRequest::GetDirty { form };
        let rate = |window_ms| MemoryRequest::GetDirtyRate { window_ms };
        for (path, expected) in [
            ("/memory", MemoryRequest::GetMemory),
            ("/memory/", MemoryRequest::GetMemory),
            ("/memory/mappings", MemoryRequest::GetMappings),
            ("/memory/dirty", dirty(DirtyForm::Bitmap)),
            ("/memory/dirty?", dirty(DirtyForm::Bitmap)),
            ("/memory/dirty?form=bitmap", dirty(DirtyForm::Bitmap)),
            ("/memory/dirty/?form=ranges&", dirty(DirtyForm::Ranges)),
            ("/memory/dirty/rate", rate(1000)),
            ("/memory/dirty/rate?window_ms=1", rate(1)),
            ("/memory/dirty/rate?window_ms=60000", rate(60_000)),
        ] {
            assert_eq!(understood("GET", path, ""), expected, "{path}");
        }
        for (name, tracking) in [
            ("On", Tracking::On),
            ("Off", Tracking::Off),
            ("Reset", Tracking::Reset),
        ] {
            let body = format!(r#"{{"tracking": "{name}"}}"#);
            let expected = MemoryRequest::SetTracking(tracking);
            assert_eq!(understood("PUT", "/memory/dirty", &body), expected);
        }
        let path = "w".into();
        assert_eq!(
            understood("PUT", "/memory/working-set", r#"{"path": "w"}"#),
            MemoryRequest::SaveWorkingSet { path }
        );
    }

    #[test]
    fn bad_parameters_are_named() {
        for (query, text) in [
            (
                "dirty?form=Bitmap",
                "`form` is `Bitmap`: `bitmap` or `ranges` is possible.",
            ),
            (
                "dirty?form",
                "`form` is ``: `bitmap` or `ranges` is possible.",
            ),
            (
                "dirty?window_ms=1",
                "Unknown parameter `window_ms` in the path: only `form` is possible.",
            ),
            (
                "dirty?form=bitmap&form=bitmap",
                "`form` is in the path twice.",
            ),
            (
                "dirty/rate?window_ms=0",
                "`window_ms` is `0`: 1 to 60000 milliseconds are possible.",
            ),
            (
                "dirty/rate?window_ms=60001",
                "`window_ms` is `60001`: 1 to 60000 milliseconds are possible.",
            ),
            (
                "dirty/rate?window_ms=-1",
                "`window_ms` is `-1`: 1 to 60000 milliseconds are possible.",
            ),
        ] {
            assert_eq!(refusal("GET", &format!("/memory/{query}"), ""), text);
        }
    }

    #[test]
    fn other_requests_are_unknown_or_refused() {
        for (method, path, body, text) in [
            (
                "GET",
                "/memory/other",
                "",
                "Invalid request method and/or path: GET memory.",
            ),
            (
                "GET",
                "/memory/dirty/x",
                "",
                "Invalid request method and/or path: GET memory.",
            ),
            (
                "PUT",
                "/memory",
                "{}",
                "Invalid request method and/or path: PUT memory.",
            ),
            (
                "PATCH",
                "/memory/dirty",
                "{}",
                "Invalid request method and/or path: PATCH memory.",
            ),
            ("PUT", "/memory/dirty", "", "Empty PUT request."),
        ] {
            assert_eq!(refusal(method, path, body), text, "{method} {path}");
        }
        for (path, body, text) in [
            (
                "/memory/dirty",
                r#"{"tracking": "on"}"#,
                "unknown variant `on`",
            ),
            (
                "/memory/dirty",
                r#"{"tracking": "On", "x": 1}"#,
                "unknown field `x`",
            ),
            ("/memory/working-set", "{}", "missing field `path`"),
        ] {
            let error = refusal("PUT", path, body);
            assert!(error.contains(text), "{path} {body}: {error}");
        }
    }

    /// As a client has no business with a query elsewhere, it changes nothing there.
    #[test]
    fn a_query_means_nothing_elsewhere() {
        assert_eq!(
            parse("GET", "/version?x=1", b"").unwrap(),
            Request::GetVersion.into()
        );
    }
}
