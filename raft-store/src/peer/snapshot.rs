//! A state on its way to a peer: a header, batches of rows, an end that says how many there were.
//!
//! The state is immutable, so that it is encoded while it is sent, and nothing waits for it.

use std::ops::Bound;
use std::sync::Arc;

use datamodel::OpaqueRef;
use futures::Stream;
use prost::Message;
use proto::raft as wire;
use proto::raft::snapshot_frame::Frame;

use crate::codec::{DecodeError, outcome_to_wire, row_from_wire, row_to_wire};
use crate::disk::RowLoader;
use crate::format::readable;
use crate::machine::{StateSnapshot, head, tombstone_to_wire};
use crate::record;
use crate::state::{ChangeKey, State};
use crate::types::{Snapshot, SnapshotMeta, Vote};

const IN_A_FRAME: usize = 128;

/// The frames of a snapshot, each made when it is asked for.
pub(crate) fn frames(vote: Vote, snapshot: Snapshot) -> impl Stream<Item = wire::SnapshotFrame> + Send + 'static {
    let frames = Frames { vote, snapshot, next: Next::Header, rows: 0, checksum: Checksum::default() };
    futures::stream::iter(frames.map(|frame| wire::SnapshotFrame { frame: Some(frame) }))
}

/// A walk over a state, a frame at a time: what comes next is a place in it, so that nothing is held in between.
struct Frames {
    vote: Vote,
    snapshot: Snapshot,
    next: Next,
    rows: u64,
    checksum: Checksum,
}

enum Next {
    Header,
    /// Rows of the table of that number, after that reference.
    Rows(usize, Bound<OpaqueRef>),
    Tombstones(Bound<ChangeKey>),
    /// Outcomes from this place in their order.
    Outcomes(usize),
    Over,
}

impl Iterator for Frames {
    type Item = Frame;

    fn next(&mut self) -> Option<Frame> {
        match std::mem::replace(&mut self.next, Next::Over) {
            Next::Header => {
                self.next = Next::Rows(0, Bound::Unbounded);
                Some(Frame::Header(self.header()))
            }
            Next::Rows(table, after) => Some(Frame::Rows(self.rows(table, after))),
            Next::Tombstones(after) => Some(Frame::Rows(self.tombstones(after))),
            Next::Outcomes(from) if from < self.state().remembered.len() => Some(Frame::Rows(self.outcomes(from))),
            Next::Outcomes(_) => Some(Frame::End(wire::SnapshotEnd { rows: self.rows, checksum: self.checksum.0 })),
            Next::Over => None,
        }
    }
}

impl Frames {
    fn state(&self) -> Arc<State> {
        Arc::clone(&self.snapshot.snapshot.0)
    }

    fn header(&self) -> wire::SnapshotHeader {
        wire::SnapshotHeader {
            format: self.state().format,
            vote: Some(record::vote_to_wire(&self.vote)),
            last: self.snapshot.meta.last_log_id.as_ref().map(record::log_id_to_wire),
            membership: Some(record::stored_membership_to_wire(&self.snapshot.meta.last_membership)),
            head: Some(head(&self.state())),
        }
    }

    fn rows(&mut self, mut table: usize, mut after: Bound<OpaqueRef>) -> wire::RowBatch {
        let state = self.state();
        let mut rows = Vec::with_capacity(IN_A_FRAME);
        while let Some(rest) = state.tables.get(table) {
            for (reference, row) in rest.rows.range((after, Bound::Unbounded)).take(IN_A_FRAME - rows.len()) {
                let stored = row_to_wire(row);
                self.checksum.add(&stored);
                self.rows += 1;
                rows.push(stored);
                after = Bound::Excluded(*reference);
            }
            if rows.len() == IN_A_FRAME {
                self.next = Next::Rows(table, after);
                return wire::RowBatch { rows, ..Default::default() };
            }
            (table, after) = (table + 1, Bound::Unbounded);
        }
        self.next = Next::Tombstones(Bound::Unbounded);
        wire::RowBatch { rows, ..Default::default() }
    }

    fn tombstones(&mut self, mut after: Bound<ChangeKey>) -> wire::RowBatch {
        let state = self.state();
        let mut tombstones = Vec::with_capacity(IN_A_FRAME);
        for (key, _) in state.tombstones.range((after, Bound::Unbounded)).take(IN_A_FRAME) {
            tombstones.extend(tombstone_to_wire(&state, key));
            after = Bound::Excluded(*key);
        }
        self.next = if tombstones.len() < IN_A_FRAME { Next::Outcomes(0) } else { Next::Tombstones(after) };
        wire::RowBatch { tombstones, ..Default::default() }
    }

    fn outcomes(&mut self, from: usize) -> wire::RowBatch {
        let state = self.state();
        let end = state.remembered.len().min(from + IN_A_FRAME);
        let outcome = |place: usize| {
            let (id, outcome) = state.remembered.nth(place)?;
            Some(outcome_to_wire(*id, place as u64, outcome))
        };
        self.next = Next::Outcomes(end);
        wire::RowBatch { outcomes: (from..end).filter_map(outcome).collect(), ..Default::default() }
    }
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
    loader: RowLoader,
    rows: u64,
    checksum: Checksum,
    complete: bool,
}

impl Assembly {
    pub(crate) fn new(reads: u32) -> Self {
        Self {
            reads,
            header: None,
            loader: RowLoader::default(),
            rows: 0,
            checksum: Checksum::default(),
            complete: false,
        }
    }

    pub(crate) fn add(&mut self, frame: wire::SnapshotFrame) -> Result<(), DecodeError> {
        match frame.frame.ok_or(DecodeError::BadValue)? {
            Frame::Header(header) => {
                self.loader.state.format = readable(header.format, self.reads)?;
                self.header = Some(header);
            }
            Frame::Rows(batch) => {
                for row in batch.rows {
                    self.checksum.add(&row);
                    self.rows += 1;
                    self.loader.row(Arc::new(row_from_wire(row)?));
                }
                for tombstone in &batch.tombstones {
                    self.loader.tombstone(tombstone)?;
                }
                for outcome in &batch.outcomes {
                    self.loader.outcome(outcome)?;
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
        self.loader.state.resume(&head);
        let vote = record::vote(&header.vote.ok_or(DecodeError::BadValue)?);
        let membership = header.membership.map(record::stored_membership).transpose()?.unwrap_or_default();
        let meta = SnapshotMeta { last_log_id: header.last.as_ref().map(record::log_id), last_membership: membership };
        Ok((vote, Snapshot { meta, snapshot: StateSnapshot(Arc::new(self.loader.finish())) }))
    }
}
