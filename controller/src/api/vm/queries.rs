//! What a VM could do, has, or would take: nothing is changed.

use std::collections::{BTreeMap, BTreeSet};

use datamodel::enums::VmOperations as Op;
use datamodel::fields::{network, pbd, pif, pool, sr, vbd, vdi, vif, vm};
use datamodel::{ApiError, Host, Network, Pbd, Pif, Pool, Ref, Session, Sr, Value, Vbd, Vm, errors};
use raft_store::{Row, State};

use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::storage::free_devices;
use crate::{interfaces, lifecycle};

const TRIGGERS: &[&str] = &["nmi", "init", "reset", "power", "sleep", "s3resume"];

/// The record as it is: what a domain was started with is not changed while it lives, and what is changed live, is so.
pub(in crate::api) async fn get_boot_record(cx: &Call, this: Ref<Vm>) -> Served<Value> {
    let row = cx.row(this)?;
    lifecycle::check(&cx.state, &row, Op::GetBootRecord)?;
    let fields = row.class.def().fields.iter().zip(row.values()).filter(|(field, _)| !field.hidden);
    Ok(Value::Record(fields.map(|(field, value)| (field.name.into(), value.clone())).collect()))
}

pub(in crate::api) async fn assert_operation_valid(cx: &Call, this: Ref<Vm>, operation: Op) -> Served<()> {
    Ok(lifecycle::check(&cx.state, &*cx.row(this)?, operation)?)
}

pub(in crate::api) async fn get_allowed_vbd_devices(cx: &Call, this: Ref<Vm>) -> Served<Vec<String>> {
    Ok(free_devices(&cx.state, &*cx.row(this)?))
}

pub(in crate::api) async fn get_allowed_vif_devices(cx: &Call, this: Ref<Vm>) -> Served<Vec<String>> {
    Ok(interfaces::free(&cx.state, &*cx.row(this)?))
}

/// None yet: figures come with the statistics.
pub(in crate::api) async fn get_data_sources(cx: &Call, this: Ref<Vm>) -> Served<Value> {
    cx.row(this)?;
    Ok(Value::set([]))
}

fn no_data_source<T>(cx: &Call, this: Ref<Vm>, name: &str) -> Served<T> {
    lifecycle::check(&cx.state, &*cx.row(this)?, Op::DataSourceOp)?;
    refuse(errors::invalid_value("data_source", name))
}

pub(in crate::api) async fn record_data_source(cx: &Call, this: Ref<Vm>, name: String) -> Served<()> {
    no_data_source(cx, this, &name)
}

pub(in crate::api) async fn query_data_source(cx: &Call, this: Ref<Vm>, name: String) -> Served<f64> {
    no_data_source(cx, this, &name)
}

pub(in crate::api) async fn forget_data_source_archives(cx: &Call, this: Ref<Vm>, name: String) -> Served<()> {
    no_data_source(cx, this, &name)
}

/// No plugins are installed in guests.
pub(in crate::api) async fn call_plugin(
    cx: &Call,
    this: Ref<Vm>,
    plugin: String,
    _function: String,
    _args: BTreeMap<String, String>,
) -> Served<String> {
    lifecycle::check(&cx.state, &*cx.row(this)?, Op::CallPlugin)?;
    refuse(errors::xenapi_missing_plugin(plugin))
}

pub(in crate::api) async fn query_services(cx: &Call, this: Ref<Vm>) -> Served<BTreeMap<String, String>> {
    let row = cx.row(this)?;
    lifecycle::check(&cx.state, &row, Op::QueryServices)?;
    refuse(errors::not_system_domain(this))
}

/// The lines that a trigger pulls are not there in the machines of today.
pub(in crate::api) async fn send_trigger(cx: &Call, this: Ref<Vm>, trigger: String) -> Served<()> {
    lifecycle::check(&cx.state, &*cx.row(this)?, Op::SendTrigger)?;
    if TRIGGERS.contains(&trigger.as_str()) {
        return refuse(errors::value_not_supported("trigger", trigger, "the machine has no such line"));
    }
    refuse(errors::invalid_value("trigger", trigger))
}

pub(in crate::api) async fn retrieve_wlb_recommendations(
    cx: &Call,
    this: Ref<Vm>,
) -> Served<BTreeMap<Ref<Host>, Vec<String>>> {
    cx.row(this)?;
    refuse(errors::wlb_not_initialized())
}

/// The SRs of a VM's disks. A disc in a drive can be missing.
pub(crate) fn srs_of(state: &State, row: &Row) -> BTreeSet<Ref<Sr>> {
    let disks = row.get(vm::VBDS).into_iter().filter_map(|reference: Ref<Vbd>| state.row(reference));
    let disks = disks.filter(|row| row.get(vbd::TYPE) != datamodel::enums::VbdType::Cd);
    disks.filter_map(|disk| Some(state.row(disk.get(vbd::VDI))?.get(vdi::SR))).collect()
}

/// The session under which something is to be recovered must be one.
pub(crate) fn expect_session(state: &State, session: Ref<Session>) -> Result<(), ApiError> {
    if state.row(session).is_some() { Ok(()) } else { Err(errors::session_invalid(session)) }
}

pub(in crate::api) async fn get_srs_required_for_recovery(
    cx: &Call,
    this: Ref<Vm>,
    session_to: Ref<Session>,
) -> Served<Vec<Ref<Sr>>> {
    let row = cx.row(this)?;
    expect_session(&cx.state, session_to)?;
    Ok(srs_of(&cx.state, &row).into_iter().collect())
}

/// Every SR of a VM's disks is in reach of some host.
pub(crate) fn expect_recoverable(state: &State, row: &Row) -> Result<(), ApiError> {
    let reached = |this: Ref<Sr>| {
        state.row(this).is_some_and(|row| {
            let connections: Vec<Ref<Pbd>> = row.get(sr::PBDS);
            connections.into_iter().filter_map(|pbd| state.row(pbd)).any(|row| row.get(pbd::CURRENTLY_ATTACHED))
        })
    };
    match srs_of(state, row).into_iter().find(|sr| !reached(*sr)) {
        Some(sr) => Err(errors::vm_requires_sr(row.typed::<Vm>(), sr)),
        None => Ok(()),
    }
}

pub(in crate::api) async fn assert_can_be_recovered(cx: &Call, this: Ref<Vm>, session_to: Ref<Session>) -> Served<()> {
    let row = cx.row(this)?;
    expect_session(&cx.state, session_to)?;
    let appliance = row.get(vm::APPLIANCE);
    if !appliance.is_null() {
        return refuse(errors::vm_is_part_of_an_appliance(this, appliance));
    }
    Ok(expect_recoverable(&cx.state, &row)?)
}

/// Whether every host could run a VM: it has nothing that only one has.
pub(in crate::api) async fn assert_agile(cx: &Call, this: Ref<Vm>) -> Served<()> {
    let row = cx.row(this)?;
    if row.get(vm::IS_CONTROL_DOMAIN) {
        return refuse(errors::operation_not_allowed("a control domain stays with its host"));
    }
    if !row.get(vm::ATTACHED_PCIS).is_empty() {
        return refuse(errors::vm_has_pci_attached(this));
    }
    if !row.get(vm::VGPUS).is_empty() {
        return refuse(errors::vm_has_vgpu(this));
    }
    if !row.get(vm::VUSBS).is_empty() {
        return refuse(errors::vm_has_vusbs(this));
    }
    let state = &cx.state;
    let everywhere = |this: Ref<Sr>| {
        state.row(this).is_some_and(|row| row.get(sr::SHARED))
            && state.all::<Host>().all(|host_row| {
                let here =
                    |row: &&std::sync::Arc<Row>| row.get(pbd::SR) == this && row.get(pbd::HOST) == host_row.typed();
                state.all::<Pbd>().find(here).is_some_and(|row| row.get(pbd::CURRENTLY_ATTACHED))
            })
    };
    if let Some(sr) = srs_of(state, &row).into_iter().find(|sr| !everywhere(*sr)) {
        return refuse(errors::ha_constraint_violation_sr_not_shared(sr));
    }
    for reference in row.get(vm::VIFS) {
        let this_network = find(state, reference)?.get(vif::NETWORK);
        if !is_shared(state, this_network) {
            return refuse(errors::ha_constraint_violation_network_not_shared(this_network));
        }
    }
    Ok(())
}

/// Whether a network is there on every host.
fn is_shared(state: &State, this: Ref<Network>) -> bool {
    let said = state.row(this).is_some_and(|row| {
        row.get(network::OTHER_CONFIG).get("assume_network_is_shared").is_some_and(|value| value == "true")
    });
    said || state.all::<Host>().all(|host_row| {
        state.all::<Pif>().any(|row| row.get(pif::NETWORK) == this && row.get(pif::HOST) == host_row.typed())
    })
}

/// The SR for the images of a VM's memory, if a host reaches one: its own, the pool's, then the pool's default.
pub(crate) fn suspend_sr(state: &State, row: &Row, on: Ref<Host>) -> Result<Ref<Sr>, ApiError> {
    let pool_row = state.all::<Pool>().next();
    let of_host = state.row(on).map_or(Ref::NULL, |row| row.get(datamodel::fields::host::SUSPEND_IMAGE_SR));
    let of_pool = |field| pool_row.map_or(Ref::NULL, |row| row.get(field));
    let wanted = [row.get(vm::SUSPEND_SR), of_pool(pool::SUSPEND_IMAGE_SR), of_host, of_pool(pool::DEFAULT_SR)];
    let reached = |sr: &Ref<Sr>| {
        state
            .all::<Pbd>()
            .any(|row| row.get(pbd::SR) == *sr && row.get(pbd::HOST) == on && row.get(pbd::CURRENTLY_ATTACHED))
    };
    let found = wanted.into_iter().filter(|sr| state.row(*sr).is_some()).find(reached);
    found.ok_or_else(|| errors::vm_no_suspend_sr(row.typed::<Vm>()))
}
