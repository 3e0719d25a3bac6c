//! What a store promises of the volumes that domains have: QEMU has them open, and a guest writes. The guest is no more than a
//! boot sector, so that it runs within a machine that is itself emulated.

use proto::agent::refusal::Reason;
use proto::agent::*;
use uuid::Uuid;

use crate::common::store::*;
use crate::common::*;

pub async fn place(driver: &str) -> Place {
    Place::beside("qemu", driver).await
}

/// Where the guest writes, and what.
const WRITTEN: (&str, u8) = ("4k 512", 0xa5);

/// Fills 512 bytes with 0xa5, has the firmware write them to block 8 of the disk that it came from, says `W` at the
/// serial port, and stands still. If the disk takes no writes, it says nothing.
fn boot_sector() -> Vec<u8> {
    const CODE: [u8; 45] = [
        0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, // cli; ax, ds, es, ss = 0
        0xbc, 0x00, 0x7c, 0xfb, 0xfc, // sp = 0x7c00; sti; cld
        0xbf, 0x00, 0x80, 0xb9, 0x00, 0x01, 0xb8, 0xa5, 0xa5, 0xf3, 0xab, // fill 0x8000
        0xbe, 0x30, 0x7c, 0xb4, 0x43, 0xb0, 0x00, 0xcd, 0x13, 0x72, 0xfe, // extended write; stop if refused
        0xba, 0xf8, 0x03, 0xb0, 0x57, 0xee, // out 0x3f8, 'W'
        0xf4, 0xeb, 0xfd, // hlt, for ever
    ];
    // Size, blocks, buffer, first block.
    const PACKET: [u8; 16] = [0x10, 0, 1, 0, 0, 0x80, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0];
    let mut sector = vec![0; 512];
    sector[..CODE.len()].copy_from_slice(&CODE);
    sector[0x30..0x40].copy_from_slice(&PACKET);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A domain that boots from a volume.
fn of(place: &Place, vm: Uuid, vdi: Uuid) -> DomainSpec {
    let disk = Disk { vbd: "vbd".into(), device: "xvda".into(), volume: place.volume(vdi), ..Disk::default() };
    DomainSpec {
        vm: vm.to_string(),
        name: "a guest that writes".to_owned(),
        memory_static_max: 16 * MIB,
        memory_target: 16 * MIB,
        vcpus_max: 1,
        vcpus_at_startup: 1,
        generation: 3,
        boot_order: "c".to_owned(),
        disks: vec![disk],
        ..DomainSpec::default()
    }
}

async fn has_written(place: &Place, vm: Uuid) {
    eventually("the guest has written", || place.host.console(vm).contains('W')).await;
}

pub async fn a_guest_writes_to_its_volume_and_not_to_its_snapshot(mut place: Place) {
    let (vdi, snapshot) = (place.made(8 * MIB).await, Uuid::new_v4());
    place.begins_with(vdi, &boot_sector());
    let (vm, other) = (Uuid::new_v4(), Uuid::new_v4());
    let (mine, others) = (of(&place, vm, vdi), of(&place, other, vdi));
    place.client.step(vm, start_paused(mine)).await.expect("starts");
    assert_eq!(reason(place.client.step(other, start(others)).await), Reason::InUse);
    for step in [place.destroy(vdi), place.revert(vdi, snapshot)] {
        assert_eq!(why(place.volume_step(step).await), Reason::InUse);
    }
    let step = place.snapshot(vdi, snapshot);
    assert!(place.volume_step(step).await.expect("snapshot").read_only);
    let step = place.resize(vdi, 16 * MIB);
    assert_eq!(place.volume_step(step).await.expect("grows").virtual_size, 16 * MIB);
    place.client.step(vm, unpause()).await.expect("goes on");
    has_written(&place, vm).await;
    place.client.step(vm, destroy()).await.expect("ends");
    let (range, written) = WRITTEN;
    assert!(place.reads(vdi, written, range), "what the guest wrote is not there");
    assert!(place.reads(snapshot, 0, range), "what the guest wrote is in the snapshot");
    place.all_clean();
    let step = place.destroy(vdi);
    place.volume_step(step).await.expect("is nobody's any more");
}

pub async fn a_volume_of_a_domain_is_in_use_on_every_host(mut here: Place) {
    let vdi = here.made(8 * MIB).await;
    here.begins_with(vdi, &boot_sector());
    let mut there = here.elsewhere("qemu").await;
    let (vm, other) = (Uuid::new_v4(), Uuid::new_v4());
    let spec = of(&here, vm, vdi);
    here.client.step(vm, start_paused(spec)).await.expect("starts");
    let spec = of(&there, other, vdi);
    assert_eq!(reason(there.client.step(other, start(spec.clone())).await), Reason::InUse);
    for step in [there.destroy(vdi), there.resize(vdi, 16 * MIB), there.snapshot(vdi, Uuid::new_v4())] {
        assert_eq!(why(there.volume_step(step).await), Reason::InUse);
    }
    here.client.step(vm, destroy()).await.expect("ends");
    there.client.step(other, start(spec)).await.expect("starts where it was not");
    has_written(&there, other).await;
    let step = here.destroy(vdi);
    assert_eq!(why(here.volume_step(step).await), Reason::InUse);
    there.client.step(other, destroy()).await.expect("ends");
    let (range, written) = WRITTEN;
    assert!(here.reads(vdi, written, range), "what the other host's guest wrote is not there");
    here.all_clean();
}
