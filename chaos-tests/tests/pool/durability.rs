//! No acknowledged write is lost.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use chaos_tests::client::{CallError, Client};
use chaos_tests::lab::{Lab, What};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::support::{SOON, new_vm, until};

const WRITERS: usize = 4;
/// How many writes come before, between and after the faults.
const SOME: u64 = 60;

/// Clients that write as fast as they can, each to a VM of its own, and remember what was acknowledged.
struct Traffic {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    writers: JoinSet<(String, BTreeSet<String>)>,
}

impl Traffic {
    async fn start(lab: &Lab) -> Self {
        let mut traffic = Self { stop: Arc::default(), acknowledged: Arc::default(), writers: JoinSet::new() };
        for writer in 0..WRITERS {
            let mut client = lab.client().await.unwrap().with_call_limit(Duration::from_secs(2));
            let vm = new_vm(&mut client, &format!("writer {writer}")).await;
            traffic.writers.spawn(write(client, vm, Arc::clone(&traffic.stop), Arc::clone(&traffic.acknowledged)));
        }
        traffic
    }

    /// Waits until so many more writes were acknowledged.
    async fn some_more(&self) {
        let goal = self.acknowledged.load(Ordering::Relaxed) + SOME;
        let reached = async || (self.acknowledged.load(Ordering::Relaxed) >= goal).then_some(());
        until(Duration::from_secs(60), "more acknowledged writes", reached).await;
    }

    /// Ends it, and looks for every acknowledged write.
    async fn check(mut self, client: &mut Client) {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = 0;
        while let Some(writer) = self.writers.join_next().await {
            let (vm, acknowledged) = writer.unwrap();
            let found = client.persist(SOON, "VM.get_other_config", json!([vm])).await.unwrap();
            let found: BTreeSet<_> = found.as_object().unwrap().keys().cloned().collect();
            let lost: Vec<_> = acknowledged.difference(&found).collect();
            assert!(lost.is_empty(), "{} of {} acknowledged writes are lost: {lost:?}", lost.len(), acknowledged.len());
            total += acknowledged.len();
        }
        assert!(total as u64 >= 2 * SOME, "only {total} writes: nothing was tried");
    }
}

/// Adds one key after the other. A key that was there already was added by a try whose answer was lost: its
/// acknowledgement is this one.
async fn write(
    mut client: Client,
    vm: String,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
) -> (String, BTreeSet<String>) {
    let mut acknowledged = BTreeSet::new();
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("key-{number}");
        let parameters = json!([vm, key, "value"]);
        match client.persist(Duration::from_secs(40), "VM.add_to_other_config", parameters).await {
            Ok(_) => {}
            Err(CallError::Refused(failure)) if failure.code == "MAP_DUPLICATE_KEY" => {}
            Err(error) => panic!("no host takes writes: {error}"),
        }
        acknowledged.insert(key);
        count.fetch_add(1, Ordering::Relaxed);
        // A record with thousands of keys would be all that is measured.
        sleep(Duration::from_millis(5)).await;
    }
    (vm, acknowledged)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_when_any_one_host_is_killed() {
    let lab = Lab::sim().await.unwrap();
    let traffic = Traffic::start(&lab).await;
    // Every host in turn, and the master of the moment once more.
    for name in ["host1", "host2", "host3", "the master"] {
        traffic.some_more().await;
        let victim = match name {
            "the master" => until(SOON, "a master", async || lab.status().await.unwrap().master).await,
            name => name.to_owned(),
        };
        lab.kill(&victim, What::Host).await.unwrap();
        traffic.some_more().await;
        lab.start(&victim, What::Host).await.unwrap();
    }
    traffic.some_more().await;
    traffic.check(&mut lab.client().await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_when_all_hosts_are_killed_at_once() {
    let lab = Lab::sim().await.unwrap();
    let traffic = Traffic::start(&lab).await;
    for _ in 0..2 {
        traffic.some_more().await;
        let state = lab.status().await.unwrap();
        let processes = state.hosts.iter().flat_map(|host| [host.controller_pid, host.agent_pid]);
        let processes: Vec<_> = processes.map(|pid| Pid::from_raw(pid.expect("a process"))).collect();
        for process in processes {
            kill(process, Signal::SIGKILL).unwrap();
        }
        lab.up_again(&[]).await.unwrap();
    }
    traffic.some_more().await;
    traffic.check(&mut lab.client().await.unwrap()).await;
}
