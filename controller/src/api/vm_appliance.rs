//! Messages of the class VM_appliance.

use datamodel::enums::VmApplianceOperation as Operation;
use datamodel::fields::{vm, vm_appliance};
use datamodel::{ClassKind, Ref, Session, Sr, Value, Vm, VmAppliance};

use super::vm::queries::{expect_recoverable, expect_session, srs_of};
use crate::call::{Call, find, persist};
use crate::failure::Served;
use crate::operations::refresh;
use crate::{appliances, implicit};

pub(super) async fn create(cx: &Call, record: Value) -> Served<Ref<VmAppliance>> {
    implicit::create(cx, VmAppliance::ID, record, Vec::new()).await.map(Ref::from_opaque)
}

/// Its VMs stay, each for itself.
pub(super) async fn destroy(cx: &Call, this: Ref<VmAppliance>) -> Served<()> {
    persist(cx, |state, change| {
        let row = find(state, this)?;
        appliances::expect_idle(state, this)?;
        change.expect_row(&row);
        let members: Vec<Ref<Vm>> = row.get(vm_appliance::VMS);
        for member in members {
            change.set(member, vm::APPLIANCE, Ref::NULL);
        }
        change.delete(this);
        refresh(state, change);
        Ok(())
    })
    .await
}

pub(super) async fn start(cx: &Call, this: Ref<VmAppliance>, paused: bool) -> Served<()> {
    appliances::run(cx, this, Operation::Start, paused).await
}

pub(super) async fn clean_shutdown(cx: &Call, this: Ref<VmAppliance>) -> Served<()> {
    appliances::run(cx, this, Operation::CleanShutdown, false).await
}

pub(super) async fn hard_shutdown(cx: &Call, this: Ref<VmAppliance>) -> Served<()> {
    appliances::run(cx, this, Operation::HardShutdown, false).await
}

pub(super) async fn shutdown(cx: &Call, this: Ref<VmAppliance>) -> Served<()> {
    appliances::run(cx, this, Operation::Shutdown, false).await
}

pub(super) async fn assert_can_be_recovered(cx: &Call, this: Ref<VmAppliance>, session_to: Ref<Session>) -> Served<()> {
    let row = cx.row(this)?;
    expect_session(&cx.state, session_to)?;
    let members: Vec<Ref<Vm>> = row.get(vm_appliance::VMS);
    for member in members {
        expect_recoverable(&cx.state, &*cx.row(member)?)?;
    }
    Ok(())
}

pub(super) async fn get_srs_required_for_recovery(
    cx: &Call,
    this: Ref<VmAppliance>,
    session_to: Ref<Session>,
) -> Served<Vec<Ref<Sr>>> {
    let row = cx.row(this)?;
    expect_session(&cx.state, session_to)?;
    let members: Vec<Ref<Vm>> = row.get(vm_appliance::VMS);
    let mut all = std::collections::BTreeSet::new();
    for member in members {
        all.extend(srs_of(&cx.state, &*cx.row(member)?));
    }
    Ok(all.into_iter().collect())
}
