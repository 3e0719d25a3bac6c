//! A dump and a running pool, put together: decided once, before anything is changed.
//!
//! - **The running pool stays who it is**: pool object, members, hosts, control domains and physical interfaces keep
//!   references, uuids and what they found out about themselves. Of the dump's rows that stand for the same things they
//!   take over what clients may set. The dump's references to those rows are turned into the pool's.
//! - **Hosts match by uuid**; the dump's master and the pool's match if neither has another match, so that a dump fits a
//!   pool that was founded anew. The dump's other hosts are left out, with their interfaces and storage connections;
//!   hosts that the dump does not know stay as they are, with theirs.
//! - **Interfaces match by device.** A matched host must have every physical interface that the dump says, or
//!   `RESTORE_TARGET_MISSING_DEVICE`; its management interface must be in the dump, or
//!   `RESTORE_TARGET_MGMT_IF_NOT_IN_BACKUP`.
//! - **All else becomes what the dump says.** What only running things have (domains, attachments, operations) is kept
//!   where the object is there, and nothing where it is not: a VM that the dump shows running is halted, one that was
//!   suspended is suspended. A VM that runs now and is not in the dump would be lost: `VM_BAD_POWER_STATE`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use datamodel::enums::VmPowerState;
use datamodel::fields::{host, network, pbd, pif, pool, sr, vdi, vm};
use datamodel::{
    ApiError, ClassId, ClassKind, Field, FieldValue, Host, Key, Network, OpaqueRef, Pbd, Pif, Pool, Qualifier, Ref, Sr,
    Value, Vdi, Vm, VmMetrics, errors, model,
};
use raft_store::{Row, StagedRow, State};

use super::{DumpRow, Treatment, treatment};
use crate::lifecycle;

/// What a restore does.
#[derive(Debug, PartialEq)]
pub(super) struct Plan {
    /// Rows to be staged.
    pub(super) rows: Vec<StagedRow>,
    /// The classes that they replace, and the fields in which objects keep what they have.
    pub(super) classes: Vec<(ClassId, Vec<u16>)>,
    /// Rows of these classes that stay.
    pub(super) keep: Vec<(ClassId, OpaqueRef)>,
    /// Settings that the pool's own rows take over.
    pub(super) settings: Vec<(ClassId, OpaqueRef, u16, Value)>,
}

impl DumpRow {
    fn get<C: ClassKind, T: FieldValue + Default>(&self, field: Field<C, T>) -> T {
        let default = || C::ID.def().field_def(field.index()).map(|def| &def.default);
        let found = self.fields.iter().find(|(index, _)| *index == field.index()).map(|(_, value)| value);
        found.or_else(default).and_then(T::from_value).unwrap_or_default()
    }

    fn power_state(&self) -> VmPowerState {
        let index = vm::POWER_STATE.index();
        let found = self.fields.iter().find(|(place, _)| *place == index);
        found.and_then(|(_, value)| VmPowerState::from_value(value)).unwrap_or(VmPowerState::Halted)
    }

    fn typed<C>(&self) -> Ref<C> {
        Ref::from_opaque(self.reference)
    }
}

/// Puts a dump and a pool together.
///
/// # Errors
/// The documented reasons why they do not fit.
pub(super) fn plan(dump: &[DumpRow], state: &State) -> Result<Plan, ApiError> {
    let mut plan = Planning {
        dump: Dump::new(dump),
        state,
        turned: HashMap::new(),
        left_out: HashSet::new(),
        matched: HashMap::new(),
        keep: Vec::new(),
        settings: Vec::new(),
    };
    plan.pool()?;
    plan.hosts()?;
    plan.control_domains();
    plan.interfaces()?;
    plan.storage_connections();
    plan.running_vms()?;
    Ok(plan.finish(dump))
}

struct Dump<'d> {
    by_class: HashMap<ClassId, Vec<&'d DumpRow>>,
}

impl<'d> Dump<'d> {
    fn new(rows: &'d [DumpRow]) -> Self {
        let mut by_class: HashMap<_, Vec<_>> = HashMap::new();
        for row in rows {
            by_class.entry(row.class).or_default().push(row);
        }
        Self { by_class }
    }

    fn all<C: ClassKind>(&self) -> &[&'d DumpRow] {
        self.by_class.get(&C::ID).map_or(&[], Vec::as_slice)
    }

    fn has<C: ClassKind>(&self, reference: Ref<C>) -> bool {
        self.all::<C>().iter().any(|row| row.reference == reference.opaque())
    }
}

struct Planning<'d, 's> {
    dump: Dump<'d>,
    state: &'s State,
    /// The dump's references, and what they become: null where there is nothing for them.
    turned: HashMap<OpaqueRef, OpaqueRef>,
    /// The dump's rows that are not taken.
    left_out: HashSet<(ClassId, OpaqueRef)>,
    /// Hosts of the dump, and the pool's that they stand for.
    matched: HashMap<Ref<Host>, Arc<Row>>,
    keep: Vec<(ClassId, OpaqueRef)>,
    settings: Vec<(ClassId, OpaqueRef, u16, Value)>,
}

impl Planning<'_, '_> {
    fn pool(&mut self) -> Result<(), ApiError> {
        let [old] = self.dump.all::<Pool>() else { return Err(errors::restore_incompatible_version()) };
        let now = self.state.all::<Pool>().next().ok_or_else(errors::host_still_booting)?;
        self.turned.insert(old.reference, now.reference);
        Ok(())
    }

    fn hosts(&mut self) -> Result<(), ApiError> {
        let uuid = host_field("uuid")?;
        let mut taken = HashSet::new();
        for old in self.dump.all::<Host>() {
            let name = old.fields.iter().find(|(index, _)| *index == uuid).and_then(|(_, value)| value.as_str());
            if let Some(now) = name.and_then(|name| self.state.by_uuid(Host::ID, name)) {
                taken.insert(now.reference);
                self.matched.insert(old.typed(), Arc::clone(now));
            }
        }
        let old_master = self.dump.all::<Pool>().first().map_or(Ref::NULL, |row| row.get(pool::MASTER));
        let master = self.state.all::<Pool>().next().map_or(Ref::NULL, |row| row.get(pool::MASTER));
        if self.dump.has(old_master)
            && !self.matched.contains_key(&old_master)
            && !taken.contains(&master.opaque())
            && let Some(now) = self.state.row(master)
        {
            self.matched.insert(old_master, Arc::clone(now));
        }
        for old in self.dump.all::<Host>() {
            let now = self.matched.get(&old.typed()).map_or(OpaqueRef::NULL, |row| row.reference);
            self.turned.insert(old.reference, now);
        }
        Ok(())
    }

    fn knows(&self, now: Ref<Host>) -> bool {
        self.matched.values().any(|row| row.reference == now.opaque())
    }

    /// Each host goes on with its own.
    fn control_domains(&mut self) {
        for row in self.state.all::<Vm>().filter(|row| row.get(vm::IS_CONTROL_DOMAIN)) {
            self.keep.push((Vm::ID, row.reference));
            self.keep.push((VmMetrics::ID, row.get(vm::METRICS).opaque()));
        }
        for old in self.dump.all::<Vm>().iter().filter(|row| row.get(vm::IS_CONTROL_DOMAIN)) {
            self.turned.insert(old.reference, OpaqueRef::NULL);
            self.left_out.insert((Vm::ID, old.reference));
            self.left_out.insert((VmMetrics::ID, old.get(vm::METRICS).opaque()));
        }
        for old in self.dump.all::<Host>() {
            if let Some(now) = self.matched.get(&old.typed()) {
                self.turned.insert(old.get(host::CONTROL_DOMAIN).opaque(), now.get(host::CONTROL_DOMAIN).opaque());
            }
        }
    }

    fn interfaces(&mut self) -> Result<(), ApiError> {
        let now: Vec<&Arc<Row>> = self.state.all::<Pif>().collect();
        let mut stand_in = HashMap::new();
        for old in self.dump.all::<Pif>() {
            let Some(on) = self.matched.get(&old.get(pif::HOST)) else {
                self.turned.insert(old.reference, OpaqueRef::NULL);
                self.left_out.insert((Pif::ID, old.reference));
                continue;
            };
            if !old.get(pif::PHYSICAL) {
                continue;
            }
            let device = old.get(pif::DEVICE);
            let found = now.iter().find(|row| {
                row.get(pif::PHYSICAL) && row.get(pif::HOST) == on.typed() && row.get(pif::DEVICE) == device
            });
            let found = found.ok_or_else(|| errors::restore_target_missing_device(device.as_str()))?;
            self.turned.insert(old.reference, found.reference);
            self.left_out.insert((Pif::ID, old.reference));
            stand_in.insert(found.reference, old.get(pif::NETWORK));
        }
        let in_dump: HashSet<(OpaqueRef, String)> = self
            .dump
            .all::<Pif>()
            .iter()
            .filter_map(|old| Some((self.matched.get(&old.get(pif::HOST))?.reference, old.get(pif::DEVICE))))
            .collect();
        for row in now {
            let on: Ref<Host> = row.get(pif::HOST);
            let known = self.knows(on);
            if known && row.get(pif::MANAGEMENT) && !in_dump.contains(&(on.opaque(), row.get(pif::DEVICE))) {
                return Err(errors::restore_target_mgmt_if_not_in_backup());
            }
            match stand_in.get(&row.reference) {
                Some(network) => {
                    self.keep.push((Pif::ID, row.reference));
                    self.set(row, pif::NETWORK.index(), network.into_value());
                }
                // The machine has it, whatever the dump says.
                None if !known || row.get(pif::PHYSICAL) => {
                    self.keep.push((Pif::ID, row.reference));
                    self.network_of(row);
                }
                None => {}
            }
        }
        Ok(())
    }

    /// An interface that stays needs its network, or the dump's that has the same bridge.
    fn network_of(&mut self, row: &Row) {
        let old = row.get(pif::NETWORK);
        let Some(now) = self.state.row(old).filter(|_| !self.dump.has(old)) else { return };
        let bridge = now.get(network::BRIDGE);
        let same = self.dump.all::<Network>().iter().find(|row| row.get(network::BRIDGE) == bridge);
        match same.map(|row| row.typed::<Network>()) {
            Some(same) => self.set(row, pif::NETWORK.index(), same.into_value()),
            None => self.keep.push((Network::ID, now.reference)),
        }
    }

    /// Those of hosts that are not there are not taken; hosts that the dump does not know keep theirs, and what is
    /// stored where only they reach it.
    fn storage_connections(&mut self) {
        for old in self.dump.all::<Pbd>() {
            if !self.matched.contains_key(&old.get(pbd::HOST)) {
                self.turned.insert(old.reference, OpaqueRef::NULL);
                self.left_out.insert((Pbd::ID, old.reference));
            }
        }
        for row in self.state.all::<Pbd>().filter(|row| !self.knows(row.get(pbd::HOST))).cloned().collect::<Vec<_>>() {
            let storage: Ref<Sr> = row.get(pbd::SR);
            if self.dump.has(storage) {
                self.keep.push((Pbd::ID, row.reference));
            } else if self.state.row(storage).is_some_and(|row| !row.get(sr::SHARED)) {
                self.keep.extend([(Pbd::ID, row.reference), (Sr::ID, storage.opaque())]);
                let disks = self.state.all::<Vdi>().filter(|disk| disk.get(vdi::SR) == storage);
                self.keep.extend(disks.map(|disk| (Vdi::ID, disk.reference)));
            }
        }
    }

    fn running_vms(&mut self) -> Result<(), ApiError> {
        let known: HashSet<_> = self.dump.all::<Vm>().iter().map(|row| row.reference).collect();
        for row in self.state.all::<Vm>().filter(|row| !row.get(vm::IS_CONTROL_DOMAIN)) {
            let power = row.get(vm::POWER_STATE);
            if matches!(power, VmPowerState::Running | VmPowerState::Paused) && !known.contains(&row.reference) {
                let power = power.as_str().to_ascii_lowercase();
                return Err(errors::vm_bad_power_state(row.reference, "halted", power));
            }
        }
        let state = self.state;
        for old in self.dump.by_class.get(&Vm::ID).cloned().unwrap_or_default() {
            // What may be done with a VM follows from what it is, also where its other state is kept.
            if let Some(row) = state.row(old.typed::<Vm>()).filter(|row| !row.get(vm::IS_CONTROL_DOMAIN)) {
                let mut values = old.fields.clone();
                values.retain(|(index, _)| !running_field(Vm::ID, *index));
                let allowed = allowed_operations(old, &row.with_values(&values));
                self.set(row, vm::ALLOWED_OPERATIONS.index(), allowed);
            }
        }
        Ok(())
    }

    fn set(&mut self, row: &Row, field: u16, value: Value) {
        if *row.value(field) != value {
            self.settings.push((row.class, row.reference, field, value));
        }
    }

    /// What clients may set is taken over by the rows that stay.
    fn take_over(&mut self, old: &DumpRow, now: &Row) {
        for (field, index) in now.class.def().fields.iter().zip(0..) {
            if field.qualifier != Qualifier::ReadWrite {
                continue;
            }
            let value = old.fields.iter().find(|(place, _)| *place == index).map(|(_, value)| value);
            let mut value = self.turn(value.unwrap_or(&field.default));
            if now.class == Host::ID && index == host::OTHER_CONFIG.index() {
                keep_own_keys(&mut value, now.value(index));
            }
            self.set(now, index, value);
        }
    }

    /// A value whose references are the pool's. Members of sets and maps that refer to nothing any more go.
    fn turn(&self, value: &Value) -> Value {
        let lost = |reference: &OpaqueRef| self.turned.get(reference).is_some_and(|now| now.is_null());
        match value {
            Value::Ref(reference) => Value::Ref(self.turned.get(reference).copied().unwrap_or(*reference)),
            Value::Set(members) => {
                let stay = members.iter().filter(|member| !matches!(member, Value::Ref(reference) if lost(reference)));
                Value::Set(stay.map(|member| self.turn(member)).collect())
            }
            Value::Map(entries) => {
                let stay = entries.iter().filter(|(key, value)| {
                    !matches!(key, Key::Ref(reference) if lost(reference))
                        && !matches!(value, Value::Ref(reference) if lost(reference))
                });
                let turn = |(key, value): (&Key, &Value)| {
                    let key = match key {
                        Key::Ref(reference) => Key::Ref(self.turned.get(reference).copied().unwrap_or(*reference)),
                        other => other.clone(),
                    };
                    (key, self.turn(value))
                };
                Value::Map(stay.map(turn).collect())
            }
            other => other.clone(),
        }
    }

    fn finish(mut self, dump: &[DumpRow]) -> Plan {
        for old in dump.iter().filter(|row| treatment(row.class.def()) == Treatment::Merged) {
            let now = self.turned.get(&old.reference).and_then(|now| self.state.row_of(old.class, *now)).cloned();
            if let Some(now) = now {
                self.take_over(old, &now);
            }
        }
        let classes: Vec<_> = model()
            .classes()
            .iter()
            .filter(|class| class.id == Pif::ID || treatment(class) == Treatment::Replaced)
            .map(|class| {
                (
                    class.id,
                    (0..)
                        .zip(&class.fields)
                        .map(|(index, _)| index)
                        .filter(|index| running_field(class.id, *index))
                        .collect(),
                )
            })
            .collect();
        let replaced: HashSet<ClassId> = classes.iter().map(|(class, _)| *class).collect();
        let taken = dump
            .iter()
            .filter(|row| replaced.contains(&row.class) && !self.left_out.contains(&(row.class, row.reference)));
        let rows = taken.map(|row| self.staged(row)).collect();
        Plan { rows, classes, keep: self.keep, settings: self.settings }
    }

    fn staged(&self, row: &DumpRow) -> StagedRow {
        let mut fields: Vec<_> = row
            .fields
            .iter()
            .filter(|(index, value)| taken_when_new(row.class, *index, value))
            .map(|(index, value)| (*index, self.turn(value)))
            .collect();
        if row.class == Vm::ID {
            let new = Row::of_defaults(Vm::ID, row.reference).with_values(&fields);
            fields.push((vm::ALLOWED_OPERATIONS.index(), allowed_operations(row, &new)));
        }
        StagedRow { class: row.class, reference: row.reference, fields }
    }
}

/// What may be done with a VM: what the dump says, if the VM comes out in the state in which it was dumped.
fn allowed_operations(old: &DumpRow, now: &Row) -> Value {
    let rests = now.get(vm::CURRENT_OPERATIONS).is_empty();
    let index = vm::ALLOWED_OPERATIONS.index();
    let dumped = old.fields.iter().find(|(place, _)| *place == index).map(|(_, value)| value.clone());
    match dumped {
        Some(dumped) if rests && old.power_state() == now.get(vm::POWER_STATE) => dumped,
        _ => lifecycle::allowed_in(now, &lifecycle::Around::default()).into_value(),
    }
}

/// Whether a field says what something does now rather than what it is: an object that is there keeps what it has.
fn running_field(class: ClassId, index: u16) -> bool {
    let name = class.def().field_def(index).map_or("", |field| field.name);
    matches!(
        (class.def().name, name),
        (_, "allowed_operations" | "current_operations" | "currently_attached")
            | ("VM", "power_state" | "resident_on" | "scheduled_to_be_resident_on" | "domid" | "guest_metrics")
            | ("VM_metrics" | "VBD_metrics" | "VIF_metrics", _)
    )
}

/// Whether an object that is made anew takes a field from the dump: nothing of what only a running thing has, but a
/// suspended VM is so at rest.
fn taken_when_new(class: ClassId, index: u16, value: &Value) -> bool {
    if !running_field(class, index) {
        return true;
    }
    match (class.def().name, class.def().field_def(index).map_or("", |field| field.name)) {
        ("VM", "power_state") => value.as_str() == Some(VmPowerState::Suspended.as_str()),
        ("VM", _) | (_, "current_operations" | "currently_attached") => false,
        _ => true,
    }
}

/// When a host and its agent started is theirs to say.
fn keep_own_keys(value: &mut Value, own: &Value) {
    let (Value::Map(entries), Value::Map(own)) = (value, own) else { return };
    for name in ["boot_time", "agent_start_time"] {
        let key = Key::from(name);
        entries.edit(|entries| match own.get(&key) {
            Some(value) => entries.insert(key, value.clone()),
            None => entries.remove(&key),
        });
    }
}

fn host_field(name: &str) -> Result<u16, ApiError> {
    Host::ID.def().field(name).ok_or_else(|| errors::internal_error("hosts have no uuid"))
}
