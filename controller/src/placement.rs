//! Which host starts a VM: a pure decision over rows.

use std::sync::Arc;

use datamodel::enums::VmPowerState;
use datamodel::fields::{host, host_metrics, vm};
use datamodel::{ApiError, Host, Ref, Vm, errors};
use raft_store::{Row, State};

use crate::storage::disks;

/// What a VM needs to start, in bytes.
pub(crate) fn need(row: &Row) -> i64 {
    row.get(vm::MEMORY_DYNAMIC_MIN).saturating_add(row.get(vm::MEMORY_OVERHEAD))
}

/// What a host has left, in bytes: what is there, less its own overhead, less every VM that runs or will run on it.
pub(crate) fn free_memory(state: &State, row: &Row) -> i64 {
    let reference = row.typed::<Host>();
    let total = state.row(row.get(host::METRICS)).map_or(0, |metrics| metrics.get(host_metrics::MEMORY_TOTAL));
    let taken: i64 = state
        .all::<Vm>()
        .filter(|vm_row| {
            vm_row.get(vm::RESIDENT_ON) == reference || vm_row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON) == reference
        })
        .map(|row| need(row))
        .sum();
    total.saturating_sub(row.get(host::MEMORY_OVERHEAD)).saturating_sub(taken)
}

fn live(state: &State, row: &Row) -> bool {
    state.row(row.get(host::METRICS)).is_some_and(|metrics| metrics.get(host_metrics::LIVE))
}

/// Whether a VM can start on a host; the first obstacle in the documented order.
pub(crate) fn check(state: &State, vm_row: &Row, host_row: &Row) -> Result<(), ApiError> {
    let reference = host_row.typed::<Host>();
    if vm_row.get(vm::VCPUS_AT_STARTUP) < 1 || vm_row.get(vm::VCPUS_AT_STARTUP) > vm_row.get(vm::VCPUS_MAX) {
        return Err(errors::invalid_value("VCPUs_at_startup", vm_row.get(vm::VCPUS_AT_STARTUP).to_string()));
    }
    if !live(state, host_row) {
        return Err(errors::host_not_live());
    }
    if !host_row.get(host::ENABLED) {
        return Err(errors::host_disabled(reference));
    }
    if let Some(store) = disks::out_of_reach(state, vm_row, reference) {
        return Err(errors::vm_requires_sr(vm_row.typed::<Vm>(), store));
    }
    let (needed, available) = (need(vm_row), free_memory(state, host_row));
    if needed > available {
        return Err(errors::host_not_enough_free_memory(needed.to_string(), available.max(0).to_string()));
    }
    Ok(())
}

/// Every host that could start a VM, the one with most room first.
pub(crate) fn candidates(state: &State, vm_row: &Row) -> Vec<Arc<Row>> {
    let mut hosts: Vec<(i64, Arc<Row>)> = state
        .all::<Host>()
        .filter(|row| check(state, vm_row, row).is_ok())
        .map(|row| (free_memory(state, row), Arc::clone(row)))
        .collect();
    hosts.sort_by_key(|(free, row)| (std::cmp::Reverse(*free), row.reference));
    hosts.into_iter().map(|(_, row)| row).collect()
}

/// The host for a VM: the one it prefers if that can, else one of those with most room. `draw` is in [0, 1).
pub(crate) fn choose(state: &State, vm_row: &Row, master: Ref<Host>, draw: f64) -> Result<Arc<Row>, ApiError> {
    let mut hosts = candidates(state, vm_row);
    let preferred = vm_row.get(vm::AFFINITY);
    if let Some(row) = hosts.iter().find(|row| row.typed::<Host>() == preferred) {
        return Ok(Arc::clone(row));
    }
    if hosts.is_empty() {
        return Err(nowhere(state, vm_row));
    }
    // The master has other work: it comes last among those that can.
    hosts.sort_by_key(|row| row.typed::<Host>() == master);
    // Squared, so that the roomiest are drawn most, and two calls at once do not all go to the same host.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let place = (draw * draw * hosts.len() as f64) as usize;
    Ok(hosts.swap_remove(place.min(hosts.len() - 1)))
}

/// Why no host can: a lack of memory is told as such where that is all that is wrong.
fn nowhere(state: &State, vm_row: &Row) -> ApiError {
    let short = state.all::<Host>().filter_map(|row| check(state, vm_row, row).err());
    let short: Vec<ApiError> = short.collect();
    match short.first() {
        Some(first) if short.len() == 1 && first.code == errors::HOST_NOT_ENOUGH_FREE_MEMORY => first.clone(),
        _ => errors::no_hosts_available(),
    }
}

/// Whether a VM's domain should be on some host.
pub(crate) fn has_domain(power: VmPowerState) -> bool {
    matches!(power, VmPowerState::Running | VmPowerState::Paused)
}
