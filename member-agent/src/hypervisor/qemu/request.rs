//! What a domain is asked for, and what it still owes.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::saving::Saving;
use crate::hypervisor::domain::{Disk, DomainState, Medium, Power, Refusal, StepKind};

pub(super) type Answer = Result<DomainState, Refusal>;

/// What a domain can be asked for.
#[derive(Debug)]
pub(super) enum What {
    Destroy,
    Pause,
    Unpause,
    Shutdown,
    /// `anew`: into another machine. The domain ends when its guest goes, and who asked builds the next one.
    Reboot {
        clean: bool,
        anew: bool,
    },
    Suspend {
        into: PathBuf,
        keep_running: bool,
    },
    MemoryTarget(u64),
    Vcpus(u32),
    SysRq(char),
    Plug(Disk),
    Unplug {
        vbd: String,
        force: bool,
    },
    Medium {
        vbd: String,
        medium: Option<Medium>,
    },
    Relink {
        vbd: String,
        overlay: PathBuf,
    },
    Resize {
        vbd: String,
        bytes: u64,
    },
    Join {
        vbd: String,
        base: Option<PathBuf>,
    },
}

impl What {
    /// The step it is; work on images is none.
    pub fn kind(&self) -> Option<StepKind> {
        Some(match self {
            Self::Destroy => StepKind::Destroy,
            Self::Pause => StepKind::Pause,
            Self::Unpause => StepKind::Unpause,
            Self::Shutdown => StepKind::Shutdown,
            Self::Reboot { .. } => StepKind::Reboot,
            Self::Suspend { .. } => StepKind::Suspend,
            Self::MemoryTarget(_) => StepKind::MemoryTarget,
            Self::Vcpus(_) => StepKind::Vcpus,
            Self::SysRq(_) => StepKind::Keys,
            Self::Plug(_) => StepKind::PlugDisk,
            Self::Unplug { .. } => StepKind::UnplugDisk,
            Self::Medium { .. } => StepKind::Medium,
            Self::Relink { .. } | Self::Resize { .. } | Self::Join { .. } => return None,
        })
    }

    /// Refuses what has no sense in this state.
    pub fn check(&self, power: Power) -> Result<(), Refusal> {
        let clean = matches!(self, Self::Shutdown | Self::Reboot { clean: true, .. });
        self.kind().map_or(Ok(()), |kind| kind.check(power, clean))
    }
}

/// A request on its way to a domain's task.
#[derive(Debug)]
pub(super) struct Request {
    pub what: What,
    /// How long it may take, where that is not the task's own affair.
    pub limit: Duration,
    pub by: String,
    pub answer: oneshot::Sender<Answer>,
}

/// Images that are being joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Join {
    pub job: String,
    /// The node that takes in what is below it.
    pub top: String,
}

/// What has to happen before a request is answered.
#[derive(Debug)]
pub(super) enum Wait {
    /// The guest switches itself off.
    Off,
    /// The guest lets go of this device.
    Unplugged(String),
    /// The guest lets go of these vCPUs.
    Vcpus(Vec<String>),
    /// The memory is written.
    Saved(Saving),
    /// The images are joined: this job ends.
    Joined(Join),
}

impl Wait {
    /// How soon to look again, or ask again, when nothing is told.
    pub fn pace(&self) -> Duration {
        match self {
            // A guest that does not listen yet would miss a single press of the power button.
            Self::Off => Duration::from_secs(5),
            Self::Unplugged(_) | Self::Vcpus(_) => Duration::from_secs(2),
            Self::Saved(_) | Self::Joined(_) => Duration::from_millis(500),
        }
    }
}

/// A request that takes its time.
#[derive(Debug)]
pub(super) struct Pending {
    pub request: Request,
    pub wait: Wait,
    pub deadline: Instant,
    pub look: Instant,
}

impl Pending {
    /// Begins to wait.
    pub fn new(request: Request, wait: Wait) -> Self {
        let now = Instant::now();
        Self { deadline: now + request.limit, look: now + wait.pace(), request, wait }
    }

    /// When there is something to do for it.
    pub fn next(&self) -> Instant {
        self.look.min(self.deadline)
    }
}

/// Nobody may be waiting any more; that is theirs to know.
pub(super) fn answer(to: oneshot::Sender<Answer>, outcome: Answer) {
    let _ = to.send(outcome);
}
