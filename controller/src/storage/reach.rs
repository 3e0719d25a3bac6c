//! Who reaches a store: as which driver and with which settings, and which host does what is done to it.

use std::sync::Arc;

use datamodel::enums::VmPowerState;
use datamodel::fields::{pbd, pool, sr, vbd, vdi, vm};
use datamodel::{ApiError, Host, Pbd, Pool, Ref, Sr, Vbd, Vm, errors};
use proto::agent::{Store, VolumeRef};
use raft_store::{Row, State};

use crate::call::find;
use crate::failure::Served;
use crate::membership::is_live;

/// The driver that stands behind an SR's type.
fn driver(ty: &str) -> &str {
    match ty {
        // What the samples of the documents make.
        "dummy" => "sim",
        other => other,
    }
}

/// An SR with these settings, as an agent is told of it.
pub(crate) fn store_with(uuid: &str, ty: &str, device_config: impl IntoIterator<Item = (String, String)>) -> Store {
    Store { sr: uuid.to_owned(), driver: driver(ty).to_owned(), device_config: device_config.into_iter().collect() }
}

/// The connection of a host to an SR.
pub(crate) fn connection(state: &State, sr_row: &Row, host_ref: Ref<Host>) -> Option<Arc<Row>> {
    let pbds = sr_row.get(sr::PBDS).into_iter().filter_map(|reference: Ref<Pbd>| state.row(reference));
    pbds.into_iter().find(|row| row.get(pbd::HOST) == host_ref).cloned()
}

/// An SR as a host reaches it.
///
/// # Errors
/// `SR_HAS_NO_PBDS`: the host has no connection to it.
pub(crate) fn store(state: &State, sr_ref: Ref<Sr>, host_ref: Ref<Host>) -> Served<Store> {
    let sr_row = find(state, sr_ref)?;
    let row = connection(state, &sr_row, host_ref).ok_or_else(|| errors::sr_has_no_pbds(sr_ref))?;
    Ok(store_with(sr_row.uuid(), &sr_row.get(sr::TYPE), row.get(pbd::DEVICE_CONFIG)))
}

/// A disk as a host reaches it.
///
/// # Errors
/// As for [`store`].
pub(crate) fn volume(state: &State, vdi_row: &Row, host_ref: Ref<Host>) -> Served<VolumeRef> {
    Ok(VolumeRef {
        store: Some(store(state, vdi_row.get(vdi::SR), host_ref)?),
        vdi: vdi_row.uuid().to_owned(),
        location: vdi_row.get(vdi::LOCATION),
    })
}

/// A disk that a driver is still to make: it chooses the location.
///
/// # Errors
/// As for [`store`].
pub(crate) fn new_volume(state: &State, sr_ref: Ref<Sr>, uuid: &str, host_ref: Ref<Host>) -> Served<VolumeRef> {
    Ok(VolumeRef { store: Some(store(state, sr_ref, host_ref)?), vdi: uuid.to_owned(), location: String::new() })
}

/// Whether a host is connected to an SR, by the rows.
pub(crate) fn reaches(state: &State, host_ref: Ref<Host>, sr_ref: Ref<Sr>) -> bool {
    let connected = |sr_row| connection(state, sr_row, host_ref).is_some_and(|row| row.get(pbd::CURRENTLY_ATTACHED));
    state.row(sr_ref).is_some_and(|row| connected(row))
}

/// The host where a disk is open, if it is in use.
pub(crate) fn in_use_at(state: &State, vdi_row: &Row) -> Option<Ref<Host>> {
    let drives = vdi_row.get(vdi::VBDS).into_iter().filter_map(|reference: Ref<Vbd>| state.row(reference));
    let mut users = drives.filter(|row| row.get(vbd::CURRENTLY_ATTACHED)).filter_map(|row| {
        let vm_row = state.row::<Vm>(row.get(vbd::VM))?;
        let live = matches!(vm_row.get(vm::POWER_STATE), VmPowerState::Running | VmPowerState::Paused);
        live.then(|| vm_row.get(vm::RESIDENT_ON))
    });
    users.find(|host_ref| !host_ref.is_null())
}

/// The host that does something to stores: one where the disk is in use can, since there its image is open; else the
/// master; else any that is live and reaches them all.
///
/// # Errors
/// `SR_HAS_NO_PBDS` where nobody is connected, `HOST_OFFLINE` where those who are do not answer.
pub(crate) fn worker(state: &State, stores: &[Ref<Sr>], in_use_at: Option<Ref<Host>>) -> Result<Ref<Host>, ApiError> {
    let reaching = |host_ref: &Ref<Host>| stores.iter().all(|sr_ref| reaches(state, *host_ref, *sr_ref));
    if let Some(host_ref) = in_use_at {
        return Ok(host_ref);
    }
    let hosts: Vec<Ref<Host>> = state.all::<Host>().map(|row| row.typed()).filter(reaching).collect();
    let live = |host_ref: &&Ref<Host>| state.row(**host_ref).is_some_and(|row| is_live(state, row));
    let master = state.all::<Pool>().next().map_or(Ref::NULL, |row| row.get(pool::MASTER));
    let mut able: Vec<&Ref<Host>> = hosts.iter().filter(live).collect();
    able.sort_by_key(|host_ref| **host_ref != master);
    match (able.first(), hosts.first()) {
        (Some(host_ref), _) => Ok(**host_ref),
        (None, Some(silent)) => Err(errors::host_offline(*silent)),
        (None, None) => Err(errors::sr_has_no_pbds(stores.first().copied().unwrap_or(Ref::NULL))),
    }
}

/// The host that does something to a disk.
///
/// # Errors
/// As for [`worker`].
pub(crate) fn worker_for(state: &State, vdi_row: &Row) -> Result<Ref<Host>, ApiError> {
    worker(state, &[vdi_row.get(vdi::SR)], in_use_at(state, vdi_row))
}
