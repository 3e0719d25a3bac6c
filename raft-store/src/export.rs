//! Rows on their way to another pool, and a database that begins with the rows of an old one.

use std::path::Path;
use std::sync::Arc;

use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use openraft::impls::leader_id_std::LeaderId;
use openraft::vote::RaftLeaderId;
use prost::Message;
use proto::raft as wire;

use crate::apply::{Dirty, apply};
use crate::codec::{DecodeError, outcome_to_wire, row_from_wire, row_to_wire};
use crate::disk::{Change, Column, Engine, OpenError, PURGED, Rocks, RowLoader, STATE, VOTE};
use crate::machine::{head, row_key, tombstone_key, tombstone_to_wire};
use crate::record;
use crate::remembered::Places;
use crate::row::{LogIndex, Row};
use crate::state::State;
use crate::store::{Member, Store};
use crate::transaction::Transaction;
use crate::types::{LogId, Membership, StoredMembership, Vote};

/// Rows as they rest, for another pool to read.
#[must_use]
pub fn encode_rows<'a>(rows: impl Iterator<Item = &'a Arc<Row>>) -> Vec<u8> {
    wire::RowBatch { rows: rows.map(|row| row_to_wire(row)).collect(), ..Default::default() }.encode_to_vec()
}

/// A state that holds these rows and no history.
///
/// # Errors
/// [`DecodeError`]: they are of a class or have a field that this version does not know, or are no rows at all.
pub fn decode_rows(bytes: &[u8]) -> Result<State, DecodeError> {
    let batch = wire::RowBatch::decode(bytes)?;
    let mut loader = RowLoader::default();
    for row in batch.rows {
        loader.row(Arc::new(row_from_wire(row)?));
    }
    Ok(loader.finish())
}

/// The log of a pool that begins anew goes on so far behind the old one, that no index of the old pool's lost future is
/// ever given twice: neither to a node nor to an epoch, of which agents may have seen newer ones than this node.
const GAP: u64 = 1_000_000_000;

impl Store {
    /// Writes a database in which this node's pool begins anew, with one voter and with all that this node has: what it
    /// knows to be applied, and what its log has beyond. `decide` is told the index at which the new pool begins, which
    /// is also its voter's node id, and says where that voter is reached and what is different from before.
    ///
    /// # Errors
    /// [`OpenError`]: the new database cannot be written, or the old log cannot be read.
    pub async fn begin_anew(
        &self,
        dir: &Path,
        decide: impl FnOnce(LogIndex, &State) -> (Member, Transaction) + Send,
    ) -> Result<u64, OpenError> {
        let term = self.term() + 1;
        let mut state = State::clone(&self.state());
        let consensus = |error: std::io::Error| OpenError::Consensus(error.to_string());
        let (mut dirty, places) = (Dirty::new(), Places::of(&state.remembered));
        for entry in self.disk().entries(state.applied.0.saturating_add(1), u64::MAX).map_err(consensus)? {
            let index = LogIndex(entry.log_id().index());
            if let EntryPayload::Normal(batch) = &entry.payload {
                for transaction in batch.transactions.iter() {
                    // A conflict is an outcome, too.
                    let _ = apply(&mut state, index, transaction, &places, &mut dirty);
                }
            }
            state.applied = index;
        }
        let begin = LogIndex(state.applied.0.saturating_add(GAP));
        state.applied = begin;
        let (member, transaction) = decide(begin, &state);
        if let Err(conflict) = apply(&mut state, begin, &transaction, &places, &mut dirty) {
            return Err(OpenError::Consensus(conflict.to_string()));
        }
        let dir = dir.to_owned();
        let node_id = member.node_id;
        tokio::task::spawn_blocking(move || write(&dir, &state, &member, term))
            .await
            .map_err(|error| OpenError::Consensus(error.to_string()))??;
        Ok(node_id)
    }
}

fn write(dir: &Path, state: &State, member: &Member, term: u64) -> Result<(), OpenError> {
    let consensus = |text: String| OpenError::Consensus(text);
    std::fs::create_dir_all(dir).map_err(|error| consensus(format!("{}: {error}", dir.display())))?;
    let engine = Rocks::open(dir)?;
    let mut batch = Vec::new();
    let mut put = |column, key: &[u8], value| batch.push(Change::Put(column, key.to_vec(), value));
    for row in state.tables.iter().flat_map(|table| table.rows.values()) {
        put(Column::Rows, &row_key(row.class, row.reference), row_to_wire(row).encode_to_vec());
    }
    for key in state.tombstones.keys() {
        if let Some(stored) = tombstone_to_wire(state, key) {
            put(Column::Tombstones, &tombstone_key(key), stored.encode_to_vec());
        }
    }
    for (sequence, (id, outcome)) in (0_u64..).zip(state.remembered.iter()) {
        put(Column::Outcomes, &sequence.to_be_bytes(), outcome_to_wire(*id, sequence, outcome).encode_to_vec());
    }
    let id = LogId::new(LeaderId::new(term, member.node_id).to_committed(), state.applied.0);
    let nodes = [(member.node_id, member.node())];
    let membership = Membership::new(vec![[member.node_id].into()], std::collections::BTreeMap::from(nodes))
        .map_err(|error| consensus(error.to_string()))?;
    let stored = wire::StoredState {
        format: state.format,
        last_applied: Some(record::log_id_to_wire(&id)),
        membership: Some(record::stored_membership_to_wire(&StoredMembership::new(Some(id), membership))),
        head: Some(head(state)),
    };
    put(Column::Meta, STATE, stored.encode_to_vec());
    put(Column::Meta, PURGED, record::log_id_to_wire(&id).encode_to_vec());
    put(Column::Meta, VOTE, record::vote_to_wire(&Vote::new(term, member.node_id)).encode_to_vec());
    futures::executor::block_on(engine.write(batch, true)).map_err(|error| consensus(error.to_string()))
}
