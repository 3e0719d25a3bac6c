//! The lab keeps what it promises to those who use it.

use chaos_tests::lab::{Host, Lab, What};
use serde_json::json;

use crate::support::{lives, new_vm, processes_with};

fn pids(hosts: &[Host]) -> Vec<i32> {
    hosts.iter().flat_map(|host| [host.controller_pid, host.agent_pid]).map(|pid| pid.expect("a process")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_up_changes_nothing_and_after_down_nothing_runs_and_nothing_is_lost() {
    let lab = Lab::sim().await.unwrap();
    let made = lab.made().clone();
    assert!(made.master.is_some() && made.hosts.len() == 3 && made.user == "root");
    let processes = pids(&made.hosts);
    assert!(processes.iter().all(|pid| lives(*pid)));
    for (host, last) in made.hosts.iter().zip(1..) {
        uuid::Uuid::parse_str(&host.uuid).unwrap();
        assert!(host.address.ends_with(&format!(".{last}")) && host.url == format!("https://{}:8443", host.address));
        assert!(host.socket.exists() && host.state == "running");
    }
    assert_eq!(lab.up_again(&[]).await.unwrap().hosts, made.hosts);
    assert_eq!(lab.status().await.unwrap().hosts, made.hosts);

    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "kept").await;
    let pool = client.call("pool.get_all", json!([])).await.unwrap();

    let down = lab.down().await.unwrap();
    assert!(down.master.is_none() && down.hosts.iter().all(|host| host.state == "dead" && host.agent_pid.is_none()));
    assert!(processes.iter().all(|pid| !lives(*pid)));
    // The lab's guard alone, which waits for this test's end, knows the directory.
    let left = processes_with(&[lab.dir().to_str().unwrap()]);
    assert_eq!(left.len(), 1, "{left:?}");

    lab.up_again(&[]).await.unwrap();
    let mut client = lab.client().await.unwrap();
    assert_eq!(client.call("pool.get_all", json!([])).await.unwrap(), pool);
    assert_eq!(client.call("VM.get_name_label", json!([vm])).await.unwrap(), "kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_are_shown_as_they_are_when_killed_paused_and_started() {
    let lab = Lab::sim().await.unwrap();
    let victim = lab.made().others()[0].name.clone();
    let state = |hosts: &chaos_tests::lab::State| hosts.host(&victim).unwrap().state.clone();

    assert_eq!(state(&lab.pause(&victim, What::Host).await.unwrap()), "paused");
    assert_eq!(state(&lab.resume(&victim, What::Host).await.unwrap()), "running");
    assert_eq!(state(&lab.kill(&victim, What::Controller).await.unwrap()), "partial");
    assert_eq!(state(&lab.kill(&victim, What::Host).await.unwrap()), "dead");
    assert_eq!(state(&lab.start(&victim, What::Agent).await.unwrap()), "partial");
    assert_eq!(state(&lab.start(&victim, What::Host).await.unwrap()), "running");
}
