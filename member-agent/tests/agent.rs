//! What the agent promises whatever its driver: who is heard, what is told of the host, how it ends; and what the
//! simulated driver does on order.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::*;
use member_agent::{Agent, StartError};
use proto::agent::agent_client::AgentClient;
use proto::agent::agent_event::Event;
use proto::agent::refusal::Reason;
use proto::agent::{DomainSpec, PowerState};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// A spec for `sim`, which needs no guest.
fn plain(vm: Uuid) -> DomainSpec {
    DomainSpec { vm: vm.to_string(), memory_target: MIB, ..DomainSpec::default() }
}

#[tokio::test]
async fn only_a_peer_with_a_certificate_of_the_pool_is_heard() {
    let host = Host::start("sim").await;
    let stranger = host.tls(&certificate(&authority()));
    let nobody = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(host.authority.pem()))
        .domain_name("agent.xenith");
    for tls in [stranger, nobody] {
        // With TLS 1.3 the client learns of the refusal by its first call.
        let heard = match host.endpoint().tls_config(tls).expect("tls").connect().await {
            Ok(channel) => {
                let mut client = Client { calls: AgentClient::new(channel), epoch: 1 };
                client.hello().await.is_ok()
            }
            Err(_) => false,
        };
        assert!(!heard, "a stranger was heard");
    }
    host.client().await.hello().await.expect("a peer is heard");
}

#[tokio::test]
async fn a_host_of_another_pool_hears_nobody_of_the_last_one_not_even_on_a_connection_of_before() {
    let place = tempfile::tempdir().unwrap();
    // As a controller takes another seat: a whole directory, in one step.
    let current = place.path().join("current");
    let mut host = Host::start_with("sim", |config| config.identity = Some(current.clone())).await;
    let mut old = host.client().await;
    old.hello().await.expect("it is of this pool");
    let mut watched = old.watch().await;

    let next = authority();
    let (shown, key) = certificate(&next);
    let seat = place.path().join("seat");
    fs::create_dir(&seat).unwrap();
    for (name, text) in [("ca.pem", next.pem()), ("host.pem", shown), ("host.key", key)] {
        fs::write(seat.join(name), text).unwrap();
    }
    std::os::unix::fs::symlink(&seat, &current).unwrap();
    old.hello().await.expect_err("the last pool has nothing to say any more");
    let silent = async { while let Ok(Some(_)) = watched.stream.message().await {} };
    tokio::time::timeout(PATIENCE, silent).await.expect("nor anything to hear");

    host.authority = next;
    let mut new = host.client().await;
    let hello = new.hello().await.expect("the next pool is heard");
    assert_eq!(hello.authorities, host.authority.pem());
}

#[tokio::test]
async fn the_agent_tells_what_its_host_is() {
    let host = Host::start("sim").await;
    let hello = host.client().await.hello().await.expect("hello");
    assert_eq!((hello.host, hello.version), (host.config.host_uuid.to_string(), 1));
    assert!(hello.features.contains(&"hypervisor:sim".to_owned()));
    let facts = hello.facts.expect("facts");
    assert_eq!((facts.hostname.as_str(), facts.boot_id.as_str()), ("host-under-test", "boot-1"));
    assert_eq!((facts.memory_total, facts.control_domain_memory), (512 * MIB, 128 * MIB));
    assert!(!facts.cpus.is_empty() && facts.cpu_sockets >= 1 && !facts.kernel.is_empty() && facts.boot_time > 0);
    let management: Vec<_> = facts.nics.iter().filter(|nic| nic.management).collect();
    assert_eq!((facts.nics.len(), management.len(), management[0].ip.as_str()), (2, 1, "127.0.0.1"));
}

#[tokio::test]
async fn the_machines_own_nics_are_told_when_they_are_wanted() {
    let host = Host::start_with("sim", |config| config.nics = member_agent::NicSource::Real).await;
    let facts = host.client().await.hello().await.expect("hello").facts.expect("facts");
    for nic in &facts.nics {
        assert!(nic.device != "lo" && nic.mac.split(':').count() == 6, "{nic:?}");
    }
    assert!(facts.nics.iter().filter(|nic| nic.management).count() <= 1);
}

#[tokio::test]
async fn a_quiet_watcher_hears_a_beat() {
    let host = Host::start("sim").await;
    let mut watching = host.client().await.watch().await;
    watching.all().await;
    let began = Instant::now();
    for _ in 0..3 {
        let beat = watching.next().await;
        assert!(matches!(beat, Event::Beat(beat) if beat.memory_total == 384 * MIB));
    }
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_master_of_another_pool_is_refused() {
    let host = Host::start_with("sim", |config| config.pool = Some(Uuid::from_u128(9))).await;
    let mut client = host.client().await;
    assert_eq!(reason(client.step(Uuid::new_v4(), destroy()).await), Reason::WrongPool);
    assert!(client.hello().await.is_err());
}

#[tokio::test]
async fn two_agents_never_share_a_state_directory() {
    let host = Host::start("sim").await;
    let second = Agent::start(host.config.clone(), CancellationToken::new()).await;
    assert!(matches!(second, Err(StartError::Taken { .. })));
}

#[tokio::test]
async fn a_watcher_that_lags_is_told_everything_anew() {
    let host = Host::start("sim").await;
    let mut client = host.client().await;
    let mut watching = client.watch().await;
    watching.all().await;
    let vm = Uuid::new_v4();
    client.step(vm, start(plain(vm))).await.expect("starts");
    // Far more than the backlog and the buffers on the way hold, while nobody reads. Names and consoles fill the wire.
    for _round in 0..8 {
        let turns = (0..1000).map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { drop(client.step(vm, pause()).await.or(client.step(vm, unpause()).await)) })
        });
        for turn in turns.collect::<Vec<_>>() {
            turn.await.expect("no panic");
        }
    }
    client.step(vm, destroy()).await.expect("destroyed");
    let mut known = std::collections::HashMap::new();
    loop {
        match watching.next().await {
            Event::All(list) => known = list.domains.into_iter().map(|state| (state.vm.clone(), state)).collect(),
            Event::Domain(state) => drop(known.insert(state.vm.clone(), state)),
            Event::Beat(_) => {}
        }
        let gone = known.get(&vm.to_string()).is_none_or(|state| state.state() == PowerState::Halted);
        if gone {
            break;
        }
    }
}

#[tokio::test]
async fn a_simulated_host_that_loses_power_loses_its_domains() {
    let mut host = Host::start("sim").await;
    let vm = Uuid::new_v4();
    host.client().await.step(vm, start(plain(vm))).await.expect("starts");
    host.stop_agent().await;
    host.start_agent().await;
    assert_eq!(host.client().await.watch().await.all().await.len(), 1);
    host.stop_agent().await;
    fs::write(&host.config.boot_id_path, "boot-2").expect("written");
    host.start_agent().await;
    let mut client = host.client().await;
    assert_eq!(client.watch().await.all().await, vec![]);
    assert_eq!(client.hello().await.expect("hello").facts.expect("facts").boot_id, "boot-2");
}

#[tokio::test]
async fn a_simulated_domain_fails_and_dies_on_order() {
    let host = Host::start("sim").await;
    let mut client = host.client().await;
    let vm = Uuid::new_v4();
    host.order("[[fail_next]]\nstep = \"start\"\nreason = \"boot-failed\"\ndetail = \"no such kernel\"");
    let refusal = client.step(vm, start(plain(vm))).await.expect_err("ordered");
    assert_eq!((refusal.reason(), refusal.detail.as_str()), (Reason::BootFailed, "no such kernel"));
    client.step(vm, start(plain(vm))).await.expect("ordered once");
    let mut watching = client.watch().await;
    watching.all().await;
    host.order(&format!("die = [\"{vm}\"]"));
    assert_eq!(watching.becomes(vm, PowerState::Crashed).await.reason, "crashed");
}

#[tokio::test]
async fn a_step_that_was_cut_off_is_told_apart_from_one_that_was_done() {
    let mut host = Host::start("sim").await;
    host.order("[delays_ms]\nstart = 60000");
    let (mut client, vm, by) = (host.client().await, Uuid::new_v4(), operation());
    let cut = {
        let (mut client, by) = (client.clone(), by.clone());
        tokio::spawn(async move {
            let step = proto::agent::Step {
                pool: POOL.into(),
                epoch: client.epoch,
                operation: by,
                vm: vm.to_string(),
                action: Some(start(plain(vm))),
                ..Default::default()
            };
            client.calls.perform(step).await
        })
    };
    let ledger = host.config.state_dir.join("ledger.jsonl");
    eventually("the step begins", || fs::read_to_string(&ledger).unwrap().contains(&by)).await;
    host.stop_agent().await;
    assert!(cut.await.expect("no panic").is_err(), "no outcome is no answer");
    host.order("");
    host.start_agent().await;
    client = host.client().await;
    let done = client.step_as(&by, vm, start(plain(vm))).await.expect("done now");
    assert_eq!(done.state(), PowerState::Running);
}

#[tokio::test]
async fn a_thousand_domains_are_no_burden() {
    let host = Host::start_with("sim", |config| config.memory_total_mib = Some(10_000)).await;
    let client = host.client().await;
    let began = Instant::now();
    let starts = (0..2000).map(|_| {
        let mut client = client.clone();
        tokio::spawn(async move {
            let vm = Uuid::new_v4();
            client.step(vm, start(plain(vm))).await.expect("starts").domid
        })
    });
    let mut ids = Vec::new();
    for start in starts.collect::<Vec<_>>() {
        ids.push(start.await.expect("no panic"));
    }
    eprintln!("2000 starts in {} ms", began.elapsed().as_millis());
    assert_eq!(distinct(ids).len(), 2000);
    assert_eq!(client.clone().watch().await.all().await.len(), 2000);
}
