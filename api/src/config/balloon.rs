// SPDX-License-Identifier: Apache-2.0
//! The memory balloon.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ConfigError;

/// A virtio memory balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// How much memory it is to take from the guest, in MiB.
    #[schema(format = Int64, maximum = 4_294_967_295u32)]
    pub amount_mib: u32,
    /// Whether the guest may take memory back when it has none left.
    pub deflate_on_oom: bool,
    /// How often the guest is asked for statistics, in seconds; zero is never.
    #[serde(default)]
    #[schema(maximum = 65_535)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked for all its free pages.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest reports pages as they become free.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl Balloon {
    /// Checks the balloon against the size of the guest's memory in MiB.
    ///
    /// # Errors
    ///
    /// It would be larger than that.
    pub fn validate(&self, memory_mib: u64) -> Result<(), ConfigError> {
        if u64::from(self.amount_mib) > memory_mib {
            return Err(ConfigError::BalloonAmount);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{MachineConfigPatch, VmConfig};
    use crate::request::Section;

    fn section(amount_mib: u32) -> Section {
        Section::Balloon(Balloon {
            amount_mib,
            ..Balloon::default()
        })
    }

    #[test]
    fn size_and_way_out_are_wanted_and_the_rest_is_off() {
        let read = serde_json::from_str::<Balloon>;
        let balloon = read(r#"{"amount_mib": 5, "deflate_on_oom": true}"#).unwrap();
        let expected = json!({
            "amount_mib": 5, "deflate_on_oom": true, "stats_polling_interval_s": 0,
            "free_page_hinting": false, "free_page_reporting": false,
        });
        assert_eq!(serde_json::to_value(balloon).unwrap(), expected);
        for body in [
            r#"{"amount_mib": 5}"#,
            r#"{"deflate_on_oom": true}"#,
            r#"{"amount_mib": 5, "deflate_on_oom": true, "x": 1}"#,
            r#"{"amount_mib": 5, "deflate_on_oom": true, "stats_polling_interval_s": -1}"#,
        ] {
            read(body).unwrap_err();
        }
    }

    #[test]
    fn it_is_no_larger_than_the_memory_whichever_is_set_last() {
        let mut config = VmConfig::default();
        config.apply(section(128)).unwrap();
        let error = config.apply(section(129)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Balloon config error: Amount of pages requested is too large."
        );
        let patch = MachineConfigPatch {
            mem_size_mib: Some(127),
            ..MachineConfigPatch::default()
        };
        let error = config.apply(Section::MachineConfigPatch(patch));
        assert_eq!(
            error.unwrap_err().to_string(),
            "Machine config error: The memory size (MiB) is smaller than the previously set \
             balloon device target size."
        );
        assert_eq!(config.balloon.unwrap().amount_mib, 128);
    }
}
