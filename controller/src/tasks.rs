//! Tasks: what runs behind a reference, and what is left of it when it is over.

use std::collections::{BTreeMap, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use datamodel::enums::{TaskAllowedOperations, TaskStatusType};
use datamodel::fields::{operation, task};
use datamodel::{ApiError, ClassKind, Operation, Ref, Task, Timestamp, Value, encode, errors};
use futures::FutureExt;
use parking_lot::Mutex;
use raft_store::{CommitError, NewRow, State, Transaction};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::api::Handler;
use crate::call::{Call, Reply};
use crate::controller::Shared;
use crate::dispatch;
use crate::failure::{Failure, Served, refuse};
use crate::handlers::parameter;
use crate::repeats::Stage;

const KEPT_COMPLETED_SECONDS: i64 = 65 * 60;
const KEPT_PENDING_SECONDS: i64 = 24 * 3600;
const KEPT_TASKS: usize = 200;
const PASS_EVERY: Duration = Duration::from_secs(30);
/// Calls under way behind tasks; more are refused, so that a flood cannot take the host down.
const MOST_RUNNING: usize = 1000;
const SETTLE_AGAIN: Duration = Duration::from_millis(100);
/// Who cancels a task whose operation is under way is told so long how that ends, and then that it was cancelled.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// Tasks that run in this process, and how to stop them.
#[derive(Default)]
pub(crate) struct Running {
    tokens: Mutex<HashMap<Ref<Task>, CancellationToken>>,
}

impl Running {
    /// Enters a task, until what is returned is dropped: whoever is dropped with it has stopped running it.
    fn start(shared: &Arc<Shared>, task: Ref<Task>, token: CancellationToken) -> Served<Run> {
        let mut tokens = shared.tasks.tokens.lock();
        if tokens.len() >= MOST_RUNNING {
            return refuse(errors::too_many_pending_tasks());
        }
        tokens.insert(task, token);
        Ok(Run { shared: Arc::clone(shared), task })
    }

    fn end(&self, task: Ref<Task>) {
        self.tokens.lock().remove(&task);
    }

    pub(crate) fn runs(&self, task: Ref<Task>) -> bool {
        self.tokens.lock().contains_key(&task)
    }

    fn cancel(&self, task: Ref<Task>) -> bool {
        self.tokens.lock().get(&task).map(CancellationToken::cancel).is_some()
    }
}

/// A task that runs here.
pub(crate) struct Run {
    shared: Arc<Shared>,
    task: Ref<Task>,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.shared.tasks.end(self.task);
    }
}

/// Adds a new pending task to a transaction.
pub(crate) fn insert(call: &Call, change: &mut Transaction, label: String, description: String) -> Ref<Task> {
    let reference: Ref<Task> = call.reference();
    let host = call.session_row().map_or(Ref::NULL, |row| row.get(datamodel::fields::session::THIS_HOST));
    let row = pending(reference, call.uuid(), label, description, call.now());
    change.insert(row.with(task::RESIDENT_ON, host));
    reference
}

fn pending(reference: Ref<Task>, uuid: Uuid, label: String, description: String, now: Timestamp) -> NewRow<Task> {
    NewRow::new(reference, uuid)
        .with(task::NAME_LABEL, label)
        .with(task::NAME_DESCRIPTION, description)
        .with(task::CREATED, now)
        .with(task::FINISHED, Timestamp::EPOCH)
        .with(task::STATUS, TaskStatusType::Pending)
        .with(task::TYPE, "<none/>".to_owned())
        .with(task::BACKTRACE, "()".to_owned())
}

/// Adds the end of a task to a transaction.
pub(crate) fn finish(
    change: &mut Transaction,
    reference: Ref<Task>,
    outcome: Result<&Value, &ApiError>,
    now: Timestamp,
) {
    change
        .set(reference, task::PROGRESS, 1.0)
        .set(reference, task::FINISHED, now)
        .set(reference, task::ALLOWED_OPERATIONS, Vec::new())
        .set(reference, task::CURRENT_OPERATIONS, BTreeMap::new());
    match outcome {
        Ok(value) => {
            let mut text = Vec::new();
            // A message without a result leaves an empty value there, not an empty text.
            encode::xml(value, &mut text);
            change.set(reference, task::RESULT, String::from_utf8_lossy(&text).into_owned());
            change.set(reference, task::STATUS, TaskStatusType::Success);
        }
        Err(error) => {
            let cancelled = error.code == errors::TASK_CANCELLED;
            change.set(reference, task::ERROR_INFO, error.description());
            change.set(
                reference,
                task::STATUS,
                if cancelled { TaskStatusType::Cancelled } else { TaskStatusType::Failure },
            );
        }
    }
}

/// Runs a call behind a task. The task is committed before the answer, so that it can be watched at once.
pub(crate) async fn start(mut call: Call, handler: Option<Handler>, values: Vec<Value>) -> Served<Ref<Task>> {
    let mut change = call.transaction();
    let reference = insert(&call, &mut change, format!("Async.{}", call.message.full_name), String::new());
    change.set(reference, task::ALLOWED_OPERATIONS, vec![TaskAllowedOperations::Cancel]);
    // A caller that hangs up while this is committed leaves a task that nobody runs, and that is ended as such.
    let run = Running::start(&call.shared, reference, call.cancel.clone())?;
    call.commit_as(change, Stage::Done(Value::Ref(reference.opaque()))).await?;
    // Who repeats the call is told of the task; what comes of it is the task's.
    call.forget_stage();
    call.repeat = None;
    call.task = reference;
    let shared = Arc::clone(&call.shared);
    let watched = call.fork();
    // Owned by the registry of running tasks, ended by the process's shutdown.
    tokio::spawn(async move {
        let _running = run;
        let outcome = tokio::select! {
            outcome = guarded(dispatch::answer(&mut call, handler, values)) => outcome,
            () = cancelled(&watched) => refuse(errors::task_cancelled(reference)),
            () = shared.shutdown.cancelled() => return,
        };
        settle(&call, reference, outcome).await;
    });
    Ok(reference)
}

/// Waits until a call is cancelled and has either nothing under way, or something that does not end for long. An operation
/// says itself whether it was cancelled or came to its end.
async fn cancelled(call: &Call) {
    call.cancel.cancelled().await;
    if call.operates() {
        tokio::time::sleep(CANCEL_LIMIT).await;
    }
}

/// A defect in a function must not leave its task pending for ever.
pub(crate) async fn guarded(work: impl Future<Output = Served<Reply>>) -> Served<Reply> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| {
        tracing::error!("a call behind a task panicked");
        refuse(errors::internal_error("a defect of the server; its log says more"))
    })
}

/// Records a task's end; tries again for as long as this node leads, since nobody else will.
async fn settle(call: &Call, reference: Ref<Task>, outcome: Served<Reply>) {
    let shared = &call.shared;
    let outcome = match outcome {
        Ok(Reply::Value(value)) => Ok(value),
        Ok(_) => Ok(Value::Void),
        // The new master adopts what was under way, and settles the task.
        Err(Failure::NotLeader | Failure::Repeated) => return,
        Err(Failure::Api(error)) => Err(error),
    };
    if let Err(error) = &outcome {
        tracing::info!(task = %reference, %error, "task failed");
    }
    let mut change = shared.transaction();
    match (call.stage(), &outcome) {
        // It ended with its effect.
        (Some(Stage::Done(foreseen)), Ok(value)) if foreseen == *value => return,
        // Cancelled too late.
        (Some(Stage::Done(_)), Err(error)) if error.code == errors::TASK_CANCELLED => return,
        // It went on after what looked like its end.
        (Some(Stage::Done(_)), _) => {}
        _ => {
            change.expect(reference, task::STATUS, TaskStatusType::Pending);
        }
    }
    finish(&mut change, reference, outcome.as_ref(), shared.now());
    record_end(shared, reference, change).await;
}

/// Commits a task's end.
async fn record_end(shared: &Shared, reference: Ref<Task>, change: Transaction) {
    loop {
        match shared.store.commit(change.clone()).await {
            Ok(_) => return,
            Err(error @ (CommitError::Overloaded | CommitError::Unknown)) if shared.epoch().is_some() => {
                tracing::debug!(task = %reference, %error, "the task's end is recorded later");
                tokio::select! {
                    () = tokio::time::sleep(SETTLE_AGAIN) => {}
                    () = shared.shutdown.cancelled() => return,
                }
            }
            // Destroyed or ended meanwhile, or left to the next master.
            Err(error) => {
                tracing::debug!(task = %reference, %error, "the task's end was not recorded");
                return;
            }
        }
    }
}

/// The key by which a task shows that a handler works under it. A master that is lost leaves it, so that the next one
/// can end the task.
const HANDLED: &str = "handled_by";

/// Takes over the task that a handler's client made (`task_id`), or makes one below another (`subtask_of`); null where
/// the client asks for neither.
pub(crate) async fn adopt(
    shared: &Arc<Shared>,
    state: &State,
    query: &[(String, String)],
    label: &str,
    cancel: CancellationToken,
) -> Served<(Ref<Task>, Option<Run>)> {
    let named = |name: &str| match parameter(query, name) {
        Some(text) => {
            let invalid = || Failure::Api(errors::handle_invalid(Task::NAME, text));
            let reference: Ref<Task> = Ref::from_opaque(text.parse().map_err(|_| invalid())?);
            state.row(reference).ok_or_else(invalid).map(Some)
        }
        None => Ok(None),
    };
    let mut change = shared.transaction();
    let reference = match (named("task_id")?, named("subtask_of")?) {
        (Some(row), _) if row.get(task::STATUS) != TaskStatusType::Pending => return Ok((Ref::NULL, None)),
        (Some(row), _) => {
            let reference = row.typed::<Task>();
            change.expect(reference, task::STATUS, TaskStatusType::Pending).set(reference, task::PROGRESS, 0.0);
            reference
        }
        (None, Some(above)) => {
            let reference: Ref<Task> = Ref::new(shared.uuid());
            let row = pending(reference, shared.uuid(), label.to_owned(), String::new(), shared.now());
            change.insert(row.with(task::SUBTASK_OF, above.typed::<Task>()));
            reference
        }
        (None, None) => return Ok((Ref::NULL, None)),
    };
    change.put(reference, task::OTHER_CONFIG, HANDLED.to_owned(), label.to_owned());
    let run = Running::start(shared, reference, cancel)?;
    shared.store.commit(change).await?;
    Ok((reference, Some(run)))
}

/// Ends a handler's task. A transfer has no result.
pub(crate) async fn end_transfer(shared: &Arc<Shared>, reference: Ref<Task>, outcome: Result<(), &ApiError>) {
    if reference.is_null() {
        return;
    }
    let mut change = shared.transaction();
    finish_transfer(&mut change, reference, outcome, shared.now());
    record_end(shared, reference, change).await;
}

/// Adds the end of a handler's task to a transaction, which has no effect where the task has ended already.
pub(crate) fn finish_transfer(
    change: &mut Transaction,
    reference: Ref<Task>,
    outcome: Result<(), &ApiError>,
    now: Timestamp,
) {
    change.expect(reference, task::STATUS, TaskStatusType::Pending);
    finish(change, reference, outcome.map(|()| &Value::Void), now);
    change.set(reference, task::RESULT, String::new());
}

/// Ends the task of a request that is not served, for who waits for it.
pub(crate) async fn refuse_transfer(shared: &Arc<Shared>, state: &State, query: &[(String, String)], error: &ApiError) {
    let reference = parameter(query, "task_id").and_then(|text| text.parse().ok()).map(Ref::<Task>::from_opaque);
    let there = reference.filter(|reference| state.row(*reference).is_some());
    end_transfer(shared, there.unwrap_or(Ref::NULL), Err(error)).await;
}

/// `task.cancel`.
pub(crate) async fn cancel(call: &Call, reference: Ref<Task>) -> Served<()> {
    let row = call.row(reference)?;
    if row.get(task::STATUS) != TaskStatusType::Pending {
        return Ok(());
    }
    let mut change = call.transaction();
    let of_an_operation = || call.state.all::<Operation>().any(|row| row.get(operation::TASK) == reference);
    if call.shared.tasks.cancel(reference) || of_an_operation() {
        change.put(reference, task::CURRENT_OPERATIONS, call.task.to_string(), TaskAllowedOperations::Cancel);
    } else {
        // Nobody runs it: a task that a client made for itself.
        finish(&mut change, reference, Err(&errors::task_cancelled(reference)), call.now());
    }
    call.commit(change).await?;
    Ok(())
}

/// Tasks that are pending, that nobody runs, and that no operation stands for: nobody will ever finish them.
pub(crate) async fn fail_orphans(shared: &Arc<Shared>, state: &State, kept: &[Ref<Task>]) -> Served<()> {
    let mut change = shared.transaction();
    for row in state.all::<Task>() {
        let reference = row.typed::<Task>();
        let ours = row.get(task::NAME_LABEL).starts_with("Async.") || row.get(task::OTHER_CONFIG).contains_key(HANDLED);
        let pending = row.get(task::STATUS) == TaskStatusType::Pending;
        if ours && pending && !kept.contains(&reference) && !shared.tasks.runs(reference) {
            let lost = errors::internal_error("the master that ran this task was lost");
            // Its end may have been recorded since.
            change.expect(reference, task::STATUS, TaskStatusType::Pending);
            finish(&mut change, reference, Err(&lost), shared.now());
        }
    }
    if !change.is_empty() {
        shared.store.commit(change).await?;
    }
    Ok(())
}

/// Forgets tasks that are over for long, and the oldest where there are too many.
pub(crate) async fn collect(shared: &Arc<Shared>) {
    loop {
        tokio::time::sleep(PASS_EVERY).await;
        if let Err(error) = pass(shared).await {
            tracing::warn!(?error, "tasks were not collected");
        }
    }
}

pub(crate) async fn pass(shared: &Arc<Shared>) -> Served<()> {
    let state = shared.store.read().await?;
    let now = shared.grown();
    let mut change = shared.transaction();
    let mut completed = Vec::new();
    let mut total = 0;
    for row in state.all::<Task>() {
        let reference = row.typed::<Task>();
        total += 1;
        if row.get(task::STATUS) == TaskStatusType::Pending {
            let old = now.0 - row.get(task::CREATED).0 > KEPT_PENDING_SECONDS;
            if old && !shared.tasks.runs(reference) {
                let lost = errors::internal_error("the task made no progress for a day");
                finish(&mut change, reference, Err(&lost), shared.now());
            }
        } else {
            completed.push((row.get(task::FINISHED), reference));
        }
    }
    completed.sort_unstable();
    let surplus = total.max(KEPT_TASKS) - KEPT_TASKS;
    for (place, (finished, reference)) in completed.iter().enumerate() {
        if place < surplus || now.0 - finished.0 > KEPT_COMPLETED_SECONDS {
            change.delete(*reference);
        }
    }
    if !change.is_empty() {
        shared.store.commit(change).await?;
    }
    Ok(())
}
