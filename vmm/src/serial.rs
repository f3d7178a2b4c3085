// SPDX-License-Identifier: Apache-2.0
//! Where the guest's serial output goes, and how much of it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use brume_api::config;
use brume_devices::SerialCounters;
use brume_virtio::TokenBucket;
use thiserror::Error;

use crate::attach::bucket_limits;

/// The serial output has no place to go.
#[derive(Debug, Error)]
#[error("the file for the serial output cannot be opened ({})", path.display())]
pub struct SerialError {
    /// The file.
    path: PathBuf,
    /// Why.
    source: io::Error,
}

/// What takes the output that `config` describes; `stdout` does if it names no file.
pub(crate) fn output(
    config: Option<&config::Serial>,
    stdout: Box<dyn Write + Send>,
    counters: Arc<SerialCounters>,
) -> Result<Box<dyn Write + Send>, SerialError> {
    let Some(config) = config else {
        return Ok(stdout);
    };
    let output = match &config.serial_out_path {
        None => stdout,
        Some(path) => Box::new(open(path).map_err(|source| SerialError {
            path: path.clone(),
            source,
        })?),
    };
    let limits = config.rate_limiter.and_then(bucket_limits);
    Ok(match limits.and_then(TokenBucket::new) {
        None => output,
        Some(bucket) => Box::new(Limited {
            output,
            bucket,
            counters,
        }),
    })
}

/// Reading keeps a named pipe usable while nobody reads it; what it has no room for is lost, as a
/// guest must not be held up by whoever reads its output.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// Drops what a bucket has no tokens for: a guest does not wait for its output.
struct Limited {
    output: Box<dyn Write + Send>,
    bucket: TokenBucket,
    counters: Arc<SerialCounters>,
}

impl Write for Limited {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        let bytes = data.len() as u64;
        if !self.bucket.wait(now).is_zero() {
            self.counters.dropped_bytes.add(bytes);
            return Ok(data.len());
        }
        self.bucket.take(bytes, now);
        self.output.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs;
    use std::io::Read;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn to(path: &Path, size: u64, burst: u64) -> (Box<dyn Write + Send>, Arc<SerialCounters>) {
        let limit = config::TokenBucket {
            size,
            one_time_burst: Some(burst),
            refill_time: 3_600_000,
        };
        let config = config::Serial {
            serial_out_path: Some(path.into()),
            rate_limiter: Some(limit),
        };
        let counters = Arc::<SerialCounters>::default();
        let nowhere = Box::new(io::sink());
        let output = output(Some(&config), nowhere, counters.clone()).unwrap();
        (output, counters)
    }

    #[test]
    fn a_file_is_made_and_what_is_over_the_limit_is_dropped_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let (mut output, counters) = to(&path, 4, 2);
        for byte in b"abcdefghi" {
            output.write_all(&[*byte]).unwrap();
        }
        assert_eq!(fs::read(&path).unwrap(), b"abcdef");
        assert_eq!(counters.dropped_bytes.get(), 3);
    }

    #[test]
    fn a_bucket_of_nothing_is_no_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let (mut output, counters) = to(&path, 0, 0);
        output.write_all(b"abc").unwrap();
        output.write_all(b"def").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abcdef");
        assert_eq!(counters.dropped_bytes.get(), 0);
    }

    #[test]
    #[allow(unsafe_code)]
    fn a_pipe_that_nobody_reads_holds_nothing_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let name = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the name ends in a NUL and outlives the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let (mut output, _) = to(&path, 0, 0);
        let mut room = 0;
        let error = loop {
            match output.write(&[b'x'; 4096]) {
                Ok(count) => room += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let mut reader = open(&path).unwrap();
        assert_eq!(reader.read(&mut [0; 4096]).unwrap(), 4096);
        assert!(room >= 4096);
        output.write_all(b"y").unwrap();
    }

    #[test]
    fn a_path_that_is_no_file_is_named() {
        let config = config::Serial {
            serial_out_path: Some("/nowhere/serial".into()),
            rate_limiter: None,
        };
        let error = output(Some(&config), Box::new(io::sink()), Arc::default());
        let text = error.err().unwrap().to_string();
        assert!(text.contains("/nowhere/serial"), "{text}");
    }
}
