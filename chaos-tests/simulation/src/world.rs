//! The simulated pool in time: what goes wrong, when, and what must hold all the while.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use datamodel::{ClassId, OpaqueRef};
use parking_lot::Mutex;
use raft_store::{ChangeKind, Leadership, LogIndex, Member, Planted};

use crate::agents::{self, Hosts};
use crate::chance::Chance;
use crate::clients;
use crate::disk::{Disk, Moment};
use crate::kernel;
use crate::network::Network;
use crate::node::{Ask, Doors, Node, Setting};
use crate::process::Process;
use crate::trace::Trace;
use crate::{broken, tell};

/// Time moves in steps of this many nanoseconds.
const STEP: i64 = 1_000_000;
const MILLI: i64 = 1_000_000;

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
}

impl Plan {
    /// The run of a seed. Two of three are of bare stores, whose trouble is the densest.
    #[must_use]
    pub const fn of(seed: u64) -> Self {
        Self { seed, planted: None, trouble: 12_000, controllers: seed.is_multiple_of(3) }
    }
}

/// A pool, its clients, and the trouble they get into.
pub struct World {
    now: i64,
    chance: Chance,
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
    next_trouble: i64,
    mend_at: Option<i64>,
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
        let size = if chance.one_in(4) { 5 } else { 3 };
        let members = (1..=size).map(|node_id| Member {
            node_id,
            peer_address: format!("peer-{node_id}"),
            api_address: format!("127.0.0.{node_id}"),
        });
        let hosts = plan.controllers.then(|| Hosts::new(size, chance.fork(), trace.clone()));
        let setting = Setting {
            hosts: hosts.clone(),
            network: network.clone(),
            doors: doors.clone(),
            trace: trace.clone(),
            members: members.collect(),
            planted: plan.planted,
            snapshot_every: 40 + chance.below(200),
        };
        let leaders = Arc::new(Mutex::new(BTreeMap::new()));
        let nodes = (1..=size).map(|id| {
            let disk = Disk::new(format!("disk {id}"), chance.fork(), trace.clone(), Arc::clone(&leaders));
            Node::new(id, disk, setting.clone())
        });
        let mut world = Self {
            now: 0,
            nodes: nodes.collect(),
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
        for node in &mut world.nodes {
            node.start();
        }
        world
    }

    /// Simulated time, in nanoseconds since the beginning.
    #[must_use]
    pub fn now(&self) -> i64 {
        self.now
    }

    /// Lets time go on for a step.
    pub fn step(&mut self) {
        self.now += STEP;
        kernel::set_clock(self.now, 0);
        for node in &mut self.nodes {
            if node.start_at.is_some_and(|at| at <= self.now) {
                node.start();
            }
            if node.paused_until.is_some_and(|until| until <= self.now) {
                tell!(self.trace, "node {} wakes", node.id);
                node.paused_until = None;
            }
        }
        self.network.deliver();
        let first = self.chance.index(self.nodes.len());
        for at in 0..self.nodes.len() {
            let at = (first + at) % self.nodes.len();
            let node = &mut self.nodes[at];
            let (Some(process), None) = (&node.process, node.paused_until) else { continue };
            kernel::set_clock(self.now, node.wall_error);
            process.run(None);
            if process.watch().is_doomed() {
                node.crash(self.chance.one_in(2));
                node.start_at = Some(self.now + i64::try_from(self.chance.below(2_000)).unwrap_or(0) * MILLI);
            }
        }
        kernel::set_clock(self.now, 0);
        self.clients.run(None);
        self.check();
    }

    /// Lets something go wrong, when it is time for that.
    pub fn trouble(&mut self) {
        if self.mend_at.is_some_and(|at| at <= self.now) {
            self.mend_at = None;
            tell!(self.trace, "links are mended");
            self.network.mend();
        }
        if self.now < self.next_trouble {
            return;
        }
        self.next_trouble = self.now + self.millis(30, 900);
        let size = self.nodes.len();
        let at = if self.chance.one_in(2) { self.leader() } else { None };
        let at = at.unwrap_or_else(|| self.chance.index(size));
        match self.chance.below(if self.hosts.is_some() { 18 } else { 15 }) {
            0 => self.crash(at, false),
            1 => self.crash(at, true),
            2 => self.crash_between_polls(at),
            3..=4 => {
                let moment = [Moment::BeforeWrite, Moment::BeforeSync, Moment::AfterSync][self.chance.index(3)];
                let node = &self.nodes[at];
                if let Some(process) = &node.process {
                    tell!(self.trace, "node {} will die {moment:?}", node.id);
                    node.disk.set_trap(moment, process.watch());
                }
            }
            5 => self.pause(at),
            6..=8 => self.cut(at),
            9 => {
                let (from, to) = [(100, 3_000), (3_000, 60_000), (50_000, 700_000)][self.chance.index(3)];
                tell!(self.trace, "disk {} syncs in {from} to {to} µs", self.nodes[at].id);
                self.nodes[at].disk.set_sync(from, to);
            }
            10 => {
                let full = self.chance.one_in(2);
                for node in &self.nodes {
                    node.disk.set_full(false);
                }
                if full {
                    tell!(self.trace, "disk {} is full", self.nodes[at].id);
                    self.nodes[at].disk.set_full(true);
                }
            }
            11 => {
                let (from, to) = [(100, 1_500), (1_000, 40_000), (20_000, 200_000)][self.chance.index(3)];
                tell!(self.trace, "a way takes {from} to {to} µs");
                self.network.set_delay(from, to);
            }
            12 => {
                let error = self.millis(0, 7_200_000) - 3_600_000 * MILLI;
                tell!(self.trace, "node {}'s wall clock is off by {} s", self.nodes[at].id, error / 1_000 / MILLI);
                self.nodes[at].wall_error = error;
            }
            13 => self.transfer(at),
            14 => {
                tell!(self.trace, "the power fails");
                for at in 0..size {
                    self.crash(at, true);
                }
            }
            15 => {
                let other = self.nodes[self.chance.index(size)].id;
                let one = self.nodes[at].id;
                tell!(self.trace, "node {one} and the agent of {other} are apart");
                self.network.cut(one, agents::AGENT + other);
                self.network.cut(agents::AGENT + other, one);
                let mend_at = self.now + self.millis(100, 6_000);
                self.mend_at.get_or_insert(mend_at);
            }
            _ => {
                if let Some(hosts) = &self.hosts {
                    hosts.lose_a_domain();
                }
            }
        }
    }

    fn millis(&mut self, from: u64, to: u64) -> i64 {
        i64::try_from(self.chance.millis(from, to).as_nanos()).unwrap_or(i64::MAX)
    }

    fn leader(&self) -> Option<usize> {
        self.nodes.iter().position(|node| {
            node.store().is_some_and(|store| matches!(*store.leadership().borrow(), Leadership::Leader { .. }))
        })
    }

    fn crash(&mut self, at: usize, power: bool) {
        let start_at = self.now + self.millis(20, 2_500);
        let node = &mut self.nodes[at];
        if node.process.is_some() {
            node.crash(power);
            node.start_at = Some(start_at);
        }
    }

    /// Ends a process after some of its tasks have moved in this step and before the others do.
    fn crash_between_polls(&mut self, at: usize) {
        let moves = u32::try_from(self.chance.below(60)).unwrap_or(0);
        let node = &self.nodes[at];
        if let (Some(process), None) = (&node.process, node.paused_until) {
            tell!(self.trace, "node {} moves {moves} times more", node.id);
            process.run(Some(moves));
            let power = self.chance.one_in(2);
            self.crash(at, power);
        }
    }

    /// Asks a node, which may lead, to hand the lead to another one, which may be there.
    fn transfer(&mut self, at: usize) {
        let (from, to) = (self.nodes[at].id, self.nodes[self.chance.index(self.nodes.len())].id);
        tell!(self.trace, "node {from} is to hand the lead to {to}");
        if self.chance.one_in(2) {
            // Who learns late that it was replaced is who may answer wrongly.
            self.nodes[at].disk.set_sync(100_000, 400_000);
        }
        let (doors, network) = (self.doors.clone(), self.network.clone());
        self.clients.spawn(async move {
            doors.ask(&network, clients::PLACE, from, Ask::Transfer(to), Duration::from_secs(5)).await;
        });
    }

    fn pause(&mut self, at: usize) {
        let until = self.now + if self.chance.one_in(4) { self.millis(1_000, 8_000) } else { self.millis(50, 1_500) };
        let node = &mut self.nodes[at];
        if node.process.is_some() {
            tell!(self.trace, "node {} is stopped for {} ms", node.id, (until - self.now) / MILLI);
            node.paused_until = Some(until);
        }
    }

    fn cut(&mut self, at: usize) {
        let ids: Vec<u64> = self.nodes.iter().map(|node| node.id).collect();
        let one = ids[at];
        match self.chance.below(4) {
            0 => {
                let other = ids[self.chance.index(ids.len())];
                tell!(self.trace, "the way from {one} to {other} is cut");
                self.network.cut(one, other);
            }
            1 => {
                tell!(self.trace, "nothing leaves {one}");
                ids.iter().for_each(|other| self.network.cut(one, *other));
            }
            2 => {
                tell!(self.trace, "nothing reaches {one}");
                ids.iter().for_each(|other| self.network.cut(*other, one));
            }
            _ => {
                let side: Vec<u64> = ids.iter().copied().filter(|id| *id == one || self.chance.one_in(3)).collect();
                tell!(self.trace, "{side:?} are apart from the others");
                for one in &side {
                    for other in ids.iter().filter(|other| !side.contains(other)) {
                        self.network.cut(*one, *other);
                        self.network.cut(*other, *one);
                    }
                }
            }
        }
        let mend_at = self.now + if self.chance.one_in(3) { self.millis(3_000, 7_000) } else { self.millis(50, 2_000) };
        self.mend_at.get_or_insert(mend_at);
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
            node.paused_until = None;
            if node.process.is_none() {
                node.start();
            }
        }
    }

    /// Whether a leader is there, and every node has applied what it has.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let Some(leader) = self.leader() else { return false };
        let applied = |node: &Node| node.store().map(|store| store.state().applied);
        let newest = applied(&self.nodes[leader]);
        self.nodes.iter().all(|node| applied(node) == newest)
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
            let state = store.state();
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
            self.nodes[at].seen = state.applied;
        }
    }
}
