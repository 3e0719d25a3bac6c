//! Whoever stops waiting for an operation does not stop the operation.

use datamodel::enums::{TaskAllowedOperations, TaskStatusType, VmOperations, VmPowerState};
use datamodel::fields::{task, vm};
use datamodel::{ClassKind, Input, Operation, Ref, Task, Vm};
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{DomainState, PowerState};

use super::{Pool, caller, reference, text};
use crate::call::{Request, Transport};

fn start_arguments(this: Ref<Vm>) -> Vec<Input> {
    vec![text(this.to_string()), Input::Bool(false), Input::Bool(false)]
}

async fn settled(pool: &Pool, this: Ref<Vm>) {
    pool.until(|state| {
        let row = state.row(this).unwrap();
        row.get(vm::CURRENT_OPERATIONS).is_empty()
            && row.get(vm::POWER_STATE) == VmPowerState::Running
            && state.count(Operation::ID) == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_ends_well_though_its_caller_hangs_up() {
    let pool = Pool::start().await;
    let this = pool.vm("abandoned").await;
    pool.agent.hold();
    let mut params = start_arguments(this);
    params.insert(0, text(pool.root.clone()));
    let request = Request { caller: caller(Transport::Tcp), method: "VM.start".into(), params };
    let controller = pool.controller.clone();
    let waiting = tokio::spawn(async move { controller.call(request).await });
    pool.agent.asked(1).await;
    // What the gateway does when the client's connection ends.
    waiting.abort();
    assert!(waiting.await.is_err());
    pool.agent.release();
    settled(&pool, this).await;
    let tasks = pool.store().state().count(Task::ID);
    assert_eq!(tasks, 0, "the operation's own task goes with it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_that_a_reset_was_faster_than_says_that_the_vm_runs() {
    let pool = Pool::start().await;
    let this = pool.running("reset").await;
    pool.agent.refuse_saying(Reason::BadState, "running");
    let refused = pool.refusal("VM.clean_shutdown", vec![text(this.to_string())]).await;
    assert_eq!(refused, ["VM_BAD_POWER_STATE", &this.to_string(), "halted", "running"]);
    pool.agent.refuse_saying(Reason::BadState, "halted");
    let refused = pool.refusal("VM.pause", vec![text(this.to_string())]).await;
    assert_eq!(refused, ["VM_BAD_POWER_STATE", &this.to_string(), "running", "halted"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_start_may_have_been_done_is_started_nowhere_until_its_domain_has_ended() {
    let pool = Pool::start().await;
    let this = pool.vm("somewhere").await;
    let sleeper = pool.running("sleeper").await;
    let one = |this: Ref<Vm>| vec![text(this.to_string())];
    pool.ask("VM.suspend", one(sleeper)).await.unwrap();
    for (vm, method, arguments) in
        [(this, "VM.start", start_arguments(this)), (sleeper, "VM.resume", start_arguments(sleeper))]
    {
        let before = pool.get(vm).await.get(vm::POWER_STATE);
        pool.agent.lose(true);
        assert_eq!(pool.refusal(method, arguments.clone()).await[0], "HOST_OFFLINE");
        assert_eq!(pool.get(vm).await.get(vm::POWER_STATE), before);
        assert_eq!(pool.store().state().count(Operation::ID), 1, "its end is owed");
        let refused = pool.refusal(method, arguments.clone()).await;
        assert_eq!(refused[..4], ["OTHER_OPERATION_IN_PROGRESS", "VM", &vm.to_string(), "hard_shutdown"]);
        pool.agent.lose(false);
        pool.until(|state| state.count(Operation::ID) == 0).await;
        let last = pool.agent.steps().pop().unwrap();
        assert!(matches!(last.action, Some(Action::Destroy(_))), "{last:?}");
        pool.ask(method, arguments).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_cancelled_too_late_ends_as_its_operation_does() {
    let pool = Pool::start().await;
    let this = pool.vm("cancelled").await;
    pool.agent.hold();
    let task = pool.ask("Async.VM.start", start_arguments(this)).await.unwrap();
    pool.agent.asked(1).await;
    pool.ask("task.cancel", vec![text(reference(&task).to_string())]).await.unwrap();
    let task_ref: Ref<Task> = Ref::from_opaque(reference(&task));
    let asked = pool.of(task_ref).await;
    assert_eq!(asked.get(task::STATUS), TaskStatusType::Pending, "a start is not undone");
    assert!(asked.get(task::CURRENT_OPERATIONS).values().any(|doing| *doing == TaskAllowedOperations::Cancel));
    pool.agent.release();
    settled(&pool, this).await;
    assert!(pool.row(Vm::ID, this.opaque()).await.unwrap().get(vm::ALLOWED_OPERATIONS).len() > 1);
    pool.until(|state| state.row(task_ref).is_some_and(|row| row.get(task::STATUS) == TaskStatusType::Success)).await;
    assert!(pool.of(task_ref).await.get(task::CURRENT_OPERATIONS).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_whose_agent_is_not_reached_is_refused_and_leaves_nothing() {
    let pool = Pool::start().await;
    let this = pool.vm("out of reach").await;
    pool.agent.stores.cut(true);
    assert_eq!(pool.refusal("VM.start", start_arguments(this)).await[0], "HOST_OFFLINE");
    pool.until(|state| state.count(Operation::ID) == 0).await;
    let row = pool.row(Vm::ID, this.opaque()).await.unwrap();
    assert_eq!(row.get(vm::POWER_STATE), VmPowerState::Halted);
    assert!(row.get(vm::RESIDENT_ON).is_null() && row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON).is_null());
    assert!(row.get(vm::CURRENT_OPERATIONS).is_empty());
    assert!(row.get(vm::ALLOWED_OPERATIONS).contains(&VmOperations::Start), "it can be tried again");
    pool.agent.stores.cut(false);
    pool.ask("VM.start", start_arguments(this)).await.unwrap();
    settled(&pool, this).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ends_while_it_is_being_started_is_not_shown_running() {
    let pool = Pool::start().await;
    let this = pool.vm("short-lived").await;
    let uuid = pool.row(Vm::ID, this.opaque()).await.unwrap().uuid().to_owned();
    pool.agent.hold();
    let waits = async {
        pool.agent.asked(1).await;
        let ended = DomainState { vm: uuid, state: PowerState::Halted.into(), domid: -1, ..DomainState::default() };
        pool.agent.tell(ended);
        // The master has heard of it before the start is recorded.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        pool.agent.release();
    };
    let (started, ()) = tokio::join!(pool.ask("VM.start", start_arguments(this)), waits);
    started.unwrap();
    pool.until(|state| state.row(this).unwrap().get(vm::POWER_STATE) == VmPowerState::Halted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_nobody_has_in_hand_is_finished_by_the_master_in_office() {
    use datamodel::fields::operation;
    let pool = Pool::start().await;
    let this = pool.vm("left behind").await;
    let host = pool.store().state().all::<datamodel::Host>().next().unwrap().typed::<datamodel::Host>();
    // As a call leaves it whose proof of the lead came too late.
    pool.commit(|change| {
        let row = raft_store::NewRow::new(Ref::<Operation>::new(uuid::Uuid::new_v4()), uuid::Uuid::new_v4())
            .with(operation::VERB, "start".to_owned())
            .with(operation::VM, this)
            .with(operation::HOST, host);
        change.insert(row).put(this, vm::CURRENT_OPERATIONS, Ref::<Task>::NULL.to_string(), VmOperations::Start);
    })
    .await;
    settled(&pool, this).await;
}
