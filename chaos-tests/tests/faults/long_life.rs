//! A pool that lives long: its disk does not fill with what is over, and who was away for long comes back.

use std::path::Path;
use std::time::{Duration, Instant};

use chaos_tests::client::Client;
use chaos_tests::history::load::Load;
use chaos_tests::lab::{Lab, What};
use serde_json::json;
use tokio::task::JoinSet;

use crate::support::{SOON, new_vm, until};
use crate::{SOME, configure, log};

/// A text that makes an entry large.
pub const LARGE: usize = 64 << 10;
const WRITERS: usize = 4;

/// The log is cut often.
async fn short_logs(lab: &Lab) {
    configure(lab, |_, text| {
        let text = text.replace("snapshot_every = 20000", "snapshot_every = 100");
        text.replace("keep_entries = 10000", "keep_entries = 50")
    })
    .await;
}

fn bytes_in(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).unwrap().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|about| about.len()).sum()
}

/// Writes so many large texts, a few at a time; the slowest write.
pub async fn write_much(client: &Client, vms: &[String], count: usize) -> Duration {
    let mut writers = JoinSet::new();
    for vm in vms {
        let (vm, mut client) = (vm.clone(), client.at(client.endpoint()));
        let share = count / vms.len();
        writers.spawn(async move {
            let mut slowest = Duration::ZERO;
            for number in 0..share {
                let text = format!("{number} {}", "large".repeat(LARGE / 5));
                let begun = Instant::now();
                client.persist(SOON, "VM.set_name_description", json!([vm, text])).await.unwrap();
                slowest = slowest.max(begun.elapsed());
            }
            slowest
        });
    }
    writers.join_all().await.into_iter().max().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_stays_bounded_and_a_host_that_was_away_too_long_is_sent_the_state_while_the_pool_serves() {
    /// Four write-ahead logs: RocksDB starts a new one at 64 MiB and keeps the last until its rows are written; tables that
    /// are being merged are there twice for a moment.
    const BOUND: u64 = 256 << 20;
    /// What a log that is never cut would hold.
    const WRITTEN: u64 = 400 << 20;
    let lab = Lab::sim().await.unwrap();
    short_logs(&lab).await;
    let mut client = lab.client().await.unwrap();
    let mut vms = Vec::new();
    for writer in 0..WRITERS {
        vms.push(new_vm(&mut client, &format!("writer {writer}")).await);
    }
    let mut load = Load::start(&lab).await.unwrap();
    load.some_more(SOME).await.unwrap();
    let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    let away = lab.made().hosts.iter().find(|host| host.name != master).unwrap().name.clone();
    lab.kill(&away, What::Host).await.unwrap();

    let (mut written, mut most) = (0, 0);
    while written < WRITTEN {
        write_much(&client, &vms, 400).await;
        written += 400 * LARGE as u64;
        let stays = lab.made().hosts.iter().filter(|host| host.name != away);
        most = stays.map(|host| bytes_in(&lab.dir().join(&host.name).join("controller"))).max().unwrap().max(most);
    }
    eprintln!("{} MiB written, at most {} MiB on a host's disk", written >> 20, most >> 20);
    assert!(most < BOUND, "{} MiB on a disk after {} MiB of writes", most >> 20, written >> 20);

    let started = lab.start(&away, What::Host);
    let (started, slowest) = tokio::join!(started, write_much(&client, &vms, 200));
    started.unwrap();
    until(SOON, "the state to arrive", async || log(&lab, &away).contains("installing a snapshot").then_some(())).await;
    eprintln!("the slowest write while the state was sent: {} ms", slowest.as_millis());
    assert!(slowest < Duration::from_secs(2), "a write took {} ms meanwhile", slowest.as_millis());
    // It has all of it: with another host down nothing goes without it.
    let third = lab.made().hosts.iter().find(|host| host.name != away && host.name != master).unwrap();
    lab.kill(&third.name, What::Host).await.unwrap();
    load.some_more(SOME).await.unwrap();
    lab.start(&third.name, What::Host).await.unwrap();
    load.settle(&lab).await.unwrap();
}
