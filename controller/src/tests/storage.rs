//! SRs, PBDs, VDIs and VBDs as clients see them.

use datamodel::enums::{VbdOperations, VdiOperations, VmPowerState};
use datamodel::fields::{pbd, sr, vbd, vdi, vm};
use datamodel::{ClassKind, Input, Operation, Pbd, Ref, Sr, Vbd, Vdi, Vm};
use proto::agent::VolumeState;
use proto::agent::refusal::Reason;

use super::stores::Fault;
use super::{Pool, reference, text};

pub(super) fn record(fields: Vec<(&str, Input)>) -> Input {
    Input::Struct(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

impl Pool {
    /// Waits until nothing is under way.
    pub(super) async fn quiet(&self) {
        self.until(|state| state.count(Operation::ID) == 0).await;
    }

    /// The host's own store.
    pub(super) fn store_of(&self, name: &str) -> Ref<Sr> {
        self.store().state().by_name_label(Sr::ID, name).first().unwrap().typed()
    }

    pub(super) fn local(&self) -> Ref<Sr> {
        self.store_of("Local storage")
    }

    pub(super) async fn disk(&self, name: &str, size: i64) -> Ref<Vdi> {
        let made = self.ask("VDI.create", vec![self.disk_record(name, size)]).await.unwrap();
        Ref::from_opaque(reference(&made))
    }

    pub(super) fn disk_record(&self, name: &str, size: i64) -> Input {
        record(vec![
            ("name_label", text(name)),
            ("SR", text(self.local().to_string())),
            ("virtual_size", Input::Int(size)),
            ("type", text("user")),
            ("sharable", Input::Bool(false)),
            ("read_only", Input::Bool(false)),
            ("other_config", Input::Struct(Vec::new())),
        ])
    }

    pub(super) fn drive_record(&self, of: Ref<Vm>, disk: Ref<Vdi>, device: &str, mode: &str, ty: &str) -> Input {
        record(vec![
            ("VM", text(of.to_string())),
            ("VDI", text(disk.to_string())),
            ("userdevice", text(device)),
            ("bootable", Input::Bool(false)),
            ("mode", text(mode)),
            ("type", text(ty)),
            ("empty", Input::Bool(disk.is_null())),
            ("other_config", Input::Struct(Vec::new())),
            ("qos_algorithm_type", text("")),
            ("qos_algorithm_params", Input::Struct(Vec::new())),
        ])
    }

    pub(super) async fn drive(&self, of: Ref<Vm>, disk: Ref<Vdi>, device: &str, mode: &str) -> Ref<Vbd> {
        let made = self.ask("VBD.create", vec![self.drive_record(of, disk, device, mode, "Disk")]).await.unwrap();
        Ref::from_opaque(reference(&made))
    }

    pub(super) async fn turn_on(&self, this: Ref<Vm>) -> Result<(), Vec<String>> {
        let start = vec![text(this.to_string()), Input::Bool(false), Input::Bool(false)];
        self.ask("VM.start", start).await.map(drop).map_err(|error| error.description())
    }

    pub(super) async fn of<C: ClassKind>(&self, this: Ref<C>) -> std::sync::Arc<raft_store::Row> {
        self.row(C::ID, this.opaque()).await.unwrap()
    }
}

fn one(this: impl ToString) -> Vec<Input> {
    vec![text(this.to_string())]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_made_and_ends_and_its_store_says_what_it_gives_out() {
    let pool = Pool::start().await;
    let disk = pool.disk("data", 1 << 20).await;
    let row = pool.of(disk).await;
    assert_eq!((row.name_label(), row.get(vdi::VIRTUAL_SIZE), row.get(vdi::MANAGED)), ("data", 1 << 20, true));
    assert_eq!(row.get(vdi::LOCATION), format!("{}.image", row.uuid()));
    assert!(row.get(vdi::CURRENT_OPERATIONS).is_empty());
    assert!(row.get(vdi::ALLOWED_OPERATIONS).contains(&VdiOperations::Destroy));
    assert_eq!(pool.of(pool.local()).await.get(sr::VIRTUAL_ALLOCATION), 1 << 20);
    pool.ask("VDI.resize", vec![text(disk.to_string()), Input::Int(1 << 21)]).await.unwrap();
    assert_eq!(pool.of(disk).await.get(vdi::VIRTUAL_SIZE), 1 << 21);
    let smaller = pool.refusal("VDI.resize", vec![text(disk.to_string()), Input::Int(1 << 20)]).await;
    assert_eq!(smaller[0], "VDI_TOO_SMALL");
    pool.ask("VDI.destroy", one(disk)).await.unwrap();
    assert!(pool.row(Vdi::ID, disk.opaque()).await.is_none());
    let store = pool.of(pool.local()).await;
    assert_eq!((store.get(sr::VIRTUAL_ALLOCATION), store.get(sr::CURRENT_OPERATIONS).len()), (0, 0));
    assert!(pool.agent.stores.volumes().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_says_of_what_and_when_and_a_clone_is_a_disk_of_its_own() {
    let pool = Pool::start().await;
    let disk = pool.disk("data", 1 << 20).await;
    let arguments = || vec![text(disk.to_string()), Input::Struct(Vec::new())];
    let snapshot = reference(&pool.ask("VDI.snapshot", arguments()).await.unwrap());
    let clone = reference(&pool.ask("VDI.clone", arguments()).await.unwrap());
    let row = pool.row(Vdi::ID, snapshot).await.unwrap();
    assert!(row.get(vdi::IS_A_SNAPSHOT) && row.get(vdi::SNAPSHOT_OF) == disk);
    assert_ne!(row.get(vdi::SNAPSHOT_TIME), datamodel::Timestamp::EPOCH);
    assert_eq!(pool.of(disk).await.get(vdi::SNAPSHOTS), [Ref::from_opaque(snapshot)]);
    assert!(!pool.row(Vdi::ID, clone).await.unwrap().get(vdi::IS_A_SNAPSHOT));
    assert_eq!(pool.agent.stores.volumes().len(), 3);
    pool.ask("VDI.destroy", one(disk)).await.unwrap();
    assert!(pool.row(Vdi::ID, snapshot).await.unwrap().get(vdi::SNAPSHOT_OF).is_null());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_started_with_its_disks_and_lets_go_of_them() {
    let pool = Pool::start().await;
    let (this, disk) = (pool.vm("with disks").await, pool.disk("data", 1 << 20).await);
    let drive = pool.drive(this, disk, "0", "RW").await;
    let empty = pool.drive_record(this, Ref::NULL, "3", "RO", "CD");
    pool.ask("VBD.create", vec![empty]).await.unwrap();
    pool.turn_on(this).await.unwrap();
    let spec = pool.agent.stores.specs().pop().unwrap();
    let told: Vec<_> =
        spec.disks.iter().map(|disk| (disk.device.as_str(), disk.cdrom, disk.volume.is_some())).collect();
    assert_eq!(told, [("xvda", false, true), ("xvdd", true, false)]);
    assert_eq!(spec.disks[0].volume.as_ref().unwrap().location, pool.of(disk).await.get(vdi::LOCATION));
    let row = pool.of(drive).await;
    assert_eq!((row.get(vbd::CURRENTLY_ATTACHED), row.get(vbd::DEVICE).as_str()), (true, "xvda"));
    let allowed = row.get(vbd::ALLOWED_OPERATIONS);
    assert!(allowed.contains(&VbdOperations::Unplug) && !allowed.contains(&VbdOperations::Plug), "{allowed:?}");
    assert!(!pool.of(disk).await.get(vdi::ALLOWED_OPERATIONS).contains(&VdiOperations::Destroy));
    assert_eq!(pool.refusal("VDI.destroy", one(disk)).await, ["VDI_IN_USE", &disk.to_string(), "destroy"]);
    pool.ask("VM.hard_shutdown", one(this)).await.unwrap();
    assert!(!pool.of(drive).await.get(vbd::CURRENTLY_ATTACHED));
    assert!(pool.of(disk).await.get(vdi::ALLOWED_OPERATIONS).contains(&VdiOperations::Destroy));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_vms_that_start_at_once_with_one_disk_one_starts() {
    let pool = Pool::start().await;
    let (one, other) = (pool.vm("one").await, pool.vm("other").await);
    let disk = pool.disk("shared by mistake", 1 << 20).await;
    pool.drive(one, disk, "0", "RW").await;
    pool.drive(other, disk, "0", "RO").await;
    let (first, second) = tokio::join!(pool.turn_on(one), pool.turn_on(other));
    let refused = match (&first, &second) {
        (Ok(()), Err(error)) | (Err(error), Ok(())) => error.clone(),
        both => panic!("{both:?}"),
    };
    assert_eq!(refused, ["VDI_IN_USE", &disk.to_string(), "attach"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_missing_keeps_its_vm_from_starting_and_leaves_nothing_marked() {
    let pool = Pool::start().await;
    let (this, disk) = (pool.vm("unlucky").await, pool.disk("gone", 1 << 20).await);
    let drive = pool.drive(this, disk, "0", "RW").await;
    pool.agent.stores.vanish(pool.of(disk).await.uuid());
    let refused = pool.turn_on(this).await.unwrap_err();
    assert_eq!(refused, ["VDI_MISSING", &pool.local().to_string(), &disk.to_string()]);
    let row = pool.of(drive).await;
    assert!(row.get(vbd::CURRENT_OPERATIONS).is_empty() && !row.get(vbd::CURRENTLY_ATTACHED));
    assert_eq!(pool.of(this).await.get(vm::POWER_STATE), VmPowerState::Halted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_plugged_into_a_running_vm_and_out_of_it_and_a_medium_changes() {
    let pool = Pool::start().await;
    let (this, disk) = (pool.vm("hot").await, pool.disk("data", 1 << 20).await);
    let cd = pool.drive_record(this, Ref::NULL, "3", "RO", "CD");
    let cd = reference(&pool.ask("VBD.create", vec![cd]).await.unwrap());
    pool.turn_on(this).await.unwrap();
    let drive = pool.drive(this, disk, "autodetect", "RW").await;
    assert_eq!(pool.of(drive).await.get(vbd::USERDEVICE), "0");
    assert_eq!(pool.refusal("VBD.unplug", one(drive)).await[0], "DEVICE_ALREADY_DETACHED");
    pool.ask("VBD.plug", one(drive)).await.unwrap();
    assert!(pool.of(drive).await.get(vbd::CURRENTLY_ATTACHED));
    assert_eq!(pool.refusal("VBD.plug", one(drive)).await[0], "DEVICE_ALREADY_ATTACHED");
    assert_eq!(pool.refusal("VBD.destroy", one(drive)).await[0], "OPERATION_NOT_ALLOWED");
    pool.agent.stores.fail(1, Fault::Refused(Reason::TimedOut));
    assert_eq!(pool.refusal("VBD.unplug", one(drive)).await, ["DEVICE_DETACH_TIMEOUT", "VBD", &drive.to_string()]);
    assert!(pool.of(drive).await.get(vbd::CURRENTLY_ATTACHED), "it is still there");
    pool.ask("VBD.unplug", one(drive)).await.unwrap();
    assert!(!pool.of(drive).await.get(vbd::CURRENTLY_ATTACHED));
    let medium = pool.disk("medium", 1 << 20).await;
    assert_eq!(pool.refusal("VBD.eject", one(cd)).await[0], "VBD_IS_EMPTY");
    pool.ask("VBD.insert", vec![text(cd.to_string()), text(medium.to_string())]).await.unwrap();
    let row = pool.row(Vbd::ID, cd).await.unwrap();
    assert!(!row.get(vbd::EMPTY) && row.get(vbd::VDI) == medium);
    pool.ask("VBD.eject", one(cd)).await.unwrap();
    assert!(pool.row(Vbd::ID, cd).await.unwrap().get(vbd::EMPTY));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_reboots_and_is_suspended_with_the_disks_that_it_has_then() {
    use proto::agent::step::Action;
    let pool = Pool::start().await;
    let this = pool.vm("reboots").await;
    let disk = pool.disk("going", 1 << 20).await;
    let drive = pool.drive(this, disk, "0", "RW").await;
    pool.turn_on(this).await.unwrap();
    for method in ["VM.clean_reboot", "VM.suspend"] {
        pool.agent.stores.hold_after(0);
        let unplug = pool.ask("VBD.unplug", one(drive));
        let goes_on = async {
            pool.agent.stores.held().await;
            pool.ask(method, one(this)).await
        };
        let release = async {
            pool.agent.stores.held().await;
            // It waits: whoever begins has marked the VM before long.
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            assert!(pool.of(this).await.get(vm::CURRENT_OPERATIONS).is_empty(), "{method}");
            pool.agent.stores.release();
        };
        let (unplugged, gone_on, ()) = tokio::join!(unplug, goes_on, release);
        unplugged.unwrap();
        gone_on.unwrap();
        assert!(!pool.of(drive).await.get(vbd::CURRENTLY_ATTACHED), "{method}");
        if method != "VM.suspend" {
            pool.ask("VBD.plug", one(drive)).await.unwrap();
        }
    }
    let steps = pool.agent.steps();
    let spec = steps.iter().find_map(|step| match &step.action {
        Some(Action::Reboot(reboot)) => reboot.spec.clone(),
        _ => None,
    });
    assert!(spec.unwrap().disks.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_tells_what_came_what_is_gone_and_how_large_all_is() {
    let pool = Pool::start().await;
    let disk = pool.disk("gone", 1 << 20).await;
    pool.agent.stores.vanish(pool.of(disk).await.uuid());
    let found = VolumeState {
        location: "debian.iso".into(),
        name: "debian.iso".into(),
        virtual_size: 7 << 20,
        read_only: true,
        ..VolumeState::default()
    };
    pool.agent.stores.appear(found);
    pool.ask("SR.scan", one(pool.local())).await.unwrap();
    assert!(pool.of(disk).await.get(vdi::MISSING));
    let came = pool.store().state().by_name_label(Vdi::ID, "debian.iso");
    let row = came.first().unwrap();
    assert_eq!((row.get(vdi::VIRTUAL_SIZE), row.get(vdi::READ_ONLY)), (7 << 20, true));
    let store = pool.of(pool.local()).await;
    assert_eq!(store.get(sr::PHYSICAL_SIZE), i64::try_from(super::stores::SIZE).unwrap());
    assert_eq!(store.get(sr::VIRTUAL_ALLOCATION), 7 << 20);
    pool.ask("SR.scan", one(pool.local())).await.unwrap();
    assert_eq!(pool.store().state().by_name_label(Vdi::ID, "debian.iso").len(), 1, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_called_missing_ends_with_its_image() {
    let pool = Pool::start().await;
    let disk = pool.disk("comes and goes", 1 << 20).await;
    let uuid = pool.of(disk).await.uuid().to_owned();
    pool.agent.stores.vanish(&uuid);
    pool.ask("SR.scan", one(pool.local())).await.unwrap();
    assert!(pool.of(disk).await.get(vdi::MISSING));
    pool.agent.stores.appear(VolumeState { vdi: uuid.clone(), location: uuid, ..VolumeState::default() });
    pool.ask("VDI.destroy", one(disk)).await.unwrap();
    assert!(pool.agent.stores.volumes().is_empty());
    assert_eq!(pool.store().state().count(Vdi::ID), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_boots_has_its_stores_plugged_again() {
    let pool = Pool::start().await;
    pool.agent.stores.boot();
    pool.until(|state| state.all::<Pbd>().any(|row| !row.get(pbd::CURRENTLY_ATTACHED))).await;
    pool.until(|state| state.all::<Pbd>().all(|row| row.get(pbd::CURRENTLY_ATTACHED))).await;
    assert_eq!(pool.agent.stores.attached().len(), 2);
    assert!(pool.store().state().all::<Pbd>().all(|row| row.get(pbd::OTHER_CONFIG).is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_boots_does_not_wait_for_a_copy_and_takes_no_half_made_image_for_a_disk() {
    use datamodel::enums::StorageOperations;
    let pool = Pool::start().await;
    let stores: Vec<Ref<Sr>> = pool.store().state().all::<Sr>().map(|row| row.typed()).collect();
    let copies = |change: &mut raft_store::Transaction| {
        for store in &stores {
            change.put(*store, sr::CURRENT_OPERATIONS, "OpaqueRef:NULL".to_owned(), StorageOperations::VdiCreate);
        }
    };
    pool.commit(copies).await;
    pool.agent.stores.appear(VolumeState { location: "half made".into(), ..VolumeState::default() });
    pool.agent.stores.boot();
    pool.until(|state| state.all::<Pbd>().any(|row| !row.get(pbd::CURRENTLY_ATTACHED))).await;
    pool.until(|state| state.all::<Pbd>().all(|row| row.get(pbd::CURRENTLY_ATTACHED))).await;
    assert_eq!(pool.store().state().count(Vdi::ID), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_plugged_after_a_boot_is_shown_so() {
    let pool = Pool::start().await;
    pool.agent.stores.fail(1, Fault::Refused(Reason::NoSuchStore));
    pool.agent.stores.boot();
    pool.until(|state| state.all::<Pbd>().any(|row| !row.get(pbd::CURRENTLY_ATTACHED))).await;
    pool.until(|state| state.all::<Pbd>().filter(|row| row.get(pbd::CURRENTLY_ATTACHED)).count() == 1).await;
    pool.quiet().await;
    let left = pool.store().state().all::<Pbd>().find(|row| !row.get(pbd::CURRENTLY_ATTACHED)).unwrap().reference;
    pool.ask("PBD.plug", one(left)).await.unwrap();
    assert!(pool.row(Pbd::ID, left).await.unwrap().get(pbd::CURRENTLY_ATTACHED));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sr_is_made_plugged_unplugged_and_forgotten_in_the_documented_order() {
    let pool = Pool::start().await;
    let host = pool.store().state().all::<datamodel::Host>().next().unwrap().reference.to_string();
    let create = |ty: &str| {
        let config = record(vec![("location", text("here"))]);
        vec![
            text(host.clone()),
            config,
            Input::Int(0),
            text("mine"),
            text(""),
            text(ty),
            text("user"),
            Input::Bool(false),
            Input::Struct(Vec::new()),
        ]
    };
    assert_eq!(pool.refusal("SR.create", create("floppies")).await, ["SR_UNKNOWN_DRIVER", "floppies"]);
    let made: Ref<Sr> = Ref::from_opaque(reference(&pool.ask("SR.create", create("file")).await.unwrap()));
    let uuid = pool.of(made).await.uuid().to_owned();
    assert!(pool.agent.stores.created().contains(&uuid) && pool.agent.stores.attached().contains(&uuid));
    let pbds: Vec<Ref<Pbd>> = pool.of(made).await.get(sr::PBDS);
    assert_eq!(pool.refusal("SR.forget", one(made)).await, ["SR_HAS_PBD", &made.to_string()]);
    assert_eq!(pool.refusal("PBD.destroy", one(pbds[0])).await[0], "OPERATION_NOT_ALLOWED");
    pool.ask("PBD.unplug", one(pbds[0])).await.unwrap();
    assert!(!pool.agent.stores.attached().contains(&uuid));
    let again = record(vec![
        ("host", text(host.clone())),
        ("SR", text(made.to_string())),
        ("device_config", Input::Struct(Vec::new())),
        ("other_config", Input::Struct(Vec::new())),
    ]);
    assert_eq!(pool.refusal("PBD.create", vec![again]).await[0], "PBD_EXISTS");
    pool.ask("SR.destroy", one(made)).await.unwrap();
    assert!(!pool.agent.stores.created().contains(&uuid));
    assert!(pool.row(Sr::ID, made.opaque()).await.is_none() && pool.row(Pbd::ID, pbds[0].opaque()).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_disks_are_in_use_is_not_unplugged() {
    let pool = Pool::start().await;
    let (this, disk) = (pool.vm("user").await, pool.disk("data", 1 << 20).await);
    pool.drive(this, disk, "0", "RW").await;
    pool.turn_on(this).await.unwrap();
    let connection = pool.of(pool.local()).await.get(sr::PBDS)[0];
    assert_eq!(pool.refusal("PBD.unplug", one(connection)).await, ["VDI_IN_USE", &disk.to_string()]);
    pool.ask("VM.hard_shutdown", one(this)).await.unwrap();
    pool.ask("PBD.unplug", one(connection)).await.unwrap();
    let refused = pool.turn_on(this).await.unwrap_err();
    assert_eq!(refused[0], "VM_REQUIRES_SR", "all that is wrong with the only host");
    let host = pool.store().state().all::<datamodel::Host>().next().unwrap().reference.to_string();
    let refused = pool.refusal("VM.assert_can_boot_here", vec![text(this.to_string()), text(host)]).await;
    assert_eq!(refused, ["VM_REQUIRES_SR", &this.to_string(), &pool.local().to_string()]);
}
