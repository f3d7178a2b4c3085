// SPDX-License-Identifier: Apache-2.0
//! Feature bits of the network device (virtio 1.3, section 5.1.3) and the TAP's side of them.
//!
//! What the driver may leave undone for the host to do (`HOST_*`) needs nothing from the TAP.
//! What the host may leave undone for the driver (`GUEST_*`) is switched on at the TAP when the
//! driver has accepted it, and never before: the driver would take the frames for broken.
//!
//! UDP fragmentation (`*_UFO`) is not offered: Linux gave it up in 4.14 at both ends.

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};

/// The driver may leave checksums to be filled in.
const CSUM: u64 = 1 << 0;
/// The driver takes frames without checksum.
const GUEST_CSUM: u64 = 1 << 1;
/// The configuration space has an MTU.
pub(super) const MTU: u64 = 1 << 3;
/// The configuration space has a MAC address.
pub(super) const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
/// A frame may take several receive buffers.
pub(super) const MRG_RXBUF: u64 = 1 << 15;
/// The configuration space has a status.
const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub(super) const CTRL_VQ: u64 = 1 << 17;
/// The driver can be asked to announce itself; works together with the two before.
pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
/// What the device had not before it could be asked to have the driver announce itself.
pub(super) const ANNOUNCING: u64 = STATUS | CTRL_VQ | GUEST_ANNOUNCE;
const GUEST_USO4: u64 = 1 << 54;
const GUEST_USO6: u64 = 1 << 55;
const HOST_USO: u64 = 1 << 56;

/// The offloads that every TAP has had since Linux 2.6.27.
pub(super) const BASIC_OFFLOADS: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
/// Segments of UDP, which TAPs have since Linux 6.2, for both families or not at all.
pub(super) const UDP_OFFLOADS: u32 = TUN_F_USO4 | TUN_F_USO6;

/// What the driver may accept, and what the TAP has to be told then. All but the first only work
/// together with it.
const GUEST_OFFLOADS: [(u64, u32); 6] = [
    (GUEST_CSUM, TUN_F_CSUM),
    (GUEST_TSO4, TUN_F_TSO4),
    (GUEST_TSO6, TUN_F_TSO6),
    (GUEST_ECN, TUN_F_TSO_ECN),
    (GUEST_USO4, TUN_F_USO4),
    (GUEST_USO6, TUN_F_USO6),
];

/// The features to offer with a TAP that can do `offloads`.
pub(super) fn offered(offloads: u32) -> u64 {
    let guest = GUEST_OFFLOADS
        .iter()
        .filter(|(_, offload)| offloads & offload != 0)
        .fold(0, |features, (feature, _)| features | feature);
    let mut host = 0;
    if offloads & BASIC_OFFLOADS == BASIC_OFFLOADS {
        host |= CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
    }
    if offloads & UDP_OFFLOADS == UDP_OFFLOADS {
        host |= HOST_USO;
    }
    MRG_RXBUF | guest | host
}

/// The offloads that the TAP may use with a driver that accepted `features`.
pub(super) fn tap_offloads(features: u64) -> u32 {
    if features & GUEST_CSUM == 0 {
        return 0;
    }
    let mut offloads = GUEST_OFFLOADS
        .iter()
        .filter(|(feature, _)| features & feature != 0)
        .fold(0, |offloads, (_, offload)| offloads | offload);
    if offloads & UDP_OFFLOADS != UDP_OFFLOADS {
        offloads &= !UDP_OFFLOADS;
    }
    if offloads & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
        offloads &= !TUN_F_TSO_ECN;
    }
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = BASIC_OFFLOADS | UDP_OFFLOADS;

    #[test]
    fn a_tap_without_offloads_offers_none() {
        assert_eq!(offered(0), MRG_RXBUF);
    }

    #[test]
    fn udp_segments_are_offered_only_where_the_tap_has_them() {
        let udp = GUEST_USO4 | GUEST_USO6 | HOST_USO;
        assert_eq!(offered(BASIC_OFFLOADS) & udp, 0);
        assert_eq!(offered(ALL) & udp, udp);
    }

    #[test]
    fn all_that_is_offered_and_accepted_reaches_the_tap() {
        assert_eq!(tap_offloads(offered(ALL)), ALL);
        assert_eq!(tap_offloads(offered(BASIC_OFFLOADS)), BASIC_OFFLOADS);
    }

    #[test]
    fn the_tap_never_gets_a_set_that_it_refuses() {
        for (features, expected) in [
            (0, 0),
            (GUEST_TSO4 | GUEST_USO4 | GUEST_USO6, 0),
            (GUEST_CSUM, TUN_F_CSUM),
            (GUEST_CSUM | GUEST_USO4, TUN_F_CSUM),
            (GUEST_CSUM | GUEST_ECN, TUN_F_CSUM),
            (GUEST_CSUM | GUEST_TSO6, TUN_F_CSUM | TUN_F_TSO6),
        ] {
            assert_eq!(tap_offloads(features), expected, "features {features:#x}");
        }
    }
}
