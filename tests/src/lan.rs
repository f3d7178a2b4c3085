// SPDX-License-Identifier: Apache-2.0
//! Two hosts on one network: namespaces, each with a bridge, joined by a third that is the switch.
//!
//! ```text
//!   host 0: tap0 - lan0 (192.0.2.1) - up0 ....... port0
//!                                                    lan0 (192.0.2.254): the switch, and who
//!   host 1: tap0 - lan0 (192.0.2.2) - up0 ....... port1      talks to the guest
//! ```
//!
//! A guest on `tap0` of either host is on the network, so that it can move from one to the other
//! and keep its address.

use crate::netns::NetNs;
use crate::vm::output_of;

/// The guest's TAP on both hosts.
pub const TAP: &str = "tap0";
/// An address for the guest.
pub const GUEST: &str = "192.0.2.10";
/// The switch's own address.
pub const SWITCH: &str = "192.0.2.254";

/// The hosts and what joins them; all of it goes when this is dropped.
pub struct Lan {
    /// Both hosts.
    pub hosts: [NetNs; 2],
    /// What joins them. Whatever looks at the guest from outside runs here.
    pub switch: NetNs,
}

impl Lan {
    /// Joins two new hosts.
    ///
    /// # Panics
    ///
    /// It is not allowed.
    #[allow(clippy::new_without_default, reason = "it makes something on the host")]
    pub fn new() -> Self {
        let switch = NetNs::new();
        switch.sh(&format!(
            "ip link set lo up; ip link add lan0 type bridge; ip link set lan0 up
             ip addr add {SWITCH}/24 dev lan0"
        ));
        let hosts = [0, 1].map(|number| {
            let host = NetNs::new();
            host.sh(&format!(
                "ip link set lo up; ip link add lan0 type bridge
                 ip tuntap add {TAP} mode tap vnet_hdr
                 ip link add up0 type veth peer name port{number} netns {switch}
                 for port in {TAP} up0; do ip link set $port master lan0 up; done
                 ip link set lan0 up; ip addr add {address}/24 dev lan0",
                switch = switch.name(),
                address = Self::address(number),
            ));
            switch.sh(&format!("ip link set port{number} master lan0 up"));
            host
        });
        Self { hosts, switch }
    }

    /// The IPv4 address of a host, 0 or 1.
    pub fn address(number: usize) -> &'static str {
        if number == 0 {
            "192.0.2.1"
        } else {
            "192.0.2.2"
        }
    }

    /// The port by which the switch sends to the MAC address `mac`: `port0` or `port1`. Empty if it
    /// does not know.
    pub fn port_of(&self, mac: &str) -> String {
        let switch = self.switch.name();
        let table = output_of("bridge", &["-n", switch, "fdb", "show", "br", "lan0"]);
        let line = table.lines().find(|line| line.starts_with(mac));
        let mut words = line.unwrap_or_default().split(' ');
        let port = words.find(|word| *word == "dev").and_then(|_| words.next());
        port.unwrap_or_default().to_owned()
    }

    /// Loses every frame between the hosts from now on. Nobody is told: what was connected waits.
    pub fn stall(&self) {
        self.set_port("state 0");
    }

    /// Carries frames again, after [`Lan::stall`].
    pub fn go_on(&self) {
        self.set_port("state 3");
    }

    /// The port's state as a bridge counts them: 0 is disabled, 3 forwards.
    fn set_port(&self, state: &str) {
        let script = format!("ip link set port1 type bridge_slave {state}");
        self.switch.sh(&script);
    }

    /// Pulls the second host's plug: its interface says so.
    pub fn unplug(&self) {
        self.switch.sh("ip link set port1 down");
    }

    /// Puts it in again.
    pub fn plug_in(&self) {
        self.switch.sh("ip link set port1 up");
    }

    /// Carries at most so much each way from now on, in the words of tc(8): `1mbit`. The queue
    /// before it holds 0.4 s.
    pub fn slow_down(&self, rate: &str) {
        self.speed_up();
        for port in ["port0", "port1"] {
            self.switch.sh(&format!(
                "tc qdisc add dev {port} root tbf rate {rate} burst 16kb latency 400ms"
            ));
        }
    }

    /// How many bytes the first host has sent to the others since it was made, headers and all.
    ///
    /// # Panics
    ///
    /// The counter cannot be read.
    pub fn sent_by_first(&self) -> u64 {
        let switch = self.switch.name();
        let counter = "/sys/class/net/port0/statistics/rx_bytes";
        let text = output_of("ip", &["netns", "exec", switch, "cat", counter]);
        text.trim().parse().expect("a counter of bytes")
    }

    /// Carries all there is again.
    pub fn speed_up(&self) {
        for port in ["port0", "port1"] {
            // There may be nothing to delete.
            let script = format!("tc qdisc del dev {port} root 2>/dev/null || true");
            self.switch.sh(&script);
        }
    }
}
