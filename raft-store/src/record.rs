//! Votes, log ids, entries and memberships as they travel and rest.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use openraft::impls::leader_id_std;
use openraft::vote::RaftLeaderId;
use prost::Message;
use proto::raft as wire;

use crate::codec::{DecodeError, decode_batch};
use crate::proposer::Answers;
use crate::types::{Batch, Entry, LogId, Membership, PeerNode, StoredMembership, Vote};

type LeaderId = leader_id_std::LeaderId<u64, u64>;

pub(crate) fn log_id(id: &wire::LogId) -> LogId {
    LogId::new(LeaderId::new(id.term, 0).to_committed(), id.index)
}

pub(crate) fn log_id_to_wire(id: &LogId) -> wire::LogId {
    wire::LogId { term: **id.committed_leader_id(), index: id.index() }
}

pub(crate) fn vote(ballot: &wire::Ballot) -> Vote {
    if ballot.committed {
        Vote::new_committed(ballot.term, ballot.node_id)
    } else {
        Vote::new(ballot.term, ballot.node_id)
    }
}

pub(crate) fn vote_to_wire(vote: &Vote) -> wire::Ballot {
    let leader = vote.leader_id();
    wire::Ballot { term: leader.term, node_id: leader.voted_for, committed: vote.is_committed() }
}

pub(crate) fn membership_to_wire(membership: &Membership) -> wire::Membership {
    let configs = membership.get_joint_config().iter().map(|ids| wire::VoterSet { ids: ids.iter().copied().collect() });
    let nodes = membership.nodes().map(|(id, node)| wire::Node {
        id: *id,
        peer_address: node.peer_address.clone(),
        api_address: node.api_address.clone(),
    });
    wire::Membership { configs: configs.collect(), nodes: nodes.collect() }
}

pub(crate) fn membership(membership: wire::Membership) -> Result<Membership, DecodeError> {
    let configs: Vec<BTreeSet<u64>> = membership.configs.into_iter().map(|set| set.ids.into_iter().collect()).collect();
    let nodes: BTreeMap<u64, PeerNode> = membership
        .nodes
        .into_iter()
        .map(|node| (node.id, PeerNode { peer_address: node.peer_address, api_address: node.api_address }))
        .collect();
    Membership::new(configs, nodes).map_err(|error| DecodeError::Malformed(error.to_string()))
}

pub(crate) fn stored_membership_to_wire(stored: &StoredMembership) -> wire::StoredMembership {
    wire::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id_to_wire),
        membership: Some(membership_to_wire(stored.membership())),
    }
}

pub(crate) fn stored_membership(stored: wire::StoredMembership) -> Result<StoredMembership, DecodeError> {
    let Some(inner) = stored.membership.filter(|inner| !inner.configs.is_empty()) else {
        return Ok(StoredMembership::default());
    };
    Ok(StoredMembership::new(stored.log_id.as_ref().map(log_id), membership(inner)?))
}

pub(crate) fn entry_to_wire(entry: &Entry) -> wire::LogRecord {
    use wire::log_record::Payload;
    let payload = match &entry.payload {
        EntryPayload::Blank => Payload::Blank(true),
        EntryPayload::Normal(batch) => Payload::Transactions(batch.encoded.clone()),
        EntryPayload::Membership(membership) => Payload::Membership(membership_to_wire(membership)),
    };
    wire::LogRecord { id: Some(log_id_to_wire(&entry.log_id())), payload: Some(payload) }
}

pub(crate) fn entry(record: wire::LogRecord) -> Result<Entry, DecodeError> {
    use wire::log_record::Payload;
    let id = log_id(record.id.as_ref().ok_or(DecodeError::BadValue)?);
    let payload = match record.payload.ok_or(DecodeError::BadValue)? {
        Payload::Blank(_) => EntryPayload::Blank,
        Payload::Transactions(encoded) => {
            let (format, transactions) = decode_batch(encoded.clone())?;
            EntryPayload::Normal(Batch {
                format,
                transactions: transactions.into(),
                encoded,
                answers: Answers::default(),
            })
        }
        Payload::Membership(inner) => EntryPayload::Membership(membership(inner)?),
    };
    Ok(Entry::new(id, payload))
}

pub(crate) fn entry_to_bytes(entry: &Entry) -> Vec<u8> {
    entry_to_wire(entry).encode_to_vec()
}

pub(crate) fn entry_from_bytes(bytes: Bytes) -> Result<Entry, DecodeError> {
    entry(wire::LogRecord::decode(bytes)?)
}
