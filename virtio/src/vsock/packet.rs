// SPDX-License-Identifier: Apache-2.0
//! The header of a vsock packet (virtio 1.3, section 5.10.6).

/// Length in bytes of `struct virtio_vsock_hdr`.
pub(super) const HEADER_LEN: usize = 44;

/// The CID of the host.
pub(super) const HOST_CID: u64 = 2;

/// The one socket type that this device offers: a stream of bytes.
pub(super) const TYPE_STREAM: u16 = 1;

/// The port that stands for any; no connection has it at an end.
pub(super) const PORT_ANY: u32 = u32::MAX;

/// What a packet is for.
pub(super) mod op {
    pub(in crate::vsock) const REQUEST: u16 = 1;
    pub(in crate::vsock) const RESPONSE: u16 = 2;
    pub(in crate::vsock) const RST: u16 = 3;
    pub(in crate::vsock) const SHUTDOWN: u16 = 4;
    pub(in crate::vsock) const RW: u16 = 5;
    pub(in crate::vsock) const CREDIT_UPDATE: u16 = 6;
    pub(in crate::vsock) const CREDIT_REQUEST: u16 = 7;
}

/// SHUTDOWN flag: the sender receives nothing more.
pub(super) const NO_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender sends nothing more.
pub(super) const NO_SEND: u32 = 2;
/// Both flags.
pub(super) const NO_MORE: u32 = NO_RECEIVE | NO_SEND;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    /// The socket type; a field called `type` in the standard.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// The sender's buffer for this connection, in bytes.
    pub(super) buf_alloc: u32,
    /// How many bytes the sender took out of it so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        let from = &mut rest;
        Self {
            src_cid: u64::from_le_bytes(take(from)),
            dst_cid: u64::from_le_bytes(take(from)),
            src_port: u32::from_le_bytes(take(from)),
            dst_port: u32::from_le_bytes(take(from)),
            len: u32::from_le_bytes(take(from)),
            kind: u16::from_le_bytes(take(from)),
            op: u16::from_le_bytes(take(from)),
            flags: u32::from_le_bytes(take(from)),
            buf_alloc: u32::from_le_bytes(take(from)),
            fwd_cnt: u32::from_le_bytes(take(from)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        let to = &mut rest;
        put(to, self.src_cid.to_le_bytes());
        put(to, self.dst_cid.to_le_bytes());
        put(to, self.src_port.to_le_bytes());
        put(to, self.dst_port.to_le_bytes());
        put(to, self.len.to_le_bytes());
        put(to, self.kind.to_le_bytes());
        put(to, self.op.to_le_bytes());
        put(to, self.flags.to_le_bytes());
        put(to, self.buf_alloc.to_le_bytes());
        put(to, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The answer that ends whatever connection this packet belongs to.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// The next `N` bytes; the fields add up to the length, so there always are some.
fn take<const N: usize>(from: &mut &[u8]) -> [u8; N] {
    let Some((value, rest)) = from.split_first_chunk() else {
        return [0; N];
    };
    *from = rest;
    *value
}

fn put<const N: usize>(to: &mut &mut [u8], value: [u8; N]) {
    if let Some((place, rest)) = std::mem::take(to).split_first_chunk_mut() {
        *place = value;
        *to = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: 0x4142,
            op: 0x5152,
            flags: 0x6162_6364,
            buf_alloc: 0x7172_7374,
            fwd_cnt: 0x8182_8384,
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), header);
        for (offset, expected) in [
            (0, 0x08),
            (8, 0x02),
            (16, 0x14),
            (20, 0x24),
            (24, 0x34),
            (28, 0x42),
            (30, 0x52),
            (32, 0x64),
            (36, 0x74),
            (40, 0x84),
        ] {
            assert_eq!(bytes[offset], expected, "at {offset}");
        }
    }
}
