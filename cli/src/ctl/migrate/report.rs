// SPDX-License-Identifier: Apache-2.0
//! A move as a page for a browser: one file that asks for nothing else, neither from the network
//! nor from this host.

mod chart;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use brume_api::{MigrationMode, MigrationPass, MigrationStatus};

use super::text;
use crate::amount;
use crate::exit::Failure;

/// Colours are readable on both grounds; the ground is the reader's choice.
const STYLE: &str = include_str!("report/style.css");

/// The file that the page goes to. Until it is whole, it has another name.
pub(super) struct Report {
    file: File,
    path: PathBuf,
    unfinished: PathBuf,
    finished: bool,
}

impl Report {
    /// Makes the file that will be the one at `path`.
    ///
    /// # Errors
    ///
    /// Nothing can be written there.
    pub(super) fn create(path: &Path) -> Result<Self, Failure> {
        let failed = |source| Failure::Folder {
            path: path.into(),
            source,
        };
        let name = path.file_name();
        let name = name.ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?;
        if let Ok(there) = fs::metadata(path)
            && !there.is_file()
        {
            // A device or a folder is not to be replaced.
            return Err(failed(io::Error::other("it is there and no file")));
        }
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        let unfinished = path.with_file_name(hidden);
        Ok(Self {
            file: File::create_new(&unfinished).map_err(failed)?,
            path: path.into(),
            unfinished,
            finished: false,
        })
    }

    /// Writes the page, which is there as a whole or not at all.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub(super) fn finish(mut self, status: &MigrationStatus) -> Result<(), Failure> {
        let write = |report: &mut Self| {
            report.file.write_all(page(status).as_bytes())?;
            report.file.sync_all()?;
            fs::rename(&report.unfinished, &report.path)
        };
        write(&mut self).map_err(|source| Failure::Folder {
            path: self.path.clone(),
            source,
        })?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if !self.finished {
            // It would be there for nobody; if it stays, that is no harm either.
            let _ = fs::remove_file(&self.unfinished);
        }
    }
}

/// The page.
fn page(status: &MigrationStatus) -> String {
    let title = escape(&title(status));
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    );
    page.push_str(&facts(status));
    if let Some(downtime) = &status.downtime {
        let total = amount::micros(downtime.total_us);
        section(
            &mut page,
            &format!("Downtime: {total}"),
            &chart::downtime(downtime),
        );
    }
    if !status.passes.is_empty() {
        section(
            &mut page,
            "Passes over the memory",
            &chart::passes(&status.passes),
        );
        page.push_str(&table(&status.passes));
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn section(page: &mut String, heading: &str, content: &str) {
    // A string takes all that is written to it.
    let _ = write!(page, "<h2>{}</h2>\n{content}", escape(heading));
}

fn title(status: &MigrationStatus) -> String {
    let peer = status.peer.as_deref().unwrap_or("another process");
    format!("Move to {peer}: {}", text::phase(status.phase))
}

/// What is known of the whole.
fn facts(status: &MigrationStatus) -> String {
    let mode = match status.mode {
        MigrationMode::PreCopy => "pre-copy",
        MigrationMode::PostCopy => "post-copy",
        MigrationMode::Hybrid => "hybrid",
    };
    let mut rows = vec![
        ("Guest", text::place(status)),
        ("Mode", mode.into()),
        ("Time", amount::seconds(status.elapsed_ms)),
        ("Memory", amount::bytes(status.memory_bytes)),
        ("On the wire", amount::bytes(status.bytes)),
        ("Pages sent", status.pages.to_string()),
        ("Pages of zeros, not sent", status.zero_pages.to_string()),
        ("Allowed downtime", amount::micros(status.max_downtime_us)),
    ];
    if let Some(downtime) = &status.downtime {
        rows.push(("Downtime", amount::micros(downtime.total_us)));
    }
    if status.bandwidth_limit > 0 {
        rows.push(("Bandwidth limit", amount::rate(status.bandwidth_limit)));
    }
    if status.compression_ratio_percent > 100 {
        let ratio = amount::ratio(status.compression_ratio_percent);
        rows.push(("Pages made smaller", ratio));
    }
    if status.faults > 0 {
        rows.push(("Page faults served", status.faults.to_string()));
    }
    if let Some(error) = &status.error {
        rows.push(("Because", error.clone()));
    }
    let mut text = String::from("<table class=\"facts\">\n");
    for (name, value) in rows {
        let value = escape(&value);
        let _ = writeln!(
            text,
            "<tr><th scope=\"row\">{name}</th><td>{value}</td></tr>"
        );
    }
    text.push_str("</table>\n");
    text
}

/// The numbers of each pass.
fn table(passes: &[MigrationPass]) -> String {
    const COLUMNS: [&str; 9] = [
        "Pass",
        "Pages",
        "Sent",
        "Left for the next",
        "On the wire",
        "Time",
        "Bandwidth",
        "Written meanwhile",
        "Slowed by",
    ];
    let mut text = String::from("<div class=\"wide\"><table>\n<tr>");
    for column in COLUMNS {
        let _ = write!(text, "<th scope=\"col\">{column}</th>");
    }
    text.push_str("</tr>\n");
    for pass in passes {
        text.push_str("<tr>");
        for cell in [
            pass.pass.to_string(),
            pass.pages.to_string(),
            pass.sent_pages.to_string(),
            pass.skipped_pages.to_string(),
            amount::bytes(pass.bytes),
            amount::micros(pass.duration_us),
            amount::rate(pass.bandwidth),
            pass.dirtied_pages.to_string(),
            format!("{} %", pass.throttle_percent),
        ] {
            let _ = write!(text, "<td>{cell}</td>");
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</table></div>\n");
    text
}

/// `text` where it stands for itself and for nothing in the language of the page.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use brume_api::{MigrationDowntime, MigrationPhase, MigrationRole};

    use super::*;

    fn moved() -> MigrationStatus {
        let pass = |pass, pages, dirtied_pages, bandwidth| MigrationPass {
            pass,
            pages,
            sent_pages: pages - pages / 4,
            skipped_pages: pass.into(),
            bytes: pages * 4096,
            duration_us: pages * 4096 * 1_000_000 / bandwidth,
            bandwidth,
            dirtied_pages,
            throttle_percent: 0,
        };
        MigrationStatus {
            role: MigrationRole::Source,
            phase: MigrationPhase::Completed,
            peer: Some("tcp:<host2>:4444".into()),
            memory_bytes: 1 << 30,
            bytes: 1_100 << 20,
            pages: 280_000,
            zero_pages: 12_000,
            max_downtime_us: 20_000,
            elapsed_ms: 2_345,
            compression_ratio_percent: 215,
            downtime: Some(MigrationDowntime {
                total_us: 15_600,
                pause_us: 400,
                pages_us: 5_000,
                state_us: 4_000,
                load_us: 3_500,
                resume_us: 2_500,
            }),
            passes: vec![
                pass(1, 262_144, 41_000, 1_150_000_000),
                pass(2, 41_000, 9_000, 1_210_000_000),
                pass(3, 9_000, 2_400, 1_190_000_000),
                pass(4, 2_400, 700, 980_000_000),
                pass(5, 700, 210, 640_000_000),
            ],
            ..MigrationStatus::default()
        }
    }

    #[test]
    fn the_page_is_whole_and_asks_for_nothing_else() {
        let page = page(&moved());
        assert!(page.contains("tcp:&lt;host2&gt;:4444"), "{page}");
        assert!(!page.contains("<host2>"));
        for outside in ["http:", "https:", "src=", "href=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        for tag in [
            "html", "body", "table", "tr", "td", "svg", "g", "style", "div", "title",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            let closed = page.matches(&format!("</{tag}>")).count();
            assert_eq!(opened, closed, "{tag}");
        }
        for number in [
            "15.6 ms",
            "2.34 s",
            "1024.0 MiB",
            "262144",
            "196608",
            "1.1 GB/s",
            "1/2.15",
        ] {
            assert!(page.contains(number), "{number}");
        }
    }

    #[test]
    fn a_move_without_numbers_has_a_page_too() {
        let failed = MigrationStatus {
            phase: MigrationPhase::Failed,
            error: Some("<script>".into()),
            ..MigrationStatus::default()
        };
        let page = page(&failed);
        assert!(page.contains("Move to another process: failed"));
        assert!(page.contains("&lt;script&gt;"));
        assert!(!page.contains("<svg"));
    }

    #[test]
    fn the_file_is_there_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let names = || -> Vec<_> {
            let entries = fs::read_dir(dir.path()).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        let path = dir.path().join("move.html");
        let report = Report::create(&path).unwrap();
        assert!(!path.exists());
        drop(report);
        assert!(names().is_empty());
        fs::write(&path, "old").unwrap();
        let report = Report::create(&path).unwrap();
        report.finish(&moved()).unwrap();
        assert_eq!(names(), ["move.html"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), page(&moved()));
        assert!(Report::create(&dir.path().join("none/move.html")).is_err());
        assert!(Report::create(Path::new("/")).is_err());
    }

    /// Writes the page to look at: `BRUME_REPORT=FILE cargo test -p brume-cli a_page_to_look_at`.
    #[test]
    fn a_page_to_look_at() {
        let page = page(&moved());
        if let Some(path) = std::env::var_os("BRUME_REPORT") {
            fs::write(path, &page).unwrap();
        }
        assert!(page.ends_with("</html>\n"));
    }
}
