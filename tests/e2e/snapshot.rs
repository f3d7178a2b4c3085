// SPDX-License-Identifier: Apache-2.0
//! A machine that is saved goes on as if nothing had been; one that is restored goes on from there.

use brume_tests::live::{Live, Snapshot};
use serde_json::json;

#[test]
fn a_machine_goes_on_after_it_is_saved_and_again_from_what_was_saved() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::named(folder.path(), "full");
    // The guest writes all the while, so it is saved in the middle of that.
    let mut first = Live::start("bare.touch=4 bare.rate=40", &[]);
    let asked = first.status();
    first.pause();
    first.save("Full", &snapshot);
    let console = first.api.vm.stdout();
    first.resume();

    let saved = first.status();
    assert!(saved.tick >= asked.tick && saved.tsc > asked.tsc);
    assert_eq!(
        saved.generation_id, asked.generation_id,
        "it is the same one"
    );
    first.hash();
    first.pause();

    let mut second = Live::restored(&snapshot, &json!({}));
    let restored = second.status();
    assert!(restored.tick >= asked.tick && restored.writes >= asked.writes);
    assert!(restored.tsc > asked.tsc);
    assert_ne!(restored.generation_id, asked.generation_id, "another one");
    assert!(restored.generation > asked.generation && restored.disruption > asked.disruption);
    second.hash();
    second.write_round();
    second.hash();
    // Neither of both has started anew.
    assert!(!second.api.vm.stdout().contains("ready"));
    assert!(first.api.vm.stdout().starts_with(&console));
    assert_eq!(first.api.vm.stdout().matches("ready").count(), 1);
}

#[test]
fn a_machine_that_was_restored_writes_on_and_can_be_saved_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut live = Live::start("bare.touch=2 bare.area=3", &[]);
    let (mut hash, mut last) = (live.hash(), live.status());
    for generation in 0..3 {
        let snapshot = Snapshot::named(folder.path(), &generation.to_string());
        live.pause();
        live.save("Full", &snapshot);
        live = Live::restored(&snapshot, &json!({}));
        assert_eq!(live.hash(), hash, "generation {generation}");
        let now = live.status();
        assert!(now.tick > last.tick && now.generation_id != last.generation_id);
        last = now;
        // A page that is zero again has to be so in the next one.
        live.write_round();
        live.zero();
        hash = live.hash();
    }
}

#[test]
fn the_guest_notices_a_byte_that_is_not_what_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::named(folder.path(), "full");
    let live = Live::start("bare.touch=2", &[]);
    live.pause();
    live.save("Full", &snapshot);
    // Its area is the last that it uses of its memory.
    let mut memory = std::fs::read(&snapshot.memory).unwrap();
    let last = memory.iter().rposition(|byte| *byte != 0).unwrap();
    memory[last] ^= 1;
    std::fs::write(&snapshot.memory, memory).unwrap();
    let mut restored = Live::restored(&snapshot, &json!({}));
    let answer = restored.ask(b'h', "hash");
    assert!(answer.ends_with("BAD page 511"), "{answer}");
}
