//! What may be done to a VM, and when: operation by power state, as data, and the checks around it.

use std::collections::BTreeMap;

use datamodel::enums::{VmOperations as Op, VmPowerState as Power};
use datamodel::fields::vm;
use datamodel::{ApiError, Ref, Vm, errors};
use raft_store::Row;

const HALTED: u8 = 1;
const PAUSED: u8 = 2;
const SUSPENDED: u8 = 4;
const RUNNING: u8 = 8;
const LIVE: u8 = PAUSED | RUNNING;
const ANY: u8 = HALTED | PAUSED | SUSPENDED | RUNNING;

/// For each operation: the power states in which it is possible, and whether clients are told of it.
const TABLE: &[(Op, u8, bool)] = &[
    (Op::Start, HALTED, true),
    (Op::StartOn, HALTED, true),
    (Op::Provision, HALTED, true),
    (Op::MakeIntoTemplate, HALTED, true),
    (Op::ChangingNvram, HALTED, true),
    (Op::ChangingShadowMemory, HALTED, true),
    (Op::ChangingStaticRange, HALTED, true),
    (Op::ChangingMemoryLimits, HALTED, false),
    (Op::ChangingVCPUs, HALTED, false),
    (Op::ChangingDynamicRange, HALTED | RUNNING, true),
    (Op::Pause, RUNNING, true),
    (Op::Unpause, PAUSED, true),
    (Op::Suspend, RUNNING, true),
    (Op::Resume, SUSPENDED, true),
    (Op::ResumeOn, SUSPENDED, true),
    (Op::CleanShutdown, RUNNING, true),
    (Op::CleanReboot, RUNNING, true),
    (Op::HardShutdown, LIVE | SUSPENDED, true),
    (Op::Shutdown, LIVE | SUSPENDED, false),
    (Op::HardReboot, LIVE, true),
    (Op::Checkpoint, LIVE | SUSPENDED, true),
    (Op::Snapshot, ANY, true),
    (Op::Revert, ANY, true),
    (Op::MetadataExport, ANY, true),
    (Op::PowerStateReset, ANY, false),
    (Op::Clone, HALTED, true),
    (Op::Copy, HALTED, true),
    (Op::Export, HALTED | SUSPENDED, true),
    (Op::CreateTemplate, HALTED | SUSPENDED, false),
    (Op::Destroy, HALTED | SUSPENDED, true),
    (Op::PoolMigrate, RUNNING, true),
    (Op::MigrateSend, HALTED | SUSPENDED | RUNNING, true),
    (Op::GetBootRecord, LIVE | SUSPENDED, false),
    (Op::ChangingVCPUsLive, RUNNING, true),
    (Op::DataSourceOp, RUNNING, false),
    (Op::SendSysrq, RUNNING, false),
    (Op::SendTrigger, RUNNING, false),
];

/// Operations that have a function today: only these are advertised, so that a client never sees a button that cannot work.
const SERVED: &[Op] = &[
    Op::Start,
    Op::StartOn,
    Op::Provision,
    Op::MakeIntoTemplate,
    Op::ChangingStaticRange,
    Op::ChangingDynamicRange,
    Op::Pause,
    Op::Unpause,
    Op::CleanShutdown,
    Op::CleanReboot,
    Op::HardShutdown,
    Op::HardReboot,
    Op::Snapshot,
    Op::Clone,
    Op::Copy,
    Op::Destroy,
];

/// What a template can still do.
const FOR_TEMPLATES: &[Op] = &[
    Op::ChangingDynamicRange,
    Op::ChangingStaticRange,
    Op::ChangingMemoryLimits,
    Op::ChangingShadowMemory,
    Op::ChangingVCPUs,
    Op::ChangingNvram,
    Op::Clone,
    Op::Copy,
    Op::Export,
    Op::MetadataExport,
    Op::Provision,
];

/// What a template that does not come with the product can do besides.
const FOR_OWN_TEMPLATES: &[Op] = &[Op::Destroy, Op::MigrateSend];

/// What a snapshot can do.
const FOR_SNAPSHOTS: &[Op] =
    &[Op::Revert, Op::Clone, Op::Copy, Op::Export, Op::MetadataExport, Op::Destroy, Op::HardShutdown];

fn bit(power: Power) -> u8 {
    match power {
        Power::Halted => HALTED,
        Power::Paused => PAUSED,
        Power::Suspended => SUSPENDED,
        Power::Running => RUNNING,
    }
}

fn allowed_in(operation: Op) -> u8 {
    TABLE.iter().find(|(op, _, _)| *op == operation).map_or(0, |(_, states, _)| *states)
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
pub(crate) fn check(row: &Row, operation: Op) -> Result<(), ApiError> {
    let reference = row.typed::<Vm>();
    let blocked = row.get(vm::BLOCKED_OPERATIONS);
    if let Some(reason) = blocked.get(&operation) {
        return Err(errors::operation_blocked(reference, reason.as_str()));
    }
    let power = row.get(vm::POWER_STATE);
    let states = allowed_in(operation);
    if states & bit(power) == 0 {
        return Err(bad_power_state(reference, states, power));
    }
    check_concurrency(row, operation)?;
    let template = row.get(vm::IS_A_TEMPLATE);
    if row.get(vm::IS_A_SNAPSHOT) {
        if !FOR_SNAPSHOTS.contains(&operation) {
            return Err(ApiError::new("VM_IS_SNAPSHOT", vec![reference.into(), operation.into()]));
        }
    } else if template {
        let own = !row.get(vm::IS_DEFAULT_TEMPLATE);
        let possible = FOR_TEMPLATES.contains(&operation) || (own && FOR_OWN_TEMPLATES.contains(&operation));
        if !possible {
            if operation == Op::Destroy {
                return Err(errors::vm_cannot_delete_default_template(reference));
            }
            return Err(ApiError::new(errors::VM_IS_TEMPLATE, vec![reference.into(), operation.into()]));
        }
    }
    if operation == Op::Provision && !template {
        return Err(errors::provision_only_allowed_on_template());
    }
    if operation == Op::Revert && !row.get(vm::IS_A_SNAPSHOT) {
        return Err(ApiError::new("REVERT_ONLY_ALLOWED_ON_SNAPSHOT", Vec::new()));
    }
    if row.get(vm::IS_CONTROL_DOMAIN) && operation != Op::MetadataExport {
        return Err(errors::operation_not_allowed("Operations on domain 0 are not allowed"));
    }
    Ok(())
}

/// Operations that go together with what is under way already.
fn compatible(operation: Op, under_way: Op) -> bool {
    let copying = [Op::Clone, Op::Copy, Op::Export];
    match operation {
        Op::HardShutdown => under_way != Op::HardShutdown,
        Op::HardReboot => !matches!(under_way, Op::HardShutdown | Op::HardReboot),
        Op::Snapshot | Op::Checkpoint => matches!(under_way, Op::Snapshot | Op::Checkpoint),
        Op::GetBootRecord => under_way == Op::GetBootRecord,
        _ => copying.contains(&operation) && copying.contains(&under_way),
    }
}

fn check_concurrency(row: &Row, operation: Op) -> Result<(), ApiError> {
    let current: BTreeMap<String, Op> = row.get(vm::CURRENT_OPERATIONS);
    let in_the_way: Vec<(&String, &Op)> =
        current.iter().filter(|(_, under_way)| !compatible(operation, **under_way)).collect();
    match in_the_way.as_slice() {
        [] => Ok(()),
        [(task, under_way)] => {
            Err(errors::other_operation_in_progress("VM", row.typed::<Vm>(), under_way.as_str(), task.as_str()))
        }
        several => {
            let operations: Vec<&str> = several.iter().map(|(_, under_way)| under_way.as_str()).collect();
            let tasks: Vec<&str> = several.iter().map(|(task, _)| task.as_str()).collect();
            let operations = format!("{{{}}}", operations.join(","));
            Err(errors::other_operation_in_progress(
                "VM",
                row.typed::<Vm>(),
                operations,
                format!("{{{}}}", tasks.join(",")),
            ))
        }
    }
}

/// Every operation that would be allowed now, as clients are told.
pub(crate) fn allowed_operations(row: &Row) -> Vec<Op> {
    if row.get(vm::IS_CONTROL_DOMAIN) {
        return Vec::new();
    }
    let advertised = TABLE.iter().filter(|(operation, _, advertised)| *advertised && SERVED.contains(operation));
    advertised.map(|(operation, _, _)| *operation).filter(|operation| check(row, *operation).is_ok()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use datamodel::{ClassKind, FieldValue, OpaqueRef, Value};

    use super::*;

    const STATES: [Power; 4] = [Power::Halted, Power::Paused, Power::Suspended, Power::Running];

    fn vm(changes: &[(u16, Value)]) -> Row {
        Row::of_defaults(Vm::ID, OpaqueRef::NULL).with_values(changes)
    }

    fn in_state(power: Power) -> Row {
        vm(&[(vm::POWER_STATE.index(), power.into_value())])
    }

    #[test]
    fn every_operation_is_possible_in_exactly_the_power_states_of_the_table() {
        for operation in Op::ALL {
            for power in STATES {
                let row = in_state(power);
                let expected = allowed_in(*operation) & bit(power) != 0;
                match check(&row, *operation) {
                    Ok(()) => assert!(expected, "{operation} while {power}"),
                    Err(error) if error.code == errors::VM_BAD_POWER_STATE => {
                        assert!(!expected, "{operation} while {power}: {error}");
                        assert_eq!(error.params[2], power.as_str().to_ascii_lowercase());
                    }
                    // What only a template or a snapshot can do is refused for that reason where the state would do.
                    Err(error) => {
                        assert!(
                            expected && matches!(operation, Op::Provision | Op::Revert),
                            "{operation} while {power}: {error}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_documented_rows_of_the_table_are_kept() {
        let possible =
            |operation| STATES.into_iter().filter(|power| allowed_in(operation) & bit(*power) != 0).collect::<Vec<_>>();
        assert_eq!(possible(Op::Start), [Power::Halted]);
        assert_eq!(possible(Op::Pause), [Power::Running]);
        assert_eq!(possible(Op::Unpause), [Power::Paused]);
        assert_eq!(possible(Op::HardShutdown), [Power::Paused, Power::Suspended, Power::Running]);
        assert_eq!(possible(Op::HardReboot), [Power::Paused, Power::Running]);
        assert_eq!(possible(Op::CleanShutdown), [Power::Running]);
        assert_eq!(possible(Op::Clone), [Power::Halted]);
    }

    #[test]
    fn several_good_states_are_named_together() {
        let error = check(&in_state(Power::Halted), Op::HardReboot).unwrap_err();
        assert_eq!(error.params[1..], ["paused, running", "halted"]);
    }

    #[test]
    fn what_is_under_way_keeps_others_out_but_a_hard_shutdown_passes() {
        let current = BTreeMap::from([("OpaqueRef:task".to_owned(), Op::CleanShutdown)]);
        let row = in_state(Power::Running).with_values(&[(vm::CURRENT_OPERATIONS.index(), current.into_value())]);
        let error = check(&row, Op::Pause).unwrap_err();
        assert_eq!(error.code, errors::OTHER_OPERATION_IN_PROGRESS);
        assert_eq!(error.params, ["VM", "OpaqueRef:NULL", "clean_shutdown", "OpaqueRef:task"]);
        assert_eq!(check(&row, Op::HardShutdown), Ok(()));
    }

    #[test]
    fn a_blocked_operation_says_why_before_anything_else() {
        let blocked = BTreeMap::from([(Op::Start, "maintenance".to_owned())]);
        let row = in_state(Power::Running).with_values(&[(vm::BLOCKED_OPERATIONS.index(), blocked.into_value())]);
        let error = check(&row, Op::Start).unwrap_err();
        assert_eq!((error.code, error.params[1].as_str()), (errors::OPERATION_BLOCKED, "maintenance"));
    }

    #[test]
    fn templates_are_cloned_and_provisioned_and_never_started() {
        let template = vm(&[(vm::IS_A_TEMPLATE.index(), Value::Bool(true))]);
        assert_eq!(check(&template, Op::Start).unwrap_err().code, errors::VM_IS_TEMPLATE);
        for operation in [Op::Clone, Op::Copy, Op::Provision, Op::Destroy] {
            assert_eq!(check(&template, operation), Ok(()), "{operation}");
        }
        let default = template.with_values(&[(vm::IS_DEFAULT_TEMPLATE.index(), Value::Bool(true))]);
        assert_eq!(check(&default, Op::Destroy).unwrap_err().code, errors::VM_CANNOT_DELETE_DEFAULT_TEMPLATE);
        assert_eq!(
            check(&in_state(Power::Halted), Op::Provision).unwrap_err().code,
            errors::PROVISION_ONLY_ALLOWED_ON_TEMPLATE
        );
    }

    #[test]
    fn nothing_is_done_to_a_control_domain() {
        let row = in_state(Power::Running).with_values(&[(vm::IS_CONTROL_DOMAIN.index(), Value::Bool(true))]);
        assert_eq!(check(&row, Op::HardShutdown).unwrap_err().code, errors::OPERATION_NOT_ALLOWED);
        assert!(allowed_operations(&row).is_empty());
    }

    #[test]
    fn only_operations_that_have_a_function_are_advertised() {
        for power in STATES {
            for operation in allowed_operations(&in_state(power)) {
                assert!(SERVED.contains(&operation), "{operation}");
            }
        }
        assert!(allowed_operations(&in_state(Power::Halted)).contains(&Op::Start));
        assert!(!allowed_operations(&in_state(Power::Running)).contains(&Op::Suspend));
    }
}
