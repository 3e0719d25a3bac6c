//! Steps on volumes, and the rows of what they make.

use std::collections::BTreeMap;

use datamodel::enums::VdiType;
use datamodel::fields::{sr, vdi};
use datamodel::{ClassKind, Host, Ref, Sr, Timestamp, Value, Vdi};
use proto::agent::step::Action;
use proto::agent::{
    CloneVolume, CopyVolume, CreateVolume, DestroyVolume, ResizeVolume, SnapshotVolume, VolumeRef, VolumeState,
};
use raft_store::{Row, State, Transaction};

use super::reach;
use crate::failure::Served;
use crate::operations::Planned;

pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn gone(volume: VolumeRef) -> Action {
    Action::DestroyVolume(DestroyVolume { volume: Some(volume) })
}

/// A new volume; undone by its end.
pub(crate) fn create(
    state: &State,
    sr_ref: Ref<Sr>,
    uuid: &str,
    (size, kind, sm_config): (i64, VdiType, BTreeMap<String, String>),
    host_ref: Ref<Host>,
) -> Served<Planned> {
    let volume = reach::new_volume(state, sr_ref, uuid, host_ref)?;
    let create = CreateVolume {
        volume: Some(volume.clone()),
        virtual_size: unsigned(size),
        kind: kind.as_str().to_owned(),
        sm_config: sm_config.into_iter().collect(),
    };
    Ok(Planned::new(host_ref, uuid, Action::CreateVolume(create)).undone_by(gone(volume)))
}

/// A volume as it is now, to be read; undone by its end.
pub(crate) fn snapshot(state: &State, disk: &Row, into: &str, host_ref: Ref<Host>) -> Served<Planned> {
    let made = reach::new_volume(state, disk.get(vdi::SR), into, host_ref)?;
    let volume = Some(reach::volume(state, disk, host_ref)?);
    let action = Action::SnapshotVolume(SnapshotVolume { volume, into: into.to_owned() });
    Ok(Planned::new(host_ref, disk.uuid(), action).undone_by(gone(made)))
}

/// A volume as it is now, to be written; undone by its end.
pub(crate) fn clone(state: &State, disk: &Row, into: &str, host_ref: Ref<Host>) -> Served<Planned> {
    let made = reach::new_volume(state, disk.get(vdi::SR), into, host_ref)?;
    let volume = Some(reach::volume(state, disk, host_ref)?);
    let action = Action::CloneVolume(CloneVolume { volume, into: into.to_owned() });
    Ok(Planned::new(host_ref, disk.uuid(), action).undone_by(gone(made)))
}

/// All bytes of a volume into a new one; undone by its end.
pub(crate) fn copy(state: &State, disk: &Row, sr_ref: Ref<Sr>, into: &str, host_ref: Ref<Host>) -> Served<Planned> {
    let made = reach::new_volume(state, sr_ref, into, host_ref)?;
    let copy = CopyVolume { from: Some(reach::volume(state, disk, host_ref)?), into: Some(made.clone()), base: None };
    Ok(Planned::new(host_ref, disk.uuid(), Action::CopyVolume(copy)).undone_by(gone(made)))
}

/// All bytes of a volume, or what differs from another one, into one that is there.
pub(crate) fn copy_into(
    state: &State,
    disk: &Row,
    into: &Row,
    base: Option<&Row>,
    host_ref: Ref<Host>,
) -> Served<Planned> {
    let copy = CopyVolume {
        from: Some(reach::volume(state, disk, host_ref)?),
        into: Some(reach::volume(state, into, host_ref)?),
        base: base.map(|base| reach::volume(state, base, host_ref)).transpose()?,
    };
    Ok(Planned::new(host_ref, disk.uuid(), Action::CopyVolume(copy)))
}

pub(crate) fn resize(state: &State, disk: &Row, size: i64, host_ref: Ref<Host>) -> Served<Planned> {
    let volume = Some(reach::volume(state, disk, host_ref)?);
    let action = Action::ResizeVolume(ResizeVolume { volume, virtual_size: unsigned(size) });
    Ok(Planned::new(host_ref, disk.uuid(), action))
}

pub(crate) fn destroy(state: &State, disk: &Row, host_ref: Ref<Host>) -> Served<Planned> {
    Ok(Planned::new(host_ref, disk.uuid(), gone(reach::volume(state, disk, host_ref)?)))
}

/// A disk that was made, for the transaction that shows it.
pub(crate) struct Made<'a> {
    pub(crate) uuid: &'a str,
    pub(crate) sr: Ref<Sr>,
    pub(crate) volume: &'a VolumeState,
    /// What clients chose, or the original has.
    pub(crate) fields: Vec<(u16, Value)>,
}

/// Fields that a copy, a clone or a snapshot has of its original.
pub(crate) fn inherited(original: &Row) -> Vec<(u16, Value)> {
    let fields = [
        vdi::NAME_LABEL.index(),
        vdi::NAME_DESCRIPTION.index(),
        vdi::TYPE.index(),
        vdi::SHARABLE.index(),
        vdi::OTHER_CONFIG.index(),
        vdi::XENSTORE_DATA.index(),
        vdi::ON_BOOT.index(),
        vdi::TAGS.index(),
        vdi::ALLOW_CACHING.index(),
    ];
    fields.into_iter().map(|index| (index, original.value(index).clone())).collect()
}

/// Fields of a snapshot.
pub(crate) fn of_snapshot(original: &Row, now: Timestamp) -> Vec<(u16, Value)> {
    let mut fields = inherited(original);
    fields.extend([
        (vdi::IS_A_SNAPSHOT.index(), Value::Bool(true)),
        (vdi::SNAPSHOT_OF.index(), Value::Ref(original.reference)),
        (vdi::SNAPSHOT_TIME.index(), Value::Time(now)),
    ]);
    fields
}

/// Adds a disk's row, and what it takes of its SR.
pub(crate) fn insert(state: &State, change: &mut Transaction, reference: Ref<Vdi>, made: Made<'_>) {
    let Made { uuid, sr: sr_ref, volume, mut fields } = made;
    let own = [
        (vdi::UUID.index(), Value::str(uuid)),
        (vdi::SR.index(), Value::Ref(sr_ref.opaque())),
        (vdi::LOCATION.index(), Value::str(volume.location.as_str())),
        (vdi::VIRTUAL_SIZE.index(), Value::Int(signed(volume.virtual_size))),
        (vdi::PHYSICAL_UTILISATION.index(), Value::Int(signed(volume.physical_utilisation))),
        (vdi::MANAGED.index(), Value::Bool(true)),
        (vdi::MISSING.index(), Value::Bool(false)),
    ];
    fields.retain(|(index, _)| own.iter().all(|(other, _)| other != index));
    fields.extend(own);
    change.insert_values(Vdi::ID, reference.opaque(), fields);
    account(state, change, sr_ref, signed(volume.virtual_size), signed(volume.physical_utilisation));
}

/// A disk is as its driver says.
pub(crate) fn show(state: &State, change: &mut Transaction, disk: &Row, volume: &VolumeState) {
    let this = disk.typed::<Vdi>();
    let (size, used) = (signed(volume.virtual_size), signed(volume.physical_utilisation));
    change.set(this, vdi::VIRTUAL_SIZE, size).set(this, vdi::PHYSICAL_UTILISATION, used);
    let (grown, more) = (size - disk.get(vdi::VIRTUAL_SIZE), used - disk.get(vdi::PHYSICAL_UTILISATION));
    account(state, change, disk.get(vdi::SR), grown, more);
}

/// What an SR gives out more, or less, than before. A scan tells the figures anew.
pub(crate) fn account(state: &State, change: &mut Transaction, sr_ref: Ref<Sr>, virtual_more: i64, more: i64) {
    // Several disks in one transaction add up.
    let now = state.preview(change).map(|(after, _)| after);
    let Some(row) = now.as_ref().unwrap_or(state).row(sr_ref) else { return };
    let sum = |old: i64, more: i64| old.saturating_add(more).max(0);
    change.set(sr_ref, sr::VIRTUAL_ALLOCATION, sum(row.get(sr::VIRTUAL_ALLOCATION), virtual_more)).set(
        sr_ref,
        sr::PHYSICAL_UTILISATION,
        sum(row.get(sr::PHYSICAL_UTILISATION), more),
    );
}

/// Adds the end of a disk's row. A drive that held it as a medium is empty, one that had it as its disk goes.
pub(crate) fn remove(state: &State, change: &mut Transaction, disk: &Row) {
    use datamodel::enums::VbdType;
    use datamodel::fields::vbd;
    let this = disk.typed::<Vdi>();
    for drive in disk.get(vdi::VBDS).into_iter().filter_map(|reference| state.row(reference)) {
        let reference = drive.typed::<datamodel::Vbd>();
        if drive.get(vbd::TYPE) == VbdType::Cd {
            change.set(reference, vbd::VDI, Ref::NULL).set(reference, vbd::EMPTY, true);
        } else {
            change.delete(reference);
        }
    }
    for snapshot in disk.get(vdi::SNAPSHOTS).into_iter().filter(|snapshot| state.row(*snapshot).is_some()) {
        change.set(snapshot, vdi::SNAPSHOT_OF, Ref::NULL);
    }
    account(
        state,
        change,
        disk.get(vdi::SR),
        disk.get(vdi::VIRTUAL_SIZE).saturating_neg(),
        disk.get(vdi::PHYSICAL_UTILISATION).saturating_neg(),
    );
    change.delete(this);
}
