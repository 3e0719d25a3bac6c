//! Messages of the class host.

use std::collections::BTreeMap;

use datamodel::fields::{host, vm};
use datamodel::{Host, Ref, Timestamp, Value, Vm, errors, model};

use crate::call::Call;
use crate::failure::{Served, refuse};
use crate::membership::{self, departure, rotation, shown, trust};
use crate::placement;

pub(super) async fn get_servertime(cx: &Call, this: Ref<Host>) -> Served<Timestamp> {
    cx.row(this)?;
    Ok(cx.now())
}

/// Guests may be started on it again.
pub(super) async fn enable(cx: &Call, this: Ref<Host>) -> Served<()> {
    let row = cx.row(this)?;
    if !membership::is_live(&cx.state, &row) {
        return refuse(errors::host_still_booting());
    }
    if !row.get(host::PENDING_GUIDANCES).is_empty() {
        return refuse(errors::host_pending_mandatory_guidance_not_empty(this));
    }
    set_enabled(cx, this, true).await
}

/// No guest is started on it until it is enabled or boots anew.
pub(super) async fn disable(cx: &Call, this: Ref<Host>) -> Served<()> {
    cx.row(this)?;
    set_enabled(cx, this, false).await
}

async fn set_enabled(cx: &Call, this: Ref<Host>, enabled: bool) -> Served<()> {
    let mut change = cx.transaction();
    change.set(this, host::ENABLED, enabled);
    cx.commit(change).await.map(drop)
}

pub(super) async fn declare_dead(cx: &Call, this: Ref<Host>) -> Served<()> {
    departure::declare_dead(cx, this).await
}

pub(super) async fn refresh_server_certificate(cx: &Call, this: Ref<Host>) -> Served<()> {
    rotation::refresh(cx, this).await
}

pub(super) async fn install_server_certificate(
    cx: &Call,
    this: Ref<Host>,
    certificate: String,
    private_key: String,
    certificate_chain: String,
) -> Served<()> {
    shown::install(cx, this, &certificate, private_key, &certificate_chain).await
}

pub(super) async fn reset_server_certificate(cx: &Call, this: Ref<Host>) -> Served<()> {
    shown::reset(cx, this).await
}

pub(super) async fn get_server_certificate(cx: &Call, this: Ref<Host>) -> Served<String> {
    trust::server_certificate(cx, this).await
}

pub(super) async fn destroy(cx: &Call, this: Ref<Host>) -> Served<()> {
    departure::destroy(cx, this).await
}

pub(super) async fn compute_free_memory(cx: &Call, this: Ref<Host>) -> Served<i64> {
    let row = cx.row(this)?;
    Ok(placement::free_memory(&cx.state, &row).max(0))
}

pub(super) async fn compute_memory_overhead(cx: &Call, this: Ref<Host>) -> Served<i64> {
    Ok(cx.row(this)?.get(host::MEMORY_OVERHEAD))
}

/// None yet: figures come with the statistics.
pub(super) async fn get_data_sources(cx: &Call, this: Ref<Host>) -> Served<Value> {
    cx.row(this)?;
    Ok(Value::set([]))
}

/// Every guest: nothing can be moved yet.
pub(super) async fn get_vms_which_prevent_evacuation(
    cx: &Call,
    this: Ref<Host>,
) -> Served<BTreeMap<Ref<Vm>, Vec<String>>> {
    let row = cx.row(this)?;
    let guests = row
        .get(host::RESIDENT_VMS)
        .into_iter()
        .filter(|guest: &Ref<Vm>| cx.state.row(*guest).is_some_and(|row| !row.get(vm::IS_CONTROL_DOMAIN)));
    Ok(guests.map(|guest| (guest, errors::no_hosts_available().description())).collect())
}

pub(super) async fn list_methods(_: &Call) -> Served<Vec<String>> {
    Ok(model().list_methods())
}

pub(super) async fn call_plugin(
    cx: &Call,
    this: Ref<Host>,
    plugin: String,
    _function: String,
    _args: Value,
) -> Served<String> {
    cx.row(this)?;
    refuse(errors::xenapi_missing_plugin(plugin))
}
