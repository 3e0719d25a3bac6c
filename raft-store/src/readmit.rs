//! A leader's part in bringing back members that have lost their databases; see [`crate::fence`].

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use proto::raft as wire;
use proto::raft::raft_client::RaftClient;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::codec::encode_batch;
use crate::fence::{Fence, Stage};
use crate::format::OLDEST;
use crate::machine::Machine;
use crate::peer::Dial;
use crate::proposer::Answers;
use crate::record;
use crate::row::LogIndex;
use crate::types::{Batch, Raft};

/// A commit or a call of this kind takes no longer, or is tried again.
const LIMIT: Duration = Duration::from_secs(5);
/// A member that has been told needs a moment to act on it, and says what it says many times over.
const NOT_AGAIN: Duration = Duration::from_secs(1);

/// A member that has said of itself that it lost its database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loss {
    pub(crate) node_id: u64,
    pub(crate) name: Uuid,
}

/// How many may be known of and not yet answered; they tell again.
pub(crate) const WAITING: usize = 8;

/// Answers losses, until the store ends.
pub(crate) async fn run(raft: Raft, peers: Arc<dyn Dial>, mut losses: mpsc::Receiver<Loss>) {
    let mut last: Option<(Loss, Instant)> = None;
    while let Some(loss) = losses.recv().await {
        if last.is_some_and(|(known, since)| known == loss && since.elapsed() < NOT_AGAIN) {
            continue;
        }
        match answer(&raft, &*peers, loss).await {
            Ok(index) => tracing::warn!(node = loss.node_id, index, "a member lost its database and is sent it anew"),
            Err(reason) => {
                tracing::info!(node = loss.node_id, reason, "a member that lost its database is not yet readmitted");
                sleep(NOT_AGAIN).await;
            }
        }
        last = Some((loss, Instant::now()));
    }
}

async fn answer(raft: &Raft, peers: &dyn Dial, loss: Loss) -> Result<u64, String> {
    let node = {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().get_node(&loss.node_id).cloned().ok_or("it is no member")?
    };
    // Its log is shorter than it said before; openraft takes that for an error unless it is told.
    let reverts = raft.trigger().allow_next_revert(&loss.node_id, true).await.map_err(|fatal| fatal.to_string())?;
    reverts.map_err(|error| error.to_string())?;
    // The member acknowledges nothing before it has been told: it is no part of this majority.
    let encoded = encode_batch(OLDEST, &[]);
    let empty = Batch { format: OLDEST, transactions: [].into(), encoded, answers: Answers::default() };
    let committed = timeout(LIMIT, raft.client_write(empty)).await.map_err(|_| "no majority does without it")?;
    let committed = committed.map_err(|error| error.to_string())?.log_id;
    let channel = peers.channel(loss.node_id, &node.peer_address).map_err(|error| error.to_string())?;
    let word = wire::ReadmitRequest {
        loss: loss.name.as_bytes().to_vec().into(),
        committed: Some(record::log_id_to_wire(&committed)),
    };
    let told = timeout(LIMIT, RaftClient::new(channel).readmit(word)).await;
    told.map_err(|_| "it does not answer")?.map_err(|status| status.to_string())?;
    Ok(committed.index())
}

/// Lifts this node's own fence when it has caught up, and lets it stand for election.
pub(crate) async fn lift(raft: Raft, machine: Arc<Machine>, fence: Arc<Fence>) {
    let mut stage = fence.watch();
    let Ok(caught_up) = stage.wait_for(|stage| !matches!(stage, Stage::Lost(_))).await.map(|stage| *stage) else {
        return;
    };
    if let Stage::CatchingUp(_, _, index) = caught_up {
        let mut applied = machine.applied.subscribe();
        if applied.wait_for(|applied| *applied >= LogIndex(index)).await.is_err() {
            return;
        }
        let lifted = match machine.persist_for_good().await {
            Ok(()) => fence.lift(),
            Err(error) => Err(error),
        };
        if let Err(error) = lifted {
            tracing::error!(%error, "the fence stays until the next start");
            return;
        }
        tracing::info!(index, "all that this node had lost is there again");
    }
    raft.runtime_config().elect(true);
}
