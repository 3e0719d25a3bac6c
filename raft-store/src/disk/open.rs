//! Opening the database, and what is read from it: the state at the last persisted entry, the vote, the log.

use std::sync::Arc;

use bytes::Bytes;
use openraft::entry::RaftEntry as _;
use prost::Message;
use proto::raft as wire;

use super::ahead::in_order;
use super::engine::{Column, Engine};
use crate::apply::link;
use crate::codec::{DecodeError, class, outcome_from_wire, reference, row_from_wire};
use crate::format::{admit_bytes, readable};
use crate::record;
use crate::row::{LogIndex, Row};
use crate::state::{ChangeKey, State, Tombstone};
use crate::types::{Entry, LogId, StoredMembership, Vote};

pub(crate) const VOTE: &[u8] = b"vote";
pub(crate) const PURGED: &[u8] = b"purged";
pub(crate) const STATE: &[u8] = b"state";

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The database itself.
    #[error("cannot open the database in {path}: {source}")]
    Database {
        /// Where.
        path: String,
        /// Why.
        source: rocksdb::Error,
    },
    /// What is in it.
    #[error("the database is damaged ({what}): {source}")]
    Damaged {
        /// Which record.
        what: &'static str,
        /// Why.
        source: DecodeError,
    },
    /// It was written by a newer version. Nothing is lost: that version reads it.
    #[error(
        "the database is of format {found}, this version reads up to {reads}: start the newer version again, or upgrade this host"
    )]
    Newer {
        /// Its format.
        found: u32,
        /// The newest that this version reads.
        reads: u32,
    },
    /// openraft refused to start.
    #[error("consensus cannot start: {0}")]
    Consensus(String),
    /// The peers' certificates.
    #[error("certificates for peers: {0}")]
    Certificates(String),
    /// The timings contradict one another.
    #[error("timings: {0}")]
    Timings(String),
}

impl OpenError {
    /// Whether the database is beyond use, rather than out of reach or of another version.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Self::Database { source, .. } => {
                source.kind() == rocksdb::ErrorKind::Corruption || source.as_ref().contains("No such file")
            }
            Self::Damaged { source, .. } => matches!(source, DecodeError::Malformed(_) | DecodeError::BadValue),
            Self::Newer { .. } | Self::Consensus(_) | Self::Certificates(_) | Self::Timings(_) => false,
        }
    }
}

/// The database, and how what is in it is read.
#[derive(Clone)]
pub(crate) struct Disk {
    engine: Arc<dyn Engine>,
}

/// What a start finds.
pub(crate) struct Stored {
    pub(crate) state: State,
    pub(crate) last_applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
    pub(crate) next_outcome: u64,
}

impl Disk {
    pub(crate) fn new(engine: Arc<dyn Engine>) -> Self {
        Self { engine }
    }

    pub(crate) fn engine(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.engine)
    }

    fn meta(&self, key: &[u8]) -> Result<Option<Bytes>, std::io::Error> {
        self.engine.get(Column::Meta, key)
    }

    pub(crate) fn vote(&self) -> Result<Option<Vote>, std::io::Error> {
        let Some(bytes) = self.meta(VOTE)? else { return Ok(None) };
        let ballot = wire::Ballot::decode(bytes).map_err(std::io::Error::other)?;
        Ok(Some(record::vote(&ballot)))
    }

    pub(crate) fn purged(&self) -> Result<Option<LogId>, std::io::Error> {
        let Some(bytes) = self.meta(PURGED)? else { return Ok(None) };
        let id = wire::LogId::decode(bytes).map_err(std::io::Error::other)?;
        Ok(Some(record::log_id(&id)))
    }

    pub(crate) fn last_entry(&self) -> Result<Option<Entry>, std::io::Error> {
        let last = self.engine.last(Column::Log)?;
        last.map(record::entry_from_bytes).transpose().map_err(std::io::Error::other)
    }

    /// Entries from `start` up to and without `end`.
    pub(crate) fn entries(&self, start: u64, end: u64) -> Result<Vec<Entry>, std::io::Error> {
        let mut out = Vec::new();
        for item in self.engine.scan(Column::Log, &start.to_be_bytes()) {
            let (key, bytes) = item?;
            let index = key.as_ref().try_into().map(u64::from_be_bytes).map_err(std::io::Error::other)?;
            if index >= end {
                break;
            }
            out.push(record::entry_from_bytes(bytes).map_err(std::io::Error::other)?);
        }
        Ok(out)
    }

    /// Looks at every entry: all there from `first` on. The index of the last. What is in those after `applied` is read,
    /// too; of the others, which peers may want, the engine has compared the checksums.
    pub(crate) fn check_log(&self, first: u64, applied: u64) -> Result<Option<u64>, OpenError> {
        let damaged = |source: DecodeError| OpenError::Damaged { what: "log", source };
        let mut next = first;
        for item in self.engine.scan(Column::Log, &[]) {
            let (key, bytes) = item.map_err(|error| damaged(malformed(&error)))?;
            let index = if next > applied {
                record::entry_from_bytes(bytes).map_err(damaged)?.log_id().index()
            } else {
                let record = wire::LogRecord::decode(bytes).map_err(|error| damaged(error.into()))?;
                record.id.unwrap_or_default().index
            };
            if key.as_ref() != next.to_be_bytes() || index != next {
                return Err(damaged(DecodeError::Malformed(format!("entry {next} is missing"))));
            }
            next += 1;
        }
        Ok(next.checked_sub(1).filter(|last| *last >= first))
    }

    /// The state as it was last persisted. What the log has beyond it is applied anew.
    pub(crate) fn load(&self, reads: u32) -> Result<Stored, OpenError> {
        let damaged = |what: &'static str| {
            move |source: DecodeError| match source {
                DecodeError::NewerFormat { found, reads } => OpenError::Newer { found, reads },
                source => OpenError::Damaged { what, source },
            }
        };
        let io =
            |what: &'static str| move |error: std::io::Error| OpenError::Damaged { what, source: malformed(&error) };
        let stored = self.meta(STATE).map_err(io("state"))?;
        let stored = stored.map(wire::StoredState::decode).transpose();
        let stored = stored.map_err(|error| damaged("state")(error.into()))?;
        let applied = stored.as_ref().and_then(|stored| stored.last_applied.as_ref()).map_or(0, |id| id.index);
        self.admit_log(applied + 1, reads).map_err(damaged("log"))?;
        let Some(stored) = stored else {
            let (state, membership) = (State::default(), StoredMembership::default());
            return Ok(Stored { state, last_applied: None, membership, next_outcome: 0 });
        };
        let mut loader = RowLoader::default();
        loader.state.format = readable(stored.format, reads).map_err(damaged("state"))?;
        let head = stored.head.unwrap_or_default();
        loader.state.resume(&head);
        let row = |bytes| row_from_wire(wire::StoredRow::decode(bytes)?).map(Arc::new);
        self.each(Column::Rows, "rows", row, |row| {
            loader.row(row);
            Ok(())
        })?;
        let tombstone = |bytes| Ok(wire::StoredTombstone::decode(bytes)?);
        self.each(Column::Tombstones, "tombstones", tombstone, |tombstone| loader.tombstone(&tombstone))?;
        let mut next_outcome = 0;
        let outcome = |bytes| Ok(wire::StoredOutcome::decode(bytes)?);
        self.each(Column::Outcomes, "outcomes", outcome, |outcome| {
            next_outcome = next_outcome.max(outcome.sequence + 1);
            loader.outcome(&outcome)
        })?;
        let membership = stored.membership.map(record::stored_membership).transpose().map_err(damaged("membership"))?;
        Ok(Stored {
            state: loader.finish(),
            last_applied: stored.last_applied.as_ref().map(record::log_id),
            membership: membership.unwrap_or_default(),
            next_outcome,
        })
    }

    /// Looks, before anything else is done, whether every entry that has to be applied anew can be read.
    fn admit_log(&self, start: u64, reads: u32) -> Result<(), DecodeError> {
        for item in self.engine.scan(Column::Log, &start.to_be_bytes()) {
            let (_, bytes) = item.map_err(|error| malformed(&error))?;
            if let Some(wire::log_record::Payload::Transactions(encoded)) = wire::LogRecord::decode(bytes)?.payload {
                admit_bytes(encoded, reads)?;
            }
        }
        Ok(())
    }

    fn each<T: Send>(
        &self,
        column: Column,
        what: &'static str,
        decode: impl Fn(Bytes) -> Result<T, DecodeError> + Sync,
        take: impl FnMut(T) -> Result<(), DecodeError>,
    ) -> Result<(), OpenError> {
        let items = self.engine.scan(column, &[]);
        let items = items.map(|item| item.map_or_else(|error| Err(malformed(&error)), |(_, bytes)| Ok(bytes)));
        in_order(items, decode, take).map_err(|source| OpenError::Damaged { what, source })
    }
}

fn malformed(error: &impl ToString) -> DecodeError {
    DecodeError::Malformed(error.to_string())
}

/// Builds a state from stored rows; a start and an arriving snapshot both do.
#[derive(Default)]
pub(crate) struct RowLoader {
    pub(crate) state: State,
    /// Rows come in the order of their references, their changes have another. Sorted, when they are all there, each goes
    /// into the map beside the one before.
    changes: Vec<ChangeKey>,
}

impl RowLoader {
    pub(crate) fn row(&mut self, row: Arc<Row>) {
        self.changes.push((row.modified, row.class, row.reference));
        link(&mut self.state, &row);
    }

    /// The state, when everything is in it.
    pub(crate) fn finish(mut self) -> State {
        self.changes.sort_unstable();
        for change in self.changes {
            self.state.changes.insert(change, ());
        }
        self.state
    }

    pub(crate) fn tombstone(&mut self, stored: &wire::StoredTombstone) -> Result<(), DecodeError> {
        let key = (LogIndex(stored.index), class(&stored.class)?, reference(&stored.reference)?);
        let tombstone = Tombstone { created: LogIndex(stored.created), time: datamodel::Timestamp(stored.time) };
        self.state.tombstones.insert(key, tombstone);
        Ok(())
    }

    pub(crate) fn outcome(&mut self, stored: &wire::StoredOutcome) -> Result<(), DecodeError> {
        let (id, outcome) = outcome_from_wire(stored)?;
        self.state.remembered.push(id, outcome);
        Ok(())
    }
}
