//! VMs whose memory is kept in an image: suspended ones, checkpoints, and what is made of them.

use datamodel::enums::{VdiType, VmPowerState};
use datamodel::fields::{pool as pool_fields, sr, vbd, vdi, vif, vm, vm_metrics};
use datamodel::{ClassKind, Input, Operation, Ref, Vdi, Vm};
use proto::agent::refusal::Reason;
use proto::agent::step::Action;

use super::interfaces::interface;
use super::stores::Fault;
use super::{Pool, reference, text};

fn one(this: Ref<Vm>) -> Vec<Input> {
    vec![text(this.to_string())]
}

fn resume(this: Ref<Vm>, paused: bool) -> Vec<Input> {
    vec![text(this.to_string()), Input::Bool(paused), Input::Bool(false)]
}

async fn images(pool: &Pool) -> Vec<Ref<Vdi>> {
    let state = pool.store().read().await.unwrap();
    state.all::<Vdi>().filter(|row| row.get(vdi::TYPE) == VdiType::Suspend).map(|row| row.typed()).collect()
}

async fn power(pool: &Pool, this: Ref<Vm>) -> VmPowerState {
    pool.get(this).await.get(vm::POWER_STATE)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_vm_has_an_image_and_no_host_and_one_that_is_resumed_has_a_host_and_no_image() {
    let pool = Pool::start().await;
    let this = pool.vm("sleeper").await;
    let disk = pool.disk("its disk", 1 << 20).await;
    let drive = pool.drive(this, disk, "0", "RW").await;
    pool.turn_on(this).await.unwrap();
    pool.ask("VM.suspend", one(this)).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!((row.get(vm::POWER_STATE), row.get(vm::DOMID)), (VmPowerState::Suspended, -1));
    assert!(row.get(vm::RESIDENT_ON).is_null() && row.get(vm::CURRENT_OPERATIONS).is_empty());
    assert_eq!(images(&pool).await, [row.get(vm::SUSPEND_VDI)]);
    assert!(pool.get(drive).await.get(vbd::CURRENTLY_ATTACHED), "its disk is its own still");
    assert_eq!(pool.get(row.get(vm::METRICS)).await.get(vm_metrics::MEMORY_ACTUAL), 0);
    assert_eq!(pool.refusal("VM.start", resume(this, false)).await[0], "VM_BAD_POWER_STATE");
    pool.ask("VM.resume", resume(this, false)).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!(row.get(vm::POWER_STATE), VmPowerState::Running);
    assert!(!row.get(vm::RESIDENT_ON).is_null() && row.get(vm::SUSPEND_VDI).is_null());
    assert!(row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON).is_null());
    assert!(images(&pool).await.is_empty());
    assert_eq!(machine(&pool), (1, 0), "with its disk");
}

/// How many disks and interfaces the agent was told of when it last made a domain.
fn machine(pool: &Pool) -> (usize, usize) {
    let told = pool.agent.steps().into_iter().rev().find_map(|step| match step.action? {
        Action::Start(start) => start.spec,
        Action::Reboot(reboot) => reboot.spec,
        Action::Resume(resume) => resume.spec,
        _ => None,
    });
    told.map(|spec| (spec.disks.len(), spec.vifs.len())).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_resumed_as_the_machine_that_its_memory_knows() {
    let pool = Pool::start().await;
    let (this, network) = (pool.vm("sleeper").await, pool.network("xenbr0").await);
    let (first, second) = (pool.disk("first", 1 << 20).await, pool.disk("second", 1 << 20).await);
    let connect = async |place| {
        let made = pool.ask("VIF.create", interface(this, network, place, "")).await.unwrap();
        Ref::<datamodel::Vif>::from_opaque(reference(&made))
    };
    let old = (pool.drive(this, first, "0", "RW").await, connect("0").await);
    pool.turn_on(this).await.unwrap();
    assert_eq!(machine(&pool), (1, 1));
    pool.ask("VM.suspend", one(this)).await.unwrap();
    // What its memory knows stays, what comes meanwhile is for a later machine.
    for (message, device) in [("VBD.destroy", old.0.to_string()), ("VIF.destroy", old.1.to_string())] {
        assert_eq!(pool.refusal(message, vec![text(device)]).await[0], "OPERATION_NOT_ALLOWED");
    }
    let new = (pool.drive(this, second, "1", "RW").await, connect("1").await);
    let attached = async || {
        let drives = [old.0, new.0].map(async |drive| pool.get(drive).await.get(vbd::CURRENTLY_ATTACHED));
        let interfaces = [old.1, new.1].map(async |card| pool.get(card).await.get(vif::CURRENTLY_ATTACHED));
        let mut all = Vec::new();
        for one in drives {
            all.push(one.await);
        }
        for one in interfaces {
            all.push(one.await);
        }
        all
    };
    pool.ask("VM.resume", resume(this, false)).await.unwrap();
    assert_eq!((machine(&pool), attached().await), ((1, 1), vec![true, false, true, false]));
    pool.ask("VM.hard_reboot", one(this)).await.unwrap();
    assert_eq!((machine(&pool), attached().await), ((1, 1), vec![true, false, true, false]));

    // So is one that goes back to a checkpoint. What is copied from that has no memory.
    let made = pool.ask("VM.checkpoint", vec![text(this.to_string()), text("before")]).await.unwrap();
    let copy = vec![text(reference(&made).to_string()), text("copy"), text("OpaqueRef:NULL")];
    let copy = Ref::<Vm>::from_opaque(reference(&pool.ask("VM.copy", copy).await.unwrap()));
    for drive in pool.get(copy).await.get(vm::VBDS) {
        assert!(!pool.get(drive).await.get(vbd::CURRENTLY_ATTACHED));
    }
    pool.ask("VM.hard_shutdown", one(this)).await.unwrap();
    assert_eq!(attached().await, [false; 4]);
    pool.turn_on(this).await.unwrap();
    assert_eq!((machine(&pool), attached().await), ((2, 2), vec![true; 4]));
    pool.ask("VM.revert", vec![text(reference(&made).to_string())]).await.unwrap();
    pool.ask("VM.resume", resume(this, false)).await.unwrap();
    assert_eq!(machine(&pool), (1, 1));
    let drives = pool.get(this).await.get(vm::VBDS);
    assert_eq!(drives.len(), 2);
    let mut shown = Vec::new();
    for drive in drives {
        let row = pool.get(drive).await;
        shown.push((row.get(vbd::DEVICE), row.get(vbd::CURRENTLY_ATTACHED)));
    }
    shown.sort();
    assert_eq!(shown, [(String::new(), false), ("xvda".to_owned(), true)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_does_not_suspend_runs_on_and_leaves_no_image() {
    let pool = Pool::start().await;
    let this = pool.running("restless").await;
    pool.agent.refuse(Reason::NoSpace);
    assert_eq!(pool.refusal("VM.suspend", one(this)).await[0], "SR_SUSPEND_SPACE_INSUFFICIENT");
    assert_eq!(power(&pool, this).await, VmPowerState::Running);
    assert!(images(&pool).await.is_empty());
    assert_eq!(pool.store().state().count(Operation::ID), 0);
    // Nowhere to write it to.
    let nowhere = text("OpaqueRef:NULL");
    let pool_ref = text(pool.pool_ref());
    for field in ["suspend_image_SR", "default_SR"] {
        pool.ask(&format!("pool.set_{field}"), vec![pool_ref.clone(), nowhere.clone()]).await.unwrap();
    }
    let state = pool.store().state();
    let row = state.all::<datamodel::Pool>().next().unwrap();
    assert!(row.get(pool_fields::SUSPEND_IMAGE_SR).is_null());
    assert_eq!(pool.refusal("VM.suspend", one(this)).await, ["VM_NO_SUSPEND_SR", &this.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_does_not_resume_stays_suspended_and_can_be_given_up() {
    let pool = Pool::start().await;
    let this = pool.running("stuck").await;
    pool.ask("VM.suspend", one(this)).await.unwrap();
    pool.agent.refuse(Reason::Damaged);
    pool.ask("VM.resume", resume(this, false)).await.unwrap_err();
    let row = pool.get(this).await;
    assert_eq!(row.get(vm::POWER_STATE), VmPowerState::Suspended);
    assert!(row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON).is_null());
    assert_eq!(images(&pool).await, [row.get(vm::SUSPEND_VDI)]);
    pool.ask("VM.hard_shutdown", one(this)).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!((row.get(vm::POWER_STATE), row.get(vm::SUSPEND_VDI)), (VmPowerState::Halted, Ref::NULL));
    assert!(images(&pool).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_of_one_moment_and_its_vm_goes_on() {
    let pool = Pool::start().await;
    let this = pool.vm("original").await;
    let disk = pool.disk("its disk", 1 << 20).await;
    pool.drive(this, disk, "0", "RW").await;
    pool.turn_on(this).await.unwrap();
    let made = pool.ask("VM.checkpoint", vec![text(this.to_string()), text("before")]).await.unwrap();
    let made: Ref<Vm> = Ref::from_opaque(reference(&made));
    assert_eq!(power(&pool, this).await, VmPowerState::Running);
    let row = pool.get(made).await;
    assert_eq!((row.get(vm::POWER_STATE), row.get(vm::SNAPSHOT_OF)), (VmPowerState::Suspended, this));
    assert_eq!(images(&pool).await, [row.get(vm::SUSPEND_VDI)]);
    let verbs: Vec<&str> = pool
        .agent
        .steps()
        .iter()
        .filter_map(|step| match step.action.as_ref()? {
            Action::Pause(_) => Some("pause"),
            Action::Suspend(_) => Some("save"),
            Action::Unpause(_) => Some("go on"),
            _ => None,
        })
        .collect();
    assert_eq!(verbs, ["pause", "save", "go on"]);

    // Back to it: with its memory.
    pool.ask("VM.set_name_description", vec![text(this.to_string()), text("changed since")]).await.unwrap();
    pool.ask("VM.revert", one(made)).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!(row.get(vm::POWER_STATE), VmPowerState::Suspended);
    assert_ne!(row.get(vm::NAME_DESCRIPTION), "changed since");
    assert_eq!(images(&pool).await.len(), 2, "the VM's own, and the checkpoint's");
    assert_eq!(row.get(vm::PARENT), made);
    let drives = row.get(vm::VBDS);
    assert_eq!(drives.len(), 1);
    assert_eq!(pool.get(drives[0]).await.get(vbd::VDI), disk, "the same disk");
    pool.ask("VM.resume", resume(this, true)).await.unwrap();
    assert_eq!(images(&pool).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_fails_lets_its_vm_go_on() {
    let pool = Pool::start().await;
    let this = pool.running("fails").await;
    pool.agent.stores.fail(1, Fault::Refused(Reason::NoSpace));
    let refused = pool.refusal("VM.checkpoint", vec![text(this.to_string()), text("never")]).await;
    assert_eq!(refused[0], "SR_FULL");
    assert_eq!(power(&pool, this).await, VmPowerState::Running);
    let last = pool.agent.steps().pop().unwrap();
    assert!(matches!(last.action, Some(Action::Unpause(_))), "{last:?}");
    assert!(images(&pool).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halted_vm_becomes_what_its_snapshot_is() {
    let pool = Pool::start().await;
    let this = pool.vm("edited").await;
    let disk = pool.disk("its disk", 1 << 20).await;
    pool.drive(this, disk, "0", "RW").await;
    let made = pool.ask("VM.snapshot", vec![text(this.to_string()), text("before"), Input::Array(Vec::new())]).await;
    let made: Ref<Vm> = Ref::from_opaque(reference(&made.unwrap()));
    pool.ask("VM.set_VCPUs_max", vec![text(this.to_string()), Input::Int(4)]).await.unwrap();
    pool.turn_on(this).await.unwrap();
    pool.ask("VM.revert", one(made)).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!((row.get(vm::POWER_STATE), row.get(vm::VCPUS_MAX)), (VmPowerState::Halted, 1));
    assert_eq!(row.name_label(), "edited");
    assert!(row.get(vm::CURRENT_OPERATIONS).is_empty());
    assert_eq!(pool.refusal("VM.revert", one(this)).await, ["REVERT_ONLY_ALLOWED_ON_SNAPSHOT"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_memory_that_cannot_be_removed_yet_is_no_disk_and_goes_later() {
    let pool = Pool::start().await;
    let this = pool.running("wakes").await;
    for (method, arguments) in [("VM.resume", resume(this, false)), ("VM.hard_shutdown", one(this))] {
        pool.ask("VM.suspend", one(this)).await.unwrap();
        pool.agent.stores.fail(1, Fault::Refused(Reason::NoSuchStore));
        pool.agent.stores.refuse_undoing(Some(Reason::NoSuchStore));
        pool.ask(method, arguments).await.unwrap();
        assert!(images(&pool).await.is_empty(), "{method}");
        assert_eq!((pool.agent.stores.volumes().len(), pool.store().state().count(Operation::ID)), (1, 1), "{method}");
        pool.agent.stores.refuse_undoing(None);
        pool.quiet().await;
        assert!(pool.agent.stores.volumes().is_empty(), "{method}");
    }
}

/// What is under way in the store of images, while a call is.
async fn under_way(pool: &Pool, method: &str, arguments: Vec<Input>) -> Vec<String> {
    pool.agent.stores.hold_after(0);
    let call = pool.ask(method, arguments);
    let look = async {
        pool.agent.stores.held().await;
        let now = pool.of(pool.local()).await.get(sr::CURRENT_OPERATIONS);
        pool.agent.stores.release();
        now.values().map(ToString::to_string).collect()
    };
    let (done, now) = tokio::join!(call, look);
    done.unwrap();
    now
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_makes_or_removes_an_image_of_memory_holds_its_store() {
    let pool = Pool::start().await;
    let this = pool.vm("holds").await;
    let disk = pool.disk("its disk", 1 << 20).await;
    pool.drive(this, disk, "0", "RW").await;
    pool.turn_on(this).await.unwrap();
    let local = vec![text(this.to_string()), text(pool.local().to_string())];
    pool.ask("VM.set_suspend_SR", local).await.unwrap();
    let snapshot = vec![text(this.to_string()), text("before"), Input::Array(Vec::new())];
    let made = Ref::<Vm>::from_opaque(reference(&pool.ask("VM.snapshot", snapshot).await.unwrap()));
    assert_eq!(under_way(&pool, "VM.suspend", one(this)).await, ["vdi_create"]);
    assert_eq!(under_way(&pool, "VM.resume", resume(this, false)).await, ["vdi_destroy"]);
    pool.ask("VM.suspend", one(this)).await.unwrap();
    assert_eq!(under_way(&pool, "VM.hard_shutdown", one(this)).await, ["vdi_destroy"]);
    assert_eq!(under_way(&pool, "VM.revert", one(made)).await, ["vdi_snapshot"]);
    assert!(pool.of(pool.local()).await.get(sr::CURRENT_OPERATIONS).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspend_that_nobody_has_in_hand_is_finished_by_the_master_in_office() {
    use datamodel::Task;
    use datamodel::enums::VmOperations;
    use datamodel::fields::operation;
    let pool = Pool::start().await;
    let this = pool.running("left behind").await;
    let (image, uuid) = (Ref::<Vdi>::new(uuid::Uuid::new_v4()), uuid::Uuid::new_v4());
    let (host, store) = (pool.get(this).await.get(vm::RESIDENT_ON), pool.local());
    // As a master leaves it that died before its first step.
    pool.commit(|change| {
        let noted = [
            ("sr", store.to_string()),
            ("image", image.to_string()),
            ("uuid", uuid.to_string()),
            ("held", format!("VM/{this}")),
            ("task", "own".into()),
        ];
        let noted = noted.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let row = raft_store::NewRow::new(Ref::<Operation>::new(uuid::Uuid::new_v4()), uuid::Uuid::new_v4())
            .with(operation::VERB, "suspend".to_owned())
            .with(operation::VM, this)
            .with(operation::HOST, host)
            .with(operation::PARAMETERS, noted);
        change.insert(row).put(this, vm::CURRENT_OPERATIONS, Ref::<Task>::NULL.to_string(), VmOperations::Suspend);
    })
    .await;
    pool.until(|state| state.count(Operation::ID) == 0).await;
    let row = pool.get(this).await;
    assert_eq!((row.get(vm::POWER_STATE), row.get(vm::SUSPEND_VDI)), (VmPowerState::Suspended, image));
    assert_eq!(images(&pool).await, [image]);
}
