//! The state machine: committed entries into states, states into rows on disk.
//!
//! Reads go to memory, so that what is applied counts as soon as the new state is published. Rows reach
//! the disk a moment later, newest version only, many entries in one batch, together with the index they
//! stand for; a crash in between costs nothing, since the log brings them back. Only a purge of the log
//! must wait for them, and it does: openraft purges what a snapshot covers, and a snapshot is a state
//! whose rows have been written.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use datamodel::{ClassId, OpaqueRef};
use futures::{Stream, StreamExt};
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use parking_lot::Mutex;
use prost::Message;
use proto::raft as wire;
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

use crate::apply::{Dirty, apply, takes_long, trim_history};
use crate::codec::{class_name, outcome_to_wire, row_to_wire};
use crate::disk::{Change, Column, Job, STATE, Stored, Writer};
use crate::offload;
use crate::planted::Planted;
use crate::record;
use crate::remembered::{Places, REMEMBERED_TRANSACTIONS};
use crate::row::LogIndex;
use crate::state::{ChangeKey, History, Outcome, State};
use crate::types::{Config, LogId, Outcomes, Snapshot, SnapshotMeta, StoredMembership};

/// A snapshot: nothing but a state, and what it was made of.
#[derive(Clone)]
pub(crate) struct StateSnapshot(pub(crate) Arc<State>);

/// More rows than this are encoded away from the thread of consensus: it has milliseconds, not a second.
const MANY_ROWS: usize = 2_000;

/// Rows wait at most this long for their batch.
pub(crate) const PERSIST_EVERY: Duration = Duration::from_millis(100);

/// What the machine shares with the store's handle and the persister.
pub(crate) struct Machine {
    pub(crate) state: ArcSwap<State>,
    pub(crate) applied: watch::Sender<LogIndex>,
    /// The index of the newest entry that took office in its term, by term: `(term, index)`.
    pub(crate) office: watch::Sender<(u64, LogIndex)>,
    /// Where the outcomes of the state stand. Changed with the state, under the lock of `inner`, or ahead of it.
    places: Places,
    history: History,
    writer: Arc<Writer>,
    planted: Option<Planted>,
    inner: Mutex<Inner>,
    /// Held while changes are collected and handed over, so that batches reach the writer in their order.
    handover: tokio::sync::Mutex<()>,
}

struct Inner {
    last_applied: Option<LogId>,
    membership: StoredMembership,
    dirty: Dirty,
    buried: HashSet<ChangeKey>,
    trimmed: Vec<ChangeKey>,
    outcomes: Vec<(Uuid, Outcome)>,
    /// Everything on disk is of another history: a snapshot came in.
    replaced: bool,
    /// The pool's format is newer than what is on disk says.
    raised: bool,
    next_outcome: u64,
    first_outcome: u64,
}

impl Machine {
    pub(crate) fn new(stored: Stored, history: History, writer: Arc<Writer>, planted: Option<Planted>) -> Self {
        let remembered = stored.state.remembered.len() as u64;
        let places = Places::of(&stored.state.remembered);
        let (applied, _) = watch::channel(stored.state.applied);
        let (office, _) = watch::channel((0, LogIndex(0)));
        Self {
            state: ArcSwap::from_pointee(stored.state),
            applied,
            office,
            handover: tokio::sync::Mutex::new(()),
            places,
            history,
            writer,
            planted,
            inner: Mutex::new(Inner {
                last_applied: stored.last_applied,
                membership: stored.membership,
                dirty: HashSet::new(),
                buried: HashSet::new(),
                trimmed: Vec::new(),
                outcomes: Vec::new(),
                replaced: false,
                raised: false,
                next_outcome: stored.next_outcome,
                first_outcome: stored.next_outcome.saturating_sub(remembered),
            }),
        }
    }

    /// Writes what has changed since the last time, and waits until the writer has it on its way.
    pub(crate) async fn persist(&self) -> Result<(), io::Error> {
        let order = self.handover.lock().await;
        let Some((state, work)) = self.unwritten() else { return Ok(()) };
        let many = work.replaced || work.dirty.len() > MANY_ROWS;
        let changes = if many { offload::blocking(move || work.changes(&state)).await? } else { work.changes(&state) };
        let (done, outcome) = oneshot::channel();
        self.writer.submit(Job::Rows(changes, Box::new(move |result| drop(done.send(result))))).await?;
        drop(order);
        outcome.await.map_err(io::Error::other)?
    }

    /// Writes what has changed, and syncs it: for what no log can bring back.
    pub(crate) async fn persist_for_good(&self) -> Result<(), io::Error> {
        self.persist().await?;
        let (done, outcome) = oneshot::channel();
        self.writer.submit(Job::Sync(Box::new(move |result| drop(done.send(result))))).await?;
        outcome.await.map_err(io::Error::other)?
    }

    /// What became of a transaction, as far as is remembered.
    pub(crate) fn outcome(&self, transaction: Uuid) -> Option<Outcome> {
        let _still = self.inner.lock();
        self.places.find(transaction, &self.state.load().remembered).cloned()
    }

    /// Everything that has to be written, from one consistent moment.
    fn unwritten(&self) -> Option<(Arc<State>, Work)> {
        let mut inner = self.inner.lock();
        if inner.dirty.is_empty() && inner.outcomes.is_empty() && !inner.replaced && !inner.raised {
            return None;
        }
        Some((self.state.load_full(), inner.take()))
    }
}

struct Work {
    last_applied: Option<LogId>,
    membership: StoredMembership,
    dirty: Dirty,
    buried: HashSet<ChangeKey>,
    trimmed: Vec<ChangeKey>,
    outcomes: Vec<(Uuid, Outcome)>,
    first_sequence: u64,
    forgotten: std::ops::Range<u64>,
    replaced: bool,
}

impl Work {
    fn changes(self, state: &State) -> Vec<Change> {
        let work = self;
        let mut out = Vec::with_capacity(work.dirty.len() + work.outcomes.len() + 8);
        if work.replaced {
            out.extend([Column::Rows, Column::Tombstones, Column::Outcomes].map(Change::clear));
            for (class, table) in (0..).map(ClassId).zip(&state.tables) {
                out.extend(table.rows.keys().map(|reference| row_job(state, class, *reference)));
            }
            out.extend(state.tombstones.keys().filter_map(|key| tombstone_job(state, key)));
        } else {
            out.extend(work.dirty.iter().map(|(class, reference)| row_job(state, *class, *reference)));
            out.extend(work.buried.iter().filter_map(|key| tombstone_job(state, key)));
            out.extend(work.trimmed.iter().map(|key| Change::Delete(Column::Tombstones, tombstone_key(key))));
        }
        for (sequence, (id, outcome)) in (work.first_sequence..).zip(&work.outcomes) {
            let stored = outcome_to_wire(*id, sequence, outcome).encode_to_vec();
            out.push(Change::Put(Column::Outcomes, sequence.to_be_bytes().to_vec(), stored));
        }
        out.extend(work.forgotten.map(|sequence| Change::Delete(Column::Outcomes, sequence.to_be_bytes().to_vec())));
        let stored = wire::StoredState {
            format: state.format,
            last_applied: work.last_applied.as_ref().map(record::log_id_to_wire),
            membership: Some(record::stored_membership_to_wire(&work.membership)),
            head: Some(head(state)),
        };
        out.push(Change::Put(Column::Meta, STATE.to_vec(), stored.encode_to_vec()));
        out
    }
}

impl Inner {
    fn take(&mut self) -> Work {
        let outcomes = std::mem::take(&mut self.outcomes);
        let first_sequence = self.next_outcome;
        self.next_outcome += outcomes.len() as u64;
        let keep_from = self.next_outcome.saturating_sub(REMEMBERED_TRANSACTIONS as u64);
        let forgotten = self.first_outcome..keep_from.max(self.first_outcome);
        self.first_outcome = forgotten.end;
        self.raised = false;
        Work {
            last_applied: self.last_applied,
            membership: self.membership.clone(),
            dirty: std::mem::take(&mut self.dirty),
            buried: std::mem::take(&mut self.buried),
            trimmed: std::mem::take(&mut self.trimmed),
            outcomes,
            first_sequence,
            forgotten,
            replaced: std::mem::take(&mut self.replaced),
        }
    }
}

pub(crate) fn head(state: &State) -> wire::StateHead {
    wire::StateHead {
        applied: state.applied.0,
        clock: state.clock.0,
        oldest_token: state.oldest_token.0,
        age: state.age.0,
        age_read: state.age_read.0,
    }
}

pub(crate) fn row_key(class: ClassId, reference: OpaqueRef) -> Vec<u8> {
    let mut key = class.def().name.as_bytes().to_vec();
    key.push(0);
    key.extend_from_slice(reference.bits().as_bytes());
    key
}

fn row_job(state: &State, class: ClassId, reference: OpaqueRef) -> Change {
    let key = row_key(class, reference);
    match state.row_of(class, reference) {
        Some(row) => Change::Put(Column::Rows, key, row_to_wire(row).encode_to_vec()),
        None => Change::Delete(Column::Rows, key),
    }
}

pub(crate) fn tombstone_key((index, class, reference): &ChangeKey) -> Vec<u8> {
    let mut key = index.0.to_be_bytes().to_vec();
    key.extend_from_slice(&row_key(*class, *reference));
    key
}

pub(crate) fn tombstone_to_wire(state: &State, key: &ChangeKey) -> Option<wire::StoredTombstone> {
    let tombstone = state.tombstones.get(key)?;
    Some(wire::StoredTombstone {
        class: class_name(key.1),
        reference: bytes::Bytes::copy_from_slice(key.2.bits().as_bytes()),
        index: key.0.0,
        created: tombstone.created.0,
        time: tombstone.time.0,
    })
}

fn tombstone_job(state: &State, key: &ChangeKey) -> Option<Change> {
    let stored = tombstone_to_wire(state, key)?;
    Some(Change::Put(Column::Tombstones, tombstone_key(key), stored.encode_to_vec()))
}

/// The machine as openraft drives it.
#[derive(Clone)]
pub(crate) struct StateMachine(pub(crate) Arc<Machine>);

impl RaftStateMachine<Config> for StateMachine {
    type SnapshotData = StateSnapshot;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let inner = self.0.inner.lock();
        Ok((inner.last_applied, inner.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Config>, io::Error>> + Unpin + OptionalSend,
    {
        let mut state = State::clone(&self.0.state.load());
        let mut told = Vec::new();
        let mut answers = Vec::new();
        let mut dirty = Dirty::new();
        let mut trimmed = Vec::new();
        let mut remembered = Vec::new();
        let mut membership = None;
        let mut last = None;
        let mut office = None;
        let mut raised = false;
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let id = entry.log_id();
            let index = LogIndex(id.index());
            state.applied = index;
            last = Some(id);
            let mut outcomes = Outcomes::default();
            match &entry.payload {
                // The first entry of a term is blank: by it a leader takes office.
                EntryPayload::Blank => office = Some((**id.committed_leader_id(), index)),
                EntryPayload::Normal(batch) => {
                    for transaction in batch.transactions.iter() {
                        let known = state.remembered.end();
                        let outcome = if takes_long(transaction) {
                            // Later entries wait for it. Heartbeats and votes, which this thread is for, do not.
                            let (mut made, mut touched) = (std::mem::take(&mut state), std::mem::take(&mut dirty));
                            let (machine, transaction) = (Arc::clone(&self.0), transaction.clone());
                            let applied = offload::blocking(move || {
                                let outcome = apply(&mut made, index, &transaction, &machine.places, &mut touched);
                                (outcome, made, touched)
                            });
                            let outcome;
                            (outcome, state, dirty) = applied.await?;
                            outcome
                        } else {
                            apply(&mut state, index, transaction, &self.0.places, &mut dirty)
                        };
                        let outcome = outcome.map_err(io::Error::other)?;
                        if state.remembered.end() > known {
                            remembered.push((transaction.id(), outcome.clone()));
                        }
                        outcomes.0.push(outcome);
                    }
                    if batch.format > state.format {
                        tracing::info!(format = batch.format, %index, "the pool is at a newer format from here on");
                        raised = true;
                    }
                    state.format = state.format.max(batch.format);
                    told.push((batch.answers.clone(), outcomes.clone()));
                    trim_history(&mut state, index, self.0.history, &mut trimmed);
                    if self.0.planted == Some(Planted::ForgetsTombstones) {
                        state.tombstones = state
                            .tombstones
                            .range((LogIndex(index.0.saturating_sub(5)), ClassId(0), OpaqueRef::NULL)..)
                            .map(|(key, tombstone)| (*key, *tombstone))
                            .collect();
                    }
                }
                EntryPayload::Membership(new) => membership = Some(StoredMembership::new(Some(id), new.clone())),
            }
            if let Some(responder) = responder {
                answers.push((responder, outcomes));
            }
        }
        let Some(last) = last else { return Ok(()) };
        let applied = state.applied;
        {
            let mut inner = self.0.inner.lock();
            inner.last_applied = Some(last);
            if let Some(membership) = membership {
                inner.membership = membership;
            }
            for key in state.tombstones.range((self.0.state.load().applied.next(), ClassId(0), OpaqueRef::NULL)..) {
                inner.buried.insert(*key.0);
            }
            inner.dirty.extend(dirty);
            inner.trimmed.extend(trimmed);
            inner.outcomes.extend(remembered);
            inner.raised |= raised;
            self.0.state.store(Arc::new(state));
        }
        // ORDER: the state first, then who waits for it, then who asked.
        self.0.applied.send_replace(applied);
        if let Some(office) = office {
            self.0.office.send_replace(office);
        }
        for (callers, outcomes) in told {
            callers.tell(&outcomes);
        }
        for (responder, outcomes) in answers {
            responder.send(outcomes);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: StateSnapshot) -> Result<(), io::Error> {
        let applied = snapshot.0.applied;
        let places = Places::of(&snapshot.0.remembered);
        {
            let mut inner = self.0.inner.lock();
            inner.last_applied = meta.last_log_id;
            inner.membership = meta.last_membership.clone();
            inner.dirty.clear();
            inner.buried.clear();
            inner.trimmed.clear();
            inner.outcomes = snapshot.0.remembered.iter().cloned().collect();
            inner.replaced = true;
            self.0.places.become_those(places);
            self.0.state.store(snapshot.0);
        }
        // The leader counts on it from now on, and the entries that made it may never come here.
        self.0.persist_for_good().await?;
        self.0.applied.send_replace(applied);
        // Entries of this term are in it, though it does not say which was the first.
        if let Some(last) = &meta.last_log_id {
            let term = **last.committed_leader_id();
            self.0.office.send_if_modified(|office| {
                let later = office.0 < term;
                if later {
                    *office = (term, applied);
                }
                later
            });
        }
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let snapshot = self.current();
        Ok(snapshot.meta.last_log_id.is_some().then_some(snapshot))
    }
}

impl StateMachine {
    fn current(&self) -> Snapshot {
        let inner = self.0.inner.lock();
        let meta = SnapshotMeta { last_log_id: inner.last_applied, last_membership: inner.membership.clone() };
        Snapshot { meta, snapshot: StateSnapshot(self.0.state.load_full()) }
    }
}

impl RaftSnapshotBuilder<Config> for StateMachine {
    type SnapshotData = StateSnapshot;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let snapshot = self.current();
        // What the snapshot covers may be purged from the log: its rows go to the disk first.
        self.0.persist().await?;
        Ok(snapshot)
    }
}
