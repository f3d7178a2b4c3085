// SPDX-License-Identifier: Apache-2.0
//! The entropy device.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::RateLimiter;

/// A virtio entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits on what the guest takes.
    #[serde(default, deserialize_with = "super::object::object")]
    pub rate_limiter: Option<RateLimiter>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{TokenBucket, VmConfig};
    use crate::request::Section;

    #[test]
    fn a_limiter_is_optional_in_all_its_parts() {
        let read = serde_json::from_str::<Entropy>;
        assert_eq!(read("{}").unwrap(), Entropy::default());
        let limited = read(r#"{"rate_limiter": {"ops": {"size": 5, "refill_time": 100}}}"#);
        let ops = TokenBucket {
            size: 5,
            one_time_burst: None,
            refill_time: 100,
        };
        let limiter = limited.unwrap().rate_limiter.unwrap();
        assert_eq!((limiter.bandwidth, limiter.ops), (None, Some(ops)));
        for body in [
            r#"{"some_id": 4}"#,
            r#"{"rate_limiter": {"ops": {"size": 5}}}"#,
            r#"{"rate_limiter": {"ops": {"refill_time": 5}}}"#,
            r#"{"rate_limiter": {"bytes": null}}"#,
        ] {
            read(body).unwrap_err();
        }
    }

    #[test]
    fn it_is_shown_with_all_its_fields_and_absent_as_null() {
        let mut config = VmConfig::default();
        assert_eq!(config.to_full_json().unwrap()["entropy"], json!(null));
        config.apply(Section::Entropy(Entropy::default())).unwrap();
        let shown = config.to_full_json().unwrap();
        assert_eq!(shown["entropy"], json!({"rate_limiter": null}));
    }
}
