// SPDX-License-Identifier: Apache-2.0
//! Reads a kernel command line. Pure: host tests may include it by `#[path]`.

/// The value of the last `key=value` word, or `Some("")` for a bare `key`.
pub fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_ascii_whitespace()
        .filter_map(|word| match word.split_once('=') {
            Some((name, value)) if name == key => Some(value),
            None if word == key => Some(""),
            _ => None,
        })
        .next_back()
}

/// A number: decimal, or hexadecimal after `0x`, with an optional suffix K, M or G (powers of 1024).
pub fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    value.checked_mul(1 << shift)
}

/// The base addresses in the line's `virtio_mmio.device=SIZE@BASE:IRQ` words, in their order.
pub fn virtio_devices(line: &str) -> impl Iterator<Item = u64> + '_ {
    line.split_ascii_whitespace().filter_map(|word| {
        let place = word.strip_prefix("virtio_mmio.device=")?.split_once('@')?.1;
        number(place.split_once(':')?.0)
    })
}

/// Six bytes written as `aa:bb:cc:dd:ee:ff`.
pub fn mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "bare.do=a bare.qd=32 quiet bare.qd=1 virtio_mmio.device=4K@0xc0001000:5 \
                        virtio_mmio.device=512@0xfeb00e00:12";

    #[test]
    fn the_last_value_counts_and_a_bare_word_has_an_empty_one() {
        assert_eq!(value(LINE, "bare.qd"), Some("1"));
        assert_eq!(value(LINE, "quiet"), Some(""));
        assert_eq!(value(LINE, "bare"), None);
    }

    #[test]
    fn numbers_take_a_base_and_a_suffix() {
        assert_eq!(number("4096"), Some(4096));
        assert_eq!(number("0x34"), Some(0x34));
        assert_eq!(number("64K"), Some(65536));
        assert_eq!(number("0x10M"), Some(16 << 20));
        for bad in ["", "K", "0x", "12q", "-1", "18014398509481984K"] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }

    #[test]
    fn devices_come_in_order() {
        let mut devices = virtio_devices(LINE);
        assert_eq!(devices.next(), Some(0xc000_1000));
        assert_eq!(devices.next(), Some(0xfeb0_0e00));
        assert_eq!(devices.next(), None);
    }

    #[test]
    fn a_mac_has_six_bytes() {
        assert_eq!(mac("02:00:00:00:00:fe"), Some([2, 0, 0, 0, 0, 0xfe]));
        assert_eq!(mac("02:00:00:00:00"), None);
        assert_eq!(mac("02:00:00:00:00:fe:00"), None);
    }
}
