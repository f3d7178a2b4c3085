// SPDX-License-Identifier: Apache-2.0
//! The state of a vCPU that is held, taken from KVM and given back to it.
//!
//! This is a module with unsafe code: KVM reads as much extended state as it thinks there is.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use brume_snapshot::{Saved, UpgradeError};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use super::cpuid;
use super::registers::SavedRegisters;
use crate::kvm::{KvmError, failed};
use crate::snapshot::{Raw, by_number};

/// IA32_TSC: the time that the guest sees.
const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: the time of the next timer interrupt. It means something only with a local
/// APIC that uses it and a time stamp counter.
const TSC_DEADLINE: u32 = 0x6e0;
/// How much two hosts' time stamp counters may differ, in parts per million, and count as the same:
/// the kernel measures the rate at each boot.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Everything that KVM knows of a vCPU.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VcpuState {
    /// KVM's `struct kvm_mp_state`: whether it runs, is halted, or waits for its start.
    mp_state: Raw<kvm_mp_state>,
    /// `struct kvm_regs`
    registers: SavedRegisters,
    /// `struct kvm_sregs`
    sregs: Raw<kvm_sregs>,
    /// `struct kvm_xsave`
    xsave: Raw<kvm_xsave>,
    /// `struct kvm_xcrs`
    xcrs: Raw<kvm_xcrs>,
    /// `struct kvm_debugregs`
    debug_regs: Raw<kvm_debugregs>,
    /// `struct kvm_lapic_state`
    lapic: Raw<kvm_lapic_state>,
    /// `struct kvm_vcpu_events`
    events: Raw<kvm_vcpu_events>,
    /// The rate of the time stamp counter in kHz, where KVM can tell.
    tsc_khz: Option<u32>,
    /// `struct kvm_cpuid_entry2` for each leaf.
    cpuid: Vec<Raw<kvm_cpuid_entry2>>,
    /// The model-specific registers by their number.
    #[serde(with = "by_number")]
    msrs: BTreeMap<u32, u64>,
}

/// What KVM does not tell of a vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    /// The model-specific registers that KVM has.
    pub(crate) msrs: Arc<[u32]>,
    /// What the vCPU answers to CPUID. KVM would add what it changes in it by itself, and some
    /// hosts what their own CPU answers.
    pub(crate) cpuid: CpuId,
    /// The rate of its time stamp counter in kHz, where KVM can tell.
    pub(crate) tsc_khz: Option<u32>,
}

impl Saved for VcpuState {
    const KIND: &'static str = "vcpu";
    const VERSION: u32 = 2;

    /// Version 1 had the general-purpose registers as KVM has them, and the model-specific ones in
    /// decimal numbers.
    fn upgrade(version: u32, mut value: Value) -> Result<Value, UpgradeError> {
        let old = value.as_object_mut().filter(|_| version == 1);
        let old = old.ok_or(UpgradeError::TooOld)?;
        let take = |old: &mut Map<String, Value>, name| old.remove(name).unwrap_or_default();
        let regs: Raw<kvm_regs> = serde_json::from_value(take(old, "regs"))?;
        let registers = serde_json::to_value(SavedRegisters::from(&regs.0))?;
        old.insert("registers".into(), registers);
        let msrs: BTreeMap<u32, u64> = serde_json::from_value(take(old, "msrs"))?;
        let msrs = by_number::serialize(&msrs, serde_json::value::Serializer)?;
        old.insert("msrs".into(), msrs);
        Ok(value)
    }
}

/// A vCPU that cannot go on here.
#[derive(Debug, Error)]
pub enum VcpuRestoreError {
    /// A call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host's processor cannot do what the guest has seen that it can.
    #[error("the guest uses features that this host's CPU does not have: {0}")]
    Features(String),
    /// More CPUID than KVM takes.
    #[error("the guest has {0} CPUID entries, and KVM takes {KVM_MAX_CPUID_ENTRIES}")]
    CpuidEntries(usize),
    /// A register that this host does not have.
    #[error("this host's KVM does not take {value:#x} for model-specific register {index:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// What it is to hold.
        value: u64,
    },
    /// The guest would see time pass at another speed.
    #[error(
        "the guest's time stamp counter runs at {guest} kHz, this host's at {host} kHz, and KVM \
         cannot scale it"
    )]
    TscRate {
        /// The rate that the guest knows.
        guest: u32,
        /// The rate that there is.
        host: u32,
    },
}

impl VcpuState {
    /// Takes the state of a vCPU that is held.
    ///
    /// # Errors
    ///
    /// KVM does not show it.
    pub(crate) fn save(vcpu: &VcpuFd, known: &Known) -> Result<Self, KvmError> {
        // First, because KVM then takes in start-up interrupts, which change the rest.
        let mp_state = vcpu
            .get_mp_state()
            .map_err(failed("show a vCPU's run state"))?;
        let regs = vcpu.get_regs().map_err(failed("show registers"))?;
        let sregs = vcpu.get_sregs().map_err(failed("show control registers"))?;
        let xsave = vcpu.get_xsave().map_err(failed("show extended state"))?;
        let xcrs = vcpu
            .get_xcrs()
            .map_err(failed("show extended control registers"))?;
        let debug_regs = vcpu
            .get_debug_regs()
            .map_err(failed("show debug registers"))?;
        let lapic = vcpu.get_lapic().map_err(failed("show the local APIC"))?;
        let msrs = read_msrs(vcpu, &known.msrs)?;
        // Last, because what was read before may have moved events.
        let events = vcpu
            .get_vcpu_events()
            .map_err(failed("show a vCPU's events"))?;
        Ok(Self {
            mp_state: Raw(mp_state),
            registers: (&regs).into(),
            sregs: Raw(sregs),
            xsave: Raw(xsave),
            xcrs: Raw(xcrs),
            debug_regs: Raw(debug_regs),
            lapic: Raw(lapic),
            events: Raw(events),
            tsc_khz: known.tsc_khz,
            cpuid: known.cpuid.as_slice().iter().copied().map(Raw).collect(),
            msrs,
        })
    }

    /// Lets the time stamp counter go on by `time`, if its rate is known.
    pub(crate) fn advance(&mut self, time: Duration) {
        let ticks = u128::from(self.tsc_khz.unwrap_or(0)) * time.as_nanos() / 1_000_000;
        if let Some(tsc) = self.msrs.get_mut(&TSC) {
            *tsc = tsc.wrapping_add(u64::try_from(ticks).unwrap_or(0));
        }
    }

    /// Gives the state to a new vCPU; what it answers to CPUID is returned.
    ///
    /// # Errors
    ///
    /// It cannot go on here; it must not run then.
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        supported: &CpuId,
    ) -> Result<CpuId, VcpuRestoreError> {
        let entries: Vec<_> = self.cpuid.iter().map(|entry| entry.0).collect();
        let missing = cpuid::missing_features(&entries, supported.as_slice());
        if !missing.is_empty() {
            return Err(VcpuRestoreError::Features(missing.join(", ")));
        }
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| VcpuRestoreError::CpuidEntries(entries.len()))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(failed("take the CPU features"))?;
        self.restore_tsc_rate(vcpu)?;
        vcpu.set_mp_state(self.mp_state.0)
            .map_err(failed("take a vCPU's run state"))?;
        vcpu.set_regs(&(&self.registers).into())
            .map_err(failed("take registers"))?;
        vcpu.set_sregs(&self.sregs.0)
            .map_err(failed("take control registers"))?;
        // SAFETY: KVM reads more than the 4096 bytes of the structure only with features that a
        // process has to ask for with arch_prctl, which this one does not.
        unsafe { vcpu.set_xsave(&self.xsave.0) }.map_err(failed("take extended state"))?;
        vcpu.set_xcrs(&self.xcrs.0)
            .map_err(failed("take extended control registers"))?;
        vcpu.set_debug_regs(&self.debug_regs.0)
            .map_err(failed("take debug registers"))?;
        // After the control registers, which have the APIC's mode; before the deadline of its timer.
        vcpu.set_lapic(&self.lapic.0)
            .map_err(failed("take the local APIC"))?;
        self.restore_msrs(vcpu)?;
        // After the registers, which clear what is pending.
        vcpu.set_vcpu_events(&self.events.0)
            .map_err(failed("take a vCPU's events"))?;
        // Tells a guest's watchdog that it was stopped. A guest without KVM's clock needs no word.
        let _ = vcpu.kvmclock_ctrl();
        Ok(cpuid)
    }

    fn restore_tsc_rate(&self, vcpu: &VcpuFd) -> Result<(), VcpuRestoreError> {
        let (Some(guest), Ok(host)) = (self.tsc_khz, vcpu.get_tsc_khz()) else {
            return Ok(());
        };
        if tsc_rates_fit(guest, host) {
            return Ok(());
        }
        vcpu.set_tsc_khz(guest)
            .map_err(|_| VcpuRestoreError::TscRate { guest, host })
    }

    fn restore_msrs(&self, vcpu: &VcpuFd) -> Result<(), VcpuRestoreError> {
        let late = |&(index, _): &(u32, u64)| index == TSC_DEADLINE;
        let all = || self.msrs.iter().map(|(&index, &data)| (index, data));
        let mut entries: Vec<_> = all().filter(|entry| !late(entry)).collect();
        // A deadline of zero is none. One that has passed while the state was taken reads as zero
        // too, and its interrupt must not be lost: at a time that has passed it comes at once. A
        // timer in another mode ignores the register; one in this mode that was not armed interrupts
        // once for nothing.
        let now = self.msrs.get(&TSC).copied().unwrap_or_default();
        entries.extend(
            all()
                .filter(late)
                .map(|(index, data)| (index, if data == 0 { now } else { data })),
        );
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let done = write_msrs(vcpu, rest)?;
            let Some((&(index, value), after)) = rest.get(done..).and_then(<[_]>::split_first)
            else {
                break;
            };
            // Many registers cannot be written with what they hold anyway.
            if read_msrs(vcpu, &[index])?.get(&index) != Some(&value) {
                return Err(VcpuRestoreError::Msr { index, value });
            }
            rest = after;
        }
        Ok(())
    }
}

/// Whether a guest whose time stamp counter runs at `guest` kHz can take one of `host` kHz for it.
pub(crate) fn tsc_rates_fit(guest: u32, host: u32) -> bool {
    let tolerated = u64::from(guest) * TSC_TOLERANCE_PPM / 1_000_000;
    u64::from(guest.abs_diff(host)) <= tolerated
}

fn msrs_of(entries: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, KvmError> {
    let entries: Vec<_> = entries
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries)
        .map_err(|_| failed("take that many registers")(kvm_ioctls::Error::new(libc::E2BIG)))
}

/// How many registers KVM takes in one call, which is fewer than there may be.
const MSRS_PER_CALL: usize = 256;

/// Reads registers and leaves out those that this vCPU does not have.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<BTreeMap<u32, u64>, KvmError> {
    let mut values = BTreeMap::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let mut msrs = msrs_of(rest.iter().take(MSRS_PER_CALL).map(|&index| (index, 0)))?;
        let done = vcpu
            .get_msrs(&mut msrs)
            .map_err(failed("show model-specific registers"))?;
        let read = msrs.as_slice().iter().take(done);
        values.extend(read.map(|entry| (entry.index, entry.data)));
        // KVM stops at one that it cannot read.
        let stopped = done < rest.len().min(MSRS_PER_CALL);
        rest = rest.get(done + usize::from(stopped)..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes registers up to one that KVM does not take; how many it has taken.
fn write_msrs(vcpu: &VcpuFd, entries: &[(u32, u64)]) -> Result<usize, KvmError> {
    let mut done = 0;
    for chunk in entries.chunks(MSRS_PER_CALL) {
        let written = vcpu
            .set_msrs(&msrs_of(chunk.iter().copied())?)
            .map_err(failed("take model-specific registers"))?;
        done += written;
        if written < chunk.len() {
            break;
        }
    }
    Ok(done)
}
