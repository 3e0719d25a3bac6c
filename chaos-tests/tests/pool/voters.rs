//! More hosts than may vote: who does, and who does when voters die.

use std::collections::BTreeSet;
use std::time::Duration;

use chaos_tests::client::Client;
use chaos_tests::lab::{Lab, What, program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{SOON, new_vm, until};

const HOSTS: u64 = 9;
/// What the configuration says unless it says otherwise.
const VOTERS: usize = 5;
/// Voters that are silent for longer are replaced.
const REPLACE_AFTER_MS: &str = "1500";
/// Nine controllers on a small machine take their time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Node numbers of the members that vote, by the newest log line of any master, and how many such lines there are.
fn voters(lab: &Lab) -> (BTreeSet<u64>, usize) {
    const MARK: &str = "these members vote voters={";
    let mut told = Vec::new();
    for host in &lab.made().hosts {
        let log = std::fs::read_to_string(lab.dir().join(&host.name).join("controller.log")).unwrap();
        // Lines begin with their time.
        told.extend(log.lines().filter(|line| line.contains(MARK)).map(str::to_owned));
    }
    told.sort_unstable();
    let numbers =
        told.last().and_then(|line| line.split_once(MARK)?.1.split_once('}')).map_or("", |(numbers, _)| numbers);
    (numbers.split(", ").filter_map(|number| number.parse().ok()).collect(), told.len())
}

fn name(node: u64) -> String {
    format!("host{node}")
}

/// SIGKILL to the controllers of all these hosts, as near to at once as can be.
async fn kill_at_once(lab: &Lab, nodes: impl IntoIterator<Item = u64>) {
    let state = lab.status().await.unwrap();
    for node in nodes {
        let process = state.host(&name(node)).unwrap().controller_pid.expect("it runs");
        kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
    }
}

async fn written(client: &mut Client, vm: &str, text: &str) {
    client.persist(PATIENCE, "VM.set_name_description", json!([vm, text])).await.unwrap();
    let read = client.persist(PATIENCE, "VM.get_name_description", json!([vm])).await.unwrap();
    assert_eq!(read, text);
}

#[tokio::test(flavor = "multi_thread")]
async fn five_of_nine_hosts_vote_and_learners_take_the_votes_of_hosts_that_die() {
    let flags = ["--replicas", "9", "--replace-after-ms", REPLACE_AFTER_MS, "--wait", "100"];
    let lab = Lab::with(&program().unwrap(), &std::env::temp_dir(), HOSTS as u8, "sim", &flags).await.unwrap();
    let mut client = lab.client().await.unwrap().with_call_limit(Duration::from_secs(5));
    let vm = new_vm(&mut client, "written throughout").await;
    // Whoever founds the pool votes until the pool has chosen.
    until(SOON, "five to vote", async || (voters(&lab).0.len() == VOTERS).then_some(())).await;
    let (first, _) = voters(&lab);
    let learners: BTreeSet<u64> = (1..=HOSTS).filter(|node| !first.contains(node)).collect();

    // Six of nine die at once, the four that do not vote among them: were they asked, there would be no majority.
    let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    let others: Vec<u64> = first.iter().copied().filter(|node| name(*node) != master).collect();
    let dead: Vec<u64> = learners.iter().chain(&others[..2]).copied().collect();
    kill_at_once(&lab, dead.iter().copied()).await;
    written(&mut client, &vm, "three voters are left of five").await;
    for node in dead {
        lab.start(&name(node), What::Controller).await.unwrap();
    }
    written(&mut client, &vm, "all are there again").await;

    // Two and two voters die, and each time learners take their place: in the end four of the first five are dead.
    let mut gone = BTreeSet::new();
    for round in 0..2 {
        let (now, told) = voters(&lab);
        let victims: Vec<u64> = now.iter().copied().take(2).collect();
        kill_at_once(&lab, victims.iter().copied()).await;
        gone.extend(victims);
        written(&mut client, &vm, &format!("two voters have died, round {round}")).await;
        until(PATIENCE, "learners to vote in place of the dead", async || {
            let (now, later) = voters(&lab);
            (later > told && now.len() == VOTERS && now.is_disjoint(&gone)).then_some(())
        })
        .await;
    }
    // All who are left vote. A minority of nine rules, for it was never silent.
    let (now, _) = voters(&lab);
    assert_eq!(now, (1..=HOSTS).filter(|node| !gone.contains(node)).collect());
    kill_at_once(&lab, now.iter().copied().take(2)).await;
    written(&mut client, &vm, "three of nine are left").await;
}
