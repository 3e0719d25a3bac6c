//! Messages of the class VM.

pub(super) mod memory;
pub(super) mod processors;
pub(crate) mod queries;
pub(super) mod settings;

use datamodel::enums::{DomainType, VmOperations as Op, VmPowerState};
use datamodel::fields::{vm, vm_metrics};
use datamodel::{ClassKind, Host, OpaqueRef, Ref, Sr, Value, Vdi, Vm, VmMetrics, errors};
use raft_store::{NewRow, Row, State, Transaction};

use crate::call::{Call, find, persist};
use crate::failure::{Served, refuse};
use crate::membership::departure;
use crate::operations::{self, Asked, Duplicate, Power, duplicate, refresh, run_power};
use crate::{implicit, lifecycle, placement};

/// Metrics of a VM that is being made.
fn metrics(cx: &Call, change: &mut Transaction) -> Ref<VmMetrics> {
    let reference = cx.reference();
    change.insert(NewRow::new(reference, cx.uuid()).with(vm_metrics::LAST_UPDATED, cx.now()));
    reference
}

pub(super) async fn clone(cx: &Call, this: Ref<Vm>, name: String) -> Served<Ref<Vm>> {
    duplicate(cx, this, Duplicate::Clone, Asked { name, ..Asked::default() }).await
}

/// All bytes of all disks. A null SR leaves each where it is.
pub(super) async fn copy(cx: &Call, this: Ref<Vm>, name: String, into: Ref<Sr>) -> Served<Ref<Vm>> {
    let into = if cx.state.row(into).is_some() { into } else { Ref::NULL };
    duplicate(cx, this, Duplicate::Copy, Asked { name, into, ..Asked::default() }).await
}

pub(super) async fn snapshot(cx: &Call, this: Ref<Vm>, name: String, ignored: Vec<Ref<Vdi>>) -> Served<Ref<Vm>> {
    duplicate(cx, this, Duplicate::Snapshot, Asked { name, ignored, ..Asked::default() }).await
}

pub(super) async fn create(cx: &Call, record: Value) -> Served<Ref<Vm>> {
    let Value::Record(members) = &record else { return refuse(errors::field_type_error("args")) };
    let find = |name: &str| members.iter().find(|(member, _)| member == name).map(|(_, value)| value.clone());
    let power = find("power_state").and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default();
    if !power.is_empty() && power != VmPowerState::Halted.as_str() {
        return refuse(errors::vm_bad_power_state(OpaqueRef::NULL, "halted", power.to_ascii_lowercase()));
    }
    let mut change = cx.transaction();
    let mut more = vec![
        (vm::METRICS.index(), Value::Ref(metrics(cx, &mut change).opaque())),
        (vm::DOMID.index(), Value::Int(-1)),
        (vm::POWER_STATE.index(), Value::Enum(VmPowerState::Halted.as_str())),
    ];
    let typed = find("domain_type").and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default();
    if typed.is_empty() || typed == DomainType::Unspecified.as_str() {
        let hvm = find("HVM_boot_policy").is_some_and(|value| value.as_str().is_some_and(|text| !text.is_empty()));
        more.push((vm::DOMAIN_TYPE.index(), Value::Enum(if hvm { DomainType::Hvm } else { DomainType::Pv }.as_str())));
    }
    let reference = implicit::insert(cx, &mut change, Vm::ID, record, more)?;
    change.put(Ref::<Vm>::from_opaque(reference), vm::OTHER_CONFIG, "mac_seed".to_owned(), cx.uuid().to_string());
    refresh(&cx.state, &mut change);
    cx.commit(change).await?;
    Ok(Ref::from_opaque(reference))
}

pub(super) async fn destroy(cx: &Call, this: Ref<Vm>) -> Served<()> {
    let row = cx.row(this)?;
    lifecycle::check(&cx.state, &row, Op::Destroy)?;
    let mut change = cx.transaction();
    change.expect_row(&row);
    for reference in row.get(vm::VBDS) {
        change.delete::<datamodel::Vbd>(reference);
    }
    for reference in row.get(vm::VIFS) {
        change.delete::<datamodel::Vif>(reference);
    }
    for reference in row.get(vm::CONSOLES) {
        change.delete::<datamodel::Console>(reference);
    }
    change.delete(row.get(vm::METRICS)).delete(row.get(vm::GUEST_METRICS)).delete(this);
    refresh(&cx.state, &mut change);
    cx.commit(change).await.map(drop)
}

pub(super) async fn provision(cx: &Call, this: Ref<Vm>) -> Served<()> {
    operations::provision(cx, this).await
}

const fn start_kind(paused: bool) -> Power {
    if paused { Power::StartPaused } else { Power::Start }
}

pub(super) async fn start(cx: &Call, this: Ref<Vm>, paused: bool, _force: bool) -> Served<()> {
    run_power(cx, this, Op::Start, start_kind(paused), None).await
}

pub(super) async fn start_on(cx: &Call, this: Ref<Vm>, host: Ref<Host>, paused: bool, _force: bool) -> Served<()> {
    run_power(cx, this, Op::StartOn, start_kind(paused), Some(host)).await
}

pub(super) async fn pause(cx: &Call, this: Ref<Vm>) -> Served<()> {
    run_power(cx, this, Op::Pause, Power::Pause, None).await
}

pub(super) async fn unpause(cx: &Call, this: Ref<Vm>) -> Served<()> {
    run_power(cx, this, Op::Unpause, Power::Unpause, None).await
}

pub(super) async fn clean_shutdown(cx: &Call, this: Ref<Vm>) -> Served<()> {
    operations::clean_shutdown(cx, this).await
}

pub(super) async fn hard_shutdown(cx: &Call, this: Ref<Vm>) -> Served<()> {
    operations::hard_shutdown(cx, this).await
}

pub(super) async fn shutdown(cx: &Call, this: Ref<Vm>) -> Served<()> {
    operations::shutdown(cx, this).await
}

pub(super) async fn clean_reboot(cx: &Call, this: Ref<Vm>) -> Served<()> {
    run_power(cx, this, Op::CleanReboot, Power::CleanReboot, None).await
}

pub(super) async fn hard_reboot(cx: &Call, this: Ref<Vm>) -> Served<()> {
    run_power(cx, this, Op::HardReboot, Power::HardReboot, None).await
}

pub(super) async fn resume(cx: &Call, this: Ref<Vm>, paused: bool, _force: bool) -> Served<()> {
    operations::resume(cx, this, Op::Resume, paused, None).await
}

pub(super) async fn resume_on(cx: &Call, this: Ref<Vm>, host: Ref<Host>, paused: bool, _force: bool) -> Served<()> {
    operations::resume(cx, this, Op::ResumeOn, paused, Some(host)).await
}

pub(super) async fn get_possible_hosts(cx: &Call, this: Ref<Vm>) -> Served<Vec<Ref<Host>>> {
    let row = cx.row(this)?;
    Ok(placement::candidates(&cx.state, &row).iter().map(|row| row.typed()).collect())
}

pub(super) async fn assert_can_boot_here(cx: &Call, this: Ref<Vm>, host: Ref<Host>) -> Served<()> {
    let (row, host_row) = (cx.row(this)?, cx.row(host)?);
    Ok(placement::check(&cx.state, &row, &host_row)?)
}

/// Decides on a VM as it is and writes what follows; decides anew where somebody was faster.
async fn alter(
    cx: &Call,
    this: Ref<Vm>,
    decide: impl Fn(&State, &Row, &mut Transaction) -> Served<()> + Send + Sync,
) -> Served<()> {
    persist(cx, |state, change| {
        let row = find(state, this)?;
        change.expect_row(&row);
        decide(state, &row, change)?;
        refresh(state, change);
        Ok(())
    })
    .await
}

pub(super) async fn update_allowed_operations(cx: &Call, this: Ref<Vm>) -> Served<()> {
    let row = cx.row(this)?;
    let mut change = cx.transaction();
    change.expect_row(&row).touch(Vm::ID, this.opaque());
    refresh(&cx.state, &mut change);
    cx.commit(change).await.map(drop)
}

pub(super) async fn set_is_a_template(cx: &Call, this: Ref<Vm>, value: bool) -> Served<()> {
    alter(cx, this, |state, row, change| {
        if value {
            lifecycle::check(state, row, Op::MakeIntoTemplate)?;
        }
        change.set(this, vm::IS_A_TEMPLATE, value);
        Ok(())
    })
    .await
}

pub(super) async fn power_state_reset(cx: &Call, this: Ref<Vm>) -> Served<()> {
    departure::reset_power_state(cx, this).await
}
