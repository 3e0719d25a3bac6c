//! A call with a key is done once, however often and wherever it is asked.

use datamodel::enums::{TaskStatusType, VmPowerState};
use datamodel::fields::{task, vm};
use datamodel::{Answer, ApiError, ClassKind, Input, Operation, Task, Value, Vm};

use super::{Pool, caller, reference, text, value};
use crate::call::{Caller, Transport};
use crate::repeats;

fn keyed(key: &str) -> Caller {
    Caller { idempotency_key: Some(key.to_owned()), ..caller(Transport::Tcp) }
}

async fn ask(pool: &Pool, key: &str, method: &str, params: Vec<Input>) -> Result<Value, ApiError> {
    ask_in(pool, &pool.root, key, method, params).await
}

async fn ask_in(
    pool: &Pool,
    session: &str,
    key: &str,
    method: &str,
    mut params: Vec<Input>,
) -> Result<Value, ApiError> {
    params.insert(0, text(session));
    pool.call_from(keyed(key), method, params).await.map(value)
}

fn start(this: impl ToString) -> Vec<Input> {
    vec![text(this.to_string()), Input::Bool(false), Input::Bool(false)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_call_answers_what_the_first_one_did_and_does_nothing() {
    let pool = Pool::start().await;
    let vm = pool.vm("original").await.to_string();
    let clone = |name: &str| vec![text(&vm), text(name)];
    let first = ask(&pool, "one", "VM.clone", clone("copy")).await.unwrap();
    let again = ask(&pool, "one", "VM.clone", clone("copy")).await.unwrap();
    assert_eq!(first, again);
    assert_eq!(pool.store().state().by_name_label(Vm::ID, "copy").len(), 1);
    let other = ask(&pool, "two", "VM.clone", clone("copy")).await.unwrap();
    assert_ne!(first, other, "another key is another call");
    let copy = reference(&first).to_string();
    for _ in 0..2 {
        let done = ask(&pool, "three", "VM.destroy", vec![text(&copy)]).await;
        assert_eq!(done.unwrap(), Value::Void, "not HANDLE_INVALID the second time");
    }
    for _ in 0..2 {
        let label = vec![text(reference(&other).to_string()), text("key"), text("value")];
        ask(&pool, "four", "VM.add_to_other_config", label).await.expect("not MAP_DUPLICATE_KEY the second time");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_stands_for_one_call_of_one_user() {
    let pool = Pool::start().await;
    let vm = pool.vm("original").await.to_string();
    ask(&pool, "key", "VM.clone", vec![text(&vm), text("copy")]).await.unwrap();
    let error = ask(&pool, "key", "VM.clone", vec![text(&vm), text("another")]).await.unwrap_err();
    assert_eq!(error.description()[..2], ["VALUE_NOT_SUPPORTED", "Idempotency-Key"]);
    let somebody = pool.session_as("pool-admin").await;
    ask_in(&pool, &somebody, "key", "VM.clone", vec![text(&vm), text("theirs")]).await.unwrap();
    assert_eq!(pool.store().state().by_name_label(Vm::ID, "theirs").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_at_once_are_one() {
    let pool = Pool::start().await;
    let this = pool.vm("started twice").await;
    pool.agent.hold();
    let both = async {
        tokio::join!(ask(&pool, "both", "VM.start", start(this)), ask(&pool, "both", "VM.start", start(this)), async {
            pool.agent.asked(1).await;
            pool.agent.release();
        })
    };
    let (first, second, ()) = both.await;
    assert_eq!((first.unwrap(), second.unwrap()), (Value::Void, Value::Void));
    assert_eq!(pool.row(Vm::ID, this.opaque()).await.unwrap().get(vm::POWER_STATE), VmPowerState::Running);
    let clones = futures::future::join_all(
        (0..8).map(|_| ask(&pool, "eight", "VM.clone", vec![text(this.to_string()), text("of eight")])),
    );
    // A running VM cannot be cloned: found before anything changed, eight times.
    assert!(clones.await.into_iter().all(|answer| answer.unwrap_err().code == "VM_BAD_POWER_STATE"));
    ask(&pool, "down", "VM.hard_shutdown", vec![text(this.to_string())]).await.unwrap();
    let clones = futures::future::join_all(
        (0..8).map(|_| ask(&pool, "eight", "VM.clone", vec![text(this.to_string()), text("of eight")])),
    );
    let made: Vec<_> = clones.await.into_iter().map(Result::unwrap).collect();
    assert!(made.iter().all(|one| *one == made[0]));
    assert_eq!(pool.store().state().by_name_label(Vm::ID, "of eight").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_closes_its_answer_with_its_outcome_though_nobody_waits() {
    let pool = Pool::start().await;
    let this = pool.vm("left alone").await;
    pool.agent.hold();
    let controller = pool.controller.clone();
    let mut params = start(this);
    params.insert(0, text(&pool.root));
    let request = crate::Request { caller: keyed("lost"), method: "VM.start".into(), params };
    let waiting = tokio::spawn(async move { controller.call(request).await });
    pool.agent.asked(1).await;
    waiting.abort();
    let again = ask(&pool, "lost", "VM.start", start(this));
    let released = async {
        pool.agent.release();
    };
    let (answer, ()) = tokio::join!(again, released);
    assert_eq!(answer.unwrap(), Value::Void);
    assert_eq!(pool.store().state().count(Operation::ID), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_asynchronous_call_names_the_same_task() {
    let pool = Pool::start().await;
    let vm = pool.vm("original").await.to_string();
    let first = ask(&pool, "task", "Async.VM.clone", vec![text(&vm), text("copy")]).await.unwrap();
    let again = ask(&pool, "task", "Async.VM.clone", vec![text(&vm), text("copy")]).await.unwrap();
    assert_eq!(first, again);
    assert_eq!(pool.store().state().count(Task::ID), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_ends_in_the_transaction_that_has_its_effect() {
    let pool = Pool::start().await;
    let vm = pool.vm("original").await.to_string();
    let task = reference(&pool.ask("Async.VM.clone", vec![text(&vm), text("copy")]).await.unwrap());
    pool.until(|state| state.row_of(Task::ID, task).unwrap().get(task::STATUS) == TaskStatusType::Success).await;
    let state = pool.store().state();
    let copy = state.by_name_label(Vm::ID, "copy").remove(0);
    assert_eq!(
        state.row_of(Task::ID, task).unwrap().modified,
        copy.created,
        "a master lost in between would lose one of them"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_has_in_hand_is_failed_unless_an_operation_will_close_it() {
    let pool = Pool::start().await;
    let this = pool.vm("under way").await;
    pool.agent.hold();
    let waits = async {
        pool.agent.asked(1).await;
        repeats::fail_orphans(&pool.controller.shared, &pool.store().state()).await.unwrap();
        pool.agent.release();
    };
    let (answer, ()) = tokio::join!(ask(&pool, "held", "VM.start", start(this)), waits);
    assert_eq!(answer.unwrap(), Value::Void);

    let repeat = repeats::Repeat::of(
        &keyed("broken off"),
        Some(&pool.row(datamodel::Session::ID, pool.root.parse().unwrap()).await.unwrap()),
        datamodel::model().message("VM.pause").unwrap(),
        &[Value::Ref(this.opaque())],
    )
    .unwrap();
    pool.commit(|change| repeat.record(&pool.controller.shared, change, &repeats::Stage::Open)).await;
    repeats::fail_orphans(&pool.controller.shared, &pool.store().state()).await.unwrap();
    assert_eq!(repeats::open(&pool.store().state()), 1, "somebody here is still at it");
    drop(repeat);
    pool.until(|state| repeats::open(state) == 0).await;
    let error = ask(&pool, "broken off", "VM.pause", vec![text(this.to_string())]).await.unwrap_err();
    assert_eq!(error.code, "INTERNAL_ERROR");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_kept_for_a_day() {
    let pool = Pool::start().await;
    let vm = pool.vm("original").await.to_string();
    let clone = || vec![text(&vm), text("copy")];
    let first = ask(&pool, "daily", "VM.clone", clone()).await.unwrap();
    pool.clock.advance(23 * 3600);
    repeats::pass(&pool.controller.shared).await.unwrap();
    // The session has expired meanwhile; the key is its user's.
    let session = pool.login().await;
    assert_eq!(ask_in(&pool, &session, "daily", "VM.clone", clone()).await.unwrap(), first);
    pool.clock.advance(2 * 3600);
    repeats::pass(&pool.controller.shared).await.unwrap();
    assert_eq!(pool.store().state().count(Answer::ID), 0);
}
