//! Rows of a store's disks, against what its driver finds there.

use std::collections::BTreeSet;

use datamodel::enums::VdiType;
use datamodel::fields::{sr, vdi};
use datamodel::{ClassKind, Host, Ref, Sr, Value, Vdi};
use proto::agent::step::Action;
use proto::agent::{ScanStore, StoreState, VolumeState};
use raft_store::{Row, State, Transaction};
use uuid::Uuid;

use super::{reach, volumes};
use crate::call::find;
use crate::controller::Shared;
use crate::failure::Served;
use crate::operations::{Draft, Ending, Planned, owed_volumes};

/// The parameter of an operation that looks into a store.
const OWED: &str = "owed";

/// Notes volumes that are to be undone: whatever becomes of them while the store is looked into, they are nobody's disks.
pub(super) fn note_owed(draft: &mut Draft<'_>) {
    let owed: Vec<String> = owed_volumes(draft.state).into_iter().collect();
    draft.note(OWED, owed.join(" "));
}

/// The step that looks into a store.
pub(super) fn step(state: &State, sr_ref: Ref<Sr>, host_ref: Ref<Host>) -> Served<Planned> {
    let row = find(state, sr_ref)?;
    let known = disks(state, &row).map(|disk| disk.uuid().to_owned()).collect();
    let scan = ScanStore { store: Some(reach::store(state, sr_ref, host_ref)?), known };
    Ok(Planned::new(host_ref, row.uuid(), Action::ScanStore(scan)))
}

fn disks<'a>(state: &'a State, sr_row: &Row) -> impl Iterator<Item = &'a std::sync::Arc<Row>> {
    sr_row.get(sr::VDIS).into_iter().filter_map(|reference: Ref<Vdi>| state.row(reference))
}

/// Whether a volume is the one that a row stands for.
pub(super) fn is_of(volume: &VolumeState, row: &Row) -> bool {
    volume.vdi == row.uuid() || (!volume.location.is_empty() && volume.location == row.get(vdi::LOCATION))
}

/// Makes the rows of a store say what its driver found: sizes as they are, images that came without the pool, and
/// which disks have none any more. A disk whose image is gone keeps its row, for somebody may bring it back. Whatever makes
/// or removes images holds the store, and so nothing came or went since it was looked into but what was noted as owed.
pub(super) fn show(end: &mut Ending<'_>, sr_row: &Row, found: &StoreState) {
    let (state, change) = (end.state, &mut *end.change);
    let owed: BTreeSet<&str> = end.journal.parameter(OWED).split_whitespace().collect();
    let sr_ref = sr_row.typed::<Sr>();
    let mut known = BTreeSet::new();
    let mut allocated = 0_i64;
    for disk in disks(state, sr_row) {
        let this = disk.typed::<Vdi>();
        let volume = found.volumes.iter().enumerate().find(|(_, volume)| is_of(volume, disk));
        let missing = volume.is_none();
        if disk.get(vdi::MISSING) != missing {
            change.expect_row(disk).set(this, vdi::MISSING, missing);
        }
        let Some((place, volume)) = volume else { continue };
        known.insert(place);
        let (size, used) = (volumes::signed(volume.virtual_size), volumes::signed(volume.physical_utilisation));
        allocated = allocated.saturating_add(size);
        if disk.get(vdi::VIRTUAL_SIZE) != size {
            change.set(this, vdi::VIRTUAL_SIZE, size);
        }
        if disk.get(vdi::PHYSICAL_UTILISATION) != used {
            change.set(this, vdi::PHYSICAL_UTILISATION, used);
        }
        if !volume.location.is_empty() && disk.get(vdi::LOCATION) != volume.location {
            change.set(this, vdi::LOCATION, volume.location.clone());
        }
    }
    let came = found.volumes.iter().enumerate().filter(|(place, _)| !known.contains(place)).map(|(_, volume)| volume);
    for volume in came.filter(|volume| !owed.contains(volume.vdi.as_str())) {
        allocated = allocated.saturating_add(volumes::signed(volume.virtual_size));
        introduce(end.shared, state, change, sr_row, volume);
    }
    change.set(sr_ref, sr::VIRTUAL_ALLOCATION, allocated);
    show_figures(change, sr_row, found);
}

/// A store's own figures.
pub(super) fn show_figures(change: &mut Transaction, sr_row: &Row, found: &StoreState) {
    let sr_ref = sr_row.typed::<Sr>();
    change.set(sr_ref, sr::PHYSICAL_SIZE, volumes::signed(found.physical_size)).set(
        sr_ref,
        sr::PHYSICAL_UTILISATION,
        volumes::signed(found.physical_utilisation),
    );
}

/// The row of an image that nobody made through the pool.
fn introduce(shared: &Shared, state: &State, change: &mut Transaction, sr_row: &Row, volume: &VolumeState) {
    // An image that bears a uuid keeps it, unless another disk of the pool has it.
    let free = |uuid: &Uuid| state.by_uuid(Vdi::ID, &uuid.hyphenated().to_string()).is_none();
    let uuid = volume.vdi.parse::<Uuid>().ok().filter(free).unwrap_or_else(|| shared.uuid());
    let iso = sr_row.get(sr::CONTENT_TYPE) == "iso";
    let name = if volume.name.is_empty() { &volume.location } else { &volume.name };
    let kind: VdiType = volume.kind.parse().unwrap_or(VdiType::User);
    let fields = vec![
        (vdi::UUID.index(), Value::str(uuid.hyphenated().to_string())),
        (vdi::NAME_LABEL.index(), Value::str(name.as_str())),
        (vdi::SR.index(), Value::Ref(sr_row.reference)),
        (vdi::LOCATION.index(), Value::str(volume.location.as_str())),
        (vdi::VIRTUAL_SIZE.index(), Value::Int(volumes::signed(volume.virtual_size))),
        (vdi::PHYSICAL_UTILISATION.index(), Value::Int(volumes::signed(volume.physical_utilisation))),
        (vdi::TYPE.index(), Value::Enum(kind.as_str())),
        (vdi::READ_ONLY.index(), Value::Bool(volume.read_only || iso)),
        (vdi::MANAGED.index(), Value::Bool(true)),
        (vdi::IS_TOOLS_ISO.index(), Value::Bool(iso && sr_row.get(sr::IS_TOOLS_SR))),
    ];
    change.insert_values(Vdi::ID, Ref::<Vdi>::new(shared.uuid()).opaque(), fields);
}
