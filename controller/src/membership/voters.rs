//! Which members vote: three, five or seven of up to 64 hosts, and always an odd number, since an even one costs a
//! vote more and survives no more deaths.
//!
//! One function decides, from what the leader sees of each member; one task makes the Raft group what the member rows
//! and that decision say, step by step, whatever it finds. A voter that is gone for long is replaced by a host that is
//! there; without one it keeps its vote, for a pool that shrinks its quorum because hosts are silent would in the end
//! be ruled by a minority.
//!
//! Two hosts have one vote between them, the master's: with two, the death of either would stop the pool. A witness
//! makes three of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use datamodel::Member as MemberRow;
use datamodel::fields::member;
use raft_store::{LogIndex, Member, Progress, Row};

use super::node_id;
use crate::controller::Shared;

/// How the pool chooses.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// So many voters at most: one, three, five or seven.
    pub most: usize,
    /// A voter that is silent for this long is replaced.
    pub replace_after: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self { most: 5, replace_after: Duration::from_secs(300) }
    }
}

/// A member as the leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) node_id: u64,
    pub(crate) leads: bool,
    pub(crate) votes: bool,
    pub(crate) witness: bool,
    /// Since when it has not been heard; none: never in this term.
    pub(crate) silent: Option<Duration>,
    /// How long the leader has been in office.
    pub(crate) term: Duration,
    /// So many entries behind.
    pub(crate) behind: u64,
}

/// A learner may be promoted that is not further behind, and was heard within this time.
const CLOSE_ENTRIES: u64 = 1_000;
const HEARD: Duration = Duration::from_secs(1);
/// Members are looked at so often.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// A member that has left and does not answer is told so for this long.
const REMEMBER_LEAVING: i64 = 600;
/// One that has the word in its log and is not heard any more has gone.
const GONE: Duration = Duration::from_millis(500);

/// Whether a member is there and has most of the log.
pub(crate) fn is_close(seen: &Progress, applied: LogIndex) -> bool {
    close(applied.0.saturating_sub(seen.matched.0), seen.silent)
}

fn close(behind: u64, silent: Option<Duration>) -> bool {
    behind <= CLOSE_ENTRIES && silent.is_some_and(|silent| silent < HEARD)
}

impl Candidate {
    fn can_be_promoted(&self) -> bool {
        close(self.behind, self.silent)
    }

    fn is_gone(&self, policy: &Policy) -> bool {
        // A new leader has heard nobody yet.
        !self.leads && self.silent.unwrap_or(self.term) >= policy.replace_after
    }
}

const fn odd(number: usize) -> usize {
    if number.is_multiple_of(2) { number.saturating_sub(1) } else { number }
}

/// Who should vote.
pub(crate) fn choose(candidates: &[Candidate], policy: &Policy) -> BTreeSet<u64> {
    let hosts = candidates.iter().filter(|candidate| !candidate.witness).count();
    // A witness makes up the third vote of two hosts, and is not needed by more.
    let witnesses = usize::from(hosts == 2 && candidates.iter().any(|candidate| candidate.witness));
    let wanted = odd((hosts + witnesses).min(policy.most));
    let mut ranked: Vec<&Candidate> =
        candidates.iter().filter(|candidate| !candidate.witness || witnesses == 1).collect();
    // The leader, then voters that are there, then hosts that can be promoted, then voters that are gone: who has a
    // vote keeps it unless there is a better one. Between equals the one that has been a member for longer.
    ranked.sort_by_key(|candidate| {
        let rank = match candidate {
            Candidate { leads: true, .. } => 0,
            Candidate { votes: true, .. } if !candidate.is_gone(policy) => 1,
            _ if candidate.can_be_promoted() => 2,
            Candidate { votes: true, .. } => 3,
            _ => 4,
        };
        (rank, candidate.node_id)
    });
    let able = ranked.iter().take_while(|candidate| candidate.leads || candidate.votes || candidate.can_be_promoted());
    let able = able.count();
    ranked.iter().take(odd(wanted.min(able)).max(1)).map(|candidate| candidate.node_id).collect()
}

/// Keeps the Raft group as the rows and the policy say, as long as this node leads.
pub(crate) async fn keep(shared: &Arc<Shared>) {
    let office = tokio::time::Instant::now();
    let mut silent = BTreeSet::new();
    loop {
        step(shared, office.elapsed()).await;
        tell(&shared.store.progress(), office.elapsed(), &mut silent);
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Logs which members fall silent, and which are heard again.
fn tell(progress: &BTreeMap<u64, Progress>, term: Duration, silent: &mut BTreeSet<u64>) {
    for (node, seen) in progress {
        // A new leader has heard nobody yet.
        let heard = seen.silent.unwrap_or(term) < HEARD;
        if heard && silent.remove(node) {
            tracing::info!(node, "a member is heard again");
        } else if !heard && silent.insert(*node) {
            tracing::warn!(node, "a member is silent");
        }
    }
    silent.retain(|node| progress.contains_key(node));
}

/// One step towards what should be; the next look sees what came of it.
async fn step(shared: &Arc<Shared>, term: Duration) {
    let store = &shared.store;
    // Somebody else is changing the members.
    let Ok(_turn) = shared.admissions.try_lock() else { return };
    let Ok(state) = store.read().await else { return };
    let rows: Vec<&Arc<Row>> = state.all::<MemberRow>().filter(|row| row.get(member::REPLICA)).collect();
    let this = store.node_id();
    if !rows.iter().any(|row| node_id(row) == this) {
        // The pool is not founded yet.
        return;
    }
    let nodes = store.members();
    let voters = store.voters();
    let progress = store.progress();
    let candidates: Vec<Candidate> = rows
        .iter()
        .filter(|row| row.get(member::STANDING) != super::LEAVING)
        .filter(|row| nodes.iter().any(|node| node.node_id == node_id(row)))
        .map(|row| {
            let id = node_id(row);
            let seen = progress.get(&id);
            Candidate {
                node_id: id,
                leads: id == this,
                votes: voters.contains(&id),
                witness: row.get(member::WITNESS),
                silent: seen.and_then(|seen| seen.silent),
                term,
                behind: seen.map_or(u64::MAX, |seen| state.applied.0.saturating_sub(seen.matched.0)),
            }
        })
        .collect();
    let wanted = choose(&candidates, &shared.config.voters);
    let result = if let Some(row) = rows.iter().find(|row| !nodes.iter().any(|node| node.node_id == node_id(row))) {
        tracing::info!(node = node_id(row), "a member comes in");
        let newcomer = Member {
            node_id: node_id(row),
            peer_address: row.get(member::PEER_ADDRESS),
            api_address: row.get(member::API_ADDRESS),
        };
        store.add_learner(&newcomer).await
    } else if wanted != voters || store.is_between_voters() {
        tracing::info!(?wanted, ?voters, "other members vote");
        let done = store.set_voters(wanted.clone()).await;
        if done.is_ok() {
            tracing::info!(voters = ?wanted, "these members vote");
        }
        done
    } else if let Some(gone) = nodes.iter().find(|node| !rows.iter().any(|row| node_id(row) == node.node_id)) {
        tracing::info!(node = gone.node_id, "a member goes");
        store.remove(gone.node_id).await
    } else {
        Ok(())
    };
    if let Err(error) = result {
        tracing::debug!(%error, "the change of members is tried again");
    }
    forget_who_left(shared, &rows, &progress).await;
}

/// Whether a member that was told to leave did so. Should it have died over it, it asks when it is back (`stranger`).
fn has_gone(told: LogIndex, seen: &Progress) -> bool {
    seen.matched >= told && seen.silent.is_none_or(|silent| silent >= GONE)
}

/// A member that has left knows it, or has had time enough to learn of it. Nobody asks for it any more.
async fn forget_who_left(shared: &Shared, rows: &[&Arc<Row>], progress: &BTreeMap<u64, Progress>) {
    let mut change = shared.transaction();
    for row in rows.iter().filter(|row| row.get(member::STANDING) == super::LEAVING) {
        let gone = progress.get(&node_id(row)).is_some_and(|seen| has_gone(row.modified, seen));
        if gone || shared.now().0.saturating_sub(row.get(member::SINCE).0) > REMEMBER_LEAVING {
            change.delete(row.typed::<MemberRow>());
        }
    }
    if !change.is_empty()
        && let Err(error) = shared.store.commit(change).await
    {
        tracing::debug!(%error, "a member that left is forgotten later");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy { most: 5, replace_after: Duration::from_secs(300) };

    fn host(node_id: u64, votes: bool) -> Candidate {
        let term = Duration::from_secs(3600);
        Candidate { node_id, leads: node_id == 1, votes, witness: false, silent: Some(Duration::ZERO), term, behind: 0 }
    }

    fn hosts(count: u64, voters: u64) -> Vec<Candidate> {
        (1..=count).map(|id| host(id, id <= voters)).collect()
    }

    fn chosen(candidates: &[Candidate]) -> Vec<u64> {
        choose(candidates, &POLICY).into_iter().collect()
    }

    #[test]
    fn the_number_of_voters_is_odd_and_at_most_what_the_policy_says() {
        for (count, expected) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (64, 5)] {
            assert_eq!(chosen(&hosts(count, 1)).len(), expected, "{count} hosts, one voter");
            assert_eq!(chosen(&hosts(count, count)).len(), expected, "{count} hosts, all voters");
        }
        assert_eq!(choose(&hosts(64, 3), &Policy { most: 7, ..POLICY }).len(), 7);
        assert_eq!(choose(&hosts(64, 3), &Policy { most: 3, ..POLICY }).len(), 3);
    }

    #[test]
    fn a_voter_that_is_gone_for_long_is_replaced_and_a_short_absence_is_not() {
        let mut four = hosts(4, 3);
        four[2].silent = Some(Duration::from_secs(299));
        assert_eq!(chosen(&four), [1, 2, 3]);
        four[2].silent = Some(Duration::from_secs(300));
        assert_eq!(chosen(&four), [1, 2, 4]);
        // It comes back, and has no vote to claim.
        four[2] = host(3, false);
        four[3].votes = true;
        assert_eq!(chosen(&four), [1, 2, 4]);
    }

    #[test]
    fn a_new_leader_takes_nobody_for_gone_whom_it_has_not_had_the_time_to_hear() {
        let mut four = hosts(4, 3);
        for candidate in &mut four {
            candidate.term = Duration::from_millis(250);
        }
        (four[1].silent, four[2].silent) = (None, None);
        assert_eq!(chosen(&four), [1, 2, 3]);
        four[2].term = Duration::from_secs(300);
        assert_eq!(chosen(&four), [1, 2, 4]);
    }

    #[test]
    fn who_is_gone_keeps_its_vote_while_nobody_could_take_it() {
        let mut three = hosts(3, 3);
        three[1].silent = None;
        three[2].silent = Some(Duration::from_secs(3600));
        assert_eq!(chosen(&three), [1, 2, 3], "a minority never makes itself the pool");
        let mut four = hosts(4, 3);
        four[2].silent = Some(Duration::from_secs(3600));
        four[3].behind = 100_000;
        assert_eq!(chosen(&four), [1, 2, 3], "a learner that lags is no voter");
    }

    #[test]
    fn the_leader_keeps_its_vote_and_newcomers_wait_until_they_make_an_odd_number() {
        let mut three = hosts(3, 1);
        three[2].silent = None;
        assert_eq!(chosen(&three), [1], "two voters are no better than one");
        let mut many = hosts(9, 9);
        many[0].leads = false;
        many[8].leads = true;
        assert_eq!(chosen(&many), [1, 2, 3, 4, 9]);
    }

    #[test]
    fn who_was_told_to_leave_is_asked_for_until_it_has_gone() {
        let seen = |matched, silent| Progress { matched: LogIndex(matched), silent };
        let told = LogIndex(100);
        assert!(!has_gone(told, &seen(99, None)), "it does not know");
        assert!(!has_gone(told, &seen(99, Some(GONE))), "it does not know");
        assert!(!has_gone(told, &seen(100, Some(Duration::from_millis(50)))), "it is still there");
        assert!(has_gone(told, &seen(100, Some(GONE))));
    }

    #[test]
    fn a_witness_is_the_third_vote_of_two_hosts_and_of_nobody_else() {
        let witness = Candidate { witness: true, ..host(9, false) };
        let with = |count: u64| hosts(count, 1).into_iter().chain([witness]).collect::<Vec<_>>();
        assert_eq!(chosen(&with(2)), [1, 2, 9]);
        assert_eq!(chosen(&with(1)), [1]);
        assert_eq!(chosen(&with(3)), [1, 2, 3]);
        assert_eq!(chosen(&with(4)), [1, 2, 3]);
    }
}
