// SPDX-License-Identifier: Apache-2.0
//! Amounts as people read and write them: bytes, bytes per second, and times.

use std::time::Duration;

/// Bytes of memory, in MiB, or in GiB from 10 GiB on.
pub(crate) fn bytes(bytes: u64) -> String {
    const GIB: u64 = 1 << 30;
    if bytes >= 10 * GIB {
        format!("{} GiB", tenths(bytes, GIB))
    } else {
        format!("{} MiB", tenths(bytes, 1 << 20))
    }
}

/// Bytes per second, in the units of networks.
pub(crate) fn rate(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [
        (1_000_000_000, "GB/s"),
        (1_000_000, "MB/s"),
        (1_000, "kB/s"),
    ];
    match UNITS.into_iter().find(|&(unit, _)| bytes >= unit) {
        Some((unit, name)) => format!("{} {name}", tenths(bytes, unit)),
        None => format!("{bytes} B/s"),
    }
}

/// What became of something that was this many hundredths of it, to two places.
pub(crate) fn ratio(percent: u32) -> String {
    format!("to 1/{}.{:02}", percent / 100, percent % 100)
}

/// A time in milliseconds, or in seconds from 10 s on.
pub(crate) fn micros(us: u64) -> String {
    const SECOND: u64 = 1_000_000;
    if us >= 10 * SECOND {
        format!("{} s", tenths(us, SECOND))
    } else {
        format!("{} ms", tenths(us, 1_000))
    }
}

/// A time in seconds, with two places.
pub(crate) fn seconds(ms: u64) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}

/// `value` in `unit`s, to one place, rounded down.
fn tenths(value: u64, unit: u64) -> String {
    let tenth = value % unit * 10 / unit;
    format!("{}.{tenth}", value / unit)
}

/// Reads a time: a whole number and `ms`, `s`, `m` or `h`.
///
/// # Errors
///
/// It has another form, or is too long.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    const WANTED: &str = "write a whole number and a unit: 20ms, 60s, 5m or 1h";
    let (digits, unit) = split(text);
    let factor = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(WANTED.into()),
    };
    let count: u64 = digits.parse().map_err(|_| WANTED)?;
    let ms = count.checked_mul(factor).ok_or(WANTED)?;
    Ok(Duration::from_millis(ms))
}

/// Reads how long a guest may stand still, in milliseconds.
///
/// # Errors
///
/// It has another form, is nothing, or too long.
pub(crate) fn parse_downtime(text: &str) -> Result<u32, String> {
    let ms = u32::try_from(parse_time(text)?.as_millis());
    let ms = ms.map_err(|_| "this is more than a month")?;
    if ms == 0 {
        return Err("a guest stands still for 1ms at least".into());
    }
    Ok(ms)
}

/// Reads a limit for the whole, in seconds; 0 for none.
///
/// # Errors
///
/// It has another form, no whole seconds, or is too long.
pub(crate) fn parse_timeout(text: &str) -> Result<u32, String> {
    if text == "0" {
        return Ok(0);
    }
    let time = parse_time(text)?;
    if time.subsec_millis() != 0 {
        return Err("write whole seconds".into());
    }
    u32::try_from(time.as_secs()).map_err(|_| "this is more than a hundred years".into())
}

/// Reads bytes per second: a whole number, and K, M or G for thousands, millions or billions, or
/// KiB, MiB or GiB; 0 for no limit.
///
/// # Errors
///
/// It has another form, or is too much.
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    const WANTED: &str = "write bytes per second, as 800K, 500M, 2G or 512MiB; 0 for no limit";
    let (digits, unit) = split(text);
    let factor: u64 = match unit {
        "" => 1,
        "K" | "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(WANTED.into()),
    };
    let count: u64 = digits.parse().map_err(|_| WANTED)?;
    count.checked_mul(factor).ok_or_else(|| WANTED.into())
}

fn split(text: &str) -> (&str, &str) {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    (digits, text.get(digits.len()..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short() {
        assert_eq!(bytes(0), "0.0 MiB");
        assert_eq!(bytes((1 << 20) + (1 << 19)), "1.5 MiB");
        assert_eq!(bytes((10 << 30) - 1), "10239.9 MiB");
        assert_eq!(bytes(12 << 30), "12.0 GiB");
        assert_eq!(bytes(u64::MAX), "17179869183.9 GiB");
        assert_eq!(rate(999), "999 B/s");
        assert_eq!(rate(1_000), "1.0 kB/s");
        assert_eq!(rate(1_234_567_890), "1.2 GB/s");
        assert_eq!(rate(u64::MAX), "18446744073.7 GB/s");
        assert_eq!(micros(12_345), "12.3 ms");
        assert_eq!(micros(12_345_678), "12.3 s");
        assert_eq!(seconds(3_429), "3.42 s");
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_downtime("20ms"), Ok(20));
        assert_eq!(parse_downtime("1s"), Ok(1000));
        assert_eq!(parse_timeout("60s"), Ok(60));
        assert_eq!(parse_timeout("5m"), Ok(300));
        assert_eq!(parse_timeout("1h"), Ok(3600));
        assert_eq!(parse_timeout("0"), Ok(0));
        assert_eq!(parse_timeout("2000ms"), Ok(2));
        for text in ["", "20", "ms", "0ms", "1.5s", "-1s", "1 s", "99999999999h"] {
            assert!(parse_downtime(text).is_err(), "{text}");
        }
        for text in ["", "60", "s", "500ms", "99999999999999999999s"] {
            assert!(parse_timeout(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_have_units_of_ten_or_two() {
        for (text, expected) in [
            ("0", 0),
            ("800K", 800_000),
            ("500M", 500_000_000),
            ("2G", 2_000_000_000),
            ("1MiB", 1 << 20),
        ] {
            assert_eq!(parse_rate(text), Ok(expected), "{text}");
        }
        for text in ["", "M", "1.5G", "-1", "1T", "18446744073709551615K"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
