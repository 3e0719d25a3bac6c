//! A dump in the place of the pool's rows: all of it at once, or nothing.
//!
//! The dump is read and put together with the pool before anything is changed; a dry run ends there. Then its rows are
//! staged, part by part, where nobody sees them, and one last transaction replaces the pool's rows by them, ends the
//! other sessions and the caller's task. A master that dies before that transaction leaves parts, which the next one
//! throws away.

use std::io::{BufReader, Read};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use datamodel::fields::{operation, registration, staged};
use datamodel::{ClassKind, Member, OpaqueRef, Operation, Ref, Registration, Session, Staged, Task, Value, errors};
use futures::StreamExt;
use raft_store::{CommitError, Conflict, NewRow, Replacement, StagedRow, State, Transaction};
use tokio::sync::mpsc;

use super::plan::{Plan, plan};
use super::{DumpRow, read};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::handlers::{ByteStream, Transfer};
use crate::tasks;

/// A dump may have so many bytes: 64,000 VMs have a tenth of it.
const LARGEST_DUMP: u64 = 8 << 30;
/// About what a part has.
const PART: usize = 512 << 10;
/// While VMs are started and stopped all the time, there may be no moment in between.
const ATTEMPTS: usize = 50;
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Pieces of a dump that wait for the reader.
const WAITING_PIECES: usize = 16;

/// Restores what comes, or, in a dry run, only finds out whether it could be.
pub(crate) async fn restore(transfer: &Transfer, body: ByteStream) -> Served<()> {
    let shared = &transfer.shared;
    let Ok(_alone) = shared.restoring.try_lock() else {
        let pool = transfer.state.all::<datamodel::Pool>().next().map_or(OpaqueRef::NULL, |row| row.reference);
        return refuse(errors::other_operation_in_progress("pool", pool, "restore", OpaqueRef::NULL));
    };
    let dump = Arc::new(receive(body).await?);
    shared.store.until_it_writes(Staged::ID.def().format).await?;
    let (mut state, mut plan) = decide(shared, &dump).await?;
    if transfer.flag("dry_run") {
        tracing::info!(rows = dump.len(), "a dump fits this pool");
        return Ok(());
    }
    let mut stage = Stage::put(shared, &plan).await?;
    for _ in 0..ATTEMPTS {
        match shared.store.commit(last(transfer, &state, &plan, &stage)?).await {
            Ok(index) => {
                tracing::warn!(%index, rows = dump.len(), "the pool's database was restored from a dump");
                return Ok(());
            }
            Err(CommitError::Conflict(Conflict::Changed(Task::NAME, _))) => {
                stage.withdraw(shared).await;
                return refuse(errors::task_cancelled(transfer.task));
            }
            Err(CommitError::Conflict(conflict)) => {
                tracing::info!(%conflict, "the pool has moved while a restore was made ready; looking again")
            }
            Err(error) => {
                tracing::warn!(%error, "the last step of a restore failed");
                stage.withdraw(shared).await;
                return Err(error.into());
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        let before = plan.rows;
        (state, plan) = decide(shared, &dump).await?;
        if plan.rows != before {
            stage.withdraw(shared).await;
            stage = Stage::put(shared, &plan).await?;
        }
    }
    stage.withdraw(shared).await;
    match state.all::<Operation>().next() {
        Some(row) => refuse(errors::other_operation_in_progress(
            "VM",
            row.get(operation::VM),
            row.get(operation::VERB),
            row.get(operation::TASK),
        )),
        None => refuse(errors::internal_error("the pool never rested long enough")),
    }
}

/// Reads what comes, on a thread that may wait for it.
async fn receive(mut body: ByteStream) -> Served<Vec<DumpRow>> {
    let (pieces, receiver) = mpsc::channel(WAITING_PIECES);
    let reading = tokio::task::spawn_blocking(move || read(BufReader::new(Pieces::new(receiver))));
    let mut total = 0;
    while let Some(piece) = body.next().await {
        total += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        let piece = if total > LARGEST_DUMP { Err(std::io::Error::other("too large")) } else { piece };
        let broken = piece.is_err();
        // The reader gives up at the first thing that it does not understand; the rest is read and thrown away.
        let _ = pieces.send(piece).await;
        if broken {
            break;
        }
    }
    drop(pieces);
    let rows = reading.await.map_err(|_| Failure::Api(errors::internal_error("a defect of the server")))?;
    Ok(rows?)
}

/// The body as something that can be read from.
struct Pieces {
    receiver: mpsc::Receiver<std::io::Result<Bytes>>,
    open: Bytes,
}

impl Pieces {
    fn new(receiver: mpsc::Receiver<std::io::Result<Bytes>>) -> Self {
        Self { receiver, open: Bytes::new() }
    }
}

impl Read for Pieces {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        while self.open.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.open = piece?,
                None => return Ok(0),
            }
        }
        let length = self.open.len().min(out.len());
        self.open.copy_to_slice(&mut out[..length]);
        Ok(length)
    }
}

async fn decide(shared: &Shared, dump: &Arc<Vec<DumpRow>>) -> Served<(Arc<State>, Plan)> {
    let state = shared.store.read().await?;
    let (dump, seen) = (Arc::clone(dump), Arc::clone(&state));
    let planned = tokio::task::spawn_blocking(move || plan(&dump, &seen)).await;
    let planned = planned.map_err(|_| Failure::Api(errors::internal_error("a defect of the server")))?;
    Ok((state, planned?))
}

/// The transaction that makes the dump the pool's.
fn last(transfer: &Transfer, state: &State, plan: &Plan, stage: &Stage) -> Served<Transaction> {
    let shared = &transfer.shared;
    let mut change = shared.transaction();
    // Starts and ends of VMs, and hosts that come and go, would make it another plan.
    change.expect_class_empty(Operation::ID).expect_class_unchanged(Operation::ID, state.applied);
    change.expect_class_unchanged(Member::ID, state.applied);
    for (class, reference, field, value) in &plan.settings {
        change.set_value(*class, *reference, *field, value.clone());
    }
    for row in state.all::<Session>().filter(|row| row.reference != transfer.who.session.opaque()) {
        change.delete(row.typed::<Session>());
    }
    let asks = |row: &&Arc<raft_store::Row>| row.get(registration::SESSION) != transfer.who.session;
    for row in state.all::<Registration>().filter(asks) {
        change.delete(row.typed::<Registration>());
    }
    if state.row(transfer.task).is_some() {
        tasks::finish_transfer(&mut change, transfer.task, Ok(()), shared.now());
    }
    change.replace(Replacement {
        stage: stage.name.clone(),
        parts: stage.parts.len() as u64,
        classes: plan.classes.clone(),
        keep: plan.keep.clone(),
    });
    Ok(change)
}

/// Rows that wait for the last transaction.
struct Stage {
    name: String,
    parts: Vec<Ref<Staged>>,
}

impl Stage {
    async fn put(shared: &Shared, plan: &Plan) -> Served<Self> {
        let mut stage = Self { name: shared.uuid().to_string(), parts: Vec::new() };
        let mut rest = plan.rows.as_slice();
        while !rest.is_empty() {
            let mut size = 0;
            let fits = rest.iter().take_while(|row| {
                let begun = size;
                size += weight(row);
                begun < PART
            });
            let (part, later) = rest.split_at(fits.count().max(1));
            rest = later;
            if let Err(failure) = stage.add(shared, part).await {
                stage.withdraw(shared).await;
                return Err(failure);
            }
        }
        Ok(stage)
    }

    async fn add(&mut self, shared: &Shared, rows: &[StagedRow]) -> Served<()> {
        let reference: Ref<Staged> = Ref::new(shared.uuid());
        let mut change = shared.transaction();
        change.insert(
            NewRow::new(reference, shared.uuid())
                .with(staged::STAGE, self.name.clone())
                .with(staged::PLACE, i64::try_from(self.parts.len()).unwrap_or(i64::MAX))
                .with(staged::CONTENT, StagedRow::part(rows, shared.store.format())?),
        );
        self.parts.push(reference);
        loop {
            match shared.store.commit(change.clone()).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Overloaded) => tokio::time::sleep(LOOK_AGAIN).await,
                Err(error) => {
                    tracing::warn!(%error, part = self.parts.len(), "a part of a dump cannot be staged");
                    return Err(error.into());
                }
            }
        }
    }

    /// What is not used goes. Where that fails, the next restore or the next master does it.
    async fn withdraw(&self, shared: &Shared) {
        let mut change = shared.transaction();
        for part in &self.parts {
            change.delete(*part);
        }
        if let Err(error) = shared.store.commit(change).await {
            tracing::debug!(%error, "the parts of a restore that did not come to its end stay for a while");
        }
    }
}

/// About the bytes that a row takes.
fn weight(row: &StagedRow) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::Str(text) => text.len() + 8,
            Value::Set(members) => members.iter().map(of).sum::<usize>() + 8,
            Value::Map(entries) => {
                entries.iter().map(|(key, value)| key.text().len() + of(value) + 16).sum::<usize>() + 8
            }
            _ => 24,
        }
    }
    row.fields.iter().map(|(_, value)| of(value) + 24).sum::<usize>() + 32
}

/// Throws away what restores of earlier masters have left: none of them can come to its end.
pub(crate) async fn forget_stages(shared: &Arc<Shared>) {
    let _alone = shared.restoring.lock().await;
    loop {
        let mut change = shared.transaction();
        for row in shared.store.state().all::<Staged>() {
            change.delete(row.typed::<Staged>());
        }
        if change.is_empty() {
            return;
        }
        match shared.store.commit(change).await {
            Ok(_) | Err(CommitError::NotLeader(_)) => return,
            Err(error) => tracing::debug!(%error, "parts of a restore are thrown away later"),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
