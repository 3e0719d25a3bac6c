//! What may be done to a VM, as clients meet it: setters with their checks, halted and live.

use datamodel::enums::{DomainType, VmOperations as Op, VmPowerState};
use datamodel::fields::{vm, vm_metrics};
use datamodel::{ClassKind, Input, Ref, Value, Vm};
use proto::agent::refusal::Reason;
use proto::agent::step::Action;

use super::{Pool, text};

const MIB: i64 = 1 << 20;

fn on(this: Ref<Vm>, more: Vec<Input>) -> Vec<Input> {
    let mut all = vec![text(this.to_string())];
    all.extend(more);
    all
}

fn numbers(this: Ref<Vm>, numbers: &[i64]) -> Vec<Input> {
    on(this, numbers.iter().map(|number| Input::Int(*number)).collect())
}

fn pairs(entries: &[(&str, &str)]) -> Input {
    Input::Struct(entries.iter().map(|(key, value)| ((*key).to_owned(), text(*value))).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_operation_is_no_longer_offered_and_one_that_is_free_again_is() {
    let pool = Pool::start().await;
    let this = pool.vm("guarded").await;
    assert!(pool.get(this).await.get(vm::ALLOWED_OPERATIONS).contains(&Op::Start));
    pool.ask("VM.add_to_blocked_operations", on(this, vec![text("start"), text("maintenance")])).await.unwrap();
    assert!(!pool.get(this).await.get(vm::ALLOWED_OPERATIONS).contains(&Op::Start));
    let refused = pool.refusal("VM.start", on(this, vec![Input::Bool(false), Input::Bool(false)])).await;
    assert_eq!(refused, ["OPERATION_BLOCKED", &this.to_string(), "maintenance"]);
    pool.ask("VM.remove_from_blocked_operations", on(this, vec![text("start")])).await.unwrap();
    assert!(pool.get(this).await.get(vm::ALLOWED_OPERATIONS).contains(&Op::Start));
    pool.ask("VM.set_blocked_operations", on(this, vec![pairs(&[("destroy", "precious")])])).await.unwrap();
    assert!(!pool.get(this).await.get(vm::ALLOWED_OPERATIONS).contains(&Op::Destroy));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_clients_that_collide_one_is_told_who_was_first() {
    let pool = Pool::start().await;
    let this = pool.vm("wanted").await;
    pool.agent.hold();
    let start = || on(this, vec![Input::Bool(false), Input::Bool(false)]);
    let collide = async {
        pool.agent.asked(1).await;
        let refused = pool.refusal("VM.start", start()).await;
        let destroyed = pool.refusal("VM.destroy", on(this, Vec::new())).await;
        let allowed = pool.get(this).await.get(vm::ALLOWED_OPERATIONS);
        pool.agent.release();
        (refused, destroyed, allowed)
    };
    let (first, (refused, destroyed, allowed)) = tokio::join!(pool.ask("VM.start", start()), collide);
    first.unwrap();
    for refused in [refused, destroyed] {
        assert_eq!(refused[..4], ["OTHER_OPERATION_IN_PROGRESS", "VM", &this.to_string(), "start"]);
        assert!(refused[4].starts_with("OpaqueRef:"), "{}", refused[4]);
    }
    assert!(allowed.is_empty(), "{allowed:?}");
    let allowed = pool.get(this).await.get(vm::ALLOWED_OPERATIONS);
    assert!(allowed.contains(&Op::CleanShutdown) && !allowed.contains(&Op::Start), "{allowed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_set_within_its_order_and_costs_what_it_costs() {
    let pool = Pool::start().await;
    let this = pool.vm("sized").await;
    let set = |name: &str, sizes: &[i64]| {
        let sizes: Vec<i64> = sizes.iter().map(|size| size * MIB).collect();
        (format!("VM.{name}"), numbers(this, &sizes))
    };
    let (name, arguments) = set("set_memory_limits", &[64, 512, 128, 256]);
    pool.ask(&name, arguments).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!(row.get(vm::MEMORY_TARGET), 128 * MIB);
    // One page for what the host keeps, and the shadow of 512 MiB and one processor: 1280 pages of 4 KiB.
    assert_eq!(row.get(vm::MEMORY_OVERHEAD), 6 * MIB);
    for (name, sizes) in [
        ("set_memory_limits", &[128, 64, 64, 64][..]),
        ("set_memory_static_max", &[200]),
        ("set_memory_static_min", &[200]),
        ("set_memory_dynamic_range", &[300, 200]),
        ("set_memory_dynamic_min", &[300]),
        ("set_memory_dynamic_max", &[600]),
    ] {
        let (name, arguments) = set(name, sizes);
        assert_eq!(pool.refusal(&name, arguments).await, ["MEMORY_CONSTRAINT_VIOLATION_ORDER"], "{name}");
    }
    let (name, arguments) = set("set_memory", &[256]);
    pool.ask(&name, arguments).await.unwrap();
    let total = Input::Int(300 * MIB);
    let most = pool.ask("VM.maximise_memory", on(this, vec![total, Input::Bool(false)])).await.unwrap();
    let Value::Int(most) = most else { panic!("{most:?}") };
    assert!(most > 290 * MIB && most < 300 * MIB, "{most}");
    assert_eq!(pool.ask("VM.compute_memory_overhead", on(this, Vec::new())).await, Ok(Value::Int(4 * MIB)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_runs_is_given_memory_as_far_as_its_host_has_it() {
    let pool = Pool::start().await;
    let this = pool.vm("ballooning").await;
    let limits: Vec<i64> = [64, 1024, 128, 256].iter().map(|size| size * MIB).collect();
    pool.ask("VM.set_memory_limits", numbers(this, &limits)).await.unwrap();
    pool.ask("VM.start", on(this, vec![Input::Bool(false), Input::Bool(false)])).await.unwrap();
    assert_eq!(pool.get(this).await.get(vm::MEMORY_TARGET), 256 * MIB, "there is room for all it may have");
    pool.ask("VM.set_memory_dynamic_range", numbers(this, &[512 * MIB, 768 * MIB])).await.unwrap();
    let told = pool.agent.steps().into_iter().rev().find_map(|step| match step.action {
        Some(Action::MemoryTarget(target)) => Some(target.bytes),
        _ => None,
    });
    assert_eq!(told, Some(768 << 20));
    let row = pool.get(this).await;
    let bounds = [vm::MEMORY_DYNAMIC_MIN, vm::MEMORY_DYNAMIC_MAX, vm::MEMORY_TARGET].map(|field| row.get(field) / MIB);
    assert_eq!(bounds, [512, 768, 768]);
    assert_eq!(pool.get(row.get(vm::METRICS)).await.get(vm_metrics::MEMORY_ACTUAL), 768 * MIB);
    pool.ask("VM.wait_memory_target_live", on(this, Vec::new())).await.unwrap();
    // What the guest refuses has not been.
    pool.agent.refuse(Reason::NoGuestSupport);
    let refused = pool.refusal("VM.set_memory_dynamic_range", numbers(this, &[64 * MIB, 64 * MIB])).await;
    assert_eq!(refused, ["VM_LACKS_FEATURE", &this.to_string()]);
    let row = pool.get(this).await;
    assert_eq!((row.get(vm::MEMORY_DYNAMIC_MAX), row.get(vm::MEMORY_TARGET)), (768 * MIB, 768 * MIB));
    assert!(row.get(vm::CURRENT_OPERATIONS).is_empty());
    let refused = pool.refusal("VM.set_memory_static_max", numbers(this, &[2048 * MIB])).await;
    assert_eq!(refused[0], "VM_BAD_POWER_STATE");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_memory_than_a_host_has_is_not_promised() {
    let pool = Pool::start().await;
    let this = pool.vm("greedy").await;
    let starts = || vec![Input::Bool(false), Input::Bool(false)];
    // Until its balloon driver runs a guest may use all it sees, whatever it is meant to have.
    let limits = [64 * MIB, 64 << 30, 128 * MIB, 128 * MIB];
    pool.ask("VM.set_memory_limits", numbers(this, &limits)).await.unwrap();
    assert_eq!(pool.refusal("VM.start", on(this, starts())).await[0], "HOST_NOT_ENOUGH_FREE_MEMORY");
    let limits = [64 * MIB, 12 << 30, 128 * MIB, 128 * MIB];
    pool.ask("VM.set_memory_limits", numbers(this, &limits)).await.unwrap();
    pool.ask("VM.start", on(this, starts())).await.unwrap();
    // What it has given back is another's.
    let other = pool.vm("large").await;
    pool.ask("VM.set_memory_limits", numbers(other, &[8 << 30; 4])).await.unwrap();
    pool.ask("VM.start", on(other, starts())).await.unwrap();
    let refused = pool.refusal("VM.set_memory_dynamic_range", numbers(this, &[10 << 30, 10 << 30])).await;
    assert_eq!(refused[0], "HOST_NOT_ENOUGH_FREE_MEMORY");
    // Between the bounds it gets what there is.
    pool.ask("VM.set_memory_dynamic_range", numbers(this, &[1 << 30, 12 << 30])).await.unwrap();
    let target = pool.get(this).await.get(vm::MEMORY_TARGET);
    assert!(target > 5 << 30 && target < 8 << 30, "{target}");
}

#[tokio::test(flavor = "multi_thread")]
async fn processors_are_plugged_within_what_the_vm_was_made_with() {
    let pool = Pool::start().await;
    let this = pool.vm("busy").await;
    pool.ask("VM.set_VCPUs_max", numbers(this, &[4])).await.unwrap();
    assert_eq!(pool.refusal("VM.set_VCPUs_at_startup", numbers(this, &[5])).await[0], "INVALID_VALUE");
    assert_eq!(pool.refusal("VM.set_VCPUs_max", numbers(this, &[0])).await[0], "INVALID_VALUE");
    assert_eq!(pool.refusal("VM.set_VCPUs_number_live", numbers(this, &[2])).await[0], "VM_BAD_POWER_STATE");
    pool.ask("VM.start", on(this, vec![Input::Bool(false), Input::Bool(false)])).await.unwrap();
    pool.ask("VM.set_VCPUs_number_live", numbers(this, &[3])).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!(row.get(vm::VCPUS_AT_STARTUP), 3);
    assert_eq!(pool.get(row.get(vm::METRICS)).await.get(vm_metrics::VCPUS_NUMBER), 3);
    assert_eq!(pool.refusal("VM.set_VCPUs_number_live", numbers(this, &[5])).await[0], "INVALID_VALUE");
    assert_eq!(pool.refusal("VM.set_VCPUs_max", numbers(this, &[8])).await[0], "VM_BAD_POWER_STATE");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_set_is_refused_by_its_documented_error() {
    let pool = Pool::start().await;
    let this = pool.vm("checked").await;
    let cases: Vec<(&str, Vec<Input>, &str)> = vec![
        ("set_HVM_shadow_multiplier", vec![Input::Float(0.5)], "INVALID_VALUE"),
        ("set_shadow_multiplier_live", vec![Input::Float(2.0)], "VM_BAD_POWER_STATE"),
        ("set_actions_after_crash", vec![text("rename_restart")], "VALUE_NOT_SUPPORTED"),
        ("set_order", vec![Input::Int(-1)], "INVALID_VALUE"),
        ("set_start_delay", vec![Input::Int(-1)], "INVALID_VALUE"),
        ("set_shutdown_delay", vec![Input::Int(-1)], "INVALID_VALUE"),
        ("set_bios_strings", vec![pairs(&[("unheard-of", "x")])], "INVALID_VALUE"),
        ("set_bios_strings", vec![pairs(&[("bios-vendor", "")])], "INVALID_VALUE"),
        ("set_HVM_boot_policy", vec![text("some order")], "INVALID_VALUE"),
        ("set_ha_restart_priority", vec![text("soon")], "INVALID_VALUE"),
        ("set_suspend_VDI", vec![text("OpaqueRef:NULL")], "VM_BAD_POWER_STATE"),
        ("set_appliance", vec![text("OpaqueRef:00000000-0000-0000-0000-000000000001")], "HANDLE_INVALID"),
        ("set_snapshot_schedule", vec![text("OpaqueRef:00000000-0000-0000-0000-000000000001")], "HANDLE_INVALID"),
        ("get_boot_record", vec![], "VM_BAD_POWER_STATE"),
        ("record_data_source", vec![text("cpu0")], "VM_BAD_POWER_STATE"),
        ("send_sysrq", vec![text("h")], "VM_BAD_POWER_STATE"),
        ("send_trigger", vec![text("nmi")], "VM_BAD_POWER_STATE"),
        ("call_plugin", vec![text("a"), text("b"), pairs(&[])], "VM_BAD_POWER_STATE"),
        ("query_services", vec![], "NOT_SYSTEM_DOMAIN"),
        ("retrieve_wlb_recommendations", vec![], "WLB_NOT_INITIALIZED"),
        ("assert_operation_valid", vec![text("resume")], "VM_BAD_POWER_STATE"),
        ("get_SRs_required_for_recovery", vec![text("OpaqueRef:NULL")], "SESSION_INVALID"),
    ];
    for (name, arguments, code) in cases {
        assert_eq!(pool.refusal(&format!("VM.{name}"), on(this, arguments)).await[0], code, "{name}");
    }
    pool.ask("VM.set_bios_strings", on(this, vec![pairs(&[("bios-vendor", "Us")])])).await.unwrap();
    let strings = pool.get(this).await.get(vm::BIOS_STRINGS);
    assert_eq!((strings["bios-vendor"].as_str(), strings["system-manufacturer"].as_str()), ("Us", "Xen"));
    let again = on(this, vec![pairs(&[("bios-vendor", "Them")])]);
    assert_eq!(pool.refusal("VM.set_bios_strings", again).await, ["VM_BIOS_STRINGS_ALREADY_SET"]);
    pool.ask("VM.set_domain_type", on(this, vec![text("hvm")])).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!((row.get(vm::DOMAIN_TYPE), row.get(vm::HVM_BOOT_POLICY).as_str()), (DomainType::Hvm, "BIOS order"));
    pool.ask("VM.set_has_vendor_device", on(this, vec![Input::Bool(true)])).await.unwrap();
    assert_eq!(pool.get(this).await.get(vm::HARDWARE_PLATFORM_VERSION), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_magic_key_reaches_the_guest() {
    let pool = Pool::start().await;
    let this = pool.running("kernel").await;
    pool.ask("VM.send_sysrq", on(this, vec![text("h")])).await.unwrap();
    let keys = pool.agent.steps().into_iter().find_map(|step| match step.action {
        Some(Action::Keys(keys)) => Some(keys.sysrq),
        _ => None,
    });
    assert_eq!(keys.as_deref(), Some("h"));
    assert_eq!(pool.refusal("VM.send_sysrq", on(this, vec![text("help")])).await[0], "INVALID_VALUE");
    assert_eq!(pool.refusal("VM.send_trigger", on(this, vec![text("nmi")])).await[0], "VALUE_NOT_SUPPORTED");
    let record = pool.ask("VM.get_boot_record", on(this, Vec::new())).await.unwrap();
    let Value::Record(members) = record else { panic!("{record:?}") };
    assert!(members.iter().any(|(name, value)| name == "name_label" && *value == Value::str("kernel")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_is_refused_for_what_stands_in_its_way_and_leaves_nothing() {
    let pool = Pool::start().await;
    let this = pool.vm("too large").await;
    pool.ask("VM.set_memory", numbers(this, &[1 << 40])).await.unwrap();
    let start = || on(this, vec![Input::Bool(false), Input::Bool(false)]);
    assert_eq!(pool.refusal("VM.start", start()).await[0], "HOST_NOT_ENOUGH_FREE_MEMORY");
    assert_eq!(pool.ask("VM.get_possible_hosts", on(this, Vec::new())).await, Ok(Value::set([])));
    pool.ask("VM.set_memory", numbers(this, &[128 * MIB])).await.unwrap();
    // A network that is on no host of the pool, in the hands of a VM elsewhere, is one; an SR that nobody reaches another.
    pool.agent.refuse(Reason::BootFailed);
    assert_eq!(pool.refusal("VM.start", start()).await[0], "BOOTLOADER_FAILED");
    let row = pool.get(this).await;
    assert_eq!(row.get(vm::POWER_STATE), VmPowerState::Halted);
    assert!(row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON).is_null() && row.get(vm::CURRENT_OPERATIONS).is_empty());
    assert_eq!(pool.store().state().count(datamodel::Operation::ID), 0);
    pool.ask("VM.start", start()).await.unwrap();
}
