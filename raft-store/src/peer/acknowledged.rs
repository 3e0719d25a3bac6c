//! When each peer last acknowledged this node, told by the very request that its answer answers.
//!
//! openraft keeps such times too, but it finds an answer's request by the log id that is acknowledged. Where several
//! requests end at one log id, as one that only brings a new commit index does, it takes the last of them, even if that
//! one has not been answered. A leader that slept finds old answers waiting; with those and with what it sends when it
//! wakes it would prove a lead that others have had for seconds. So a lease is counted here, request by request: a
//! stream's answers come in the order of its requests, one for each.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::Instant;

use crate::planted::Planted;
use crate::types::Membership;

/// The newest acknowledged request of each peer.
#[derive(Clone, Default)]
pub(crate) struct Acknowledged(Arc<Inner>);

#[derive(Default)]
struct Inner {
    newest: Mutex<BTreeMap<u64, Sent>>,
    news: Notify,
}

/// A request on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Sent {
    /// The term of the leader that sent it.
    term: u64,
    /// A moment before it left.
    at: Instant,
}

impl Acknowledged {
    /// The requests of a new stream to this peer.
    pub(crate) fn stream(&self, peer: u64, planted: Option<Planted>) -> Unanswered {
        Unanswered { peer, all: self.clone(), sent: Arc::default(), planted }
    }

    fn note(&self, peer: u64, sent: Sent) {
        let mut newest = self.0.newest.lock();
        let known = newest.entry(peer).or_insert(sent);
        *known = sent.max(*known);
        drop(newest);
        self.0.news.notify_waiters();
    }

    /// Ends with the next acknowledgement of any peer.
    pub(crate) fn news(&self) -> Notified<'_> {
        self.0.news.notified()
    }

    /// Whether a quorum of each set of voters has acknowledged what `this` node sent in this term, if it was sent after
    /// that moment. The node's own word counts where it votes.
    pub(crate) fn by_quorum(&self, this: u64, term: u64, members: &Membership, after: Instant) -> bool {
        let newest = self.0.newest.lock();
        let with_us =
            |peer: &u64| *peer == this || newest.get(peer).is_some_and(|sent| sent.term == term && sent.at > after);
        let mut sets = members.get_joint_config().iter();
        sets.all(|voters| voters.iter().filter(|peer| with_us(peer)).count() * 2 > voters.len())
    }

    /// Whether anybody at all has acknowledged it: a mistake, for tests of the tests.
    pub(crate) fn by_anybody(&self, term: u64, after: Instant) -> bool {
        self.0.newest.lock().values().any(|sent| sent.term == term && sent.at > after)
    }
}

/// The requests of one stream that have no answer yet, the oldest first. The transport's windows bound them.
#[derive(Clone)]
pub(crate) struct Unanswered {
    peer: u64,
    all: Acknowledged,
    sent: Arc<Mutex<VecDeque<Sent>>>,
    planted: Option<Planted>,
}

impl Unanswered {
    /// To be told before a request leaves.
    pub(crate) fn asked(&self, term: u64, at: Instant) {
        self.sent.lock().push_back(Sent { term, at });
    }

    /// To be told of each answer; whether the peer follows the sender is in it.
    pub(crate) fn answered(&self, follows: bool) {
        let mut waiting = self.sent.lock();
        let newest = waiting.back().copied();
        let mut sent = waiting.pop_front();
        drop(waiting);
        if self.planted == Some(Planted::BelievesOldAnswers) {
            sent = newest;
        }
        if let Some(sent) = sent.filter(|_| follows) {
            self.all.note(self.peer, sent);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;
    use crate::types::PeerNode;

    const LEASE: Duration = Duration::from_millis(300);

    fn members(sets: &[&[u64]]) -> Membership {
        let sets: Vec<BTreeSet<u64>> = sets.iter().map(|set| set.iter().copied().collect()).collect();
        let nodes: BTreeMap<u64, PeerNode> = (1..=7).map(|id| (id, PeerNode::default())).collect();
        Membership::new(sets, nodes).unwrap()
    }

    #[test]
    fn an_old_answer_proves_nothing_about_what_was_sent_since() {
        let all = Acknowledged::default();
        let three = members(&[&[1, 2, 3]]);
        let stream = all.stream(2, None);
        let asleep = Instant::now();
        stream.asked(1, asleep);
        // It wakes, sends once more, and finds the answer to what it had sent before.
        let awake = asleep + Duration::from_secs(3);
        stream.asked(1, awake);
        stream.answered(true);
        assert!(!all.by_quorum(1, 1, &three, awake - LEASE));
        stream.answered(true);
        assert!(all.by_quorum(1, 1, &three, awake - LEASE));
        assert!(!all.by_quorum(1, 1, &three, awake), "a lease ends");

        // The mistake that this is about.
        let all = Acknowledged::default();
        let stream = all.stream(2, Some(Planted::BelievesOldAnswers));
        stream.asked(1, asleep);
        stream.asked(1, awake);
        stream.answered(true);
        assert!(all.by_quorum(1, 1, &three, awake - LEASE));
    }

    #[test]
    fn a_quorum_is_one_of_each_set_of_voters_in_this_term() {
        let all = Acknowledged::default();
        let now = Instant::now();
        let says = |peer, term, follows| {
            let stream = all.stream(peer, None);
            stream.asked(term, now);
            stream.answered(follows);
        };
        let proven = |term, sets: &[&[u64]]| all.by_quorum(1, term, &members(sets), now - LEASE);
        assert!(proven(5, &[&[1]]), "one voter needs nobody else");
        says(2, 4, true);
        says(3, 5, false);
        says(6, 5, true);
        assert!(!proven(5, &[&[1, 2, 3]]), "an older term, a refusal, and a learner");
        says(2, 5, true);
        assert!(proven(5, &[&[1, 2, 3]]));
        assert!(!proven(5, &[&[1, 2, 3], &[1, 4, 5]]), "both sets must say so");
        assert!(!proven(5, &[&[2, 3, 4]]), "who does not vote does not count itself");
        says(4, 5, true);
        assert!(proven(5, &[&[1, 2, 3], &[1, 4, 5]]));
        assert!(!proven(6, &[&[1, 2, 3]]), "a new term starts from nothing");
    }

    #[test]
    fn a_late_answer_of_an_older_stream_takes_nothing_back() {
        let all = Acknowledged::default();
        let (old, new) = (all.stream(2, None), all.stream(2, None));
        let now = Instant::now();
        old.asked(1, now - 3 * LEASE);
        new.asked(1, now);
        new.answered(true);
        old.answered(true);
        assert!(all.by_quorum(1, 1, &members(&[&[1, 2, 3]]), now - LEASE));
        // An answer to nothing says nothing.
        old.answered(true);
    }
}
