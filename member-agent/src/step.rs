//! What a step is called, and why one is refused: words that hypervisors and stores share.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

pub use crate::hypervisor::domain::ImageFormat;
use crate::hypervisor::domain::Power;

/// What a step does, without what it needs for it; with operation, subject and number it names the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    /// Builds a domain.
    Start,
    /// Takes its power away.
    Destroy,
    /// Stops its vCPUs.
    Pause,
    /// Lets them run on.
    Unpause,
    /// Asks the guest to switch itself off.
    Shutdown,
    /// Begins the guest anew, asked or not.
    Reboot,
    /// Writes its memory to a volume.
    Suspend,
    /// Builds it from such a volume.
    Resume,
    /// Says how much memory it should have.
    MemoryTarget,
    /// Says how many vCPUs it should have.
    Vcpus,
    /// Presses keys.
    Keys,
    /// A disk comes to a domain.
    PlugDisk,
    /// A disk goes from a domain.
    UnplugDisk,
    /// What is in a CD drive.
    Medium,
    /// The host uses a store from now on.
    AttachStore,
    /// And no longer.
    DetachStore,
    /// Makes an empty store.
    CreateStore,
    /// Removes a store with all that is in it.
    DestroyStore,
    /// Looks for stores.
    ProbeStore,
    /// Looks at a store, and mends it.
    ScanStore,
    /// Makes an empty volume.
    CreateVolume,
    /// Keeps a volume as it is now.
    SnapshotVolume,
    /// Makes a second volume of it.
    CloneVolume,
    /// Copies all its bytes.
    CopyVolume,
    /// Makes it larger.
    ResizeVolume,
    /// Removes it.
    DestroyVolume,
    /// Makes it what a snapshot of it is.
    RevertVolume,
}

impl StepKind {
    /// Refuses the step for a domain in a state where it has no sense. The same for all drivers.
    pub fn check(self, power: Power, clean: bool) -> Result<(), Refusal> {
        let allowed = match self {
            Self::Start | Self::Resume => matches!(power, Power::Halted | Power::Crashed),
            Self::Pause | Self::Shutdown | Self::Keys => power == Power::Running,
            Self::Suspend => matches!(power, Power::Running | Power::Paused),
            Self::Unpause => power == Power::Paused,
            Self::Reboot => power == Power::Running || (!clean && power == Power::Paused),
            _ => true,
        };
        if allowed { Ok(()) } else { Err(Refusal::new(Reason::BadState, power.word())) }
    }

    /// Only looks, or mends what wants mending anyway: done as often as it is asked for.
    pub fn looks(self) -> bool {
        matches!(self, Self::ProbeStore | Self::ScanStore)
    }
}

/// Why a step was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// A newer master has spoken.
    StaleEpoch,
    /// There is no such domain.
    NoSuchDomain,
    /// There is one already.
    DomainExists,
    /// The host's memory is given away.
    NotEnoughMemory,
    /// Time was up.
    TimedOut,
    /// Not in the state it is in.
    BadState,
    /// The hypervisor would not build or begin it.
    BootFailed,
    /// The host belongs to another pool.
    WrongPool,
    /// This driver cannot do it.
    Unsupported,
    /// Anything else.
    Failed,
    /// The store has no room.
    NoSpace,
    /// The store is not attached, or not there at all.
    NoSuchStore,
    /// The store has no such volume.
    NoSuchVolume,
    /// Somebody has it open.
    InUse,
    /// There is one already.
    VolumeExists,
    /// What was said of the store cannot be.
    BadConfig,
    /// The image is not one.
    Damaged,
    /// The domain has no such disk.
    NoSuchDisk,
    /// The guest has not what this needs.
    NoGuestSupport,
}

/// A step that was refused or failed: what it is about is as it was, or gone if it was being built.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{reason:?}: {detail}")]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// In words.
    pub detail: String,
    /// Bytes wanted, for `NotEnoughMemory` and `NoSpace`.
    #[serde(default)]
    pub needed: u64,
    /// Bytes there are, for `NotEnoughMemory` and `NoSpace`.
    #[serde(default)]
    pub available: u64,
}

impl Refusal {
    /// A refusal with a reason and words.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), needed: 0, available: 0 }
    }

    /// No memory for `needed` bytes.
    pub fn memory(needed: u64, available: u64) -> Self {
        let detail = format!("{needed} bytes wanted, {available} free");
        Self { needed, available, ..Self::new(Reason::NotEnoughMemory, detail) }
    }

    /// No room for `needed` bytes.
    pub fn space(needed: u64, available: u64) -> Self {
        let detail = format!("{needed} bytes wanted, {available} free");
        Self { needed, available, ..Self::new(Reason::NoSpace, detail) }
    }

    /// No domain for this VM.
    pub fn no_such_domain(vm: Uuid) -> Self {
        Self::new(Reason::NoSuchDomain, vm.to_string())
    }

    /// Something went wrong that the caller cannot mend.
    pub fn failed(error: impl std::fmt::Display) -> Self {
        Self::new(Reason::Failed, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_refused_with_the_state_that_forbids_it() {
        let refusal = StepKind::Pause.check(Power::Paused, false).expect_err("paused twice");
        assert_eq!((refusal.reason, refusal.detail.as_str()), (Reason::BadState, "paused"));
        assert!(StepKind::Reboot.check(Power::Paused, false).is_ok());
        assert!(StepKind::Reboot.check(Power::Paused, true).is_err());
    }
}
