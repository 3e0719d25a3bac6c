//! Opening the database, and what is read from it: the state at the last persisted entry, the vote, the log.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use proto::raft as wire;
use rocksdb::{ColumnFamily, ColumnFamilyDescriptor, DB, IteratorMode, Options};

use crate::apply::link;
use crate::codec::{DecodeError, class, outcome_from_wire, reference, row_from_wire};
use crate::format::{admit_bytes, readable};
use crate::record;
use crate::row::LogIndex;
use crate::state::{State, Tombstone};
use crate::types::{Entry, LogId, StoredMembership, Vote};

/// A family of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Column {
    /// Log index → entry.
    Log,
    /// Vote, purge mark, state head.
    Meta,
    /// (class, reference) → row.
    Rows,
    /// (index, class, reference) → tombstone.
    Tombstones,
    /// Sequence → remembered outcome.
    Outcomes,
}

impl Column {
    pub(crate) const ALL: [Self; 5] = [Self::Log, Self::Meta, Self::Rows, Self::Tombstones, Self::Outcomes];

    const fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Meta => "meta",
            Self::Rows => "rows",
            Self::Tombstones => "tombstones",
            Self::Outcomes => "outcomes",
        }
    }
}

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
    #[error("the database is damaged ({what}): {source}; move it away and let this host catch up from its peers")]
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

/// The database.
#[derive(Clone)]
pub(crate) struct Disk {
    db: Arc<DB>,
}

/// What a start finds.
pub(crate) struct Stored {
    pub(crate) state: State,
    pub(crate) last_applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
    pub(crate) next_outcome: u64,
}

impl Disk {
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_max_background_jobs(2);
        options.set_max_total_wal_size(64 << 20);
        options.set_keep_log_file_num(3);
        // A torn tail of the write-ahead log is an entry that nobody was told of; damage before it is refused.
        options.set_wal_recovery_mode(rocksdb::DBRecoveryMode::TolerateCorruptedTailRecords);
        let columns = Column::ALL.map(|column| {
            let mut options = Options::default();
            options.set_write_buffer_size(16 << 20);
            ColumnFamilyDescriptor::new(column.name(), options)
        });
        let db = DB::open_cf_descriptors(&options, path, columns)
            .map_err(|source| OpenError::Database { path: path.display().to_string(), source })?;
        Ok(Self { db: Arc::new(db) })
    }

    pub(crate) fn db(&self) -> &DB {
        &self.db
    }

    pub(crate) fn column(&self, column: Column) -> Result<&ColumnFamily, std::io::Error> {
        self.db
            .cf_handle(column.name())
            .ok_or_else(|| std::io::Error::other(format!("no column family {}", column.name())))
    }

    fn meta(&self, key: &[u8]) -> Result<Option<Vec<u8>>, std::io::Error> {
        self.db.get_cf(self.column(Column::Meta)?, key).map_err(std::io::Error::other)
    }

    pub(crate) fn vote(&self) -> Result<Option<Vote>, std::io::Error> {
        let Some(bytes) = self.meta(VOTE)? else { return Ok(None) };
        let ballot = wire::Ballot::decode(bytes.as_slice()).map_err(std::io::Error::other)?;
        Ok(Some(record::vote(&ballot)))
    }

    pub(crate) fn purged(&self) -> Result<Option<LogId>, std::io::Error> {
        let Some(bytes) = self.meta(PURGED)? else { return Ok(None) };
        let id = wire::LogId::decode(bytes.as_slice()).map_err(std::io::Error::other)?;
        Ok(Some(record::log_id(&id)))
    }

    pub(crate) fn last_entry(&self) -> Result<Option<Entry>, std::io::Error> {
        match self.db.iterator_cf(self.column(Column::Log)?, IteratorMode::End).next() {
            None => Ok(None),
            Some(item) => {
                let (_, bytes) = item.map_err(std::io::Error::other)?;
                record::entry_from_bytes(Bytes::from(bytes)).map(Some).map_err(std::io::Error::other)
            }
        }
    }

    /// Entries from `start` up to and without `end`.
    pub(crate) fn entries(&self, start: u64, end: u64) -> Result<Vec<Entry>, std::io::Error> {
        let from = start.to_be_bytes();
        let mut out = Vec::new();
        for item in
            self.db.iterator_cf(self.column(Column::Log)?, IteratorMode::From(&from, rocksdb::Direction::Forward))
        {
            let (key, bytes) = item.map_err(std::io::Error::other)?;
            let index = key.as_ref().try_into().map(u64::from_be_bytes).map_err(std::io::Error::other)?;
            if index >= end {
                break;
            }
            out.push(record::entry_from_bytes(Bytes::from(bytes)).map_err(std::io::Error::other)?);
        }
        Ok(out)
    }

    /// The state as it was last persisted. What the log has beyond it is applied anew.
    pub(crate) fn load(&self, reads: u32) -> Result<Stored, OpenError> {
        let damaged = |what: &'static str| {
            move |source: DecodeError| match source {
                DecodeError::NewerFormat { found, reads } => OpenError::Newer { found, reads },
                source => OpenError::Damaged { what, source },
            }
        };
        let io = |what: &'static str| {
            move |error: std::io::Error| OpenError::Damaged { what, source: DecodeError::Malformed(error.to_string()) }
        };
        let mut state = State::default();
        let stored = self.meta(STATE).map_err(io("state"))?;
        let stored = stored.map(|bytes| wire::StoredState::decode(bytes.as_slice())).transpose();
        let stored = stored.map_err(|error| damaged("state")(error.into()))?;
        let applied = stored.as_ref().and_then(|stored| stored.last_applied.as_ref()).map_or(0, |id| id.index);
        self.admit_log(applied + 1, reads).map_err(damaged("log"))?;
        let Some(stored) = stored else {
            return Ok(Stored { state, last_applied: None, membership: StoredMembership::default(), next_outcome: 0 });
        };
        state.format = readable(stored.format, reads).map_err(damaged("state"))?;
        let head = stored.head.unwrap_or_default();
        state.applied = LogIndex(head.applied);
        state.clock = datamodel::Timestamp(head.clock);
        state.oldest_token = LogIndex(head.oldest_token);
        let mut rows = RowLoader { state: &mut state };
        self.each(Column::Rows, "rows", |bytes| rows.row(wire::StoredRow::decode(bytes)?))?;
        self.each(Column::Tombstones, "tombstones", |bytes| rows.tombstone(&wire::StoredTombstone::decode(bytes)?))?;
        let mut next_outcome = 0;
        self.each(Column::Outcomes, "outcomes", |bytes| {
            let outcome = wire::StoredOutcome::decode(bytes)?;
            next_outcome = next_outcome.max(outcome.sequence + 1);
            rows.outcome(&outcome)
        })?;
        let membership = stored.membership.map(record::stored_membership).transpose().map_err(damaged("membership"))?;
        Ok(Stored {
            state,
            last_applied: stored.last_applied.as_ref().map(record::log_id),
            membership: membership.unwrap_or_default(),
            next_outcome,
        })
    }

    /// Looks, before anything else is done, whether every entry that has to be applied anew can be read.
    fn admit_log(&self, start: u64, reads: u32) -> Result<(), DecodeError> {
        let failed = |text: String| DecodeError::Malformed(text);
        let family = self.column(Column::Log).map_err(|error| failed(error.to_string()))?;
        let from = start.to_be_bytes();
        for item in self.db.iterator_cf(family, IteratorMode::From(&from, rocksdb::Direction::Forward)) {
            let (_, bytes) = item.map_err(|error| failed(error.to_string()))?;
            if let Some(wire::log_record::Payload::Transactions(encoded)) =
                wire::LogRecord::decode(bytes.as_ref())?.payload
            {
                admit_bytes(encoded, reads)?;
            }
        }
        Ok(())
    }

    fn each(
        &self,
        column: Column,
        what: &'static str,
        mut take: impl FnMut(Bytes) -> Result<(), DecodeError>,
    ) -> Result<(), OpenError> {
        let failed = |text: String| OpenError::Damaged { what, source: DecodeError::Malformed(text) };
        let family = self.column(column).map_err(|error| failed(error.to_string()))?;
        for item in self.db.iterator_cf(family, IteratorMode::Start) {
            let (_, bytes) = item.map_err(|error| failed(error.to_string()))?;
            take(Bytes::from(bytes)).map_err(|source| OpenError::Damaged { what, source })?;
        }
        Ok(())
    }
}

/// Builds a state from stored rows; a start and an arriving snapshot both do.
pub(crate) struct RowLoader<'a> {
    pub(crate) state: &'a mut State,
}

impl RowLoader<'_> {
    pub(crate) fn row(&mut self, stored: wire::StoredRow) -> Result<(), DecodeError> {
        let row = Arc::new(row_from_wire(stored)?);
        self.state.changes.insert((row.modified, row.class, row.reference), ());
        link(self.state, &row);
        Ok(())
    }

    pub(crate) fn tombstone(&mut self, stored: &wire::StoredTombstone) -> Result<(), DecodeError> {
        let key = (LogIndex(stored.index), class(&stored.class)?, reference(&stored.reference)?);
        let tombstone = Tombstone { created: LogIndex(stored.created), time: datamodel::Timestamp(stored.time) };
        self.state.tombstones.insert(key, tombstone);
        Ok(())
    }

    pub(crate) fn outcome(&mut self, stored: &wire::StoredOutcome) -> Result<(), DecodeError> {
        let (id, outcome) = outcome_from_wire(stored)?;
        self.state.remembered.insert(id, outcome);
        self.state.remembered_order.push_back(id);
        Ok(())
    }
}
