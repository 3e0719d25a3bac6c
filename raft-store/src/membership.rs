//! Who replicates and who votes: what the leader sees of each member, and how it changes them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::BoxFuture;
use openraft::ChangeMembers;
use openraft::async_runtime::{Instant as _, WatchReceiver as _};
use openraft::type_config::alias::InstantOf;

use crate::row::LogIndex;
use crate::store::{CommitError, Member, Store, leads};
use crate::types::Config;

/// What the leader sees of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// It has the log up to here, on disk.
    pub matched: LogIndex,
    /// How long ago it last acknowledged the leader; none: never in this term.
    pub silent: Option<Duration>,
}

impl Store {
    /// Every member as this leader sees it, itself included; nothing where this node does not lead.
    #[must_use]
    pub fn progress(&self) -> BTreeMap<u64, Progress> {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        if !leads(metrics.state) {
            return BTreeMap::new();
        }
        let this = self.node_id();
        let heard = |id: &u64| {
            let acknowledged = metrics.heartbeat.as_ref()?.get(id)?.as_ref()?;
            Some(InstantOf::<Config>::now().saturating_duration_since(**acknowledged))
        };
        let matched = |id: &u64| {
            metrics.replication.as_ref().and_then(|all| all.get(id)?.as_ref().map(|id| id.index())).unwrap_or(0)
        };
        let last = metrics.last_log_index.unwrap_or(0);
        metrics
            .membership_config
            .membership()
            .nodes()
            .map(|(id, _)| {
                let own = *id == this;
                let silent = if own { Some(Duration::ZERO) } else { heard(id) };
                (*id, Progress { matched: LogIndex(if own { last } else { matched(id) }), silent })
            })
            .collect()
    }

    /// Every member, voters and learners.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().nodes().map(|(id, node)| Member::new(*id, node)).collect()
    }

    /// The members that vote.
    #[must_use]
    pub fn voters(&self) -> BTreeSet<u64> {
        self.raft().voter_ids().collect()
    }

    /// Whether a change of voters was broken off half-way: the old ones and the new ones both have to agree to everything
    /// until the change is made again.
    #[must_use]
    pub fn is_between_voters(&self) -> bool {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().get_joint_config().len() > 1
    }

    /// Adds a member that replicates and does not vote; it catches up by itself.
    ///
    /// # Errors
    /// [`CommitError::Unknown`] with the reason in the log.
    pub fn add_learner<'a>(&'a self, member: &'a Member) -> BoxFuture<'a, Result<(), CommitError>> {
        Box::pin(async move { self.change(self.raft().add_learner(member.node_id, member.node(), false)).await })
    }

    /// Makes these the voters, each a member already, in one change; who votes no more goes on as a learner.
    ///
    /// # Errors
    /// As [`add_learner`](Self::add_learner).
    pub fn set_voters(&self, voters: BTreeSet<u64>) -> BoxFuture<'_, Result<(), CommitError>> {
        Box::pin(async move {
            self.change(self.raft().change_membership(ChangeMembers::ReplaceAllVoters(voters), true)).await
        })
    }

    /// Removes a member that does not vote.
    ///
    /// # Errors
    /// As [`add_learner`](Self::add_learner).
    pub fn remove(&self, node_id: u64) -> BoxFuture<'_, Result<(), CommitError>> {
        Box::pin(async move {
            self.change(self.raft().change_membership(ChangeMembers::RemoveNodes(BTreeSet::from([node_id])), false))
                .await
        })
    }

    async fn change<T, E: std::fmt::Display>(
        &self,
        change: impl Future<Output = Result<T, E>>,
    ) -> Result<(), CommitError> {
        match change.await {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, "the change of members failed");
                Err(CommitError::Unknown)
            }
        }
    }
}
