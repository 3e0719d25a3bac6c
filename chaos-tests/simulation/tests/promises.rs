//! Seeds that keep every promise, a seed that repeats itself, and mistakes that are found.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;

use simulation::{Plan, Planted, Report, Trace, run, run_many};

/// As many as CI runs; `SEEDS` asks for others.
fn seeds() -> u64 {
    std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(200)
}

#[test]
fn every_promise_holds_whatever_goes_wrong() {
    let reports = run_many((1..=seeds()).map(Plan::of), |_| true);
    let broken: Vec<_> = reports.iter().filter(|report| !report.failures.is_empty()).collect();
    for report in &broken {
        eprintln!("seed {}: {:?}", report.seed, report.failures);
    }
    assert!(broken.is_empty(), "again: make simulate SEED={}", broken[0].seed);
    let acknowledged: u64 = reports.iter().map(|report| report.acknowledged).sum();
    assert!(acknowledged > 50 * reports.len() as u64, "only {acknowledged} commits: the trouble lets nothing happen");
}

#[test]
fn a_seed_is_the_same_run_again() {
    for seed in [3, 4, 5] {
        let first = run(Plan::of(seed), Trace::default());
        let again = run(Plan::of(seed), Trace::default());
        assert_eq!(first, again, "seed {seed} went another way");
    }
    // Also in a program of its own, whose first run it is.
    let alone = Command::new(env!("CARGO_BIN_EXE_simulate")).args(["--seed", "6"]).output().unwrap();
    let told = String::from_utf8(alone.stdout).unwrap();
    let hash = format!("trace {:016x}", run(Plan::of(6), Trace::default()).hash);
    assert!(told.contains(&hash), "{hash} is not that of {told}");
    assert_ne!(run(Plan::of(3), Trace::default()).hash, run(Plan::of(4), Trace::default()).hash);
}

fn shows(report: &Report, sign: &str) -> bool {
    report.failures.iter().any(|failure| failure.contains(sign))
}

/// A planted mistake breaks a promise in one of the first seeds.
fn is_found(planted: Planted, sign: &str) {
    let plans = (1..=400).map(|seed| Plan { planted: Some(planted), ..Plan::of(seed) });
    let reports = run_many(plans, |report| !shows(report, sign));
    let found = reports.iter().any(|report| shows(report, sign));
    assert!(found, "{planted:?} was not found in {} seeds", reports.len());
    eprintln!("{planted:?} was found in {} seeds", reports.len());
}

#[test]
fn acknowledging_before_the_sync_is_found() {
    is_found(Planted::AcknowledgesBeforeSync, "");
}

#[test]
fn reading_while_deposed_is_found() {
    is_found(Planted::ReadsWhileDeposed, "not linearizable");
}

#[test]
fn forgetting_a_tombstone_early_is_found() {
    is_found(Planted::ForgetsTombstones, "watcher");
}
