// SPDX-License-Identifier: Apache-2.0
//! How much memory a target can still have: of its host, and of the control groups that it is in.
//!
//! Control groups have limits in either version of their files, and each group up to the root counts.

use std::fs;
use std::path::Path;

/// Where Linux tells how much memory can still be used.
const MEMINFO: &str = "/proc/meminfo";
/// Where it tells which control groups this process is in.
const GROUPS: &str = "/proc/self/cgroup";
/// Where the files of control groups are, as hosts have them.
const ROOT: &str = "/sys/fs/cgroup";

/// The files of one version of control groups.
struct Version {
    /// Where its tree is below [`ROOT`].
    folder: &'static str,
    limit: &'static str,
    used: &'static str,
    /// In `memory.stat`: what is held of files, and given back when it is wanted.
    cached: [&'static str; 2],
}

const FIRST: Version = Version {
    folder: "memory",
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cached: ["total_active_file", "total_inactive_file"],
};
const SECOND: Version = Version {
    folder: "",
    limit: "memory.max",
    used: "memory.current",
    cached: ["active_file", "inactive_file"],
};

/// How much memory this process can still have, in bytes, if the host tells.
pub(super) fn available() -> Option<u64> {
    let groups = fs::read_to_string(GROUPS).unwrap_or_default();
    let host = in_host(&fs::read_to_string(MEMINFO).ok()?);
    let group = in_groups(&groups, Path::new(ROOT));
    host.into_iter().chain(group).min()
}

fn in_host(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let line = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// What the tightest of `groups`, and of those around them, leaves.
fn in_groups(groups: &str, root: &Path) -> Option<u64> {
    let left = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let version = match controllers {
            "" => SECOND,
            _ if controllers.split(',').any(|name| name == "memory") => FIRST,
            _ => return None,
        };
        let tree = root.join(version.folder);
        let group = tree.join(path.trim_start_matches('/'));
        let around = group.ancestors().take_while(|path| path.starts_with(&tree));
        around.filter_map(|path| left_in(path, &version)).min()
    });
    left.min()
}

/// What a group leaves; none if it has no limit.
fn left_in(group: &Path, version: &Version) -> Option<u64> {
    let number = |name| -> Option<u64> {
        let text = fs::read_to_string(group.join(name)).ok()?;
        text.trim().parse().ok()
    };
    // Without one, it is the word `max` or nearly all numbers that there are.
    let limit = number(version.limit).filter(|&limit| limit < 1 << 60)?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cached = stat.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        let value: u64 = value.parse().ok()?;
        version.cached.contains(&name).then_some(value)
    });
    let used = number(version.used)?.saturating_sub(cached.sum());
    Some(limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_what_it_says() {
        let text = "MemTotal:       24105000 kB\nMemAvailable:   2 kB\n";
        assert_eq!(in_host(text), Some(2048));
        assert_eq!(in_host("MemTotal: 1 kB\n"), None);
    }

    fn write(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn the_tightest_group_counts_whichever_version_it_is_of() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(in_groups("0::/a/b\n4:memory:/c\n1:cpu:/\n", root), None);
        let stat = "anon 5\nactive_file 20\ninactive_file 10";
        write(
            &root.join("a"),
            &[
                ("memory.max", "1000"),
                ("memory.current", "400"),
                ("memory.stat", stat),
            ],
        );
        write(
            &root.join("a/b"),
            &[("memory.max", "max"), ("memory.current", "300")],
        );
        // Files that are not used can be given back.
        assert_eq!(in_groups("0::/a/b\n", root), Some(630));
        write(
            &root.join("memory/c"),
            &[
                ("memory.limit_in_bytes", "700"),
                ("memory.usage_in_bytes", "800"),
            ],
        );
        write(
            &root.join("memory"),
            &[
                ("memory.limit_in_bytes", "9223372036854771712"),
                ("memory.usage_in_bytes", "800"),
            ],
        );
        assert_eq!(in_groups("4:hugetlb,memory:/c\n0::/a/b\n", root), Some(0));
        assert_eq!(in_groups("4:memory:/\n", root), None);
    }
}
