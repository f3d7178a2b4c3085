// SPDX-License-Identifier: Apache-2.0
//! Where the guest's serial output goes.

use std::path::PathBuf;

use serde::Deserialize;
use utoipa::ToSchema;

use super::TokenBucket;

/// The output of the guest's serial port. It is set by a request only: neither the configuration
/// file nor `GET /vm/config` has it, as with Firecracker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// File or named pipe that takes the output, made if it is not there; without one it is
    /// stdout, and stdin is the input.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub serial_out_path: Option<PathBuf>,
    /// A limit on the output; its tokens are bytes, and what is over it is dropped.
    #[serde(default)]
    pub rate_limiter: Option<TokenBucket>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmConfig;
    use crate::request::Section;

    #[test]
    fn all_is_optional_and_nothing_else_is_taken() {
        let read = serde_json::from_str::<Serial>;
        assert_eq!(read("{}").unwrap(), Serial::default());
        let nulls = read(r#"{"serial_out_path": null, "rate_limiter": null}"#);
        assert_eq!(nulls.unwrap(), Serial::default());
        let body = r#"{"serial_out_path": "/s", "rate_limiter":
            {"size": 1024, "one_time_burst": 65536, "refill_time": 1000}}"#;
        let limit = TokenBucket {
            size: 1024,
            one_time_burst: Some(65536),
            refill_time: 1000,
        };
        let expected = Serial {
            serial_out_path: Some("/s".into()),
            rate_limiter: Some(limit),
        };
        assert_eq!(read(body).unwrap(), expected);
        for body in [
            r#"{"path": "/s"}"#,
            r#"{"serial_out_path": 1}"#,
            r#"{"rate_limiter": {"bandwidth": {"size": 1, "refill_time": 1}}}"#,
        ] {
            read(body).unwrap_err();
        }
    }

    #[test]
    fn it_is_kept_but_not_shown_and_no_part_of_a_file() {
        let mut config = VmConfig::default();
        let serial = Serial {
            serial_out_path: Some("/s".into()),
            rate_limiter: None,
        };
        config.apply(Section::Serial(serial.clone())).unwrap();
        assert_eq!(config.serial, Some(serial));
        assert_eq!(config.to_full_json().unwrap().get("serial"), None);
        let file = r#"{"boot-source": {"kernel_image_path": "/k"}, "drives": [],
            "serial": {"serial_out_path": "/s"}}"#;
        let read = VmConfig::from_json(file).unwrap();
        assert_eq!(
            (read.serial, read.unknown_keys),
            (None, vec!["serial".into()])
        );
    }
}
