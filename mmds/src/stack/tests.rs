// SPDX-License-Identifier: Apache-2.0
//! Whole exchanges of frames, with a second stack as the guest.

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::SocketBuffer;

use super::*;
