//! What every hypervisor driver promises, put to each of them through the agent's own calls.
#![allow(clippy::expect_used, clippy::unwrap_used)]

#[macro_use]
mod common;

use std::time::Duration;

use common::*;
use proto::agent::PowerState;
use proto::agent::refusal::Reason;
use uuid::Uuid;

for_each_driver!(
    a_domain_goes_through_its_states_and_every_watcher_sees_them,
    a_domain_can_be_started_paused,
    a_step_in_the_wrong_state_is_refused_with_that_state,
    a_vm_has_one_domain,
    steps_on_a_vm_without_domain,
    memory_that_is_given_away_is_not_given_again,
    a_reboot_keeps_a_domain_running,
    a_domain_can_be_rebooted_as_another_machine,
    an_agent_that_restarts_finds_its_domains_with_their_ids,
    domain_ids_are_never_given_twice,
    a_repeated_step_is_done_once,
    a_repeated_step_in_flight_waits_for_the_same_outcome,
    an_outcome_survives_the_agent,
    a_deposed_master_is_refused,
    a_destroy_ends_a_clean_shutdown_that_takes_too_long,
);

async fn a_domain_goes_through_its_states_and_every_watcher_sees_them(driver: &str) {
    let host = Host::start(driver).await;
    let mut client = host.client().await;
    let mut watching = client.watch().await;
    assert_eq!(watching.all().await, vec![]);
    let vm = Uuid::new_v4();
    let (first, second, third) = (operation(), operation(), operation());

    let started = client.step_as(&first, vm, start(spec(vm))).await.expect("starts");
    assert_eq!(started.state(), PowerState::Running);
    assert!(started.domid > 0 && started.start_time > 0);
    assert_eq!((started.memory_actual, started.generation), (96 * MIB, 3));
    assert_eq!(watching.change().await, started);

    let paused = client.step_as(&second, vm, pause()).await.expect("pauses");
    assert_eq!((paused.state(), paused.last_operation.as_str()), (PowerState::Paused, second.as_str()));
    assert_eq!(watching.change().await, paused);
    let running = client.step(vm, unpause()).await.expect("unpauses");
    assert_eq!((running.state(), running.domid), (PowerState::Running, started.domid));
    assert_eq!(watching.change().await, running);

    let late = client.clone().watch().await.all().await;
    assert_eq!(late, vec![running]);

    let gone = client.step_as(&third, vm, destroy()).await.expect("destroyed");
    assert_eq!((gone.state(), gone.domid, gone.last_operation.as_str()), (PowerState::Halted, -1, third.as_str()));
    assert_eq!(watching.change().await, gone);
    assert_eq!(client.watch().await.all().await, vec![]);
}

async fn a_domain_can_be_started_paused(driver: &str) {
    let host = Host::start(driver).await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    let state = client.step(vm, start_paused(spec(vm))).await.expect("starts");
    assert_eq!(state.state(), PowerState::Paused);
    assert_eq!(client.step(vm, unpause()).await.expect("runs").state(), PowerState::Running);
}

async fn a_step_in_the_wrong_state_is_refused_with_that_state(driver: &str) {
    let host = Host::start(driver).await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    client.step(vm, start(spec(vm))).await.expect("starts");
    let refusal = client.step(vm, unpause()).await.expect_err("it runs");
    assert_eq!((refusal.reason(), refusal.detail.as_str()), (Reason::BadState, "running"));
    client.step(vm, pause()).await.expect("pauses");
    for action in [pause(), shutdown(PATIENCE), reboot(true, None)] {
        let refusal = client.step(vm, action).await.expect_err("it is paused");
        assert_eq!((refusal.reason(), refusal.detail.as_str()), (Reason::BadState, "paused"));
    }
}

async fn a_vm_has_one_domain(driver: &str) {
    let host = Host::start(driver).await;
    let client = host.client().await;
    let vm = Uuid::new_v4();
    let attempts = (0..4).map(|_| {
        let mut client = client.clone();
        tokio::spawn(async move { client.step(vm, start(spec(vm))).await })
    });
    let mut outcomes = Vec::new();
    for attempt in attempts.collect::<Vec<_>>() {
        outcomes.push(attempt.await.expect("no panic"));
    }
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    for refusal in outcomes.into_iter().filter_map(Result::err) {
        assert_eq!(refusal.reason(), Reason::DomainExists);
    }
}

async fn steps_on_a_vm_without_domain(driver: &str) {
    let host = Host::start(driver).await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    for action in [pause(), unpause(), shutdown(PATIENCE), reboot(true, None), reboot(false, Some(spec(vm)))] {
        assert_eq!(reason(client.step(vm, action).await), Reason::NoSuchDomain);
    }
    let gone = client.step(vm, destroy()).await.expect("nothing to destroy is a success");
    assert_eq!((gone.state(), gone.domid), (PowerState::Halted, -1));
}

async fn memory_that_is_given_away_is_not_given_again(driver: &str) {
    let host = Host::start_with(driver, |config| {
        config.memory_total_mib = Some(250);
        config.control_domain_memory_mib = 50;
    })
    .await;
    let mut client = host.client().await;
    let (one, two, three) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    client.step(one, start(spec(one))).await.expect("room for one");
    client.step(two, start_paused(spec(two))).await.expect("room for two");
    let refusal = client.step(three, start(spec(three))).await.expect_err("no room for three");
    assert_eq!(refusal.reason(), Reason::NotEnoughMemory);
    assert_eq!((refusal.needed, refusal.available), (96 * MIB, 8 * MIB));
    let facts = client.hello().await.expect("hello").facts.expect("facts");
    assert_eq!((facts.memory_total, facts.control_domain_memory, facts.memory_free), (250 * MIB, 50 * MIB, 8 * MIB));
    client.step(one, destroy()).await.expect("destroyed");
    client.step(three, start_paused(spec(three))).await.expect("room again");
}

async fn a_reboot_keeps_a_domain_running(driver: &str) {
    let host = Host::start(driver).await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    client.step(vm, start_paused(spec(vm))).await.expect("starts");
    let again = client.step(vm, reboot(false, Some(spec(vm)))).await.expect("reboots");
    assert_eq!(again.state(), PowerState::Running);
    if driver == "qemu" {
        host.boots(vm, 1).await;
    }
    let by = operation();
    let again = client.step_as(&by, vm, reboot(true, None)).await.expect("reboots");
    assert_eq!((again.state(), again.last_operation), (PowerState::Running, by));
    if driver == "qemu" {
        host.boots(vm, 2).await;
    }
}

async fn a_domain_can_be_rebooted_as_another_machine(driver: &str) {
    let host = Host::start(driver).await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    let first = client.step(vm, start(spec(vm))).await.expect("starts");
    let mut bigger = spec(vm);
    bigger.memory_target = 112 * MIB;
    bigger.memory_static_max = 112 * MIB;
    let second = client.step(vm, reboot(false, Some(bigger))).await.expect("reboots");
    assert_eq!((second.state(), second.memory_actual), (PowerState::Running, 112 * MIB));
    assert_ne!(first.domid, second.domid);
}

async fn an_agent_that_restarts_finds_its_domains_with_their_ids(driver: &str) {
    let mut host = Host::start(driver).await;
    let mut client = host.client().await;
    let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
    client.step(one, start(spec(one))).await.expect("starts");
    client.step(two, start_paused(spec(two))).await.expect("starts");
    let mut before = client.watch().await.all().await;
    host.stop_agent().await;
    host.start_agent().await;
    let mut client = host.client().await;
    let mut after = client.watch().await.all().await;
    before.sort_by_key(|state| state.domid);
    after.sort_by_key(|state| state.domid);
    assert_eq!(before, after);
    assert_eq!(client.step(two, unpause()).await.expect("runs").state(), PowerState::Running);
    client.step(one, destroy()).await.expect("destroyed");
    assert_eq!(client.watch().await.all().await.len(), 1);
}

async fn domain_ids_are_never_given_twice(driver: &str) {
    let mut host = Host::start(driver).await;
    let vm = Uuid::new_v4();
    let mut ids = Vec::new();
    for restart in [false, true, false] {
        if restart {
            host.stop_agent().await;
            host.start_agent().await;
        }
        let mut client = host.client().await;
        ids.push(client.step(vm, start_paused(spec(vm))).await.expect("starts").domid);
        client.step(vm, destroy()).await.expect("destroyed");
    }
    assert_eq!(distinct(ids).len(), 3);
}

async fn a_repeated_step_is_done_once(driver: &str) {
    let host = Host::start(driver).await;
    let mut client = host.client().await;
    let (vm, by) = (Uuid::new_v4(), operation());
    let first = client.step_as(&by, vm, start_paused(spec(vm))).await.expect("starts");
    client.step(vm, destroy()).await.expect("destroyed");
    let second = client.step_as(&by, vm, start_paused(spec(vm))).await.expect("the first outcome");
    assert_eq!(first, second);
    assert_eq!(client.watch().await.all().await, vec![]);
    // A refusal is an outcome as well.
    let by = operation();
    assert_eq!(reason(client.step_as(&by, vm, pause()).await), Reason::NoSuchDomain);
    client.step(vm, start(spec(vm))).await.expect("starts");
    assert_eq!(reason(client.step_as(&by, vm, pause()).await), Reason::NoSuchDomain);
}

async fn a_repeated_step_in_flight_waits_for_the_same_outcome(driver: &str) {
    let host = Host::start(driver).await;
    host.order("[delays_ms]\nstart = 300");
    let client = host.client().await;
    let (vm, by) = (Uuid::new_v4(), operation());
    let attempts = (0..3).map(|_| {
        let (mut client, by) = (client.clone(), by.clone());
        tokio::spawn(async move { client.step_as(&by, vm, start(spec(vm))).await })
    });
    let mut outcomes = Vec::new();
    for attempt in attempts.collect::<Vec<_>>() {
        outcomes.push(attempt.await.expect("no panic").expect("starts"));
    }
    assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]));
}

async fn an_outcome_survives_the_agent(driver: &str) {
    let mut host = Host::start(driver).await;
    let mut client = host.client().await;
    let (vm, by) = (Uuid::new_v4(), operation());
    let first = client.step_as(&by, vm, start_paused(spec(vm))).await.expect("starts");
    host.stop_agent().await;
    host.start_agent().await;
    let mut client = host.client().await;
    assert_eq!(client.step_as(&by, vm, start_paused(spec(vm))).await.expect("the first outcome"), first);
}

async fn a_deposed_master_is_refused(driver: &str) {
    let mut host = Host::start(driver).await;
    let mut old = host.client().await;
    let mut new = Client { epoch: old.epoch + 5, ..old.clone() };
    let vm = Uuid::new_v4();
    old.hello().await.expect("the only master");
    new.hello().await.expect("a newer one");
    let refusal = old.step(vm, start(spec(vm))).await.expect_err("deposed");
    assert_eq!((refusal.reason(), refusal.detail), (Reason::StaleEpoch, new.epoch.to_string()));
    host.stop_agent().await;
    host.start_agent().await;
    let mut old = Client { epoch: old.epoch, ..host.client().await };
    assert_eq!(reason(old.step(vm, destroy()).await), Reason::StaleEpoch);
    assert_eq!(old.hello().await.expect_err("deposed").code(), tonic::Code::FailedPrecondition);
}

async fn a_destroy_ends_a_clean_shutdown_that_takes_too_long(driver: &str) {
    let host = Host::start(driver).await;
    host.order("deaf = true");
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    let mut deaf = spec(vm);
    deaf.kernel_args += " xenith.deaf";
    client.step(vm, start(deaf)).await.expect("starts");
    let refusal = client.step(vm, shutdown(Duration::from_millis(200))).await.expect_err("deaf");
    assert_eq!(refusal.reason(), Reason::TimedOut);
    let (mut asking, by) = (client.clone(), operation());
    let asked = {
        let by = by.clone();
        tokio::spawn(async move { asking.step_as(&by, vm, shutdown(PATIENCE)).await })
    };
    let ledger = host.config.state_dir.join("ledger.jsonl");
    eventually("the shutdown begins", || std::fs::read_to_string(&ledger).unwrap().contains(&by)).await;
    client.step(vm, destroy()).await.expect("destroyed");
    // The destroy may still have been faster than the question to the guest.
    match asked.await.expect("no panic") {
        Ok(state) => assert_eq!(state.state(), PowerState::Halted),
        Err(refusal) => assert_eq!(refusal.reason(), Reason::NoSuchDomain),
    }
    assert_eq!(client.watch().await.all().await, vec![]);
}
