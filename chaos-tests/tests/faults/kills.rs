//! SIGKILL: of one host after the other, and of all at once.

use chaos_tests::history::load::Load;
use chaos_tests::lab::{Lab, What};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::SOME;
use crate::support::{SOON, until};

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_saw_fits_together_when_each_host_is_killed_in_turn_and_then_all_at_once() {
    let lab = Lab::sim().await.unwrap();
    let mut load = Load::start(&lab).await.unwrap();
    load.some_more(SOME).await.unwrap();
    // Every host in turn, and the master of the moment once more.
    for name in ["host1", "host2", "host3", "the master"] {
        let victim = match name {
            "the master" => until(SOON, "a master", async || lab.status().await.unwrap().master).await,
            name => name.to_owned(),
        };
        lab.kill(&victim, What::Host).await.unwrap();
        load.some_more(SOME).await.unwrap();
        lab.start(&victim, What::Host).await.unwrap();
        load.some_more(SOME).await.unwrap();
    }
    let state = lab.status().await.unwrap();
    let processes = state.hosts.iter().flat_map(|host| [host.controller_pid, host.agent_pid]);
    for process in processes.map(|pid| Pid::from_raw(pid.expect("a process"))).collect::<Vec<_>>() {
        kill(process, Signal::SIGKILL).unwrap();
    }
    lab.up_again(&[]).await.unwrap();
    load.some_more(SOME).await.unwrap();
    load.settle(&lab).await.unwrap();
}
