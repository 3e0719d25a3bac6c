//! Power of a VM: what starts, pauses, unpauses, ends and reboots its domain. One step each.

use std::sync::Arc;

use datamodel::enums::{VmOperations, VmPowerState};
use datamodel::fields::vm;
use datamodel::{ApiError, ClassKind, Host, Ref, Task, Value, Vm, errors};
use proto::agent::step::Action;
use proto::agent::{
    DestroyDomain, DomainSpec, DomainState, PauseDomain, PowerState, RebootDomain, ShutdownDomain, StartDomain,
    UnpauseDomain,
};
use raft_store::{LogIndex, Row, State};

use super::suspend::discard;
use super::{CLEAN_LIMIT, Draft, Ending, Kind, Planned, Seen, may_run_at, run, show};
use crate::call::{Call, find};
use crate::failure::{Failure, Served, refuse};
use crate::membership::is_live;
use crate::storage::disks;
use crate::{interfaces, lifecycle, placement};

/// What is done to a VM's power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Power {
    Start,
    StartPaused,
    Pause,
    Unpause,
    CleanShutdown,
    HardShutdown,
    CleanReboot,
    HardReboot,
}

pub(super) const KINDS: &[&dyn Kind] = &[
    &Power::Start,
    &Power::StartPaused,
    &Power::Pause,
    &Power::Unpause,
    &Power::CleanShutdown,
    &Power::HardShutdown,
    &Power::CleanReboot,
    &Power::HardReboot,
];

impl Power {
    const fn starts(self) -> bool {
        matches!(self, Self::Start | Self::StartPaused)
    }

    const fn reboots(self) -> bool {
        matches!(self, Self::CleanReboot | Self::HardReboot)
    }

    fn kind(self) -> &'static dyn Kind {
        match self {
            Self::Start => &Self::Start,
            Self::StartPaused => &Self::StartPaused,
            Self::Pause => &Self::Pause,
            Self::Unpause => &Self::Unpause,
            Self::CleanShutdown => &Self::CleanShutdown,
            Self::HardShutdown => &Self::HardShutdown,
            Self::CleanReboot => &Self::CleanReboot,
            Self::HardReboot => &Self::HardReboot,
        }
    }
}

/// Changes the power of a VM, on a host if one is asked for.
pub(crate) async fn run_power(
    call: &Call,
    this: Ref<Vm>,
    what: VmOperations,
    power: Power,
    on: Option<Ref<Host>>,
) -> Served<()> {
    run(call, power.kind(), move |draft| begin(draft, this, what, power, on)).await.map(drop)
}

pub(crate) async fn clean_shutdown(call: &Call, this: Ref<Vm>) -> Served<()> {
    run_power(call, this, VmOperations::CleanShutdown, Power::CleanShutdown, None).await
}

/// Ends a VM whatever its guest wants. A halted one is what was asked for.
pub(crate) async fn hard_shutdown(call: &Call, this: Ref<Vm>) -> Served<()> {
    let state = call.latest().await?;
    let row = find(&state, this)?;
    match row.get(vm::POWER_STATE) {
        VmPowerState::Halted if !row.get(vm::IS_A_TEMPLATE) => Ok(()),
        VmPowerState::Suspended => discard(call, this).await,
        _ => run_power(call, this, VmOperations::HardShutdown, Power::HardShutdown, None).await,
    }
}

/// Asks first, then does not ask.
pub(crate) async fn shutdown(call: &Call, this: Ref<Vm>) -> Served<()> {
    let state = call.latest().await?;
    lifecycle::check(&state, &*find(&state, this)?, VmOperations::Shutdown)?;
    match clean_shutdown(call, this).await {
        Err(Failure::Api(error)) => {
            tracing::info!(vm = %this, %error, "the guest did not shut down: power off");
            hard_shutdown(call, this).await
        }
        other => other,
    }
}

fn begin(draft: &mut Draft<'_>, this: Ref<Vm>, what: VmOperations, power: Power, on: Option<Ref<Host>>) -> Served<()> {
    let row = draft.row(this)?;
    lifecycle::check(draft.state, &row, what)?;
    draft.hold(&row, what.as_str());
    if power.reboots() {
        disks::keep_all(draft, &row)?;
    }
    let host_ref = if power.starts() { reserve(draft, &row, on)? } else { row.get(vm::RESIDENT_ON) };
    draft.about(this).on(host_ref);
    Ok(())
}

/// Chooses the host for a VM, and takes its memory and its disks for it.
pub(super) fn reserve(draft: &mut Draft<'_>, row: &Row, on: Option<Ref<Host>>) -> Served<Ref<Host>> {
    let this = row.typed::<Vm>();
    expect_nowhere(draft.state, row)?;
    let host_ref = place(draft.call, draft.state, row, on)?;
    // The host's other starts are decided against this one: two that together do not fit cannot both commit.
    let host_row = draft.row(host_ref)?;
    let target = placement::target(row, placement::free_memory(draft.state, &host_row));
    draft
        .change
        .expect_row(&host_row)
        .touch(Host::ID, host_ref.opaque())
        .set(this, vm::SCHEDULED_TO_BE_RESIDENT_ON, host_ref)
        .set(this, vm::MEMORY_TARGET, target)
        .set(this, vm::MEMORY_OVERHEAD, placement::overhead(row));
    disks::hold_all(draft, row)?;
    Ok(host_ref)
}

/// A VM that may run where the pool does not see it starts nowhere.
fn expect_nowhere(state: &State, row: &Row) -> Served<()> {
    let Some(host_ref) = may_run_at(state, row) else { return Ok(()) };
    if !state.row(host_ref).is_some_and(|host_row| is_live(state, host_row)) {
        return refuse(errors::host_offline(host_ref));
    }
    // The host is being asked to end it just now.
    let (this, word) = (row.typed::<Vm>(), VmOperations::HardShutdown.as_str());
    refuse(errors::other_operation_in_progress("VM", this, word, Ref::<Task>::NULL.to_string()))
}

/// The host that starts a VM.
fn place(call: &Call, state: &Arc<State>, vm_row: &Row, on: Option<Ref<Host>>) -> Served<Ref<Host>> {
    if let Some(host_ref) = on {
        placement::check(state, vm_row, &*find(state, host_ref)?)?;
        return Ok(host_ref);
    }
    let pool = state.all::<datamodel::Pool>().next();
    let master = pool.map_or(Ref::NULL, |row| row.get(datamodel::fields::pool::MASTER));
    let draw = f64::from(u32::try_from(call.uuid().as_u128() & 0xffff_ffff).unwrap_or(0)) / f64::from(u32::MAX);
    Ok(placement::choose(state, vm_row, master, draw * 0.999_999)?.typed())
}

impl Kind for Power {
    fn verb(&self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::StartPaused => "start_paused",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
            Self::CleanShutdown => "clean_shutdown",
            Self::HardShutdown => "hard_shutdown",
            Self::CleanReboot => "clean_reboot",
            Self::HardReboot => "hard_reboot",
        }
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (state, journal) = (seen.state, seen.journal);
        if journal.host.is_null() {
            // Suspended or halted: there is no domain to act on.
            return Ok(Vec::new());
        }
        let row = find(state, journal.vm)?;
        let spec = || Ok::<_, Failure>(Some(spec(state, &row, journal.host, journal.decided)?));
        let timeout_ms = u64::try_from(CLEAN_LIMIT.as_millis()).unwrap_or(u64::MAX);
        let action = match self {
            Self::Start => Action::Start(StartDomain { spec: spec()?, paused: false }),
            Self::StartPaused => Action::Start(StartDomain { spec: spec()?, paused: true }),
            Self::Pause => Action::Pause(PauseDomain {}),
            Self::Unpause => Action::Unpause(UnpauseDomain {}),
            Self::CleanShutdown => Action::Shutdown(ShutdownDomain { timeout_ms }),
            Self::HardShutdown => Action::Destroy(DestroyDomain {}),
            Self::CleanReboot => Action::Reboot(RebootDomain { clean: true, timeout_ms, spec: spec()? }),
            Self::HardReboot => Action::Reboot(RebootDomain { clean: false, timeout_ms: 0, spec: spec()? }),
        };
        let step = Planned::new(journal.host, row.uuid(), action);
        // Whose start may have been done is ended before it is started elsewhere.
        Ok(vec![if self.starts() { step.undone_by(Action::Destroy(DestroyDomain {})) } else { step }])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let journal = end.journal;
        if let Some(row) = end.state.row(journal.vm) {
            let gone = DomainState {
                vm: row.uuid().to_owned(),
                state: PowerState::Halted.into(),
                domid: -1,
                ..DomainState::default()
            };
            let domain = if journal.outcomes.is_empty() { &gone } else { journal.domain(0)? };
            end.change.set(journal.vm, vm::SCHEDULED_TO_BE_RESIDENT_ON, Ref::NULL);
            show(end.shared, end.state, end.change, row, journal.host, domain);
            if self.starts() && domain.state() != PowerState::Halted {
                disks::attached(end.state, end.change, row);
                interfaces::attached(end.state, end.change, row);
            }
        }
        Ok(Value::Void)
    }

    fn fail(&self, end: &mut Ending<'_>, _error: &ApiError) {
        if end.state.row(end.journal.vm).is_some() {
            end.change.set(end.journal.vm, vm::SCHEDULED_TO_BE_RESIDENT_ON, Ref::NULL);
        }
    }

    fn waits_for_drives(&self) -> bool {
        self.reboots()
    }
}

fn unsigned<T: TryFrom<i64> + Default>(number: i64) -> T {
    T::try_from(number).unwrap_or_default()
}

/// What the agent of a host is to make of a VM.
///
/// # Errors
/// A disk is gone, or the host does not reach it.
pub(super) fn spec(state: &State, row: &Row, host_ref: Ref<Host>, generation: LogIndex) -> Served<DomainSpec> {
    let boot = row.get(vm::HVM_BOOT_PARAMS);
    Ok(DomainSpec {
        vm: row.uuid().to_owned(),
        name: row.name_label().to_owned(),
        memory_static_max: unsigned(row.get(vm::MEMORY_STATIC_MAX)),
        memory_target: unsigned(placement::held(row)),
        vcpus_max: unsigned(row.get(vm::VCPUS_MAX)),
        vcpus_at_startup: unsigned(row.get(vm::VCPUS_AT_STARTUP)),
        kernel: row.get(vm::PV_KERNEL),
        ramdisk: row.get(vm::PV_RAMDISK),
        kernel_args: row.get(vm::PV_ARGS),
        platform: row.get(vm::PLATFORM).into_iter().collect(),
        generation: generation.0,
        firmware: boot.get("firmware").cloned().unwrap_or_else(|| "bios".into()),
        boot_order: boot.get("order").cloned().unwrap_or_else(|| "cd".into()),
        disks: disks::of_domain(state, row, host_ref)?,
        vifs: interfaces::of_domain(state, row),
        on_shutdown: row.get(vm::ACTIONS_AFTER_SHUTDOWN).as_str().to_owned(),
        on_reboot: row.get(vm::ACTIONS_AFTER_REBOOT).as_str().to_owned(),
        on_crash: row.get(vm::ACTIONS_AFTER_CRASH).as_str().to_owned(),
    })
}
