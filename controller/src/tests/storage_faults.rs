//! Operations of several steps, when a step fails and when the master dies between any two of their doings.

use std::sync::atomic::Ordering;
use std::time::Duration;

use datamodel::enums::TaskStatusType;
use datamodel::fields::{operation, sr, task, vbd, vdi, vm};
use datamodel::{ClassKind, Input, Operation, Ref, Sr, Task, Vbd, Vdi, Vm};
use proto::agent::refusal::Reason;
use raft_store::State;

use super::storage::record;
use super::stores::Fault;
use super::{Pool, reference, text};

/// A VM with two disks.
async fn with_two_disks(pool: &Pool, name: &str) -> Ref<Vm> {
    let this = pool.vm(name).await;
    for device in ["0", "1"] {
        let disk = pool.disk(&format!("{name} {device}"), 1 << 20).await;
        pool.drive(this, disk, device, "RW").await;
    }
    this
}

/// A template that asks for two disks.
async fn template(pool: &Pool, name: &str) -> Ref<Vm> {
    let blank = pool.store().state().by_name_label(Vm::ID, "Xenith guest").first().unwrap().reference;
    let made = pool.ask("VM.clone", vec![text(blank.to_string()), text(name)]).await.unwrap();
    let this: Ref<Vm> = Ref::from_opaque(reference(&made));
    let sr = pool.of(pool.local()).await.uuid().to_owned();
    let disk = |device: u32| {
        format!("<disk device=\"{device}\" size=\"1048576\" sr=\"{sr}\" bootable=\"true\" type=\"system\"/>")
    };
    let asked = format!("<provision>{}{}</provision>", disk(0), disk(1));
    let add = vec![text(this.to_string()), text("disks"), text(asked)];
    pool.ask("VM.add_to_other_config", add).await.unwrap();
    this
}

/// What a client can see of storage and VMs, and the operations behind it.
fn seen(state: &State) -> (usize, usize, usize, usize) {
    (state.count(Vm::ID), state.count(Vdi::ID), state.count(Vbd::ID), state.count(Operation::ID))
}

/// Nothing is marked as being under way.
fn assert_at_rest(state: &State) {
    for row in state.all::<Vm>() {
        assert!(row.get(vm::CURRENT_OPERATIONS).is_empty(), "{}", row.name_label());
    }
    for row in state.all::<Sr>() {
        assert!(row.get(sr::CURRENT_OPERATIONS).is_empty(), "{}", row.name_label());
    }
    for row in state.all::<Vdi>() {
        assert!(row.get(vdi::CURRENT_OPERATIONS).is_empty(), "{}", row.name_label());
    }
}

/// The volumes are those that have rows.
fn assert_rows_are_images(pool: &Pool) {
    let mut rows: Vec<String> = pool.store().state().all::<Vdi>().map(|row| row.uuid().to_owned()).collect();
    rows.sort();
    assert_eq!(pool.agent.stores.volumes(), rows);
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Doing {
    Provision,
    Clone,
    Copy,
    Snapshot,
}

const DOINGS: [Doing; 4] = [Doing::Provision, Doing::Clone, Doing::Copy, Doing::Snapshot];

impl Doing {
    async fn subject(self, pool: &Pool, name: &str) -> Ref<Vm> {
        if self == Self::Provision { template(pool, name).await } else { with_two_disks(pool, name).await }
    }

    fn call(self, this: Ref<Vm>) -> (&'static str, Vec<Input>) {
        let this = text(this.to_string());
        match self {
            Self::Provision => ("VM.provision", vec![this]),
            Self::Clone => ("VM.clone", vec![this, text("made")]),
            Self::Copy => ("VM.copy", vec![this, text("made"), text("OpaqueRef:NULL")]),
            Self::Snapshot => ("VM.snapshot", vec![this, text("made"), Input::Array(Vec::new())]),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_step_fails_in_whatever_way_nothing_is_left_behind() {
    let pool = Pool::start().await;
    for doing in DOINGS {
        for place in [1, 2] {
            for fault in [Fault::Refused(Reason::NoSpace), Fault::Unreachable, Fault::Lost] {
                let this = doing.subject(&pool, &format!("{doing:?} {place} {fault:?}")).await;
                let before = seen(&pool.store().state());
                pool.agent.stores.fail(place, fault);
                let (method, arguments) = doing.call(this);
                let refused = pool.refusal(method, arguments).await;
                let expected = if fault == Fault::Refused(Reason::NoSpace) { "SR_FULL" } else { "HOST_OFFLINE" };
                assert_eq!(refused[0], expected, "{doing:?}, step {place}, {fault:?}");
                let state = pool.store().read().await.unwrap();
                assert_eq!(seen(&state), before, "{doing:?}, step {place}, {fault:?}");
                assert_at_rest(&state);
                assert_rows_are_images(&pool);
                assert_eq!(state.row(this).unwrap().get(vm::IS_A_TEMPLATE), doing == Doing::Provision);
            }
        }
    }
}

async fn ended(pool: &Pool, task_ref: Ref<Task>) -> TaskStatusType {
    pool.until(|state| state.row(task_ref).is_none_or(|row| row.get(task::STATUS) != TaskStatusType::Pending)).await;
    pool.quiet().await;
    let row = pool.of(task_ref).await;
    if row.get(task::STATUS) == TaskStatusType::Failure {
        eprintln!("failed: {:?}", row.get(task::ERROR_INFO));
    }
    row.get(task::STATUS)
}

/// Begins a call behind a task, and lets go of its operation after so many of its doings. Whether it came so far.
async fn dies_after(pool: &Pool, doings: usize, method: &str, arguments: Vec<Input>) -> (Ref<Task>, bool) {
    let dies = &pool.controller.shared.dies_after;
    dies.store(doings, Ordering::SeqCst);
    let task = pool.ask(&format!("Async.{method}"), arguments).await.unwrap();
    let task_ref: Ref<Task> = Ref::from_opaque(reference(&task));
    ended(pool, task_ref).await;
    (task_ref, dies.swap(0, Ordering::SeqCst) == 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_whose_master_dies_at_any_point_is_finished_by_the_next() {
    let pool = Pool::start().await;
    for doing in DOINGS {
        for point in 1.. {
            let this = doing.subject(&pool, &format!("{doing:?} {point}")).await;
            let (disks, asked) = (pool.store().state().count(Vdi::ID), pool.agent.stores.asked().len());
            let (method, arguments) = doing.call(this);
            let (task_ref, died) = dies_after(&pool, point, method, arguments).await;
            let row = pool.of(task_ref).await;
            assert_eq!(
                row.get(task::STATUS),
                TaskStatusType::Success,
                "{doing:?} at {point}: {:?}",
                row.get(task::ERROR_INFO)
            );
            let state = pool.store().read().await.unwrap();
            assert_eq!(state.count(Vdi::ID), disks + 2, "{doing:?} at {point}");
            assert_eq!(pool.agent.stores.asked().len(), asked + 2, "each step once: {doing:?} at {point}");
            assert_at_rest(&state);
            assert_rows_are_images(&pool);
            if !died {
                assert!(point > 4, "the operation does more than {point} things");
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_whose_master_dies_with_its_host_leaves_nothing_there() {
    let pool = Pool::start().await;
    let dies = &pool.controller.shared.dies_after;
    for doing in DOINGS {
        for point in 1.. {
            let this = doing.subject(&pool, &format!("{doing:?} with its host {point}")).await;
            let before = seen(&pool.store().state());
            let (method, arguments) = doing.call(this);
            dies.store(point, Ordering::SeqCst);
            let task = pool.ask(&format!("Async.{method}"), arguments).await.unwrap();
            let task_ref: Ref<Task> = Ref::from_opaque(reference(&task));
            let over =
                |state: &State| state.row(task_ref).is_none_or(|row| row.get(task::STATUS) != TaskStatusType::Pending);
            while dies.load(Ordering::SeqCst) > 0 && !over(&pool.store().state()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // Whoever adopts it now may find the host, or may not; what was done there was done.
            pool.agent.stores.cut(true);
            pool.until(over).await;
            let row = pool.of(task_ref).await;
            pool.agent.stores.cut(false);
            pool.quiet().await;
            let died = dies.swap(0, Ordering::SeqCst) == 0;
            let state = pool.store().read().await.unwrap();
            let now = seen(&state);
            if row.get(task::STATUS) == TaskStatusType::Success {
                assert_eq!(now.1, before.1 + 2, "{doing:?} at {point}");
            } else {
                assert_eq!(row.get(task::ERROR_INFO)[0], "HOST_OFFLINE", "{doing:?} at {point}");
                assert_eq!(now, before, "{doing:?} at {point}");
            }
            assert_at_rest(&state);
            assert_rows_are_images(&pool);
            if !died {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_whose_master_dies_while_it_is_undone_is_undone_by_the_next() {
    let pool = Pool::start().await;
    for point in 1.. {
        let this = template(&pool, &format!("undone {point}")).await;
        let before = seen(&pool.store().state());
        pool.agent.stores.fail(2, Fault::Refused(Reason::NoSpace));
        let (method, arguments) = Doing::Provision.call(this);
        let (task_ref, died) = dies_after(&pool, point, method, arguments).await;
        let row = pool.of(task_ref).await;
        assert_eq!(row.get(task::STATUS), TaskStatusType::Failure, "at {point}");
        assert_eq!(row.get(task::ERROR_INFO)[0], "SR_FULL", "at {point}");
        let state = pool.store().read().await.unwrap();
        assert_eq!(seen(&state), before, "at {point}");
        assert_at_rest(&state);
        assert_rows_are_images(&pool);
        if !died {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_undone_now_holds_nothing_and_is_undone_later() {
    let pool = Pool::start().await;
    let this = template(&pool, "owed").await;
    pool.agent.stores.fail(2, Fault::Lost);
    let (method, arguments) = Doing::Provision.call(this);
    let cut = async {
        // Between the loss of the second step's answer and its undoing.
        while pool.agent.stores.volumes().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        pool.agent.stores.cut(true);
    };
    let (refused, ()) = tokio::join!(pool.refusal(method, arguments), cut);
    assert_eq!(refused[0], "HOST_OFFLINE");
    let state = pool.store().read().await.unwrap();
    assert_at_rest(&state);
    assert_eq!(state.count(Operation::ID), 1, "the debt is written down");
    let debt = state.all::<Operation>().next().unwrap().get(operation::TASK);
    assert!(debt.is_null(), "nobody waits for it");
    pool.agent.stores.cut(false);
    pool.quiet().await;
    assert!(pool.agent.stores.volumes().is_empty());
}

/// A provisioning fails, and the disk that it made cannot be removed.
async fn owes_an_image(pool: &Pool, reason: Reason) {
    let this = template(pool, "owes").await;
    pool.agent.stores.fail(2, Fault::Refused(Reason::NoSpace));
    pool.agent.stores.refuse_undoing(Some(reason));
    let (method, arguments) = Doing::Provision.call(this);
    assert_eq!(pool.refusal(method, arguments).await[0], "SR_FULL");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_be_removed_yet_is_nobodys_disk_and_is_removed_later() {
    let pool = Pool::start().await;
    owes_an_image(&pool, Reason::InUse).await;
    assert_eq!(pool.agent.stores.volumes().len(), 1);
    let scan = || vec![text(pool.local().to_string())];
    pool.ask("SR.scan", scan()).await.unwrap();
    let state = pool.store().read().await.unwrap();
    assert_at_rest(&state);
    assert_eq!((state.count(Vdi::ID), state.count(Operation::ID)), (0, 1));
    pool.agent.stores.refuse_undoing(None);
    pool.quiet().await;
    assert!(pool.agent.stores.volumes().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_owed_when_a_store_was_looked_into_is_no_disk_when_it_is_told() {
    let pool = Pool::start().await;
    owes_an_image(&pool, Reason::InUse).await;
    let scan = || vec![text(pool.local().to_string())];
    pool.agent.stores.hold_after(0);
    let paid = async {
        let local = pool.local();
        pool.until(|state| !state.row(local).unwrap().get(sr::CURRENT_OPERATIONS).is_empty()).await;
        let owed = pool.store().state().all::<Operation>().find(|row| row.get(operation::TASK).is_null()).cloned();
        let owed = owed.unwrap().typed::<Operation>();
        pool.commit(|change| {
            change.delete(owed);
        })
        .await;
        pool.agent.stores.release();
    };
    let (scanned, ()) = tokio::join!(pool.ask("SR.scan", scan()), paid);
    scanned.unwrap();
    assert_eq!(pool.store().state().count(Vdi::ID), 0);
    // One that nobody owes and that is still there is somebody's.
    pool.ask("SR.scan", scan()).await.unwrap();
    assert_eq!(pool.store().state().count(Vdi::ID), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_debt_in_a_store_that_is_forgotten_is_none() {
    let pool = Pool::start().await;
    owes_an_image(&pool, Reason::NoSuchStore).await;
    let pbds = pool.of(pool.local()).await.get(sr::PBDS);
    for pbd in pbds {
        pool.ask("PBD.unplug", vec![text(pbd.to_string())]).await.unwrap();
    }
    pool.ask("SR.forget", vec![text(pool.local().to_string())]).await.unwrap();
    pool.quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_whose_old_image_is_in_use_does_not_move_and_one_whose_end_is_in_doubt_is_seen_twice() {
    let pool = Pool::start().await;
    let disk = pool.disk("stays", 1 << 20).await;
    let vm = pool.vm("whose").await;
    let drive = pool.drive(vm, disk, "0", "RW").await;
    let arguments = || {
        let into = text(pool.store_of("Shared storage").to_string());
        vec![text(disk.to_string()), into, Input::Struct(Vec::new())]
    };
    pool.agent.stores.fail(2, Fault::Refused(Reason::InUse));
    assert_eq!(pool.refusal("VDI.pool_migrate", arguments()).await, ["VDI_IN_USE", &disk.to_string(), "destroy"]);
    let state = pool.store().read().await.unwrap();
    assert_eq!((state.count(Vdi::ID), state.row(drive).unwrap().get(vbd::VDI)), (1, disk));
    assert_at_rest(&state);
    assert_rows_are_images(&pool);
    pool.agent.stores.fail(2, Fault::Lost);
    let made: Ref<Vdi> = Ref::from_opaque(reference(&pool.ask("VDI.pool_migrate", arguments()).await.unwrap()));
    let state = pool.store().read().await.unwrap();
    assert_eq!((state.count(Vdi::ID), state.row(drive).unwrap().get(vbd::VDI)), (2, made));
    assert_at_rest(&state);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_whose_end_may_have_begun_ends() {
    let pool = Pool::start().await;
    let disk = pool.disk("goes", 1 << 20).await;
    let destroy = || vec![text(disk.to_string())];
    pool.agent.stores.fail(1, Fault::Unreachable);
    assert_eq!(pool.refusal("VDI.destroy", destroy()).await[0], "HOST_OFFLINE", "nothing was done");
    assert_rows_are_images(&pool);
    pool.agent.stores.fail(1, Fault::Lost);
    // What was done was not: an agent that dies before it does it.
    let image = pool.agent.stores.volume(pool.of(disk).await.uuid());
    pool.ask("VDI.destroy", destroy()).await.unwrap();
    assert_eq!(pool.store().state().count(Vdi::ID), 0);
    pool.agent.stores.appear(image);
    pool.quiet().await;
    assert!(pool.agent.stores.volumes().is_empty());
    // One that a master began which died with the host.
    let disk = pool.disk("goes with its host", 1 << 20).await;
    let dies = &pool.controller.shared.dies_after;
    dies.store(2, Ordering::SeqCst);
    let task = pool.ask("Async.VDI.destroy", vec![text(disk.to_string())]).await.unwrap();
    while dies.load(Ordering::SeqCst) > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    pool.agent.stores.cut(true);
    let task_ref: Ref<Task> = Ref::from_opaque(reference(&task));
    pool.until(|state| state.row(task_ref).is_none_or(|row| row.get(task::STATUS) != TaskStatusType::Pending)).await;
    assert_eq!(pool.of(task_ref).await.get(task::STATUS), TaskStatusType::Success);
    pool.agent.stores.cut(false);
    pool.quiet().await;
    assert_rows_are_images(&pool);
}

/// Begins a call behind a task, lets go of its operation after so many of its doings, as if the master had died, and
/// cancels it. How it ended, and whether it came so far.
async fn cancelled_after(pool: &Pool, doings: usize, method: &str, arguments: Vec<Input>) -> (TaskStatusType, bool) {
    let dies = &pool.controller.shared.dies_after;
    dies.store(doings, Ordering::SeqCst);
    let task = pool.ask(&format!("Async.{method}"), arguments).await.unwrap();
    let task_ref: Ref<Task> = Ref::from_opaque(reference(&task));
    pool.ask("task.cancel", vec![text(task_ref.to_string())]).await.unwrap();
    let status = ended(pool, task_ref).await;
    (status, dies.swap(0, Ordering::SeqCst) == 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_cancelled_only_where_nothing_is_left_of_its_operation() {
    let pool = Pool::start().await;
    for doing in DOINGS {
        for point in 1.. {
            let this = doing.subject(&pool, &format!("{doing:?} {point}")).await;
            let before = seen(&pool.store().state());
            let (method, arguments) = doing.call(this);
            let (status, died) = cancelled_after(&pool, point, method, arguments).await;
            let state = pool.store().read().await.unwrap();
            assert_at_rest(&state);
            assert_rows_are_images(&pool);
            // It may have been too late; but never half.
            match status {
                TaskStatusType::Success => assert_eq!(state.count(Vdi::ID), before.1 + 2, "{doing:?} at {point}"),
                TaskStatusType::Cancelled => assert_eq!(seen(&state), before, "{doing:?} at {point}"),
                other => panic!("{doing:?} at {point}: {other:?}"),
            }
            if !died {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_cancelled_while_its_last_step_is_done_is_undone() {
    let pool = Pool::start().await;
    let this = with_two_disks(&pool, "late").await;
    let before = seen(&pool.store().state());
    pool.agent.stores.hold_after(1);
    let (method, arguments) = Doing::Copy.call(this);
    let task = pool.ask(&format!("Async.{method}"), arguments).await.unwrap();
    pool.agent.stores.held().await;
    let task_ref: Ref<Task> = Ref::from_opaque(reference(&task));
    pool.ask("task.cancel", vec![text(task_ref.to_string())]).await.unwrap();
    pool.agent.stores.release();
    assert_eq!(ended(&pool, task_ref).await, TaskStatusType::Cancelled);
    let state = pool.store().read().await.unwrap();
    assert_eq!(seen(&state), before);
    assert_at_rest(&state);
    assert_rows_are_images(&pool);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_moves_has_one_image_wherever_its_move_is_cancelled() {
    let pool = Pool::start().await;
    let (from, into) = (pool.local().to_string(), pool.store_of("Shared storage").to_string());
    for point in 1.. {
        let disk = pool.disk(&format!("moves {point}"), 1 << 20).await;
        let disks = pool.store().state().count(Vdi::ID);
        let arguments = vec![text(disk.to_string()), text(into.clone()), Input::Struct(Vec::new())];
        let (status, died) = cancelled_after(&pool, point, "VDI.pool_migrate", arguments).await;
        let state = pool.store().read().await.unwrap();
        assert_eq!(state.count(Vdi::ID), disks, "at {point}");
        assert_at_rest(&state);
        assert_rows_are_images(&pool);
        let stays = state.row(disk).is_some();
        assert_eq!(stays, status == TaskStatusType::Cancelled, "at {point}: {status:?}");
        assert!(stays || status == TaskStatusType::Success, "at {point}: {status:?}");
        assert!(!stays || state.row(disk).unwrap().get(vdi::SR).to_string() == from);
        if !died {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sr_that_cannot_be_plugged_is_not_made() {
    let pool = Pool::start().await;
    let host = pool.store().state().all::<datamodel::Host>().next().unwrap().reference.to_string();
    let create = || {
        let config = record(vec![("location", text("here"))]);
        let (size, shared, sm_config) = (Input::Int(0), Input::Bool(false), Input::Struct(Vec::new()));
        vec![text(host.clone()), config, size, text("mine"), text(""), text("file"), text("user"), shared, sm_config]
    };
    for (place, fault) in
        [(1, Fault::Refused(Reason::BadConfig)), (2, Fault::Refused(Reason::NoSuchStore)), (2, Fault::Unreachable)]
    {
        let before = pool.store().state().count(Sr::ID);
        pool.agent.stores.fail(place, fault);
        pool.refusal("SR.create", create()).await;
        assert_eq!(pool.store().state().count(Sr::ID), before);
        assert!(pool.agent.stores.created().is_empty(), "step {place}, {fault:?}");
        assert_eq!(pool.agent.stores.attached().len(), 2, "step {place}, {fault:?}");
    }
    for point in 1.. {
        let before = pool.store().state().count(Sr::ID);
        let (task_ref, died) = dies_after(&pool, point, "SR.create", create()).await;
        assert_eq!(pool.of(task_ref).await.get(task::STATUS), TaskStatusType::Success, "at {point}");
        assert_eq!(pool.store().state().count(Sr::ID), before + 1, "at {point}");
        if !died {
            break;
        }
    }
}
