//! A host on its way out: its guests are freed, its rows go, and what pointed at them points at nothing.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use datamodel::fields::{console, host, member, pbd, pif, pool, vbd, vdi, vm};
use datamodel::{
    ClassId, ClassKind, Console, Host, Member, Pbd, Pif, Pool, Ref, Sr, Type, Value, Vbd, Vdi, Vm, errors, model,
};
use proto::agent::{DomainState, PowerState};
use raft_store::{Row, State, Transaction};

use super::{is_live, persist};
use crate::call::Call;
use crate::controller::Shared;
use crate::failure::{Served, refuse};
use crate::operations::{forget_domains_at, refresh, show};

/// Whether what is done to a host takes its storage with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Storage {
    /// SRs that no other host reaches go: the host is wiped.
    Forgotten,
    /// They stay, unreachable: the disks may still be there.
    Kept,
}

/// The guests that a host runs, or is about to, apart from its control domain.
pub(crate) fn guests(state: &State, of: Ref<Host>) -> impl Iterator<Item = &Arc<Row>> {
    state.all::<Vm>().filter(move |row| {
        !row.get(vm::IS_CONTROL_DOMAIN)
            && (row.get(vm::RESIDENT_ON) == of || row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON) == of)
    })
}

/// A host that does not answer, and is not the one that asks.
fn expect_dead(state: &State, row: &Row) -> Served<()> {
    let reference = row.typed::<Host>();
    let master = state.all::<Pool>().any(|pool_row| pool_row.get(pool::MASTER) == reference);
    if master || is_live(state, row) {
        return refuse(errors::host_is_live(reference));
    }
    Ok(())
}

/// `host.declare_dead`: the caller vouches that the machine is off. Its guests are halted and can be started elsewhere,
/// and it takes none until it has booted anew or somebody enables it. Should it come back nevertheless, whatever it
/// still runs is ended.
pub(crate) async fn declare_dead(cx: &Call, this: Ref<Host>) -> Served<()> {
    persist(cx, |state, change| {
        let row = crate::call::find(state, this)?;
        expect_dead(state, &row)?;
        change.expect_row(&row).set(this, host::ENABLED, false);
        forget_domains_at(state, change, this);
        for guest in guests(state, this) {
            reset(&cx.shared, state, change, guest);
        }
        refresh(state, change);
        Ok(())
    })
    .await
}

/// `VM.power_state_reset`: only once nothing can run it any more.
pub(crate) async fn reset_power_state(cx: &Call, this: Ref<Vm>) -> Served<()> {
    persist(cx, |state, change| {
        let row = crate::call::find(state, this)?;
        let place = row.get(vm::RESIDENT_ON);
        if let Some(host_row) = state.row(place) {
            expect_dead(state, host_row)?;
        }
        reset(&cx.shared, state, change, &row);
        refresh(state, change);
        Ok(())
    })
    .await
}

/// `host.destroy`: a dead host is forgotten.
pub(crate) async fn destroy(cx: &Call, this: Ref<Host>) -> Served<()> {
    persist(cx, |state, change| {
        let row = crate::call::find(state, this)?;
        expect_dead(state, &row)?;
        if guests(state, this).next().is_some() {
            return refuse(errors::host_has_resident_vms(this));
        }
        for member_row in state.all::<Member>().filter(|row| row.get(member::HOST) == this) {
            change.expect_row(member_row).delete(member_row.typed::<Member>());
        }
        remove(state, change, &row, Storage::Kept);
        Ok(())
    })
    .await
}

/// A VM without a domain, whatever it was. Operations that are under way on it end by themselves.
fn reset(shared: &Shared, state: &State, change: &mut Transaction, row: &Row) {
    let gone = DomainState {
        vm: row.uuid().to_owned(),
        state: PowerState::Halted.into(),
        domid: -1,
        ..DomainState::default()
    };
    let this = row.typed::<Vm>();
    change.expect_row(row);
    show(shared, state, change, row, Ref::NULL, &gone);
    change.set(this, vm::SCHEDULED_TO_BE_RESIDENT_ON, Ref::NULL);
}

/// Every row that is a host's own goes with it.
pub(super) fn remove(state: &State, change: &mut Transaction, row: &Row, storage: Storage) {
    let this = row.typed::<Host>();
    change.expect_row(row);
    if storage == Storage::Forgotten {
        for lost in only_here(state, this) {
            forget(state, change, lost);
        }
    }
    for pif_row in state.all::<Pif>().filter(|row| row.get(pif::HOST) == this) {
        change.delete(pif_row.get(pif::METRICS));
    }
    for class in model().classes().iter().filter(|class| class.stored && !class.internal) {
        let Some(field) = owner_field(class.id) else { continue };
        for owned in state.rows(class.id).filter(|owned| *owned.value(field) == Value::Ref(this.opaque())) {
            change.delete_row(class.id, owned.reference);
        }
    }
    for vm_row in state.all::<Vm>() {
        let control = vm_row.get(vm::IS_CONTROL_DOMAIN) && vm_row.get(vm::RESIDENT_ON) == this;
        if control {
            remove_control_domain(state, change, vm_row);
        } else if vm_row.get(vm::AFFINITY) == this {
            change.set(vm_row.typed::<Vm>(), vm::AFFINITY, Ref::NULL);
        }
    }
    change.delete(row.get(host::METRICS)).delete(this);
    if let Some(pool_row) = state.all::<Pool>().next() {
        let left = state.all::<Host>().filter(|left| left.typed::<Host>() != this);
        change.set(pool_row.typed::<Pool>(), pool::CPU_INFO, processors(left.map(|row| row.get(host::CPU_INFO))));
    }
}

/// The field by which rows of a class belong to a host.
fn owner_field(class: ClassId) -> Option<u16> {
    let def = class.def();
    let index = def.field("host")?;
    def.field_def(index).filter(|field| field.ty == Type::Ref(Host::ID)).map(|_| index)
}

fn remove_control_domain(state: &State, change: &mut Transaction, row: &Row) {
    for reference in row.get(vm::CONSOLES) {
        change.delete(reference);
    }
    for console_row in state.all::<Console>().filter(|held| held.get(console::VM) == row.typed::<Vm>()) {
        change.delete(console_row.typed::<Console>());
    }
    change.delete(row.get(vm::METRICS)).delete(row.typed::<Vm>());
}

/// SRs that no other host is connected to.
pub(super) fn only_here(state: &State, this: Ref<Host>) -> Vec<Ref<Sr>> {
    let elsewhere: HashSet<Ref<Sr>> =
        state.all::<Pbd>().filter(|row| row.get(pbd::HOST) != this).map(|row| row.get(pbd::SR)).collect();
    let here: HashSet<Ref<Sr>> =
        state.all::<Pbd>().filter(|row| row.get(pbd::HOST) == this).map(|row| row.get(pbd::SR)).collect();
    here.difference(&elsewhere).copied().collect()
}

fn forget(state: &State, change: &mut Transaction, this: Ref<Sr>) {
    let disks: HashSet<Ref<Vdi>> =
        state.all::<Vdi>().filter(|row| row.get(vdi::SR) == this).map(|row| row.typed::<Vdi>()).collect();
    for row in state.all::<Vbd>().filter(|row| disks.contains(&row.get(vbd::VDI))) {
        change.delete(row.typed::<Vbd>());
    }
    for disk in &disks {
        change.delete(*disk);
    }
    for pool_row in state.all::<Pool>() {
        for field in [pool::DEFAULT_SR, pool::SUSPEND_IMAGE_SR, pool::CRASH_DUMP_SR] {
            if pool_row.get(field) == this {
                change.set(pool_row.typed::<Pool>(), field, Ref::NULL);
            }
        }
    }
    for vm_row in state.all::<Vm>().filter(|row| row.get(vm::SUSPEND_SR) == this) {
        change.set(vm_row.typed::<Vm>(), vm::SUSPEND_SR, Ref::NULL);
    }
    change.delete(this);
}

/// The pool's processors: those of all its hosts together.
pub(crate) fn processors(hosts: impl Iterator<Item = BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let number = |info: &BTreeMap<String, String>, key: &str| {
        info.get(key).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0)
    };
    let mut all: Option<BTreeMap<String, String>> = None;
    for info in hosts {
        match &mut all {
            None => all = Some(info),
            Some(all) => {
                for key in ["cpu_count", "socket_count"] {
                    let sum = number(all, key) + number(&info, key);
                    all.insert(key.to_owned(), sum.to_string());
                }
            }
        }
    }
    all.unwrap_or_default()
}
