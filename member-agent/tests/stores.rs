//! What every storage driver promises, put to each of them through the agent's own calls; and what those with bytes
//! promise about the bytes.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::store::*;
use common::*;
use member_agent::StoreChoice;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::*;
use uuid::Uuid;

/// For all promises of a driver on a processor that is emulated, beside other tests.
const THE_MACHINES_TIME: std::time::Duration = std::time::Duration::from_secs(280);

/// Promises of a driver that this machine's kernel is enough for.
macro_rules! here {
    ($driver:ident $($promise:ident)+) => {
        mod $driver {
            $(#[tokio::test] async fn $promise() { crate::$promise(crate::Place::of(stringify!($driver)).await).await; })+
        }
    };
}

/// Those of a driver that needs an NFS server or LVM.
macro_rules! in_the_machine {
    ($driver:ident $($promise:ident)+) => {
        mod $driver {
            $(
                #[tokio::test]
                #[ignore = "run in a machine of its own: every_promise_holds_on_…"]
                async fn $promise() { crate::$promise(crate::Place::of(stringify!($driver)).await).await; }
            )+
        }
    };
}

/// What every store promises.
macro_rules! a_store {
    ($where:ident $driver:ident) => {
        $where! { $driver
            a_volume_is_made_grown_and_removed
            a_snapshot_is_read_only_and_a_clone_is_not
            a_repeated_step_is_done_once_and_numbers_tell_steps_apart
            an_agent_that_begins_anew_has_its_stores_and_volumes
            what_is_not_there_is_refused_by_its_name
            a_volume_is_copied_and_goes_back_to_a_snapshot
            a_store_goes_with_all_its_volumes
            a_deposed_master_changes_no_volume
        }
    };
}

a_store!(here file);
a_store!(here ext);
a_store!(here sim);
a_store!(in_the_machine nfs);
a_store!(in_the_machine lvm);

/// What a store with bytes in it promises of them.
mod bytes {
    macro_rules! bytes {
        ($where:ident $driver:ident) => {
            $where! { $driver what_is_written_after_a_snapshot_is_in_the_volume_alone }
        };
    }
    bytes!(here file);
    bytes!(in_the_machine nfs);
    bytes!(in_the_machine lvm);
}

/// What a directory of images promises of them.
mod images {
    macro_rules! images {
        ($where:ident $driver:ident) => {
            $where! { $driver
                a_base_with_one_image_left_is_joined_with_it
                an_image_that_somebody_has_open_is_in_use_for_everybody_else
                an_image_that_is_none_is_damaged_and_one_that_is_gone_is_not_there
                images_that_came_without_the_pool_are_volumes_under_their_own_names
                memory_of_a_guest_goes_into_an_image_without_a_format
            }
        };
    }
    images!(here file);
    images!(in_the_machine nfs);
}

async fn a_volume_is_made_grown_and_removed(mut place: Place) {
    let attach = place.attach();
    let before = place.store_step(attach).await.expect("attached");
    assert!(before.physical_size > 0 && before.physical_utilisation <= before.physical_size);
    let vdi = Uuid::new_v4();
    let create = place.create_of(vdi, 8 * MIB, "user");
    let made = place.volume_step(create).await.expect("made");
    assert_eq!((made.vdi.as_str(), made.virtual_size, made.read_only), (vdi.to_string().as_str(), 8 * MIB, false));
    assert!(!made.location.is_empty() && made.parent.is_empty());

    let resize = place.resize(vdi, 16 * MIB);
    assert_eq!(place.volume_step(resize.clone()).await.expect("grown").virtual_size, 16 * MIB);
    assert_eq!(place.volume_step(resize).await.expect("so large already").virtual_size, 16 * MIB);
    let shrink = place.resize(vdi, 4 * MIB);
    assert_eq!(why(place.volume_step(shrink).await), Reason::Unsupported);

    let state = place.scan().await;
    assert_eq!(state.virtual_allocation, 16 * MIB);
    let [volume] = state.volumes.as_slice() else { panic!("one volume: {state:?}") };
    assert_eq!((volume.virtual_size, volume.location.as_str()), (16 * MIB, made.location.as_str()));
    for _ in 0..2 {
        let destroy = place.destroy(vdi);
        place.volume_step(destroy).await.expect("gone, or gone already");
    }
    assert!(place.vdis().await.is_empty());
}

async fn a_snapshot_is_read_only_and_a_clone_is_not(mut place: Place) {
    let vdi = place.made(8 * MIB).await;
    let (snapshot, clone, second) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let step = place.snapshot(vdi, snapshot);
    let state = place.volume_step(step).await.expect("snapshot");
    assert!(state.read_only && state.virtual_size == 8 * MIB && !state.parent.is_empty());
    assert_eq!(state.vdi, snapshot.to_string());
    let step = place.clone_of(vdi, clone);
    assert!(!place.volume_step(step).await.expect("clone").read_only);
    let step = place.clone_of(snapshot, second);
    assert!(!place.volume_step(step).await.expect("clone of a snapshot").read_only);
    let step = place.resize(snapshot, 16 * MIB);
    assert_eq!(why(place.volume_step(step).await), Reason::Unsupported);
    let all = [vdi, snapshot, clone, second].map(|vdi| vdi.to_string());
    assert_eq!(place.vdis().await, all.into());
    // In any order: none of them needs another one's name.
    for vdi in [snapshot, vdi, second] {
        let step = place.destroy(vdi);
        place.volume_step(step).await.expect("gone");
    }
    assert_eq!(place.vdis().await, [clone.to_string()].into());
}

async fn a_repeated_step_is_done_once_and_numbers_tell_steps_apart(mut place: Place) {
    let operation = operation();
    let (vdi, other) = (Uuid::new_v4(), Uuid::new_v4());
    let create = place.create_of(vdi, 8 * MIB, "user");
    let first = place.step_as(&operation, 1, create.clone()).await.expect("made");
    assert_eq!(place.step_as(&operation, 1, create.clone()).await.expect("remembered"), first);
    assert_eq!(why(place.step(create).await), Reason::VolumeExists);
    let create = place.create_of(other, 8 * MIB, "user");
    let second = place.step_as(&operation, 2, create).await.expect("another one");
    assert_ne!(first, second);
    assert_eq!(place.vdis().await, [vdi.to_string(), other.to_string()].into());
}

async fn an_agent_that_begins_anew_has_its_stores_and_volumes(mut place: Place) {
    let attach = place.attach();
    place.store_step(attach).await.expect("attached");
    let vdi = place.made(8 * MIB).await;
    place.host.stop_agent().await;
    let kept = fs::read_to_string(place.host.config.state_dir.join("stores.json")).expect("kept");
    assert!(kept.contains(&place.store.sr));
    place.host.start_agent().await;
    place.client = place.host.client().await;
    assert_eq!(place.vdis().await, [vdi.to_string()].into());
}

async fn what_is_not_there_is_refused_by_its_name(mut place: Place) {
    let attach = place.attach();
    place.store_step(attach).await.expect("attached");
    let (none, into) = (Uuid::new_v4(), Uuid::new_v4());
    for step in [place.snapshot(none, into), place.resize(none, MIB), place.copy(none, into), place.revert(none, into)]
    {
        let refusal = place.volume_step(step).await.expect_err("no such volume");
        assert_eq!(refusal.reason(), Reason::NoSuchVolume);
        assert!(refusal.detail.contains(&none.to_string()), "{refusal:?}");
    }
    let mut outside = place.volume(none);
    outside.as_mut().unwrap().location = "../../ledger.jsonl".to_owned();
    let step = Action::DestroyVolume(DestroyVolume { volume: outside });
    assert_eq!(why(place.volume_step(step).await), Reason::NoSuchVolume);
    assert!(place.host.config.state_dir.join("ledger.jsonl").exists());
    place.store.driver = "tape".to_owned();
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach).await), Reason::Unsupported);
}

async fn a_volume_is_copied_and_goes_back_to_a_snapshot(mut place: Place) {
    let vdi = place.made(8 * MIB).await;
    let (snapshot, copy) = (Uuid::new_v4(), Uuid::new_v4());
    let step = place.snapshot(vdi, snapshot);
    place.volume_step(step).await.expect("snapshot");
    let step = place.resize(vdi, 16 * MIB);
    place.volume_step(step).await.expect("grown");
    let step = place.copy(vdi, copy);
    let copied = place.volume_step(step).await.expect("copied");
    assert_eq!((copied.virtual_size, copied.read_only, copied.parent.as_str()), (16 * MIB, false, ""));
    let step = place.copy(vdi, snapshot);
    assert_eq!(why(place.volume_step(step).await), Reason::Unsupported);
    let step = place.revert(vdi, snapshot);
    assert_eq!(place.volume_step(step).await.expect("goes back").virtual_size, 8 * MIB);
    let step = place.revert(vdi, copy);
    assert_eq!(why(place.volume_step(step).await), Reason::Unsupported);
    assert_eq!(place.scan().await.volumes.len(), 3);
}

async fn a_store_goes_with_all_its_volumes(mut place: Place) {
    let attach = place.attach();
    place.store_step(attach.clone()).await.expect("attached");
    place.made(8 * MIB).await;
    for _ in 0..2 {
        let detach = Action::DetachStore(DetachStore { store: Some(place.store.clone()) });
        place.store_step(detach).await.expect("detached, or was");
    }
    let destroy = Action::DestroyStore(DestroyStore { store: Some(place.store.clone()) });
    place.store_step(destroy).await.expect("destroyed");
    let create = Action::CreateStore(CreateStore { store: Some(place.store.clone()), physical_size: 0 });
    place.store_step(create).await.expect("made anew");
    let probe = Action::ProbeStore(ProbeStore { store: Some(place.store.clone()) });
    let probed = place.store_step(probe).await.expect("probed").probed;
    assert_eq!((probed.len(), probed[0].sr.as_str()), (1, place.store.sr.as_str()));
    place.store_step(attach).await.expect("attached");
    assert!(place.vdis().await.is_empty());
}

async fn a_deposed_master_changes_no_volume(mut place: Place) {
    let vdi = place.made(8 * MIB).await;
    place.client.epoch += 1;
    let attach = place.attach();
    place.store_step(attach).await.expect("the next master");
    place.client.epoch -= 1;
    let destroy = place.destroy(vdi);
    assert_eq!(why(place.volume_step(destroy).await), Reason::StaleEpoch);
    place.client.epoch += 1;
    assert_eq!(place.vdis().await, [vdi.to_string()].into());
}

async fn what_is_written_after_a_snapshot_is_in_the_volume_alone(mut place: Place) {
    let vdi = place.made(64 * MIB).await;
    place.write(vdi, 1, "0 4M");
    let (snapshot, clone, copy) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let step = place.snapshot(vdi, snapshot);
    place.volume_step(step).await.expect("snapshot");
    place.write(vdi, 2, "1M 1M");
    let step = place.clone_of(snapshot, clone);
    place.volume_step(step).await.expect("clone");
    place.write(clone, 3, "2M 1M");
    let step = place.copy(vdi, copy);
    let copied = place.volume_step(step).await.expect("copy");
    assert!(copied.physical_utilisation >= 4 * MIB && copied.physical_utilisation < 8 * MIB, "{copied:?}");
    assert!(place.reads(snapshot, 1, "0 4M"));
    assert!(place.reads(vdi, 1, "0 1M") && place.reads(vdi, 2, "1M 1M") && place.reads(vdi, 1, "2M 2M"));
    assert!(place.reads(clone, 1, "0 2M") && place.reads(clone, 3, "2M 1M"));
    assert!(place.reads(copy, 2, "1M 1M") && place.reads(copy, 0, "4M 4M"));
    let step = place.revert(vdi, snapshot);
    place.volume_step(step).await.expect("goes back");
    assert!(place.reads(vdi, 1, "0 4M"));
    place.all_clean();
}

async fn a_base_with_one_image_left_is_joined_with_it(mut place: Place) {
    let vdi = place.made(64 * MIB).await;
    let mut snapshots = Vec::new();
    for pattern in 1..4 {
        place.write(vdi, pattern, &format!("{pattern}M 2M"));
        let snapshot = Uuid::new_v4();
        let step = place.snapshot(vdi, snapshot);
        place.volume_step(step).await.expect("snapshot");
        snapshots.push(snapshot);
    }
    place.write(vdi, 4, "4M 2M");
    place.scan().await;
    assert_eq!(place.images().len(), 7, "a scan joins nothing that somebody needs");
    for snapshot in [snapshots[0], snapshots[2]] {
        let step = place.destroy(snapshot);
        place.volume_step(step).await.expect("gone");
    }
    place.scan().await;
    assert_eq!(place.images().len(), 3, "{:?}", place.images());
    assert!(place.reads(snapshots[1], 1, "1M 1M") && place.reads(snapshots[1], 2, "2M 2M"));
    let step = place.destroy(snapshots[1]);
    place.volume_step(step).await.expect("gone");
    let scanned = place.scan().await;
    assert_eq!(place.images().len(), 1);
    assert!(scanned.volumes[0].parent.is_empty());
    for (pattern, range) in [(1, "1M 1M"), (2, "2M 1M"), (3, "3M 1M"), (4, "4M 2M")] {
        assert!(place.reads(vdi, pattern, range), "{range}");
    }
    place.all_clean();
}

/// qemu-io with an image open to write, as a guest has it.
struct Holder(Child);

impl Holder {
    fn of(path: &Path) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("runs");
        // It answers when it has the image open. Whoever looked at the image meanwhile would be in its way.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = [0; 64];
        let mut said = String::new();
        while !said.contains("MiB") {
            let count = child.stdout.as_mut().unwrap().read(&mut answer).unwrap();
            assert!(count > 0, "qemu-io ended: {said}");
            said.push_str(&String::from_utf8_lossy(&answer[..count]));
        }
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn an_image_that_somebody_has_open_is_in_use_for_everybody_else(mut place: Place) {
    let vdi = place.made(64 * MIB).await;
    let (snapshot, copy) = (Uuid::new_v4(), Uuid::new_v4());
    let step = place.snapshot(vdi, snapshot);
    place.volume_step(step).await.expect("snapshot");
    let holder = Holder::of(&place.path(vdi));
    let steps = [
        place.resize(vdi, 128 * MIB),
        place.revert(vdi, snapshot),
        place.destroy(vdi),
        place.copy(vdi, copy),
        place.clone_of(vdi, copy),
    ];
    for step in steps {
        let refusal = place.volume_step(step.clone()).await.expect_err("in use");
        assert_eq!(refusal.reason(), Reason::InUse, "{step:?}: {refusal:?}");
    }
    drop(holder);
    let step = place.destroy(vdi);
    place.volume_step(step).await.expect("at rest");
    assert_eq!(place.vdis().await, [snapshot.to_string()].into());
    place.all_clean();
}

async fn an_image_that_is_none_is_damaged_and_one_that_is_gone_is_not_there(mut place: Place) {
    let (whole, torn, gone) = (place.made(8 * MIB).await, place.made(8 * MIB).await, place.made(8 * MIB).await);
    fs::write(fs::canonicalize(place.path(torn)).unwrap(), b"junk").unwrap();
    fs::remove_file(fs::canonicalize(place.path(gone)).unwrap()).unwrap();
    let into = Uuid::new_v4();
    for (vdi, reason) in [(torn, Reason::Damaged), (gone, Reason::NoSuchVolume)] {
        for step in [place.resize(vdi, 16 * MIB), place.snapshot(vdi, into), place.copy(vdi, into)] {
            assert_eq!(why(place.volume_step(step).await), reason);
        }
    }
    // What cannot be told is not told, and the rest is; both can be removed.
    assert_eq!(place.vdis().await, [whole.to_string()].into());
    for vdi in [torn, gone] {
        let step = place.destroy(vdi);
        place.volume_step(step).await.expect("removed");
    }
    assert_eq!(place.images().len(), 1);
}

async fn images_that_came_without_the_pool_are_volumes_under_their_own_names(mut place: Place) {
    let attach = place.attach();
    place.store_step(attach).await.expect("attached");
    ran(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "debian.qcow2", "8M"]).current_dir(place.dir()));
    let found = place.scan().await.volumes;
    assert_eq!((found[0].vdi.as_str(), found[0].location.as_str()), ("", "debian.qcow2"));
    assert_eq!(found[0].name, "debian");
    let clone = Uuid::new_v4();
    let mut volume = place.volume(Uuid::nil());
    volume.as_mut().unwrap().location = "debian.qcow2".to_owned();
    let step = Action::CloneVolume(CloneVolume { volume, into: clone.to_string() });
    place.volume_step(step).await.expect("clone");
    let found: BTreeSet<_> = place.scan().await.volumes.into_iter().map(|volume| volume.location).collect();
    assert_eq!(found, [format!("{clone}.qcow2"), "debian.qcow2".to_owned()].into());
    place.all_clean();
}

async fn memory_of_a_guest_goes_into_an_image_without_a_format(mut place: Place) {
    let vdi = Uuid::new_v4();
    let create = place.create_of(vdi, 8 * MIB, "suspend");
    let made = place.volume_step(create).await.expect("made");
    assert_eq!(made.location, format!("{vdi}.raw"));
    assert_eq!(fs::metadata(place.dir().join(&made.location)).unwrap().len(), 8 * MIB);
    let clone = Uuid::new_v4();
    let step = place.clone_of(vdi, clone);
    assert_eq!(place.volume_step(step).await.expect("cloned").location, format!("{clone}.raw"));
    let huge = Uuid::new_v4();
    let create = place.create_of(huge, 1 << 50, "suspend");
    let refusal = place.volume_step(create).await.expect_err("no disk is so large");
    assert_eq!((refusal.reason(), refusal.needed), (Reason::NoSpace, 1 << 50));
    assert!(refusal.available > 0 && refusal.available < refusal.needed);
}

/// A small file system, or none where this user may not mount.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mut command = Command::new("mount");
        let mounted = command.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(at).output().unwrap();
        if !mounted.status.success() {
            eprintln!("not tested: this user may not mount");
            return None;
        }
        Some(Self(at.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test]
async fn a_full_store_says_how_much_is_missing_and_keeps_nothing_of_what_did_not_fit() {
    let mut place = Place::of("file").await;
    let Some(_small) = Small::mount(&place.host.config.state_dir.join("storage/local"), "6m") else { return };
    let vdi = place.made(64 * MIB).await;
    place.write(vdi, 7, "0 3M");
    let before = place.scan().await;
    assert!(before.physical_size == 6 * MIB && before.physical_utilisation >= 3 * MIB, "{before:?}");
    let (copy, clone) = (Uuid::new_v4(), Uuid::new_v4());
    let step = place.copy(vdi, copy);
    let refusal = place.volume_step(step).await.expect_err("does not fit");
    assert_eq!(refusal.reason(), Reason::NoSpace, "{refusal:?}");
    assert!(refusal.needed > refusal.available && refusal.available > MIB, "{refusal:?}");
    let after = place.scan().await;
    assert_eq!((after.physical_utilisation, after.volumes.len()), (before.physical_utilisation, 1));
    // Until there is no room for even an empty image.
    let filler = place.dir().join("filler");
    let _ = fs::write(&filler, vec![1; 6 * 1024 * 1024]);
    for step in [place.clone_of(vdi, clone), place.create_of(clone, 8 * MIB, "user")] {
        assert_eq!(why(place.volume_step(step).await), Reason::NoSpace);
    }
    assert_eq!(place.vdis().await, [vdi.to_string()].into());
    fs::remove_file(filler).unwrap();
    let step = place.clone_of(vdi, clone);
    place.volume_step(step).await.expect("there is room again");
    place.all_clean();
}

#[tokio::test]
async fn cd_images_are_volumes_of_their_names_that_nobody_changes() {
    let host = Host::start_with("sim", |config| config.stores = StoreChoice::Real).await;
    let discs = host.config.state_dir.join("discs");
    fs::create_dir(&discs).unwrap();
    fs::write(discs.join("Debian 13.iso"), vec![1; 4096]).unwrap();
    fs::write(discs.join("notes.txt"), b"none").unwrap();
    let config = HashMap::from([("location".to_owned(), discs.display().to_string())]);
    let mut place = Place::on(host, "iso", config).await;
    let found = place.scan().await.volumes;
    let [disc] = found.as_slice() else { panic!("one disc: {found:?}") };
    assert_eq!((disc.location.as_str(), disc.name.as_str()), ("Debian 13.iso", "Debian 13"));
    assert!(disc.read_only && disc.virtual_size == 4096 && disc.vdi.is_empty());
    let create = place.create_of(Uuid::new_v4(), MIB, "user");
    assert_eq!(why(place.volume_step(create).await), Reason::Unsupported);
    place.store.device_config.insert("location".to_owned(), "/there/is/none".to_owned());
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach).await), Reason::NoSuchStore);
    place.store.device_config.clear();
    let attach = place.attach();
    let refusal = place.store_step(attach).await.expect_err("no location");
    assert_eq!(refusal.reason(), Reason::BadConfig);
    assert!(refusal.detail.starts_with("location"), "{refusal:?}");
}

#[tokio::test]
async fn one_directory_is_not_two_stores() {
    let host = Host::start_with("sim", |config| config.stores = StoreChoice::Real).await;
    let dir = host.config.state_dir.join("images");
    fs::create_dir(&dir).unwrap();
    let config = HashMap::from([("location".to_owned(), dir.display().to_string())]);
    let mut place = Place::on(host, "file", config).await;
    let attach = place.attach();
    place.store_step(attach).await.expect("attached");
    place.store.sr = Uuid::new_v4().to_string();
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach).await), Reason::BadConfig);
}

#[tokio::test]
async fn a_device_is_formatted_mounted_known_again_and_let_go_of() {
    let host = Host::start_with("sim", |config| config.stores = StoreChoice::Real).await;
    // Which loop devices there are is the kernel's business; without any this cannot be tried.
    if !Command::new("losetup").arg("-f").output().is_ok_and(|output| output.status.success()) {
        eprintln!("not tested: this user has no loop device");
        return;
    }
    let device = host.config.state_dir.join("device");
    fs::File::create(&device).unwrap().set_len(32 * MIB).unwrap();
    let config = HashMap::from([("device".to_owned(), device.display().to_string())]);
    let mut place = Place::on(host, "ext", config).await;
    let store = Some(place.store.clone());
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach.clone()).await), Reason::NoSuchStore);
    let create = Action::CreateStore(CreateStore { store: store.clone(), physical_size: 0 });
    place.store_step(create).await.expect("made");
    let probed =
        place.store_step(Action::ProbeStore(ProbeStore { store: store.clone() })).await.expect("probed").probed;
    assert_eq!(probed[0].sr, place.store.sr);
    let size = place.store_step(attach.clone()).await.expect("attached").physical_size;
    assert!(size > 16 * MIB && size < 32 * MIB, "{size}");
    let vdi = place.made(8 * MIB).await;
    // The agent dies and comes back; the file system is still there, and so is what is in it.
    place.host.stop_agent().await;
    place.host.start_agent().await;
    place.client = place.host.client().await;
    let mut other = place.store.clone();
    other.sr = Uuid::new_v4().to_string();
    let attach_other = Action::AttachStore(AttachStore { store: Some(other) });
    assert_eq!(why(place.store_step(attach_other).await), Reason::BadConfig);
    let detach = Action::DetachStore(DetachStore { store: store.clone() });
    place.store_step(detach.clone()).await.expect("let go of");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&place.store.sr), "{mounts}");
    assert_eq!(place.vdis().await, [vdi.to_string()].into());
    place.store_step(detach).await.expect("let go of");
}

/// Programs of ours in the place of the machine's.
fn programs(host: &mut Host, scripts: &[(&str, &str)]) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let dir = host.dir.path().join("programs");
    fs::create_dir_all(&dir).unwrap();
    for (name, script) in scripts {
        fs::write(dir.join(name), format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    host.config.programs = Some(dir.clone());
    dir
}

/// What is said to mount. A directory takes its place, and all but the mount itself is real.
#[tokio::test]
async fn an_export_is_mounted_for_its_store_and_unmounted_after_it() {
    let mut host = Host::without_agent("sim", |config| config.stores = StoreChoice::Real);
    let export = host.dir.path().join("export");
    let Some(small) = Small::mount(&export, "16m") else { return };
    let script = format!(
        "echo \"$@\" >> {0}/asked\n[ \"$4\" = ok ] && exit 1\nfor point; do :; done\nexec /bin/mount --bind {1} \"$point\"",
        host.dir.path().display(),
        export.display()
    );
    programs(&mut host, &[("mount", &script)]);
    host.start_agent().await;
    let config = [("server", "10.0.0.7"), ("serverpath", "/srv/vms"), ("nfsversion", "4.1")];
    let config = config.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mut place = Place::on(host, "nfs", config).await;
    let store = Some(place.store.clone());
    let mounted =
        || fs::read_to_string("/proc/self/mounts").unwrap().contains(&format!("mounts/{}", store.as_ref().unwrap().sr));
    let attach = place.attach();
    let refusal = place.store_step(attach.clone()).await.expect_err("there is no such store yet");
    assert_eq!(refusal.reason(), Reason::NoSuchStore);
    assert!(refusal.detail.contains("10.0.0.7:/srv/vms") && !mounted(), "{refusal:?}");
    place.store_step(Action::CreateStore(CreateStore { store: store.clone(), physical_size: 0 })).await.expect("made");
    let probed =
        place.store_step(Action::ProbeStore(ProbeStore { store: store.clone() })).await.expect("probed").probed;
    assert_eq!((probed.len(), probed[0].sr.as_str()), (1, place.store.sr.as_str()));
    assert!(!mounted());
    assert_eq!(place.store_step(attach).await.expect("attached").physical_size, 16 * MIB);
    place.made(8 * MIB).await;
    assert!(mounted() && export.join(&place.store.sr).is_dir());
    place.store_step(Action::DetachStore(DetachStore { store: store.clone() })).await.expect("let go of");
    assert!(!mounted());
    let asked = fs::read_to_string(place.host.dir.path().join("asked")).unwrap();
    assert!(
        asked.lines().all(|line| line.starts_with("-t nfs -o soft,") && line.contains(",vers=4.1 10.0.0.7:/srv/vms /"))
    );
    for (key, value) in [("server", "a,b"), ("serverpath", "srv"), ("nfsversion", "5"), ("server", "")] {
        let mut other = place.store.clone();
        other.device_config.insert(key.to_owned(), value.to_owned());
        let refusal = place.store_step(Action::AttachStore(AttachStore { store: Some(other) })).await.expect_err(value);
        assert_eq!(refusal.reason(), Reason::BadConfig);
        assert!(refusal.detail.starts_with(key), "{refusal:?}");
    }
    // Before the directory that it is in.
    drop(small);
}

#[tokio::test]
async fn an_export_that_cannot_be_mounted_is_no_store_and_says_what_mount_said() {
    let mut host = Host::without_agent("sim", |config| config.stores = StoreChoice::Real);
    programs(&mut host, &[("mount", "echo 'mount.nfs: Connection refused' >&2; exit 32")]);
    host.start_agent().await;
    let config = [("server", "10.0.0.7"), ("serverpath", "/srv/vms")];
    let config = config.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mut place = Place::on(host, "nfs", config).await;
    let attach = place.attach();
    let refusal = place.store_step(attach).await.expect_err("no server");
    assert_eq!(refusal.reason(), Reason::NoSuchStore);
    assert!(refusal.detail.contains("Connection refused"), "{refusal:?}");
}

/// A volume group of files: name, size and permission. It knows the words that the driver uses, as LVM's manuals have
/// them, and nothing else.
const VOLUME_GROUP: &str = r#"
cd "$(dirname "$0")" && mkdir -p group && me=$(basename "$0")
echo "$me $*" >> said
value() { want=$1; shift; while [ $# -gt 1 ]; do [ "$1" = "$want" ] && { echo "$2"; return; }; shift; done; }
for last; do :; done; lv=${last##*/}; name=$(value -n "$@")
case $me in
  vgcreate) touch group/.made ;;
  vgremove) rm -rf group ;;
  pvs) [ -e group/.made ] && echo "  $(cat named)" || true ;;
  pvcreate|pvremove|vgchange|lvchange) ;;
  lvcreate) case "$*" in
      *thin-pool*) echo "${last}" > named; echo "1000000000 rw" > group/pool ;;
      *--thinpool*) size=$(value -V "$@"); echo "${size%b} rw" > "group/$name" ;;
      *) read -r size _ < "group/$lv" && echo "$size $(value -p "$@")" > "group/$name" ;;
    esac ;;
  lvresize) size=$(value -L "$@"); read -r _ mode < "group/$lv" && echo "${size%b} $mode" > "group/$lv" ;;
  lvrename) shift 2; mv "group/$1" "group/$2" ;;
  lvremove) rm "group/$lv" ;;
  lvs) [ -e group/.made ] || { echo "  Volume group \"$last\" not found" >&2; exit 5; }
    printf '{"report":[{"lv":['; comma=
    for file in group/*; do read -r size mode < "$file"
      [ "$mode" = r ] && attr=Vri-a-tz-- || attr=Vwi-a-tz--
      printf '%s{"lv_name":"%s","lv_size":"%s","lv_attr":"%s","data_percent":"10.00","origin":""}' "$comma" "${file##*/}" "$size" "$attr"; comma=,
    done; echo ']}]}' ;;
  *) echo "unknown: $me" >&2; exit 1 ;;
esac
"#;

/// What is said to LVM, also after a crash between two of its commands.
#[tokio::test]
async fn volumes_of_a_volume_group_come_from_its_pool_and_go_back_by_their_names() {
    let mut host = Host::without_agent("sim", |config| config.stores = StoreChoice::Real);
    let names = ["pvcreate", "vgcreate", "lvcreate", "lvs", "pvs", "lvresize", "lvrename", "lvremove", "vgchange"];
    let more = ["lvchange", "vgremove", "pvremove"];
    let scripts: Vec<_> = names.into_iter().chain(more).map(|name| (name, VOLUME_GROUP)).collect();
    let dir = programs(&mut host, &scripts);
    host.start_agent().await;
    let config = HashMap::from([("device".to_owned(), "/dev/sdx,/dev/sdy".to_owned())]);
    let mut place = Place::on(host, "lvm", config).await;
    let store = Some(place.store.clone());
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach.clone()).await), Reason::NoSuchStore);
    place.store_step(Action::CreateStore(CreateStore { store: store.clone(), physical_size: 0 })).await.expect("made");
    let probed =
        place.store_step(Action::ProbeStore(ProbeStore { store: store.clone() })).await.expect("probed").probed;
    assert_eq!(probed[0].sr, place.store.sr);
    let sizes = place.store_step(attach).await.expect("attached");
    assert_eq!((sizes.physical_size, sizes.physical_utilisation), (1_000_000_000, 100_000_000));
    let vdi = place.made(8 * MIB).await;
    let (snapshot, clone) = (Uuid::new_v4(), Uuid::new_v4());
    let step = place.snapshot(vdi, snapshot);
    assert!(place.volume_step(step).await.expect("snapshot").read_only);
    let step = place.clone_of(vdi, clone);
    assert!(!place.volume_step(step).await.expect("clone").read_only);
    let step = place.resize(vdi, 16 * MIB);
    assert_eq!(place.volume_step(step).await.expect("grown").virtual_size, 16 * MIB);
    let step = place.revert(vdi, snapshot);
    assert_eq!(place.volume_step(step).await.expect("goes back").virtual_size, 8 * MIB);
    // Died on the way back: the old name is put aside, and the new one is there or not.
    fs::rename(dir.join(format!("group/{vdi}")), dir.join(format!("group/old-{vdi}"))).unwrap();
    assert!(place.vdis().await.contains(&vdi.to_string()));
    fs::rename(dir.join(format!("group/{vdi}")), dir.join(format!("group/old-{vdi}"))).unwrap();
    fs::copy(dir.join(format!("group/{clone}")), dir.join(format!("group/new-{vdi}"))).unwrap();
    assert_eq!(place.vdis().await, [vdi, snapshot, clone].map(|vdi| vdi.to_string()).into());
    let left = fs::read_dir(dir.join("group")).unwrap().filter_map(Result::ok).map(|entry| entry.file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().contains(&format!("-{vdi}"))));
    for vdi in [vdi, snapshot, clone] {
        let step = place.destroy(vdi);
        place.volume_step(step).await.expect("gone");
    }
    place.store_step(Action::DestroyStore(DestroyStore { store })).await.expect("destroyed");
    let said = fs::read_to_string(dir.join("said")).unwrap();
    assert!(said.contains("pvcreate -q -y -ff /dev/sdx /dev/sdy\n"), "{said}");
    assert!(
        said.contains(&format!("lvcreate -q -y -s -kn -p r -n {snapshot} xenith-{}/{vdi}\n", place.store.sr)),
        "{said}"
    );
}

#[tokio::test]
async fn every_promise_holds_on_a_real_nfs_server() {
    every_promise_holds_in_the_machine("nfs").await;
}

#[tokio::test]
async fn every_promise_holds_on_real_lvm() {
    every_promise_holds_in_the_machine("lvm").await;
}

/// This kernel may have no NFS and no LVM; one that has runs this very program, with the tests that are left out here.
async fn every_promise_holds_in_the_machine(driver: &str) {
    let dir = tempfile::tempdir().unwrap();
    let disk = |name: &str, size: u64| {
        let path = dir.path().join(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        format!("if=virtio,format=raw,cache=unsafe,file={}", path.display())
    };
    let program = format!("if=virtio,format=raw,readonly=on,file={}", std::env::current_exe().unwrap().display());
    let words = format!("console=ttyS0 quiet panic=-1 -- --ignored --test-threads=1 {driver}::");
    let mut machine = tokio::process::Command::new("qemu-system-x86_64");
    machine.args(["-accel", "tcg", "-m", "640", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    machine.arg("-kernel").arg(guest().join("vmlinuz")).arg("-initrd").arg(machine_for_storage());
    machine.args(["-append", &words]);
    for drive in [disk("export", 256 * MIB), disk("group", 512 * MIB), program] {
        machine.args(["-drive", &drive]);
    }
    machine.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(THE_MACHINES_TIME, machine.output()).await.expect("it ends").unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(said.contains("XENITH-ENDED 0"), "{said}");
    assert!(said.contains(&format!("test {driver}::a_volume_is_made_grown_and_removed ... ok")), "{said}");
}

#[tokio::test]
async fn simulated_stores_fail_and_are_full_on_order() {
    let mut place = Place::of("sim").await;
    place.store.device_config.insert("physical_size".to_owned(), (20 * MIB).to_string());
    let vdi = place.made(8 * MIB).await;
    let create = place.create_of(Uuid::new_v4(), 16 * MIB, "user");
    let refusal = place.volume_step(create).await.expect_err("full");
    assert_eq!((refusal.reason(), refusal.needed, refusal.available), (Reason::NoSpace, 16 * MIB, 12 * MIB));
    place.host.order("[[fail_next]]\nstep = \"snapshot_volume\"\nreason = \"failed\"\ndetail = \"on order\"\n");
    let step = place.snapshot(vdi, Uuid::new_v4());
    let refusal = place.volume_step(step.clone()).await.expect_err("on order");
    assert_eq!((refusal.reason(), refusal.detail.as_str()), (Reason::Failed, "on order"));
    let step = place.snapshot(vdi, Uuid::new_v4());
    place.volume_step(step).await.expect("only once");
}
