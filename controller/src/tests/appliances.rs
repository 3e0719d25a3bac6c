//! Appliances: VMs that are started and shut down together.

use datamodel::enums::{VmApplianceOperation as Operation, VmPowerState};
use datamodel::fields::{vm, vm_appliance};
use datamodel::{ClassKind, Input, Ref, Task, Vm, VmAppliance};
use proto::agent::refusal::Reason;
use proto::agent::step::Action;

use super::{Pool, reference, text};

fn record(name: &str) -> Input {
    Input::Struct(vec![("name_label".to_owned(), text(name)), ("name_description".to_owned(), text(""))])
}

/// An appliance of VMs with these orders.
async fn appliance(pool: &Pool, orders: &[i64]) -> (Ref<VmAppliance>, Vec<Ref<Vm>>) {
    let made = pool.ask("VM_appliance.create", vec![record("web")]).await.unwrap();
    let this: Ref<VmAppliance> = Ref::from_opaque(reference(&made));
    let mut members = Vec::new();
    for order in orders {
        let member = pool.vm(&format!("number {order}")).await;
        let set = |name: &str, value: Input| (format!("VM.{name}"), vec![text(member.to_string()), value]);
        for (name, arguments) in [set("set_appliance", text(this.to_string())), set("set_order", Input::Int(*order))] {
            pool.ask(&name, arguments).await.unwrap();
        }
        members.push(member);
    }
    (this, members)
}

async fn names(pool: &Pool, chosen: fn(&Action) -> bool) -> Vec<String> {
    let state = pool.store().read().await.unwrap();
    let steps = pool.agent.steps().into_iter().filter(|step| step.action.as_ref().is_some_and(chosen));
    steps.map(|step| state.by_uuid(Vm::ID, &step.vm).unwrap().name_label().to_owned()).collect()
}

async fn power(pool: &Pool, members: &[Ref<Vm>]) -> Vec<&'static str> {
    let mut all = Vec::new();
    for member in members {
        all.push(pool.get(*member).await.get(vm::POWER_STATE).as_str());
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn an_appliance_starts_in_its_order_and_ends_in_the_other() {
    let pool = Pool::start().await;
    let (this, members) = appliance(&pool, &[3, 1, 2]).await;
    assert_eq!(pool.get(this).await.get(vm_appliance::ALLOWED_OPERATIONS), [Operation::Start]);
    pool.ask("VM_appliance.start", vec![text(this.to_string()), Input::Bool(false)]).await.unwrap();
    assert_eq!(names(&pool, |action| matches!(action, Action::Start(_))).await, ["number 1", "number 2", "number 3"]);
    assert_eq!(power(&pool, &members).await, ["Running"; 3]);
    let row = pool.get(this).await;
    assert!(row.get(vm_appliance::CURRENT_OPERATIONS).is_empty());
    let ending = [Operation::CleanShutdown, Operation::HardShutdown, Operation::Shutdown];
    assert_eq!(row.get(vm_appliance::ALLOWED_OPERATIONS), ending);
    let refused = pool.refusal("VM_appliance.start", vec![text(this.to_string()), Input::Bool(false)]).await;
    assert_eq!(refused[0], "OPERATION_NOT_ALLOWED", "all of it runs");
    pool.ask("VM_appliance.hard_shutdown", vec![text(this.to_string())]).await.unwrap();
    assert_eq!(names(&pool, |action| matches!(action, Action::Destroy(_))).await, ["number 3", "number 2", "number 1"]);
    assert_eq!(pool.store().state().count(Task::ID), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_does_not_start_does_not_keep_the_others_from_it() {
    let pool = Pool::start().await;
    let (this, members) = appliance(&pool, &[0, 1]).await;
    pool.agent.refuse(Reason::BootFailed);
    let refused = pool.refusal("VM_appliance.start", vec![text(this.to_string()), Input::Bool(false)]).await;
    assert_eq!(refused, ["OPERATION_PARTIALLY_FAILED", "start"]);
    assert_eq!(power(&pool, &members).await, ["Halted", "Running"]);
    let row = pool.get(this).await;
    assert!(row.get(vm_appliance::CURRENT_OPERATIONS).is_empty());
    assert_eq!(row.get(vm_appliance::ALLOWED_OPERATIONS).len(), 4, "one to start, one to end");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_an_appliance_starts_nothing_else_is_done_to_it_and_its_task_tells_how_far_it_is() {
    let pool = Pool::start().await;
    let (this, members) = appliance(&pool, &[0, 1]).await;
    let other = pool.vm("another").await;
    pool.agent.hold();
    let task = pool.ask("Async.VM_appliance.start", vec![text(this.to_string()), Input::Bool(true)]).await.unwrap();
    let task: Ref<Task> = Ref::from_opaque(reference(&task));
    pool.agent.asked(1).await;
    let refused = pool.refusal("VM_appliance.hard_shutdown", vec![text(this.to_string())]).await;
    assert_eq!(refused[..4], ["OTHER_OPERATION_IN_PROGRESS", "VM_appliance", &this.to_string(), "start"]);
    let join = vec![text(other.to_string()), text(this.to_string())];
    assert_eq!(pool.refusal("VM.set_appliance", join).await[0], "OTHER_OPERATION_IN_PROGRESS");
    let row = pool.get(this).await;
    assert_eq!(row.get(vm_appliance::CURRENT_OPERATIONS)[&task.to_string()], Operation::Start);
    assert!(row.get(vm_appliance::ALLOWED_OPERATIONS).is_empty());
    pool.agent.release();
    use datamodel::enums::TaskStatusType;
    use datamodel::fields::task as fields;
    pool.until(|state| state.row(task).is_some_and(|row| row.get(fields::STATUS) == TaskStatusType::Success)).await;
    assert_eq!(power(&pool, &members).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_appliance_that_nobody_has_in_hand_is_started_to_its_end_by_the_master_in_office() {
    use datamodel::Operation as Journal;
    use datamodel::fields::operation;
    let pool = Pool::start().await;
    let (this, members) = appliance(&pool, &[0, 1]).await;
    // The first one has been started by a master that is gone.
    pool.ask("VM.start", vec![text(members[0].to_string()), Input::Bool(false), Input::Bool(false)]).await.unwrap();
    let null = Ref::<Task>::NULL.to_string();
    pool.commit(|change| {
        let noted = [("appliance", this.to_string()), ("held", format!("VM_appliance/{this}")), ("task", "own".into())];
        let noted = noted.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let row = raft_store::NewRow::new(Ref::<Journal>::new(uuid::Uuid::new_v4()), uuid::Uuid::new_v4())
            .with(operation::VERB, "appliance_start".to_owned())
            .with(operation::PARAMETERS, noted);
        change.insert(row).put(this, vm_appliance::CURRENT_OPERATIONS, null.clone(), Operation::Start);
    })
    .await;
    pool.until(|state| {
        state.row(this).unwrap().get(vm_appliance::CURRENT_OPERATIONS).is_empty() && state.count(Journal::ID) == 0
    })
    .await;
    let running = VmPowerState::Running.as_str();
    assert_eq!(power(&pool, &members).await, [running, running]);
    let starts = names(&pool, |action| matches!(action, Action::Start(_))).await;
    assert_eq!(starts, ["number 0", "number 1"], "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_appliance_that_ends_leaves_its_vms() {
    let pool = Pool::start().await;
    let (this, members) = appliance(&pool, &[0]).await;
    let template = vec![text(members[0].to_string()), Input::Bool(true)];
    assert_eq!(pool.refusal("VM.set_is_a_template", template).await[0], "VM_IS_PART_OF_AN_APPLIANCE");
    pool.ask("VM_appliance.destroy", vec![text(this.to_string())]).await.unwrap();
    assert!(pool.get(members[0]).await.get(vm::APPLIANCE).is_null());
}
