//! What the agent must not forget: the highest epoch of each pool, and what came of each step.
//!
//! It is a file of lines that only grows, and is rewritten when it has grown too much. One thread writes: whatever
//! has come in meanwhile goes out together and is synced once. Epochs and outcomes are synced before anybody hears
//! of them. That a step has *begun* need only outlive this process: a loss of power takes the domains as well.
//!
//! A line cut short by a crash can only be the last one, and is dropped; any other that makes no sense is an error,
//! because forgetting an epoch would let a deposed master command again.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::files::{self, Durability};
use crate::hypervisor::domain::{DomainState, Refusal, StepKind};
use crate::storage::words::{StoreState, VolumeState};

/// How many steps are remembered, by default.
pub(crate) const REMEMBERED: usize = 4096;
/// 2: steps have numbers, and are of stores and volumes too.
const FORMAT: u32 = 2;
const QUEUE: usize = 1024;

/// What came of a step.
pub(crate) type Outcome = Result<Done, Refusal>;

/// What a step was about, as it is afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Done {
    Domain(Box<DomainState>),
    Store(StoreState),
    Volume(VolumeState),
}

impl From<DomainState> for Done {
    fn from(state: DomainState) -> Self {
        Self::Domain(Box::new(state))
    }
}

/// One step of one operation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct StepKey {
    pub operation: String,
    /// What it is about: a VM, an SR or a VDI.
    #[serde(rename = "vm")]
    pub subject: Uuid,
    pub kind: StepKind,
    /// An operation has several steps of a kind.
    #[serde(default)]
    pub number: u32,
}

/// What is known of a step that came before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Past {
    /// It began, in the life of a former agent, and nobody knows how far it came.
    Begun,
    /// This came of it.
    Done(Outcome),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Format(u32),
    Epoch { pool: String, epoch: u64 },
    Begun { step: StepKey },
    Done { step: StepKey, outcome: Outcome },
}

/// The agent's memory.
#[derive(Debug)]
pub(crate) struct Ledger {
    memory: Arc<Mutex<Memory>>,
    /// The highest epoch asked for, which fences older ones at once, before it is on disk.
    announced: Mutex<HashMap<String, u64>>,
    writes: mpsc::Sender<Entry>,
}

/// What is on disk.
#[derive(Debug, Default)]
struct Memory {
    epochs: HashMap<String, u64>,
    steps: HashMap<StepKey, Past>,
    /// Oldest first.
    order: VecDeque<StepKey>,
    limit: usize,
}

#[derive(Debug)]
struct Entry {
    line: Line,
    written: oneshot::Sender<io::Result<()>>,
}

impl Ledger {
    /// Reads the ledger of a state directory, and rewrites it without what is no longer needed.
    pub fn open(state_dir: &Path, limit: usize, tasks: &TaskTracker) -> io::Result<Self> {
        let path = state_dir.join("ledger.jsonl");
        let mut memory = Memory { limit: limit.max(1), ..Memory::default() };
        memory.read(&path)?;
        let announced = Mutex::new(memory.epochs.clone());
        let memory = Arc::new(Mutex::new(memory));
        let mut writer = Writer { file: rewrite(&path, &memory.lock())?, path, memory: Arc::clone(&memory), lines: 0 };
        let (writes, mut queue) = mpsc::channel(QUEUE);
        tasks.spawn_blocking(move || {
            let mut batch = Vec::new();
            while queue.blocking_recv_many(&mut batch, QUEUE) > 0 {
                writer.write(std::mem::take(&mut batch));
            }
        });
        Ok(Self { memory, announced, writes })
    }

    /// Lets a pool's master of this epoch command, unless a newer one has: then that epoch is given.
    pub async fn admit(&self, pool: &str, epoch: u64) -> io::Result<Result<(), u64>> {
        {
            let mut announced = self.announced.lock();
            let highest = announced.entry(pool.to_owned()).or_default();
            if epoch < *highest {
                return Ok(Err(*highest));
            }
            *highest = epoch;
        }
        let kept = self.memory.lock().epochs.get(pool).copied();
        if kept.is_none_or(|kept| kept < epoch) {
            self.write(Line::Epoch { pool: pool.to_owned(), epoch }).await?;
        }
        Ok(Ok(()))
    }

    /// What is known of a step.
    pub fn past(&self, step: &StepKey) -> Option<Past> {
        self.memory.lock().steps.get(step).cloned()
    }

    /// A step begins.
    pub async fn begin(&self, step: &StepKey) -> io::Result<()> {
        self.write(Line::Begun { step: step.clone() }).await
    }

    /// A step has ended.
    pub async fn conclude(&self, step: &StepKey, outcome: &Outcome) -> io::Result<()> {
        self.write(Line::Done { step: step.clone(), outcome: outcome.clone() }).await
    }

    async fn write(&self, line: Line) -> io::Result<()> {
        let (written, done) = oneshot::channel();
        let closed = || io::Error::other("the ledger is closed");
        self.writes.send(Entry { line, written }).await.map_err(|_| closed())?;
        done.await.map_err(|_| closed())?
    }
}

impl Memory {
    fn read(&mut self, path: &Path) -> io::Result<()> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut lines = text.split_inclusive(|byte| *byte == b'\n').peekable();
        while let Some(line) = lines.next() {
            match serde_json::from_slice(line) {
                Ok(Line::Format(format)) if format > FORMAT => {
                    return Err(io::Error::other(format!("the ledger has the newer format {format}")));
                }
                Ok(line) => self.apply(line),
                Err(_) if lines.peek().is_none() => {}
                Err(error) => {
                    return Err(io::Error::other(format!("the ledger is damaged: {error}")));
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, line: Line) {
        match line {
            Line::Format(_) => {}
            Line::Epoch { pool, epoch } => {
                let highest = self.epochs.entry(pool).or_default();
                *highest = epoch.max(*highest);
            }
            Line::Begun { step } => self.remember(step, Past::Begun),
            Line::Done { step, outcome } => self.remember(step, Past::Done(outcome)),
        }
    }

    fn remember(&mut self, step: StepKey, past: Past) {
        if self.steps.insert(step.clone(), past).is_none() {
            self.order.push_back(step);
        }
        while self.order.len() > self.limit {
            if let Some(oldest) = self.order.pop_front() {
                self.steps.remove(&oldest);
            }
        }
    }

    fn lines(&self) -> impl Iterator<Item = Line> {
        let epochs = self.epochs.iter().map(|(pool, epoch)| Line::Epoch { pool: pool.clone(), epoch: *epoch });
        let steps = self.order.iter().filter_map(|step| {
            Some(match self.steps.get(step)?.clone() {
                Past::Begun => Line::Begun { step: step.clone() },
                Past::Done(outcome) => Line::Done { step: step.clone(), outcome },
            })
        });
        std::iter::once(Line::Format(FORMAT)).chain(epochs).chain(steps)
    }
}

fn rewrite(path: &Path, memory: &Memory) -> io::Result<File> {
    let mut content = Vec::new();
    for line in memory.lines() {
        serde_json::to_writer(&mut content, &line)?;
        content.push(b'\n');
    }
    files::replace(path, &content, Durability::Power)?;
    OpenOptions::new().append(true).open(path)
}

struct Writer {
    path: PathBuf,
    file: File,
    memory: Arc<Mutex<Memory>>,
    /// Since the last rewriting.
    lines: usize,
}

impl Writer {
    fn write(&mut self, batch: Vec<Entry>) {
        let result = self.append(&batch);
        let failed = result.as_ref().err().map(|error| (error.kind(), error.to_string()));
        if let Some((_, error)) = &failed {
            tracing::error!(error, "the ledger cannot be written");
        }
        let mut memory = self.memory.lock();
        let answers: Vec<_> = batch
            .into_iter()
            .map(|write| {
                if failed.is_none() {
                    memory.apply(write.line);
                }
                write.written
            })
            .collect();
        let limit = memory.limit;
        drop(memory);
        for answer in answers {
            let outcome = failed.as_ref().map_or(Ok(()), |(kind, text)| Err(io::Error::new(*kind, text.clone())));
            // Who no longer waits has gone; the line is written all the same.
            let _ = answer.send(outcome);
        }
        // After a failure half a line may be there: nothing may follow it.
        if failed.is_some() || self.lines > 4 * limit + 64 {
            match rewrite(&self.path, &self.memory.lock()) {
                Ok(file) => (self.file, self.lines) = (file, 0),
                Err(error) => tracing::error!(%error, "the ledger cannot be rewritten"),
            }
        }
    }

    fn append(&mut self, batch: &[Entry]) -> io::Result<()> {
        let mut content = Vec::new();
        for write in batch {
            serde_json::to_writer(&mut content, &write.line)?;
            content.push(b'\n');
        }
        self.file.write_all(&content)?;
        self.lines += batch.len();
        if batch.iter().any(|write| !matches!(write.line, Line::Begun { .. })) {
            self.file.sync_data()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::domain::Reason;

    fn step(number: u128) -> StepKey {
        StepKey {
            operation: format!("operation-{number}"),
            subject: Uuid::from_u128(number),
            kind: StepKind::Start,
            number: 0,
        }
    }

    fn open(dir: &Path, limit: usize) -> Ledger {
        Ledger::open(dir, limit, &TaskTracker::new()).expect("open")
    }

    #[tokio::test]
    async fn an_older_epoch_is_refused_also_after_a_restart_and_only_in_its_pool() {
        let dir = tempfile::tempdir().expect("directory");
        let ledger = open(dir.path(), 10);
        assert_eq!(ledger.admit("a", 7).await.expect("written"), Ok(()));
        assert_eq!(ledger.admit("a", 7).await.expect("written"), Ok(()));
        assert_eq!(ledger.admit("a", 6).await.expect("written"), Err(7));
        drop(ledger);
        let ledger = open(dir.path(), 10);
        assert_eq!(ledger.admit("a", 6).await.expect("written"), Err(7));
        assert_eq!(ledger.admit("b", 1).await.expect("written"), Ok(()));
    }

    #[tokio::test]
    async fn outcomes_survive_and_the_oldest_go_first() {
        let dir = tempfile::tempdir().expect("directory");
        let ledger = open(dir.path(), 3);
        let refused: Outcome = Err(Refusal::memory(5, 4));
        ledger.begin(&step(0)).await.expect("written");
        for number in 1..=3 {
            ledger.conclude(&step(number), &refused).await.expect("written");
        }
        drop(ledger);
        let ledger = open(dir.path(), 3);
        assert_eq!(ledger.past(&step(0)), None);
        assert_eq!(ledger.past(&step(3)), Some(Past::Done(refused)));
    }

    #[tokio::test]
    async fn a_step_that_was_begun_is_known_as_such() {
        let dir = tempfile::tempdir().expect("directory");
        let ledger = open(dir.path(), 3);
        ledger.begin(&step(1)).await.expect("written");
        drop(ledger);
        assert_eq!(open(dir.path(), 3).past(&step(1)), Some(Past::Begun));
    }

    #[tokio::test]
    async fn the_file_stays_small_however_many_steps_there_are() {
        let dir = tempfile::tempdir().expect("directory");
        let ledger = open(dir.path(), 8);
        let outcome: Outcome = Err(Refusal::new(Reason::Failed, "x"));
        for number in 0..500 {
            ledger.conclude(&step(number), &outcome).await.expect("written");
        }
        assert_eq!(ledger.past(&step(499)), Some(Past::Done(outcome)));
        let text = fs::read_to_string(dir.path().join("ledger.jsonl")).expect("read");
        assert!(text.lines().count() <= 4 * 8 + 64 + 16, "{} lines", text.lines().count());
    }

    #[tokio::test]
    async fn a_torn_last_line_is_dropped_and_damage_elsewhere_is_an_error() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("ledger.jsonl");
        let good = "{\"format\":1}\n{\"epoch\":{\"pool\":\"a\",\"epoch\":7}}\n";
        fs::write(&path, format!("{good}{{\"epoch\":{{\"po")).expect("write");
        assert_eq!(open(dir.path(), 8).admit("a", 6).await.expect("written"), Err(7));
        fs::write(&path, format!("{good}junk\n{good}")).expect("write");
        assert!(Ledger::open(dir.path(), 8, &TaskTracker::new()).is_err());
    }

    #[tokio::test]
    async fn what_was_written_before_steps_had_numbers_is_understood() {
        let dir = tempfile::tempdir().expect("directory");
        let vm = Uuid::from_u128(1);
        let state = serde_json::to_string(&DomainState::halted(vm, "operation-1", "")).expect("JSON");
        let step = format!("{{\"operation\":\"operation-1\",\"vm\":\"{vm}\",\"kind\":\"start\"}}");
        let done = format!("{{\"done\":{{\"step\":{step},\"outcome\":{{\"Ok\":{state}}}}}}}");
        fs::write(dir.path().join("ledger.jsonl"), format!("{{\"format\":1}}\n{done}\n")).expect("write");
        let outcome = Past::Done(Ok(DomainState::halted(vm, "operation-1", "").into()));
        assert_eq!(open(dir.path(), 8).past(&step_of(vm)), Some(outcome));
    }

    #[tokio::test]
    async fn volumes_and_stores_are_told_apart_from_domains() {
        let dir = tempfile::tempdir().expect("directory");
        let ledger = open(dir.path(), 10);
        let outcomes = [
            Done::Store(StoreState::of(Uuid::from_u128(1))),
            Done::Volume(VolumeState { vdi: Some(Uuid::from_u128(1)), ..VolumeState::default() }),
            DomainState::halted(Uuid::from_u128(1), "", "").into(),
        ];
        for (number, done) in (0..).zip(outcomes.clone()) {
            ledger.conclude(&step(number), &Ok(done)).await.expect("written");
        }
        drop(ledger);
        let ledger = open(dir.path(), 10);
        for (number, done) in (0..).zip(outcomes) {
            assert_eq!(ledger.past(&step(number)), Some(Past::Done(Ok(done))));
        }
    }

    fn step_of(vm: Uuid) -> StepKey {
        StepKey { subject: vm, ..step(1) }
    }
}
