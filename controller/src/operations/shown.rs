//! A VM's rows, as its domain is.

use datamodel::enums::VmPowerState;
use datamodel::fields::{console, host, vm, vm_metrics};
use datamodel::{Console, Host, Ref, Vm, VmMetrics};
use proto::agent::{DomainState, PowerState};
use raft_store::{NewRow, Row, State, Transaction};

use crate::controller::Shared;
use crate::placement;
use crate::storage::disks;

/// Makes a VM's rows say what a domain is.
pub(crate) fn show(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    vm_row: &Row,
    host_ref: Ref<Host>,
    domain: &DomainState,
) {
    let vm_ref = vm_row.typed::<Vm>();
    let power = match domain.state() {
        PowerState::Running => VmPowerState::Running,
        PowerState::Paused => VmPowerState::Paused,
        PowerState::Halted | PowerState::Crashed | PowerState::Unspecified => VmPowerState::Halted,
    };
    change.set(vm_ref, vm::POWER_STATE, power);
    let metrics: Ref<VmMetrics> = vm_row.get(vm::METRICS);
    let has_domain = placement::has_domain(power);
    if has_domain {
        change.set(vm_ref, vm::RESIDENT_ON, host_ref).set(vm_ref, vm::DOMID, domain.domid);
        if state.row(metrics).is_some() {
            let started = datamodel::Timestamp(i64::try_from(domain.start_time).unwrap_or(0));
            change
                .set(metrics, vm_metrics::START_TIME, started)
                .set(metrics, vm_metrics::MEMORY_ACTUAL, i64::try_from(domain.memory_actual).unwrap_or(0))
                .set(metrics, vm_metrics::VCPUS_NUMBER, vm_row.get(vm::VCPUS_AT_STARTUP))
                .set(metrics, vm_metrics::LAST_UPDATED, shared.now());
        }
    } else {
        change.set(vm_ref, vm::RESIDENT_ON, Ref::NULL).set(vm_ref, vm::DOMID, -1);
        disks::detached(state, change, vm_row);
        if state.row(metrics).is_some() {
            change.set(metrics, vm_metrics::MEMORY_ACTUAL, 0).set(metrics, vm_metrics::VCPUS_NUMBER, 0);
        }
    }
    show_consoles(shared, state, change, vm_row, host_ref, domain, has_domain);
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
    for reference in known {
        change.delete(reference);
    }
    if !has_domain {
        return;
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
