//! A VM's rows, as its domain is.

use datamodel::enums::{DomainType, VmPowerState};
use datamodel::fields::{console, host, vm, vm_metrics};
use datamodel::{Console, Host, Ref, Vm, VmMetrics};
use proto::agent::{DomainState, PowerState};
use raft_store::{NewRow, Row, State, Transaction};

use super::guest;
use crate::controller::Shared;
use crate::storage::disks;
use crate::{interfaces, placement};

/// Memory that differs by less is not worth an entry of the log.
const MEMORY_STEP: i64 = 1 << 20;

/// What the API calls a domain's state; one that is gone has left its VM halted.
pub(crate) fn power_of(domain: &DomainState) -> VmPowerState {
    match domain.state() {
        PowerState::Running => VmPowerState::Running,
        PowerState::Paused => VmPowerState::Paused,
        PowerState::Halted | PowerState::Crashed | PowerState::Unspecified => VmPowerState::Halted,
    }
}

/// Makes a VM's rows say what a domain is.
pub(crate) fn show(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    vm_row: &Row,
    host_ref: Ref<Host>,
    domain: &DomainState,
) {
    let power = power_of(domain);
    if placement::has_domain(power) {
        show_there(shared, state, change, vm_row, host_ref, domain);
    } else {
        show_gone(shared, state, change, vm_row, power);
    }
    show_consoles(shared, state, change, vm_row, host_ref, domain, placement::has_domain(power));
}

fn show_there(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    vm_row: &Row,
    host_ref: Ref<Host>,
    domain: &DomainState,
) {
    let vm_ref = vm_row.typed::<Vm>();
    let power = power_of(domain);
    change.set(vm_ref, vm::POWER_STATE, power).set(vm_ref, vm::RESIDENT_ON, host_ref).set(
        vm_ref,
        vm::DOMID,
        domain.domid,
    );
    let metrics: Ref<VmMetrics> = vm_row.get(vm::METRICS);
    if state.row(metrics).is_some() {
        let started = datamodel::Timestamp(i64::try_from(domain.start_time).unwrap_or(0));
        let word = if power == VmPowerState::Paused { "paused" } else { "running" };
        change
            .set(metrics, vm_metrics::START_TIME, started)
            .set(metrics, vm_metrics::MEMORY_ACTUAL, memory_actual(domain))
            .set(metrics, vm_metrics::VCPUS_NUMBER, vm_row.get(vm::VCPUS_AT_STARTUP))
            .set(metrics, vm_metrics::STATE, vec![word.to_owned()])
            .set(metrics, vm_metrics::LAST_UPDATED, shared.now());
        // What a domain was made as is so until it goes, whatever its VM's row says later.
        if vm_row.get(vm::DOMID) != domain.domid {
            let platform = vm_row.get(vm::PLATFORM);
            let wanted = |key: &str| platform.get(key).is_some_and(|value| value == "true" || value == "1");
            let kind = vm_row.get(vm::DOMAIN_TYPE);
            change
                .set(metrics, vm_metrics::HVM, kind == DomainType::Hvm)
                .set(metrics, vm_metrics::CURRENT_DOMAIN_TYPE, kind)
                .set(metrics, vm_metrics::NESTED_VIRT, wanted("nested-virt"))
                .set(metrics, vm_metrics::NOMIGRATE, wanted("nomigrate"));
        }
    }
    guest::show(shared, state, change, vm_row, domain);
}

/// A VM without a domain: halted, or suspended.
pub(crate) fn show_gone(shared: &Shared, state: &State, change: &mut Transaction, vm_row: &Row, power: VmPowerState) {
    let vm_ref = vm_row.typed::<Vm>();
    change.set(vm_ref, vm::POWER_STATE, power).set(vm_ref, vm::RESIDENT_ON, Ref::NULL).set(vm_ref, vm::DOMID, -1).set(
        vm_ref,
        vm::REQUIRES_REBOOT,
        false,
    );
    let metrics: Ref<VmMetrics> = vm_row.get(vm::METRICS);
    if state.row(metrics).is_some() {
        change
            .set(metrics, vm_metrics::MEMORY_ACTUAL, 0)
            .set(metrics, vm_metrics::VCPUS_NUMBER, 0)
            .set(metrics, vm_metrics::STATE, Vec::new())
            .set(metrics, vm_metrics::HVM, false)
            .set(metrics, vm_metrics::CURRENT_DOMAIN_TYPE, DomainType::Unspecified)
            .set(metrics, vm_metrics::NESTED_VIRT, false)
            .set(metrics, vm_metrics::NOMIGRATE, false)
            .set(metrics, vm_metrics::LAST_UPDATED, shared.now());
    }
    guest::forget(change, vm_row);
    // A suspended VM keeps what its memory knows of.
    if power == VmPowerState::Halted {
        disks::detached(state, change, vm_row);
        interfaces::detached(state, change, vm_row);
    }
    for console in vm_row.get(vm::CONSOLES) {
        change.delete::<Console>(console);
    }
}

fn memory_actual(domain: &DomainState) -> i64 {
    i64::try_from(domain.memory_actual).unwrap_or(i64::MAX)
}

/// Whether a VM's rows say what its domain is.
pub(crate) fn is_shown(state: &State, row: &Row, domain: &DomainState) -> bool {
    let power = power_of(domain);
    if !placement::has_domain(power) {
        return !placement::has_domain(row.get(vm::POWER_STATE));
    }
    let metrics = state.row(row.get(vm::METRICS));
    let memory = metrics
        .is_none_or(|metrics| (metrics.get(vm_metrics::MEMORY_ACTUAL) - memory_actual(domain)).abs() < MEMORY_STEP);
    row.get(vm::POWER_STATE) == power
        && row.get(vm::DOMID) == domain.domid
        && row.get(vm::CONSOLES).len() == domain.consoles.len()
        && memory
        && guest::is_shown(state, row, domain)
}

/// A console for each of the domain's; none without a domain.
fn show_consoles(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    vm_row: &Row,
    host_ref: Ref<Host>,
    domain: &DomainState,
    has_domain: bool,
) {
    let known: Vec<Ref<Console>> = vm_row.get(vm::CONSOLES);
    let same_host = vm_row.get(vm::RESIDENT_ON) == host_ref;
    if has_domain && same_host && known.len() == domain.consoles.len() {
        return;
    }
    if !has_domain {
        return;
    }
    for reference in known {
        change.delete(reference);
    }
    let address = state.row(host_ref).map(|row| row.get(host::ADDRESS)).unwrap_or_default();
    for shown in &domain.consoles {
        let Ok(protocol) = shown.protocol.parse() else { continue };
        let uuid = shared.uuid();
        change.insert(
            NewRow::new(Ref::<Console>::new(shared.uuid()), uuid)
                .with(console::PROTOCOL, protocol)
                .with(console::LOCATION, format!("https://{address}/console?uuid={}", uuid.hyphenated()))
                .with(console::VM, vm_row.typed::<Vm>()),
        );
    }
}
