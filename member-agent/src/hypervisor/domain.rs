//! What a domain is made of, and the state it is in.
//!
//! These are the agent's own words, apart from the wire's: drivers are written against them, and they
//! are what the agent keeps on disk. `wire.rs` translates.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::step::{Reason, Refusal, StepKind};

/// One mebibyte in bytes.
pub const MIB: u64 = 1024 * 1024;

/// Everything a driver must know to build a domain.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DomainSpec {
    /// The VM this domain is the running form of.
    pub vm: Uuid,
    /// For people: process lists and logs.
    pub name: String,
    /// Bytes; what the domain may ever have.
    pub memory_static_max: u64,
    /// Bytes; what it should have now. 0 means `memory_static_max`.
    pub memory_target: u64,
    /// How many vCPUs can be plugged.
    pub vcpus_max: u32,
    /// How many vCPUs it begins with.
    pub vcpus_at_startup: u32,
    /// Kernel to boot directly; empty: the firmware boots.
    pub kernel: String,
    /// Initial ramdisk of that kernel.
    pub ramdisk: String,
    /// Command line of that kernel.
    pub kernel_args: String,
    /// `VM.platform`, as it is.
    pub platform: BTreeMap<String, String>,
    /// Log index of the decision to start.
    pub generation: u64,
    /// "bios" (or empty) or "uefi".
    pub firmware: String,
    /// Letters c (disk), d (CD) and n (network), first tried first.
    pub boot_order: String,
    /// Disks in the order of their devices.
    pub disks: Vec<Disk>,
    /// NICs in the order of their devices.
    pub vifs: Vec<Vif>,
    /// What becomes of the domain when the guest switches itself off.
    pub on_shutdown: Action,
    /// What becomes of it when the guest reboots.
    pub on_reboot: Action,
    /// What becomes of it when the guest panics.
    pub on_crash: Action,
}

impl DomainSpec {
    /// The bytes that this domain takes from its host when it begins, in whole MiB: all it may ever have. Nobody can
    /// make a guest stay below that before it has a balloon driver that runs; what it gives back is free again.
    pub fn memory(&self) -> u64 {
        whole(self.memory_static_max.max(self.memory_target))
    }

    /// The bytes that it should have, in whole MiB.
    pub fn target(&self) -> u64 {
        if self.memory_target > 0 { whole(self.memory_target) } else { self.memory() }
    }

    /// Whether a domain of this spec is the same machine as one of `other`, whatever the decision that started it.
    pub fn same_machine(&self, other: &Self) -> bool {
        self.comparable() == other.comparable()
    }

    /// Disks come and go, so their order says nothing.
    fn comparable(&self) -> Self {
        let mut spec = Self { generation: 0, ..self.clone() };
        spec.disks.sort_by(|one, other| (&one.vbd, &one.device).cmp(&(&other.vbd, &other.device)));
        spec
    }
}

fn whole(bytes: u64) -> u64 {
    bytes.div_ceil(MIB).saturating_mul(MIB)
}

/// What follows when a guest ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The domain goes.
    #[default]
    Destroy,
    /// The domain begins anew.
    Restart,
}

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// The VBD it stands for.
    pub vbd: String,
    /// The name the guest should see, such as "xvda".
    pub device: String,
    /// File or block device; empty for a CD drive without a disc.
    pub path: String,
    /// What the bytes of the file mean.
    pub format: ImageFormat,
    /// The guest cannot write.
    pub read_only: bool,
    /// A CD drive.
    pub cdrom: bool,
    /// Others may have it open at the same time, also to write.
    pub sharable: bool,
    /// The firmware may boot from it.
    pub bootable: bool,
}

impl Disk {
    /// Puts another image into it, or none.
    #[must_use]
    pub fn with(&self, medium: Option<&Medium>) -> Self {
        let medium = medium.cloned().unwrap_or_default();
        Self { path: medium.path, format: medium.format, ..self.clone() }
    }
}

/// An image for a CD drive.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Medium {
    /// File or block device.
    pub path: String,
    /// What its bytes mean.
    pub format: ImageFormat,
}

/// What the bytes of an image mean. It is told, never guessed from the content, which is the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageFormat {
    /// The disk's own bytes.
    #[default]
    Raw,
    /// QEMU's format, which can be thin above another image.
    Qcow2,
}

impl ImageFormat {
    /// QEMU's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A NIC of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Vif {
    /// The VIF it stands for.
    pub vif: String,
    /// Its number.
    pub device: String,
    /// Its MAC address.
    pub mac: String,
    /// The bridge it belongs on.
    pub bridge: String,
    /// Its MTU; 0: the default.
    pub mtu: u32,
}

/// Whether the vCPUs of a domain run, and how it went if it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// There is no domain.
    Halted,
    /// There is one, and it stands still.
    Paused,
    /// There is one, and it runs.
    Running,
    /// There is none any more, and nobody asked for that.
    Crashed,
}

impl Power {
    /// The word used in refusals and logs.
    pub fn word(self) -> &'static str {
        match self {
            Self::Halted => "halted",
            Self::Paused => "paused",
            Self::Running => "running",
            Self::Crashed => "crashed",
        }
    }
}

/// A way to a domain's console, local to its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// "rfb" or "vt100".
    pub protocol: String,
    /// Such as "unix:/run/…".
    pub location: String,
}

/// A domain as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainState {
    /// The VM.
    pub vm: Uuid,
    /// Its power.
    pub power: Power,
    /// Its number on this host; -1 when there is none.
    pub domid: i64,
    /// Bytes it holds.
    pub memory_actual: u64,
    /// Bytes it was last told to hold. Until it does, the host keeps the larger of the two for it.
    #[serde(default)]
    pub memory_target: u64,
    /// Unix seconds of its start or last reboot.
    pub start_time: u64,
    /// The operation that brought it to this state; empty: it came by itself.
    pub last_operation: String,
    /// Why it went, for logs.
    pub reason: String,
    /// Its consoles.
    pub consoles: Vec<Console>,
    /// Log index of the decision that started it.
    pub generation: u64,
    /// What the guest says of itself; none until it says something.
    #[serde(default)]
    pub guest: Option<GuestMetrics>,
    /// The VBDs that are plugged.
    #[serde(default)]
    pub disks: Vec<String>,
}

/// What the guest says of itself. It is the guest's word: bounded, and good for showing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestMetrics {
    /// "name", "uname", "distro", "major", "minor".
    pub os_version: BTreeMap<String, String>,
    /// Version of its agent: "major", "minor", "micro", "build".
    pub pv_drivers_version: BTreeMap<String, String>,
    /// Addresses: "0/ip", "0/ipv4/0", "0/ipv6/0".
    pub networks: BTreeMap<String, String>,
    /// What it can do, such as "feature-shutdown".
    pub other: BTreeMap<String, String>,
    /// Its agent answers.
    pub agent_live: bool,
    /// Its balloon driver answers.
    pub can_balloon: bool,
    /// It takes and gives disks while it runs.
    pub can_plug_disks: bool,
}

impl DomainState {
    /// The bytes that the host keeps for it.
    pub fn taken(&self) -> u64 {
        self.memory_actual.max(self.memory_target)
    }

    /// The state of a VM without a domain.
    pub fn halted(vm: Uuid, by: &str, reason: &str) -> Self {
        Self {
            vm,
            power: Power::Halted,
            domid: -1,
            memory_actual: 0,
            memory_target: 0,
            start_time: 0,
            last_operation: by.to_owned(),
            reason: reason.to_owned(),
            consoles: Vec::new(),
            generation: 0,
            guest: None,
            disks: Vec::new(),
        }
    }

    /// This domain's last state: it is gone.
    pub fn gone(&self, power: Power, by: &str, reason: &str) -> Self {
        Self { power, generation: self.generation, ..Self::halted(self.vm, by, reason) }
    }
}

/// How a reboot is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reboot {
    /// The guest is asked first.
    pub clean: bool,
    /// How long it has to obey.
    pub limit: Duration,
    /// What the domain is made of anew; none: as it was.
    pub spec: Option<DomainSpec>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_takes_all_it_may_have_until_its_guest_gives_some_back() {
        let spec = DomainSpec { memory_static_max: 100 * MIB, ..DomainSpec::default() };
        assert_eq!((spec.memory(), spec.target()), (100 * MIB, 100 * MIB));
        let spec = DomainSpec { memory_target: 64 * MIB + 1, ..spec };
        assert_eq!((spec.memory(), spec.target()), (100 * MIB, 65 * MIB));
        let state = DomainState::halted(spec.vm, "", "");
        let state = DomainState { memory_actual: spec.memory(), memory_target: spec.target(), ..state };
        assert_eq!(state.taken(), 100 * MIB);
        assert_eq!(DomainState { memory_actual: 64 * MIB, ..state }.taken(), 65 * MIB);
    }

    #[test]
    fn a_new_decision_alone_does_not_make_another_machine() {
        let one = DomainSpec { name: "a".into(), generation: 1, ..DomainSpec::default() };
        assert!(one.same_machine(&DomainSpec { generation: 2, ..one.clone() }));
        assert!(!one.same_machine(&DomainSpec { vcpus_max: 2, ..one.clone() }));
    }
}
