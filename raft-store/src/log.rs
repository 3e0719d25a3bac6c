//! The log as openraft wants it: appended in order, acknowledged when synced, read mostly from memory.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::{EntryPayload, LogState, OptionalSend};
use parking_lot::RwLock;
use tokio::sync::oneshot;

use crate::disk::{Disk, Job, Writer};
use crate::offload;
use crate::planted::Planted;
use crate::record;
use crate::types::{Config, Entry, LogId, Vote};

/// So many of the newest entries stay in memory: what is applied and sent to peers is read from here.
const CACHED: usize = 8192;
/// … as long as their encodings have no more bytes than this: an entry may hold hundreds of large objects.
const CACHED_BYTES: usize = 8 << 20;

/// The log.
#[derive(Clone)]
pub(crate) struct LogStore {
    disk: Disk,
    writer: Arc<Writer>,
    recent: Arc<RwLock<Recent>>,
    planted: Option<Planted>,
}

#[derive(Default)]
struct Recent {
    entries: BTreeMap<u64, Entry>,
    bytes: usize,
    /// Entries beyond this one may not be on disk yet.
    flushed: u64,
    vote: Option<Vote>,
    purged: Option<LogId>,
    last: Option<LogId>,
}

fn bytes(entry: &Entry) -> usize {
    if let EntryPayload::Normal(batch) = &entry.payload { batch.encoded.len() } else { 0 }
}

impl Recent {
    fn insert(&mut self, entry: Entry) {
        self.bytes += bytes(&entry);
        if let Some(replaced) = self.entries.insert(entry.index(), entry) {
            self.bytes -= bytes(&replaced);
        }
    }

    /// Lets go of what is on disk and more than may be kept. The newest entry stays.
    fn trim(&mut self) {
        while (self.entries.len() > CACHED || self.bytes > CACHED_BYTES)
            && self.entries.len() > 1
            && let Some(oldest) = self.entries.first_entry()
            && *oldest.key() <= self.flushed
        {
            self.bytes -= bytes(&oldest.remove());
        }
    }

    fn recount(&mut self) {
        self.bytes = self.entries.values().map(bytes).sum();
    }
}

impl LogStore {
    pub(crate) fn open(disk: Disk, writer: Arc<Writer>, planted: Option<Planted>) -> Result<Self, io::Error> {
        let purged = disk.purged()?;
        let last = disk.last_entry()?.map(|entry| entry.log_id()).or(purged);
        let recent = Recent {
            vote: disk.vote()?,
            flushed: last.map_or(0, |last| last.index()),
            purged,
            last,
            entries: BTreeMap::new(),
            bytes: 0,
        };
        Ok(Self { disk, writer, recent: Arc::new(RwLock::new(recent)), planted })
    }

    /// Gives the writer a job and waits for the disk.
    async fn write(&self, job: impl FnOnce(crate::disk::Flushed) -> Job) -> Result<(), io::Error> {
        let (done, outcome) = oneshot::channel();
        // Nobody waits any more: then nobody needs to know.
        let flushed = Box::new(move |result| drop(done.send(result)));
        self.writer.submit(job(flushed)).await?;
        outcome.await.map_err(io::Error::other)?
    }
}

impl RaftLogReader<Config> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(end) => end.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        if start >= end {
            return Ok(Vec::new());
        }
        {
            let recent = self.recent.read();
            if recent.entries.first_key_value().is_some_and(|(first, _)| *first <= start) {
                return Ok(recent.entries.range(start..end).map(|(_, entry)| entry.clone()).collect());
            }
        }
        let disk = self.disk.clone();
        let mut out = offload::blocking(move || disk.entries(start, end)).await??;
        // The newest of them may be in memory only.
        let next = out.last().map_or(start, |entry| entry.log_id().index() + 1);
        let recent = self.recent.read();
        out.extend(recent.entries.range(next..end.max(next)).map(|(_, entry)| entry.clone()));
        Ok(out)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.recent.read().vote)
    }
}

impl RaftLogStorage<Config> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Config>, io::Error> {
        let recent = self.recent.read();
        Ok(LogState { last_purged_log_id: recent.purged, last_log_id: recent.last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = *vote;
        self.write(|flushed| Job::Vote(vote, flushed)).await?;
        self.recent.write().vote = Some(vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Config>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut records = Vec::new();
        {
            let mut recent = self.recent.write();
            for entry in entries {
                let id = entry.log_id();
                records.push((id.index(), record::entry_to_bytes(&entry)));
                recent.insert(entry);
                recent.last = Some(id);
            }
            recent.trim();
        }
        let last = records.last().map(|(index, _)| *index);
        if self.planted == Some(Planted::AcknowledgesBeforeSync) {
            callback.io_completed(Ok(()));
            return self.writer.submit(Job::Append(records, Box::new(drop))).await;
        }
        let recent = Arc::clone(&self.recent);
        let flushed = Box::new(move |result: Result<(), io::Error>| {
            if let (Ok(()), Some(last)) = (&result, last) {
                recent.write().flushed = last;
            }
            callback.io_completed(result);
        });
        self.writer.submit(Job::Append(records, flushed)).await
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let last = last_log_id.map(|id| id.index());
        {
            let mut recent = self.recent.write();
            let from = last.map_or(0, |last| last.saturating_add(1));
            recent.entries.split_off(&from);
            recent.recount();
            recent.flushed = recent.flushed.min(from.saturating_sub(1));
            if recent.last.is_some_and(|last| last.index() >= from) {
                recent.last = last_log_id.or(recent.purged);
            }
        }
        self.write(|flushed| Job::TruncateAfter(last, flushed)).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        {
            let mut recent = self.recent.write();
            recent.entries = recent.entries.split_off(&log_id.index().saturating_add(1));
            recent.recount();
            recent.purged = Some(log_id);
            if recent.last.is_none_or(|last| last.index() <= log_id.index()) {
                recent.last = Some(log_id);
            }
        }
        self.write(|flushed| Job::Purge(log_id, flushed)).await
    }
}
