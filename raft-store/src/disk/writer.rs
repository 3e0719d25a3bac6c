//! The thread that writes.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use prost::Message;
use tokio::sync::mpsc;

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

/// The writer's handle. The thread ends when the last handle is dropped.
pub(crate) struct Writer {
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    /// Starts the thread; where the runtime is alone, a task.
    pub(crate) fn start(engine: Arc<dyn Engine>) -> Result<Self, io::Error> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let writing = run(engine, queue);
        let thread = if offload::is_alone() {
            drop(tokio::spawn(writing));
            None
        } else {
            let write = move || futures::executor::block_on(writing);
            Some(std::thread::Builder::new().name("raft-writer".into()).spawn(write)?)
        };
        Ok(Self { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(thread) })
    }

    /// Queues a job. Waits only while the queue is full, which means the disk is behind by a thousand jobs.
    pub(crate) async fn submit(&self, job: Job) -> Result<(), io::Error> {
        let ended = || io::Error::other("the log writer has ended");
        let jobs = self.jobs.lock().clone().ok_or_else(ended)?;
        jobs.send(job).await.map_err(|_| ended())
    }

    /// Ends the thread after what is queued.
    pub(crate) fn stop(&self) {
        drop(self.jobs.lock().take());
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the log writer panicked");
        }
    }
}

async fn run(engine: Arc<dyn Engine>, mut queue: mpsc::Receiver<Job>) {
    let mut failure: Option<String> = None;
    while let Some(first) = queue.recv().await {
        let mut batch = Vec::new();
        let mut flushed = Vec::new();
        let mut sync = false;
        let mut next = Some(first);
        while let Some(job) = next {
            sync |= !matches!(job, Job::Purge(..) | Job::Rows(..));
            flushed.push(add(&mut batch, job));
            next = queue.try_recv().ok();
        }
        // What follows a failed write could leave a hole in the log: nothing is written any more.
        if failure.is_none()
            && let Err(error) = engine.write(batch, sync).await
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
