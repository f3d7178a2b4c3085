// SPDX-License-Identifier: Apache-2.0
//! A machine of 8 GiB whose guest writes to most of it, faster than it can be sent.

use std::time::Duration;

use brume_tests::host::tsc_khz;
use brume_tests::migration::{Link, Pair, Setup, Side};
use serde_json::json;

use crate::migration::assert_settled;

const LIMIT: Duration = Duration::from_secs(180);

#[test]
#[ignore = "takes minutes, and 17 GiB of memory"]
fn a_large_machine_moves_while_all_of_it_is_written() {
    // Small pages would take a minute to be touched for the first time.
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 8192, "huge_pages": "Transparent"});
    let args = format!("bare.touch=7000 bare.rate=1000 bare.tsc_khz={}", tsc_khz());
    for mode in ["PreCopy", "PostCopy", "Hybrid"] {
        let mut pair = Pair::start(&Setup {
            args: &args,
            parts: &[("/machine-config", machine.clone())],
            link: Link::Tcp,
            ..Setup::default()
        });
        pair.live(Side::Source).gap();
        let status = pair.moved(&json!({"mode": mode, "connections": 2}), LIMIT);
        let still = pair.live(Side::Target).gap().max_us;
        println!(
            "{mode}: {} ms in {} passes, {:?}, {still} us by the guest's clock",
            status.elapsed_ms,
            status.passes.len(),
            status.downtime.clone().unwrap_or_default(),
        );
        assert_settled(&mut pair);
    }
}
