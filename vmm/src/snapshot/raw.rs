// SPDX-License-Identifier: Apache-2.0
//! Structures of KVM's interface as text. Their layout is the kernel's and does not change, so they
//! are saved as they are: a string of hexadecimal digits.

use std::fmt;
use std::marker::PhantomData;

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

// What is in a file has these sizes; another one would be another interface.
const _: () = assert!(size_of::<kvm_regs>() == 144);
const _: () = assert!(size_of::<kvm_sregs>() == 312);
const _: () = assert!(size_of::<kvm_xsave>() == 4096);
const _: () = assert!(size_of::<kvm_xcrs>() == 392);
const _: () = assert!(size_of::<kvm_debugregs>() == 128);
const _: () = assert!(size_of::<kvm_lapic_state>() == 1024);
const _: () = assert!(size_of::<kvm_vcpu_events>() == 64);
const _: () = assert!(size_of::<kvm_mp_state>() == 4);
const _: () = assert!(size_of::<kvm_cpuid_entry2>() == 40);
const _: () = assert!(size_of::<kvm_irqchip>() == 520);
const _: () = assert!(size_of::<kvm_pit_state2>() == 112);
const _: () = assert!(size_of::<kvm_clock_data>() == 48);

/// A structure that is saved byte by byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raw<T>(pub(crate) T);

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // A machine on its way to another host waits for this.
        serializer.serialize_str(&HEXLOWER.encode(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Digits(PhantomData)).map(Raw)
    }
}

struct Digits<T>(PhantomData<T>);

impl<T: FromBytes> Visitor<'_> for Digits<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes in hexadecimal", size_of::<T>())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        let wrong = || E::invalid_length(text.len() / 2, &self);
        if text.len() != 2 * size_of::<T>() {
            return Err(wrong());
        }
        let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes());
        T::read_from_bytes(&bytes.map_err(|_| wrong())?).map_err(|_| wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_is_the_same_after_its_way_through_text() {
        let state = Raw(kvm_mp_state {
            mp_state: 0x0a0b_0c0d,
        });
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(text, r#""0d0c0b0a""#);
        assert_eq!(
            serde_json::from_str::<Raw<kvm_mp_state>>(&text).unwrap(),
            state
        );
    }

    #[test]
    fn text_of_another_length_or_alphabet_is_refused() {
        for text in [
            r#""0d0c0b""#,
            r#""0d0c0b0a00""#,
            r#""0d0c0b0x""#,
            r#""+d0c0b0a""#,
            "3",
        ] {
            assert!(
                serde_json::from_str::<Raw<kvm_mp_state>>(text).is_err(),
                "{text}"
            );
        }
        let text = r#""0d0c0bé""#;
        assert!(serde_json::from_str::<Raw<kvm_mp_state>>(text).is_err());
    }
}
