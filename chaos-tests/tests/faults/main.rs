//! What clients see of a pool of real processes while hosts are killed, stopped, robbed of their disks and of their time.
//!
//! Every scenario runs under the load of `chaos_tests::history`, which judges in the end whether one pool can have shown
//! its clients what they saw, and whether anything was left half done.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may take a failure for what it is")]

mod clocks;
mod disks;
mod epochs;
mod handover;
mod kills;
mod long_life;
mod pauses;
mod silence;
#[path = "../pool/support.rs"]
#[allow(dead_code, reason = "shared with the other tests of whole pools")]
mod support;
mod versions;

use chaos_tests::lab::{Lab, What};

/// Acknowledged writes before, during and after each fault.
const SOME: u64 = 40;

/// Changes what the controllers of a lab are told, and starts them again.
async fn configure(lab: &Lab, change: impl Fn(&str, String) -> String) {
    for host in &lab.made().hosts {
        lab.kill(&host.name, What::Controller).await.unwrap();
        let path = lab.dir().join(&host.name).join("controller.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, change(&host.name, text)).unwrap();
    }
    // None serves alone, so all of them are started before the last is waited for.
    let [one, two, three] = &lab.made().hosts[..] else { panic!("a lab of three") };
    let start = |name| lab.start(name, What::Controller);
    let started = tokio::join!(start(&one.name), start(&two.name), start(&three.name));
    for started in [started.0, started.1, started.2] {
        started.unwrap();
    }
}

/// What the controller of a host has logged.
fn log(lab: &Lab, host: &str) -> String {
    std::fs::read_to_string(lab.dir().join(host).join("controller.log")).unwrap()
}
