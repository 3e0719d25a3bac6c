//! A run: a time of trouble, then a time in which all must come to rest, then the judgement.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};

use raft_store::State;
use serde::{Deserialize, Serialize};

use crate::agents::Hosts;
use crate::broken;
use crate::calls::Callers;
use crate::chance::Chance;
use crate::clients::Clients;
use crate::line::Surroundings;
use crate::tell;
use crate::trace::Trace;
use crate::world::{Plan, World};

const MILLI: i64 = 1_000_000;
/// So long, at most, until all has come to rest after the trouble, in milliseconds.
const REST: i64 = 60_000;
const WORKERS: u64 = 4;
const FOLLOWERS: u64 = 2;
/// Who looks what becomes of a leader that is left alone: one reads, one writes.
const HURRIED: u64 = 2;

/// What came of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// Makes what is made once for all runs, so that none makes it under its own chance.
pub(crate) fn prepare() {
    static TABLES: Once = Once::new();
    TABLES.call_once(|| drop(controller::coverage::document()));
}

/// Runs a plan on a thread of its own, whose clock and chance are the simulation's.
///
/// # Panics
/// Where no thread can be had.
#[must_use]
#[allow(clippy::expect_used)]
pub(crate) fn run(plan: Plan, trace: Trace) -> Report {
    prepare();
    let told = trace.clone();
    let thread = std::thread::Builder::new().name(format!("seed {}", plan.seed)).spawn(move || live(plan, &told));
    let acknowledged = match thread.expect("no thread for a simulation").join() {
        Ok(acknowledged) => acknowledged,
        Err(_) => {
            broken!(trace, "the simulation panicked");
            0
        }
    };
    Report { seed: plan.seed, hash: trace.hash(), failures: trace.failures(), acknowledged, last: trace.last() }
}

/// Who uses a pool.
enum Users {
    /// Of bare stores.
    Clients(Clients),
    /// Of controllers.
    Callers(Callers, Hosts),
}

impl Users {
    async fn begin(&self, chance: Chance) {
        match self {
            Self::Clients(clients) => clients.clone().found(chance).await,
            Self::Callers(callers, _) => callers.clone().begin(chance).await,
        }
    }

    async fn live(&self, name: u64, chance: Chance) {
        match self {
            Self::Clients(clients) if name > WORKERS + FOLLOWERS => {
                clients.clone().watch_the_secluded(name, chance, name == WORKERS + FOLLOWERS + 1).await;
            }
            Self::Clients(clients) if name > WORKERS => clients.clone().follow(name, chance).await,
            Self::Clients(clients) => clients.clone().write_and_read(name, chance).await,
            Self::Callers(callers, hosts) if name > WORKERS + FOLLOWERS => {
                callers.clone().oversee(name, chance, hosts.clone()).await;
            }
            Self::Callers(callers, _) if name > WORKERS => callers.clone().follow(name, chance).await,
            Self::Callers(callers, _) => callers.clone().work(name, chance).await,
        }
    }

    fn judge(&self, state: &State) {
        match self {
            Self::Clients(clients) => clients.judge(state),
            Self::Callers(callers, _) => callers.judge(state),
        }
    }

    fn answered(&self) -> u64 {
        match self {
            Self::Clients(clients) => clients.acknowledged(),
            Self::Callers(callers, _) => callers.answered(),
        }
    }
}

/// A pool in trouble, at rest, and judged. How many commits or calls were answered.
fn live(plan: Plan, trace: &Trace) -> u64 {
    trace.hear_panics();
    let mut world = World::new(plan, trace.clone());
    let ends = i64::try_from(plan.trouble).unwrap_or(i64::MAX) * MILLI;
    let all = Surroundings {
        network: world.network.clone(),
        doors: world.doors.clone(),
        trace: trace.clone(),
        seclusion: world.seclusion.subscribe(),
        ends,
        history: world.history(),
    };
    let users = Arc::new(match &world.hosts {
        Some(hosts) => Users::Callers(Callers::new(all), hosts.clone()),
        None => Users::Clients(Clients::new(all)),
    });
    let mut chance = Chance::new(plan.seed ^ 0xc11e);
    let many = WORKERS + FOLLOWERS + if plan.controllers { 1 } else { HURRIED };
    let working = Arc::new(AtomicU64::new(many));
    let chances: Vec<Chance> = (0..=many).map(|_| chance.fork()).collect();
    let (all, counted) = (Arc::clone(&users), Arc::clone(&working));
    world.clients.spawn(async move {
        all.begin(chances[0].clone()).await;
        for (name, chance) in (1..=many).zip(chances.into_iter().skip(1)) {
            let (all, counted) = (Arc::clone(&all), Arc::clone(&counted));
            tokio::spawn(async move {
                all.live(name, chance).await;
                counted.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    while world.now() < ends && trace.failures().is_empty() {
        world.step();
        world.trouble();
    }
    world.mend();
    let mut left = vec!["everything".to_owned()];
    while world.now() < ends + REST * MILLI && trace.failures().is_empty() && !left.is_empty() {
        world.step();
        left = unrest(&world, working.load(Ordering::Relaxed));
    }
    if trace.failures().is_empty() {
        match world.settled() {
            Some(store) if left.is_empty() => users.judge(&store.state()),
            _ => broken!(trace, "the pool does not come to rest: {left:?}"),
        }
    }
    tell!(trace, "{} were answered", users.answered());
    users.answered()
}

/// What keeps a pool from being at rest.
fn unrest(world: &World, working: u64) -> Vec<String> {
    let settled = world.settled();
    let store = match settled {
        Some(store) if working == 0 => store,
        settled => return vec![format!("{working} clients, nodes at one: {}", settled.is_some())],
    };
    let Some(hosts) = &world.hosts else { return Vec::new() };
    let state = store.state();
    let mut left = Callers::under_way(&state);
    if store.is_between_voters() {
        left.push("a change of voters".to_owned());
    }
    left.extend(Callers::unlike(&state, hosts));
    left
}
