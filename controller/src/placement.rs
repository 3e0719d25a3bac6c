//! Which host starts a VM: a pure decision over rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use datamodel::enums::{DomainType, OnCrashBehaviour, VmPowerState};
use datamodel::fields::{host, host_metrics, network, pif, vbd, vdi, vif, vm};
use datamodel::{ApiError, Host, Network, Pif, Ref, Sr, Vbd, Vif, Vm, errors};
use raft_store::{Row, State};

use crate::storage::reach::reaches;

const MIB: i64 = 1 << 20;
const PAGE: f64 = 4096.0;
/// The newest kind of virtual machine that hosts make.
const NEWEST_PLATFORM: i64 = 2;

/// What a VM costs besides the memory it sees, in bytes.
pub(crate) fn overhead(row: &Row) -> i64 {
    if row.get(vm::IS_CONTROL_DOMAIN) {
        return row.get(vm::MEMORY_OVERHEAD);
    }
    let most = row.get(vm::MEMORY_STATIC_MAX).max(0) / MIB;
    let kind = row.get(vm::DOMAIN_TYPE);
    let own: i64 = if kind == DomainType::Pv { 0 } else { 1 };
    let shim = if kind == DomainType::PvInPvh { 23 + most / 90 } else { 0 };
    #[allow(clippy::cast_precision_loss)]
    let pages = (256_i64.saturating_mul(row.get(vm::VCPUS_MAX)).saturating_add(most.saturating_mul(2))) as f64;
    let shadow = (pages * PAGE * row.get(vm::HVM_SHADOW_MULTIPLIER).max(1.0) / MIB as f64).ceil().max(1.0);
    // A number of MiB: far within what an integer holds, and cut off where it is not.
    #[allow(clippy::cast_possible_truncation)]
    let shadow = shadow as i64;
    own.saturating_add(1).saturating_add(shadow).saturating_add(shim).saturating_mul(MIB)
}

/// What a VM needs to start, in bytes: all it may ever have. Its guest sees that much, and nobody can make it stay below
/// before its balloon driver runs; what it then gives back is free for others.
pub(crate) fn need(row: &Row) -> i64 {
    row.get(vm::MEMORY_STATIC_MAX).max(row.get(vm::MEMORY_DYNAMIC_MIN)).saturating_add(overhead(row))
}

/// What a VM that is on a host may have of its memory, in bytes. It was given what there was, and keeps it.
pub(crate) fn held(row: &Row) -> i64 {
    row.get(vm::MEMORY_DYNAMIC_MIN).max(row.get(vm::MEMORY_TARGET))
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
        .map(|row| held(row).saturating_add(overhead(row)))
        .sum();
    total.saturating_sub(row.get(host::MEMORY_OVERHEAD)).saturating_sub(taken)
}

/// How much of its memory a VM gets that starts with so much free: all it may have, or what there is.
pub(crate) fn target(vm_row: &Row, free: i64) -> i64 {
    let (least, most) = (vm_row.get(vm::MEMORY_DYNAMIC_MIN), vm_row.get(vm::MEMORY_DYNAMIC_MAX));
    free.saturating_sub(overhead(vm_row)).clamp(least, most.max(least))
}

fn live(state: &State, row: &Row) -> bool {
    state.row(row.get(host::METRICS)).is_some_and(|metrics| metrics.get(host_metrics::LIVE))
}

/// Whether a VM can start on a host; the first obstacle in the documented order.
pub(crate) fn check(state: &State, vm_row: &Row, host_row: &Row) -> Result<(), ApiError> {
    check_but_memory(state, vm_row, host_row)?;
    let (needed, available) = (need(vm_row), free_memory(state, host_row));
    if needed > available {
        return Err(errors::host_not_enough_free_memory(needed.to_string(), available.max(0).to_string()));
    }
    check_processors(vm_row, host_row)
}

fn check_but_memory(state: &State, vm_row: &Row, host_row: &Row) -> Result<(), ApiError> {
    let (this, reference) = (vm_row.typed::<Vm>(), host_row.typed::<Host>());
    check_configuration(vm_row)?;
    if !live(state, host_row) {
        return Err(errors::host_not_live());
    }
    if !host_row.get(host::ENABLED) {
        return Err(errors::host_disabled(reference));
    }
    let version = vm_row.get(vm::HARDWARE_PLATFORM_VERSION);
    let known = host_row.get(host::VIRTUAL_HARDWARE_PLATFORM_VERSIONS);
    if version > NEWEST_PLATFORM || (!known.is_empty() && !known.contains(&version)) {
        let versions: Vec<String> = known.iter().map(i64::to_string).collect();
        return Err(errors::vm_host_incompatible_virtual_hardware_platform_version(
            reference,
            versions.join("; "),
            this,
            version.to_string(),
        ));
    }
    if let Some(sr) = srs(state, vm_row).find(|sr| !reaches(state, reference, *sr)) {
        return Err(errors::vm_requires_sr(this, sr));
    }
    if let Some(network) = networks(state, vm_row).find(|network| !is_on(state, reference, *network)) {
        return Err(errors::vm_requires_network(this, network));
    }
    Ok(())
}

/// What no host could start.
fn check_configuration(vm_row: &Row) -> Result<(), ApiError> {
    let (at_startup, most) = (vm_row.get(vm::VCPUS_AT_STARTUP), vm_row.get(vm::VCPUS_MAX));
    if most < 1 {
        return Err(errors::invalid_value("VCPUs_max", most.to_string()));
    }
    if at_startup < 1 {
        return Err(errors::invalid_value("VCPUs_at_startup", at_startup.to_string()));
    }
    if at_startup > most {
        let why = format!("value greater than VCPUs-max ({most})");
        return Err(errors::value_not_supported("VCPUs-at-startup", at_startup.to_string(), why));
    }
    let sizes = [vm::MEMORY_STATIC_MIN, vm::MEMORY_DYNAMIC_MIN, vm::MEMORY_DYNAMIC_MAX, vm::MEMORY_STATIC_MAX];
    let sizes = sizes.map(|field| vm_row.get(field));
    if sizes[0] < 0 || sizes.windows(2).any(|pair| pair[0] > pair[1]) {
        return Err(errors::memory_constraint_violation("static_min <= dynamic_min <= dynamic_max <= static_max"));
    }
    let multiplier = vm_row.get(vm::HVM_SHADOW_MULTIPLIER);
    if !(multiplier >= 1.0 && multiplier.is_finite()) {
        return Err(errors::invalid_value("HVM_shadow_multiplier", multiplier.to_string()));
    }
    let crash = vm_row.get(vm::ACTIONS_AFTER_CRASH);
    if crash == OnCrashBehaviour::RenameRestart {
        return Err(errors::value_not_supported("actions_after_crash", crash.as_str(), "a domain is not renamed"));
    }
    Ok(())
}

fn check_processors(vm_row: &Row, host_row: &Row) -> Result<(), ApiError> {
    let unrestricted = vm_row.get(vm::PLATFORM).get("vcpu-unrestricted").is_some_and(|value| value == "true");
    let wanted = vm_row.get(vm::VCPUS_AT_STARTUP);
    let info: BTreeMap<String, String> = host_row.get(host::CPU_INFO);
    let there = info.get("cpu_count").and_then(|text| text.parse::<i64>().ok());
    // A host that tells of none is not known.
    match there.filter(|there| *there > 0) {
        Some(there) if wanted > there && !unrestricted => {
            Err(errors::host_not_enough_pcpus(wanted.to_string(), there.to_string()))
        }
        _ => Ok(()),
    }
}

/// The SRs that a VM's disks are in, and the image of its memory, if it is suspended.
fn srs(state: &State, vm_row: &Row) -> impl Iterator<Item = Ref<Sr>> {
    let disks: Vec<Ref<Vbd>> = vm_row.get(vm::VBDS);
    let disks = disks.into_iter().filter_map(|disk| state.row(disk)).map(|row| row.get(vbd::VDI));
    let memory = vm_row.get(vm::POWER_STATE) == VmPowerState::Suspended;
    let memory = memory.then(|| vm_row.get(vm::SUSPEND_VDI));
    let srs = disks.chain(memory).filter_map(|disk| Some(state.row(disk)?.get(vdi::SR)));
    // What is not there cannot be reached, and is refused by a name of its own.
    srs.filter(|sr| state.row(*sr).is_some())
}

fn networks(state: &State, vm_row: &Row) -> impl Iterator<Item = Ref<Network>> {
    let interfaces: Vec<Ref<Vif>> = vm_row.get(vm::VIFS);
    interfaces.into_iter().filter_map(|this| Some(state.row(this)?.get(vif::NETWORK)))
}

/// Whether a network is there on a host: through an interface of its own, or, where it is no host's, where VMs use it.
fn is_on(state: &State, this: Ref<Host>, net: Ref<Network>) -> bool {
    let Some(row) = state.row(net) else { return false };
    let interfaces: Vec<Ref<Pif>> = row.get(network::PIFS);
    if !interfaces.is_empty() {
        return interfaces.into_iter().any(|pif| state.row(pif).is_some_and(|row| row.get(pif::HOST) == this));
    }
    let shared = row.get(network::OTHER_CONFIG).get("assume_network_is_shared").is_some_and(|value| value == "true");
    shared || users(state, row).all(|host| host == this)
}

/// Where the VMs are that use a network now.
fn users(state: &State, row: &Row) -> impl Iterator<Item = Ref<Host>> {
    let interfaces: Vec<Ref<Vif>> = row.get(network::VIFS);
    let vms = interfaces.into_iter().filter_map(|this| state.row(state.row(this)?.get(vif::VM)));
    vms.flat_map(|row| [row.get(vm::RESIDENT_ON), row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON)])
        .filter(|host| !host.is_null())
}

/// Every host that could start a VM, the one with most room first.
pub(crate) fn candidates(state: &State, vm_row: &Row) -> Vec<Arc<Row>> {
    rooms(state, vm_row).into_iter().map(|(_, row)| row).collect()
}

fn rooms(state: &State, vm_row: &Row) -> Vec<(i64, Arc<Row>)> {
    let mut hosts: Vec<(i64, Arc<Row>)> = state
        .all::<Host>()
        .filter(|row| check(state, vm_row, row).is_ok())
        .map(|row| (free_memory(state, row), Arc::clone(row)))
        .collect();
    hosts.sort_by_key(|(free, row)| (std::cmp::Reverse(*free), row.reference));
    hosts
}

/// The host for a VM: the one it prefers if that can; else one of those with room for all its memory, for as much as it
/// may have at once, or for as little as it must. `draw` is in [0, 1).
pub(crate) fn choose(state: &State, vm_row: &Row, master: Ref<Host>, draw: f64) -> Result<Arc<Row>, ApiError> {
    let hosts = rooms(state, vm_row);
    let preferred = vm_row.get(vm::AFFINITY);
    if let Some((_, row)) = hosts.iter().find(|(_, row)| row.typed::<Host>() == preferred) {
        return Ok(Arc::clone(row));
    }
    if hosts.is_empty() {
        return Err(nowhere(state, vm_row));
    }
    let besides = overhead(vm_row);
    let fits = |size: i64| hosts.iter().any(|(free, _)| size.saturating_add(besides) <= *free);
    let sizes = [vm::MEMORY_STATIC_MAX, vm::MEMORY_DYNAMIC_MAX, vm::MEMORY_DYNAMIC_MIN].map(|field| vm_row.get(field));
    let size = sizes.into_iter().find(|size| fits(*size)).unwrap_or(0);
    let roomy = hosts.iter().filter(|(free, _)| size.saturating_add(besides) <= *free);
    let mut hosts: Vec<Arc<Row>> = roomy.map(|(_, row)| Arc::clone(row)).collect();
    // The master has other work: it comes last among those that can.
    hosts.sort_by_key(|row| row.typed::<Host>() == master);
    // Squared, so that the roomiest are drawn most, and two calls at once do not all go to the same host.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let place = (draw * draw * hosts.len() as f64) as usize;
    Ok(hosts.swap_remove(place.min(hosts.len().saturating_sub(1))))
}

/// Why no host can: what is wrong with the VM itself, or what one host lacks where there is only one.
fn nowhere(state: &State, vm_row: &Row) -> ApiError {
    if let Err(error) = check_configuration(vm_row) {
        return error;
    }
    let reasons: Vec<ApiError> = state.all::<Host>().filter_map(|row| check(state, vm_row, row).err()).collect();
    match reasons.as_slice() {
        [one] if one.code != errors::HOST_NOT_LIVE && one.code != errors::HOST_DISABLED => one.clone(),
        _ => errors::no_hosts_available(),
    }
}

/// Whether a VM's domain should be on some host.
pub(crate) fn has_domain(power: VmPowerState) -> bool {
    matches!(power, VmPowerState::Running | VmPowerState::Paused)
}
