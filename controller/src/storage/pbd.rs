//! What is done to the connection of a host to an SR.

use std::collections::BTreeMap;

use datamodel::enums::{StorageOperations as SrOp, VmPowerState};
use datamodel::fields::{pbd, sr, vbd, vdi, vm};
use datamodel::{ApiError, ClassKind, Host, Pbd, Ref, Sr, Value, Vbd, Vdi, Vm, errors};
use proto::agent::step::Action;
use proto::agent::{AttachStore, DetachStore, Store};
use raft_store::{Row, State};

use super::{PLUG_AT_BOOT, reach, rules, scan, vdi as disk};
use crate::agent::Performed;
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::operations::{Ending, Kind, Planned, Seen, run};

pub(super) const KINDS: &[&dyn Kind] = &[&Plug, &Unplug];

/// The host uses the store from now on.
struct Plug;

/// The host lets go of the store.
struct Unplug;

/// A store becomes usable at a host; undone by its end.
pub(super) fn attach(host_ref: Ref<Host>, store: Store) -> Planned {
    let subject = store.sr.clone();
    let attach = Planned::new(host_ref, subject, Action::AttachStore(AttachStore { store: Some(store.clone()) }));
    attach.undone_by(Action::DetachStore(DetachStore { store: Some(store) }))
}

/// `PBD.plug`. One that is plugged already is what was asked for.
pub(crate) async fn plug(call: &Call, this: Ref<Pbd>) -> Served<()> {
    if call.row(this)?.get(pbd::CURRENTLY_ATTACHED) {
        return Ok(());
    }
    run(call, &Plug, move |draft| {
        let row = draft.row(this)?;
        disk::hold_store(draft, row.get(pbd::SR), SrOp::Plug)?;
        let sr_row = draft.row(row.get(pbd::SR))?;
        check_driver(draft.state, &sr_row)?;
        let elsewhere = |other: &Ref<Pbd>| {
            *other != this && draft.state.row(*other).is_some_and(|row| row.get(pbd::CURRENTLY_ATTACHED))
        };
        if !sr_row.get(sr::SHARED) && sr_row.get(sr::PBDS).iter().any(elsewhere) {
            return refuse(errors::sr_not_sharable(sr_row.typed::<Sr>(), row.get(pbd::HOST)));
        }
        draft.on(row.get(pbd::HOST)).note("pbd", this);
        scan::note_owed(draft);
        Ok(())
    })
    .await
    .map(drop)
}

fn check_driver(state: &State, sr_row: &Row) -> Result<(), ApiError> {
    let ty = sr_row.get(sr::TYPE);
    let known = |row: &std::sync::Arc<Row>| row.get(datamodel::fields::sm::TYPE) == ty;
    if state.all::<datamodel::Sm>().any(known) { Ok(()) } else { Err(errors::sr_unknown_driver(ty)) }
}

impl Kind for Plug {
    fn verb(&self) -> &'static str {
        "pbd_plug"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (state, journal) = (seen.state, seen.journal);
        let row = find(state, journal.object::<Pbd>("pbd"))?;
        let sr_ref: Ref<Sr> = row.get(pbd::SR);
        // What is there is told by whoever looks: the rows follow from the first look at once.
        let look = scan::step(state, sr_ref, journal.host)?.may_fail();
        Ok(vec![attach(journal.host, reach::store(state, sr_ref, journal.host)?), look])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let this: Ref<Pbd> = end.journal.object("pbd");
        let row = find(end.state, this)?;
        let sr_row = find(end.state, row.get(pbd::SR))?;
        end.change.set(this, pbd::CURRENTLY_ATTACHED, true).take(this, pbd::OTHER_CONFIG, PLUG_AT_BOOT.to_owned());
        // What is there is told only where nothing was done to it meanwhile; else a scan tells it soon.
        let quiet = sr_row.modified == end.journal.decided && sr_row.get(sr::CURRENT_OPERATIONS).len() == 1;
        match end.journal.outcomes.get(1) {
            Some(Performed::Store(found)) if quiet => scan::show(end, &sr_row, found),
            _ => scan::show_figures(end.change, &sr_row, end.journal.store(0)?),
        }
        Ok(Value::Void)
    }
}

/// `PBD.unplug`. One that is not plugged is what was asked for.
pub(crate) async fn unplug(call: &Call, this: Ref<Pbd>) -> Served<()> {
    let row = call.row(this)?;
    if !row.get(pbd::CURRENTLY_ATTACHED) {
        // Nor is it plugged when the host boots.
        let mut change = call.transaction();
        change.take(this, pbd::OTHER_CONFIG, PLUG_AT_BOOT.to_owned());
        return call.commit(change).await.map(drop);
    }
    run(call, &Unplug, move |draft| {
        let row = draft.row(this)?;
        disk::hold_store(draft, row.get(pbd::SR), SrOp::Unplug)?;
        let used = used_at(draft.state, row.get(pbd::SR), row.get(pbd::HOST));
        if !used.is_empty() {
            return refuse(ApiError::new(errors::VDI_IN_USE, used));
        }
        draft.on(row.get(pbd::HOST)).note("pbd", this);
        Ok(())
    })
    .await
    .map(drop)
}

/// The disks of an SR that VMs on a host use, or are about to.
fn used_at(state: &State, sr_ref: Ref<Sr>, host_ref: Ref<Host>) -> Vec<String> {
    let there = |drive: &Row| {
        state.row::<Vm>(drive.get(vbd::VM)).is_some_and(|row| {
            let live = row.get(vm::POWER_STATE) != VmPowerState::Halted;
            let resident = live && row.get(vm::RESIDENT_ON) == host_ref;
            resident || row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON) == host_ref
        })
    };
    let used = |disk: &&std::sync::Arc<Row>| {
        let drives = disk.get(vdi::VBDS).into_iter().filter_map(|drive: Ref<Vbd>| state.row(drive));
        drives.into_iter().any(|drive| {
            (drive.get(vbd::CURRENTLY_ATTACHED) || !drive.get(vbd::CURRENT_OPERATIONS).is_empty()) && there(drive)
        })
    };
    let disks = state.all::<Vdi>().filter(|disk| disk.get(vdi::SR) == sr_ref);
    disks.filter(used).map(|disk| disk.reference.to_string()).collect()
}

impl Kind for Unplug {
    fn verb(&self) -> &'static str {
        "pbd_unplug"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let row = find(seen.state, seen.journal.object::<Pbd>("pbd"))?;
        let store = reach::store(seen.state, row.get(pbd::SR), seen.journal.host)?;
        let subject = store.sr.clone();
        let action = Action::DetachStore(DetachStore { store: Some(store) });
        Ok(vec![Planned::new(seen.journal.host, subject, action)])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let this: Ref<Pbd> = end.journal.object("pbd");
        end.change.expect_exists(Pbd::ID, this.opaque()).set(this, pbd::CURRENTLY_ATTACHED, false);
        Ok(Value::Void)
    }
}

/// `PBD.create`: a row; plugging it is another call.
pub(crate) async fn create(call: &Call, fields: Vec<(u16, Value)>) -> Served<Ref<Pbd>> {
    let made = Row::of_defaults(Pbd::ID, datamodel::OpaqueRef::NULL).with_values(&fields);
    let (sr_ref, host_ref) = (made.get(pbd::SR), made.get(pbd::HOST));
    let (sr_row, host_row) = (call.row(sr_ref)?, call.row(host_ref)?);
    check_config(&made.get(pbd::DEVICE_CONFIG))?;
    rules::check_sr(&call.state, &sr_row, SrOp::PbdCreate)?;
    if let Some(other) = reach::connection(&call.state, &sr_row, host_ref) {
        return refuse(errors::pbd_exists(sr_ref, host_ref, other.typed::<Pbd>()));
    }
    let reference = call.reference::<Pbd>();
    let mut change = call.transaction();
    let mut fields = fields;
    fields.push((pbd::UUID.index(), Value::str(call.uuid().hyphenated().to_string())));
    change.expect_row(&sr_row).expect_exists(datamodel::Host::ID, host_row.reference);
    change.insert_values(Pbd::ID, reference.opaque(), fields);
    crate::operations::refresh(&call.state, &mut change);
    call.commit(change).await?;
    Ok(reference)
}

/// Settings that the pool keeps for itself.
pub(crate) fn check_config(config: &BTreeMap<String, String>) -> Result<(), ApiError> {
    match config.get("SRmaster") {
        Some(value) => Err(errors::value_not_supported("device_config", value.as_str(), "SRmaster is reserved")),
        None => Ok(()),
    }
}

/// A connection that is in use stays as it is.
fn check_detached(row: &Row) -> Result<(), ApiError> {
    if row.get(pbd::CURRENTLY_ATTACHED) {
        return Err(errors::operation_not_allowed("PBD is currently attached"));
    }
    Ok(())
}

/// `PBD.destroy`.
pub(crate) async fn destroy(call: &Call, this: Ref<Pbd>) -> Served<()> {
    let row = call.row(this)?;
    check_detached(&row)?;
    let sr_row = call.row(row.get(pbd::SR))?;
    rules::check_sr(&call.state, &sr_row, SrOp::PbdDestroy)?;
    let mut change = call.transaction();
    change.expect_row(&row).expect_row(&sr_row).delete(this);
    crate::operations::refresh(&call.state, &mut change);
    call.commit(change).await.map(drop)
}

/// `PBD.set_device_config`: as it will be plugged.
pub(crate) async fn set_device_config(call: &Call, this: Ref<Pbd>, value: BTreeMap<String, String>) -> Served<()> {
    let row = call.row(this)?;
    check_detached(&row)?;
    check_config(&value)?;
    let mut change = call.transaction();
    change.expect_row(&row).set(this, pbd::DEVICE_CONFIG, value);
    call.commit(change).await.map(drop)
}
