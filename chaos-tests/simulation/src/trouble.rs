//! What goes wrong, and when: each time a kind of trouble is drawn, and whom it meets.
//!
//! Nothing is taken from a pool that it could not do without: of no set of voters that may rule, more than a minority is
//! ever damaged or lost for good. All else comes back.

use std::collections::BTreeSet;
use std::time::Duration;

use raft_store::Leadership;

use crate::agents;
use crate::disk::Moment;
use crate::line::{self, Seclusion};
use crate::node::{Ask, Change};
use crate::tell;
use crate::world::{MILLI, World};

/// No pool of stores has more nodes than this, dead ones among them.
const MOST_NODES: usize = 8;
/// So many kinds of trouble there are.
pub(crate) const KINDS: u64 = 21;

/// What comes of trouble that has begun.
pub(crate) enum Plot {
    /// The leader goes as that follower has lost its disk.
    Forget { leader: usize, follower: usize },
    /// The leader is left with those that only learn.
    Seclude,
}

impl World {
    /// Lets something go wrong, when it is time for that.
    pub fn trouble(&mut self) {
        match self.plot.take_if(|(at, _)| *at <= self.now) {
            Some((_, Plot::Forget { leader, follower })) => {
                tell!(self.trace, "…and the leader goes as the damaged one comes back");
                self.network.mend();
                self.damage(follower);
                self.nodes[follower].start_at = self.nodes[follower].start_at.map(|_| self.now + 20 * MILLI);
                self.crash(leader, false);
            }
            Some((_, Plot::Seclude)) => self.seclude(),
            None => {}
        }
        if self.mend_at.is_some_and(|at| at <= self.now) {
            self.mend_at = None;
            tell!(self.trace, "links are mended");
            self.network.mend();
        }
        if self.now < self.next_trouble {
            return;
        }
        self.next_trouble = self.now + self.millis(30, 700);
        let size = self.nodes.len();
        let at = if self.chance.one_in(2) { self.leader() } else { None };
        let at = at.unwrap_or_else(|| self.chance.index(size));
        // Each run has a trouble of its own that comes again and again: two of a kind meet what one alone does not.
        let kind = if self.chance.one_in(self.favoured) { self.favourite } else { self.chance.below(KINDS) };
        match kind {
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
            15 => self.damage(at),
            19 => self.conspire(at),
            20 => self.deafen(),
            16 if self.hosts.is_none() => self.lose(at),
            _ if self.hosts.is_none() => self.change_members(at),
            16 => {
                let other = self.nodes[self.chance.index(size)].id;
                let one = self.nodes[at].id;
                tell!(self.trace, "node {one} and the agent of {other} are apart");
                self.network.cut(one, agents::AGENT + other);
                self.network.cut(agents::AGENT + other, one);
                let mend_at = self.now + self.millis(100, 6_000);
                self.mend_at.get_or_insert(mend_at);
            }
            17 => self.switch_off(at),
            _ => {
                if let Some(hosts) = &self.hosts {
                    hosts.lose_a_domain();
                }
            }
        }
    }

    pub(crate) fn millis(&mut self, from: u64, to: u64) -> i64 {
        i64::try_from(self.chance.millis(from, to).as_nanos()).unwrap_or(i64::MAX)
    }

    pub(crate) fn leader(&self) -> Option<usize> {
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

    /// Whether every set of voters that may rule has a majority without this one and all that are gone already.
    fn can_do_without(&self, id: u64) -> bool {
        let others = |voters: &BTreeSet<u64>| self.gone(voters).filter(|gone| *gone != id).count();
        self.asked.iter().all(|voters| !voters.contains(&id) || others(voters) < (voters.len() - 1) / 2)
    }

    /// Those of some nodes that are damaged or lost.
    fn gone(&self, of: &BTreeSet<u64>) -> impl Iterator<Item = u64> {
        let gone = self.nodes.iter().filter(|node| (node.damaged || node.lost) && of.contains(&node.id));
        gone.map(|node| node.id).collect::<Vec<_>>().into_iter()
    }

    /// A disk loses what it had promised to keep, while its host is down.
    fn damage(&mut self, at: usize) {
        // A controller's pool chooses its voters by itself: one at a time is what each of its sets can do without.
        let alone = self.hosts.is_none() || !self.nodes.iter().any(|node| node.damaged || node.lost);
        if self.nodes[at].process.is_none() || !alone || !self.can_do_without(self.nodes[at].id) {
            return;
        }
        self.crash(at, false);
        let node = &mut self.nodes[at];
        node.damaged |= node.disk.damage();
    }

    /// Those of the voters that do not lead.
    fn followers(&self, leader: usize) -> Vec<usize> {
        let voters = self.nodes[leader].store().map(|store| store.voters()).unwrap_or_default();
        (0..self.nodes.len()).filter(|other| *other != leader && voters.contains(&self.nodes[*other].id)).collect()
    }

    /// Nothing goes between a leader and one follower.
    fn stop_hearing(&self, leader: usize, deaf: usize) {
        let (from, to) = (self.nodes[leader].id, self.nodes[deaf].id);
        tell!(self.trace, "nothing of {from} reaches {to}…");
        self.network.cut(from, to);
        self.network.cut(to, from);
    }

    /// One follower does not hear the leader for a while, so that it stands for election as soon as the others let it. Then
    /// none does: how long they do not, and how long the leader takes itself for one, is told by their clocks alone.
    fn deafen(&mut self) {
        let Some(leader) = self.leader() else { return };
        let follows = self.followers(leader);
        if follows.is_empty() {
            return;
        }
        let members = self.nodes[leader].store().map_or(0, |store| store.members().len());
        if members == follows.len() + 1 && self.hosts.is_none() && members < MOST_NODES {
            let learner = self.found();
            self.ask(self.nodes[leader].id, Ask::Change(Change::Learner(learner)));
        }
        let deaf = follows[self.chance.index(follows.len())];
        self.stop_hearing(leader, deaf);
        let secluded_at = self.now + self.millis(300, 1_500);
        self.plot = Some((secluded_at, Plot::Seclude));
        if self.chance.one_in(2) {
            let quiet_until = secluded_at + 500 * MILLI;
            self.seclusion.send_replace(Seclusion { quiet_until, ..Seclusion::default() });
        }
        let mend_at = self.now + self.millis(2_500, 7_000);
        self.mend_at.get_or_insert(mend_at);
    }

    /// The leader is left with those that only learn: whoever takes their word for a quorum's leads on without one.
    fn seclude(&mut self) {
        let Some(leader) = self.leader() else { return };
        let Some(store) = self.nodes[leader].store() else { return };
        let (voters, one) = (store.voters(), self.nodes[leader].id);
        let side: Vec<u64> =
            self.nodes.iter().map(|node| node.id).filter(|id| *id == one || !voters.contains(id)).collect();
        tell!(self.trace, "{side:?}, the leader {one} and learners, are apart from the others");
        self.part(&side);
        let others = voters.into_iter().filter(|id| *id != one).collect();
        let (from, until) = (self.now + 150 * MILLI, self.now + 500 * MILLI);
        self.seclusion.send_modify(|last| *last = Seclusion { leader: one, others, from, until, ..last.clone() });
        let mend_at = self.now + self.millis(1_500, 6_000);
        self.mend_at.get_or_insert(mend_at);
    }

    /// Cuts every way between these and the others.
    fn part(&self, side: &[u64]) {
        for other in self.nodes.iter().map(|node| node.id).filter(|id| !side.contains(id)) {
            for one in side {
                self.network.cut(*one, other);
                self.network.cut(other, *one);
            }
        }
    }

    /// One follower hears nothing for a while, so that what is acknowledged is with the leader and the others. Then another
    /// follower loses its disk and the leader goes, at once: whoever votes for the first follower now, and has forgotten,
    /// votes against what it had acknowledged.
    fn conspire(&mut self, at: usize) {
        let Some(leader) = self.leader() else { return };
        let follows = self.followers(leader);
        let Some(deaf) = Some(at).filter(|at| follows.contains(at)).or_else(|| follows.first().copied()) else {
            return;
        };
        let Some(forgetful) = follows.into_iter().find(|other| *other != deaf) else { return };
        self.stop_hearing(leader, deaf);
        let at = self.now + self.millis(100, 250);
        self.plot = Some((at, Plot::Forget { leader, follower: forgetful }));
    }

    /// A host burns down.
    fn lose(&mut self, at: usize) {
        if self.nodes[at].lost || !self.can_do_without(self.nodes[at].id) {
            return;
        }
        self.crash(at, true);
        let node = &mut self.nodes[at];
        tell!(self.trace, "node {} is lost for good", node.id);
        node.lost = true;
        node.start_at = None;
        self.doors.forget(node.id);
    }

    /// Asks a node, which may lead, to make other nodes members or voters.
    fn change_members(&mut self, at: usize) {
        let Some(store) = self.nodes[at].store() else { return };
        let (members, voters): (Vec<u64>, _) =
            (store.members().iter().map(|member| member.node_id).collect(), store.voters());
        let learners: Vec<u64> = members.iter().copied().filter(|id| !voters.contains(id)).collect();
        let strangers: Vec<u64> =
            self.nodes.iter().filter(|node| !node.lost && !members.contains(&node.id)).map(|node| node.id).collect();
        let change = match self.chance.below(8) {
            0..=1 if self.nodes.len() < MOST_NODES => Change::Learner(self.found()),
            0..=2 if !strangers.is_empty() => {
                Change::Learner(crate::node::member(strangers[self.chance.index(strangers.len())]))
            }
            3 if !learners.is_empty() => Change::Remove(learners[self.chance.index(learners.len())]),
            _ => match self.other_voters(&members) {
                Some(voters) => Change::Voters(voters),
                None => return,
            },
        };
        let from = self.nodes[at].id;
        tell!(self.trace, "node {from} of {members:?} with {voters:?} is to make it so: {change:?}");
        self.ask(from, Ask::Change(change));
    }

    /// Some of the members that are not lost, as many as can do without those of them that are damaged.
    fn other_voters(&mut self, members: &[u64]) -> Option<BTreeSet<u64>> {
        let lost = |id: &u64| self.nodes.iter().any(|node| node.lost && node.id == *id);
        let mut able: Vec<u64> = members.iter().copied().filter(|id| !lost(id)).collect();
        let least = if self.shrinks { 1 } else { 3 };
        let count = least + self.chance.index(5_usize.saturating_sub(least) + 1);
        let mut voters = BTreeSet::new();
        while voters.len() < count && !able.is_empty() {
            voters.insert(able.remove(self.chance.index(able.len())));
        }
        let fits = voters.len() >= least && self.gone(&voters).count() <= (voters.len() - 1) / 2;
        if fits && !self.asked.contains(&voters) {
            self.asked.push(voters.clone());
        }
        fits.then_some(voters)
    }

    /// A machine goes down, its guests with it, and stays down for a while.
    fn switch_off(&mut self, at: usize) {
        let on_at = self.now + self.millis(2_000, 9_000);
        let Some(hosts) = self.hosts.clone() else { return };
        self.crash(at, true);
        let node = &mut self.nodes[at];
        tell!(self.trace, "host {} is off for {} ms", node.id, (on_at - self.now) / MILLI);
        node.start_at = Some(on_at);
        hosts.switch_off(node.id, on_at);
    }

    fn ask(&self, node: u64, ask: Ask) {
        let (doors, network) = (self.doors.clone(), self.network.clone());
        self.clients.spawn(async move {
            doors.ask(&network, line::PLACE, node, ask, Duration::from_secs(5)).await;
        });
    }

    /// Ends a process after some of its tasks have moved in this step and before the others do.
    fn crash_between_polls(&mut self, at: usize) {
        let moves = u32::try_from(self.chance.below(60)).unwrap_or(0);
        let node = &self.nodes[at];
        if let (Some(process), None) = (&node.process, node.paused_until) {
            tell!(self.trace, "node {} moves {moves} times more", node.id);
            node.timed(|_| process.run(Some(moves)));
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
        self.ask(from, Ask::Transfer(to));
    }

    fn pause(&mut self, at: usize) {
        let until = self.now + if self.chance.one_in(4) { self.millis(1_000, 8_000) } else { self.millis(50, 1_500) };
        let node = &mut self.nodes[at];
        if node.process.is_some() {
            tell!(self.trace, "node {} is stopped for {} ms", node.id, (until - self.now) / MILLI);
            node.pause(until);
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
                self.part(&side);
            }
        }
        let mend_at = self.now + if self.chance.one_in(3) { self.millis(3_000, 7_000) } else { self.millis(50, 2_000) };
        self.mend_at.get_or_insert(mend_at);
    }
}
