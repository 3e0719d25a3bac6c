//! The one place that writes, batch after batch.
//!
//! Where a write is done depends on what waits for it. A leader has entries to send while its disk syncs, so that its
//! writes go to a thread for blocking work. A follower has nothing to do for the leader before its disk has answered, and
//! two changes of threads take as long as a quick disk needs: its entries are written on the spot, as long as the disk
//! is found to be quick, and only then.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prost::Message;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::engine::{Change, Column, Engine};
use super::open::{PURGED, VOTE};
use crate::offload;
use crate::record;
use crate::types::{LogId, Vote};

/// Called when a job is on disk, or is known not to be.
pub(crate) type Flushed = Box<dyn FnOnce(Result<(), io::Error>) + Send>;

/// Work for the writer, done in the order it was given.
pub(crate) enum Job {
    /// Synced.
    Vote(Vote, Flushed),
    /// Index and bytes of each entry. Synced.
    Append(Vec<(u64, Vec<u8>)>, Flushed),
    /// Entries after this index go. Synced.
    TruncateAfter(Option<u64>, Flushed),
    /// Entries up to this one go. Not synced: a purge that is forgotten is done again.
    Purge(LogId, Flushed),
    /// Rows and the like. Not synced: the log brings them back.
    Rows(Vec<Change>, Flushed),
    /// Everything before it is synced with it.
    Sync(Flushed),
}

/// A full queue makes appenders wait: the disk sets the pace.
const QUEUE: usize = 1024;
/// A disk that syncs within this time, as a rule, is waited for on the spot. A heartbeat is a hundred times as long.
const QUICK: Duration = Duration::from_millis(1);
/// Batches with more changes than this are no quick matter.
const FEW: usize = 64;

/// The writer's handle. The task ends when the last handle is dropped.
pub(crate) struct Writer {
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    /// Starts it on this runtime; `leads` says whether this node leads.
    pub(crate) fn start(engine: Arc<dyn Engine>, leads: Arc<AtomicBool>) -> Self {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let desk = Desk { engine, leads, alone: offload::is_alone(), usual: QUICK };
        Self { jobs: Mutex::new(Some(jobs)), task: Mutex::new(Some(tokio::spawn(run(desk, queue)))) }
    }

    /// Queues a job. Waits only while the queue is full, which means the disk is behind by a thousand jobs.
    pub(crate) async fn submit(&self, job: Job) -> Result<(), io::Error> {
        let ended = || io::Error::other("the log writer has ended");
        let jobs = self.jobs.lock().clone().ok_or_else(ended)?;
        jobs.send(job).await.map_err(|_| ended())
    }

    /// Ends it after what is queued.
    pub(crate) async fn stop(&self) {
        drop(self.jobs.lock().take());
        let task = self.task.lock().take();
        if let Some(task) = task
            && task.await.is_err()
        {
            tracing::error!("the log writer panicked");
        }
    }
}

/// Where batches are written, and how long that takes.
struct Desk {
    engine: Arc<dyn Engine>,
    leads: Arc<AtomicBool>,
    /// Nothing may run beside this thread.
    alone: bool,
    /// How long a sync takes, as a rule.
    usual: Duration,
}

impl Desk {
    async fn write(&mut self, batch: Vec<Change>, sync: bool, entries_only: bool) -> io::Result<()> {
        let quick = entries_only && batch.len() <= FEW && self.usual < QUICK;
        let started = Instant::now();
        let written = if self.alone || (quick && !self.leads.load(Ordering::Relaxed)) {
            self.engine.write(batch, sync).await
        } else {
            let engine = Arc::clone(&self.engine);
            let write = move || futures::executor::block_on(engine.write(batch, sync));
            tokio::task::spawn_blocking(write).await.map_err(io::Error::other)?
        };
        if entries_only {
            self.usual = (self.usual * 7 + started.elapsed()) / 8;
        }
        written
    }
}

async fn run(mut desk: Desk, mut queue: mpsc::Receiver<Job>) {
    let mut failure: Option<String> = None;
    while let Some(first) = queue.recv().await {
        let mut batch = Vec::new();
        let mut flushed = Vec::new();
        let (mut sync, mut entries_only) = (false, true);
        let mut next = Some(first);
        while let Some(job) = next {
            sync |= !matches!(job, Job::Purge(..) | Job::Rows(..));
            entries_only &= matches!(job, Job::Append(..) | Job::Vote(..));
            flushed.push(add(&mut batch, job));
            next = queue.try_recv().ok();
        }
        // What follows a failed write could leave a hole in the log: nothing is written any more.
        if failure.is_none()
            && let Err(error) = desk.write(batch, sync, entries_only).await
        {
            tracing::error!(%error, "the database refused a write");
            failure = Some(error.to_string());
        }
        for callback in flushed {
            callback(failure.clone().map_or(Ok(()), |failure| Err(io::Error::other(failure))));
        }
    }
}

/// Adds a job's changes to the batch; its callback comes back to be told.
fn add(batch: &mut Vec<Change>, job: Job) -> Flushed {
    let entries =
        |from: u64, end: u64| Change::DeleteRange(Column::Log, from.to_be_bytes().to_vec(), end.to_be_bytes().to_vec());
    match job {
        Job::Vote(vote, flushed) => {
            batch.push(Change::Put(Column::Meta, VOTE.to_vec(), record::vote_to_wire(&vote).encode_to_vec()));
            flushed
        }
        Job::Append(records, flushed) => {
            let put = |(index, bytes): (u64, Vec<u8>)| Change::Put(Column::Log, index.to_be_bytes().to_vec(), bytes);
            batch.extend(records.into_iter().map(put));
            flushed
        }
        Job::TruncateAfter(last, flushed) => {
            batch.push(entries(last.map_or(0, |last| last.saturating_add(1)), u64::MAX));
            flushed
        }
        Job::Purge(upto, flushed) => {
            batch.push(entries(0, upto.index().saturating_add(1)));
            batch.push(Change::Put(Column::Meta, PURGED.to_vec(), record::log_id_to_wire(&upto).encode_to_vec()));
            flushed
        }
        Job::Sync(flushed) => flushed,
        Job::Rows(changes, flushed) => {
            batch.extend(changes);
            flushed
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::thread::{self, ThreadId};

    use super::super::memory::Memory;
    use super::*;

    /// Notes which thread writes, and takes its time.
    struct Watched(Memory, Mutex<Vec<ThreadId>>, Duration);

    impl Engine for Watched {
        fn get(&self, column: Column, key: &[u8]) -> io::Result<Option<bytes::Bytes>> {
            self.0.get(column, key)
        }

        fn scan<'a>(&'a self, column: Column, from: &[u8]) -> super::super::engine::Scan<'a> {
            self.0.scan(column, from)
        }

        fn last(&self, column: Column) -> io::Result<Option<bytes::Bytes>> {
            self.0.last(column)
        }

        fn write(&self, batch: Vec<Change>, sync: bool) -> futures::future::BoxFuture<'_, io::Result<()>> {
            self.1.lock().push(thread::current().id());
            thread::sleep(self.2);
            self.0.write(batch, sync)
        }
    }

    /// Whether the fortieth of forty batches is written by the thread that asks.
    async fn on_the_spot(leads: bool, takes: Duration, entries_only: bool) -> bool {
        let engine = Arc::new(Watched(Memory::default(), Mutex::default(), takes));
        let leads = Arc::new(AtomicBool::new(leads));
        let mut desk = Desk { engine: Arc::clone(&engine) as Arc<dyn Engine>, leads, alone: false, usual: QUICK };
        for index in 0..40_u64 {
            let put = Change::Put(Column::Log, index.to_be_bytes().to_vec(), vec![1]);
            desk.write(vec![put], true, entries_only).await.unwrap();
        }
        let writers = engine.1.lock();
        assert_ne!(writers.first(), Some(&thread::current().id()), "a disk is slow until it has been measured");
        writers.last() == Some(&thread::current().id())
    }

    #[tokio::test]
    async fn only_a_follower_with_a_quick_disk_writes_entries_on_the_spot() {
        assert!(on_the_spot(false, Duration::ZERO, true).await);
        assert!(!on_the_spot(true, Duration::ZERO, true).await, "a leader has others to serve meanwhile");
        assert!(!on_the_spot(false, 3 * QUICK, true).await, "a slow disk would hold up everything");
        assert!(!on_the_spot(false, Duration::ZERO, false).await, "rows can be many");
    }
}
