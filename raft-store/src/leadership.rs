//! Who leads, decided by proof and not by belief.
//!
//! A node calls itself leader once the entry by which it took office is applied, and only as long as a
//! quorum has acknowledged it within the lease. The index of that entry is its epoch: it rises with
//! every leader, so that an agent can refuse what an older one still sends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use openraft::RaftMetrics;
use openraft::async_runtime::WatchReceiver as _;
use openraft::type_config::alias::WatchReceiverOf;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::machine::Machine;
use crate::peer::{Acknowledged, Heard};
use crate::planted::Planted;
use crate::row::LogIndex;
use crate::store::{Member, leads};
use crate::types::{Config, Raft};

/// Who leads, as this node knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leadership {
    /// This node, by the entry at `epoch`; everything before it is applied.
    Leader {
        /// The index of the entry by which it took office.
        epoch: LogIndex,
    },
    /// Another node.
    Follower {
        /// Which one.
        leader: Member,
    },
    /// Nobody that this node knows of.
    Electing,
}

type Metrics = WatchReceiverOf<Config, RaftMetrics<Config>>;

/// The proof of leadership: that a quorum acknowledged this node not long ago.
#[derive(Clone)]
pub(crate) struct Lease {
    metrics: Metrics,
    acknowledged: Acknowledged,
    /// Followers refuse to vote for another node for this long after they heard from the leader.
    length: Duration,
    /// The last term in which this node asked another one to take the lead.
    given_up: Arc<AtomicU64>,
    planted: Option<Planted>,
}

impl Lease {
    pub(crate) fn new(raft: &Raft, acknowledged: Acknowledged, length: Duration, planted: Option<Planted>) -> Self {
        Self { metrics: raft.metrics(), acknowledged, length, given_up: Arc::default(), planted }
    }

    /// Whether reads may be answered without asking anybody: with a quarter of the lease to spare, so that no clock of
    /// another host has to run as this one's does; it may be a third faster.
    pub(crate) fn is_fresh(&self) -> bool {
        let spare = if self.planted == Some(Planted::TrustsAllClocks) { Duration::ZERO } else { self.length / 4 };
        let metrics = self.metrics.borrow_watched();
        let given_up = self.given_up.load(Ordering::Acquire) == metrics.current_term;
        !given_up && self.is_acknowledged(&metrics, before(self.length - spare))
    }

    /// Asks everybody and waits until a quorum has acknowledged what was sent since this call; not, where this node
    /// does not lead any more. Whoever calls it sets the limit.
    pub(crate) async fn renewed(&self, raft: &Raft) -> bool {
        let since = Instant::now();
        if raft.trigger().heartbeat().await.is_err() {
            return false;
        }
        loop {
            let news = self.acknowledged.news();
            {
                let metrics = self.metrics.borrow_watched();
                if !leads(metrics.state) {
                    return false;
                }
                if self.is_acknowledged(&metrics, since) {
                    return true;
                }
            }
            // A lead that is lost is told by nobody's acknowledgement.
            tokio::select! {
                () = news => {}
                () = tokio::time::sleep(self.length / 4) => {}
            }
        }
    }

    /// To be called before another node is asked to take the lead: followers vote for that one at once, lease or no
    /// lease, so that in this term every read needs a quorum's word.
    pub(crate) fn give_up(&self) {
        self.given_up.store(self.metrics.borrow_watched().current_term, Ordering::Release);
    }

    /// Whether a quorum has acknowledged, as the leader's, what this node sent after that moment.
    fn is_acknowledged(&self, metrics: &RaftMetrics<Config>, after: Instant) -> bool {
        if !leads(metrics.state) {
            return false;
        }
        if self.planted == Some(Planted::CountsLearners) && self.acknowledged.by_anybody(metrics.current_term, after) {
            return true;
        }
        let members = metrics.membership_config.membership();
        self.acknowledged.by_quorum(metrics.id, metrics.current_term, members, after)
    }

    /// The other voter that has most of the log and that clients can reach: a witness has no address for them.
    pub(crate) fn most_advanced_peer(&self, this: u64) -> Option<u64> {
        let metrics = self.metrics.borrow_watched();
        let replication = metrics.replication.as_ref()?;
        let membership = metrics.membership_config.membership();
        let serves = |id: &u64| membership.get_node(id).is_some_and(|node| !node.api_address.is_empty());
        let voters: Vec<u64> = membership.voter_ids().filter(serves).collect();
        replication
            .iter()
            .filter(|(id, _)| **id != this && voters.contains(id))
            .max_by_key(|(_, matched)| matched.as_ref().map(|id| id.index()))
            .map(|(id, _)| *id)
    }
}

/// The moment so long ago; now, on a machine that has not been up for so long.
fn before(time: Duration) -> Instant {
    let now = Instant::now();
    now.checked_sub(time).unwrap_or(now)
}

/// Where it is said how this node stands.
pub(crate) struct Announcements {
    /// Who leads, by proof.
    pub(crate) leadership: watch::Sender<Leadership>,
    /// Why consensus has stopped.
    pub(crate) stopped: watch::Sender<Option<String>>,
    /// Whether this node sends entries to others: for the writer, to whom a belief is enough.
    pub(crate) leads: Arc<AtomicBool>,
}

/// Publishes who leads, and why consensus has stopped if it has, until the store ends. Everybody else waits for one of
/// these two: openraft's metrics change several times in each commit, and would wake whoever watches them as often.
pub(crate) async fn follow(
    this: u64,
    raft: Raft,
    machine: Arc<Machine>,
    lease: Lease,
    heard: Heard,
    tell: Announcements,
) {
    let mut metrics = raft.metrics();
    let mut office = machine.office.subscribe();
    loop {
        if let Err(fatal) = &metrics.borrow_watched().running_state {
            tell.stopped.send_replace(Some(fatal.to_string()));
        }
        tell.leads.store(leads(metrics.borrow_watched().state), Ordering::Relaxed);
        let now = judge(this, &metrics, &office, &lease, &heard);
        tell.leadership.send_if_modified(|known| {
            let changed = *known != now;
            if changed {
                tracing::info!(node = this, leadership = ?now, "leadership");
                *known = now;
            }
            changed
        });
        tokio::select! {
            changed = metrics.changed() => if changed.is_err() { return },
            changed = office.changed() => if changed.is_err() { return },
            // A lease ends by itself.
            () = tokio::time::sleep(lease.length / 4) => {}
        }
    }
}

fn judge(
    this: u64,
    metrics: &Metrics,
    office: &watch::Receiver<(u64, LogIndex)>,
    lease: &Lease,
    heard: &Heard,
) -> Leadership {
    let metrics = metrics.borrow_watched();
    // Who has nobody's word for three leases is cut off. A leader in office has had a quorum's.
    let cut_off = !lease.is_acknowledged(&metrics, before(lease.length * 3));
    if metrics.running_state.is_err() {
        return Leadership::Electing;
    }
    if leads(metrics.state) {
        let (term, epoch) = *office.borrow();
        if term == metrics.current_term && !cut_off {
            return Leadership::Leader { epoch };
        }
        return Leadership::Electing;
    }
    match metrics.current_leader {
        // A leader that has been silent for a lease leads nobody: who asks for it should wait for the next one.
        Some(id) if id != this && heard.silence() < lease.length => {
            match metrics.membership_config.membership().get_node(&id) {
                Some(node) => Leadership::Follower { leader: Member::new(id, node) },
                None => Leadership::Electing,
            }
        }
        _ => Leadership::Electing,
    }
}
