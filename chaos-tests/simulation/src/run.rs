//! A run: a time of trouble, then a time in which all must come to rest, then the judgement.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::broken;
use crate::chance::Chance;
use crate::clients::Clients;
use crate::tell;
use crate::trace::Trace;
use crate::world::{Plan, World};

const MILLI: i64 = 1_000_000;
/// So long, at most, until all has come to rest after the trouble, in milliseconds.
const REST: i64 = 60_000;
const WRITERS: u64 = 4;
const FOLLOWERS: u64 = 2;

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What determines the run.
    pub seed: u64,
    /// The number of all that happened.
    pub hash: u64,
    /// What was broken.
    pub failures: Vec<String>,
    /// How many commits were acknowledged.
    pub acknowledged: u64,
    /// The end of the story.
    pub last: Vec<String>,
}

/// Runs a plan on a thread of its own, whose clock and chance are the simulation's.
///
/// # Panics
/// Where no thread can be had.
#[must_use]
#[allow(clippy::expect_used)]
pub fn run(plan: Plan, trace: Trace) -> Report {
    // The model is made once for all runs: before any of them, so that none makes it under its own chance.
    let _ = datamodel::model();
    let told = trace.clone();
    let thread = std::thread::Builder::new().name(format!("seed {}", plan.seed)).spawn(move || store(plan, &told));
    let acknowledged = match thread.expect("no thread for a simulation").join() {
        Ok(acknowledged) => acknowledged,
        Err(_) => {
            broken!(trace, "the simulation panicked");
            0
        }
    };
    Report { seed: plan.seed, hash: trace.hash(), failures: trace.failures(), acknowledged, last: trace.last() }
}

/// A pool of bare stores and their clients.
fn store(plan: Plan, trace: &Trace) -> u64 {
    let mut world = World::new(plan, trace.clone());
    let ends = i64::try_from(plan.trouble).unwrap_or(i64::MAX) * MILLI;
    let nodes = world.nodes.len() as u64;
    let clients = Clients::new(world.network.clone(), world.doors.clone(), trace.clone(), nodes, ends);
    let mut chance = Chance::new(plan.seed ^ 0xc11e);
    let working = Arc::new(AtomicU64::new(WRITERS + FOLLOWERS));
    let chances: Vec<Chance> = (0..=WRITERS + FOLLOWERS).map(|_| chance.fork()).collect();
    let (all, counted) = (clients.clone(), Arc::clone(&working));
    world.clients.spawn(async move {
        all.clone().found(chances[0].clone()).await;
        for (name, chance) in (1..=WRITERS + FOLLOWERS).zip(chances.into_iter().skip(1)) {
            let (all, counted) = (all.clone(), Arc::clone(&counted));
            tokio::spawn(async move {
                if name > WRITERS {
                    all.follow(name, chance).await;
                } else {
                    all.write_and_read(name, chance).await;
                }
                counted.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    while world.now() < ends && trace.failures().is_empty() {
        world.step();
        world.trouble();
    }
    world.mend();
    while world.now() < ends + REST * MILLI && trace.failures().is_empty() {
        world.step();
        if working.load(Ordering::Relaxed) == 0 && world.is_settled() {
            break;
        }
    }
    if trace.failures().is_empty() {
        let state = world.nodes[0].store().map(|store| store.state());
        match state.filter(|_| world.is_settled() && working.load(Ordering::Relaxed) == 0) {
            Some(state) => clients.judge(&state),
            None => broken!(trace, "the pool has not come to rest"),
        }
    }
    tell!(trace, "{} commits were acknowledged", clients.acknowledged());
    clients.acknowledged()
}
