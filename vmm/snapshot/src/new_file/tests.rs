// SPDX-License-Identifier: Apache-2.0
//! The old file or the new one, and nothing else in the folder.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::Command;

use tempfile::TempDir;

use super::*;

/// A folder and what is in it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The names in it, in order.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names = names.collect::<Vec<_>>();
        names.sort();
        names
    }
}

fn begin(path: &Path, content: &str) -> NewFile {
    let new = NewFile::create(path).unwrap();
    new.file().write_all(content.as_bytes()).unwrap();
    new
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn the_old_file_is_there_until_the_commit() {
    let folder = Folder::new();
    let path = folder.path("state");
    fs::write(&path, "old").unwrap();
    let new = begin(&path, "new");
    assert_eq!(text(&path), "old");
    assert_eq!(folder.names().len(), 2);
    new.commit().unwrap();
    assert_eq!(text(&path), "new");
    assert_eq!(folder.names(), ["state"]);
}

#[test]
fn what_is_not_committed_leaves_nothing() {
    let folder = Folder::new();
    drop(begin(&folder.path("state"), "new"));
    assert!(folder.names().is_empty());
}

#[test]
fn permissions_stay() {
    let folder = Folder::new();
    let path = folder.path("state");
    for mode in [0o600, 0o640, 0o666] {
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let new = begin(&path, "new");
        let own = new.file().metadata().unwrap().mode();
        assert_eq!(own & 0o777, mode, "while it is written");
        new.commit().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, mode);
    }
}

#[test]
fn the_owner_stays_where_files_can_be_given_away() {
    let folder = Folder::new();
    let path = folder.path("state");
    fs::write(&path, "old").unwrap();
    let own = fs::metadata(&path).unwrap().uid();
    let given = std::os::unix::fs::chown(&path, Some(1234), Some(1234)).is_ok();
    begin(&path, "new").commit().unwrap();
    let expected = if given { 1234 } else { own };
    assert_eq!(fs::metadata(&path).unwrap().uid(), expected);
}

#[test]
fn links_are_followed() {
    let folder = Folder::new();
    fs::create_dir(folder.path("sub")).unwrap();
    symlink("sub/real", folder.path("link")).unwrap();
    symlink("link", folder.path("second")).unwrap();
    // First it points to nothing.
    for content in ["one", "two"] {
        begin(&folder.path("second"), content).commit().unwrap();
        assert_eq!(text(&folder.path("sub/real")), content);
    }
    assert!(folder.path("second").is_symlink());
    assert!(folder.path("link").is_symlink());
    symlink("loop", folder.path("loop")).unwrap();
    assert!(NewFile::create(&folder.path("loop")).is_err());
    assert_eq!(folder.names(), ["link", "loop", "second", "sub"]);
    assert_eq!(fs::read_dir(folder.path("sub")).unwrap().count(), 1);
}

#[test]
fn what_is_no_file_is_refused() {
    let folder = Folder::new();
    let error = |path: &Path| NewFile::create(path).unwrap_err().to_string();
    let pipe = folder.path("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    assert!(error(&pipe).contains("is a named pipe; "));
    assert!(error(folder.0.path()).contains("is a folder; "));
    assert!(error(Path::new("/dev/null")).contains("is a device; "));
    assert!(error(&folder.path("new/")).ends_with("names no file"));
    assert!(error(&folder.path("none/new")).ends_with("cannot be created"));
    assert!(error(Path::new("")).ends_with("cannot be created"));
    assert_eq!(folder.names(), ["pipe"]);
}

#[test]
fn names_of_any_length_work() {
    let folder = Folder::new();
    let path = folder.path(&"n".repeat(255));
    begin(&path, "new").commit().unwrap();
    assert_eq!(text(&path), "new");
}

#[test]
fn only_what_nobody_holds_is_removed() {
    let folder = Folder::new();
    let path = folder.path("state");
    let held = begin(&path, "held");
    let others = [
        ".state.1.2.3.brume-tmp",
        ".state.1.g.brume-tmp",
        ".state.1.2.brume-tm",
        ".state..2.brume-tmp",
        ".states.1.2.brume-tmp",
        "state.1.2.brume-tmp",
    ];
    for name in others {
        fs::write(folder.path(name), "another's").unwrap();
    }
    fs::write(folder.path(".state.1.2.brume-tmp"), "left").unwrap();
    fs::write(folder.path("precious"), "precious").unwrap();
    symlink("precious", folder.path(".state.a.b.brume-tmp")).unwrap();
    let second = begin(&path, "second");
    let names = folder.names();
    assert!(!names.iter().any(|name| name == ".state.1.2.brume-tmp"));
    // A link is not one of ours, whatever its name.
    assert_eq!(text(&folder.path("precious")), "precious");
    assert_eq!(names.len(), others.len() + 4, "{names:?}");
    held.commit().unwrap();
    second.commit().unwrap();
    assert_eq!(text(&path), "second");
}

#[test]
fn a_pair_is_two_files_in_either_one_or_two_folders() {
    let folder = Folder::new();
    fs::create_dir(folder.path("sub")).unwrap();
    for state in ["state", "sub/state"] {
        let memory = begin(&folder.path("memory"), state);
        let state_path = folder.path(state);
        commit_pair(memory, begin(&state_path, "state")).unwrap();
        assert_eq!(text(&folder.path("memory")), state);
        assert_eq!(text(&state_path), "state");
    }
    symlink(".", folder.path("here")).unwrap();
    let same = commit_pair(
        begin(&folder.path("state"), "memory"),
        begin(&folder.path("here/state"), "state"),
    );
    assert!(matches!(same, Err(NewFileError::SameTarget(_))));
    assert_eq!(text(&folder.path("state")), "state");
    assert_eq!(folder.names(), ["here", "memory", "state", "sub"]);
}

#[test]
fn between_the_two_names_the_new_state_is_there() {
    let folder = Folder::new();
    let [memory, state] = ["memory", "state"].map(|name| folder.path(name));
    let state_of = |content| {
        let new = NewFile::create_keeping(&state).unwrap();
        new.file().write_all(content).unwrap();
        new
    };
    commit_pair(begin(&memory, "old"), state_of(b"old")).unwrap();
    // The steps of `commit_pair` up to the moment between the names, and then a crash: the names
    // stay as they are, and nobody holds the locks.
    let (mut first, mut second) = (begin(&memory, "new"), state_of(b"new"));
    first.sync().unwrap();
    second.sync().unwrap();
    first.rename().unwrap();
    let left = second.temporary.take().unwrap();
    drop((first, second));
    let both = || (text(&memory), text(&state), left_behind(&state));
    let torn = ("new".to_owned(), "old".to_owned(), vec![left.clone()]);
    assert_eq!(both(), torn);
    // A later attempt that comes to nothing takes nothing away.
    let (third, fourth) = (begin(&memory, "third"), state_of(b"third"));
    assert_eq!(left_behind(&state).len(), 2);
    drop((third, fourth));
    assert_eq!(both(), torn);
    assert_eq!(text(&left), "new");
    symlink("state", folder.path("link")).unwrap();
    assert_eq!(left_behind(&folder.path("link")), [left]);
    fs::remove_file(folder.path("link")).unwrap();
    // One that succeeds does.
    commit_pair(begin(&memory, "third"), state_of(b"third")).unwrap();
    assert_eq!(folder.names(), ["memory", "state"]);
    assert_eq!(
        left_behind(&folder.path("none/state")),
        Vec::<PathBuf>::new()
    );
}

#[test]
fn a_target_that_cannot_be_replaced_stays() {
    let folder = Folder::new();
    let path = folder.path("state");
    let new = begin(&path, "new");
    fs::create_dir(&path).unwrap();
    assert!(matches!(new.commit(), Err(NewFileError::Rename { .. })));
    assert_eq!(folder.names(), ["state"]);
}

/// What a child process does for the tests below: it writes to a path until it fails, says so and
/// waits to be killed if it is told to. Does nothing unless it is such a child.
#[test]
fn child_writes() {
    let Some(path) = std::env::var_os("BRUME_TEST_CHILD") else {
        return;
    };
    let new = NewFile::create(Path::new(&path)).unwrap();
    let chunk = [1; 4096];
    let written = (0..256).try_for_each(|_| new.file().write_all(&chunk));
    if let Err(error) = written {
        drop(new);
        std::process::exit(error.raw_os_error().unwrap_or(0));
    }
    println!("written");
    thread::sleep(std::time::Duration::from_secs(60));
}

/// Runs `child_writes` from a shell that has run `before`.
fn child(path: &Path, before: &str) -> Command {
    let mut command = Command::new("sh");
    let program = std::env::current_exe().unwrap();
    command
        .args(["-c", &format!("{before}; exec \"$0\" \"$@\"")])
        .arg(program)
        .args(["--exact", "new_file::tests::child_writes", "--nocapture"])
        .env("BRUME_TEST_CHILD", path);
    command
}

#[test]
fn a_file_that_does_not_fit_leaves_nothing() {
    let folder = Folder::new();
    let path = folder.path("state");
    fs::write(&path, "old").unwrap();
    // 512 KiB at the most, of 1 MiB; without the signal, writing fails.
    let limited = child(&path, "trap '' XFSZ; ulimit -f 1024").output();
    assert_eq!(limited.unwrap().status.code(), Some(libc::EFBIG));
    assert_eq!(folder.names(), ["state"]);
    assert_eq!(text(&path), "old");
}

#[test]
fn what_a_killed_process_leaves_is_removed_by_the_next() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    let folder = Folder::new();
    let path = folder.path("state");
    fs::write(&path, "old").unwrap();
    let mut process = child(&path, ":").stdout(Stdio::piped()).spawn().unwrap();
    let output = BufReader::new(process.stdout.take().unwrap());
    let said = output.lines().map_while(Result::ok);
    assert!(said.into_iter().any(|line| line.ends_with("written")));
    // As long as it lives, its file is its own.
    drop(begin(&path, "new"));
    assert_eq!(folder.names().len(), 2);
    process.kill().unwrap();
    process.wait().unwrap();
    assert_eq!(folder.names().len(), 2, "killed, it could not tidy up");
    let new = begin(&path, "new");
    assert_eq!(text(&path), "old");
    new.commit().unwrap();
    assert_eq!(folder.names(), ["state"]);
    assert_eq!(text(&path), "new");
}
