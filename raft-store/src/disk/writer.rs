//! The thread that writes.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use prost::Message;
use rocksdb::{WriteBatch, WriteOptions};

use super::open::{Column, Disk, PURGED, VOTE};
use crate::record;
use crate::types::{LogId, Vote};

/// Called when a job is on disk, or is known not to be.
pub(crate) type Flushed = Box<dyn FnOnce(Result<(), std::io::Error>) + Send>;

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
    Rows(Vec<RowJob>, Flushed),
}

/// A change of what rests beside the log.
pub(crate) enum RowJob {
    Put(Column, Vec<u8>, Vec<u8>),
    Delete(Column, Vec<u8>),
    /// Every key of the column.
    Clear(Column),
}

/// A full queue makes appenders wait: the disk sets the pace.
const QUEUE: usize = 1024;

/// The writer's handle. The thread ends when the last handle is dropped.
pub(crate) struct Writer {
    jobs: Mutex<Option<SyncSender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    pub(crate) fn start(disk: Disk) -> Result<Self, std::io::Error> {
        let (jobs, queue) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new().name("raft-writer".into()).spawn(move || run(&disk, &queue))?;
        Ok(Self { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)) })
    }

    /// Queues a job. Blocks only while the queue is full, which means the disk is behind by a thousand jobs.
    pub(crate) fn submit(&self, job: Job) -> Result<(), std::io::Error> {
        let jobs = self.jobs.lock().clone();
        let sent = jobs.and_then(|jobs| jobs.send(job).ok());
        sent.ok_or_else(|| std::io::Error::other("the log writer has ended"))
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

fn run(disk: &Disk, queue: &Receiver<Job>) {
    while let Ok(first) = queue.recv() {
        let mut batch = WriteBatch::default();
        let mut flushed = Vec::new();
        let mut sync = false;
        let mut failure = None;
        let mut next = Some(first);
        while let Some(job) = next {
            sync |= !matches!(job, Job::Purge(..) | Job::Rows(..));
            match add(disk, &mut batch, job) {
                Ok(callback) => flushed.push(callback),
                Err((callback, error)) => {
                    failure = Some(error.to_string());
                    flushed.push(callback);
                }
            }
            next = queue.try_recv().ok();
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        let result = match failure {
            Some(failure) => Err(failure),
            None => disk.db().write_opt(batch, &options).map_err(|error| error.to_string()),
        };
        if let Err(error) = &result {
            tracing::error!(%error, "the database refused a write");
        }
        for callback in flushed {
            callback(result.clone().map_err(std::io::Error::other));
        }
    }
}

/// Adds a job to the batch; its callback comes back to be told.
fn add(disk: &Disk, batch: &mut WriteBatch, job: Job) -> Result<Flushed, (Flushed, std::io::Error)> {
    macro_rules! column {
        ($column:expr, $flushed:ident) => {
            match disk.column($column) {
                Ok(column) => column,
                Err(error) => return Err(($flushed, error)),
            }
        };
    }
    Ok(match job {
        Job::Vote(vote, flushed) => {
            batch.put_cf(column!(Column::Meta, flushed), VOTE, record::vote_to_wire(&vote).encode_to_vec());
            flushed
        }
        Job::Append(entries, flushed) => {
            let log = column!(Column::Log, flushed);
            for (index, bytes) in entries {
                batch.put_cf(log, index.to_be_bytes(), bytes);
            }
            flushed
        }
        Job::TruncateAfter(last, flushed) => {
            let from = last.map_or(0, |last| last.saturating_add(1));
            batch.delete_range_cf(column!(Column::Log, flushed), from.to_be_bytes(), u64::MAX.to_be_bytes());
            flushed
        }
        Job::Purge(upto, flushed) => {
            let end = upto.index().saturating_add(1);
            batch.delete_range_cf(column!(Column::Log, flushed), 0_u64.to_be_bytes(), end.to_be_bytes());
            batch.put_cf(column!(Column::Meta, flushed), PURGED, record::log_id_to_wire(&upto).encode_to_vec());
            flushed
        }
        Job::Rows(changes, flushed) => {
            for change in changes {
                match change {
                    RowJob::Put(column, key, value) => batch.put_cf(column!(column, flushed), key, value),
                    RowJob::Delete(column, key) => batch.delete_cf(column!(column, flushed), key),
                    RowJob::Clear(column) => {
                        batch.delete_range_cf(column!(column, flushed), [].as_slice(), [0xff_u8; 64].as_slice())
                    }
                }
            }
            flushed
        }
    })
}
