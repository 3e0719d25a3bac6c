//! A simulated disk: slow, full at times, and forgetful when the power goes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message;
use proto::raft as wire;
use raft_store::{Column, DiskChange, Engine, KeyValue, Memory};

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
}

/// Who led which term, of all disks of a pool.
pub type Leaders = Arc<Mutex<std::collections::BTreeMap<u64, u64>>>;

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new(name: String, chance: Chance, trace: Trace, leaders: Leaders) -> Arc<Self> {
        let inner = Inner { chance, sync: (100, 3_000), full: false, trap: None };
        Arc::new(Self { name, memory: Memory::default(), inner: Mutex::new(inner), trace, leaders })
    }

    /// From now on a sync takes between so many microseconds.
    pub fn set_sync(&self, from: u64, to: u64) {
        self.inner.lock().sync = (from, to);
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

    /// The process that wrote to it is gone; `power` too: what was not synced may be lost, from any batch on.
    pub fn crash(&self, power: bool) {
        let mut inner = self.inner.lock();
        inner.trap = None;
        let unsynced = self.memory.unsynced();
        if power && unsynced > 0 {
            let kept = inner.chance.index(unsynced + 1);
            drop(inner);
            tell!(self.trace, "{}: of {unsynced} batches not synced {kept} are left", self.name);
            self.memory.crash(kept);
        }
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

impl Engine for Disk {
    fn get(&self, column: Column, key: &[u8]) -> io::Result<Option<Bytes>> {
        self.memory.get(column, key)
    }

    fn scan<'a>(&'a self, column: Column, from: &[u8]) -> Box<dyn Iterator<Item = io::Result<KeyValue>> + 'a> {
        self.memory.scan(column, from)
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
            self.memory.change(batch);
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
            Ok(())
        })
    }
}
