//! What may be done to a VM, and when: operation by power state, as data, and the checks around it.

mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use datamodel::enums::{OnBoot, VmOperations as Op, VmPowerState as Power};
use datamodel::fields::{pool, vbd, vdi, vm, vm_guest_metrics, vm_metrics};
use datamodel::{ApiError, Pool, Ref, Vbd, Vdi, Vm, errors};
use raft_store::{Row, State};

use table::{
    FOR_CONTROL_DOMAINS, FOR_OWN_TEMPLATES, FOR_SNAPSHOTS, FOR_TEMPLATES, MOVES_MEMORY, NOT_FOR_HOSTS,
    OF_CONTROL_DOMAINS_THAT_RUN, OF_SUSPENDED_ONES, RUNNING, SUSPENDED, TABLE, Told, bit, compatible, states_of,
};

/// What decides besides the VM's own row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Around {
    /// What the pool says of it.
    pub(crate) clones_suspended: bool,
    /// It was started as one that stays where it is, or is to be.
    pub(crate) immobile: bool,
    /// Its guest is to have guests.
    pub(crate) nested_virt: bool,
    /// What the guest said of itself, `VM_guest_metrics.other`.
    pub(crate) guest: BTreeMap<String, String>,
    /// A disk that forgets what is written to it.
    pub(crate) reset_disk: Option<Ref<Vdi>>,
    /// It has a device of the host.
    pub(crate) has_pci: bool,
}

/// Whether a VM's domain is made with a device: a machine that begins anew takes all that it has, and one that goes on,
/// from its memory or through a reboot, those that are attached. What a guest knows nothing of does not come by a resume.
pub(crate) fn is_made_with(vm_row: &Row, attached: bool) -> bool {
    attached || vm_row.get(vm::POWER_STATE) == Power::Halted
}

impl Around {
    pub(crate) fn of(state: &State, row: &Row) -> Self {
        let metrics = state.row(row.get(vm::METRICS));
        let platform: BTreeMap<String, String> = row.get(vm::PLATFORM);
        let wanted = |key: &str| platform.get(key).is_some_and(|value| value == "true" || value == "1");
        let live = matches!(row.get(vm::POWER_STATE), Power::Running | Power::Paused);
        // A domain is as it was started; what the row says is for the next start.
        let (nomigrate, nested_virt) = match metrics.filter(|_| live) {
            Some(metrics) => (metrics.get(vm_metrics::NOMIGRATE), metrics.get(vm_metrics::NESTED_VIRT)),
            None => (wanted("nomigrate"), wanted("nested-virt")),
        };
        let disks = row.get(vm::VBDS).into_iter().filter_map(|reference: Ref<Vbd>| state.row(reference));
        let reset_disk = disks
            .map(|disk| disk.get(vbd::VDI))
            .find(|disk| state.row(*disk).is_some_and(|row| row.get(vdi::ON_BOOT) == OnBoot::Reset));
        let guest = state.row(row.get(vm::GUEST_METRICS)).map(|row| row.get(vm_guest_metrics::OTHER));
        Self {
            clones_suspended: clones_suspended(state),
            immobile: nomigrate || nested_virt,
            nested_virt,
            guest: guest.unwrap_or_default(),
            reset_disk,
            has_pci: !row.get(vm::ATTACHED_PCIS).is_empty(),
        }
    }

    fn guest_lacks(&self, feature: &str) -> bool {
        self.guest.get(feature).is_some_and(|value| value == "0")
    }
}

/// `pool.other_config:allow_clone_suspended_vm`.
pub(crate) fn clones_suspended(state: &State) -> bool {
    let mut pools = state.all::<Pool>();
    pools.any(|row| row.get(pool::OTHER_CONFIG).get("allow_clone_suspended_vm").is_some_and(|value| value == "true"))
}

/// `VM_BAD_POWER_STATE` with the states that would do.
fn bad_power_state(vm: Ref<Vm>, states: u8, actual: Power) -> ApiError {
    let order = [Power::Halted, Power::Paused, Power::Suspended, Power::Running];
    let expected: Vec<String> = order
        .into_iter()
        .filter(|power| states & bit(*power) != 0)
        .map(|power| power.as_str().to_ascii_lowercase())
        .collect();
    errors::vm_bad_power_state(vm, expected.join(", "), actual.as_str().to_ascii_lowercase())
}

/// Whether an operation may begin on a VM as it is; the first obstacle in the documented order.
pub(crate) fn check(state: &State, row: &Row, operation: Op) -> Result<(), ApiError> {
    examine(row, &Around::of(state, row), operation)
}

/// The same, of a VM in surroundings that may not be there yet.
pub(crate) fn examine(row: &Row, around: &Around, operation: Op) -> Result<(), ApiError> {
    let reference = row.typed::<Vm>();
    if let Some(reason) = row.get(vm::BLOCKED_OPERATIONS).get(&operation) {
        return Err(errors::operation_blocked(reference, reason.as_str()));
    }
    check_power(row, around, operation)?;
    check_concurrency(row, operation)?;
    check_kind(row, operation)?;
    if around.immobile && MOVES_MEMORY.contains(&operation) {
        return Err(errors::vm_is_immobile(reference));
    }
    if around.nested_virt && operation == Op::ChangingDynamicRange {
        return Err(errors::vm_is_using_nested_virt(reference));
    }
    if row.get(vm::IS_CONTROL_DOMAIN) {
        let of_a_host = row.get(vm::DOMID) == 0;
        let possible = FOR_CONTROL_DOMAINS.contains(&operation) && !(of_a_host && NOT_FOR_HOSTS.contains(&operation));
        if !possible {
            return Err(errors::operation_not_allowed("Operations on domain 0 are not allowed"));
        }
    }
    if matches!(row.get(vm::POWER_STATE), Power::Running | Power::Paused) {
        check_guest(reference, around, operation)?;
    }
    check_devices(row, around, operation)?;
    check_ties(row, operation)
}

fn check_power(row: &Row, around: &Around, operation: Op) -> Result<(), ApiError> {
    let power = row.get(vm::POWER_STATE);
    let mut states = states_of(operation);
    if row.get(vm::IS_CONTROL_DOMAIN) && OF_CONTROL_DOMAINS_THAT_RUN.contains(&operation) {
        states |= RUNNING;
    }
    if OF_SUSPENDED_ONES.contains(&operation) && (row.get(vm::IS_A_SNAPSHOT) || around.clones_suspended) {
        states |= SUSPENDED;
    }
    if states & bit(power) == 0 {
        return Err(bad_power_state(row.typed(), states, power));
    }
    Ok(())
}

fn check_concurrency(row: &Row, operation: Op) -> Result<(), ApiError> {
    let current: BTreeMap<String, Op> = row.get(vm::CURRENT_OPERATIONS);
    let under_way: Vec<Op> = current.values().copied().collect();
    if compatible(operation, &under_way) {
        return Ok(());
    }
    let tasks: Vec<&str> = current.keys().map(String::as_str).collect();
    let words: Vec<&str> = under_way.iter().map(|operation| operation.as_str()).collect();
    let several = |texts: &[&str]| match texts {
        [one] => (*one).to_owned(),
        all => format!("{{{}}}", all.join(",")),
    };
    Err(errors::other_operation_in_progress("VM", row.typed::<Vm>(), several(&words), several(&tasks)))
}

/// What templates and snapshots cannot do, and what only they can.
fn check_kind(row: &Row, operation: Op) -> Result<(), ApiError> {
    let reference = row.typed::<Vm>();
    let (template, snapshot) = (row.get(vm::IS_A_TEMPLATE), row.get(vm::IS_A_SNAPSHOT));
    if template && !snapshot && !FOR_TEMPLATES.contains(&operation) {
        let own = !row.get(vm::IS_DEFAULT_TEMPLATE);
        if !(own && FOR_OWN_TEMPLATES.contains(&operation)) {
            if operation == Op::Destroy {
                return Err(errors::vm_cannot_delete_default_template(reference));
            }
            return Err(ApiError::new(errors::VM_IS_TEMPLATE, vec![reference.into(), operation.into()]));
        }
    }
    if snapshot && !FOR_SNAPSHOTS.contains(&operation) {
        return Err(ApiError::new("VM_IS_SNAPSHOT", vec![reference.into(), operation.into()]));
    }
    if operation == Op::Provision && !template {
        return Err(errors::provision_only_allowed_on_template());
    }
    if operation == Op::Revert && !snapshot {
        return Err(ApiError::new("REVERT_ONLY_ALLOWED_ON_SNAPSHOT", Vec::new()));
    }
    Ok(())
}

/// What a guest that lives cannot do by its own word. One that says nothing is not asked: the machine has a power button,
/// and its memory is kept from outside.
fn check_guest(reference: Ref<Vm>, around: &Around, operation: Op) -> Result<(), ApiError> {
    if MOVES_MEMORY.contains(&operation)
        && let Some(reason) = around.guest.get("data-cant-suspend-reason")
    {
        return Err(errors::vm_non_suspendable(reference, reason.as_str()));
    }
    let lacks = match operation {
        Op::CleanShutdown => around.guest_lacks("feature-shutdown") && around.guest_lacks("feature-poweroff"),
        Op::CleanReboot => around.guest_lacks("feature-shutdown") && around.guest_lacks("feature-reboot"),
        Op::ChangingVCPUsLive => around.guest_lacks("feature-vcpu-hotplug"),
        _ => MOVES_MEMORY.contains(&operation) && around.guest_lacks("feature-suspend"),
    };
    if lacks { Err(errors::vm_lacks_feature(reference)) } else { Ok(()) }
}

fn check_devices(row: &Row, around: &Around, operation: Op) -> Result<(), ApiError> {
    let reference = row.typed::<Vm>();
    if let Some(disk) = around.reset_disk
        && matches!(operation, Op::Checkpoint | Op::Snapshot | Op::Suspend)
    {
        tracing::debug!(vm = %reference, %disk, "a disk is reset when its VM starts");
        return Err(errors::vdi_on_boot_mode_incompatible_with_operation());
    }
    let moves = MOVES_MEMORY.contains(&operation);
    if moves && around.has_pci {
        return Err(errors::vm_has_pci_attached(reference));
    }
    if moves && !row.get(vm::VGPUS).is_empty() {
        return Err(errors::vm_has_vgpu(reference));
    }
    if (moves || operation == Op::Snapshot) && !row.get(vm::VUSBS).is_empty() {
        return Err(errors::vm_has_vusbs(reference));
    }
    Ok(())
}

/// What a VM is a part of.
fn check_ties(row: &Row, operation: Op) -> Result<(), ApiError> {
    let reference = row.typed::<Vm>();
    match operation {
        Op::MakeIntoTemplate => {
            let (appliance, schedule) = (row.get(vm::APPLIANCE), row.get(vm::SNAPSHOT_SCHEDULE));
            if !appliance.is_null() {
                return Err(errors::vm_is_part_of_an_appliance(reference, appliance));
            }
            if !schedule.is_null() {
                return Err(errors::vm_assigned_to_snapshot_schedule(reference, schedule));
            }
            Ok(())
        }
        Op::QueryServices if !row.get(vm::IS_CONTROL_DOMAIN) => Err(errors::not_system_domain(reference)),
        Op::CreateVtpm if !row.get(vm::VTPMS).is_empty() => Err(errors::vtpm_max_amount_reached("1")),
        Op::SnapshotWithQuiesce => {
            Err(errors::vm_snapshot_with_quiesce_not_supported(reference, "the guest has no part in a snapshot"))
        }
        _ => Ok(()),
    }
}

/// Every operation that would be allowed now, as clients are told.
pub(crate) fn allowed_operations(state: &State, row: &Row) -> Vec<Op> {
    allowed_in(row, &Around::of(state, row))
}

/// The same, of a VM in surroundings that may not be there yet.
pub(crate) fn allowed_in(row: &Row, around: &Around) -> Vec<Op> {
    if row.get(vm::IS_CONTROL_DOMAIN) {
        return Vec::new();
    }
    let told = TABLE.iter().filter(|line| line.told == Told::Clients).map(|line| line.operation);
    told.filter(|operation| examine(row, around, *operation).is_ok()).collect()
}
