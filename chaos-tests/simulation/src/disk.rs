//! A simulated disk: slow, full at times, forgetful when the power goes, and at times damaged.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message;
use proto::raft as wire;
use raft_store::{Column, DiskChange, Engine, Memory, OpenError, Place, Promise, Scan};

use crate::chance::Chance;
use crate::process::Watch;
use crate::trace::Trace;
use crate::{broken, tell};

/// Where in a write a process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Nothing is written yet.
    BeforeWrite,
    /// It is written and not synced.
    BeforeSync,
    /// It is synced and nobody was told.
    AfterSync,
}

/// A host's disk: it outlives the host's processes.
pub struct Disk {
    name: String,
    memory: Memory,
    inner: Mutex<Inner>,
    trace: Trace,
    leaders: Leaders,
}

struct Inner {
    chance: Chance,
    sync: (u64, u64),
    full: bool,
    trap: Option<(Moment, Watch)>,
    /// What is kept beside the database: what it promised, as a process finds it and as a power failure leaves it, and
    /// the fence.
    promise: Promise,
    synced_promise: Promise,
    fence: Option<Vec<u8>>,
    /// What cannot be read any more.
    rotten: BTreeSet<(Column, Vec<u8>)>,
}

/// Who led which term, of all disks of a pool.
pub type Leaders = Arc<Mutex<std::collections::BTreeMap<u64, u64>>>;

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new(name: String, chance: Chance, trace: Trace, leaders: Leaders) -> Arc<Self> {
        let inner = Inner {
            chance,
            sync: (100, 3_000),
            full: false,
            trap: None,
            promise: Promise::default(),
            synced_promise: Promise::default(),
            fence: None,
            rotten: BTreeSet::new(),
        };
        Arc::new(Self { name, memory: Memory::default(), inner: Mutex::new(inner), trace, leaders })
    }

    /// From now on a sync takes between so many microseconds.
    pub fn set_sync(&self, from: u64, to: u64) {
        self.inner.lock().sync = (from, to);
    }

    /// Whether there is no room.
    pub fn is_full(&self) -> bool {
        self.inner.lock().full
    }

    /// From now on it has room or not.
    pub fn set_full(&self, full: bool) {
        self.inner.lock().full = full;
    }

    /// The next write that comes to that moment ends the process.
    pub fn set_trap(&self, moment: Moment, process: Watch) {
        self.inner.lock().trap = Some((moment, process));
    }

    /// No write ends a process.
    pub fn disarm(&self) {
        self.inner.lock().trap = None;
    }

    /// The process that wrote to it is gone; `power` too: what was not synced may be lost, from any batch on, of which
    /// the first may be there in part. That one is dropped when the log is read again.
    pub fn crash(&self, power: bool) {
        let mut inner = self.inner.lock();
        inner.trap = None;
        if !power {
            return;
        }
        // The file beside it is not synced: what it said at some time before, or half of that, which says nothing.
        inner.promise = match inner.chance.below(4) {
            0 => inner.synced_promise,
            1 => Promise::default(),
            _ => inner.promise,
        };
        inner.synced_promise = inner.promise;
        let unsynced = self.memory.unsynced();
        if unsynced > 0 {
            let kept = inner.chance.index(unsynced + 1);
            let torn = kept < unsynced && inner.chance.one_in(2);
            drop(inner);
            let how = if torn { ", the next one is torn" } else { "" };
            tell!(self.trace, "{}: of {unsynced} batches not synced {kept} are left{how}", self.name);
            self.memory.crash(kept);
        }
    }

    /// Damages it while no process uses it, so that it cannot be opened as what it was. False where there is nothing
    /// whose loss could be told.
    pub fn damage(&self) -> bool {
        let mut inner = self.inner.lock();
        let entries = self.memory.scan(Column::Log, &[]).filter_map(Result::ok);
        let last = entries.last().and_then(|(key, _)| key.as_ref().try_into().map(u64::from_be_bytes).ok());
        let promised = inner.promise.last > 0;
        let what = match inner.chance.below(3) {
            0 if promised && last == Some(inner.promise.last) => {
                // The end of the log, which others were told of.
                let from = (inner.promise.last + 1).saturating_sub(1 + inner.chance.below(3));
                let range = DiskChange::DeleteRange(Column::Log, from.to_be_bytes().to_vec(), vec![0xff; 8]);
                self.memory.change(vec![range]);
                self.memory.sync();
                format!("ends before {from}")
            }
            1 if promised => {
                self.empty();
                "is empty".to_owned()
            }
            _ => {
                let column = [Column::Log, Column::Rows, Column::Meta][inner.chance.index(3)];
                let keys: Vec<_> = self.memory.scan(column, &[]).filter_map(Result::ok).map(|(key, _)| key).collect();
                if keys.is_empty() {
                    return false;
                }
                let key = keys[inner.chance.index(keys.len())].to_vec();
                let what = format!("has a bad block in {column:?}");
                inner.rotten.insert((column, key));
                what
            }
        };
        tell!(self.trace, "{} {what}", self.name);
        true
    }

    fn empty(&self) {
        let all = |column| DiskChange::DeleteRange(column, Vec::new(), vec![0xff; 64]);
        self.memory.change(Column::ALL.map(all).to_vec());
        self.memory.sync();
    }

    fn whole(&self, column: Column, key: &[u8]) -> io::Result<()> {
        let rotten = !self.inner.lock().rotten.is_empty();
        if rotten && self.inner.lock().rotten.contains(&(column, key.to_vec())) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a bad block"));
        }
        Ok(())
    }

    /// Whether the process was to die here; it then never comes back from the write.
    fn dies(&self, moment: Moment) -> bool {
        let mut inner = self.inner.lock();
        let Some((_, process)) = inner.trap.take_if(|(trap, _)| *trap == moment) else { return false };
        drop(inner);
        tell!(self.trace, "{}: dies {moment:?}", self.name);
        process.kill();
        true
    }

    /// One leader a term: a committed vote names the leader that its writer follows.
    fn look(&self, batch: &[DiskChange]) {
        for change in batch {
            let DiskChange::Put(Column::Meta, key, value) = change else { continue };
            if key.as_slice() != b"vote" {
                continue;
            }
            let Ok(vote) = wire::Ballot::decode(value.as_slice()) else { continue };
            if vote.committed {
                let leader = *self.leaders.lock().entry(vote.term).or_insert(vote.node_id);
                if leader != vote.node_id {
                    broken!(self.trace, "term {} has two leaders: {leader} and {}", vote.term, vote.node_id);
                }
            }
        }
    }
}

/// A disk as a store opens it.
pub struct Shelf(pub Arc<Disk>);

impl Place for Shelf {
    fn open(&self) -> Result<(Arc<dyn Engine>, Promise), OpenError> {
        let promise = self.0.inner.lock().promise;
        // As RocksDB does that finds a write-ahead log.
        self.0.memory.sync();
        Ok((Arc::clone(&self.0) as Arc<dyn Engine>, promise))
    }

    fn put_aside(&self) -> io::Result<()> {
        self.0.empty();
        let mut inner = self.0.inner.lock();
        inner.rotten.clear();
        (inner.promise, inner.synced_promise) = (Promise::default(), Promise::default());
        Ok(())
    }

    fn fence(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.inner.lock().fence.clone())
    }

    fn keep_fence(&self, record: Option<Vec<u8>>) -> io::Result<()> {
        if record.is_none() {
            tell!(self.0.trace, "{}: the fence falls", self.0.name);
        }
        self.0.inner.lock().fence = record;
        Ok(())
    }

    fn name(&self) -> String {
        self.0.name.clone()
    }
}

impl Engine for Disk {
    fn get(&self, column: Column, key: &[u8]) -> io::Result<Option<Bytes>> {
        self.whole(column, key)?;
        self.memory.get(column, key)
    }

    fn scan<'a>(&'a self, column: Column, from: &[u8]) -> Scan<'a> {
        Box::new(self.memory.scan(column, from).map(move |item| {
            let item = item?;
            self.whole(column, &item.0)?;
            Ok(item)
        }))
    }

    fn last(&self, column: Column) -> io::Result<Option<Bytes>> {
        self.memory.last(column)
    }

    fn write(&self, batch: Vec<DiskChange>, sync: bool) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if self.dies(Moment::BeforeWrite) {
                return std::future::pending().await;
            }
            if self.inner.lock().full {
                tell!(self.trace, "{}: no room", self.name);
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.trace.count("write", &batch.len().to_le_bytes());
            self.look(&batch);
            {
                let inner = &mut *self.inner.lock();
                let before = inner.promise;
                inner.promise.before(&batch)?;
                if inner.promise != before {
                    inner.synced_promise = inner.promise;
                }
            }
            self.memory.change(batch.clone());
            if sync {
                if self.dies(Moment::BeforeSync) {
                    return std::future::pending().await;
                }
                let takes = {
                    let inner = &mut *self.inner.lock();
                    inner.chance.micros(inner.sync.0, inner.sync.1)
                };
                tokio::time::sleep(takes.max(Duration::from_micros(1))).await;
                self.memory.sync();
                if self.dies(Moment::AfterSync) {
                    return std::future::pending().await;
                }
            }
            self.inner.lock().promise.after(&batch)?;
            Ok(())
        })
    }
}
