//! What a store with bytes in it promises of them, and a directory of images of those.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::*;
use uuid::Uuid;

use crate::common::MIB;
use crate::common::store::*;

pub async fn place(driver: &str) -> Place {
    Place::of(driver).await
}

pub async fn what_is_written_after_a_snapshot_is_in_the_volume_alone(mut place: Place) {
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

pub async fn a_base_with_one_image_left_is_joined_with_it(mut place: Place) {
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
    place.joined(3).await;
    assert!(place.reads(snapshots[1], 1, "1M 1M") && place.reads(snapshots[1], 2, "2M 2M"));
    let step = place.destroy(snapshots[1]);
    place.volume_step(step).await.expect("gone");
    let scanned = place.joined(1).await;
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

pub async fn an_image_that_somebody_has_open_is_in_use_for_everybody_else(mut place: Place) {
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

pub async fn an_image_that_is_none_is_damaged_and_one_that_is_gone_is_not_there(mut place: Place) {
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

pub async fn images_that_came_without_the_pool_are_volumes_under_their_own_names(mut place: Place) {
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

pub async fn memory_of_a_guest_goes_into_an_image_without_a_format(mut place: Place) {
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
