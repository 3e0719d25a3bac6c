//! Seeds that keep every promise, seeds that repeat themselves, and mistakes that are found.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output};

fn simulate(arguments: &[&str]) -> (bool, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_simulate")).args(arguments).output().unwrap();
    assert!(stderr.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    (status.success(), String::from_utf8(stdout).unwrap())
}

#[test]
fn every_promise_holds_whatever_goes_wrong() {
    let (kept, told) = simulate(&["--seeds", &std::env::var("SEEDS").unwrap_or_else(|_| "200".into())]);
    assert!(kept, "{told}");
}

#[test]
fn a_seed_is_the_same_run_again() {
    let (_, first) = simulate(&["--seeds", "12", "--traces"]);
    for seed in ["12", "3", "8"] {
        let (_, alone) = simulate(&["--seed", seed]);
        let trace = alone.lines().rev().find_map(|line| line.strip_prefix("trace ")).unwrap();
        assert!(
            first.contains(&format!("seed {seed} trace {trace}")),
            "seed {seed} went another way: {trace}\n{first}"
        );
    }
    let traces: std::collections::BTreeSet<_> =
        first.lines().filter_map(|line| line.split_once(" trace ").map(|(_, trace)| trace)).collect();
    assert_eq!(traces.len(), 12, "different seeds are the same run");
}

/// The kinds of trouble that bring a mistake to light, by their numbers in `trouble.rs`.
const CRASHES: &str = "1";
const HAND_OVERS: &str = "13";
const DAMAGE: &str = "19";
const SECLUSION: &str = "20";

/// A planted mistake breaks the promise that it should, in one of a thousand seeds whose favourite trouble it fears.
fn is_found(planted: &str, favourite: &str, sign: &str) {
    let asked = ["--seeds", "1000", "--planted", planted, "--favourite", favourite, "--until", sign];
    let (kept, told) = simulate(&asked);
    assert!(!kept && told.contains(sign), "{planted} was not found: {told}");
    eprintln!("{}", told.lines().find(|line| line.contains(" seeds in ")).unwrap_or_default());
}

#[test]
fn acknowledging_before_the_sync_is_found() {
    is_found("acknowledges-before-sync", CRASHES, "not linearizable");
}

#[test]
fn reading_while_deposed_is_found() {
    is_found("reads-while-deposed", HAND_OVERS, "not linearizable");
}

#[test]
fn keeping_the_lease_after_handing_over_is_found() {
    is_found("keeps-its-lease", HAND_OVERS, "not linearizable");
}

#[test]
fn forgetting_a_tombstone_early_is_found() {
    is_found("forgets-tombstones", CRASHES, "watcher");
}

#[test]
fn voting_behind_a_fence_is_found() {
    is_found("votes-behind-its-fence", DAMAGE, "has two leaders");
}

#[test]
fn taking_the_word_of_those_who_only_learn_is_found() {
    is_found("counts-learners", SECLUSION, "not linearizable");
}
