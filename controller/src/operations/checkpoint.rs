//! A checkpoint: a snapshot with memory. The VM stands still while its memory is written and its disks change over, so
//! that both are of one moment, and then goes on as it was.

use std::sync::Arc;

use datamodel::enums::{VmOperations, VmPowerState};
use datamodel::fields::{vdi, vm};
use datamodel::{ApiError, Ref, Value, Vdi, Vm, errors};
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{CopyVolume, PauseDomain, Refusal, SuspendDomain, UnpauseDomain};
use raft_store::Row;

use super::duplicate::{self, Asked, Duplicate};
use super::suspend::{image, image_size, make_image, note_image, show_image};
use super::{Draft, Ending, Kind, Planned, Seen, refusals, run, show};
use crate::api::vm::queries::suspend_sr;
use crate::call::{Call, find};
use crate::failure::{Failure, Served, refuse};
use crate::lifecycle;
use crate::storage::{disks, reach};

/// The parameters of the operation.
const POWER: &str = "power";
const ORIGINAL: &str = "original";

pub(super) const KINDS: &[&dyn Kind] = &[&Checkpoint];

struct Checkpoint;

/// `VM.checkpoint`.
pub(crate) async fn checkpoint(call: &Call, this: Ref<Vm>, name: String) -> Served<Ref<Vm>> {
    let made = run(call, &Checkpoint, move |draft| begin(draft, this, &name)).await?;
    match made {
        Value::Ref(made) => Ok(Ref::from_opaque(made)),
        _ => Err(Failure::NotLeader),
    }
}

fn begin(draft: &mut Draft<'_>, this: Ref<Vm>, name: &str) -> Served<()> {
    let row = draft.row(this)?;
    lifecycle::check(draft.state, &row, VmOperations::Checkpoint)?;
    disks::keep_all(draft, &row)?;
    draft.hold(&row, VmOperations::Checkpoint.as_str());
    let power = row.get(vm::POWER_STATE);
    draft.about(this).note("name", name).note(POWER, power);
    if power == VmPowerState::Suspended {
        let original: Ref<Vdi> = row.get(vm::SUSPEND_VDI);
        let Some(kept) = draft.state.row(original).cloned() else {
            return refuse(errors::vm_has_no_suspend_vdi(this));
        };
        let host_ref = reach::worker_for(draft.state, &kept)?;
        draft.on(host_ref).note(ORIGINAL, original);
        note_image(draft, kept.get(vdi::SR))?;
    } else {
        let host_ref = row.get(vm::RESIDENT_ON);
        let sr_ref = suspend_sr(draft.state, &row, host_ref)?;
        draft.on(host_ref);
        note_image(draft, sr_ref)?;
    }
    duplicate::hold_disks(draft, &row, Duplicate::Snapshot, &Asked::default())
}

/// Copies one image of memory into another, which a step has made.
pub(super) fn copy_image(seen: &Seen<'_>, from: &Row, made_by: usize) -> Served<Planned> {
    let (state, journal) = (seen.state, seen.journal);
    let from = reach::volume(state, from, journal.host)?;
    let copy = CopyVolume { from: Some(from.clone()), into: Some(image(seen, made_by)?), base: None };
    Ok(Planned::new(journal.host, from.vdi, Action::CopyVolume(copy)))
}

fn was_running(seen: &Seen<'_>) -> bool {
    seen.journal.parameter(POWER) == VmPowerState::Running.as_str()
}

/// The number of the step that makes the image, and of the first that makes a disk.
fn places(seen: &Seen<'_>) -> (usize, usize) {
    let image = usize::from(was_running(seen));
    (image, image + 2)
}

impl Kind for Checkpoint {
    fn verb(&self) -> &'static str {
        "checkpoint"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (state, journal) = (seen.state, seen.journal);
        let row = find(state, journal.vm)?;
        let (made_by, _) = places(seen);
        let domain = |action| Planned::new(journal.host, row.uuid(), action);
        let mut steps = Vec::new();
        if was_running(seen) {
            let goes_on = Action::Unpause(UnpauseDomain {});
            steps.push(domain(Action::Pause(PauseDomain {})).undone_by(goes_on));
        }
        let kept: Option<&Arc<Row>> = state.row(journal.object::<Vdi>(ORIGINAL));
        let size = kept.map_or_else(|| image_size(&row), |kept| kept.get(vdi::VIRTUAL_SIZE));
        steps.push(make_image(seen, size)?);
        if !journal.was_done(made_by) {
            return Ok(steps);
        }
        steps.push(match kept {
            Some(kept) => copy_image(seen, kept, made_by)?,
            None => domain(Action::Suspend(SuspendDomain { into: Some(image(seen, made_by)?), keep_running: true })),
        });
        steps.extend(duplicate::steps(seen)?);
        if was_running(seen) {
            steps.push(domain(Action::Unpause(UnpauseDomain {})));
        }
        Ok(steps)
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let (made_by, first_disk) = places(&end.seen());
        let row = find(end.state, end.journal.vm)?;
        let image = show_image(end, &row, made_by)?;
        let made = duplicate::record_made(end, Duplicate::Snapshot, VmPowerState::Suspended, first_disk)?;
        end.change.set(made, vm::SUSPEND_VDI, image);
        end.change.set(image, vdi::IS_A_SNAPSHOT, true);
        if let Some(domain) = end.journal.last_domain() {
            show(end.shared, end.state, end.change, &row, end.journal.host, domain);
        }
        Ok(Value::Ref(made.opaque()))
    }

    fn refused(&self, seen: &Seen<'_>, step: &Planned, refusal: &Refusal) -> ApiError {
        match step.action {
            Action::Suspend(_) if refusal.reason() != Reason::NoSpace => {
                errors::vm_checkpoint_suspend_failed(seen.journal.vm)
            }
            Action::Unpause(_) => errors::vm_checkpoint_resume_failed(seen.journal.vm),
            _ => refusals::error(seen.state, step, refusal),
        }
    }

    fn cancellable(&self) -> bool {
        true
    }

    fn waits_for_drives(&self) -> bool {
        true
    }
}
