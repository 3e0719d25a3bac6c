//! The simulated pool in time, and what must hold all the while; what goes wrong is in `trouble`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use controller::VoterPolicy;
use datamodel::{ClassId, OpaqueRef};
use raft_store::{ChangeKind, History, Leadership, LogIndex, Member, Planted, Store};
use tokio::sync::watch;

use crate::agents::Hosts;
use crate::chance::Chance;
use crate::disk::{Disk, Leaders};
use crate::kernel;
use crate::line::Seclusion;
use crate::network::Network;
use crate::node::{self, Doors, Node, Setting};
use crate::process::Process;
use crate::trace::Trace;
use crate::trouble::{KINDS, Plot};
use crate::{broken, tell};

/// Time moves in steps of this many nanoseconds.
const STEP: i64 = 1_000_000;
pub(crate) const MILLI: i64 = 1_000_000;
/// By so many millionths a clock runs too fast or too slow, at most: the fastest is not quite a third faster than the
/// slowest, which is what the margin of a lease, a quarter, is for.
const FASTEST: u64 = 140_000;

/// How a run is made.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// What determines it.
    pub seed: u64,
    /// A mistake that is to be found.
    pub planted: Option<Planted>,
    /// For so many simulated milliseconds things go wrong; then all is mended.
    pub trouble: u64,
    /// Whether controllers and their agents run on the stores.
    pub controllers: bool,
    /// The kind of trouble that comes every other time; none leaves it to the seed, which lets one come every fourth time.
    pub favourite: Option<u64>,
}

impl Plan {
    /// The run of a seed. Two of three are of bare stores, whose trouble is the densest.
    #[must_use]
    pub const fn of(seed: u64) -> Self {
        Self { seed, planted: None, trouble: 12_000, controllers: seed.is_multiple_of(3), favourite: None }
    }
}

/// A pool, its clients, and the trouble they get into.
pub struct World {
    pub(crate) now: i64,
    pub(crate) chance: Chance,
    /// The story.
    pub trace: Trace,
    /// Between all.
    pub network: Network,
    /// How clients reach nodes.
    pub doors: Doors,
    /// The hosts' agents, where controllers run.
    pub hosts: Option<Hosts>,
    /// The hosts.
    pub nodes: Vec<Node>,
    /// Where the clients live.
    pub clients: Process,
    pub(crate) next_trouble: i64,
    pub(crate) mend_at: Option<i64>,
    setting: Setting,
    leaders: Leaders,
    /// Every set of voters that was ever asked for: any of them may rule.
    pub(crate) asked: Vec<BTreeSet<u64>>,
    /// Whether there may be one voter or two, so that none can be lost; else three at least.
    pub(crate) shrinks: bool,
    drifts: bool,
    /// The kind of trouble that this run has most of.
    pub(crate) favourite: u64,
    /// One of so many troubles is of that kind.
    pub(crate) favoured: u64,
    /// The last time that a leader was left alone.
    pub(crate) seclusion: watch::Sender<Seclusion>,
    /// What comes next of what has begun, and when.
    pub(crate) plot: Option<(i64, Plot)>,
    /// Epochs and who had them.
    epochs: BTreeMap<LogIndex, u64>,
    /// What each entry did to each object, as the first node that applied it has it.
    applied: BTreeMap<(LogIndex, ClassId, OpaqueRef), (bool, String)>,
}

impl World {
    /// A pool whose hosts are about to start, on a thread that is a simulation's from now on.
    #[must_use]
    pub fn new(plan: Plan, trace: Trace) -> Self {
        kernel::begin(plan.seed);
        let mut chance = Chance::new(plan.seed ^ 0x5eed);
        let network = Network::new(chance.fork(), trace.clone());
        let doors = Doors::default();
        let size = if plan.controllers { 3 + chance.below(3) } else { 3 + 2 * u64::from(chance.one_in(4)) };
        let hosts = plan.controllers.then(|| Hosts::new(size, chance.fork(), trace.clone()));
        let setting = Setting {
            hosts: hosts.clone(),
            network: network.clone(),
            doors: doors.clone(),
            trace: trace.clone(),
            members: (1..=size).map(node::member).collect(),
            planted: plan.planted,
            snapshot_every: 40 + chance.below(200),
            // Seldom so long as in the product: a watcher that is away for a few seconds is to have missed something.
            history: if chance.one_in(4) {
                History::default()
            } else {
                History { entries: 20 + chance.below(150), seconds: 0 }
            },
            // With four hosts or five one learns, or two, and takes the place of a voter that is away for a while.
            voters: VoterPolicy { most: 3, replace_after: chance.millis(1_000, 4_000) },
        };
        let mut world = Self {
            now: 0,
            nodes: Vec::new(),
            leaders: Arc::default(),
            asked: vec![(1..=size).collect()],
            shrinks: chance.one_in(3),
            drifts: chance.one_in(2),
            favourite: plan.favourite.unwrap_or_else(|| chance.below(KINDS)),
            favoured: if plan.favourite.is_some() { 2 } else { 4 },
            seclusion: watch::Sender::default(),
            plot: None,
            setting,
            chance,
            trace,
            network,
            doors,
            hosts,
            clients: Process::start(),
            next_trouble: 2_000 * MILLI,
            mend_at: None,
            epochs: BTreeMap::new(),
            applied: BTreeMap::new(),
        };
        tell!(world.trace, "seed {}: {size} nodes", plan.seed);
        world.network.set_faults(400);
        for _ in 0..size {
            world.found();
        }
        world
    }

    /// Another host, with an empty disk, a clock of its own and an id that nobody had.
    pub(crate) fn found(&mut self) -> Member {
        let id = self.nodes.last().map_or(1, |node| node.id + 1);
        let (chance, trace) = (self.chance.fork(), self.trace.clone());
        let disk = Disk::new(format!("disk {id}"), chance, trace, Arc::clone(&self.leaders));
        let mut node = Node::new(id, disk, self.setting.clone());
        if self.drifts {
            node.rate = i64::try_from(self.chance.below(2 * FASTEST + 1)).unwrap_or(0) - FASTEST.cast_signed();
            tell!(self.trace, "node {id}'s clocks run by {} ppm too fast", node.rate);
        }
        node.start();
        let member = node.member();
        self.nodes.push(node);
        member
    }

    /// So many entries, at least, deletions are remembered for.
    #[must_use]
    pub fn history(&self) -> u64 {
        self.setting.history.entries
    }

    /// Simulated time, in nanoseconds since the beginning.
    #[must_use]
    pub fn now(&self) -> i64 {
        self.now
    }

    /// Lets time go on for a step.
    pub fn step(&mut self) {
        self.now += STEP;
        kernel::set_clock(self.now, 0, 0);
        for node in &mut self.nodes {
            node.drift += STEP * node.rate / 1_000_000;
            if node.start_at.is_some_and(|at| at <= self.now) {
                node.start();
            }
            if node.paused_until.is_some_and(|until| until <= self.now) {
                node.go_on();
            }
        }
        self.network.deliver();
        let first = self.chance.index(self.nodes.len());
        for at in 0..self.nodes.len() {
            let at = (first + at) % self.nodes.len();
            let node = &mut self.nodes[at];
            let (Some(process), None) = (&node.process, node.paused_until) else { continue };
            node.timed(|_| process.run(None));
            if process.watch().is_doomed() {
                node.crash(self.chance.one_in(2));
                node.start_at = Some(self.now + i64::try_from(self.chance.below(2_000)).unwrap_or(0) * MILLI);
            }
        }
        self.clients.run(None);
        self.check();
    }

    /// No more trouble: all is whole again, and whoever is down starts.
    pub fn mend(&mut self) {
        tell!(self.trace, "all is mended");
        self.network.set_faults(0);
        self.network.set_delay(100, 1_500);
        self.network.mend();
        for node in &mut self.nodes {
            node.disk.set_full(false);
            node.disk.set_sync(100, 3_000);
            node.disk.disarm();
            node.go_on();
            if node.process.is_none() && !node.lost {
                node.start();
            }
        }
        if let Some(hosts) = &self.hosts {
            hosts.mend();
        }
    }

    /// The leader, where every member that is not lost for good has applied what it has, and may vote.
    #[must_use]
    pub fn settled(&self) -> Option<Store> {
        let leader = self.nodes[self.leader()?].store()?;
        let newest = leader.state().applied;
        let members = leader.members();
        let is_one = |node: &&Node| !node.lost && members.iter().any(|member| member.node_id == node.id);
        let stands =
            |node: &Node| node.store().is_some_and(|store| store.state().applied == newest && !store.is_fenced());
        self.nodes.iter().filter(is_one).all(stands).then_some(leader)
    }

    /// What must hold at any time.
    fn check(&mut self) {
        if let Some(hosts) = &self.hosts {
            // It tells of a VM that runs twice.
            let _ = hosts.domains();
        }
        for at in 0..self.nodes.len() {
            let Some(store) = self.nodes[at].store() else { continue };
            let id = self.nodes[at].id;
            if let Leadership::Leader { epoch } = *store.leadership().borrow() {
                let known = self.epochs.insert(epoch, id);
                if known.is_none() {
                    tell!(self.trace, "node {id} leads, epoch {epoch}");
                }
                if known.is_some_and(|known| known != id) {
                    broken!(self.trace, "epoch {epoch} has two leaders: {id} and {known:?}");
                }
            }
            if self.nodes[at].damaged && !store.is_fenced() {
                tell!(self.trace, "node {id} is whole again");
                self.nodes[at].damaged = false;
            }
            let state = store.state();
            let (kept, oldest) = (self.setting.history.entries, state.oldest_token());
            if oldest > LogIndex(0) && oldest.0 + kept > state.applied.0 {
                broken!(self.trace, "node {id} at {} forgot what was before {oldest}", state.applied);
            }
            let seen = self.nodes[at].seen;
            if state.applied <= seen {
                continue;
            }
            for change in state.changes_since(seen) {
                let label = change.row.as_ref().map(|row| row.name_label().to_owned()).unwrap_or_default();
                let what = (change.kind == ChangeKind::Deleted, label);
                let key = (change.index, change.class, change.reference);
                let first = self.applied.entry(key).or_insert_with(|| what.clone());
                if *first != what {
                    broken!(self.trace, "entry {} is {what:?} to node {id}, and {first:?} to another", change.index);
                }
            }
            self.trace.count("applied", &[id, state.applied.0].map(u64::to_le_bytes).concat());
            self.doors.applied(state.applied);
            self.nodes[at].seen = state.applied;
        }
    }
}
