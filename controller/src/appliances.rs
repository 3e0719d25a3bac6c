//! Appliances: VMs that are started and shut down together, in their order.
//!
//! What is done to an appliance is an operation that is made of operations on its VMs. Whoever adopts it looks at them and
//! does what is left: a VM that is as wanted already is passed over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use datamodel::enums::{VmApplianceOperation as Operation, VmPowerState as Power};
use datamodel::fields::{task, vm, vm_appliance};
use datamodel::{ApiError, Ref, Value, Vm, VmAppliance, errors};
use futures::future::{BoxFuture, join_all};
use raft_store::{Row, State};

use crate::api;
use crate::call::{Call, find};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::operations::{self, Ending, Journal, Kind, Planned, Seen, is_cancelled};

/// The parameters of the operation.
const APPLIANCE: &str = "appliance";
const PAUSED: &str = "paused";
/// Nothing waits longer between two groups, whatever a VM says.
const LONGEST_DELAY: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Start,
    CleanShutdown,
    HardShutdown,
    Shutdown,
}

pub(crate) const KINDS: &[&dyn Kind] = &[&Verb::Start, &Verb::CleanShutdown, &Verb::HardShutdown, &Verb::Shutdown];

/// The VMs of an appliance.
fn members<'a>(state: &'a State, row: &Row) -> Vec<&'a Arc<Row>> {
    let all: Vec<Ref<Vm>> = row.get(vm_appliance::VMS);
    all.into_iter().filter_map(|this| state.row(this)).collect()
}

/// Whether an operation would have something to do.
fn concerns(operation: Operation, power: Power) -> bool {
    match operation {
        Operation::Start => power == Power::Halted,
        Operation::CleanShutdown => power == Power::Running,
        Operation::HardShutdown | Operation::Shutdown => power != Power::Halted,
    }
}

pub(crate) fn check(state: &State, row: &Row, operation: Operation) -> Result<(), ApiError> {
    expect_idle(state, row.typed())?;
    let members = members(state, row);
    if members.is_empty() {
        return Err(errors::operation_not_allowed("Appliance has no VMs."));
    }
    if members.iter().any(|row| concerns(operation, row.get(vm::POWER_STATE))) {
        return Ok(());
    }
    Err(errors::operation_not_allowed(format!("No VM of the appliance is in a state for {operation}.")))
}

/// Refuses while something is done to an appliance. None is idle.
pub(crate) fn expect_idle(state: &State, this: Ref<VmAppliance>) -> Result<(), ApiError> {
    let current: BTreeMap<String, Operation> =
        state.row(this).map(|row| row.get(vm_appliance::CURRENT_OPERATIONS)).unwrap_or_default();
    match current.iter().next() {
        Some((task, under_way)) => {
            Err(errors::other_operation_in_progress("VM_appliance", this, under_way.as_str(), task.as_str()))
        }
        None => Ok(()),
    }
}

pub(crate) fn allowed_operations(state: &State, row: &Row) -> Vec<Operation> {
    Operation::ALL.iter().copied().filter(|operation| check(state, row, *operation).is_ok()).collect()
}

/// Does something to all VMs of an appliance, one group of their order after the other.
pub(crate) async fn run(call: &Call, this: Ref<VmAppliance>, operation: Operation, paused: bool) -> Served<()> {
    let kind: &'static dyn Kind = match operation {
        Operation::Start => &Verb::Start,
        Operation::CleanShutdown => &Verb::CleanShutdown,
        Operation::HardShutdown => &Verb::HardShutdown,
        Operation::Shutdown => &Verb::Shutdown,
    };
    let draft = move |draft: &mut operations::Draft<'_>| {
        let row = draft.row(this)?;
        check(draft.state, &row, operation)?;
        draft.hold(&row, operation.as_str());
        draft.note(APPLIANCE, this).note(PAUSED, paused);
        Ok(())
    };
    operations::run(call, kind, draft).await.map(drop)
}

impl Kind for Verb {
    fn verb(&self) -> &'static str {
        match self {
            Self::Start => "appliance_start",
            Self::CleanShutdown => "appliance_clean_shutdown",
            Self::HardShutdown => "appliance_hard_shutdown",
            Self::Shutdown => "appliance_shutdown",
        }
    }

    fn plan(&self, _seen: &Seen<'_>) -> Served<Vec<Planned>> {
        Ok(Vec::new())
    }

    fn work<'a>(&'a self, shared: &'a Arc<Shared>, journal: &'a Journal) -> Option<BoxFuture<'a, Served<()>>> {
        Some(Box::pin(each_group(shared, journal, self.operation())))
    }

    fn record(&self, _end: &mut Ending<'_>) -> Served<Value> {
        Ok(Value::Void)
    }
}

impl Verb {
    const fn operation(self) -> Operation {
        match self {
            Self::Start => Operation::Start,
            Self::CleanShutdown => Operation::CleanShutdown,
            Self::HardShutdown => Operation::HardShutdown,
            Self::Shutdown => Operation::Shutdown,
        }
    }
}

/// The VMs in groups of equal order: ascending to start them, those without a place last; and back to end them.
fn groups(state: &State, row: &Row, operation: Operation) -> Vec<Vec<Ref<Vm>>> {
    let mut groups: BTreeMap<i64, Vec<Ref<Vm>>> = BTreeMap::new();
    for member in members(state, row) {
        let order = member.get(vm::ORDER);
        groups.entry(if order < 0 { i64::MAX } else { order }).or_default().push(member.typed());
    }
    let ascending = groups.into_values();
    if operation == Operation::Start { ascending.collect() } else { ascending.rev().collect() }
}

async fn each_group(shared: &Arc<Shared>, journal: &Journal, operation: Operation) -> Served<()> {
    let state = shared.store.read().await?;
    let row = find(&state, journal.object::<VmAppliance>(APPLIANCE))?;
    let groups = groups(&state, &row, operation);
    let all = groups.iter().map(Vec::len).sum::<usize>().max(1);
    let (mut done, mut failed) = (0, false);
    for group in groups {
        let state = shared.store.read().await?;
        if is_cancelled(&state, journal.task) {
            return refuse(errors::task_cancelled(journal.task));
        }
        let paused = journal.parameter(PAUSED) == "true";
        for outcome in join_all(group.iter().map(|this| one(shared, *this, operation, paused))).await {
            match outcome {
                Ok(()) => {}
                Err(Failure::Api(error)) => {
                    tracing::warn!(appliance = row.uuid(), %operation, %error, "a VM of an appliance stays as it is");
                    failed = true;
                }
                Err(moved) => return Err(moved),
            }
        }
        done += group.len();
        show_progress(shared, journal, done, all).await?;
    }
    if failed { refuse(errors::operation_partially_failed(operation.as_str())) } else { Ok(()) }
}

#[allow(clippy::cast_precision_loss)]
async fn show_progress(shared: &Arc<Shared>, journal: &Journal, done: usize, all: usize) -> Served<()> {
    if shared.store.read().await?.row(journal.task).is_some() {
        let mut change = shared.transaction();
        change.set(journal.task, task::PROGRESS, done as f64 / all as f64);
        match shared.store.commit(change).await {
            // Its owner has thrown the task away.
            Ok(_) | Err(raft_store::CommitError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Brings one VM to where the operation wants it, and waits as long as the VM says that the next group has to.
async fn one(shared: &Arc<Shared>, this: Ref<Vm>, operation: Operation, paused: bool) -> Served<()> {
    let state = shared.store.read().await?;
    let Some(row) = state.row(this).cloned() else { return Ok(()) };
    if !concerns(operation, row.get(vm::POWER_STATE)) {
        return Ok(());
    }
    let (message, delay) = match operation {
        Operation::Start => ("VM.start", row.get(vm::START_DELAY)),
        Operation::CleanShutdown => ("VM.clean_shutdown", row.get(vm::SHUTDOWN_DELAY)),
        Operation::HardShutdown => ("VM.hard_shutdown", row.get(vm::SHUTDOWN_DELAY)),
        Operation::Shutdown => ("VM.shutdown", row.get(vm::SHUTDOWN_DELAY)),
    };
    let mut values = vec![Value::Ref(this.opaque())];
    if operation == Operation::Start {
        values.extend([Value::Bool(paused), Value::Bool(false)]);
    }
    api::ask(shared, message, values).await?;
    let delay = Duration::from_secs(u64::try_from(delay).unwrap_or(0)).min(LONGEST_DELAY);
    tokio::time::sleep(delay).await;
    Ok(())
}
