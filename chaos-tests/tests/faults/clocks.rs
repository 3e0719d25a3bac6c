//! Clocks on the wall that are set while the pool works: nothing hangs on them.

use std::time::Duration;

use chaos_tests::history::load::Load;
use chaos_tests::lab::{Lab, What};

use crate::support::{SOON, other_master, until};
use crate::{SOME, configure, log};

const DAY: i64 = 24 * 3600;

/// Longer than between two rounds in which a master looks for what is over: sessions, tasks, answers.
const A_ROUND: Duration = Duration::from_secs(70);

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_saw_fits_together_when_clocks_are_set_forward_and_back() {
    set_the_clocks(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes some minutes; `make soak` runs it"]
async fn a_clock_that_is_ten_days_ahead_ends_no_session_and_forgets_no_answer() {
    set_the_clocks(A_ROUND).await;
}

async fn set_the_clocks(wrong_for: Duration) {
    let lab = Lab::sim().await.unwrap();
    let offset = |host: &str| lab.dir().join(host).join("clock-offset");
    configure(&lab, |host, text| format!("clock_offset = {:?}\n{text}", offset(host).display().to_string())).await;
    let mut load = Load::start(&lab).await.unwrap();
    load.some_more(SOME).await.unwrap();
    let elections = || lab.made().hosts.iter().map(|host| log(&lab, &host.name).matches("taking office").count()).sum();

    let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    let before: usize = elections();
    for jump in [10 * DAY, -10 * DAY, 3600, 0] {
        std::fs::write(offset(&master), jump.to_string()).unwrap();
        if jump == 10 * DAY {
            load.at_leisure(wrong_for).await;
        }
        load.some_more(SOME).await.unwrap();
    }
    assert_eq!(elections(), before, "a clock cost the master its office");

    // Every host has a time of its own, and each is master once.
    for (place, host) in (0..).zip(&lab.made().hosts) {
        std::fs::write(offset(&host.name), ((place - 1) * 30 * DAY).to_string()).unwrap();
    }
    for _ in 0..2 {
        let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
        lab.kill(&master, What::Controller).await.unwrap();
        other_master(&lab, &master).await;
        load.at_leisure(wrong_for).await;
        load.some_more(SOME).await.unwrap();
        lab.start(&master, What::Controller).await.unwrap();
    }
    load.some_more(SOME).await.unwrap();
    load.settle(&lab).await.unwrap();
}
