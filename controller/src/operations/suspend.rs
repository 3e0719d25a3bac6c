//! A VM's memory, kept in an image: suspend, resume, and what becomes of the image.

use std::collections::BTreeMap;

use datamodel::enums::{StorageOperations as SrOp, VdiType, VmOperations, VmPowerState};
use datamodel::fields::{vdi, vm};
use datamodel::{ApiError, Host, Ref, Sr, Value, Vdi, Vm, errors};
use proto::agent::step::Action;
use proto::agent::{DestroyDomain, ResumeDomain, SuspendDomain, VolumeRef};
use raft_store::Row;

use super::power::{reserve, spec};
use super::shown::show_gone;
use super::{Draft, Ending, Kind, Planned, Seen, run, show};
use crate::api::vm::queries::suspend_sr;
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::lifecycle;
use crate::storage::vdi::hold_store;
use crate::storage::volumes::{self, Made};
use crate::storage::{disks, reach};

/// An image has room for a VM's memory in hundredths of it, and for the rest of the machine.
const HUNDREDTHS: i64 = 126;
const BESIDES: i64 = 100 << 20;
/// The parameters of the operations.
const SR: &str = "sr";
const IMAGE: &str = "image";
const UUID: &str = "uuid";
const PAUSED: &str = "paused";

pub(super) const KINDS: &[&dyn Kind] = &[&Suspend, &Resume, &Discard];

/// Bytes of an image of a VM's memory.
pub(super) fn image_size(row: &Row) -> i64 {
    (row.get(vm::MEMORY_STATIC_MAX) / 100).saturating_mul(HUNDREDTHS).saturating_add(BESIDES)
}

/// Fields of an image of a VM's memory.
fn image_fields(row: &Row) -> Vec<(u16, Value)> {
    vec![
        (vdi::NAME_LABEL.index(), Value::str("Suspend image")),
        (vdi::NAME_DESCRIPTION.index(), Value::str(format!("Memory of {}", row.name_label()))),
        (vdi::TYPE.index(), Value::Enum(VdiType::Suspend.as_str())),
    ]
}

/// Notes an image that is to be made in a store.
pub(super) fn note_image(draft: &mut Draft<'_>, sr_ref: Ref<Sr>) -> Served<()> {
    hold_store(draft, sr_ref, SrOp::VdiCreate)?;
    let (image, uuid) = (draft.call.reference::<Vdi>(), draft.call.uuid());
    draft.note(SR, sr_ref).note(IMAGE, image).note(UUID, uuid);
    Ok(())
}

/// The step that makes it.
pub(super) fn make_image(seen: &Seen<'_>, size: i64) -> Served<Planned> {
    let journal = seen.journal;
    let of = (size, VdiType::Suspend, BTreeMap::new());
    volumes::create(seen.state, journal.object::<Sr>(SR), journal.parameter(UUID), of, journal.host)
}

/// The image, once the step of that number has made it.
pub(super) fn image(seen: &Seen<'_>, made_by: usize) -> Served<VolumeRef> {
    let journal = seen.journal;
    let named = reach::new_volume(seen.state, journal.object::<Sr>(SR), journal.parameter(UUID), journal.host)?;
    Ok(VolumeRef { location: journal.volume(made_by)?.location.clone(), ..named })
}

/// Adds the row of the image that a step made of a VM's memory.
pub(super) fn show_image(end: &mut Ending<'_>, row: &Row, made_by: usize) -> Served<Ref<Vdi>> {
    let journal = end.journal;
    let image = journal.object::<Vdi>(IMAGE);
    let made = Made {
        uuid: journal.parameter(UUID),
        sr: journal.object(SR),
        volume: journal.volume(made_by)?,
        fields: image_fields(row),
    };
    volumes::insert(end.state, end.change, image, made);
    Ok(image)
}

struct Suspend;

pub(crate) async fn suspend(call: &Call, this: Ref<Vm>) -> Served<()> {
    run(call, &Suspend, move |draft| {
        let row = draft.row(this)?;
        lifecycle::check(draft.state, &row, VmOperations::Suspend)?;
        disks::keep_all(draft, &row)?;
        let host_ref = row.get(vm::RESIDENT_ON);
        let sr_ref = suspend_sr(draft.state, &row, host_ref)?;
        draft.hold(&row, VmOperations::Suspend.as_str());
        draft.about(this).on(host_ref);
        note_image(draft, sr_ref)
    })
    .await
    .map(drop)
}

impl Kind for Suspend {
    fn verb(&self) -> &'static str {
        "suspend"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (state, journal) = (seen.state, seen.journal);
        let row = find(state, journal.vm)?;
        let mut steps = vec![make_image(seen, image_size(&row))?];
        if journal.was_done(0) {
            let action = Action::Suspend(SuspendDomain { into: Some(image(seen, 0)?), keep_running: false });
            steps.push(Planned::new(journal.host, row.uuid(), action));
        }
        Ok(steps)
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let journal = end.journal;
        if let Some(row) = end.state.row(journal.vm) {
            let image = show_image(end, row, 0)?;
            show_gone(end.shared, end.state, end.change, row, VmPowerState::Suspended);
            end.change.set(journal.vm, vm::SUSPEND_VDI, image);
        }
        Ok(Value::Void)
    }

    fn waits_for_drives(&self) -> bool {
        true
    }
}

struct Resume;

pub(crate) async fn resume(
    call: &Call,
    this: Ref<Vm>,
    what: VmOperations,
    paused: bool,
    on: Option<Ref<Host>>,
) -> Served<()> {
    run(call, &Resume, move |draft| {
        let row = draft.row(this)?;
        lifecycle::check(draft.state, &row, what)?;
        let image: Ref<Vdi> = row.get(vm::SUSPEND_VDI);
        let Some(image_row) = draft.state.row(image).cloned() else {
            return refuse(errors::vm_has_no_suspend_vdi(this));
        };
        draft.hold(&row, what.as_str());
        let host_ref = reserve(draft, &row, on)?;
        draft.about(this).on(host_ref).note(IMAGE, image).note(PAUSED, paused);
        hold_store(draft, image_row.get(vdi::SR), SrOp::VdiDestroy)
    })
    .await
    .map(drop)
}

impl Kind for Resume {
    fn verb(&self) -> &'static str {
        "resume"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (state, journal) = (seen.state, seen.journal);
        let row = find(state, journal.vm)?;
        let image = find(state, journal.object::<Vdi>(IMAGE))?;
        let action = Action::Resume(ResumeDomain {
            spec: Some(spec(state, &row, journal.host, journal.decided)?),
            from: Some(reach::volume(state, &image, journal.host)?),
            paused: journal.parameter(PAUSED) == "true",
        });
        let resume = Planned::new(journal.host, row.uuid(), action).undone_by(Action::Destroy(DestroyDomain {}));
        Ok(vec![resume, volumes::destroy(state, &image, journal.host)?.owed()])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let journal = end.journal;
        if let Some(row) = end.state.row(journal.vm) {
            end.change.set(journal.vm, vm::SCHEDULED_TO_BE_RESIDENT_ON, Ref::NULL).set(
                journal.vm,
                vm::SUSPEND_VDI,
                Ref::NULL,
            );
            show(end.shared, end.state, end.change, row, journal.host, journal.domain(0)?);
        }
        forget_image(end, journal.object(IMAGE));
        Ok(Value::Void)
    }

    fn fail(&self, end: &mut Ending<'_>, _error: &ApiError) {
        if end.state.row(end.journal.vm).is_some() {
            end.change.set(end.journal.vm, vm::SCHEDULED_TO_BE_RESIDENT_ON, Ref::NULL);
        }
    }
}

/// An image that cannot be removed now is nobody's disk until it is.
fn forget_image(end: &mut Ending<'_>, image: Ref<Vdi>) {
    if let Some(row) = end.state.row(image) {
        volumes::remove(end.state, end.change, row);
    }
}

/// The end of a suspended VM: its memory is given up.
struct Discard;

pub(crate) async fn discard(call: &Call, this: Ref<Vm>) -> Served<()> {
    run(call, &Discard, move |draft: &mut Draft<'_>| {
        let row = draft.row(this)?;
        lifecycle::check(draft.state, &row, VmOperations::HardShutdown)?;
        draft.hold(&row, VmOperations::HardShutdown.as_str());
        draft.about(this);
        let image: Ref<Vdi> = row.get(vm::SUSPEND_VDI);
        // Where nobody reaches the image the VM is halted all the same.
        if let Some(image_row) = draft.state.row(image)
            && let Ok(host_ref) = reach::worker_for(draft.state, image_row)
        {
            draft.on(host_ref).note(IMAGE, image);
            hold_store(draft, image_row.get(vdi::SR), SrOp::VdiDestroy)?;
        }
        Ok(())
    })
    .await
    .map(drop)
}

impl Kind for Discard {
    fn verb(&self) -> &'static str {
        "discard_suspended"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (state, journal) = (seen.state, seen.journal);
        match state.row(journal.object::<Vdi>(IMAGE)) {
            Some(image) => Ok(vec![volumes::destroy(state, image, journal.host)?.owed()]),
            None => Ok(Vec::new()),
        }
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let journal = end.journal;
        if let Some(row) = end.state.row(journal.vm) {
            show_gone(end.shared, end.state, end.change, row, VmPowerState::Halted);
            end.change.set(journal.vm, vm::SUSPEND_VDI, Ref::NULL);
        }
        forget_image(end, journal.object(IMAGE));
        Ok(Value::Void)
    }
}
