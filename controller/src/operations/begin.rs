//! How an operation begins: checked, marked and written down in one transaction.

use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::operation;
use datamodel::{ApiError, ClassId, ClassKind, Host, Key, Operation, Ref, Task, Value, Vm, errors};
use raft_store::{CommitError, Row, State, Transaction};
use tracing::Instrument;

use super::journal::{Entry, Journal};
use super::{ATTEMPTS, Kind, Seen, engine, refresh};
use crate::call::Call;
use crate::failure::{Failure, Served, refuse};
use crate::in_hand::Hold;
use crate::repeats::Stage;
use crate::tasks;

/// A call waits so long for what is done to a whole SR, or to the drives of its VM.
const BUSY_LIMIT: Duration = Duration::from_secs(120);

/// An operation that is about to begin, over the pool as it is.
pub(crate) struct Draft<'a> {
    pub(crate) call: &'a Call,
    pub(crate) state: &'a Arc<State>,
    /// What is to be written besides the journal, and what must still hold.
    pub(crate) change: Transaction,
    /// Stands for the operation in `current_operations`.
    pub(crate) task: Ref<Task>,
    entry: Entry,
}

impl Draft<'_> {
    /// A row that must exist.
    pub(crate) fn row<C: ClassKind>(&self, reference: Ref<C>) -> Served<Arc<Row>> {
        crate::call::find(self.state, reference)
    }

    /// Marks an object: until the end it carries the operation, and it is the version that was looked at.
    pub(crate) fn hold(&mut self, row: &Row, operation: &'static str) {
        let Some(field) = row.class.def().field("current_operations") else { return };
        let (class, reference) = (row.class, row.reference);
        let task = Key::from(self.task.to_string().as_str());
        self.change.expect_row(row).insert_in_map(class, reference, field, task, Value::Enum(operation));
        self.entry.held.push((class, reference));
    }

    /// The VM that it is about.
    pub(crate) fn about(&mut self, vm: Ref<Vm>) -> &mut Self {
        self.entry.vm = vm;
        self
    }

    /// The host that does it.
    pub(crate) fn on(&mut self, host: Ref<Host>) -> &mut Self {
        self.entry.host = host;
        self
    }

    /// What its steps need to know.
    pub(crate) fn note(&mut self, name: impl Into<String>, value: impl ToString) -> &mut Self {
        self.entry.parameters.insert(name.into(), value.to_string());
        self
    }

    /// The fields of an object that it makes, for its end.
    pub(crate) fn note_fields(&mut self, class: ClassId, fields: &[(u16, Value)]) -> &mut Self {
        self.entry.note_fields(class, fields);
        self
    }
}

/// Begins an operation and sees it through. What `draft` checks and writes is decided anew while others are faster. A
/// caller that hangs up or cancels its task stops waiting; what was written down is still done or undone to its end, or
/// nobody would settle it before the next master.
pub(crate) async fn run(
    call: &Call,
    kind: &'static dyn Kind,
    draft: impl Fn(&mut Draft<'_>) -> Served<()> + Send + Sync + 'static,
) -> Served<Value> {
    let call = call.fork();
    let work = async move {
        let whole = async {
            let (journal, _held) = begin(&call, kind, &draft).await?;
            engine::finish(&call.shared, journal).await
        };
        let _operates = call.operating();
        tokio::select! {
            outcome = whole => outcome,
            // The process ends: the operation is the next master's.
            () = call.shared.shutdown.cancelled() => Err(Failure::NotLeader),
        }
    };
    let ended = tokio::spawn(work.in_current_span()).await;
    ended.unwrap_or_else(|_| refuse(errors::internal_error("a defect of the server; its log says more")))
}

async fn begin(
    call: &Call,
    kind: &'static dyn Kind,
    draft: &(impl Fn(&mut Draft<'_>) -> Served<()> + Send + Sync),
) -> Served<(Journal, Hold)> {
    let patience = tokio::time::Instant::now() + BUSY_LIMIT;
    let mut attempts = 0;
    while attempts < ATTEMPTS {
        let mut applied = call.shared.store.applied();
        applied.borrow_and_update();
        match attempt(call, kind, draft).await {
            Ok(Some(begun)) => return Ok(begun),
            Ok(None) => attempts += 1,
            Err(Failure::Api(error)) if is_soon_over(kind, &error) => {
                tokio::select! {
                    changed = applied.changed() => if changed.is_err() { return Err(Failure::NotLeader) },
                    () = tokio::time::sleep_until(patience) => return refuse(error),
                    () = call.cancel.cancelled() => return refuse(errors::task_cancelled(call.task)),
                }
            }
            Err(error) => return Err(error),
        }
    }
    refuse(errors::too_many_pending_tasks())
}

/// What is done to a whole SR is soon over, and nobody who wants a disk has to know of it. Nor has he who reboots a VM
/// that is letting go of one.
fn is_soon_over(kind: &dyn Kind, error: &ApiError) -> bool {
    let class = error.params.first().map(String::as_str);
    error.code == errors::OTHER_OPERATION_IN_PROGRESS
        && (class == Some("SR") || (class == Some("VBD") && kind.waits_for_drives()))
}

/// None where others were faster.
async fn attempt(
    call: &Call,
    kind: &'static dyn Kind,
    decide: &(impl Fn(&mut Draft<'_>) -> Served<()> + Send + Sync),
) -> Served<Option<(Journal, Hold)>> {
    let state = call.latest().await?;
    let epoch = call.shared.epoch().ok_or(Failure::NotLeader)?;
    let mut change = call.transaction();
    let mut entry = Entry::default();
    let task = if call.task.is_null() {
        entry.own_task();
        tasks::insert(call, &mut change, call.message.full_name.to_owned(), String::new())
    } else {
        call.task
    };
    if let Some(repeat) = &call.repeat {
        entry.closes(repeat.reference().opaque());
    }
    let mut draft = Draft { call, state: &state, change, task, entry };
    decide(&mut draft)?;
    let Draft { mut change, entry, .. } = draft;
    let (reference, uuid): (Ref<Operation>, _) = (call.reference(), call.uuid());
    let held = call.shared.in_hand.hold(reference.opaque());
    let foreseen = entry.foresee(reference, uuid, kind.verb(), task);
    let plan = kind.plan(&Seen { state: &state, journal: &foreseen })?;
    let row = entry
        .into_row(&foreseen, uuid, plan.first())
        .with(operation::EPOCH, i64::try_from(epoch.0).unwrap_or(i64::MAX))
        .with(operation::CREATED, call.now());
    change.insert(row);
    refresh(&state, &mut change);
    match call.commit_as(change, Stage::Open).await {
        Ok(_) => {
            let state = call.latest().await?;
            let row = crate::call::find(&state, reference)?;
            Ok(Some((Journal { adopted: false, ..Journal::read(&row) }, held)))
        }
        Err(CommitError::Conflict(conflict)) => {
            // Met by itself, or by another call? The latter is looked at anew.
            match CommitError::Conflict(conflict).into() {
                repeated @ Failure::Repeated => Err(repeated),
                _ => Ok(None),
            }
        }
        Err(error) => Err(error.into()),
    }
}
