//! What a guest says of itself: its `VM_guest_metrics`, made when it first speaks and gone with its domain.

use datamodel::enums::TristateType;
use datamodel::fields::{vm, vm_guest_metrics};
use datamodel::{Ref, Vm, VmGuestMetrics};
use proto::agent::{DomainState, GuestMetrics};
use raft_store::{NewRow, Row, State, Transaction};

use crate::controller::Shared;

/// Its drivers are there where they say their version, or do what only they can.
fn has_drivers(guest: &GuestMetrics) -> bool {
    !guest.pv_drivers_version.is_empty() || guest.can_balloon || guest.agent_live
}

const fn hotplug(guest: &GuestMetrics) -> TristateType {
    if guest.can_plug_disks { TristateType::Yes } else { TristateType::No }
}

/// Makes a VM's rows say what its guest says. A guest that says nothing has not spoken yet.
pub(super) fn show(shared: &Shared, state: &State, change: &mut Transaction, row: &Row, domain: &DomainState) {
    let known: Ref<VmGuestMetrics> = row.get(vm::GUEST_METRICS);
    let known = state.row(known).map(|_| known);
    // What another domain's guest said is not this one's.
    let other_domain = row.get(vm::DOMID) != domain.domid;
    if other_domain && let Some(known) = known {
        change.delete(known).set(row.typed::<Vm>(), vm::GUEST_METRICS, Ref::NULL);
    }
    let Some(guest) = &domain.guest else { return };
    let this = match known.filter(|_| !other_domain) {
        Some(known) => known,
        None => {
            let fresh: Ref<VmGuestMetrics> = Ref::new(shared.uuid());
            change.insert(NewRow::new(fresh, shared.uuid())).set(row.typed::<Vm>(), vm::GUEST_METRICS, fresh);
            fresh
        }
    };
    let owned = |map: &std::collections::HashMap<String, String>| map.clone().into_iter().collect();
    change
        .set(this, vm_guest_metrics::OS_VERSION, owned(&guest.os_version))
        .set(this, vm_guest_metrics::PV_DRIVERS_VERSION, owned(&guest.pv_drivers_version))
        .set(this, vm_guest_metrics::PV_DRIVERS_DETECTED, has_drivers(guest))
        .set(this, vm_guest_metrics::PV_DRIVERS_UP_TO_DATE, has_drivers(guest))
        .set(this, vm_guest_metrics::NETWORKS, owned(&guest.networks))
        .set(this, vm_guest_metrics::OTHER, owned(&guest.other))
        .set(this, vm_guest_metrics::LIVE, guest.agent_live)
        .set(this, vm_guest_metrics::CAN_USE_HOTPLUG_VBD, hotplug(guest))
        .set(this, vm_guest_metrics::LAST_UPDATED, shared.now());
    // What is allowed on the VM may rest on it.
    change.touch(<Vm as datamodel::ClassKind>::ID, row.reference);
}

/// Without a domain there is no guest.
pub(super) fn forget(change: &mut Transaction, row: &Row) {
    let known: Ref<VmGuestMetrics> = row.get(vm::GUEST_METRICS);
    if !known.is_null() {
        change.delete(known).set(row.typed::<Vm>(), vm::GUEST_METRICS, Ref::NULL);
    }
}

/// Whether a VM's rows say what its guest says.
pub(super) fn is_shown(state: &State, row: &Row, domain: &DomainState) -> bool {
    let Some(guest) = &domain.guest else { return true };
    let Some(known) = state.row(row.get(vm::GUEST_METRICS)) else { return false };
    let same = |shown: std::collections::BTreeMap<String, String>, told: &std::collections::HashMap<String, String>| {
        shown.len() == told.len() && shown.iter().all(|(key, value)| told.get(key) == Some(value))
    };
    same(known.get(vm_guest_metrics::OS_VERSION), &guest.os_version)
        && same(known.get(vm_guest_metrics::PV_DRIVERS_VERSION), &guest.pv_drivers_version)
        && same(known.get(vm_guest_metrics::NETWORKS), &guest.networks)
        && same(known.get(vm_guest_metrics::OTHER), &guest.other)
        && known.get(vm_guest_metrics::LIVE) == guest.agent_live
        && known.get(vm_guest_metrics::PV_DRIVERS_DETECTED) == has_drivers(guest)
        && known.get(vm_guest_metrics::CAN_USE_HOTPLUG_VBD) == hotplug(guest)
}
