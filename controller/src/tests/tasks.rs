//! What a caller can see of a call that runs behind its back.

use datamodel::enums::TaskStatusType;
use datamodel::fields::task;
use datamodel::{ClassKind, OpaqueRef, Ref, Task, Timestamp, Value};
use raft_store::{NewRow, Row};
use uuid::Uuid;

use super::{Pool, reference, text};
use crate::tasks;

async fn ended(pool: &Pool, task: &Value) -> std::sync::Arc<Row> {
    let task = reference(task);
    pool.until(|state| {
        let row = state.row_of(Task::ID, task).expect("a task stays until it is destroyed");
        row.get(task::STATUS) != TaskStatusType::Pending
    })
    .await;
    pool.row(Task::ID, task).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_is_the_xml_of_the_value_and_void_an_empty_value() {
    let pool = Pool::start().await;
    let vm = pool.vm("original").await.to_string();
    let row = ended(&pool, &pool.ask("Async.VM.clone", vec![text(&vm), text("copy")]).await.unwrap()).await;
    assert_eq!(row.get(task::STATUS), TaskStatusType::Success);
    assert_eq!(row.name_label(), "Async.VM.clone");
    let result = row.get(task::RESULT);
    let made = result.strip_prefix("<value>").and_then(|rest| rest.strip_suffix("</value>")).unwrap();
    assert!(pool.row(datamodel::Vm::ID, made.parse().unwrap()).await.is_some(), "{result}");
    let row = ended(&pool, &pool.ask("Async.VM.destroy", vec![text(made)]).await.unwrap()).await;
    assert_eq!(row.get(task::RESULT), "<value></value>");
    assert!((row.get(task::PROGRESS) - 1.0).abs() < f64::EPSILON);
    assert!(row.get(task::ALLOWED_OPERATIONS).is_empty());
    assert_eq!(row.get(task::FINISHED), crate::Clock::now(&*pool.clock));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_inside_fails_the_task_and_what_fails_before_makes_none() {
    let pool = Pool::start().await;
    let vm = pool.vm("halted").await.to_string();
    let row = ended(&pool, &pool.ask("Async.VM.pause", vec![text(&vm)]).await.unwrap()).await;
    assert_eq!(row.get(task::STATUS), TaskStatusType::Failure);
    assert_eq!(row.get(task::ERROR_INFO), ["VM_BAD_POWER_STATE", vm.as_str(), "running", "halted"]);
    assert_eq!(row.get(task::RESULT), "");
    let before = pool.store().state().count(Task::ID);
    assert_eq!(pool.refusal("Async.VM.pause", vec![text("nonsense")]).await[0], "HANDLE_INVALID");
    assert_eq!(pool.refusal("Async.host.reboot", vec![text("OpaqueRef:NULL")]).await[0], "NOT_IMPLEMENTED");
    assert_eq!(pool.store().state().count(Task::ID), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_whose_caller_hangs_up_before_it_is_told_of_it_does_not_stay_pending() {
    let pool = Pool::start().await;
    let vm = pool.vm("original").await.to_string();
    let mut begun = 0;
    for polls in 1..20 {
        let before = pool.store().state().count(Task::ID);
        let mut call = Box::pin(pool.ask("Async.VM.clone", vec![text(&vm), text("copy")]));
        for _ in 0..polls {
            if futures::poll!(call.as_mut()).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(call);
        // What was proposed is applied before what is proposed now.
        pool.commit(|change| {
            change.touch(datamodel::Vm::ID, vm.parse().unwrap());
        })
        .await;
        begun += usize::from(pool.store().state().count(Task::ID) > before);
    }
    assert!(begun > 0, "no task was ever made");
    pool.until(|state| state.all::<Task>().all(|row| row.get(task::STATUS) != TaskStatusType::Pending)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_task_is_an_invalid_handle_of_class_task() {
    let pool = Pool::start().await;
    let made = pool.ask("task.create", vec![text("mine"), text("by hand")]).await.unwrap();
    let made = reference(&made).to_string();
    pool.ask("task.set_progress", vec![text(&made), datamodel::Input::Float(0.5)]).await.unwrap();
    pool.ask("task.destroy", vec![text(&made)]).await.unwrap();
    assert_eq!(pool.refusal("task.get_record", vec![text(&made)]).await, ["HANDLE_INVALID", "task", made.as_str()]);
    assert_eq!(
        pool.refusal("task.set_progress", vec![text(&made), datamodel::Input::Float(0.6)]).await[0],
        "HANDLE_INVALID"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_own_task_is_cancelled_at_once() {
    let pool = Pool::start().await;
    let made = pool.ask("task.create", vec![text("mine"), text("")]).await.unwrap();
    pool.ask("task.cancel", vec![text(reference(&made).to_string())]).await.unwrap();
    assert_eq!(ended(&pool, &made).await.get(task::STATUS), TaskStatusType::Cancelled);
}

/// Tasks as they may have been left, by status and by how long ago they were made and ended.
async fn left(pool: &Pool, label: &str, tasks: &[(TaskStatusType, i64)]) -> Vec<OpaqueRef> {
    let now = crate::Clock::now(&*pool.clock);
    let made: Vec<OpaqueRef> = tasks.iter().map(|_| OpaqueRef::from_uuid(Uuid::new_v4())).collect();
    pool.commit(|change| {
        for ((status, age), reference) in tasks.iter().zip(&made) {
            let at = Timestamp(now.0 - age);
            let row = NewRow::new(Ref::<Task>::from_opaque(*reference), Uuid::new_v4())
                .with(task::NAME_LABEL, label.to_owned())
                .with(task::CREATED, at)
                .with(task::FINISHED, at)
                .with(task::STATUS, *status);
            change.insert(row);
        }
    })
    .await;
    made
}

#[tokio::test(flavor = "multi_thread")]
async fn finished_tasks_go_after_an_hour_and_pending_ones_fail_after_a_day() {
    let pool = Pool::start().await;
    let (done, waits) = (TaskStatusType::Success, TaskStatusType::Pending);
    let made =
        left(&pool, "a client's", &[(done, 66 * 60), (done, 64 * 60), (waits, 25 * 3600), (waits, 23 * 3600)]).await;
    tasks::pass(&pool.controller.shared).await.unwrap();
    let mut statuses = Vec::new();
    for reference in made {
        statuses.push(pool.row(Task::ID, reference).await.map(|row| row.get(task::STATUS)));
    }
    assert_eq!(statuses, [None, Some(done), Some(TaskStatusType::Failure), Some(waits)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn above_two_hundred_the_oldest_finished_ones_go_and_pending_ones_stay() {
    let pool = Pool::start().await;
    let many: Vec<_> =
        (0..210).map(|age| (if age >= 205 { TaskStatusType::Pending } else { TaskStatusType::Failure }, age)).collect();
    let made = left(&pool, "a client's", &many).await;
    tasks::pass(&pool.controller.shared).await.unwrap();
    let state = pool.store().read().await.unwrap();
    let kept: Vec<bool> = made.iter().map(|reference| state.row_of(Task::ID, *reference).is_some()).collect();
    assert_eq!(kept.iter().filter(|kept| **kept).count(), 200);
    assert!(kept[205..].iter().all(|kept| *kept), "a pending task was forgotten");
    assert!(!kept[195..205].iter().any(|kept| *kept), "not the oldest were forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_master_fails_the_tasks_that_nobody_runs() {
    let pool = Pool::start().await;
    let made = left(&pool, "Async.VM.start", &[(TaskStatusType::Pending, 5)]).await;
    pool.until(|state| state.row_of(Task::ID, made[0]).unwrap().get(task::STATUS) != TaskStatusType::Pending).await;
    let row = pool.row(Task::ID, made[0]).await.unwrap();
    assert_eq!(
        (row.get(task::STATUS), row.get(task::ERROR_INFO)[0].as_str()),
        (TaskStatusType::Failure, "INTERNAL_ERROR")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_panics_fails_its_task() {
    let outcome = tasks::guarded(async { panic!("a defect") }).await;
    assert_eq!(outcome.unwrap_err().into_api().code, "INTERNAL_ERROR");
}
