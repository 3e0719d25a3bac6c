//! What only a real QEMU with a real guest can prove.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::*;
use member_agent::AcceleratorChoice;
use proto::agent::refusal::Reason;
use proto::agent::{Disk, DomainState, PowerState, Refusal, Vif};
use uuid::Uuid;

#[tokio::test]
async fn a_guest_boots_stands_still_while_paused_and_obeys_a_clean_shutdown() {
    let host = Host::start("qemu").await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    let mut with_devices = spec(vm);
    let disk = host.dir.path().join("a disk, with a comma.raw");
    fs::write(&disk, vec![0; 1 << 20]).expect("disk");
    with_devices.disks = vec![
        Disk { device: "xvda".into(), path: disk.display().to_string(), ..Disk::default() },
        Disk { device: "xvdd".into(), cdrom: true, read_only: true, ..Disk::default() },
    ];
    with_devices.vifs = vec![Vif { mac: "02:00:00:00:00:01".into(), ..Vif::default() }];
    let began = Instant::now();
    client.step(vm, start(with_devices)).await.expect("starts");
    let started = began.elapsed();
    host.heartbeats(vm, 1).await;
    eprintln!("start answered after {} ms, guest after {} ms", started.as_millis(), began.elapsed().as_millis());

    client.step(vm, pause()).await.expect("pauses");
    let still = host.console(vm);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(host.console(vm), still, "a paused guest has a heartbeat");
    client.step(vm, unpause()).await.expect("runs on");
    let beats = still.matches("XENITH-GUEST").count();
    host.heartbeats(vm, beats + 1).await;

    let mut watching = client.watch().await;
    watching.all().await;
    let by = operation();
    let off = client.step_as(&by, vm, shutdown(PATIENCE)).await.expect("obeys");
    assert_eq!((off.state(), off.reason.as_str()), (PowerState::Halted, "guest-shutdown"));
    assert_eq!(off.last_operation, by);
    assert_eq!(watching.change().await, off);
    assert!(!host.domain_dir(vm).exists() && host.processes().is_empty(), "something stays behind");
}

#[tokio::test]
async fn the_death_of_a_domain_is_told_within_a_second() {
    let host = Host::start("qemu").await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    client.step(vm, start(spec(vm))).await.expect("starts");
    let mut watching = client.watch().await;
    watching.all().await;
    let began = Instant::now();
    kill(host.pid(vm));
    let gone = watching.becomes(vm, PowerState::Crashed).await;
    let told = began.elapsed();
    assert!(told < Duration::from_secs(1), "told after {told:?}");
    assert!(gone.reason.contains("signal: 9"), "{}", gone.reason);
    assert_eq!((gone.domid, gone.last_operation.as_str()), (-1, ""));
    assert!(!host.domain_dir(vm).exists());
    let facts = client.hello().await.expect("hello").facts.expect("facts");
    assert_eq!(facts.memory_free, facts.memory_total - facts.control_domain_memory);
}

#[tokio::test]
async fn the_death_of_a_domain_of_a_former_agent_is_told_within_a_second() {
    let mut host = Host::start("qemu").await;
    let (mut client, vm) = (host.client().await, Uuid::new_v4());
    client.step(vm, start(spec(vm))).await.expect("starts");
    host.stop_agent().await;
    let pid = host.pid(vm);
    host.start_agent().await;
    let mut watching = host.client().await.watch().await;
    assert_eq!(watching.all().await.len(), 1);
    let began = Instant::now();
    kill(pid);
    watching.becomes(vm, PowerState::Crashed).await;
    assert!(began.elapsed() < Duration::from_secs(1), "told after {:?}", began.elapsed());
}

#[tokio::test]
async fn a_domain_that_died_without_an_agent_is_gone_when_there_is_one() {
    let mut host = Host::start("qemu").await;
    let mut client = host.client().await;
    let (killed, living) = (Uuid::new_v4(), Uuid::new_v4());
    client.step(killed, start(spec(killed))).await.expect("starts");
    client.step(living, start(spec(living))).await.expect("starts");
    let pid = host.pid(killed);
    host.stop_agent().await;
    kill(pid);
    eventually("the process ends", || host.processes().len() == 1).await;
    host.start_agent().await;
    let all = host.client().await.watch().await.all().await;
    assert_eq!(all.iter().map(|state| state.vm.as_str()).collect::<Vec<_>>(), [living.to_string()]);
    assert!(!host.domain_dir(killed).exists() && host.domain_dir(living).exists());
}

#[tokio::test]
async fn a_guest_that_switches_itself_off_is_gone_by_itself_also_while_no_agent_watches() {
    let mut host = Host::start("qemu").await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    client.step(vm, start(spec(vm))).await.expect("starts");
    let mut watching = client.watch().await;
    watching.all().await;
    let line = host.type_at(vm, "poweroff -f").await;
    let gone = watching.becomes(vm, PowerState::Halted).await;
    assert_eq!((gone.reason.as_str(), gone.last_operation.as_str()), ("guest-shutdown", ""));

    client.step(vm, start(spec(vm))).await.expect("starts");
    drop(line);
    host.stop_agent().await;
    let _line = host.type_at(vm, "poweroff -f").await;
    eventually("the guest goes", || host.console(vm).contains("Power down")).await;
    host.start_agent().await;
    let mut watching = host.client().await.watch().await;
    // It may be found gone at once, or be told first as it was last seen.
    if !watching.all().await.is_empty() {
        watching.becomes(vm, PowerState::Halted).await;
    }
    assert!(host.processes().is_empty());
}

#[tokio::test]
async fn a_guest_that_reboots_itself_goes_on_or_ends_as_it_was_told() {
    let host = Host::start("qemu").await;
    let mut client = host.client().await;
    let mut watching = client.watch().await;
    let (stays, goes) = (Uuid::new_v4(), Uuid::new_v4());
    let first = client.step(stays, start(spec(stays))).await.expect("starts");
    host.heartbeats(stays, 4).await;
    let _line = host.type_at(stays, "reboot -f").await;
    host.boots(stays, 2).await;
    let again = loop {
        let state = watching.next().await;
        if let proto::agent::agent_event::Event::Domain(state) = state
            && state.reason == "guest-reset"
        {
            break state;
        }
    };
    assert_eq!((again.state(), again.domid), (PowerState::Running, first.domid));
    assert!(again.start_time > first.start_time);

    let ends = proto::agent::DomainSpec { on_reboot: "destroy".into(), ..spec(goes) };
    client.step(goes, start(ends)).await.expect("starts");
    let _line = host.type_at(goes, "reboot -f").await;
    assert_eq!(watching.becomes(goes, PowerState::Halted).await.reason, "guest-reset");
}

#[tokio::test]
async fn a_domain_that_cannot_boot_leaves_nothing_but_what_qemu_said() {
    let host = Host::start("qemu").await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    let bad = proto::agent::DomainSpec { kernel: "/no/such/kernel".into(), ..spec(vm) };
    let refusal = client.step(vm, start(bad)).await.expect_err("no kernel");
    assert_eq!(refusal.reason(), Reason::BootFailed);
    assert!(refusal.detail.contains("/no/such/kernel"), "{}", refusal.detail);
    assert!(!host.domain_dir(vm).exists() && host.processes().is_empty());
    assert_eq!(client.watch().await.all().await, vec![]);
    client.step(vm, start_paused(spec(vm))).await.expect("the name and the memory are free again");
}

#[tokio::test]
async fn a_qemu_that_does_not_listen_is_still_taken_down() {
    let host = Host::start("qemu").await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    client.step(vm, start(spec(vm))).await.expect("starts");
    let pid = nix::unistd::Pid::from_raw(host.pid(vm));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("stopped");
    let gone = client.step(vm, destroy()).await.expect("destroyed");
    assert_eq!(gone.state(), PowerState::Halted);
    assert!(host.processes().is_empty());
}

#[tokio::test]
async fn a_half_built_domain_is_taken_down_by_the_next_agent() {
    let mut host = Host::start("qemu").await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    client.step(vm, start(spec(vm))).await.expect("starts");
    host.stop_agent().await;
    // As an agent that died in the middle of a start would have left it.
    let path = host.domain_dir(vm).join("domain.json");
    let text = fs::read_to_string(&path).expect("description");
    assert!(text.contains("\"live\""));
    fs::write(&path, text.replace("\"live\"", "\"building\"")).expect("written");
    host.start_agent().await;
    assert_eq!(host.client().await.watch().await.all().await, vec![]);
    assert!(host.processes().is_empty() && !host.domain_dir(vm).exists());
}

#[tokio::test]
async fn where_kvm_is_not_proven_guests_are_emulated_and_boot() {
    let host = Host::start_with("auto", |config| config.accelerator = AcceleratorChoice::Auto).await;
    let mut client = host.client().await;
    let facts = client.hello().await.expect("hello").facts.expect("facts");
    assert_eq!(facts.hypervisor, "qemu");
    let verdict = fs::read_to_string(host.config.state_dir.join("accelerator.json")).expect("the verdict is kept");
    assert_eq!(verdict.contains("\"kvm\":true"), facts.accelerator == "kvm");
    let vm = Uuid::new_v4();
    client.step(vm, start(spec(vm))).await.expect("starts");
    host.heartbeats(vm, 1).await;
}

#[tokio::test]
async fn a_reset_settles_what_the_guest_before_it_was_asked_for() {
    let host = Host::start("qemu").await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    let mut deaf = spec(vm);
    deaf.kernel_args += " xenith.deaf";
    let started = client.step(vm, start(deaf.clone())).await.expect("starts");
    host.boots(vm, 1).await;
    // A younger machine is not reset but built anew.
    let old = || std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() > started.start_time + 5;
    eventually("the machine is old enough to be reset", old).await;
    let ledger = host.config.state_dir.join("ledger.jsonl");
    for (boots, action, meant) in [(2, reboot(true, None), true), (3, shutdown(PATIENCE), false)] {
        let (mut asking, by) = (client.clone(), operation());
        let asked = {
            let by = by.clone();
            tokio::spawn(async move { asking.step_as(&by, vm, action).await })
        };
        eventually("the guest is asked", || std::fs::read_to_string(&ledger).unwrap().contains(&by)).await;
        client.step(vm, reboot(false, Some(deaf.clone()))).await.expect("resets");
        match asked.await.expect("no panic") {
            Ok(state) => assert!(meant && state.state() == PowerState::Running, "{state:?}"),
            Err(refusal) => assert!(!meant && refusal.detail == "running", "{refusal:?}"),
        }
        host.boots(vm, boots).await;
    }
}

/// Whose guest does not go off, asked to reboot as another machine.
async fn waits_for_another_machine(host: &Host, vm: Uuid) -> tokio::task::JoinHandle<Result<DomainState, Refusal>> {
    let mut client = host.client().await;
    let deaf = move |more: &str| {
        let plain = spec(vm);
        proto::agent::DomainSpec { kernel_args: format!("{} xenith.deaf{more}", plain.kernel_args), ..plain }
    };
    client.step(vm, start(deaf(""))).await.expect("starts");
    host.boots(vm, 1).await;
    let (by, ledger) = (operation(), host.config.state_dir.join("ledger.jsonl"));
    let asked = {
        let by = by.clone();
        tokio::spawn(async move { client.step_as(&by, vm, reboot(true, Some(deaf(" xenith.another")))).await })
    };
    eventually("the guest is asked", || std::fs::read_to_string(&ledger).unwrap().contains(&by)).await;
    asked
}

#[tokio::test]
async fn a_machine_that_was_destroyed_before_it_rebooted_does_not_come_back() {
    let host = Host::start("qemu").await;
    let vm = Uuid::new_v4();
    let asked = waits_for_another_machine(&host, vm).await;
    let mut client = host.client().await;
    client.step(vm, destroy()).await.expect("destroyed");
    let refusal = asked.await.expect("no panic").expect_err("it was not the guest that went");
    assert_eq!((refusal.reason(), refusal.detail.as_str()), (Reason::BadState, "halted"));
    assert_eq!(client.watch().await.all().await, vec![]);
    assert!(host.processes().is_empty());
}

#[tokio::test]
async fn a_reset_that_meets_the_building_of_another_machine_has_it_begin_anew() {
    let host = Host::start("qemu").await;
    let (mut client, vm) = (host.client().await, Uuid::new_v4());
    client.step(vm, start(spec(vm))).await.expect("starts");
    host.heartbeats(vm, 2).await;
    let mut another = spec(vm);
    another.kernel_args += " xenith.another";
    let mut watching = client.watch().await;
    watching.all().await;
    let (mut asking, wanted) = (client.clone(), another.clone());
    let asked = tokio::spawn(async move { asking.step(vm, reboot(true, Some(wanted))).await });
    watching.becomes(vm, PowerState::Halted).await;
    let now = client.step(vm, reboot(false, Some(another))).await.expect("resets");
    assert_eq!(now.state(), PowerState::Running);
    match asked.await.expect("no panic") {
        Ok(state) => assert_eq!(state.state(), PowerState::Running),
        Err(refusal) => assert_eq!(refusal.reason(), Reason::BadState, "{refusal:?}"),
    }
    host.heartbeats(vm, 1).await;
    assert_eq!(host.processes().len(), 1);
}
