// SPDX-License-Identifier: Apache-2.0
//! The data of the service: one JSON value of bounded size.

use serde_json::{Map, Value};
use thiserror::Error;

use crate::counts::MmdsCounts;
use crate::token::Tokens;

/// The most bytes that the data may have as JSON, unless somebody says otherwise.
const DEFAULT_LIMIT: usize = 51200;

/// Why the data cannot be changed or read. The texts are Firecracker's, whose clients look for
/// them.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MmdsError {
    /// The data would be larger than its limit.
    #[error("The MMDS patch request doesn't fit.")]
    LimitExceeded,
    /// A patch came before there was anything.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    /// There is nothing at this path.
    #[error("The MMDS resource does not exist.")]
    NotFound,
    /// What is there has no form as text.
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    UnsupportedType,
}

/// How a value is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// As JSON.
    Json,
    /// As EC2's metadata service does: the keys of an object, one in a line, and strings as they
    /// are. Other values have no such form.
    Imds,
}

/// The data and the tokens that open it.
#[derive(Debug)]
pub struct Mmds {
    /// Nothing before the first [`Mmds::put`].
    data: Option<Value>,
    limit: usize,
    pub(crate) tokens: Tokens,
    pub(crate) counts: MmdsCounts,
}

impl Default for Mmds {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl Mmds {
    /// A service without data, which may have up to `limit` bytes as JSON.
    pub fn new(limit: usize) -> Self {
        Self {
            data: None,
            limit,
            tokens: Tokens::default(),
            counts: MmdsCounts::default(),
        }
    }

    /// What was counted so far.
    pub fn counts(&self) -> MmdsCounts {
        self.counts
    }

    /// Whether there has been a [`Mmds::put`].
    pub fn is_initialized(&self) -> bool {
        self.data.is_some()
    }

    /// The whole data; `None` before the first [`Mmds::put`].
    pub fn data(&self) -> Option<&Value> {
        self.data.as_ref()
    }

    /// Replaces the data.
    ///
    /// # Errors
    ///
    /// It is larger than the limit; nothing is changed then.
    pub fn put(&mut self, data: Value) -> Result<(), MmdsError> {
        if encoded_len(&data) > self.limit {
            return Err(MmdsError::LimitExceeded);
        }
        self.data = Some(data);
        Ok(())
    }

    /// Merges `patch` into the data (RFC 7396).
    ///
    /// # Errors
    ///
    /// There is no data yet, or it would be larger than the limit; nothing is changed then.
    pub fn patch(&mut self, patch: Value) -> Result<(), MmdsError> {
        let mut data = self.data.clone().ok_or(MmdsError::NotInitialized)?;
        merge(&mut data, patch);
        self.put(data)
    }

    /// What is at `path`, such as `/latest/meta-data`; a slash at its end means nothing.
    pub(crate) fn get(&self, path: &str, format: Format) -> Result<String, MmdsError> {
        let data = self.data.as_ref().unwrap_or(&Value::Null);
        let pointer = path.strip_suffix('/').unwrap_or(path);
        let value = data.pointer(pointer).ok_or(MmdsError::NotFound)?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Imds, Value::String(text)) => Ok(text.clone()),
            (Format::Imds, Value::Object(map)) => Ok(list(map)),
            (Format::Imds, _) => Err(MmdsError::UnsupportedType),
        }
    }
}

/// The keys of `map`, one in a line; those that lead further end in a slash.
fn list(map: &Map<String, Value>) -> String {
    let mut text = String::new();
    for (key, value) in map {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(key);
        if value.is_object() {
            text.push('/');
        }
    }
    text
}

/// RFC 7396, section 2. It goes no deeper than `patch`, whose depth the JSON parser bounds.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(changes) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(members) = target else {
        return;
    };
    for (key, change) in changes {
        if change.is_null() {
            members.remove(&key);
        } else {
            merge(members.entry(key).or_insert(Value::Null), change);
        }
    }
}

/// How many bytes `value` has as JSON, without writing it down.
fn encoded_len(value: &Value) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0 += data.len();
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // Counting cannot fail, and a value always has a JSON form.
    let _ = serde_json::to_writer(&mut count, value);
    count.0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_patch_merges_as_rfc_7396_says() {
        // The examples of its appendix A.
        for (original, patch, result) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (
                json!({"a":"b","b":"c"}),
                json!({"a":null}),
                json!({"b":"c"}),
            ),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (
                json!({"a":{"b":"c"}}),
                json!({"a":{"b":"d","c":null}}),
                json!({"a":{"b":"d"}}),
            ),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (
                json!({}),
                json!({"a":{"bb":{"ccc":null}}}),
                json!({"a":{"bb":{}}}),
            ),
        ] {
            let mut mmds = Mmds::default();
            mmds.put(original.clone()).unwrap();
            mmds.patch(patch.clone()).unwrap();
            assert_eq!(mmds.data(), Some(&result), "{original} and {patch}");
        }
    }

    #[test]
    fn a_patch_needs_something_to_merge_into() {
        let mut mmds = Mmds::default();
        assert_eq!(mmds.patch(json!({"a": 1})), Err(MmdsError::NotInitialized));
        assert!(!mmds.is_initialized());
        mmds.put(Value::Null).unwrap();
        mmds.patch(json!({"a": 1})).unwrap();
        assert_eq!(mmds.data(), Some(&json!({"a": 1})));
    }

    #[test]
    fn what_is_too_large_changes_nothing() {
        let mut mmds = Mmds::new(10);
        mmds.put(json!({"a": "bc"})).unwrap();
        for (result, what) in [
            (mmds.put(json!({"a": "bcd"})), "put"),
            (mmds.patch(json!({"b": 1})), "patch"),
        ] {
            assert_eq!(result, Err(MmdsError::LimitExceeded), "{what}");
        }
        assert_eq!(mmds.data(), Some(&json!({"a": "bc"})));
        // The limit is for what is left, not for what was sent.
        mmds.patch(json!({"a": null, "a_key_that_is_not_there": null}))
            .unwrap();
    }

    #[test]
    fn values_are_found_by_their_path_in_both_forms() {
        let mut mmds = Mmds::default();
        let data = json!({"age": 43, "list": ["x", {}], "name": {"first": "J"}, "none": null,
            "a/b": "slash", "empty": ""});
        mmds.put(data.clone()).unwrap();
        for (path, json, imds) in [
            (
                "/",
                data.to_string(),
                Ok("a/b\nage\nempty\nlist\nname/\nnone"),
            ),
            ("/age", "43".into(), Err(MmdsError::UnsupportedType)),
            ("/age/", "43".into(), Err(MmdsError::UnsupportedType)),
            ("/list/0", "\"x\"".into(), Ok("x")),
            ("/list/1", "{}".into(), Ok("")),
            (
                "/list",
                "[\"x\",{}]".into(),
                Err(MmdsError::UnsupportedType),
            ),
            ("/name", "{\"first\":\"J\"}".into(), Ok("first")),
            ("/none", "null".into(), Err(MmdsError::UnsupportedType)),
            ("/a~1b", "\"slash\"".into(), Ok("slash")),
            ("/empty", "\"\"".into(), Ok("")),
        ] {
            assert_eq!(mmds.get(path, Format::Json), Ok(json), "{path}");
            assert_eq!(
                mmds.get(path, Format::Imds),
                imds.map(str::to_owned),
                "{path}"
            );
        }
        for path in ["/nothing", "/list/2", "/name/first/x", "age", "/name//"] {
            assert_eq!(mmds.get(path, Format::Json), Err(MmdsError::NotFound));
        }
    }

    #[test]
    fn without_data_there_is_null() {
        let mmds = Mmds::default();
        assert_eq!(mmds.get("/", Format::Json), Ok("null".into()));
        assert_eq!(mmds.get("/", Format::Imds), Err(MmdsError::UnsupportedType));
        assert_eq!(mmds.get("/a", Format::Json), Err(MmdsError::NotFound));
    }
}
