//! A VM made of another one, with its disks: clone, copy and snapshot. One step for each disk; if one fails, those that
//! were made go, and there is no VM.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use datamodel::enums::{StorageOperations as SrOp, VbdType, VdiOperations as VdiOp, VmOperations as Op, VmPowerState};
use datamodel::fields::{sr, vbd, vdi, vif, vm, vm_metrics};
use datamodel::{ClassKind, FieldValue, OpaqueRef, Ref, Sr, Value, Vbd, Vdi, Vif, Vm, VmMetrics, errors};
use raft_store::{NewRow, Row, State, Transaction};

use super::{Draft, Ending, Kind, Planned, Seen, run};
use crate::call::{Call, find};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::storage::{disks, reach, rules, vdi as store, volumes};
use crate::{interfaces, lifecycle};

/// How a VM is made of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Duplicate {
    /// Disks share what the originals hold.
    Clone,
    /// All bytes anew.
    Copy,
    /// As it is now, for reference.
    Snapshot,
}

pub(super) const KINDS: &[&dyn Kind] = &[&Duplicate::Clone, &Duplicate::Copy, &Duplicate::Snapshot];

impl Duplicate {
    const fn operation(self) -> Op {
        match self {
            Self::Clone => Op::Clone,
            Self::Copy => Op::Copy,
            Self::Snapshot => Op::Snapshot,
        }
    }

    fn kind(self) -> &'static dyn Kind {
        match self {
            Self::Clone => &Self::Clone,
            Self::Copy => &Self::Copy,
            Self::Snapshot => &Self::Snapshot,
        }
    }
}

/// What a call asks for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Asked {
    pub(crate) name: String,
    /// Where copies go; null: where the originals are.
    pub(crate) into: Ref<Sr>,
    /// Disks that a snapshot leaves out.
    pub(crate) ignored: Vec<Ref<Vdi>>,
}

/// `VM.clone`, `VM.copy` and `VM.snapshot`.
pub(crate) async fn duplicate(call: &Call, this: Ref<Vm>, how: Duplicate, asked: Asked) -> Served<Ref<Vm>> {
    let row = call.row(this)?;
    lifecycle::check(&call.state, &row, how.operation())?;
    if disks_of(&call.state, &row, &asked.ignored)?.is_empty() {
        // Rows alone: one transaction.
        let mut change = call.transaction();
        change.expect_row(&row);
        let new = New { how, name: &asked.name, power: VmPowerState::Halted, disks: BTreeMap::new() };
        let reference = insert(&call.shared, &call.state, &mut change, &row, &new);
        super::refresh(&call.state, &mut change);
        call.commit(change).await?;
        return Ok(reference);
    }
    let made = run(call, how.kind(), move |draft| begin(draft, this, how, &asked)).await?;
    match made {
        Value::Ref(reference) => Ok(Ref::from_opaque(reference)),
        _ => Err(Failure::NotLeader),
    }
}

/// The drives whose disks are made anew, with their disks.
fn disks_of(state: &State, row: &Row, ignored: &[Ref<Vdi>]) -> Served<Vec<(Arc<Row>, Arc<Row>)>> {
    let mut found = Vec::new();
    for drive in disks::drives(state, row) {
        if drive.get(vbd::TYPE) == VbdType::Cd || ignored.contains(&drive.get(vbd::VDI)) {
            continue;
        }
        if let Some(disk) = disks::disk_in(state, &drive)? {
            found.push((drive, disk));
        }
    }
    Ok(found)
}

fn begin(draft: &mut Draft<'_>, this: Ref<Vm>, how: Duplicate, asked: &Asked) -> Served<()> {
    let row = draft.row(this)?;
    lifecycle::check(draft.state, &row, how.operation())?;
    if !asked.into.is_null() && draft.row(asked.into)?.get(sr::CONTENT_TYPE) == "iso" {
        return refuse(errors::operation_not_allowed("disks cannot be copied into a library of CDs"));
    }
    draft.hold(&row, how.operation().as_str());
    draft.about(this).note("name", &asked.name);
    hold_disks(draft, &row, how, asked)
}

/// Marks the disks of a VM that are made anew, and their stores, and notes what is made of them.
pub(super) fn hold_disks(draft: &mut Draft<'_>, row: &Row, how: Duplicate, asked: &Asked) -> Served<()> {
    let (mut disks_held, mut stores_held) = (BTreeSet::new(), BTreeSet::new());
    let mut notes = Vec::new();
    for (drive, disk) in disks_of(draft.state, row, &asked.ignored)? {
        let from: Ref<Sr> = disk.get(vdi::SR);
        let into = if how == Duplicate::Copy && !asked.into.is_null() { asked.into } else { from };
        // A clone where the driver has none is a copy.
        let shares = rules::can(draft.state, &*draft.row(from)?, "VDI_CLONE");
        let (of_disk, of_store) = match how {
            Duplicate::Snapshot => (VdiOp::Snapshot, SrOp::VdiSnapshot),
            Duplicate::Clone if shares => (VdiOp::Clone, SrOp::VdiClone),
            Duplicate::Clone | Duplicate::Copy => (VdiOp::Copy, SrOp::VdiCreate),
        };
        if disks_held.insert(disk.reference) {
            store::hold_disk(draft, &disk, of_disk)?;
        }
        if stores_held.insert(into) {
            store::hold_store(draft, into, of_store)?;
        }
        let host_ref = reach::worker(draft.state, &[from, into], reach::in_use_at(draft.state, &disk))?;
        let (made, uuid) = (draft.call.reference::<Vdi>(), draft.call.uuid());
        let how = of_disk.as_str();
        notes.push(format!("{} {} {made} {uuid} {into} {host_ref} {how}", drive.reference, disk.reference));
    }
    for (place, note) in notes.iter().enumerate() {
        draft.note(format!("disk/{place}"), note);
    }
    Ok(())
}

/// A disk that is being made, as it was noted.
struct Noted {
    drive: Ref<Vbd>,
    original: Ref<Vdi>,
    made: Ref<Vdi>,
    uuid: String,
    into: Ref<Sr>,
    host: Ref<datamodel::Host>,
    how: String,
}

fn noted(seen: &Seen<'_>) -> Vec<Noted> {
    let read = |place: usize| {
        let note = seen.journal.parameter(&format!("disk/{place}"));
        let words: Vec<&str> = note.split(' ').collect();
        let [drive, original, made, uuid, into, host, how] = words.as_slice() else { return None };
        let object = |text: &&str| text.parse::<OpaqueRef>().ok();
        Some(Noted {
            drive: Ref::from_opaque(object(drive)?),
            original: Ref::from_opaque(object(original)?),
            made: Ref::from_opaque(object(made)?),
            uuid: (*uuid).to_owned(),
            into: Ref::from_opaque(object(into)?),
            host: Ref::from_opaque(object(host)?),
            how: (*how).to_owned(),
        })
    };
    (0..).map_while(read).collect()
}

/// A step for each disk that is made.
pub(super) fn steps(seen: &Seen<'_>) -> Served<Vec<Planned>> {
    let step = |noted: Noted| {
        let disk = find(seen.state, noted.original)?;
        match noted.how.as_str() {
            "snapshot" => volumes::snapshot(seen.state, &disk, &noted.uuid, noted.host),
            "clone" => volumes::clone(seen.state, &disk, &noted.uuid, noted.host),
            _ => volumes::copy(seen.state, &disk, noted.into, &noted.uuid, noted.host),
        }
    };
    noted(seen).into_iter().map(step).collect()
}

/// Adds the VM that was made, halted or suspended, with its disks, whose steps began with number `first`.
pub(super) fn record_made(end: &mut Ending<'_>, how: Duplicate, power: VmPowerState, first: usize) -> Served<Ref<Vm>> {
    let row = find(end.state, end.journal.vm)?;
    let mut disks = BTreeMap::new();
    for (place, disk) in noted(&end.seen()).into_iter().enumerate() {
        let original = find(end.state, disk.original)?;
        let fields = match how {
            Duplicate::Snapshot => volumes::of_snapshot(&original, end.shared.now()),
            Duplicate::Clone | Duplicate::Copy => volumes::inherited(&original),
        };
        let volume = end.journal.volume(first.saturating_add(place))?;
        let new = volumes::Made { uuid: &disk.uuid, sr: disk.into, volume, fields };
        volumes::insert(end.state, end.change, disk.made, new);
        disks.insert(disk.drive, disk.made);
    }
    let new = New { how, name: end.journal.parameter("name"), power, disks };
    Ok(insert(end.shared, end.state, end.change, &row, &new))
}

impl Kind for Duplicate {
    fn verb(&self) -> &'static str {
        match self {
            Self::Clone => "vm_clone",
            Self::Copy => "vm_copy",
            Self::Snapshot => "vm_snapshot",
        }
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        steps(seen)
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        record_made(end, *self, VmPowerState::Halted, 0).map(|made| Value::Ref(made.opaque()))
    }

    fn cancellable(&self) -> bool {
        true
    }
}

/// Fields that a new VM does not take from its original.
fn own_fields() -> [u16; 32] {
    [
        vm::UUID.index(),
        vm::ALLOWED_OPERATIONS.index(),
        vm::CURRENT_OPERATIONS.index(),
        vm::NAME_LABEL.index(),
        vm::POWER_STATE.index(),
        vm::RESIDENT_ON.index(),
        vm::SCHEDULED_TO_BE_RESIDENT_ON.index(),
        vm::CONSOLES.index(),
        vm::VBDS.index(),
        vm::VIFS.index(),
        vm::VTPMS.index(),
        vm::DOMID.index(),
        vm::METRICS.index(),
        vm::GUEST_METRICS.index(),
        vm::IS_DEFAULT_TEMPLATE.index(),
        vm::APPLIANCE.index(),
        vm::SNAPSHOTS.index(),
        vm::CHILDREN.index(),
        vm::PARENT.index(),
        vm::HA_ALWAYS_RUN.index(),
        vm::OTHER_CONFIG.index(),
        vm::CRASH_DUMPS.index(),
        vm::IS_A_SNAPSHOT.index(),
        vm::SNAPSHOT_OF.index(),
        vm::SNAPSHOT_TIME.index(),
        vm::SUSPEND_VDI.index(),
        vm::BLOCKED_OPERATIONS.index(),
        vm::ORDER.index(),
        vm::START_DELAY.index(),
        vm::SHUTDOWN_DELAY.index(),
        vm::SNAPSHOT_SCHEDULE.index(),
        vm::IS_VMSS_SNAPSHOT.index(),
    ]
}

/// A VM that is made of another one.
struct New<'a> {
    how: Duplicate,
    name: &'a str,
    power: VmPowerState,
    /// What was made of the disks in the other one's drives.
    disks: BTreeMap<Ref<Vbd>, Ref<Vdi>>,
}

/// Adds the rows of a VM made of another one: its drives with the disks that were made for them, the media of the
/// original's CD drives, its interfaces. The VM.
fn insert(shared: &Shared, state: &State, change: &mut Transaction, row: &Row, new: &New<'_>) -> Ref<Vm> {
    let how = new.how;
    let reference: Ref<Vm> = Ref::new(shared.uuid());
    let own = own_fields();
    let mut fields: Vec<(u16, Value)> = (0_u16..)
        .zip(row.values())
        .filter(|(index, _)| !own.contains(index))
        .map(|(index, value)| (index, value.clone()))
        .collect();
    let metrics: Ref<VmMetrics> = Ref::new(shared.uuid());
    change.insert(NewRow::new(metrics, shared.uuid()).with(vm_metrics::LAST_UPDATED, shared.now()));
    fields.extend([
        (vm::UUID.index(), Value::str(shared.uuid().to_string())),
        (vm::NAME_LABEL.index(), Value::str(new.name)),
        (vm::POWER_STATE.index(), Value::Enum(new.power.as_str())),
        (vm::METRICS.index(), Value::Ref(metrics.opaque())),
        (vm::DOMID.index(), Value::Int(-1)),
    ]);
    let mut other_config = row.get(vm::OTHER_CONFIG);
    if how == Duplicate::Snapshot {
        fields.retain(|(index, _)| *index != vm::IS_A_TEMPLATE.index());
        fields.extend(of_snapshot(shared, row));
    } else {
        other_config.remove("default_template");
        other_config.remove("xensource_internal");
        other_config.insert("mac_seed".into(), shared.uuid().to_string());
        other_config.insert("base_template_name".into(), row.name_label().to_owned());
    }
    fields.push((vm::OTHER_CONFIG.index(), other_config.into_value()));
    change.insert_values(Vm::ID, reference.opaque(), fields);
    if how == Duplicate::Snapshot {
        change.set(row.typed::<Vm>(), vm::PARENT, reference);
    }
    insert_drives(shared, state, change, row, reference, new.power, &new.disks);
    insert_interfaces(shared, state, change, row, reference, new.power, how);
    reference
}

/// What makes a VM a snapshot.
fn of_snapshot(shared: &Shared, row: &Row) -> Vec<(u16, Value)> {
    let info = BTreeMap::from([
        ("power-state-at-snapshot".to_owned(), row.get(vm::POWER_STATE).as_str().to_owned()),
        ("disk-snapshot-type".to_owned(), "crash_consistent".to_owned()),
    ]);
    vec![
        (vm::IS_A_TEMPLATE.index(), Value::Bool(true)),
        (vm::IS_A_SNAPSHOT.index(), Value::Bool(true)),
        (vm::SNAPSHOT_OF.index(), Value::Ref(row.reference)),
        (vm::SNAPSHOT_TIME.index(), Value::Time(shared.now())),
        (vm::SNAPSHOT_INFO.index(), info.into_value()),
        (vm::SNAPSHOT_METADATA.index(), Value::str(String::from_utf8_lossy(&row.json()).into_owned())),
        (vm::PARENT.index(), Value::Ref(row.get(vm::PARENT).opaque())),
    ]
}

/// Adds drives like those of `row`. A VM that is suspended has those attached that its memory knows.
pub(super) fn insert_drives(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    row: &Row,
    of: Ref<Vm>,
    power: VmPowerState,
    made: &BTreeMap<Ref<Vbd>, Ref<Vdi>>,
) {
    for drive in disks::drives(state, row) {
        let cd = drive.get(vbd::TYPE) == VbdType::Cd;
        let disk = made.get(&drive.typed::<Vbd>()).copied();
        if disk.is_none() && !cd {
            continue;
        }
        let mut other_config = drive.get(vbd::OTHER_CONFIG);
        if !cd {
            other_config.insert("owner".to_owned(), String::new());
        }
        let attached = power == VmPowerState::Suspended && drive.get(vbd::CURRENTLY_ATTACHED);
        change.insert(
            NewRow::new(Ref::<Vbd>::new(shared.uuid()), shared.uuid())
                .with(vbd::VM, of)
                .with(vbd::CURRENTLY_ATTACHED, attached)
                .with(vbd::DEVICE, if attached { drive.get(vbd::DEVICE) } else { String::new() })
                .with(vbd::VDI, disk.unwrap_or_else(|| drive.get(vbd::VDI)))
                .with(vbd::USERDEVICE, drive.get(vbd::USERDEVICE))
                .with(vbd::BOOTABLE, drive.get(vbd::BOOTABLE))
                .with(vbd::MODE, drive.get(vbd::MODE))
                .with(vbd::TYPE, drive.get(vbd::TYPE))
                .with(vbd::UNPLUGGABLE, drive.get(vbd::UNPLUGGABLE))
                .with(vbd::EMPTY, drive.get(vbd::EMPTY))
                .with(vbd::QOS_ALGORITHM_TYPE, drive.get(vbd::QOS_ALGORITHM_TYPE))
                .with(vbd::QOS_ALGORITHM_PARAMS, drive.get(vbd::QOS_ALGORITHM_PARAMS))
                .with(vbd::OTHER_CONFIG, other_config),
        );
    }
}

/// Adds interfaces like those of `row`, attached as its drives are.
pub(super) fn insert_interfaces(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    row: &Row,
    of: Ref<Vm>,
    power: VmPowerState,
    how: Duplicate,
) {
    for original in row.get(vm::VIFS).into_iter().filter_map(|device: Ref<Vif>| state.row(device)) {
        // A snapshot is the same machine; any other is another one on the network.
        let keeps = how == Duplicate::Snapshot;
        let attached = power == VmPowerState::Suspended && original.get(vif::CURRENTLY_ATTACHED);
        change.insert(
            NewRow::new(Ref::<Vif>::new(shared.uuid()), shared.uuid())
                .with(vif::VM, of)
                .with(vif::CURRENTLY_ATTACHED, attached)
                .with(vif::NETWORK, original.get(vif::NETWORK))
                .with(vif::DEVICE, original.get(vif::DEVICE))
                .with(vif::MTU, original.get(vif::MTU))
                .with(vif::MAC, if keeps { original.get(vif::MAC) } else { interfaces::address(shared.uuid()) })
                .with(vif::MAC_AUTOGENERATED, !keeps || original.get(vif::MAC_AUTOGENERATED)),
        );
    }
}
