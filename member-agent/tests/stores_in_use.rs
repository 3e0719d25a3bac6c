//! What stores promise of a volume that a guest writes to meanwhile: with a real guest, on real images.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use common::store::*;
use common::*;
use member_agent::StoreChoice;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::*;
use std::collections::HashMap;
use uuid::Uuid;

/// A guest whose disk is a volume.
struct Guest {
    place: Place,
    vm: Uuid,
    vdi: Uuid,
}

fn disk(place: &Place, vdi: Uuid) -> Disk {
    Disk { vbd: "vbd".into(), device: "xvda".into(), volume: place.volume(vdi), ..Disk::default() }
}

impl Guest {
    async fn booted() -> Self {
        let host = Host::start_with("qemu", |config| config.stores = StoreChoice::Real).await;
        let config = HashMap::from([("location".to_owned(), "local".to_owned())]);
        let mut place = Place::on(host, "file", config).await;
        let vdi = place.made(64 * MIB).await;
        let vm = Uuid::new_v4();
        let spec = DomainSpec { disks: vec![disk(&place, vdi)], ..spec(vm) };
        place.client.step(vm, start(spec)).await.expect("starts");
        let guest = Self { place, vm, vdi };
        guest.writes(1).await;
        guest
    }

    /// The guest writes a number into that megabyte of its disk, and has it on disk.
    async fn writes(&self, number: u8) {
        let command = format!(
            "tr '\\0' '\\{number:03o}' < /dev/zero | dd of=/dev/vda bs=64k count=16 iflag=fullblock seek={} conv=notrunc,fsync 2>/dev/null && echo ok",
            u32::from(number) * 16
        );
        self.place.host.guest_says(self.vm, &command, "ok").await;
    }

    async fn dies(&mut self) {
        self.place.client.step(self.vm, destroy()).await.expect("destroyed");
    }
}

fn megabyte(number: u8) -> String {
    format!("{number}M 1M")
}

#[tokio::test]
async fn a_volume_in_use_is_snapshotted_grown_and_joined_under_its_guest() {
    let mut guest = Guest::booted().await;
    let (vdi, vm) = (guest.vdi, guest.vm);
    let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
    for (number, snapshot) in [(2, first), (3, second)] {
        let step = guest.place.snapshot(vdi, snapshot);
        guest.place.volume_step(step).await.expect("snapshot");
        guest.writes(number).await;
    }
    let step = guest.place.resize(vdi, 128 * MIB);
    assert_eq!(guest.place.volume_step(step).await.expect("grows").virtual_size, 128 * MIB);
    guest.place.host.guest_says(vm, "cat /sys/block/vda/size", "262144").await;

    // What is in use is nobody else's.
    let other = Uuid::new_v4();
    let again = DomainSpec { disks: vec![disk(&guest.place, vdi)], ..spec(other) };
    assert_eq!(reason(guest.place.client.step(other, start(again)).await), Reason::InUse);
    for step in [guest.place.destroy(vdi), guest.place.revert(vdi, first), guest.place.copy(vdi, Uuid::new_v4())] {
        assert_eq!(why(guest.place.volume_step(step).await), Reason::InUse);
    }
    let detach = Action::DetachStore(DetachStore { store: Some(guest.place.store.clone()) });
    assert_eq!(why(guest.place.store_step(detach).await), Reason::InUse);

    // Its snapshots are everybody's.
    let (copy, clone) = (Uuid::new_v4(), Uuid::new_v4());
    let step = guest.place.copy(first, copy);
    guest.place.volume_step(step).await.expect("copied");
    let step = guest.place.clone_of(second, clone);
    guest.place.volume_step(step).await.expect("cloned");
    assert!(guest.place.reads(copy, 1, &megabyte(1)) && guest.place.reads(copy, 0, &megabyte(2)));
    assert!(guest.place.reads(clone, 2, &megabyte(2)) && guest.place.reads(clone, 0, &megabyte(3)));

    for gone in [first, second, clone, copy] {
        let step = guest.place.destroy(gone);
        guest.place.volume_step(step).await.expect("gone");
    }
    // Joining may have begun by itself, and a scan leaves that to whoever is at it.
    let begun = std::time::Instant::now();
    while guest.place.images().len() != 1 {
        assert!(begun.elapsed() < PATIENCE, "{:?}", guest.place.images());
        guest.place.scan().await;
    }
    guest.writes(4).await;
    // The next agent knows it all.
    guest.place.host.stop_agent().await;
    guest.place.host.start_agent().await;
    guest.place.client = guest.place.host.client().await;
    let step = guest.place.snapshot(vdi, first);
    guest.place.volume_step(step).await.expect("snapshot");
    guest.writes(5).await;
    // Killed, as by a host that is out of memory: what it leaves in its images a scan mends.
    let pid = guest.place.host.pid(vm);
    kill(pid);
    eventually("the guest is gone", || !guest.place.host.processes().contains(&pid)).await;
    guest.place.scan().await;
    for number in 1..6 {
        assert!(guest.place.reads(vdi, number, &megabyte(number)), "megabyte {number}");
    }
    assert!(guest.place.reads(first, 4, &megabyte(4)) && guest.place.reads(first, 0, &megabyte(5)));
    guest.place.all_clean();
}

#[tokio::test]
async fn a_snapshot_that_an_agent_died_in_before_the_guest_went_over_is_taken_by_the_next() {
    let mut guest = Guest::booted().await;
    let vdi = guest.vdi;
    // What such an agent leaves: the volume's name goes to an empty image, the guest writes to the one below.
    guest.place.host.stop_agent().await;
    let dir = guest.place.dir();
    let base = fs::read_link(guest.place.path(vdi)).unwrap();
    let above = format!("image-{}.qcow2", Uuid::new_v4());
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&base).args([&above, "64M"]);
    ran(create.current_dir(&dir));
    symlink(&above, dir.join("link-x")).unwrap();
    fs::rename(dir.join("link-x"), guest.place.path(vdi)).unwrap();
    guest.place.host.start_agent().await;
    guest.place.client = guest.place.host.client().await;
    guest.writes(2).await;
    // Neither a scan nor another step takes it for a volume at rest.
    guest.place.scan().await;
    let step = guest.place.destroy(vdi);
    assert_eq!(why(guest.place.volume_step(step).await), Reason::InUse);
    let snapshot = Uuid::new_v4();
    let step = guest.place.snapshot(vdi, snapshot);
    guest.place.volume_step(step).await.expect("snapshot");
    guest.writes(3).await;
    guest.dies().await;
    for number in 1..4 {
        assert!(guest.place.reads(vdi, number, &megabyte(number)), "megabyte {number}");
    }
    assert!(guest.place.reads(snapshot, 2, &megabyte(2)) && guest.place.reads(snapshot, 0, &megabyte(3)));
    guest.place.all_clean();
}

#[tokio::test]
async fn a_domain_whose_volume_is_gone_or_damaged_is_not_built() {
    let host = Host::start_with("qemu", |config| config.stores = StoreChoice::Real).await;
    let config = HashMap::from([("location".to_owned(), "local".to_owned())]);
    let mut place = Place::on(host, "file", config).await;
    let torn = place.made(8 * MIB).await;
    fs::write(fs::canonicalize(place.path(torn)).unwrap(), b"junk").unwrap();
    for (vdi, reason) in [(Uuid::new_v4(), Reason::NoSuchVolume), (torn, Reason::Damaged)] {
        let vm = Uuid::new_v4();
        let spec = DomainSpec { disks: vec![disk(&place, vdi)], ..spec(vm) };
        assert_eq!(common::reason(place.client.step(vm, start(spec)).await), reason);
        assert!(!place.host.domain_dir(vm).exists());
    }
}
