// SPDX-License-Identifier: Apache-2.0
//! The data that the metadata service has from the start.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use brume_mmds::{Mmds, SharedMmds};

use crate::exit::Failure;

/// A service with what is in the JSON file at `path`, if there is one, and room for `limit` bytes.
///
/// # Errors
///
/// The file cannot be read, is no JSON, or is too large.
pub(crate) fn load(path: Option<&Path>, limit: usize) -> Result<SharedMmds, Failure> {
    let mut mmds = Mmds::new(limit);
    if let Some(path) = path {
        let failure = |reason: String| {
            Failure::Arguments(format!(
                "the metadata in {} cannot be used: {reason}",
                path.display()
            ))
        };
        let text = fs::read(path).map_err(|error| failure(error.to_string()))?;
        let data = serde_json::from_slice(&text).map_err(|error| failure(error.to_string()))?;
        mmds.put(data).map_err(|_| {
            failure(format!(
                "it has more than {limit} bytes; --mmds-size-limit says how many it may have"
            ))
        })?;
    }
    Ok(Arc::new(Mutex::new(mmds)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_the_data() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(br#"{"a": 1}"#).unwrap();
        let mmds = load(Some(file.path()), 7).unwrap();
        assert_eq!(mmds.lock().unwrap().data().unwrap()["a"], 1);
        assert!(!load(None, 7).unwrap().lock().unwrap().is_initialized());

        let refusal = |limit| load(Some(file.path()), limit).unwrap_err().text();
        assert!(refusal(6).contains("more than 6 bytes"));
        file.as_file().set_len(5).unwrap();
        let text = load(Some(file.path()), 7).unwrap_err().text();
        assert!(text.contains("EOF while parsing"), "{text}");
        let text = load(Some(Path::new("/nothing/here")), 7)
            .unwrap_err()
            .text();
        assert!(text.contains("/nothing/here") && text.contains("No such file"));
    }
}
