#![allow(clippy::unwrap_used)]

use datamodel::{ClassKind, FieldValue, OpaqueRef, Value, VmAppliance, Vmss};

use super::*;

const STATES: [Power; 4] = [Power::Halted, Power::Paused, Power::Suspended, Power::Running];

/// The documented table, as a person reads it: the states of Halted, Paused, Suspended and Running in which an operation
/// is possible for an ordinary VM; whether clients are told; what it goes together with.
const DOCUMENTED: &str = "
    start                       H--- told -
    start_on                    H--- told -
    provision                   H--- told -
    make_into_template          H--- told -
    create_vtpm                 H--- -    -
    changing_NVRAM              H--- told -
    changing_shadow_memory      H--- told -
    changing_VCPUs              H--- -    -
    changing_static_range       H--- told -
    changing_memory_limits      H--- -    -
    changing_dynamic_range      H--R told -
    pause                       ---R told -
    unpause                     -P-- told -
    suspend                     ---R told -
    resume                      --S- told -
    resume_on                   --S- told -
    csvm                        --S- -    -
    clean_shutdown              ---R told one:migrate_send
    clean_reboot                ---R told one:migrate_send
    shutdown                    -PSR -    -
    hard_shutdown               -PSR told not:hard_shutdown
    hard_reboot                 -P-R told not:hard_shutdown,hard_reboot
    checkpoint                  -PSR told snapshot,checkpoint
    snapshot                    HPSR told snapshot,checkpoint,snapshot_with_quiesce
    revert                      HPSR told -
    reverting                   HPSR -    -
    metadata_export             HPSR -    one:migrate_send
    power_state_reset           HPSR -    -
    assert_operation_valid      HPSR -    -
    update_allowed_operations   HPSR -    -
    query_services              HPSR -    -
    clone                       H--- told clone,copy,export
    copy                        H--- told clone,copy,export
    export                      H-S- -    clone,copy,export
    create_template             H-S- -    -
    destroy                     H-S- told -
    pool_migrate                ---R -    -
    migrate_send                H-SR -    -
    get_boot_record             -PSR -    get_boot_record
    changing_memory_live        ---R -    -
    awaiting_memory_live        ---R -    -
    changing_shadow_memory_live ---R -    -
    changing_VCPUs_live         ---R told -
    data_source_op              ---R -    -
    send_sysrq                  ---R -    -
    send_trigger                ---R -    -
    call_plugin                 ---R -    -
    snapshot_with_quiesce       ---R -    -
    import                      ---- -    -
";

/// What templates, snapshots and control domains can do, by the documents.
const TEMPLATES: &str = "changing_dynamic_range changing_static_range changing_memory_limits changing_shadow_memory \
                         changing_VCPUs changing_NVRAM clone copy export metadata_export provision";
const OWN_TEMPLATES: &str = "destroy migrate_send";
const SNAPSHOTS: &str = "revert clone copy export metadata_export destroy hard_shutdown";
const HOSTS: &str = "data_source_op changing_dynamic_range changing_static_range changing_memory_limits \
                     changing_memory_live awaiting_memory_live metadata_export start start_on";

struct Documented {
    operation: Op,
    states: Vec<Power>,
    told: bool,
    together: &'static str,
}

fn documented() -> Vec<Documented> {
    let lines = DOCUMENTED.lines().map(str::trim).filter(|line| !line.is_empty());
    let parsed = lines.map(|line| {
        let [operation, states, told, together] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let state = |(letter, power)| if letter == '-' { None } else { Some(power) };
        Documented {
            operation: operation.parse().unwrap(),
            states: states.chars().zip(STATES).filter_map(state).collect(),
            told: told == "told",
            together,
        }
    });
    parsed.collect()
}

impl Documented {
    fn goes_with(&self, other: Op) -> bool {
        let among = |list: &str| list.split(',').any(|word| word == other.as_str());
        match self.together.split_once(':') {
            Some(("not", list)) => !among(list),
            Some((_, list)) => among(list),
            None => among(self.together),
        }
    }
}

/// What a VM can be besides an ordinary one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    OwnTemplate,
    DefaultTemplate,
    Snapshot,
    Host,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Plain, Self::OwnTemplate, Self::DefaultTemplate, Self::Snapshot, Self::Host];

    fn fields(self) -> Vec<(u16, Value)> {
        let yes = Value::Bool(true);
        match self {
            Self::Plain => Vec::new(),
            Self::OwnTemplate => vec![(vm::IS_A_TEMPLATE.index(), yes)],
            Self::DefaultTemplate => {
                vec![(vm::IS_A_TEMPLATE.index(), yes.clone()), (vm::IS_DEFAULT_TEMPLATE.index(), yes)]
            }
            Self::Snapshot => vec![(vm::IS_A_TEMPLATE.index(), yes.clone()), (vm::IS_A_SNAPSHOT.index(), yes)],
            Self::Host => vec![(vm::IS_CONTROL_DOMAIN.index(), yes), (vm::DOMID.index(), Value::Int(0))],
        }
    }

    /// The error that refuses an operation for what the VM is, state and company permitting.
    fn refuses(self, operation: Op) -> Option<&'static str> {
        let among = |list: &str| list.split_whitespace().any(|word| word == operation.as_str());
        let refused = match self {
            Self::Plain => None,
            Self::OwnTemplate => (!among(TEMPLATES) && !among(OWN_TEMPLATES)).then_some("VM_IS_TEMPLATE"),
            Self::DefaultTemplate if operation == Op::Destroy => Some("VM_CANNOT_DELETE_DEFAULT_TEMPLATE"),
            Self::DefaultTemplate => (!among(TEMPLATES)).then_some("VM_IS_TEMPLATE"),
            Self::Snapshot => (!among(SNAPSHOTS)).then_some("VM_IS_SNAPSHOT"),
            Self::Host => None,
        };
        let template = matches!(self, Self::OwnTemplate | Self::DefaultTemplate);
        let only_for = match operation {
            Op::Provision if !template => Some("PROVISION_ONLY_ALLOWED_ON_TEMPLATE"),
            Op::Revert if self != Self::Snapshot => Some("REVERT_ONLY_ALLOWED_ON_SNAPSHOT"),
            _ => None,
        };
        let host = (self == Self::Host && !among(HOSTS)).then_some("OPERATION_NOT_ALLOWED");
        let whose = match operation {
            Op::SnapshotWithQuiesce => Some("VM_SNAPSHOT_WITH_QUIESCE_NOT_SUPPORTED"),
            Op::QueryServices if self != Self::Host => Some("NOT_SYSTEM_DOMAIN"),
            _ => None,
        };
        refused.or(only_for).or(host).or(whose)
    }

    /// The states in which it is possible for one of this kind.
    fn states(self, line: &Documented) -> Vec<Power> {
        let mut states = line.states.clone();
        let running = [Op::ChangingVCPUs, Op::ChangingStaticRange, Op::ChangingMemoryLimits];
        if self == Self::Host && running.contains(&line.operation) {
            states.push(Power::Running);
        }
        if self == Self::Snapshot && [Op::Clone, Op::Copy].contains(&line.operation) {
            states.push(Power::Suspended);
        }
        states
    }
}

fn vm(changes: &[(u16, Value)]) -> Row {
    Row::of_defaults(Vm::ID, OpaqueRef::NULL).with_values(changes)
}

fn in_state(power: Power) -> Row {
    vm(&[(vm::POWER_STATE.index(), power.into_value())])
}

fn refusal(row: &Row, operation: Op) -> ApiError {
    examine(row, &Around::default(), operation).unwrap_err()
}

fn busy(row: &Row, under_way: &[Op]) -> Row {
    let current: BTreeMap<String, Op> =
        under_way.iter().enumerate().map(|(place, operation)| (format!("OpaqueRef:{place}"), *operation)).collect();
    row.with_values(&[(vm::CURRENT_OPERATIONS.index(), current.into_value())])
}

#[test]
fn the_table_says_of_every_operation_what_the_documents_say() {
    let documented = documented();
    assert_eq!(documented.len(), Op::ALL.len());
    assert_eq!(TABLE.len(), Op::ALL.len());
    for line in &documented {
        let states: Vec<Power> =
            STATES.into_iter().filter(|power| states_of(line.operation) & bit(*power) != 0).collect();
        assert_eq!(states, line.states, "{}", line.operation);
        let told = TABLE.iter().any(|entry| entry.operation == line.operation && entry.told == Told::Clients);
        assert_eq!(told, line.told, "{}", line.operation);
    }
}

#[test]
fn every_operation_in_every_state_beside_every_other_is_answered_as_documented() {
    let mut walked = 0;
    for line in documented() {
        for kind in Kind::ALL {
            for power in STATES {
                let row = in_state(power).with_values(&kind.fields());
                for other in std::iter::once(None).chain(Op::ALL.iter().copied().map(Some)) {
                    let row = busy(&row, other.as_slice());
                    let expected = if !kind.states(&line).contains(&power) {
                        Some("VM_BAD_POWER_STATE")
                    } else if other.is_some_and(|other| !line.goes_with(other)) {
                        Some("OTHER_OPERATION_IN_PROGRESS")
                    } else {
                        kind.refuses(line.operation)
                    };
                    let answer = examine(&row, &Around::default(), line.operation).err().map(|error| error.code);
                    assert_eq!(answer, expected, "{} of {kind:?} while {power}, beside {other:?}", line.operation);
                    let allowed = allowed_in(&row, &Around::default()).contains(&line.operation);
                    let shown = expected.is_none() && line.told && kind != Kind::Host;
                    assert_eq!(allowed, shown, "{} of {kind:?} while {power}, beside {other:?}", line.operation);
                    // Whoever blocks it is heard first, whatever else is in its way.
                    let blocked = BTreeMap::from([(line.operation, "maintenance".to_owned())]);
                    let row = row.with_values(&[(vm::BLOCKED_OPERATIONS.index(), blocked.into_value())]);
                    let error = refusal(&row, line.operation);
                    assert_eq!((error.code, error.params[1].as_str()), ("OPERATION_BLOCKED", "maintenance"));
                    walked += 1;
                }
            }
        }
    }
    assert_eq!(walked, 49 * 5 * 4 * 50);
}

#[test]
fn what_goes_with_each_of_two_goes_with_both_unless_it_is_the_only_one_it_goes_with() {
    for line in documented() {
        for first in Op::ALL {
            for second in Op::ALL {
                let each = line.goes_with(*first) && line.goes_with(*second);
                // A snapshot goes with one kind of company or the other, not with both at once.
                let quiet = [first, second].iter().filter(|other| ***other == Op::SnapshotWithQuiesce).count();
                let mixed = line.operation == Op::Snapshot && quiet == 1;
                let expected = each && !line.together.starts_with("one:") && !mixed;
                assert_eq!(
                    compatible(line.operation, &[*first, *second]),
                    expected,
                    "{} beside {first} and {second}",
                    line.operation
                );
            }
        }
    }
}

#[test]
fn several_good_states_are_named_together() {
    assert_eq!(refusal(&in_state(Power::Halted), Op::HardReboot).params[1..], ["paused, running", "halted"]);
}

#[test]
fn what_is_in_the_way_is_named_with_its_tasks() {
    let row = busy(&in_state(Power::Running), &[Op::CleanShutdown]);
    assert_eq!(refusal(&row, Op::Pause).params, ["VM", "OpaqueRef:NULL", "clean_shutdown", "OpaqueRef:0"]);
    let row = busy(&in_state(Power::Running), &[Op::CleanShutdown, Op::HardReboot]);
    assert_eq!(refusal(&row, Op::Pause).params[2..], ["{clean_shutdown,hard_reboot}", "{OpaqueRef:0,OpaqueRef:1}"]);
}

#[test]
fn a_suspended_vm_is_cloned_where_the_pool_says_so() {
    let row = in_state(Power::Suspended);
    assert_eq!(refusal(&row, Op::Clone).code, errors::VM_BAD_POWER_STATE);
    let around = Around { clones_suspended: true, ..Around::default() };
    assert_eq!(examine(&row, &around, Op::Clone), Ok(()));
}

#[test]
fn memory_that_cannot_be_kept_or_moved_is_neither() {
    let row = in_state(Power::Running);
    let around = Around { immobile: true, ..Around::default() };
    for operation in [Op::Suspend, Op::Checkpoint, Op::PoolMigrate, Op::MigrateSend] {
        assert_eq!(examine(&row, &around, operation).unwrap_err().code, errors::VM_IS_IMMOBILE);
    }
    assert_eq!(examine(&row, &around, Op::Snapshot), Ok(()));
    let around = Around { nested_virt: true, ..Around::default() };
    let error = examine(&row, &around, Op::ChangingDynamicRange).unwrap_err();
    assert_eq!(error.code, errors::VM_IS_USING_NESTED_VIRT);
    let around = Around { has_pci: true, ..Around::default() };
    assert_eq!(examine(&row, &around, Op::Suspend).unwrap_err().code, errors::VM_HAS_PCI_ATTACHED);
    assert!(!allowed_in(&row, &around).contains(&Op::Suspend));
}

#[test]
fn a_guest_that_says_what_it_cannot_do_is_believed() {
    let says = |key: &str, value: &str| Around {
        guest: BTreeMap::from([(key.to_owned(), value.to_owned())]),
        ..Around::default()
    };
    let row = in_state(Power::Running);
    let error = examine(&row, &says("data-cant-suspend-reason", "a driver"), Op::Suspend).unwrap_err();
    assert_eq!((error.code, error.params[1].as_str()), (errors::VM_NON_SUSPENDABLE, "a driver"));
    let error = examine(&row, &says("feature-vcpu-hotplug", "0"), Op::ChangingVCPUsLive).unwrap_err();
    assert_eq!(error.code, errors::VM_LACKS_FEATURE);
    assert_eq!(examine(&row, &says("feature-suspend", "1"), Op::Suspend), Ok(()));
}

#[test]
fn a_disk_that_forgets_is_in_no_snapshot() {
    let around = Around { reset_disk: Some(Ref::NULL), ..Around::default() };
    for operation in [Op::Checkpoint, Op::Snapshot, Op::Suspend] {
        let error = examine(&in_state(Power::Running), &around, operation).unwrap_err();
        assert_eq!(error.code, errors::VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION);
    }
}

#[test]
fn a_vm_that_belongs_somewhere_is_made_into_no_template() {
    let appliance = Ref::<VmAppliance>::new(uuid::Uuid::from_u128(1));
    let schedule = Ref::<Vmss>::new(uuid::Uuid::from_u128(2));
    let row = vm(&[(vm::APPLIANCE.index(), appliance.into_value())]);
    assert_eq!(refusal(&row, Op::MakeIntoTemplate).code, errors::VM_IS_PART_OF_AN_APPLIANCE);
    let row = vm(&[(vm::SNAPSHOT_SCHEDULE.index(), schedule.into_value())]);
    assert_eq!(refusal(&row, Op::MakeIntoTemplate).code, errors::VM_ASSIGNED_TO_SNAPSHOT_SCHEDULE);
}
