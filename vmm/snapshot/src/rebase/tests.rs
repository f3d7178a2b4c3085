// SPDX-License-Identifier: Apache-2.0
//! Base and diffs together are what the memory was.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const PAGE: usize = 4096;
const PAGES: usize = 64;
const LENGTH: u64 = (PAGES * PAGE) as u64;

/// What each page that was written is filled with.
type Pages = BTreeMap<usize, u8>;

/// Writes a memory file in which only these pages are.
fn write(path: &Path, pages: &Pages) {
    let file = File::create(path).unwrap();
    file.set_len(LENGTH).unwrap();
    for (&page, &fill) in pages {
        file.write_all_at(&[fill; PAGE], (page * PAGE) as u64)
            .unwrap();
    }
}

/// Which pages of a file have data, and with what they are filled.
fn read(path: &Path) -> Pages {
    let file = File::open(path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), LENGTH);
    let ranges = data_ranges(&file, LENGTH).unwrap();
    let pages = ranges.into_iter().flat_map(|range| {
        let [start, end] = [range.start, range.end].map(|at| usize::try_from(at).unwrap());
        assert!(start % PAGE == 0 && end % PAGE == 0);
        start / PAGE..end / PAGE
    });
    let content = fs::read(path).unwrap();
    let filled = pages.map(|page| {
        let bytes = &content[page * PAGE..(page + 1) * PAGE];
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        (page, bytes[0])
    });
    let filled = filled.collect::<Pages>();
    for (page, bytes) in content.chunks(PAGE).enumerate() {
        assert!(filled.contains_key(&page) || bytes.iter().all(|byte| *byte == 0));
    }
    filled
}

fn any_pages() -> impl Strategy<Value = Pages> {
    // A page of zeros in a diff is one that became zeros.
    prop::collection::btree_map(0..PAGES, 0..4_u8, 0..PAGES / 2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn base_and_diffs_are_the_memory(
        base in any_pages(),
        diffs in prop::collection::vec(any_pages(), 1..5),
        in_place in any::<bool>(),
    ) {
        let folder = TempDir::new().unwrap();
        let [base_path, diff_path, out] = ["base", "diff", "out"].map(|name| folder.path().join(name));
        write(&base_path, &base);
        let mut model = base;
        for diff in diffs {
            write(&diff_path, &diff);
            let before = read(&base_path);
            let summary = if in_place {
                rebase(&base_path, &diff_path).unwrap()
            } else {
                let summary = rebase_to(&base_path, &diff_path, &out).unwrap();
                prop_assert_eq!(read(&base_path), before);
                fs::rename(&out, &base_path).unwrap();
                summary
            };
            prop_assert_eq!(summary.bytes, (diff.len() * PAGE) as u64);
            prop_assert_eq!(summary.length, LENGTH);
            prop_assert_eq!(&read(&diff_path), &diff);
            model.extend(diff);
            prop_assert_eq!(&read(&base_path), &model);
        }
        prop_assert!(fs::read_dir(folder.path()).unwrap().count() == 2);
    }
}

#[test]
fn a_merge_can_be_run_again() {
    let folder = TempDir::new().unwrap();
    let [base, diff] = ["base", "diff"].map(|name| folder.path().join(name));
    write(&base, &Pages::from([(0, 1), (1, 1), (5, 1)]));
    write(&diff, &Pages::from([(1, 2), (2, 3)]));
    let first = rebase(&base, &diff).unwrap();
    assert_eq!(rebase(&base, &diff).unwrap(), first);
    assert_eq!(first.ranges, 1);
    assert_eq!(read(&base), Pages::from([(0, 1), (1, 2), (2, 3), (5, 1)]));
}

#[test]
fn the_output_may_be_the_base() {
    let folder = TempDir::new().unwrap();
    let [base, diff] = ["base", "diff"].map(|name| folder.path().join(name));
    write(&base, &Pages::from([(0, 1)]));
    write(&diff, &Pages::from([(1, 2)]));
    rebase_to(&base, &diff, &base).unwrap();
    assert_eq!(read(&base), Pages::from([(0, 1), (1, 2)]));
}

#[test]
fn lengths_that_are_not_of_whole_blocks_work() {
    let folder = TempDir::new().unwrap();
    let [base, diff] = ["base", "diff"].map(|name| folder.path().join(name));
    fs::write(&base, [1; PAGE + 5]).unwrap();
    fs::write(&diff, [2; PAGE + 5]).unwrap();
    rebase(&base, &diff).unwrap();
    assert_eq!(fs::read(&base).unwrap(), [2; PAGE + 5]);
}

#[test]
fn files_that_are_no_pair_are_refused_and_unchanged() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    write(&path("base"), &Pages::from([(0, 1)]));
    fs::hard_link(path("base"), path("link")).unwrap();
    fs::write(path("short"), [2; PAGE]).unwrap();
    let both = |base: &Path, diff: &Path| {
        let in_place = rebase(base, diff).unwrap_err();
        let new = rebase_to(base, diff, &path("out")).unwrap_err();
        assert_eq!(in_place.to_string(), new.to_string());
        in_place
    };
    for same in ["base", "link"] {
        let error = both(&path("base"), &path(same));
        assert!(matches!(error, RebaseError::SameFile(_)));
    }
    let error = both(&path("base"), &path("short")).to_string();
    assert!(error.starts_with("the base has 262144 bytes and the diff 4096: "));
    let error = both(&path("base"), &path("none"));
    assert!(matches!(error, RebaseError::Open { .. }));
    let error = both(Path::new("/dev/null"), &path("base"));
    assert!(matches!(error, RebaseError::NotAFile(_)));
    let error = both(&path("base"), Path::new("/dev/null"));
    assert!(matches!(error, RebaseError::NotAFile(_)));
    let folder_as_output = rebase_to(&path("base"), &path("other"), folder.path());
    assert!(folder_as_output.is_err());
    assert_eq!(read(&path("base")), Pages::from([(0, 1)]));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
}
