//! A state on its way to a peer: a header, batches of rows, an end that says how many there were.
//!
//! The state is immutable, so that it is encoded while it is sent, and nothing waits for it.

use std::sync::Arc;

use futures::Stream;
use prost::Message;
use proto::raft as wire;
use proto::raft::snapshot_frame::Frame;

use crate::codec::{DecodeError, outcome_to_wire, row_to_wire};
use crate::disk::RowLoader;
use crate::format::readable;
use crate::machine::{StateSnapshot, head, tombstone_to_wire};
use crate::record;
use crate::row::LogIndex;
use crate::state::State;
use crate::types::{Snapshot, SnapshotMeta, Vote};

const ROWS_IN_A_FRAME: usize = 128;

/// The frames of a snapshot, each made when it is asked for.
pub(crate) fn frames(vote: Vote, snapshot: Snapshot) -> impl Stream<Item = wire::SnapshotFrame> + Send + 'static {
    let (frames, receiver) = tokio::sync::mpsc::channel(8);
    // Encoding is work for a thread of its own; a full channel holds it back, a closed one ends it.
    tokio::task::spawn_blocking(move || send(vote, &snapshot, &frames));
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}

fn send(vote: Vote, snapshot: &Snapshot, frames: &tokio::sync::mpsc::Sender<wire::SnapshotFrame>) {
    let state = &snapshot.snapshot.0;
    let put = |frame: Frame| frames.blocking_send(wire::SnapshotFrame { frame: Some(frame) }).is_ok();
    let header = wire::SnapshotHeader {
        format: state.format,
        vote: Some(record::vote_to_wire(&vote)),
        last: snapshot.meta.last_log_id.as_ref().map(record::log_id_to_wire),
        membership: Some(record::stored_membership_to_wire(&snapshot.meta.last_membership)),
        head: Some(head(state)),
    };
    if !put(Frame::Header(header)) {
        return;
    }
    let mut checksum = Checksum::default();
    let mut count = 0_u64;
    let mut rows = Vec::with_capacity(ROWS_IN_A_FRAME);
    for row in state.tables.iter().flat_map(|table| table.rows.values()) {
        let stored = row_to_wire(row);
        checksum.add(&stored);
        count += 1;
        rows.push(stored);
        if rows.len() == ROWS_IN_A_FRAME
            && !put(Frame::Rows(wire::RowBatch { rows: std::mem::take(&mut rows), ..Default::default() }))
        {
            return;
        }
    }
    let tombstones: Vec<_> = state.tombstones.keys().filter_map(|key| tombstone_to_wire(state, key)).collect();
    let outcomes: Vec<_> = (0..)
        .zip(&state.remembered_order)
        .filter_map(|(sequence, id)| Some(outcome_to_wire(*id, sequence, state.remembered.get(id)?)))
        .collect();
    let mut batches = vec![wire::RowBatch { rows, ..Default::default() }];
    batches
        .extend(tombstones.chunks(4096).map(|part| wire::RowBatch { tombstones: part.to_vec(), ..Default::default() }));
    batches.extend(outcomes.chunks(4096).map(|part| wire::RowBatch { outcomes: part.to_vec(), ..Default::default() }));
    for batch in batches {
        if !put(Frame::Rows(batch)) {
            return;
        }
    }
    let _ = put(Frame::End(wire::SnapshotEnd { rows: count, checksum: checksum.0 }));
}

/// FNV-1a over every row's bytes: TLS guards the way, this guards against our own mistakes.
struct Checksum(u32);

impl Default for Checksum {
    fn default() -> Self {
        Self(0x811c_9dc5)
    }
}

impl Checksum {
    fn add(&mut self, row: &wire::StoredRow) {
        for byte in row.encode_to_vec() {
            self.0 = (self.0 ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
    }
}

/// A snapshot that is arriving.
pub(crate) struct Assembly {
    reads: u32,
    header: Option<wire::SnapshotHeader>,
    state: State,
    rows: u64,
    checksum: Checksum,
    complete: bool,
}

impl Assembly {
    pub(crate) fn new(reads: u32) -> Self {
        Self { reads, header: None, state: State::default(), rows: 0, checksum: Checksum::default(), complete: false }
    }

    pub(crate) fn add(&mut self, frame: wire::SnapshotFrame) -> Result<(), DecodeError> {
        match frame.frame.ok_or(DecodeError::BadValue)? {
            Frame::Header(header) => {
                self.state.format = readable(header.format, self.reads)?;
                self.header = Some(header);
            }
            Frame::Rows(batch) => {
                let mut loader = RowLoader { state: &mut self.state };
                for row in batch.rows {
                    self.checksum.add(&row);
                    self.rows += 1;
                    loader.row(row)?;
                }
                for tombstone in &batch.tombstones {
                    loader.tombstone(tombstone)?;
                }
                for outcome in &batch.outcomes {
                    loader.outcome(outcome)?;
                }
            }
            Frame::End(end) => {
                if end.rows != self.rows || end.checksum != self.checksum.0 {
                    return Err(DecodeError::Malformed("the snapshot's rows are not those that were sent".into()));
                }
                self.complete = true;
            }
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<(Vote, Snapshot), DecodeError> {
        let header = self
            .header
            .filter(|_| self.complete)
            .ok_or_else(|| DecodeError::Malformed("the snapshot is cut short".into()))?;
        let head = header.head.unwrap_or_default();
        self.state.applied = LogIndex(head.applied);
        self.state.clock = datamodel::Timestamp(head.clock);
        self.state.oldest_token = LogIndex(head.oldest_token);
        let vote = record::vote(&header.vote.ok_or(DecodeError::BadValue)?);
        let membership = header.membership.map(record::stored_membership).transpose()?.unwrap_or_default();
        let meta = SnapshotMeta { last_log_id: header.last.as_ref().map(record::log_id), last_membership: membership };
        Ok((vote, Snapshot { meta, snapshot: StateSnapshot(Arc::new(self.state)) }))
    }
}
