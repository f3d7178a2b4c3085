// SPDX-License-Identifier: Apache-2.0
//! A configuration that is put together part by part, and how it is shown.

use serde_json::{Value, json};

use super::{ConfigError, CpuTemplate, UNSUPPORTED, VmConfig};
use crate::request::Section;

impl VmConfig {
    /// Sets one part; a device whose id is there already is replaced. Nothing is changed on an
    /// error.
    ///
    /// # Errors
    ///
    /// The machine cannot be as it would be described then.
    pub fn apply(&mut self, section: Section) -> Result<(), ConfigError> {
        let mut next = self.clone();
        let machine = matches!(
            section,
            Section::MachineConfig(_) | Section::MachineConfigPatch(_)
        );
        match section {
            Section::BootSource(boot) => next.boot_source = boot,
            Section::MachineConfig(machine) => next.machine_config = machine,
            Section::MachineConfigPatch(patch) => patch.apply(&mut next.machine_config),
            // One that changes nothing is none.
            Section::Cpu(cpu) => next.cpu_config = Some(cpu).filter(|cpu| !cpu.is_empty()),
            Section::Drive(drive) => {
                put(&mut next.drives, drive, |drive| &drive.drive_id);
            }
            Section::NetworkInterface(interface) => {
                put(&mut next.network_interfaces, interface, |net| &net.iface_id);
            }
            Section::Balloon(balloon) => next.balloon = Some(balloon),
            Section::Entropy(entropy) => next.entropy = Some(entropy),
            Section::Vsock(vsock) => next.vsock = Some(vsock),
            Section::Mmds(mmds) => next.mmds_config = Some(mmds),
            Section::Serial(serial) => next.serial = Some(serial),
            Section::Logger(logger) => next.logger = Some(logger),
            Section::Metrics(metrics) => next.metrics = Some(metrics),
        }
        if machine && next.machine_config.cpu_template == Some(CpuTemplate::None) {
            next.cpu_config = None;
        }
        next.validate().map_err(|error| match error {
            ConfigError::BalloonAmount if machine => ConfigError::MemoryBelowBalloon,
            error => error,
        })?;
        *self = next;
        Ok(())
    }

    /// The whole configuration as Firecracker shows it, where what is not set is `null`.
    ///
    /// # Errors
    ///
    /// A path is no UTF-8.
    pub fn to_full_json(&self) -> Result<Value, ConfigError> {
        let mut value = serde_json::to_value(self)?;
        if let Some(parts) = value.as_object_mut() {
            if self.boot_source.kernel_image_path.as_os_str().is_empty() {
                parts.insert("boot-source".into(), Value::Null);
            }
            for name in UNSUPPORTED {
                let absent = if name == "pmem" {
                    json!([])
                } else {
                    json!(null)
                };
                parts.entry(name).or_insert(absent);
            }
        }
        Ok(value)
    }
}

/// Puts `item` in the place of the one with its id, or at the end.
fn put<T>(items: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|other| id(other) == id(&item)) {
        Some(other) => *other = item,
        None => items.push(item),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BootSource, Drive, MachineConfigPatch};

    fn drive(id: &str, path: &str) -> Section {
        Section::Drive(Drive {
            drive_id: id.into(),
            is_root_device: true,
            path_on_host: Some(path.into()),
            ..Drive::default()
        })
    }

    #[test]
    fn a_part_is_replaced_by_its_id() {
        let mut config = VmConfig::default();
        config.apply(drive("a", "/1")).unwrap();
        config.apply(drive("a", "/2")).unwrap();
        assert_eq!(config.drives.len(), 1);
        assert_eq!(config.drives[0].path_on_host, Some("/2".into()));
    }

    #[test]
    fn a_part_that_does_not_fit_changes_nothing() {
        let mut config = VmConfig::default();
        config.apply(drive("a", "/1")).unwrap();
        let before = config.clone();
        assert!(matches!(
            config.apply(drive("b", "/2")),
            Err(ConfigError::TwoRoots)
        ));
        let patch = MachineConfigPatch {
            mem_size_mib: Some(0),
            ..MachineConfigPatch::default()
        };
        assert!(config.apply(Section::MachineConfigPatch(patch)).is_err());
        assert_eq!(config, before);
    }

    #[test]
    fn a_patch_keeps_what_it_leaves_out() {
        let mut config = VmConfig::default();
        let patch = MachineConfigPatch {
            vcpu_count: Some(3),
            ..MachineConfigPatch::default()
        };
        config.apply(Section::MachineConfigPatch(patch)).unwrap();
        assert_eq!(config.machine_config.vcpu_count, 3);
        assert_eq!(config.machine_config.mem_size_mib, 128);
    }

    #[test]
    fn all_parts_are_shown() {
        let mut config = VmConfig::default();
        let shown = config.to_full_json().unwrap();
        for (part, expected) in [
            ("boot-source", json!(null)),
            ("balloon", json!(null)),
            ("drives", json!([])),
            ("pmem", json!([])),
        ] {
            assert_eq!(shown[part], expected, "{part}");
        }
        let boot = BootSource {
            kernel_image_path: "/k".into(),
            ..BootSource::default()
        };
        config.apply(Section::BootSource(boot)).unwrap();
        assert_eq!(
            config.to_full_json().unwrap()["boot-source"],
            json!({"kernel_image_path": "/k", "initrd_path": null, "boot_args": null})
        );
    }
}
