//! openraft's generics, spelled once. Nothing else in the crate names a type parameter.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use openraft::impls::leader_id_std;
use openraft::type_config::alias;

use crate::proposer::Answers;
use crate::state::Outcome;
use crate::transaction::Transaction;

/// Transactions that share a log entry, with their encoding: made once, written and sent as it is.
#[derive(Clone)]
pub(crate) struct Batch {
    pub(crate) format: u32,
    pub(crate) transactions: Arc<[Transaction]>,
    pub(crate) encoded: Bytes,
    /// Who waits for them, on the node that proposed them.
    pub(crate) answers: Answers,
}

impl fmt::Debug for Batch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the content: entries hold secrets.
        write!(out, "{} transactions", self.transactions.len())
    }
}

impl fmt::Display for Batch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, out)
    }
}

/// What became of each transaction of an entry.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcomes(pub(crate) Vec<Outcome>);

impl fmt::Display for Outcomes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} outcomes", self.0.len())
    }
}

/// Where a node is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PeerNode {
    pub(crate) peer_address: String,
    pub(crate) api_address: String,
}

openraft::declare_raft_types!(
    /// The one configuration of openraft here. Standard leader ids: one leader a term.
    pub(crate) Config:
        D = Batch,
        R = Outcomes,
        NodeId = u64,
        Node = PeerNode,
        Term = u64,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = openraft_rt_tokio::TokioRuntime,
);

pub(crate) type Entry = alias::EntryOf<Config>;
pub(crate) type LogId = alias::LogIdOf<Config>;
pub(crate) type Vote = alias::VoteOf<Config>;
pub(crate) type StoredMembership = alias::StoredMembershipOf<Config>;
pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<Config>;
pub(crate) type Membership = openraft::Membership<u64, PeerNode>;
pub(crate) type Raft = openraft::Raft<Config, crate::machine::StateMachine>;
pub(crate) type Snapshot = alias::SnapshotOf<Config, crate::machine::StateSnapshot>;
