//! The steps of disks, memory and suspended domains, as the master sends them: with volumes of a store, by each driver.
#![allow(clippy::expect_used, clippy::unwrap_used)]

#[macro_use]
mod common;

use std::collections::HashMap;

use common::store::*;
use common::*;
use member_agent::StoreChoice;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::*;
use uuid::Uuid;

async fn place(driver: &str) -> Place {
    let stores = if driver == "sim" { StoreChoice::Sim } else { StoreChoice::Real };
    let host = Host::start_with(driver, |config| config.stores = stores).await;
    let config = HashMap::from([("location".to_owned(), "local".to_owned())]);
    Place::on(host, "file", config).await
}

fn disk(place: &Place, vbd: &str, device: &str, vdi: Uuid) -> Disk {
    Disk { vbd: vbd.into(), device: device.into(), volume: place.volume(vdi), ..Disk::default() }
}

fn plug(disk: Disk) -> Action {
    Action::PlugDisk(PlugDisk { disk: Some(disk) })
}

fn unplug(vbd: &str, force: bool) -> Action {
    Action::UnplugDisk(UnplugDisk { vbd: vbd.into(), force, timeout_ms: 200 })
}

fn medium(vbd: &str, volume: Option<VolumeRef>) -> Action {
    Action::Medium(ChangeMedium { vbd: vbd.into(), volume })
}

async fn disks_of_a_living_domain_are_volumes(driver: &str) {
    let mut place = place(driver).await;
    let (one, two, vm) = (place.made(MIB).await, place.made(MIB).await, Uuid::new_v4());
    let mut machine = spec(vm);
    machine.disks =
        vec![Disk { vbd: "cd".into(), device: "xvdd".into(), cdrom: true, read_only: true, ..Disk::default() }];
    place.client.step(vm, start_paused(machine)).await.expect("starts");
    let (comes, by) = (plug(disk(&place, "one", "xvda", one)), operation());
    let state = place.client.step_as(&by, vm, comes.clone()).await.expect("plugs");
    assert_eq!((state.disks, state.last_operation.as_str()), (vec!["cd".to_owned(), "one".into()], by.as_str()));
    let used = place.destroy(one);
    assert_eq!(why(place.volume_step(used).await), Reason::InUse);
    let missing = plug(disk(&place, "none", "xvdb", Uuid::new_v4()));
    assert_eq!(reason(place.client.step(vm, missing).await), Reason::NoSuchVolume);

    let inserted = medium("cd", place.volume(two));
    place.client.step(vm, inserted).await.expect("inserted");
    let used = place.destroy(two);
    assert_eq!(why(place.volume_step(used).await), Reason::InUse);
    place.client.step(vm, medium("cd", None)).await.expect("ejected");
    let free = place.destroy(two);
    place.volume_step(free).await.expect("nobody has it open");

    assert_eq!(reason(place.client.step(vm, unplug("one", false)).await), Reason::TimedOut);
    let state = place.client.step(vm, unplug("one", true)).await.expect("goes");
    assert_eq!(state.disks, ["cd"]);
    place.client.step(vm, unplug("one", false)).await.expect("is gone already");
    assert_eq!(state.disks, ["cd"]);
    let free = place.destroy(one);
    place.volume_step(free).await.expect("nobody has it open");
}

async fn a_domain_is_suspended_to_a_volume_and_resumed_from_it_by_another_agent(driver: &str) {
    let mut place = place(driver).await;
    let (data, vm) = (place.made(MIB).await, Uuid::new_v4());
    let memory = Uuid::new_v4();
    let create = place.create_of(memory, 160 * MIB, "suspend");
    place.volume_step(create).await.expect("made");
    let machine = DomainSpec { disks: vec![disk(&place, "one", "xvda", data)], vcpus_max: 2, ..spec(vm) };
    place.client.step(vm, start_paused(machine.clone())).await.expect("starts");
    place.client.step(vm, Action::Vcpus(SetVcpus { number: 2 })).await.expect("another vCPU");
    let suspend = Action::Suspend(SuspendDomain { into: place.volume(memory), keep_running: false });
    let by = operation();
    let gone = place.client.step_as(&by, vm, suspend.clone()).await.expect("suspends");
    assert_eq!((gone.state(), gone.reason.as_str()), (PowerState::Halted, "suspended"));

    place.host.stop_agent().await;
    place.host.start_agent().await;
    place.client = place.host.client().await;
    assert_eq!(place.client.step_as(&by, vm, suspend).await.expect("the first outcome"), gone);
    let from = place.volume(memory);
    let resume = Action::Resume(ResumeDomain { spec: Some(machine.clone()), from: from.clone(), paused: false });
    let again = place.client.step(vm, resume).await.expect("resumes");
    assert_eq!((again.state(), again.disks.len()), (PowerState::Running, 1));
    place.client.step(vm, destroy()).await.expect("destroyed");
    let empty = Action::Resume(ResumeDomain { spec: Some(machine), from: place.volume(data), paused: false });
    assert_eq!(reason(place.client.step(vm, empty).await), Reason::Damaged);
    assert!(place.host.processes().is_empty());
}

async fn steps_that_say_nothing_sensible_are_refused(driver: &str) {
    let mut place = place(driver).await;
    let vm = Uuid::new_v4();
    let keys = |sysrq: &str| Action::Keys(SendKeys { sysrq: sysrq.into() });
    let steps = [
        keys("h"),
        Action::Vcpus(SetVcpus { number: 1 }),
        Action::MemoryTarget(SetMemoryTarget { bytes: MIB }),
        unplug("x", true),
    ];
    for step in steps {
        assert_eq!(reason(place.client.step(vm, step).await), Reason::NoSuchDomain);
    }
    place.client.step(vm, start_paused(spec(vm))).await.expect("starts");
    assert_eq!(reason(place.client.step(vm, keys("h")).await), Reason::BadState);
    assert_eq!(reason(place.client.step(vm, Action::Vcpus(SetVcpus { number: 9 })).await), Reason::Unsupported);
    assert_eq!(reason(place.client.step(vm, medium("x", None)).await), Reason::NoSuchDisk);
    for senseless in [keys("help"), keys(""), Action::PlugDisk(PlugDisk { disk: None })] {
        let step = Step {
            pool: POOL.into(),
            epoch: place.client.epoch,
            operation: operation(),
            vm: vm.to_string(),
            action: Some(senseless),
            ..Step::default()
        };
        assert_eq!(place.client.calls.perform(step).await.expect_err("senseless").code(), tonic::Code::InvalidArgument);
    }
}

for_each_driver!(
    disks_of_a_living_domain_are_volumes,
    a_domain_is_suspended_to_a_volume_and_resumed_from_it_by_another_agent,
    steps_that_say_nothing_sensible_are_refused,
);
