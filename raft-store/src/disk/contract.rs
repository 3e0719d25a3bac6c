//! What every engine promises, and openraft's own suite over the log and the machine on each of them.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use super::engine::{Change, Column, Engine};
use super::memory::Memory;
use super::open::Disk;
use super::rocks::Rocks;
use super::writer::Writer;
use crate::log::LogStore;
use crate::machine::{Machine, StateMachine};
use crate::types::Config;

/// An engine, and how it is found after a crash at this moment.
trait Crashing {
    fn engine(&self) -> Arc<dyn Engine>;
    /// What may be found after a crash: at best everything, at worst what was synced.
    fn after_a_crash(&self) -> Vec<Arc<dyn Engine>>;
}

struct OnDisk {
    dir: tempfile::TempDir,
    rocks: Arc<Rocks>,
    copies: tempfile::TempDir,
}

impl OnDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rocks = Arc::new(Rocks::open(dir.path()).unwrap());
        Self { dir, rocks, copies: tempfile::tempdir().unwrap() }
    }

    /// The files as they are, the newest log cut to a part of its length.
    fn copy(&self, number: usize, part: f64) -> Arc<dyn Engine> {
        let to = self.copies.path().join(number.to_string());
        std::fs::create_dir(&to).unwrap();
        let mut log = None;
        for file in std::fs::read_dir(self.dir.path()).unwrap() {
            let from = file.unwrap().path();
            let name = from.file_name().unwrap().to_owned();
            if name != "LOCK" {
                std::fs::copy(&from, to.join(&name)).unwrap();
            }
            if Path::new(&name).extension().is_some_and(|extension| extension == "log") {
                log = log.max(Some(to.join(&name)));
            }
        }
        let log = std::fs::OpenOptions::new().write(true).open(log.unwrap()).unwrap();
        let length = log.metadata().unwrap().len();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        log.set_len((length as f64 * part) as u64).unwrap();
        Arc::new(Rocks::open(&to).unwrap())
    }
}

impl Crashing for OnDisk {
    fn engine(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.rocks) as Arc<dyn Engine>
    }

    fn after_a_crash(&self) -> Vec<Arc<dyn Engine>> {
        // The batches of the test are of one size: a cut in the last third hurts nothing that was synced.
        [1.0, 0.99, 0.95, 0.8, 0.7].iter().enumerate().map(|(number, part)| self.copy(number, *part)).collect()
    }
}

#[derive(Default)]
struct InMemory(Arc<Memory>);

impl Crashing for InMemory {
    fn engine(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.0) as Arc<dyn Engine>
    }

    fn after_a_crash(&self) -> Vec<Arc<dyn Engine>> {
        (0..=self.0.unsynced())
            .map(|kept| {
                let copy = self.0.copy();
                copy.crash(kept);
                Arc::new(copy) as Arc<dyn Engine>
            })
            .collect()
    }
}

fn engines() -> Vec<Box<dyn Crashing>> {
    vec![Box::new(OnDisk::new()), Box::new(InMemory::default())]
}

fn put(column: Column, key: &str, value: &str) -> Change {
    Change::Put(column, key.into(), value.into())
}

fn write(engine: &dyn Engine, batch: Vec<Change>, sync: bool) {
    futures::executor::block_on(engine.write(batch, sync)).unwrap();
}

fn pairs(engine: &dyn Engine, column: Column, from: &str) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    engine
        .scan(column, from.as_bytes())
        .map(|item| item.unwrap())
        .map(|(key, value)| (text(&key), text(&value)))
        .collect()
}

fn owned(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn keys_come_in_order_and_columns_are_apart() {
    for kind in engines() {
        let engine = &*kind.engine();
        assert_eq!(engine.last(Column::Log).unwrap(), None);
        let batch = ["c", "a", "b"].map(|key| put(Column::Log, key, key)).to_vec();
        write(engine, batch, false);
        write(engine, vec![put(Column::Meta, "m", "1"), put(Column::Rows, "", "empty")], true);
        assert_eq!(pairs(engine, Column::Log, ""), owned(&[("a", "a"), ("b", "b"), ("c", "c")]));
        assert_eq!(pairs(engine, Column::Log, "b"), owned(&[("b", "b"), ("c", "c")]));
        assert_eq!(pairs(engine, Column::Rows, ""), owned(&[("", "empty")]));
        assert_eq!(engine.last(Column::Log).unwrap().as_deref(), Some(b"c".as_slice()));
        assert_eq!(engine.last(Column::Outcomes).unwrap(), None);
        assert_eq!(engine.get(Column::Meta, b"m").unwrap().as_deref(), Some(b"1".as_slice()));
        assert_eq!(engine.get(Column::Meta, b"a").unwrap(), None);
    }
}

#[test]
fn a_batch_is_done_in_its_order_and_a_range_ends_before_its_end() {
    for kind in engines() {
        let engine = &*kind.engine();
        write(engine, ["a", "b", "c", "d"].map(|key| put(Column::Log, key, "old")).to_vec(), true);
        let range = Change::DeleteRange(Column::Log, b"b".to_vec(), b"d".to_vec());
        write(engine, vec![range, put(Column::Log, "c", "new"), Change::Delete(Column::Log, b"a".to_vec())], true);
        assert_eq!(pairs(engine, Column::Log, ""), owned(&[("c", "new"), ("d", "old")]));
        write(engine, vec![put(Column::Log, "x", ""), Change::clear(Column::Log)], false);
        assert_eq!(pairs(engine, Column::Log, ""), owned(&[]));
    }
}

#[test]
fn a_crash_leaves_whole_batches_from_the_first_on_and_all_that_were_synced() {
    const BATCHES: usize = 30;
    const SYNCED: usize = 20;
    for kind in engines() {
        let engine = &*kind.engine();
        for number in 0..BATCHES {
            let key = format!("{number:02}");
            let batch = vec![put(Column::Log, &key, &"x".repeat(100)), put(Column::Rows, &key, "y")];
            write(engine, batch, number < SYNCED);
        }
        let mut fewest = BATCHES;
        for found in kind.after_a_crash() {
            let (log, rows) = (pairs(&*found, Column::Log, ""), pairs(&*found, Column::Rows, ""));
            assert!(log.len() >= SYNCED, "a synced batch is lost");
            assert_eq!(log.len(), rows.len(), "half a batch is left");
            assert!(
                (0..log.len()).all(|number| log[number].0 == format!("{number:02}")),
                "a batch in the middle is lost"
            );
            fewest = fewest.min(log.len());
        }
        assert!(fewest < BATCHES, "no crash lost anything: the test tests nothing");
    }
}

struct Builder(fn() -> (Arc<dyn Engine>, Option<tempfile::TempDir>));

/// Its folder goes with it.
struct Open(#[allow(dead_code, reason = "kept for its drop")] Option<tempfile::TempDir>);

impl StoreBuilder<Config, LogStore, StateMachine, Open> for Builder {
    async fn build(&self) -> Result<(Open, LogStore, StateMachine), StorageError<Config>> {
        let (engine, dir) = (self.0)();
        let disk = Disk::new(engine);
        let stored = disk.load(crate::format::NEWEST).unwrap();
        let writer = Arc::new(Writer::start(disk.engine(), Arc::default()));
        let log = LogStore::open(disk, Arc::clone(&writer), None).unwrap();
        let history = crate::state::History::default();
        let machine = StateMachine(Arc::new(Machine::new(stored, history, Arc::clone(&writer), None)));
        Ok((Open(dir), log, machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openraft_accepts_the_log_and_the_machine_on_disk() {
    let rocks = Builder(|| {
        let dir = tempfile::tempdir().unwrap();
        (Arc::new(Rocks::open(dir.path()).unwrap()), Some(dir))
    });
    Suite::test_all(rocks).await.unwrap();
}

#[tokio::test]
async fn openraft_accepts_the_log_and_the_machine_in_memory() {
    Suite::test_all(Builder(|| (Arc::new(Memory::default()), None))).await.unwrap();
}

/// Fails one write, and is whole again.
#[derive(Default)]
struct FullOnce(Memory, std::sync::atomic::AtomicU32);

impl Engine for FullOnce {
    fn get(&self, column: Column, key: &[u8]) -> std::io::Result<Option<bytes::Bytes>> {
        self.0.get(column, key)
    }

    fn scan<'a>(&'a self, column: Column, from: &[u8]) -> super::engine::Scan<'a> {
        self.0.scan(column, from)
    }

    fn last(&self, column: Column) -> std::io::Result<Option<bytes::Bytes>> {
        self.0.last(column)
    }

    fn write(&self, batch: Vec<Change>, sync: bool) -> futures::future::BoxFuture<'_, std::io::Result<()>> {
        if self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1 {
            return Box::pin(std::future::ready(Err(std::io::ErrorKind::StorageFull.into())));
        }
        self.0.write(batch, sync)
    }
}

#[tokio::test]
async fn nothing_is_written_after_a_write_that_failed() {
    use super::writer::Job;
    let engine = Arc::new(FullOnce::default());
    let writer = Writer::start(Arc::clone(&engine) as Arc<dyn Engine>, Arc::default());
    let mut told = Vec::new();
    for index in 0..3_u64 {
        let (tell, answer) = tokio::sync::oneshot::channel();
        let flushed = Box::new(move |result: Result<(), std::io::Error>| tell.send(result.is_ok()).unwrap());
        writer.submit(Job::Append(vec![(index, vec![1])], flushed)).await.unwrap();
        told.push(answer.await.unwrap());
    }
    assert_eq!(told, [true, false, false]);
    assert_eq!(engine.scan(Column::Log, &[]).count(), 1, "the log has a hole");
}
