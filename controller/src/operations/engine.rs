//! How an operation goes on, from wherever its journal stands, to its end.

use std::sync::Arc;

use datamodel::enums::{TaskAllowedOperations, TaskStatusType};
use datamodel::fields::task;
use datamodel::{Answer, ApiError, ClassKind, Key, Operation, Ref, Task, Value, errors};
use raft_store::{CommitError, Conflict, State, Transaction};

use super::journal::Journal;
use super::step::{self, StepError, Undo};
use super::{ATTEMPTS, Ending, Kind, Seen, kind, refresh};
use crate::agent::Performed;
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::{repeats, tasks};

/// Does what is left of an operation; what its call answers. Also how a new master finishes what the last one began.
pub(super) async fn finish(shared: &Arc<Shared>, mut journal: Journal) -> Served<Value> {
    let Some(kind) = kind(&journal.verb) else {
        let unknown = errors::internal_error("an operation of a kind that this version does not know");
        settle(shared, &journal, None, Some(&unknown)).await?;
        return refuse(unknown);
    };
    if journal.failure.is_none() {
        let came_to = match forward(shared, kind, &mut journal).await {
            Ok(()) => settle(shared, &journal, Some(kind), None).await,
            Err(failure) => Err(failure),
        };
        match came_to {
            Err(Failure::Api(error)) => turn(shared, &mut journal, &error).await?,
            settled => return settled,
        }
    }
    let Some(error) = journal.failure.clone() else { return Err(Failure::NotLeader) };
    undo(shared, &mut journal).await?;
    settle(shared, &journal, Some(kind), Some(&error)).await?;
    refuse(error)
}

/// In tests, the end of a master between any two things that an operation does.
#[cfg(test)]
fn dies(shared: &Shared) -> Served<()> {
    use std::sync::atomic::Ordering;
    let left = shared.dies_after.load(Ordering::SeqCst);
    if left == 1 {
        shared.dies_after.store(0, Ordering::SeqCst);
        return Err(Failure::NotLeader);
    }
    shared.dies_after.store(left.saturating_sub(1), Ordering::SeqCst);
    Ok(())
}

#[cfg(not(test))]
#[allow(clippy::unnecessary_wraps)]
const fn dies(_: &Shared) -> Served<()> {
    Ok(())
}

/// Does the steps that are left.
async fn forward(shared: &Arc<Shared>, kind: &'static dyn Kind, journal: &mut Journal) -> Served<()> {
    loop {
        let state = shared.store.read().await?;
        let plan = kind.plan(&Seen { state: &state, journal })?;
        let Some(step) = plan.get(journal.outcomes.len()) else {
            return match kind.work(shared, journal) {
                Some(work) => work.await,
                None => Ok(()),
            };
        };
        // The first step is not begun of what was cancelled before it, either. Whether an irrevocable one was begun by
        // a master before this one nobody knows.
        if kind.cancellable() && !step.irrevocable && is_cancelled(&state, journal.task) {
            if !journal.adopted || step.undone_if_known {
                journal.undo.remove(&journal.position());
            }
            return refuse(errors::task_cancelled(journal.task));
        }
        dies(shared)?;
        let number = journal.position();
        if let Some(undo) = &step.undo {
            journal.undo.insert(number, undo.clone());
        }
        let outcome = match step::perform(shared, journal, step).await {
            Ok(performed) => performed,
            Err(failed) if step.debt(&failed).is_some() => {
                tracing::warn!(operation = journal.uuid, number, ?failed, "a step is done later");
                journal.debts.extend(step.debt(&failed).map(|debt| (number, debt)));
                Performed::Nothing
            }
            Err(StepError::NotLeader) => return Err(Failure::NotLeader),
            Err(StepError::Refused(refusal)) if refusal.reason() == proto::agent::refusal::Reason::StaleEpoch => {
                return Err(Failure::NotLeader);
            }
            Err(failed) if step.may_fail => {
                tracing::info!(operation = journal.uuid, number, ?failed, "a step failed that may");
                Performed::Nothing
            }
            Err(StepError::Lost(error)) if step.irrevocable => {
                tracing::warn!(operation = journal.uuid, number, %error, "a step without return may have been done");
                Performed::Nothing
            }
            Err(StepError::Refused(refusal)) => {
                journal.undo.remove(&number);
                return refuse(kind.refused(&Seen { state: &state, journal }, step, &refusal));
            }
            Err(StepError::NotReached(error)) => {
                journal.undo.remove(&number);
                return refuse(error);
            }
            Err(StepError::Lost(error)) => {
                if step.undone_if_known {
                    journal.undo.remove(&number);
                }
                return refuse(error);
            }
        };
        dies(shared)?;
        journal.adopted = false;
        journal.outcomes.push(outcome);
        if step.irrevocable {
            journal.undo.clear();
        }
        let plan = kind.plan(&Seen { state: &state, journal })?;
        if let Some(next) = plan.get(journal.outcomes.len()) {
            let (done, all) = (journal.outcomes.len(), plan.len());
            journaled(shared, journal, |state, change| {
                if next.irrevocable && kind.cancellable() {
                    not_cancelled(state, change, journal)?;
                }
                journal.advance(change, next);
                show_progress(state, change, journal.task, done, all);
                Ok(())
            })
            .await?;
        }
    }
}

/// How far it has come, on its task.
#[allow(clippy::cast_precision_loss)]
fn show_progress(state: &State, change: &mut Transaction, task_ref: Ref<Task>, done: usize, all: usize) {
    let pending = |row: &&Arc<raft_store::Row>| row.get(task::STATUS) == TaskStatusType::Pending;
    if state.row(task_ref).filter(pending).is_some() {
        change.set(task_ref, task::PROGRESS, done as f64 / all.max(1) as f64);
    }
}

/// Refuses what was cancelled; a transaction that goes on has no effect where it is cancelled meanwhile.
fn not_cancelled(state: &State, change: &mut Transaction, journal: &Journal) -> Served<()> {
    if is_cancelled(state, journal.task) {
        return refuse(errors::task_cancelled(journal.task));
    }
    if let Some(row) = state.row(journal.task) {
        change.expect_row(row);
    }
    Ok(())
}

/// Commits a change of the journal between two steps. Whoever is in doubt leaves the operation to be adopted.
async fn journaled(
    shared: &Arc<Shared>,
    journal: &Journal,
    write: impl Fn(&State, &mut Transaction) -> Served<()> + Send + Sync,
) -> Served<()> {
    for _ in 0..ATTEMPTS {
        let state = shared.store.read().await?;
        let mut change = shared.transaction();
        change.expect_exists(Operation::ID, journal.reference.opaque());
        write(&state, &mut change)?;
        match shared.store.commit(change).await {
            Ok(_) => return Ok(()),
            // The task was thrown away meanwhile, or changed; without the journal there is nothing to go on with.
            Err(CommitError::Conflict(Conflict::Missing(Task::NAME, _) | Conflict::Changed(Task::NAME, _))) => {}
            Err(_) => return Err(Failure::NotLeader),
        }
    }
    Err(Failure::NotLeader)
}

pub(crate) fn is_cancelled(state: &State, task_ref: Ref<Task>) -> bool {
    state.row(task_ref).is_some_and(|row| {
        row.get(task::STATUS) == TaskStatusType::Cancelled
            || row.get(task::CURRENT_OPERATIONS).values().any(|operation| *operation == TaskAllowedOperations::Cancel)
    })
}

/// From now on the operation is undone; said in the journal where there is something to undo.
async fn turn(shared: &Arc<Shared>, journal: &mut Journal, error: &ApiError) -> Served<()> {
    journal.failure = Some(error.clone());
    if journal.undo.is_empty() {
        return Ok(());
    }
    let journal = &*journal;
    journaled(shared, journal, |_, change| {
        journal.turn(change, error);
        let number = journal.position();
        if !journal.undo.contains_key(&number) {
            journal.forget_undo(change, number);
        }
        Ok(())
    })
    .await
}

/// Undoes what was done, the last first. What stays in the journal's `undo` could not be, for now.
pub(super) async fn undo(shared: &Arc<Shared>, journal: &mut Journal) -> Served<()> {
    let mut left = std::collections::BTreeMap::new();
    while let Some((number, undo)) = journal.undo.pop_last() {
        dies(shared)?;
        match step::undo(shared, journal, number, &undo).await {
            Ok(_) => {}
            Err(StepError::NotLeader) => return Err(Failure::NotLeader),
            Err(StepError::Refused(refusal)) => {
                let reason = refusal.reason();
                if reason == proto::agent::refusal::Reason::StaleEpoch {
                    return Err(Failure::NotLeader);
                }
                let (operation, why) = (&journal.uuid, &refusal.detail);
                if undo.is_worth_another_try(reason) {
                    tracing::warn!(operation, number, why, "a step cannot be undone yet");
                    left.insert(number, Undo { refused: undo.refused.saturating_add(1), ..undo });
                } else {
                    tracing::warn!(operation, number, why, "a step cannot be undone");
                }
            }
            Err(StepError::NotReached(error) | StepError::Lost(error)) => {
                tracing::warn!(operation = journal.uuid, number, %error, "a step is undone later");
                left.insert(number, undo);
            }
        }
    }
    journal.undo = left;
    Ok(())
}

/// Records how an operation ended: what its kind says, its objects, its task, its answer, the journal. Decides anew while
/// others change the same objects.
async fn settle(
    shared: &Arc<Shared>,
    journal: &Journal,
    kind: Option<&'static dyn Kind>,
    failed: Option<&ApiError>,
) -> Served<Value> {
    dies(shared)?;
    for _ in 0..ATTEMPTS {
        let state = shared.store.read().await?;
        if state.row(journal.reference).is_none() {
            // Somebody else has settled it, who leads.
            return Err(Failure::NotLeader);
        }
        let mut change = shared.transaction();
        change.expect_exists(Operation::ID, journal.reference.opaque());
        // Whoever is told that it was cancelled can be sure that it was not done.
        if failed.is_none() && !journal.undo.is_empty() && kind.is_some_and(Kind::cancellable) {
            not_cancelled(&state, &mut change, journal)?;
        }
        match if failed.is_some() { &journal.undo } else { &journal.debts } {
            nothing if nothing.is_empty() => drop(change.delete(journal.reference)),
            debts => journal.owe(&mut change, debts),
        }
        let_go(&state, &mut change, journal);
        let mut end = Ending { shared, state: &state, journal, change: &mut change };
        let outcome = match (kind, failed) {
            (Some(kind), None) => Ok(kind.record(&mut end)?),
            (Some(kind), Some(error)) => {
                kind.fail(&mut end, error);
                Err(error)
            }
            (None, failed) => failed.map_or(Ok(Value::Void), Err),
        };
        refresh(&state, &mut change);
        let result = outcome.as_ref().map_err(|error| *error);
        settle_call(shared, &state, &mut change, journal, result);
        match shared.store.commit(change).await {
            Ok(_) => return Ok(outcome.unwrap_or(Value::Void)),
            Err(CommitError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // What was done stays done: it is looked at again by the next who adopts it.
    Err(Failure::NotLeader)
}

fn let_go(state: &State, change: &mut Transaction, journal: &Journal) {
    let task = Key::from(journal.task.to_string().as_str());
    for (class, reference) in journal.held() {
        if let (Some(row), Some(field)) = (state.row_of(class, reference), class.def().field("current_operations")) {
            change.expect_row(row).remove_from_map(class, reference, field, task.clone());
        }
    }
}

/// The task and the answer of the call that began it.
fn settle_call(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    journal: &Journal,
    result: Result<&Value, &ApiError>,
) {
    if let Some(answer) = journal.answer()
        && let Some(row) = state.row(Ref::<Answer>::from_opaque(answer))
    {
        repeats::close(change, row.typed(), result);
    }
    let task_ref = journal.task;
    if journal.owns_task() {
        change.delete(task_ref);
    } else if let Some(task_row) = state.row(task_ref)
        && task_row.get(task::STATUS) == TaskStatusType::Pending
        // A call that runs here may try something else.
        && (result.is_ok() || !shared.tasks.runs(task_ref))
    {
        tasks::finish(change, task_ref, result, shared.now());
    }
}
