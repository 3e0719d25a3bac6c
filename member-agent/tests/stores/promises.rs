//! What every store promises.

use std::fs;

use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::*;
use uuid::Uuid;

use crate::common::store::*;
use crate::common::*;

pub async fn place(driver: &str) -> Place {
    Place::of(driver).await
}

pub async fn a_volume_is_made_grown_and_removed(mut place: Place) {
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

pub async fn a_snapshot_is_read_only_and_a_clone_is_not(mut place: Place) {
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

pub async fn a_repeated_step_is_done_once_and_numbers_tell_steps_apart(mut place: Place) {
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

pub async fn an_agent_that_begins_anew_has_its_stores_and_volumes(mut place: Place) {
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

pub async fn what_is_not_there_is_refused_by_its_name(mut place: Place) {
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

pub async fn a_volume_is_copied_and_goes_back_to_a_snapshot(mut place: Place) {
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

pub async fn a_store_goes_with_all_its_volumes(mut place: Place) {
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
    let probed = place.store_step(place.probe()).await.expect("probed").probed;
    assert_eq!((probed.len(), probed[0].sr.as_str()), (1, place.store.sr.as_str()));
    place.store_step(attach).await.expect("attached");
    assert!(place.vdis().await.is_empty());
}

pub async fn a_deposed_master_changes_no_volume(mut place: Place) {
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
