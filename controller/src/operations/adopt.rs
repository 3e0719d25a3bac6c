//! Operations, tasks and answers that nobody has in hand.

use std::sync::Arc;
use std::time::Duration;

use datamodel::Operation;
use datamodel::fields::operation;
use raft_store::Row;
use tokio::task::JoinSet;

use super::journal::Journal;
use super::{debts, engine};
use crate::controller::Shared;
use crate::failure::{Failure, Served};
use crate::{repeats, tasks};

/// What nobody has in hand is looked for this often.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 1_000 });

/// Finishes what nobody has in hand, and fails the tasks and answers that nobody stands for: what the last master left, and
/// what was let go of here, because a proof of the lead came too late or a caller hung up. Looks again and again; ends
/// when dropped, with all that it has begun.
pub(crate) async fn adopt(shared: &Arc<Shared>) {
    let mut adopted = JoinSet::new();
    loop {
        if let Err(error) = adopt_what_is_left(shared, &mut adopted).await {
            tracing::info!(?error, "what is left is looked at again");
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        while adopted.try_join_next().is_some() {}
    }
}

async fn adopt_what_is_left(shared: &Arc<Shared>, adopted: &mut JoinSet<()>) -> Served<()> {
    let state = shared.store.read().await?;
    let mut tasks = Vec::new();
    for row in state.all::<Operation>() {
        tasks.push(row.get(operation::TASK));
        if !shared.in_hand.has(row.reference) {
            let held = shared.in_hand.hold(row.reference);
            let (shared, row) = (Arc::clone(shared), Arc::clone(row));
            adopted.spawn(async move {
                adopt_one(&shared, &row).await;
                drop(held);
            });
        }
    }
    tasks::fail_orphans(shared, &state, &tasks).await?;
    repeats::fail_orphans(shared, &state).await
}

async fn adopt_one(shared: &Arc<Shared>, row: &Arc<Row>) {
    let journal = Journal::read(row);
    let ended = if journal.only_owes() {
        debts::pay(shared, journal).await
    } else {
        tracing::info!(operation = journal.uuid, verb = journal.verb, "adopting an operation");
        engine::finish(shared, journal).await.map(drop)
    };
    match ended {
        Ok(()) | Err(Failure::Api(_)) => {}
        Err(Failure::NotLeader | Failure::Repeated) => {
            tracing::info!(operation = row.uuid(), "left until the lead is proven again, or to the next master");
        }
    }
}
