// SPDX-License-Identifier: Apache-2.0
//! States that are good, and all the ways in which one can be bad.

use std::io::Write;

use proptest::prelude::*;
use serde_json::json;
use tempfile::NamedTempFile;

use super::*;
use crate::balloon::{Balloon, BalloonConfig};
use crate::block::{Block, BlockConfig, CacheType, Engine, Locking};
use crate::device::VirtioDevice;
use crate::limiter::{BucketLimits, BucketUpdate, LimiterState, LimiterUpdate};
use crate::net::{Net, NetConfig, Tap};
use crate::rng::Rng;
use crate::testing::machine::{FREE, Machine, transport};
use crate::testing::{MEMORY_END, golden, memory, writable};
use crate::vsock::{Vsock, VsockConfig};

fn limits() -> LimiterUpdate {
    let bucket = |size| {
        BucketUpdate::Set(BucketLimits {
            size,
            refill_time: std::time::Duration::from_secs(60),
            one_time_burst: 5,
        })
    };
    LimiterUpdate {
        bandwidth: bucket(1 << 20),
        ops: bucket(100),
    }
}

fn rng() -> Box<dyn VirtioDevice> {
    Box::new(Rng::new(limits()).unwrap())
}

fn net() -> Box<dyn VirtioDevice> {
    let config = NetConfig {
        id: "eth0".to_owned(),
        mac: None,
        mtu: None,
        rx_limits: limits(),
        tx_limits: limits(),
    };
    Box::new(Net::new(config, Tap::mock().0).unwrap())
}

fn balloon() -> Box<dyn VirtioDevice> {
    let config = BalloonConfig {
        amount_mib: 1,
        deflate_on_oom: true,
        statistics_interval_s: 3600,
        free_page_hinting: true,
        free_page_reporting: true,
    };
    Box::new(Balloon::new(config).unwrap())
}

fn block() -> Box<dyn VirtioDevice> {
    let image = NamedTempFile::new().unwrap();
    image.as_file().write_all(&[1; 8192]).unwrap();
    let config = BlockConfig {
        id: "rootfs".into(),
        path: image.path().into(),
        read_only: false,
        engine: Engine::Sync,
        cache: CacheType::Unsafe,
        locking: Locking::Off,
        limits: limits(),
    };
    Box::new(Block::open(config).unwrap())
}

fn vsock() -> Box<dyn VirtioDevice> {
    let folder = tempfile::tempdir().unwrap();
    let config = VsockConfig {
        guest_cid: 3,
        uds_path: folder.path().join("v"),
    };
    Box::new(Vsock::new(&config).unwrap())
}

const DEVICES: [fn() -> Box<dyn VirtioDevice>; 5] = [rng, net, balloon, block, vsock];

/// The state of a device that runs, with a buffer in its last queue.
fn state_of(device: fn() -> Box<dyn VirtioDevice>) -> TransportState {
    let mut machine = Machine::new(device(), u64::MAX);
    let last = machine.drivers.last_mut().unwrap();
    last.add(&[writable(FREE, 64)]);
    last.kick();
    machine.save().0
}

/// What a fresh device says to `state`.
fn restored(
    device: fn() -> Box<dyn VirtioDevice>,
    state: TransportState,
) -> Result<RunningQueues, RestoreError> {
    transport(device(), &memory()).0.restore(state)
}

#[test]
fn a_state_comes_back_as_it_was() {
    for device in DEVICES {
        let state = state_of(device);
        let text = serde_json::to_string(&state).unwrap();
        let (mut transport, interrupts) = transport(device(), &memory());
        let running = transport.restore(serde_json::from_str(&text).unwrap());
        let mut again = transport.save(&running.unwrap());
        // The clock of a limiter goes on, and filled what there is.
        let mut state = state;
        for state in [&mut state, &mut again] {
            forget_clocks(&mut state.device);
        }
        assert_eq!(again, state);
        use std::sync::atomic::Ordering;
        assert_eq!(interrupts.load(Ordering::SeqCst), 0, "nothing goes on yet");
    }
}

fn forget_clocks(value: &mut Value) {
    if let Value::Object(map) = value {
        map.remove("uncounted_ns");
        map.remove("tokens");
        map.values_mut().for_each(forget_clocks);
    }
}

#[test]
fn a_machine_that_is_still_being_set_up_comes_back_too() {
    let (mut first, _) = transport(rng(), &memory());
    let write = |transport: &mut crate::transport::MmioTransport, offset: u64, value: u32| {
        brume_devices::BusDevice::write(transport, offset, &value.to_le_bytes());
    };
    for (offset, value) in [
        (0x70, 3),
        (0x14, 1),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x38, 9),
    ] {
        write(&mut first, offset, value);
    }
    let running = first.core().pause();
    let state = first.save(&running);
    let selectors = (state.device_features_sel, state.driver_features_sel);
    assert_eq!(
        (state.status, selectors, state.queues[0].size),
        (11, (1, 1), 9)
    );
    let (mut second, _) = transport(rng(), &memory());
    let running = second.restore(state.clone()).unwrap();
    assert_eq!(second.save(&running).queues, state.queues);
    second.core().resume(running);
    assert_eq!(second.core().status(), 11);
}

#[test]
fn a_device_that_needs_a_reset_does_not_start_and_says_so_again() {
    let mut machine = Machine::new(rng(), u64::MAX);
    machine.transport.core().signals().needs_reset();
    let state = machine.save().0;
    let (mut transport, interrupts) = transport(rng(), &memory());
    let running = transport.restore(state).unwrap();
    transport.core().resume(running);
    assert_eq!(transport.core().status(), 15 | 64);
    assert_eq!(interrupts.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert!(transport.core().pause().0.is_empty());
}

/// The text of the error that a state of an entropy device gives when it was changed.
#[track_caller]
fn refusal(change: impl FnOnce(&mut TransportState)) -> String {
    let mut state = state_of(rng);
    change(&mut state);
    let error = restored(rng, state).err();
    let error = error.map(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    });
    error.expect("the state is refused")
}

#[test]
fn a_bad_state_is_refused_with_what_is_wrong() {
    let says = |text: &str, change: &dyn Fn(&mut TransportState)| {
        let error = refusal(change);
        assert!(error.contains(text), "{error:?} does not say {text:?}");
    };
    says("type 2, and the device here is of type 4", &|s| {
        s.device_type = 2;
    });
    says(
        "feature bits 7, 11, 40 of the virtio device of type 4",
        &|s| {
            s.driver_features |= 1 << 7 | 1 << 11 | 1 << 40;
            s.device_features |= 1 << 7 | 1 << 11 | 1 << 40;
        },
    );
    says("2 queues, and the virtio device of type 4 has 1", &|s| {
        s.queues.push(s.queues[0]);
    });
    says("2 queues", &|s| s.running.push(None));
    says("0 queues", &|s| s.queues.clear());
    says("up to 512 descriptors, and is with 256", &|s| {
        s.queues[0].max_size = 512;
    });
    let both = |s: &mut TransportState, change: &dyn Fn(&mut QueueState)| {
        change(&mut s.queues[0]);
        s.running.iter_mut().flatten().for_each(change);
    };
    says("512 descriptors is not a power of two up to 256", &|s| {
        both(s, &|queue| queue.size = 512);
    });
    says("not a power of two", &|s| both(s, &|queue| queue.size = 0));
    says(
        "the used ring of 2054 bytes at 0x7fff00 is not in guest memory",
        &|s| {
            both(s, &|queue| queue.used_ring = MEMORY_END - 0x100);
        },
    );
    says("not in guest memory", &|s| {
        both(s, &|queue| queue.desc_table = u64::MAX - 15);
    });
    says("is not aligned", &|s| {
        both(s, &|queue| queue.avail_ring |= 1);
    });
    says("not the one that the driver has set up", &|s| {
        s.queues[0].used_ring += 8;
    });
    says("in flight", &|s| {
        s.running
            .iter_mut()
            .flatten()
            .for_each(|queue| queue.next_avail += 1);
    });
    says("or the other way round", &|s| s.running.clear());
    says("or the other way round", &|s| s.running[0] = None);
    says("or the other way round", &|s| s.queues[0].ready = false);
    says("status bit that is none", &|s| s.status |= 16);
    says("status bit that is none", &|s| s.status |= 64);
    says("features without a driver", &|s| s.status &= !2);
    says("before its features are agreed", &|s| s.status &= !8);
    says("not acceptable", &|s| {
        s.driver_features &= !feature::VERSION_1;
    });
    says("not acceptable", &|s| {
        s.device_features &= !feature::EVENT_IDX;
    });
    says("run without a driver", &|s| s.status &= !4);
    says("interrupt status that is none", &|s| {
        s.interrupt_status |= 4;
    });
    says("cannot be read", &|s| s.device = json!({}));
    says("cannot be read", &|s| s.device = Value::Null);
    says("cannot be read", &|s| {
        s.device["limiter"]["surplus"] = json!(1);
    });
    for (field, value) in [
        ("size", json!(0)),
        ("tokens", json!((1 << 20) + 1)),
        ("debt", json!(1)),
        ("burst_left", json!(6)),
        ("refill_time", json!({"secs": 0, "nanos": 0})),
    ] {
        says("cannot have this bucket", &|s| {
            s.device["limiter"]["bandwidth"][field] = value.clone();
        });
    }
    // And as it was it is good.
    restored(rng, state_of(rng)).unwrap();
}

/// Goes to the part of `value` that `path` leads to, and does `change` there.
fn mutate(value: &mut Value, path: &[u16], change: u16) {
    let length = match &*value {
        Value::Array(list) => list.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    };
    if let [first, rest @ ..] = path
        && length > 0
    {
        let at = usize::from(*first) % length;
        let part = match value {
            Value::Array(list) => list.get_mut(at),
            Value::Object(map) => map.values_mut().nth(at),
            _ => None,
        };
        mutate(part.unwrap(), rest, change);
        return;
    }
    let number = value.as_u64();
    *value = match change % 16 {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(-1),
        3 => json!(0),
        4 => json!(u64::MAX),
        5 => json!(u32::MAX),
        6 => json!(u16::MAX),
        7 => json!("text"),
        8 => json!([]),
        9 => json!({}),
        10 => json!([null, 1, 2, 3]),
        11 => json!(1.5e300),
        // Small changes get further than large ones.
        12 => json!(number.unwrap_or(1) ^ 1),
        13 => json!(number.unwrap_or(1).wrapping_mul(2)),
        14 => json!(number.unwrap_or(1).wrapping_add(4096)),
        _ => json!(number.unwrap_or(1) ^ u64::from(change)),
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_state_makes_a_device_panic(
        which in 0..DEVICES.len(),
        changes in prop::collection::vec((prop::collection::vec(any::<u16>(), 0..6), any::<u16>()), 1..4),
    ) {
        let device = DEVICES[which];
        let mut value = serde_json::to_value(state_of(device)).unwrap();
        for (path, change) in changes {
            mutate(&mut value, &path, change);
        }
        let Ok(state) = serde_json::from_value::<TransportState>(value) else {
            return Ok(());
        };
        let (mut transport, _) = transport(device(), &memory());
        if let Ok(running) = transport.restore(state) {
            let ran = running.0.len();
            transport.core().resume(running);
            std::thread::yield_now();
            let left = transport.core().pause().0.len();
            // A worker that panicked leaves nothing.
            prop_assert!(left == ran || transport.core().signals().is_reset_needed());
        }
    }
}

#[test]
fn the_format_is_that_of_the_golden_files() {
    golden::<TransportState>(include_str!("../../../testdata/transport.json"));
    golden::<QueueState>(include_str!("../../../testdata/queue.json"));
    golden::<LimiterState>(include_str!("../../../testdata/limiter.json"));
}
