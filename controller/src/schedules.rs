//! Scheduled snapshots: when they are due, and who takes them.
//!
//! The master looks at every schedule. A run begins with one transaction, which says that the schedule has run and writes
//! the operation; so it runs once, whoever is master. The operation is made of snapshots that are named after the run:
//! whoever adopts it takes those that are missing. Then the oldest go that are more than are to be kept.

mod calendar;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use datamodel::enums::{Cls, VmPowerState, VmssType};
use datamodel::fields::{operation, vbd, vdi, vm, vmss};
use datamodel::{ApiError, Operation, Ref, Timestamp, Value, Vbd, Vdi, Vm, Vmss, errors};
use futures::future::BoxFuture;
use raft_store::{Row, State};

pub(crate) use calendar::{Rhythm, check_entry, check_schedule, with_defaults};

use crate::call::{Call, find};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::operations::{self, Ending, Journal, Kind, Planned, Seen};
use crate::{api, notices};

/// Schedules are looked at so often.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A run that nobody could begin for so long is left out.
const LATE: i64 = 15 * 60;
/// The parameters of the operation.
const SCHEDULE: &str = "schedule";
const RUN: &str = "run";

struct Run;

pub(crate) const KINDS: &[&dyn Kind] = &[&Run];

/// When this master first saw a schedule as it is. What was due before is not made up for.
#[derive(Default)]
struct Known(HashMap<Ref<Vmss>, (Rhythm, Timestamp)>);

impl Known {
    fn since(&mut self, this: Ref<Vmss>, rhythm: Rhythm, now: Timestamp) -> Timestamp {
        match self.0.get(&this) {
            Some((known, since)) if *known == rhythm => *since,
            _ => {
                self.0.insert(this, (rhythm, now));
                now
            }
        }
    }
}

/// Runs what is due, until dropped.
pub(crate) async fn keep(shared: &Arc<Shared>) {
    let mut known = Known::default();
    // What was there before this master, the last one knew.
    let state = shared.store.state();
    for row in state.all::<Vmss>() {
        known.0.insert(row.typed(), (Rhythm::of(row), Timestamp::EPOCH));
    }
    let mut runs = tokio::task::JoinSet::new();
    loop {
        if let Ok(state) = shared.store.read().await {
            known.0.retain(|this, _| state.row(*this).is_some());
            for row in state.all::<Vmss>().filter(|row| row.get(vmss::ENABLED)) {
                if let Some(due) = due(row, &mut known, shared.now()) {
                    let (shared, this) = (Arc::clone(shared), row.typed());
                    runs.spawn(async move {
                        if let Err(error) = begin(&shared, this, Some(due)).await {
                            tracing::info!(schedule = %this, ?error, "a scheduled run did not end well");
                        }
                    });
                }
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        while runs.try_join_next().is_some() {}
    }
}

fn due(row: &Row, known: &mut Known, now: Timestamp) -> Option<Timestamp> {
    let rhythm = Rhythm::of(row);
    let since = known.since(row.typed(), rhythm.clone(), now);
    let due = rhythm.last(now)?;
    (due >= since && due > row.get(vmss::LAST_RUN_TIME) && now.0 - due.0 <= LATE).then_some(due)
}

/// Begins a run, and sees it through: the one that is due, or one that somebody wants now.
async fn begin(shared: &Arc<Shared>, this: Ref<Vmss>, due: Option<Timestamp>) -> Served<()> {
    let call = Call::of_the_pool(shared, shared.store.read().await?, "VMSS.snapshot_now")?;
    run(&call, this, due).await
}

pub(crate) async fn run(call: &Call, this: Ref<Vmss>, due: Option<Timestamp>) -> Served<()> {
    let draft = move |draft: &mut operations::Draft<'_>| {
        let row = draft.row(this)?;
        expect_idle(draft.state, this)?;
        if due.is_some_and(|due| row.get(vmss::LAST_RUN_TIME) >= due) {
            return refuse(errors::operation_not_allowed("it has run"));
        }
        let now = draft.call.now();
        // Snapshots are named after their run, so no two are of one second.
        let next = Timestamp(row.get(vmss::LAST_RUN_TIME).0.saturating_add(1));
        let at = due.unwrap_or(now).max(now).max(next);
        draft.change.expect_row(&row).set(this, vmss::LAST_RUN_TIME, at);
        draft.note(SCHEDULE, this).note(RUN, at);
        Ok(())
    };
    operations::run(call, &Run, draft).await.map(drop)
}

/// One run at a time: the next is due long after.
fn expect_idle(state: &State, this: Ref<Vmss>) -> Result<(), ApiError> {
    let of_this = |row: &&Arc<Row>| {
        row.get(operation::VERB) == Run.verb()
            && row.get(operation::PARAMETERS).get(SCHEDULE).is_some_and(|text| *text == this.to_string())
    };
    match state.all::<Operation>().find(of_this) {
        Some(row) => {
            let task = row.get(operation::TASK).to_string();
            Err(errors::other_operation_in_progress("VMSS", this, "snapshot_now", task))
        }
        None => Ok(()),
    }
}

impl Kind for Run {
    fn verb(&self) -> &'static str {
        "scheduled_snapshots"
    }

    fn plan(&self, _seen: &Seen<'_>) -> Served<Vec<Planned>> {
        Ok(Vec::new())
    }

    fn work<'a>(&'a self, shared: &'a Arc<Shared>, journal: &'a Journal) -> Option<BoxFuture<'a, Served<()>>> {
        Some(Box::pin(each_vm(shared, journal)))
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        self.tell(end, "VMSS_SNAPSHOT_SUCCEEDED", 5, "every snapshot was taken".to_owned());
        Ok(Value::Void)
    }

    fn fail(&self, end: &mut Ending<'_>, error: &ApiError) {
        self.tell(end, "VMSS_SNAPSHOT_FAILED", 3, error.to_string());
    }
}

impl Run {
    fn tell(&self, end: &mut Ending<'_>, name: &str, priority: i64, body: String) {
        if let Some(row) = end.state.row(end.journal.object::<Vmss>(SCHEDULE)) {
            notices::tell(end.shared, end.change, name, priority, Cls::Vmss, row.uuid(), body);
        }
    }
}

async fn each_vm(shared: &Arc<Shared>, journal: &Journal) -> Served<()> {
    let state = shared.store.read().await?;
    let schedule = find(&state, journal.object::<Vmss>(SCHEDULE))?;
    let name = format!("{}-{}", schedule.name_label(), journal.parameter(RUN));
    let mut failed = Vec::new();
    let members: Vec<Ref<Vm>> = schedule.get(vmss::VMS);
    for member in members {
        let outcome = match one(shared, &schedule, member, &name).await {
            Ok(()) => let_go_of_the_oldest(shared, &schedule, member).await,
            other => other,
        };
        match outcome {
            Ok(()) => {}
            Err(Failure::Api(error)) => failed.push(format!("{member}: {error}")),
            Err(moved) => return Err(moved),
        }
    }
    if failed.is_empty() { Ok(()) } else { refuse(errors::operation_partially_failed(failed.join("; "))) }
}

fn snapshots(state: &State, of: Ref<Vm>) -> impl Iterator<Item = &Arc<Row>> {
    state.all::<Vm>().filter(move |row| row.get(vm::SNAPSHOT_OF) == of && row.get(vm::IS_A_SNAPSHOT))
}

/// The snapshot of one VM, unless this run has taken it.
async fn one(shared: &Arc<Shared>, schedule: &Row, member: Ref<Vm>, name: &str) -> Served<()> {
    let state = shared.store.read().await?;
    let Some(row) = state.row(member) else { return Ok(()) };
    let mut taken = snapshots(&state, member).find(|row| row.name_label() == name).map(|row| row.typed::<Vm>());
    if taken.is_none() {
        let with_memory = schedule.get(vmss::TYPE) == VmssType::Checkpoint;
        let named = vec![Value::Ref(member.opaque()), Value::str(name)];
        // Of a VM that is halted there is no memory.
        let made = if with_memory && row.get(vm::POWER_STATE) != VmPowerState::Halted {
            api::ask(shared, "VM.checkpoint", named).await?
        } else {
            let whole = named.into_iter().chain([Value::set([])]).collect();
            api::ask(shared, "VM.snapshot", whole).await?
        };
        if let Value::Ref(made) = made {
            taken = Some(Ref::from_opaque(made));
        }
    }
    let state = shared.store.read().await?;
    if let Some(taken) = taken
        && state.row(taken).is_some_and(|row| !row.get(vm::IS_VMSS_SNAPSHOT))
    {
        let mut change = shared.transaction();
        change.set(taken, vm::IS_VMSS_SNAPSHOT, true);
        shared.store.commit(change).await?;
    }
    Ok(())
}

/// Keeps as many of a VM's scheduled snapshots as the schedule says.
async fn let_go_of_the_oldest(shared: &Arc<Shared>, schedule: &Row, member: Ref<Vm>) -> Served<()> {
    let state = shared.store.read().await?;
    let mut all: Vec<(Timestamp, Ref<Vm>)> = snapshots(&state, member)
        .filter(|row| row.get(vm::IS_VMSS_SNAPSHOT))
        .map(|row| (row.get(vm::SNAPSHOT_TIME), row.typed()))
        .collect();
    all.sort_unstable();
    let kept = usize::try_from(schedule.get(vmss::RETAINED_SNAPSHOTS)).unwrap_or(1).max(1);
    let surplus = all.len().saturating_sub(kept);
    for (_, old) in all.drain(..surplus) {
        let row = find(&state, old)?;
        let disks: Vec<Ref<Vbd>> = row.get(vm::VBDS);
        let disks = disks.into_iter().filter_map(|disk| state.row(disk)).map(|row| row.get(vbd::VDI));
        let memory: Ref<Vdi> = row.get(vm::SUSPEND_VDI);
        let ours = |disk: &Ref<Vdi>| state.row(*disk).is_some_and(|row| row.get(vdi::IS_A_SNAPSHOT));
        let images: Vec<Ref<Vdi>> = disks.filter(ours).chain(state.row(memory).map(|_| memory)).collect();
        api::ask(shared, "VM.destroy", vec![Value::Ref(old.opaque())]).await?;
        for image in images {
            if shared.store.read().await?.row(image).is_some() {
                api::ask(shared, "VDI.destroy", vec![Value::Ref(image.opaque())]).await?;
            }
        }
    }
    Ok(())
}
