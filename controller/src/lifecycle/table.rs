//! What may be done when, as data: power states, what goes together, and what templates and snapshots can still do.

use datamodel::enums::{VmOperations as Op, VmPowerState as Power};

pub(super) const HALTED: u8 = 1;
pub(super) const PAUSED: u8 = 2;
pub(super) const SUSPENDED: u8 = 4;
pub(super) const RUNNING: u8 = 8;
const LIVE: u8 = PAUSED | RUNNING;
const ANY: u8 = HALTED | PAUSED | SUSPENDED | RUNNING;

/// Who is told of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// Clients, in `allowed_operations`.
    Clients,
    /// Nobody: it is checked when it is asked for.
    Nobody,
}

/// A line of the table.
pub(super) struct Line {
    pub(super) operation: Op,
    /// The power states in which it is possible.
    pub(super) states: u8,
    pub(super) told: Told,
}

const fn told(operation: Op, states: u8) -> Line {
    Line { operation, states, told: Told::Clients }
}

const fn untold(operation: Op, states: u8) -> Line {
    Line { operation, states, told: Told::Nobody }
}

pub(super) const TABLE: &[Line] = &[
    told(Op::Start, HALTED),
    told(Op::StartOn, HALTED),
    told(Op::Provision, HALTED),
    told(Op::MakeIntoTemplate, HALTED),
    told(Op::ChangingNvram, HALTED),
    told(Op::ChangingShadowMemory, HALTED),
    told(Op::ChangingStaticRange, HALTED),
    told(Op::ChangingDynamicRange, HALTED | RUNNING),
    told(Op::ChangingVCPUsLive, RUNNING),
    told(Op::Pause, RUNNING),
    told(Op::Unpause, PAUSED),
    told(Op::Suspend, RUNNING),
    told(Op::Resume, SUSPENDED),
    told(Op::ResumeOn, SUSPENDED),
    told(Op::CleanShutdown, RUNNING),
    told(Op::CleanReboot, RUNNING),
    told(Op::HardShutdown, LIVE | SUSPENDED),
    told(Op::HardReboot, LIVE),
    told(Op::Checkpoint, LIVE | SUSPENDED),
    told(Op::Snapshot, ANY),
    told(Op::Revert, ANY),
    told(Op::Clone, HALTED),
    told(Op::Copy, HALTED),
    told(Op::Destroy, HALTED | SUSPENDED),
    untold(Op::ChangingMemoryLimits, HALTED),
    untold(Op::ChangingVCPUs, HALTED),
    untold(Op::ChangingMemoryLive, RUNNING),
    untold(Op::AwaitingMemoryLive, RUNNING),
    untold(Op::ChangingShadowMemoryLive, RUNNING),
    untold(Op::Csvm, SUSPENDED),
    untold(Op::Shutdown, LIVE | SUSPENDED),
    untold(Op::CreateTemplate, HALTED | SUSPENDED),
    untold(Op::GetBootRecord, LIVE | SUSPENDED),
    untold(Op::DataSourceOp, RUNNING),
    untold(Op::SendSysrq, RUNNING),
    untold(Op::SendTrigger, RUNNING),
    untold(Op::CallPlugin, RUNNING),
    untold(Op::QueryServices, ANY),
    untold(Op::PowerStateReset, ANY),
    untold(Op::Reverting, ANY),
    untold(Op::AssertOperationValid, ANY),
    untold(Op::UpdateAllowedOperations, ANY),
    untold(Op::SnapshotWithQuiesce, RUNNING),
    // These have a state and no function yet: a client should not see a button that cannot work.
    untold(Op::CreateVtpm, HALTED),
    untold(Op::Export, HALTED | SUSPENDED),
    untold(Op::MetadataExport, ANY),
    untold(Op::PoolMigrate, RUNNING),
    untold(Op::MigrateSend, HALTED | SUSPENDED | RUNNING),
    // There is no VM yet that it could be done to.
    untold(Op::Import, 0),
];

/// Possible in a further state for those that the caller says.
pub(super) const OF_CONTROL_DOMAINS_THAT_RUN: &[Op] =
    &[Op::ChangingVCPUs, Op::ChangingStaticRange, Op::ChangingMemoryLimits];
pub(super) const OF_SUSPENDED_ONES: &[Op] = &[Op::Clone, Op::Copy];

/// What a template can still do.
pub(super) const FOR_TEMPLATES: &[Op] = &[
    Op::ChangingDynamicRange,
    Op::ChangingStaticRange,
    Op::ChangingMemoryLimits,
    Op::ChangingShadowMemory,
    Op::ChangingVCPUs,
    Op::ChangingNvram,
    Op::Clone,
    Op::Copy,
    Op::Export,
    Op::MetadataExport,
    Op::Provision,
];

/// What a template that does not come with the product can do besides.
pub(super) const FOR_OWN_TEMPLATES: &[Op] = &[Op::Destroy, Op::MigrateSend];

/// What a snapshot can do.
pub(super) const FOR_SNAPSHOTS: &[Op] =
    &[Op::Revert, Op::Clone, Op::Copy, Op::Export, Op::MetadataExport, Op::Destroy, Op::HardShutdown];

/// What a domain that serves the pool can do, and what a host's own cannot do of that.
pub(super) const FOR_CONTROL_DOMAINS: &[Op] = &[
    Op::DataSourceOp,
    Op::ChangingDynamicRange,
    Op::ChangingStaticRange,
    Op::ChangingMemoryLimits,
    Op::ChangingMemoryLive,
    Op::AwaitingMemoryLive,
    Op::MetadataExport,
    Op::Start,
    Op::StartOn,
    Op::ChangingVCPUs,
    Op::Destroy,
];
pub(super) const NOT_FOR_HOSTS: &[Op] = &[Op::Destroy, Op::ChangingVCPUs];

/// What keeps a VM's memory, or takes it elsewhere.
pub(super) const MOVES_MEMORY: &[Op] = &[Op::Suspend, Op::Checkpoint, Op::PoolMigrate, Op::MigrateSend];

/// Operations that go together with all that is under way already.
pub(super) fn compatible(operation: Op, under_way: &[Op]) -> bool {
    let all = |among: &[Op]| under_way.iter().all(|other| among.contains(other));
    let none = |among: &[Op]| under_way.iter().all(|other| !among.contains(other));
    let only_moves = under_way.len() == 1 && all(&[Op::MigrateSend]);
    match operation {
        Op::Clone | Op::Copy | Op::Export => all(&[Op::Clone, Op::Copy, Op::Export]),
        Op::Snapshot => all(&[Op::Snapshot, Op::Checkpoint]) || all(&[Op::SnapshotWithQuiesce]),
        Op::Checkpoint => all(&[Op::Snapshot, Op::Checkpoint]),
        Op::GetBootRecord => all(&[Op::GetBootRecord]),
        Op::MetadataExport | Op::CleanShutdown | Op::CleanReboot => under_way.is_empty() || only_moves,
        Op::HardShutdown => none(&[Op::HardShutdown]),
        Op::HardReboot => none(&[Op::HardShutdown, Op::HardReboot]),
        _ => under_way.is_empty(),
    }
}

pub(super) const fn bit(power: Power) -> u8 {
    match power {
        Power::Halted => HALTED,
        Power::Paused => PAUSED,
        Power::Suspended => SUSPENDED,
        Power::Running => RUNNING,
    }
}

pub(super) fn states_of(operation: Op) -> u8 {
    TABLE.iter().find(|line| line.operation == operation).map_or(0, |line| line.states)
}
